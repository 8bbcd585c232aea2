"""CLIP_benchmark evaluates zero-shot classification and retrieval with CLIP and with BLIP for retrieval:

    python -m madtp_hf.standard_benchmarks.clip_benchmark eval --model_type madtp_hf --model outputs/clip \\
        --pretrained 0 0.5 0.8 --no_amp --dataset wds/imagenet1k --dataset_root data/wds_imagenet1k \\
        --output 'imagenet_{pretrained}.json'

The command line is CLIP_benchmark's own. `--pretrained` takes reductions.
"""

import functools

import torch

from ..jobs.workers import TextEmbedder
from ..modeling.images import read_image
from . import load_to_evaluate


class ClipBenchmarkModel(torch.nn.Module):
    """A model with the two methods that CLIP_benchmark calls."""

    def __init__(self, model, pad_token_id: int | None):
        super().__init__()
        self.model, self.pad_token_id = model, pad_token_id

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return features (B, E) of pixel_values (B, 3, H, W)."""
        return self.model.get_image_features(pixel_values).pooler_output

    def encode_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return features (B, E) of input_ids (B, L), padded on the right."""
        # CLIP pads with its end of text, and knows by itself that all tokens after the first are padding.
        mask = None if self.pad_token_id is None else (input_ids != self.pad_token_id).long()
        return self.model.get_text_features(input_ids, mask).pooler_output


def to_pixel_values(image, image_processor) -> torch.Tensor:
    """Preprocess an image of any mode into pixel_values (3, H, W)."""
    return image_processor(images=read_image(image), return_tensors="pt").pixel_values[0]


def load_for_clip_benchmark(model_name: str, pretrained: str = "saved", cache_dir: str | None = None, device="cpu"):
    """Load a checkpoint as CLIP_benchmark's `TYPE2FUNC` expects it.

    Args:
        model_name (`str`): The checkpoint's folder or Hub id.
        pretrained (`str`): The reduction, such as `"0.5"`; `"0"` is off and `"saved"` as the checkpoint was saved.
        cache_dir (`str`, *optional*): Not supported.
        device (`str` or `torch.device`): The device.

    Returns:
        `(model, transform, tokenizer)`: a [`ClipBenchmarkModel`], a function of an image and one of a list of texts.

    Raises:
        ValueError: if `pretrained` is not a reduction, or for what `load_to_evaluate` raises it.
    """
    if cache_dir is not None:
        raise ValueError(f"{cache_dir=}: expected None. Set the environment variable HF_HUB_CACHE instead.")
    try:
        reduction = None if pretrained == "saved" else float(pretrained)
    except ValueError:
        raise ValueError(f"{pretrained=}: expected a reduction, such as 0 or 0.5, or 'saved'.") from None
    loaded = load_to_evaluate(model_name, TextEmbedder.tasks, reduction, device=device)
    worker = TextEmbedder(loaded.model, loaded.processor)
    transform = functools.partial(to_pixel_values, image_processor=loaded.processor.image_processor)
    pad = None if loaded.task.name == "clip" else loaded.processor.tokenizer.pad_token_id

    def tokenizer(texts) -> torch.Tensor:
        return worker.tokens([texts] if isinstance(texts, str) else list(texts))["input_ids"]

    return ClipBenchmarkModel(loaded.model, pad), transform, tokenizer


def run_clip_benchmark() -> None:
    """Run CLIP_benchmark's command line with the model type `madtp_hf`."""
    from clip_benchmark import cli, models

    models.TYPE2FUNC["madtp_hf"] = load_for_clip_benchmark
    models.MODEL_TYPES.append("madtp_hf")
    cli.main()


if __name__ == "__main__":
    run_clip_benchmark()
