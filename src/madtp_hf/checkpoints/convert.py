"""Convert checkpoints of the original BLIP, CLIP and MADTP code to models of this package."""

import logging
import math
import re

import torch

from ..modeling.configuration_madtp_blip import MadtpBlipConfig
from ..tasks import TASKS, Task, get_task
from . import convert_clip
from .original import (
    count_heads,
    count_layers,
    own_tensors,
    read_checkpoint,
    read_patches,
    resize_positions,
    shape_of,
)


logger = logging.getLogger(__name__)

# Original names -> ours, applied in order. Text models and heads have the same names in both. The names of MADTP's
# projections to the alignment tokens' width come from its code: its published checkpoints, all of the base tower, have
# none.
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


# The names of the patch convolution's weight and of the position embeddings.
_PATCHES = ("visual_encoder.patch_embed.proj.weight", "visual_encoder.pos_embed")


def _read_config(state_dict: dict[str, torch.Tensor], task: Task, config: MadtpBlipConfig | None) -> MadtpBlipConfig:
    """Infer the configuration from tensor shapes; heads, norms and special tokens are `config`'s or BLIP's."""
    vision_width, patch_size, grid = read_patches(state_dict, *_PATCHES)
    text = "text_encoder." if task.text_encoder else "text_decoder.bert."
    vocab_size, text_width = shape_of(state_dict, f"{text}embeddings.word_embeddings.weight", "words", "width")

    fields = (MadtpBlipConfig() if config is None else config).to_dict()
    fields.pop("model_type", None)
    vision_config, text_config = fields["vision_config"], fields["text_config"]
    if config is None:
        heads = count_heads(vision_width, "vision")
        vision_config.update(layer_norm_eps=1e-6, hidden_act="gelu", num_attention_heads=heads)
        text_config.update(layer_norm_eps=1e-12, num_attention_heads=count_heads(text_width, "text"))
        text_config["eos_token_id"] = text_config["sep_token_id"]
    if config is None or config.text_config.label_smoothing == 0.0:
        text_config["label_smoothing"] = 0.1  # the original uses it to train and to rank answers
    # The original adds two tokens to the vocabulary: [DEC], the decoder's start token, and [ENC].
    if config is None or text_config["bos_token_id"] not in range(vocab_size):
        text_config["bos_token_id"] = max(vocab_size - 2, 0)
    if fields["encoder_token_id"] is None:
        fields["encoder_token_id"] = vocab_size - 1

    vision_config.update(
        hidden_size=vision_width,
        patch_size=patch_size,
        image_size=grid * patch_size,
        intermediate_size=shape_of(state_dict, "visual_encoder.blocks.0.mlp.fc1.weight", "inner width", "width")[0],
        num_hidden_layers=count_layers(state_dict, r"visual_encoder\.blocks\.(\d+)\."),
    )
    intermediate = f"{text}encoder.layer.0.intermediate.dense.weight"
    positions = f"{text}embeddings.position_embeddings.weight"
    text_config.update(
        vocab_size=vocab_size,
        hidden_size=text_width,
        intermediate_size=shape_of(state_dict, intermediate, "inner width", "width")[0],
        num_hidden_layers=count_layers(state_dict, re.escape(text) + r"encoder\.layer\.(\d+)\."),
        max_position_embeddings=shape_of(state_dict, positions, "positions", "width")[0],
    )
    if "vision_proj" in task.original_parts:
        fields["image_text_hidden_size"] = shape_of(state_dict, "vision_proj.weight", "feature width", "width")[0]
    if "space_dict" in state_dict:
        fields["num_alignment_tokens"], fields["alignment_dim"] = shape_of(state_dict, "space_dict", "tokens", "width")
    return MadtpBlipConfig(**fields)


