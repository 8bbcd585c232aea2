"""What a job computes for batches of images and texts: captions, answers, embeddings, matching scores."""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from ..checkpoints.load import load
from ..data.sources import require
from ..modeling.images import UnreadableImage
from ..modeling.modeling_madtp_blip import MadtpBlipForImageTextRetrieval
from ..modeling.modeling_madtp_clip import MadtpClipModel
from ..modeling.texts import tokenize
from ..tasks import TASKS
from .reading import Batch


# Default memory for a batch: a size that is fast on a CPU, and a share of a GPU's memory. On a CPU larger batches gain
# nothing, and their large blocks, whose size varies with the batch, fragment the memory.
CPU_MEMORY, GPU_SHARE = 2 * 2**30, 0.25
MAX_BATCH = {"cpu": 32, "cuda": 256}
# Fields of configurations that no result depends on.
_NAMES: tuple[str, ...] = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "custom_pipelines",
    "dtype",
    "torch_dtype",
    "madtp_version",
)
_NAMES += ("transformers_version", "processor_class", "image_processor_type", "_from_model_config")


@dataclass(frozen=True)
class Generation:
    """How texts are generated; fields as in `GenerationConfig`. prompt: what captions continue, left out of them."""

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


class Worker:
    """Computes a result for each row of a batch; a subclass for each kind of result.

    Args:
        model, processor: as [`load`] loads them.
        reduction (`float`, *optional*): the budget to prune to, by the model's schedule; 0 is off. By default the
            model prunes as it is set.

    Attributes:
        column: the name of the results. tasks: the tasks whose models compute them. reads_images: whether rows need an
        image. text_column: the column of the text that they need.
    """

    column: str
    tasks: tuple[str, ...]
    reads_images = True
    text_column: str | None = None
    load_again: Callable[[], "Worker"] | None = None  # in another process

    def __init__(self, model, processor, reduction: float | None = None):
        self.model, self.processor, self.reduction = model, processor, reduction
        if reduction is not None:
            model.set_pruning(reduction=reduction)
        image_processor = processor.image_processor
        self._scale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        normalises = image_processor.do_normalize
        self._mean, self._std = (
            torch.tensor(values if normalises else [other] * 3, device=model.device)[:, None, None]
            for values, other in ((image_processor.image_mean, 0.0), (image_processor.image_std, 1.0))
        )

    @classmethod
    def load(cls, source, *options, device=None, dtype=None, precision="auto", revision=None) -> "Worker":
        """Load a model for this kind of result: a checkpoint of this package or of transformers, a folder or Hub id.

        Args:
            device, dtype: the device to run on and the dtype; by default a GPU in bfloat16 if there is one, else the
                CPU in float32.
            precision (`str`): how the model is prepared, see `prepare_for_inference`.
            options: further arguments of the class.

        Raises:
            ValueError: for a model of another task, or a reduction that it isn't calibrated for.
            OSError: if there is no such model.
        """
        # With several processes on one machine, each uses its own GPU.
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = torch.device(device or (gpu if torch.cuda.is_available() else "cpu"))
        dtype = dtype or ("float32" if device.type == "cpu" else "bfloat16")
        how = {"dtype": dtype, "precision": precision, "revision": revision}
        loaded = load(source, cls.tasks, device=device, **how)
        worker = cls(loaded.model, loaded.processor, *options)
        worker.load_again = functools.partial(cls.load, source, *options, **how)
        return worker

    @classmethod
    def wanted(cls) -> tuple[str, ...]:
        """Return the columns to open rows with."""
        return (*["image"] * cls.reads_images, *filter(None, [cls.text_column]), "key")

    def settings(self) -> dict:
        """Return all that the results depend on besides the rows."""
        settings = {"output": self.column, **describe_model(self.model)}
        if self.reads_images:
            settings["image_processor"] = _fields(self.processor.image_processor.to_dict())
        return settings

    def pruning_note(self) -> str:
        """Return in words how the model prunes, and why."""
        pruning = self.model.start_pass()
        setting = pruning.setting or {}
        numbers = "".join(f", {name} {setting[name]:.4g}" for name in pruning.method.fields if name in setting)
        how = f"{pruning.method.name}{numbers}" if pruning.is_on else "off"
        return f"as saved ({how})" if self.reduction is None else f"reduction {self.reduction:g} ({how})"

    def value_type(self):
        """Return the Arrow type of a result."""
        return require("pyarrow").string()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> list:
        """Return a result for each usable row of a batch; an [`UnreadableImage`] for one that has none."""
        return self._results(batch.pixels, batch.texts, batch.rows)

    def _results(self, pixels, texts: list, rows: list[int]) -> list:
        if not rows:
            return []
        try:
            return self.compute(pixels, texts, rows)
        except torch.cuda.OutOfMemoryError:
            if len(rows) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(rows) // 2
        return [
            result
            for part in (slice(None, half), slice(half, None))
            for result in self._results(pixels if pixels is None else pixels[part], texts[part], rows[part])
        ]

    def compute(self, pixels: np.ndarray | None, texts: list[str | None], rows: list[int]) -> list:
        """Return a result for each of pixels (B, 3, height, width), uint8, and texts; rows: their indices."""
        raise NotImplementedError

    def pixel_values(self, pixels: np.ndarray) -> torch.Tensor:
        """Normalise uint8 (B, 3, H, W), as returned by `prepare`, on the model's device and in its dtype."""
        values = torch.from_numpy(pixels).to(self.model.device).float()
        return values.mul_(self._scale).sub_(self._mean).div_(self._std).to(self.model.dtype)

    def tokens(self, texts: list[str], truncation: bool | None = True) -> dict[str, torch.Tensor]:
        """Tokenize texts: input_ids and attention_mask (B, L) on the model's device.

        They are truncated with a warning, so that one row that is too long doesn't stop a job.
        """
        longest = self.model.config.text_config.max_position_embeddings
        encoded = tokenize(self.processor.tokenizer, texts, longest, truncation, padding=True, return_tensors="pt")
        return {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def batch_size(self, memory: int | None = None) -> int:
        """Return how many rows fit into `memory` bytes beside the model: a power of two, at most `MAX_BATCH`."""
        device = self.model.device
        if memory is None:
            memory = CPU_MEMORY
            if device.type == "cuda":
                memory = int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
        vision = self.model.config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2 + 1
        # Peak of an encoder layer: hidden states, queries, keys, values, and the feed-forward's two tensors.
        encoder = tokens * (6 * vision.hidden_size + 2 * vision.intermediate_size)
        size = torch.finfo(self.model.dtype).bits // 8 * (encoder + self.decoder_size(tokens))
        return 2 ** max(0, min(MAX_BATCH.get(device.type, 256), memory // size).bit_length() - 1)

    def decoder_size(self, tokens: int) -> int:
        return 0


class Writer(Worker):
    """Generates a caption for each image."""

    column, tasks = "caption", ("captioning",)

    def __init__(self, model, processor, reduction=None, generation: Generation = Generation()):
        super().__init__(model, processor, reduction)
        self.generation = generation
        self._prompt, room = None, model.config.text_config.max_position_embeddings - 1
        if generation.prompt:
            self._prompt = processor.tokenizer(generation.prompt, return_tensors="pt").input_ids.to(model.device)
            room -= self._prompt.shape[1] - 2
        if room < 1:
            raise ValueError(f"The prompt {generation.prompt!r} fills the decoder's length: expected a shorter one.")
        self.max_new_tokens = min(generation.max_new_tokens, room)

    def settings(self) -> dict:
        fields = {name: value for name, value in vars(self.generation).items() if value is not None}
        used = {**self.model.generation_config.to_dict(), **fields, **self.generation.generate_kwargs()}
        if not used["do_sample"]:
            used.pop("seed")
        used["max_new_tokens"] = self.max_new_tokens
        return {**super().settings(), "tokenizer": _tokenizer_digest(self.processor), "generation": _fields(used)}

    def compute(self, pixels, texts, rows):
        tokenizer, inputs, written = self.processor.tokenizer, {}, 1
        if self.text_column is not None:
            inputs = self.tokens(texts)
        elif self._prompt is not None:
            inputs = {"input_ids": self._prompt.expand(len(pixels), -1)}
            written = self._prompt.shape[1] - 1
        if self.generation.do_sample:
            torch.manual_seed(self.generation.seed + rows[0])
        kwargs = {**inputs, **self.generation.generate_kwargs()}
        values = self.pixel_values(pixels)
        ids = self.model.generate(pixel_values=values, max_new_tokens=self.max_new_tokens, **kwargs)
        return [text.strip() for text in tokenizer.batch_decode(ids[:, written:], skip_special_tokens=True)]

    def decoder_size(self, tokens):
        text = self.model.config.text_config
        length = self.max_new_tokens + (0 if self._prompt is None else self._prompt.shape[1])
        kept = 2 * text.num_hidden_layers * text.hidden_size
        return kept * tokens + self.generation.num_beams * (kept * length + 4 * text.vocab_size)


class Answerer(Writer):
    """Generates an answer to each question about an image."""

    column, tasks, text_column = "answer", ("vqa",), "question"


class ImageEmbedder(Worker):
    """Embeds images as L2-normalised vectors, with BLIP for retrieval or CLIP."""

    column, tasks = "embedding", tuple(task.name for task in TASKS.values() if task.embeds)

    def __init__(self, model, processor, reduction=None):
        if not isinstance(model, (MadtpBlipForImageTextRetrieval, MadtpClipModel)):
            raise TypeError(
                f"The model is a {type(model).__name__}: expected MadtpBlipForImageTextRetrieval or MadtpClipModel,"
                " which give images and texts features of one space."
            )
        super().__init__(model, processor, reduction)
        self.size = (model.visual_projection if isinstance(model, MadtpClipModel) else model.vision_proj).out_features

    def value_type(self):
        return require("pyarrow").list_(require("pyarrow").float32(), self.size)

    def compute(self, pixels, texts, rows):
        return _finite(self.features(self.model.get_image_features(self.pixel_values(pixels))))

    @staticmethod
    def features(output) -> np.ndarray:
        """Return features (B, E), or an output's `pooler_output`, in float32, L2-normalised, on the CPU."""
        features = output if isinstance(output, torch.Tensor) else output.pooler_output
        return F.normalize(features.float(), dim=-1).cpu().numpy()


class TextEmbedder(ImageEmbedder):
    """Embeds texts in the same space."""

    reads_images, text_column = False, "captions"

    def settings(self):
        return {**super().settings(), "tokenizer": _tokenizer_digest(self.processor)}

    def embed(self, texts: list[str], truncation: bool | None = True) -> np.ndarray:
        return self.features(self.model.get_text_features(**self.tokens(texts, truncation)))

    def compute(self, pixels, texts, rows):
        return _finite(self.embed(texts))


class Matcher(Worker):
    """Scores how well each image and its text match, from 0 to 1, by BLIP's matching head."""

    column, tasks, text_column = "score", ("retrieval",), "captions"

    def settings(self):
        return {**super().settings(), "tokenizer": _tokenizer_digest(self.processor)}

    def value_type(self):
        return require("pyarrow").float32()

    def logits(self, pixels, texts: list[str]) -> torch.Tensor:
        """Return the matching head's logits (B, 2) of no match and match."""
        return self.model(**self.tokens(texts), pixel_values=self.pixel_values(pixels)).itm_score.float()

    def compute(self, pixels, texts, rows):
        return _finite(self.logits(pixels, texts).softmax(dim=-1)[:, 1].cpu().numpy())


def _finite(values: np.ndarray) -> list:
    """Return the values of a batch; of one that isn't finite, the reason why there is none."""
    good = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    return [
        value if fine else UnreadableImage("the model's result is not a number") for value, fine in zip(values, good)
    ]


# What results depend on


def describe_model(model) -> dict:
    """Describe what a model's results depend on: weights, configuration, dtype and pruning.

    With pruning off, alignment tokens don't count: they have no effect, and those of a dense model are random.
    """
    config, pruning = model.config, model.start_pass()
    host, alignment = (hashlib.blake2b(digest_size=8) for _ in range(2))
    for name, tensor in sorted(model.state_dict().items()):
        digest = alignment if name.startswith("alignment.") else host
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    fields = {
        name: value
        for name, value in _fields(config.to_dict()).items()
        if not name.startswith(("pruning_", "alignment_", "num_alignment"))
    }
    host.update(json.dumps(fields, sort_keys=True, default=str).encode())
    dtype = str(model.dtype).removeprefix("torch.")
    described = {"weights": host.hexdigest(), "dtype": dtype, "precision": model.inference_precision or dtype}
    described |= dict.fromkeys(("alignment", "pruning_method", "pruning_setting", "pruning_modalities"))
    if pruning.is_on:
        described |= {"alignment": alignment.hexdigest(), "pruning_method": pruning.method.name}
        described |= {"pruning_setting": pruning.setting, "pruning_modalities": [*pruning.modalities]}
        described |= {} if config.pruning_layers is None else {"pruning_layers": config.pruning_layers}
        described |= {"pruning_granularity": pruning.granularity, "pruning_token_counts": pruning.token_counts}
    return described


def _fields(config: dict) -> dict:
    """Return a configuration's fields, without names and versions."""
    known = {name: value for name, value in config.items() if name not in _NAMES and value is not None}
    return {name: _fields(value) if isinstance(value, dict) else value for name, value in known.items()}


def _tokenizer_digest(processor) -> str:
    tokenizer = processor.tokenizer
    content = {"vocab": tokenizer.get_vocab()}
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {
            name: value for name, value in content.items() if name not in ("padding", "truncation")
        }  # of a call
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()
