"""Models at the sizes of BLIP and CLIP with random weights, transformers' and ours, and inputs for them.

Nothing is downloaded: images are crops of the two photographs in scikit-learn, since the number of tokens that a
pruned model keeps depends on the image; texts are random words.
"""

import argparse
from typing import NamedTuple

import torch
from photographs import photograph_crops
from torch import nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
)

from madtp_hf.tasks import TASKS


# The transformers model that ours is made from.
MODELS = {
    "vqa": BlipForQuestionAnswering,
    "nlvr2": BlipForImageTextRetrieval,
    "captioning": BlipForConditionalGeneration,
    "retrieval": BlipForImageTextRetrieval,
    "clip": CLIPModel,
    "clip-large": CLIPModel,
}
SIZES = ("base", "large", "narrow", "tiny")
TEXT_TOKENS = {"vqa": 12, "nlvr2": 36, "captioning": 12, "retrieval": 12, "clip": 14}  # special tokens included
TEXT_SPREAD = 0.3  # the texts of a batch are shorter or longer by up to this share
CALIBRATION_BATCH, CALIBRATION_SEED = 8, 1000  # the seed of images and texts that occur in no timed batch


class Setup(NamedTuple):
    """How models and inputs are made; `prepack`: our weights are prepacked for a CPU."""

    size: str = "base"
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    seed: int = 0
    prepack: bool = False


def add_arguments(parser: argparse.ArgumentParser, size: str = "base") -> None:
    """Add the options that every benchmark of random models has."""
    parser.add_argument(
        "--size", choices=SIZES, default=size, help=f"Model size; narrow and tiny are for trial runs. Default: {size}."
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice.")
    parser.add_argument("--seed", type=int, default=0)


def read_setup(args, prepack: bool = False) -> Setup:
    """Return the setup that the options of `add_arguments` say, and set the number of threads."""
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    prepack = prepack and args.device.type == "cpu" and dtype == torch.float32
    return Setup(args.size, args.device, dtype, args.seed, prepack)


# Models


def blip_config(size: str) -> BlipConfig:
    """Return a BLIP configuration: base, large, narrow (with base's layers and tokens) or tiny."""
    if size in ("base", "large"):
        # With transformers' default initialisation of the vision tower, 1e-10, all patches are equal.
        vision = {"image_size": 384, "initializer_range": 0.02}
        text = {"num_attention_heads": 12}
        if size == "large":
            vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
            vision["num_attention_heads"], text["encoder_hidden_size"] = 16, 1024
        return BlipConfig(text_config=text, vision_config=vision)
    width = {"narrow": 64, "tiny": 32}[size]
    # Heads of 16, the smallest size that the kernels accept.
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 16}
    shared = {**sizes, "initializer_range": 0.2}
    text = {"vocab_size": 200, "bos_token_id": 198, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0, **shared}
    vision = {"image_size": 384, "patch_size": 16, **shared}
    if size == "tiny":
        text["num_hidden_layers"] = 8
        vision |= {"num_hidden_layers": 6, "image_size": 96, "patch_size": 8}
    return BlipConfig(text_config=text, vision_config=vision, initializer_range=0.2)


def clip_config(task: str, size: str) -> CLIPConfig:
    """Return a CLIP configuration: ViT-B/16 at 224 pixels, ViT-L/14 at 336 (`clip-large`, or size large), or smaller.

    narrow has base's layers and tokens.
    """
    large = task == "clip-large" or size == "large"
    vision = {"num_hidden_layers": 24, "patch_size": 14, "image_size": 336} if large else {"patch_size": 16}
    text = {}
    if size in ("base", "large") and large:
        vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    elif size != "base":
        width = {"narrow": 64, "tiny": 32}[size]
        shared = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 16}
        text = {**shared, "vocab_size": 200, "bos_token_id": 198, "eos_token_id": 199, "pad_token_id": 199}
        vision |= shared
    if size == "tiny":
        vision |= {"num_hidden_layers": 6, "image_size": 96, "patch_size": 8}
    # A larger factor, so that patches differ: with CLIP's own, random weights make them all equal.
    return CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=768 if large else 512, initializer_factor=2.0
    )


