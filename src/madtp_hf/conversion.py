"""Checkpoints of the original BLIP and MADTP code -> models of this package."""

import logging
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from .modeling.configuration_madtp_blip import MadtpBlipConfig
from .tasks import TASKS, Task, get_task


logger = logging.getLogger(__name__)

# Original names -> ours, in order; the text stacks and the heads have the same names in both. MADTP's maps of a branch to the alignment
# tokens' width are named as in its code: none of its published checkpoints, all of the base tower, has one.
_RENAMES = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
    (r"^space_dict$", "alignment.tokens"),
    (r"^visual_encoder\.img_query_model\.q_map\.0\.", "alignment.vision_projection."),
    (r"^text_encoder\.encoder\.txt_query_model\.q_map\.0\.", "alignment.text_projection."),
)
# What training keeps beside the model: momentum twins, feature queues, index buffers, the contrastive and the hand-stepped temperature. A text
# decoder is built with a map to the alignment tokens, too, and never uses it.
_TRAINING_ONLY = re.compile(
    r"(^|\.)position_ids$|^(visual_encoder|text_encoder|text_decoder|vision_proj|text_proj)_m\.|_queue$"
    r"|^queue_ptr$|^ptr_queue$|^temperature$|^temp$|^text_decoder\.bert\.encoder\.txt_query_model\."
)
_HEAD_WIDTH = 64  # of all attention heads in BLIP: 12 in text stacks and base vision tower, 16 in the large tower


def read_checkpoint(path) -> dict:
    """What an original checkpoint's file holds: a `.safetensors` file, or a `.pth` one, read with `weights_only=True`.

    Returns:
        The state dict; or, where the file has it under `"model"`, a dictionary of that and what training has stored beside it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds anything but tensors and plain values, or no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint file at {path}.")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile or damaged pickle makes the unpickler raise whatever it likes
        known = isinstance(error, (SafetensorError, RuntimeError, EOFError, OSError, ValueError))
        if known and "weights_only" not in str(error):
            raise ValueError(f"{path} is no readable checkpoint, it may be truncated: {error}") from error
        # torch's own message says how to read it all the same, code and all: not what to do with a file that was just found to hold code.
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} was refused: it is damaged, or holds more than tensors and plain values{f' ({found[1]})' if found else ''}, which could"
            " run code; expected the file as its authors published it, or its weights alone as .safetensors."
        ) from None
    _state_dict(content, path)
    return content


def _state_dict(content, source) -> dict[str, torch.Tensor]:
    """The model's own tensors in a checkpoint, under their original names."""
    named = content.get("model", content) if isinstance(content, dict) else {}
    tensors = {
        name: tensor
        for name, tensor in (named.items() if isinstance(named, dict) else ())
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }
    if not tensors:
        raise ValueError(f'{source} holds no state dict: expected one, or one under "model".')
    return {name: tensor for name, tensor in tensors.items() if not _TRAINING_ONLY.search(name)}


def _shape(state_dict: dict[str, torch.Tensor], name: str, *axes: str) -> tuple[int, ...]:
    """The shape of a tensor that the configuration is read from; `axes` say what it is to have."""
    shape = tuple(state_dict[name].shape)
    if len(shape) != len(axes) or 0 in shape:
        raise ValueError(f"The checkpoint's {name} has shape {shape}: expected ({', '.join(axes)}).")
    return shape


def _count(state_dict, pattern) -> int:
    return len({match.group(1) for name in state_dict if (match := re.match(pattern, name))})


def _read_patches(state_dict: dict[str, torch.Tensor]) -> tuple[int, int, int]:
    """The vision tower's width, the size of a patch in pixels, and the patches along an image's side."""
    width, _, patch_size, _ = _shape(
        state_dict, "visual_encoder.patch_embed.proj.weight", "width", "3", "patch size", "patch size"
    )
    _, positions, _ = _shape(state_dict, "visual_encoder.pos_embed", "1", "1 + patches", "width")
    grid = math.isqrt(positions - 1)
    if grid == 0 or grid**2 != positions - 1:
        raise ValueError(
            f"The checkpoint's visual_encoder.pos_embed has {positions} positions: expected a class token's and those of a square"
            " of patches."
        )
    return width, patch_size, grid


