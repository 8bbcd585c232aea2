"""Generate captions or answers for batches of preprocessed images."""

import hashlib
import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..checkpoints.load import load


# Default memory for a batch: a size that is fast on a CPU, and a share of a GPU's memory. On a CPU larger batches gain
# nothing, and their large blocks, whose size varies with the batch, fragment the memory.
CPU_MEMORY, GPU_SHARE = 2 * 2**30, 0.25
MAX_BATCH = {"cpu": 32, "cuda": 256}


@dataclass(frozen=True)
class Generation:
    """How texts are generated; fields as in `GenerationConfig`.

    reduction: the budget to prune to, by the checkpoint's schedule; None keeps the checkpoint's own setting. prompt:
        the prompt that captions continue; it is left out of the output.
    """

    reduction: float | None = None
    prompt: str | None = None
    max_new_tokens: int = 30
    num_beams: int = 1
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0

    def generate_kwargs(self) -> dict:
        sampling = {"temperature": self.temperature, "top_p": self.top_p} if self.do_sample else {}
        given = {name: value for name, value in sampling.items() if value is not None}
        return {"num_beams": self.num_beams, "do_sample": self.do_sample, **given}


def prepare(image: Image.Image, image_processor) -> np.ndarray:
    """Resize an RGB image with the image processor -> uint8 (3, height, width); `ImageToText` normalises it.

    Transferring uint8 between processes takes a quarter of the bytes of normalised pixels.
    """
    pixels = image_processor(images=image, do_rescale=False, do_normalize=False, return_tensors="np").pixel_values
    return np.ascontiguousarray(pixels[0], dtype=np.uint8)


class ImageToText:
    """Generates a caption for each image, or an answer to a question about it.

    Args:
        source (`str` or `Path`): a pruned checkpoint, or transformers' BLIP model for the task: a folder or Hub id.
        task (`str`): `"captioning"` or `"vqa"`.
        generation (`Generation`): how texts are generated.
        device, dtype: the device to run on and the dtype; by default a GPU in bfloat16 if there is one, else the CPU
            in float32.
        precision (`str`): how the model is prepared, see `prepare_for_inference`.

    Raises: `ValueError` for a model of another task, a reduction that the model isn't calibrated for, or a prompt that
        is too long; `OSError` if there is no such model.
    """

    def __init__(self, source, task: str, generation=Generation(), device=None, dtype=None, precision="auto"):
        self.task, self.generation = task, generation
        # With several processes on one machine, each uses its own GPU.
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.device = torch.device(device or (gpu if torch.cuda.is_available() else "cpu"))
        self.dtype = getattr(torch, dtype or ("float32" if self.device.type == "cpu" else "bfloat16"))
        loaded = load(source, task, dtype=self.dtype, device="cpu")
        self.model, self.processor = loaded.model, loaded.processor
        if generation.reduction is not None:
            self.model.set_pruning(reduction=generation.reduction)
        self.fingerprint = _digest(self.model)
        self.dtype = self.model.to(self.device).prepare_for_inference(precision).dtype
        image_processor = self.processor.image_processor
        self._scale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        normalises = image_processor.do_normalize
        self._mean, self._std = (
            torch.tensor(values if normalises else [other] * 3, device=self.device)[:, None, None]
            for values, other in ((image_processor.image_mean, 0.0), (image_processor.image_std, 1.0))
        )
        self._prompt, room = None, self.model.config.text_config.max_position_embeddings - 1
        if generation.prompt:
            self._prompt = self.processor.tokenizer(generation.prompt, return_tensors="pt").input_ids.to(self.device)
            room -= self._prompt.shape[1] - 2
        if room < 1:
            raise ValueError(f"The prompt {generation.prompt!r} fills the decoder's length: expected a shorter one.")
        self.max_new_tokens = min(generation.max_new_tokens, room)

    def pixel_values(self, pixels: np.ndarray) -> torch.Tensor:
        """Normalise uint8 (B, 3, H, W), as returned by `prepare`, on the model's device and in its dtype."""
        pixels = torch.from_numpy(pixels).to(self.device).float()
        return pixels.mul_(self._scale).sub_(self._mean).div_(self._std).to(self.dtype)

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray, questions: list[str] | None = None, first: int = 0) -> list[str]:
        """Generate a text for each image.

        Args:
            pixels (`numpy.ndarray` of shape `(batch_size, 3, height, width)`, uint8): images, as returned by
                `prepare`.
            questions (`list[str]`, *optional*): one for each image, for question answering.
            first (`int`): the index of the first row; it is added to the seed for sampling.
        """
        if not len(pixels):
            return []
        try:
            return self._write(pixels, questions, first)
        except torch.cuda.OutOfMemoryError:
            if len(pixels) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(pixels) // 2
        parts = slice(None, half), slice(half, None)
        return [
            text
            for part in parts
            for text in self(pixels[part], None if questions is None else questions[part], first + (part.start or 0))
        ]

    def _write(self, pixels, questions, first: int) -> list[str]:
        tokenizer, inputs, written = self.processor.tokenizer, {}, 1
        if self.task == "vqa":
            longest = self.model.config.text_config.max_position_embeddings
            texts = tokenizer(questions, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            inputs = {name: texts[name].to(self.device) for name in ("input_ids", "attention_mask")}
        elif self._prompt is not None:
            inputs = {"input_ids": self._prompt.expand(len(pixels), -1)}
            written = self._prompt.shape[1] - 1
        settings = self.generation.generate_kwargs()
        if self.generation.do_sample:
            torch.manual_seed(self.generation.seed + first)
        ids = self.model.generate(
            pixel_values=self.pixel_values(pixels), max_new_tokens=self.max_new_tokens, **inputs, **settings
        )
        return [text.strip() for text in tokenizer.batch_decode(ids[:, written:], skip_special_tokens=True)]

    def batch_size(self, memory: int | None = None) -> int:
        """Return how many images fit into `memory` bytes beside the model: a power of two, at most `MAX_BATCH`."""
        if memory is None:
            memory = CPU_MEMORY
            if self.device.type == "cuda":
                memory = int(GPU_SHARE * torch.cuda.get_device_properties(self.device).total_memory)
        vision, text = self.model.config.vision_config, self.model.config.text_config
        tokens = (vision.image_size // vision.patch_size) ** 2 + 1
        # Peak of an encoder layer: hidden states, queries, keys, values, and the feed-forward's two tensors.
        encoder = tokens * (6 * vision.hidden_size + 2 * vision.intermediate_size)
        length = self.max_new_tokens + (0 if self._prompt is None else self._prompt.shape[1])
        kept = 2 * text.num_hidden_layers * text.hidden_size
        decoder = kept * tokens + self.generation.num_beams * (kept * length + 4 * text.vocab_size)
        size = torch.finfo(self.dtype).bits // 8 * (encoder + decoder)
        return 2 ** max(0, min(MAX_BATCH.get(self.device.type, 256), memory // size).bit_length() - 1)


def _digest(model: torch.nn.Module) -> str:
    """Return a digest of a model's parameters, which shows whether a resumed job uses the model that it began with."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
