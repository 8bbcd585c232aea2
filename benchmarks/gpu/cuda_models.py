"""Models and inputs of the GPU benchmark, made of nothing that is read from disk.

The package is imported here without what its `__init__` brings along (the Hub, `Trainer`, data sets): torch and
transformers are enough.
"""

import sys
import types
import warnings
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


def import_bare_package() -> None:
    """Make `madtp_hf.modeling`, `madtp_hf.budgets.calibration` and what these import available, and no more.

    The tasks name their collators, which need Pillow; nothing here collates, so empty classes stand in.
    """
    for path in (ROOT, ROOT / "src"):
        sys.path.insert(0, str(path))
    package, data = types.ModuleType("madtp_hf"), types.ModuleType("madtp_hf.data")
    collators = types.ModuleType("madtp_hf.data.collators")
    package.__path__, data.__path__ = [str(ROOT / "src" / "madtp_hf")], []
    for name in ("CaptioningCollator", "QuestionAnsweringCollator", "RetrievalCollator", "VisualReasoningCollator"):
        setattr(collators, name, type(name, (), {}))
    sys.modules.update({module.__name__: module for module in (package, data, collators)})


import_bare_package()

import torch  # noqa: E402
from transformers import (  # noqa: E402
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)

from madtp_hf.budgets.calibration import calibrate, measure_reduction  # noqa: E402
from madtp_hf.budgets.passes import restored  # noqa: E402
from madtp_hf.modeling import triton_kernels  # noqa: E402
from madtp_hf.modeling.modeling_madtp_blip import (  # noqa: E402
    MadtpBlipForConditionalGeneration,
    MadtpBlipForImageTextRetrieval,
    MadtpBlipForQuestionAnswering,
)


CLASSES = {
    "vqa": (BlipForQuestionAnswering, MadtpBlipForQuestionAnswering),
    "captioning": (BlipForConditionalGeneration, MadtpBlipForConditionalGeneration),
    "retrieval": (BlipForImageTextRetrieval, MadtpBlipForImageTextRetrieval),
}
TEXT_TOKENS = 12  # of a question or caption, special tokens included; in a batch up to 30 % more or fewer
DISTINCT_IMAGES = 32  # larger batches repeat them, shifted and mirrored
CALIBRATION_SEEDS = 1000, 1001  # of images that are not timed