def _resize_positions(state_dict: dict[str, torch.Tensor], image_size: int) -> torch.Tensor:
    """Position embeddings (1, 1 + patches, D) for images of another size, bicubic as in BLIP; the class token's stays."""
    _, patch_size, grid = _read_patches(state_dict)
    if not isinstance(image_size, int) or image_size <= 0 or image_size % patch_size:
        raise ValueError(
            f"image_size={image_size!r}: expected a multiple of the checkpoint's patch size, {patch_size}, as {grid * patch_size}, its"
            " own size, is."
        )
    embedding = state_dict["visual_encoder.pos_embed"]
    if image_size == grid * patch_size:
        return embedding
    patches = embedding[:, 1:].transpose(1, 2).unflatten(2, (grid, grid)).float()
    patches = F.interpolate(patches, size=(image_size // patch_size,) * 2, mode="bicubic", align_corners=False)
    return torch.cat([embedding[:, :1], patches.flatten(2).transpose(1, 2).to(embedding.dtype)], dim=1)


def _count_heads(width: int, tower: str) -> int:
    if width % _HEAD_WIDTH:
        raise ValueError(
            f"The checkpoint's {tower} tower is {width} wide, no multiple of {_HEAD_WIDTH}, the width of BLIP's attention heads: pass a"
            f" config with {tower}_config.num_attention_heads."
        )
    return width // _HEAD_WIDTH


def _read_config(state_dict: dict[str, torch.Tensor], task: Task, config: MadtpBlipConfig | None) -> MadtpBlipConfig:
    """The configuration that the tensors' shapes imply; heads, norms and special tokens from `config`, or BLIP's."""
    vision_width, patch_size, grid = _read_patches(state_dict)
    text = "text_encoder." if task.text_encoder else "text_decoder.bert."
    vocab_size, text_width = _shape(state_dict, f"{text}embeddings.word_embeddings.weight", "words", "width")

    fields = (MadtpBlipConfig() if config is None else config).to_dict()
    fields.pop("model_type", None)
    vision_config, text_config = fields["vision_config"], fields["text_config"]
    if config is None:
        heads = _count_heads(vision_width, "vision")
        vision_config.update(layer_norm_eps=1e-6, hidden_act="gelu", num_attention_heads=heads)
        text_config.update(layer_norm_eps=1e-12, num_attention_heads=_count_heads(text_width, "text"))
        text_config["eos_token_id"] = text_config["sep_token_id"]
    if config is None or config.text_config.label_smoothing == 0.0:
        text_config["label_smoothing"] = 0.1  # the original's, in training and in ranking answers
    # The original adds two tokens to its vocabulary: [DEC], which texts of a decoder start with, and [ENC].
    if config is None or text_config["bos_token_id"] not in range(vocab_size):
        text_config["bos_token_id"] = max(vocab_size - 2, 0)
    if fields["encoder_token_id"] is None:
        fields["encoder_token_id"] = vocab_size - 1

    vision_config.update(
        hidden_size=vision_width,
        patch_size=patch_size,
        image_size=grid * patch_size,
        intermediate_size=_shape(state_dict, "visual_encoder.blocks.0.mlp.fc1.weight", "inner width", "width")[0],
        num_hidden_layers=_count(state_dict, r"visual_encoder\.blocks\.(\d+)\."),
    )
    intermediate = f"{text}encoder.layer.0.intermediate.dense.weight"
    positions = f"{text}embeddings.position_embeddings.weight"
    text_config.update(
        vocab_size=vocab_size,
        hidden_size=text_width,
        intermediate_size=_shape(state_dict, intermediate, "inner width", "width")[0],
        num_hidden_layers=_count(state_dict, re.escape(text) + r"encoder\.layer\.(\d+)\."),
        max_position_embeddings=_shape(state_dict, positions, "positions", "width")[0],
    )
    if "vision_proj" in task.original_parts:
        fields["image_text_hidden_size"] = _shape(state_dict, "vision_proj.weight", "feature width", "width")[0]
    if "space_dict" in state_dict:
        fields["num_alignment_tokens"], fields["alignment_dim"] = _shape(state_dict, "space_dict", "tokens", "width")
    return MadtpBlipConfig(**fields)


def _hint(names, task: str) -> str:
    """Which checkpoint one that is not of the task looks like, as far as its tensors' names tell."""

    def has(*prefixes):
        return any(name.startswith(prefixes) for name in names)

    if has("vision_model.") and not has("visual_encoder."):
        return " It looks like a checkpoint of transformers' BLIP: load it with the task model's `from_blip`."
    if has("itm_head.") and has("text_decoder."):
        return " It looks like BLIP's pretrained checkpoint, which is of no task: expected one fine-tuned for it."
    known = {part for task in TASKS.values() for part in task.original_parts}
    found = known & {name.partition(".")[0] for name in names}
    likely = next((name for name, task in TASKS.items() if found == set(task.original_parts)), task)
    return "" if likely == task else f" It looks like a checkpoint of task {likely!r}."


def _drop_idle_maps(state_dict: dict[str, torch.Tensor], expected, original_names: dict[str, str]) -> None:
    """MADTP may have a map to the alignment tokens' width for a branch that has that width already; ours has none."""
    maps = [name for name in state_dict if re.match(r"alignment\.\w+_projection\.", name)]
    for name in (name for name in maps if name not in expected):
        if not name.endswith(".bias") or state_dict[name].any():
            raise ValueError(
                f"The checkpoint's {original_names[name]} can't be kept: in this package a branch that has the alignment tokens' width"
                " is not mapped to it. To convert the rest, drop the map's tensors from the state dict, and train with pruning on before"
                " you prune."
            )
        del state_dict[name]


def convert_original_checkpoint(
    path_or_state_dict, task: str, *, config: MadtpBlipConfig | None = None, image_size: int | None = None
):
    """Make a model of this package from a checkpoint of the original BLIP or MADTP code.

    Args:
        path_or_state_dict (`str`, `os.PathLike` or `dict`):
            A `.pth` file (read with `weights_only=True`), a `.safetensors` file, or the state dict itself, by itself or under `"model"`. What
            training keeps beside the model (momentum twins, feature queues, an optimizer's state, ...) is left out.
        task (`str`):
            The task that it was trained for: `"vqa"`, `"captioning"`, `"nlvr2"` or `"retrieval"`.
        config (`MadtpBlipConfig`, *optional*):
            For what cannot be read off the weights: attention heads, the norms' eps, special tokens. BLIP's if not given, of the base
            or the large vision tower. Sizes are the weights' own, whatever it says, and so is the image's. Where it has no label smoothing,
            the original's, 0.1, is set; where its `bos_token_id` is outside the vocabulary, `[DEC]`, the last but one.
        image_size (`int`, *optional*):
            The size in pixels of the images that the model is to take, a multiple of the patch size: position embeddings are interpolated, as
            BLIP does. The checkpoint's own size if not given.

    Returns:
        The task's model, in eval mode with pruning as `config` says (off if not given). From a BLIP checkpoint the alignment tokens, and the map
        of a vision tower of another width, are new; from a MADTP one they are its own, and the temperature that it was trained at, where the file
        has it beside the model, is `model.config.original_temperature`: `model.set_pruning(temperature=...)` prunes with it.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if the configuration is another model's.
        ValueError: if the task is unknown, the file is damaged, its tensors are not those of the task, or images of that size can't be cut into
            patches.
    """
    model_class = get_task(task).model_class
    if config is not None and not isinstance(config, MadtpBlipConfig):
        raise TypeError(f"config is a {type(config).__name__}: expected a MadtpBlipConfig, or None for BLIP's.")
    content = path_or_state_dict if isinstance(path_or_state_dict, dict) else read_checkpoint(path_or_state_dict)
    original = _state_dict(content, "The dictionary given")

    def refuse(findings: str) -> ValueError:
        return ValueError(f"The checkpoint is not of task {task!r}: {findings}.{_hint(original, task)}")

    try:
        if image_size is not None:
            original["visual_encoder.pos_embed"] = _resize_positions(original, image_size)
        config = _read_config(original, get_task(task), config)
    except KeyError as error:
        raise refuse(f"it has no tensor {error}") from error
    model = model_class(config)

    original_names = {}
    for original_name in original:
        name = original_name
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        original_names[name] = original_name
    state_dict = {name: original[original_name] for name, original_name in original_names.items()}
    expected = model.state_dict()
    _drop_idle_maps(state_dict, expected, original_names)

    # The output layer's tensors are tied: one name of each pair is enough.
    tied = model.all_tied_weights_keys
    missing = [
        name
        for name in expected
        if name not in state_dict and tied.get(name) not in state_dict and not name.startswith("alignment.")
    ]
    unexpected = [original_names[name] for name in state_dict if name not in expected]
    misshapen = [
        f"{original_names[name]} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in state_dict.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if missing or unexpected or misshapen:
        raise refuse(
            "; ".join(
                f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for what, names in (
                    ("missing", missing),
                    ("unexpected", unexpected),
                    ("of another shape", misshapen),
                )
                if names
            )
        )
    for name, twin in tied.items():
        if name in state_dict and twin in state_dict and not torch.equal(state_dict[name], state_dict[twin]):
            raise ValueError(
                f"The checkpoint's {original_names[name]} differs from its {original_names[twin]}: expected the same numbers, the two"
                " are one tensor in BLIP."
            )
    new = [name for name in expected if name.startswith("alignment.") and name not in state_dict]
    if new and "alignment.tokens" in state_dict:
        logger.warning(
            "The checkpoint has alignment tokens, but no %s: it is new, so train with pruning on before you prune.",
            " and no ".join(new),
        )

    model.load_state_dict(state_dict, strict=False)
    model.tie_weights()
    temperature = content.get("temperature") if "model" in content else None
    if isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature > 0:
        model.config.original_temperature = float(temperature)
    return model.eval()