def make_models(task: str, setup: Setup, attention: str | None = None) -> tuple[nn.Module, nn.Module]:
    """Return transformers' model and ours with the same random weights.

    attention: transformers' `attn_implementation` for its own model, by default its own choice; a `ValueError` where
    that class has none of the name. NLVR2's dense model is a reference built from transformers' parts.
    """
    torch.manual_seed(setup.seed)
    is_clip = MODELS[task] is CLIPModel
    if attention == "sdpa" and not MODELS[task]._supports_sdpa:
        raise ValueError(f"transformers' {MODELS[task].__name__} of this version has no SDPA.")
    with torch.device(setup.device):  # where weights are drawn faster
        dense = MODELS[task](clip_config(task, setup.size) if is_clip else blip_config(setup.size))
        if attention is not None:
            dense.set_attn_implementation(attention)
        model = TASKS[task.removesuffix("-large")].model_class.from_dense(dense)
    dense, model = (found.to(device=setup.device, dtype=setup.dtype).eval() for found in (dense, model))
    if setup.prepack:
        model.prepare_for_inference("float32")
    if task == "nlvr2":
        from nlvr2_reference import BlipForImagesAndText

        dense = BlipForImagesAndText.from_madtp(model)
    return dense, model


# Inputs


def make_inputs(
    task: str, config, batch_size: int, setup: Setup, images=photograph_crops, seed: int = 0, padded: bool = True
) -> dict[str, torch.Tensor]:
    """Return the inputs of a task's forward pass: images, and texts of random words and different lengths.

    Texts are padded on the right; CLIP's are padded to its maximum length. Not `padded`: all texts have one length,
    and captions no mask.
    """
    text, seed = config.text_config, setup.seed + seed
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(-TEXT_SPREAD, TEXT_SPREAD, batch_size) if batch_size > 1 and padded else torch.zeros(1)
    lengths = (TEXT_TOKENS[task] * (1 + spread)).round().long().expand(batch_size)
    width = text.max_position_embeddings if task == "clip" else int(lengths.max())
    mask = (torch.arange(width) < lengths[:, None]).long()
    words = (text.vocab_size // 20, text.vocab_size // 2)  # excludes special tokens
    ids = torch.randint(*words, mask.shape, generator=generator).where(mask == 1, text.pad_token_id)
    num_images = TASKS[task].num_images
    pixel_values = images(num_images * batch_size, config.vision_config.image_size, seed)
    if num_images > 1:
        pixel_values = pixel_values.unflatten(0, (batch_size, num_images))
    inputs = {"pixel_values": pixel_values.to(setup.dtype), "input_ids": ids, "attention_mask": mask}
    if task in ("captioning", "clip"):
        ids[:, 0] = text.bos_token_id
    if task == "clip":
        ids.scatter_(1, lengths[:, None] - 1, text.eos_token_id)
    if task == "captioning" and not padded:
        del inputs["attention_mask"]
    if task == "vqa":
        inputs["decoder_input_ids"] = torch.full((batch_size, 1), text.bos_token_id)
    return {name: value.to(setup.device) for name, value in inputs.items()}


def add_labels(inputs: dict, length: int = 4) -> dict:
    """Return question answering's inputs for a training step: the labels are the first words of the questions."""
    labels = inputs["input_ids"][:, :length].clone()
    labels[:, 0] = inputs["decoder_input_ids"][:, 0]
    return {**{name: value for name, value in inputs.items() if name != "decoder_input_ids"}, "labels": labels}


def calibration_batches(task: str, config, samples: int, setup: Setup) -> list[dict[str, torch.Tensor]]:
    """Return crops and texts that occur in no timed batch."""
    starts = range(0, samples, CALIBRATION_BATCH)
    sizes = [min(CALIBRATION_BATCH, samples - start) for start in starts]
    return [make_inputs(task, config, size, setup, seed=CALIBRATION_SEED + index) for index, size in enumerate(sizes)]