def _rename(state_dict: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors by our names, and a dict from our names to the original ones."""
    original_names = {}
    for original_name in state_dict:
        name = original_name
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        original_names[name] = original_name
    return {name: state_dict[original_name] for name, original_name in original_names.items()}, original_names


def _hint(names, task: str) -> str:
    """Return a sentence that guesses from tensor names what the checkpoint is instead, or an empty string."""

    def has(*prefixes):
        return any(name.startswith(prefixes) for name in names)

    if has("vision_model.") and not has("visual_encoder."):
        family = "CLIP" if has("visual_projection.") else "BLIP"
        return (
            f" It looks like a checkpoint of transformers' {family}: load it with the task model's"
            f" `from_{family.lower()}`."
        )
    if has("itm_head.") and has("text_decoder."):
        return " It looks like BLIP's pretrained checkpoint: expected one fine-tuned for the task."
    known = {part for task in TASKS.values() for part in task.original_parts}
    found = known & {name.partition(".")[0] for name in names}
    likely = next((name for name, task in TASKS.items() if found == set(task.original_parts)), task)
    return "" if likely == task else f" It looks like a checkpoint of task {likely!r}."


def _drop_idle_maps(state_dict: dict[str, torch.Tensor], expected, original_names: dict[str, str]) -> None:
    """Drop zero biases of projections that this package doesn't have.

    MADTP's code can project a branch that has the alignment tokens' width already; ours does not. Raise a `ValueError`
    for other tensors of such a projection.
    """
    maps = [name for name in state_dict if re.match(r"alignment\.\w+_projection\.", name)]
    for name in (name for name in maps if name not in expected):
        if not name.endswith(".bias") or state_dict[name].any():
            raise ValueError(
                f"The checkpoint's {original_names[name]} can't be kept: in this package, a branch as wide as"
                " the alignment tokens has no projection. To convert the rest, remove the projection's tensors from"
                " the state dict, and train with pruning on before you prune."
            )
        del state_dict[name]


# For each family: the function that infers the configuration, the one that renames tensors, and the names of the patch
# and position tensors.
_LAYOUTS = {
    "BLIP": (_read_config, _rename, _PATCHES),
    "CLIP": (convert_clip.read_config, convert_clip.rename, convert_clip.PATCHES),
}


def convert_original_checkpoint(path_or_state_dict, task: str, *, config=None, image_size: int | None = None):
    """Convert a checkpoint of the original BLIP, CLIP or MADTP code to a model of this package.

    Args:
        path_or_state_dict (`str`, `os.PathLike` or `dict`):
            A `.pth` file (read with `weights_only=True`), a `.safetensors` file, or the state dict itself, at the top
            level or under `"model"`. Training state (momentum encoders, feature queues, the optimizer, ...) is
            dropped.
        task (`str`):
            The task of the checkpoint: `"vqa"`, `"captioning"`, `"nlvr2"` or `"retrieval"` for BLIP, or `"clip"`.
        config (`MadtpBlipConfig` or `MadtpClipConfig`, *optional*):
            Provides what weights don't tell: attention heads, the norms' eps, special tokens. Defaults to the
            original's, for the base or the large vision tower. Sizes, including the image size, always come from the
            weights. For BLIP, label smoothing of 0 is replaced by the original's 0.1, and a `bos_token_id` outside the
            vocabulary by `[DEC]`, the last token but one.
        image_size (`int`, *optional*):
            The image size in pixels that the model takes, a multiple of the patch size. Position embeddings are
            interpolated to it, as BLIP does. Defaults to the checkpoint's own size.

    Returns:
        The task's model in eval mode, with pruning as in `config` (off by default). From a BLIP or CLIP checkpoint,
        alignment tokens and the projections to their width are new. From a MADTP checkpoint, they are loaded, and if
        the file holds the training temperature next to the model, it is saved as `model.config.original_temperature`,
        for `model.set_pruning(temperature=...)`.

    Raises:
        FileNotFoundError: if the file does not exist.
        TypeError: if `config` belongs to another model.
        ValueError: if the task is unknown, the file is damaged, its tensors don't belong to the task, or `image_size`
            is not a multiple of the patch size.
    """
    entry = get_task(task)
    model_class, config_class = entry.model_class, entry.model_class.config_class
    if config is not None and not isinstance(config, config_class):
        raise TypeError(
            f"config is a {type(config).__name__}: expected a {config_class.__name__}, or None for"
            f" {entry.family.name}'s."
        )
    read_config, rename, patches = _LAYOUTS[entry.family.name]
    content = path_or_state_dict if isinstance(path_or_state_dict, dict) else read_checkpoint(path_or_state_dict)
    original = own_tensors(content, "The dictionary given")

    def refuse(findings: str) -> ValueError:
        return ValueError(f"The checkpoint is not of task {task!r}: {findings}.{_hint(original, task)}")

    try:
        if image_size is not None:
            original[patches[1]] = resize_positions(original, *patches, image_size)
        config = read_config(original, entry, config)
    except KeyError as error:
        raise refuse(f"it has no tensor {error}") from error
    model = model_class(config)

    state_dict, original_names = rename(original)
    expected = model.state_dict()
    _drop_idle_maps(state_dict, expected, original_names)

    # The output layer's tensors are tied, so one name of each pair is enough.
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
                    ("with another shape", misshapen),
                )
                if names
            )
        )
    for name, twin in tied.items():
        if name in state_dict and twin in state_dict and not torch.equal(state_dict[name], state_dict[twin]):
            raise ValueError(
                f"The checkpoint's {original_names[name]} differs from its {original_names[twin]}: expected"
                " equal tensors, because BLIP ties the two."
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