def blip_config(size: str) -> BlipConfig:
    """As `speed.py` makes them; the tiny model's widths are those that the kernels take."""
    if size == "base":
        return BlipConfig(
            text_config={"num_attention_heads": 12},
            # transformers' own default for the vision tower, 1e-10, makes all patches the same.
            vision_config={"image_size": 384, "initializer_range": 0.02},
        )
    narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "initializer_range": 0.2}
    words = {"vocab_size": 200, "bos_token_id": 198, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    return BlipConfig(
        text_config={"num_hidden_layers": 2, **narrow, **words},
        vision_config={"num_hidden_layers": 3, "image_size": 96, "patch_size": 8, **narrow},
        initializer_range=0.2,
    )


def make_models(task: str, size: str, device, dtype=torch.float32, attention: str | None = None, seed: int = 0):
    """transformers' BLIP and ours with the same random weights, in eval mode.

    attention: transformers' `attn_implementation` for its own model; a `ValueError` where it has none of that name.
    """
    torch.manual_seed(seed)
    blip_class, model_class = CLASSES[task]
    if attention == "sdpa" and not blip_class._supports_sdpa:
        raise ValueError("transformers' BLIP of this version has no sdpa")
    with torch.device(device):  # where weights are drawn faster
        dense = blip_class(blip_config(size))
        if attention is not None:
            dense.set_attn_implementation(attention)
        model = model_class.from_blip(dense)
    return tuple(model.to(device=device, dtype=dtype).eval() for model in (dense, model))


def textured_images(n: int, size: int, seed: int = 0) -> torch.Tensor:
    """`n` images (n, 3, size, size) of gratings, blobs and grain, each of its own busyness: tokens differ."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape, low=0.0, high=1.0):
        return torch.rand(*shape, generator=generator) * (high - low) + low

    few = min(n, DISTINCT_IMAGES)
    axis = torch.linspace(-1, 1, size)
    y, x = axis.view(1, size, 1), axis.view(1, 1, size)
    images = torch.zeros(few, 3, size, size)
    for _ in range(6):
        angle, centre_x, centre_y = (
            uniform(few, 1, 1, low=low, high=high) for low, high in ((0, 3.14), (-1, 1), (-1, 1))
        )
        frequency, phase = uniform(few, 1, 1, low=1, high=5).exp(), uniform(few, 1, 1, high=6.28)
        width = uniform(few, 1, 1, low=0.1, high=0.6)
        window = torch.exp(-((x - centre_x) ** 2 + (y - centre_y) ** 2) / width**2)
        grating = torch.sin(frequency * (x * angle.cos() + y * angle.sin()) + phase)
        images += (window * (1 + grating)).unsqueeze(1) * uniform(few, 3, 1, 1, low=-1)
    coarse = torch.randn(few, 3, 12, 12, generator=generator)
    images += 0.5 * torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    images += torch.randn(few, 3, size, size, generator=generator) * uniform(few, 1, 1, 1, high=0.3)
    repeats = [images]
    for turn in range(1, -(-n // few)):
        shifted = images.roll((37 * turn % size, 53 * turn % size), (2, 3))
        repeats.append(shifted.flip(3) if turn % 2 else shifted)
    return torch.cat(repeats)[:n]


def make_inputs(task: str, config, batch_size: int, device, dtype=torch.float32, seed: int = 0, padded=True) -> dict:
    """What `forward` takes: images, and texts of random words and different lengths, padded on the right.

    For question answering one decoder token as well. Not `padded`: texts of one length, and no mask for captions.
    """
    text = config.text_config
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(-0.3, 0.3, batch_size) if batch_size > 1 and padded else torch.zeros(batch_size)
    lengths = (TEXT_TOKENS * (1 + spread)).round().long()
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    words = (text.vocab_size // 20, text.vocab_size // 2)  # none of the special tokens
    ids = torch.randint(*words, mask.shape, generator=generator).where(mask == 1, text.pad_token_id)
    if task == "captioning":
        ids[:, 0] = text.bos_token_id
    pixel_values = textured_images(batch_size, config.vision_config.image_size, seed)
    inputs = {"pixel_values": pixel_values.to(dtype), "input_ids": ids, "attention_mask": mask}
    if task == "captioning" and not padded:
        del inputs["attention_mask"]
    if task == "vqa":
        inputs["decoder_input_ids"] = torch.full((batch_size, 1), text.bos_token_id)
    return {name: value.to(device) for name, value in inputs.items()}


def one_sample(inputs: dict, index: int, unpad: bool) -> dict:
    """Row `index` of a batch by itself, with `unpad` without the padding of its text."""
    length = int(inputs["attention_mask"][index].sum()) if unpad else None
    sample = {name: value[index : index + 1] for name, value in inputs.items()}
    return {k: v[:, :length] if k in ("input_ids", "attention_mask") else v for k, v in sample.items()}


def calibrated(model, samples: int, reductions: list[float], freeze: bool = False) -> list[list[float]]:
    """`calibrate` on a few images; a reduction out of reach gives way to the nearest that is in reach.

    Returns the schedule, at most as long as `reductions`.
    """
    half = samples // 2
    device, dtype = model.device, model.dtype
    data = [make_inputs(model.task, model.config, half, device, dtype, seed=seed) for seed in CALIBRATION_SEEDS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is left out
        try:
            schedule = calibrate(model, data, reductions, freeze)
        except ValueError:
            schedule = []
        if len(schedule) == len(reductions):
            return schedule
        model.config.pruning_granularity = "instance"
        with restored(model):
            reached = {measure_reduction(model, data, 10 ** (step / 2)) for step in range(-14, 11)}
        nearest = sorted({min(reached, key=lambda value, goal=goal: abs(value - goal)) for goal in reductions})
        return calibrate(model, data, [value for value in nearest if value > 0.02], freeze)


class kernels:
    """Context with Triton's kernels on or off; `on` says which. `error`: the message of one that failed, or None."""

    def __init__(self, on: bool):
        self.on, self.error = on, None
        self.before = triton_kernels._enabled

    def __enter__(self):
        self.on = triton_kernels._enabled = self.on and self.before  # what is disabled stays so
        self.caught = warnings.catch_warnings(record=True)
        self.warned = self.caught.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *exception):
        self.caught.__exit__(*exception)
        failures = [
            str(warning.message) for warning in self.warned if "Triton kernels are disabled" in str(warning.message)
        ]
        self.error = failures[0] if failures else None
        # A kernel that failed would fail again at each call.
        triton_kernels._enabled = self.before and self.error is None
