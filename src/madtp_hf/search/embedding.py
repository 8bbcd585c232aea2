"""Embed images and texts in memory as L2-normalised vectors with BLIP for retrieval or CLIP."""

import os

import numpy as np
import torch

from ..budgets.evaluation import prepared
from ..budgets.passes import restored
from ..data.sources import Row
from ..jobs.reading import Reader
from ..jobs.run import progress, run_here
from ..jobs.workers import ImageEmbedder, TextEmbedder
from ..modeling.images import UnreadableImage


class _Given:
    """Images in memory as rows."""

    def __init__(self, images):
        self.images = images

    def rows(self, start: int, stop: int):
        for index in range(start, stop):
            yield Row(index, str(index), {"image": self.images[index]})


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
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1.")
    with restored(model), prepared(model), progress(len(images), "image", show_progress_bar) as bar:
        worker = ImageEmbedder(model, processor, reduction)
        found = np.empty((len(images), worker.size), np.float32)
        rows = np.arange(len(images))
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        reader = Reader(_Given(images), processor.image_processor)
        for batch, values in run_here(reader, worker, batches, num_workers):
            failed = {
                row: value.reason for row, value in zip(batch.rows, values) if isinstance(value, UnreadableImage)
            }
            for index, reason in {**batch.errors, **failed}.items():
                shown = f" ({images[index]})" if isinstance(images[index], (str, os.PathLike)) else ""
                raise ValueError(f"Image {index}{shown} can't be read: {reason}.")
            found[batch.rows] = values
            bar.update(len(values))
    return found


@torch.no_grad()
def encode_texts(
    model,
    processor,
    texts,
    batch_size: int = 64,
    reduction: float | None = None,
    show_progress_bar: bool | None = None,
    truncation: bool | None = False,
) -> np.ndarray:
    """Embed texts as L2-normalised vectors; other arguments and the result are those of `encode_images`.

    truncation: whether to truncate texts that are longer than the model reads, with one warning.

    Raises:
        ValueError: for a text that is too long, unless `truncation` is True.
    """
    if isinstance(texts, str):
        return encode_texts(model, processor, [texts], 1, reduction, truncation=truncation)[0]
    # Similar lengths share a batch, the longest first, so that one that is too long is an error at once.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
    with restored(model), progress(len(texts), "text", show_progress_bar) as bar:
        worker = TextEmbedder(model, processor, reduction)
        found = np.empty((len(texts), worker.size), np.float32)
        for start in range(0, len(texts), batch_size):
            rows = order[start : start + batch_size]
            found[rows] = worker.embed([texts[row] for row in rows], truncation)
            bar.update(len(rows))
    return found
