"""Embed images and texts as L2-normalised vectors with BLIP for retrieval or CLIP."""

import os

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..budgets.evaluation import prepared
from ..budgets.passes import restored
from ..modeling.images import read_image
from ..modeling.modeling_madtp_blip import MadtpBlipForImageTextRetrieval
from ..modeling.modeling_madtp_clip import MadtpClipModel
from ..tasks import TASKS


EMBEDDING_TASKS = tuple(task.name for task in TASKS.values() if task.embeds)
BAR_DELAY = 3.0  # seconds before a progress bar appears


class _Pixels(Dataset):
    """Images by index, preprocessed for the model, or the reason why an image can't be read."""

    def __init__(self, images, image_processor):
        self.images, self.image_processor = images, image_processor

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index) -> tuple[int, torch.Tensor | str]:
        try:
            image = read_image(self.images[index])
            # Without the format, an image one or three pixels high would be taken for channels first.
            pixels = self.image_processor(images=image, input_data_format="channels_last", return_tensors="pt")
        except Exception as error:  # one image of a million must not end the run
            return index, getattr(error, "reason", str(error)) or type(error).__name__
        return index, pixels.pixel_values[0]


@torch.inference_mode()
def embed_images(model, processor, images, batch_size: int = 64, num_workers: int = 0):
    """Embed images batch by batch.

    Yields, for each batch, the indices of its readable images, their features (B, E) in float32, and a dict from the
    index of each unreadable image to the reason. `num_workers` processes decode and resize.
    """
    embedding_size(model)  # raises a TypeError for another model
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1.")
    loader = DataLoader(
        _Pixels(images, processor.image_processor), batch_size, num_workers=num_workers, collate_fn=list
    )
    with restored(model), prepared(model):
        for batch in loader:
            readable = [(index, value) for index, value in batch if not isinstance(value, str)]
            unreadable = {index: value for index, value in batch if isinstance(value, str)}
            features = np.empty((0, 0), np.float32)
            if readable:
                pixels = torch.stack([pixels for _, pixels in readable]).to(model.device, model.dtype)
                features = _normalised(model.get_image_features(pixels))
            yield [index for index, _ in readable], features, unreadable


def encode_images(
    model,
    processor,
    images,
    batch_size: int = 64,
    reduction: float | None = None,
    num_workers: int = 0,
    show_progress_bar: bool | None = None,
) -> np.ndarray:
    """Embed images as L2-normalised vectors, whose inner products are cosine similarities.

    Args:
        model (`MadtpBlipForImageTextRetrieval` or `MadtpClipModel`):
            The model; its mode and pruning are restored afterwards.
        processor (`BlipProcessor` or `CLIPProcessor`):
            The model's processor.
        images (`list` of `str`, `Path`, `bytes` or `PIL.Image.Image`, or one of these):
            The images.
        batch_size (`int`, *optional*, defaults to 64):
            Images per forward pass.
        reduction (`float`, *optional*):
            The calibrated share of FLOPs to save; by default the model's current pruning applies.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that decode and resize.
        show_progress_bar (`bool`, *optional*):
            Whether to show a progress bar; by default one appears after a few seconds.

    Returns:
        `np.ndarray` of float32, `(num_images, embedding_size)`; for a single image, not in a list,
        `(embedding_size,)`.

    Raises:
        ValueError: for an image that can't be read; the message names it.
    """
    if isinstance(images, (str, bytes, os.PathLike)) or hasattr(images, "getexif"):
        return encode_images(model, processor, [images], 1, reduction)[0]
    found = [np.empty((0, embedding_size(model)), np.float32)]
    with restored(model), progress(len(images), "image", show_progress_bar) as bar:
        if reduction is not None:
            model.set_pruning(reduction=reduction)
        for indices, features, unreadable in embed_images(model, processor, images, batch_size, num_workers):
            for index, reason in unreadable.items():
                shown = f" ({images[index]})" if isinstance(images[index], (str, os.PathLike)) else ""
                raise ValueError(f"Image {index}{shown} can't be read: {reason}.")
            found.append(features)
            bar.update(len(indices))
    return np.concatenate(found)


@torch.inference_mode()
def encode_texts(
    model,
    processor,
    texts,
    batch_size: int = 64,
    reduction: float | None = None,
    show_progress_bar: bool | None = None,
) -> np.ndarray:
    """Embed texts as L2-normalised vectors; arguments and result are those of `encode_images`.

    Texts longer than the model's maximum length are truncated.
    """
    if isinstance(texts, str):
        return encode_texts(model, processor, [texts], 1, reduction)[0]
    found = np.empty((len(texts), embedding_size(model)), np.float32)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # similar lengths share a batch
    with restored(model), progress(len(texts), "text", show_progress_bar) as bar:
        if reduction is not None:
            model.set_pruning(reduction=reduction)
        for start in range(0, len(texts), batch_size):
            rows = order[start : start + batch_size]
            found[rows] = _normalised(model.get_text_features(**tokenize(model, processor, [texts[i] for i in rows])))
            bar.update(len(rows))
    return found


def tokenize(model, processor, texts: list[str]) -> dict[str, torch.Tensor]:
    """Tokenize texts: input_ids and attention_mask (B, L) on the model's device."""
    longest = model.config.text_config.max_position_embeddings
    encoded = processor.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}


def embedding_size(model) -> int:
    """Return the width of the features that images and texts share; raise a `TypeError` for a model without them."""
    if not isinstance(model, (MadtpBlipForImageTextRetrieval, MadtpClipModel)):
        raise TypeError(
            f"The model is a {type(model).__name__}: expected MadtpBlipForImageTextRetrieval or MadtpClipModel, which"
            " give images and texts features of one space."
        )
    return (model.visual_projection if isinstance(model, MadtpClipModel) else model.vision_proj).out_features


def _normalised(output) -> np.ndarray:
    """Return features (B, E), or an output's `pooler_output`, in float32, L2-normalised, on the CPU."""
    features = output if isinstance(output, torch.Tensor) else output.pooler_output
    return F.normalize(features.float(), dim=-1).cpu().numpy()


def progress(total: int, unit: str, show: bool | None):
    return tqdm(total=total, unit=unit, disable=show is False, delay=0.0 if show else BAR_DELAY, leave=bool(show))
