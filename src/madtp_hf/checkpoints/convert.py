"""Convert checkpoints of the original BLIP, CLIP, open_clip and MADTP code to models of this package."""

import logging
import math
import os
import re
import warnings
from typing import Any, NamedTuple

import torch
from transformers.activations import ACT2FN

from ..modeling.configuration_madtp_blip import MadtpBlipConfig
from ..modeling.configuration_madtp_clip import MadtpClipConfig
from ..tasks import TASKS, Task, get_task
from .original import own_tensors, read_checkpoint, read_patches, resize_positions, shape_of


logger = logging.getLogger(__name__)
HEAD_WIDTH = 64  # in all attention layers of BLIP and of OpenAI's CLIP


class _Layout(NamedTuple):
    """The names of a family's original checkpoints.

    renames: (pattern, replacement) pairs from original names to ours, applied in order.
    patches: the patch convolution's weight and the position embeddings.
    layers, text_layers: what is before and after a layer's number in the name of its first feed-forward weight.
    text: the embeddings of words and of positions.
    activation, eps: what the original uses; eps of the norms in the vision and in the text tower.
    """

    renames: tuple[tuple[str, str], ...]
    patches: tuple[str, str]
    layers: tuple[str, str]
    text_layers: tuple[str, str]
    text: tuple[str, str]
    activation: str
    eps: tuple[float, float]


# BLIP's text models and heads have the same names in both. The names of MADTP's projections to the alignment tokens'
# width come from its code: its published checkpoints, all of the base tower, have none. {text} is the text encoder, or
# the decoder of a model without one.
_BLIP = _Layout(
    renames=(
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
    ),
    patches=("visual_encoder.patch_embed.proj.weight", "visual_encoder.pos_embed"),
    layers=("visual_encoder.blocks.", ".mlp.fc1.weight"),
    text_layers=("{text}encoder.layer.", ".intermediate.dense.weight"),
    text=("{text}embeddings.word_embeddings.weight", "{text}embeddings.position_embeddings.weight"),
    activation="gelu",
    eps=(1e-6, 1e-12),
)
_CLIP = _Layout(
    renames=(
        (r"^space_dict$", "alignment.tokens"),
        (r"^visual\.transformer\.resblocks\.(\d+)\.query_model\.q_map\.0\.", r"alignment.vision_projection.\1."),
        (r"^transformer\.resblocks\.(\d+)\.query_model\.q_map\.0\.", r"alignment.text_projection.\1."),
        (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
        (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
        (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
        (r"\.ln_([12])\.", r".layer_norm\1."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
        (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
        (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
        (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
        (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
        (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
        (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
        (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
        (r"^ln_final\.", "text_model.final_layer_norm."),
        (r"^visual\.proj$", "visual_projection.weight"),
        (r"^text_projection$", "text_projection.weight"),
    ),
    patches=("visual.conv1.weight", "visual.positional_embedding"),
    layers=("visual.transformer.resblocks.", ".mlp.c_fc.weight"),
    text_layers=("transformer.resblocks.", ".mlp.c_fc.weight"),
    text=("token_embedding.weight", "positional_embedding"),
    activation="quick_gelu",
    eps=(1e-5, 1e-5),
)
_LAYOUTS = {"BLIP": _BLIP, "CLIP": _CLIP}
_TRANSPOSED = ("visual.proj", "text_projection")  # in CLIP's files


def _rename(state_dict: dict[str, torch.Tensor], renames) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors by our names, and a dict from our names to the original ones.

    CLIP's fused query, key and value tensors are split in three.
    """
    renamed: dict[str, torch.Tensor] = {}
    original_names: dict[str, str] = {}
    for original_name, tensor in state_dict.items():
        name = original_name
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        parts = {name: tensor.T if original_name in _TRANSPOSED and tensor.ndim == 2 else tensor}
        if (fused := re.fullmatch(r"(.+)\.attn\.in_proj_(weight|bias)", name)) and tensor.shape[0] % 3 == 0:
            split = zip("qkv", tensor.chunk(3))
            parts = {f"{fused[1]}.self_attn.{kind}_proj.{fused[2]}": part for kind, part in split}
        renamed |= parts
        original_names |= dict.fromkeys(parts, original_name)
    return renamed, original_names


def _read_sizes(state_dict: dict[str, torch.Tensor], layout: _Layout, text: str) -> tuple[dict, dict]:
    """Read the fields of either tower's configuration that tensor shapes tell."""

    def tower(prefix: str, suffix: str) -> dict:
        first = f"{prefix}0{suffix}"
        inner, width = shape_of(state_dict, first, "inner width", "width")
        layers = {name.removeprefix(prefix).partition(".")[0] for name in state_dict if name.startswith(prefix)}
        return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": len(layers)}

    width, patch_size, grid = read_patches(state_dict, *layout.patches)
    words, positions = (name.format(text=text) for name in layout.text)
    vocab_size, text_width = shape_of(state_dict, words, "words", "width")
    vision = tower(*layout.layers)
    of_text = tower(*(part.format(text=text) for part in layout.text_layers))
    vision.update(hidden_size=width, patch_size=patch_size, image_size=grid * patch_size)
    longest = shape_of(state_dict, positions, "positions", "width")[0]
    of_text.update(hidden_size=text_width, vocab_size=vocab_size, max_position_embeddings=longest)
    return vision, of_text


def _read_config(state_dict: dict[str, torch.Tensor], task: Task, config, heads, activation):
    """Infer the configuration from tensor shapes; what they don't tell comes from the arguments, or is assumed.

    Returns:
        The configuration, and a list of what was assumed.
    """
    config_class, layout, assumed = task.model_class.config_class, _LAYOUTS[task.family.name], []
    is_clip = layout is _CLIP
    text = "text_encoder." if task.text_encoder else "text_decoder.bert."
    sizes = _read_sizes(state_dict, layout, text)
    fields = (config_class() if config is None else config).to_dict()
    fields.pop("model_type", None)
    towers = fields["vision_config"], fields["text_config"]
    if config is None:
        if heads is None:
            for tower, size in zip(("vision", "text"), sizes):
                if size["hidden_size"] % HEAD_WIDTH:
                    raise ValueError(
                        f"The checkpoint's {tower} tower is {size['hidden_size']} wide, not a multiple of"
                        f" {HEAD_WIDTH}, the width of the original's attention heads: pass `heads`, or a config with"
                        f" {tower}_config.num_attention_heads."
                    )
            heads = [size["hidden_size"] // HEAD_WIDTH for size in sizes]
            assumed.append(f"{heads[0]} attention heads in the vision and {heads[1]} in the text tower")
        if activation is None:
            activation = layout.activation
            assumed.append(f"the activation {activation}")
        for tower, eps in zip(towers, layout.eps):
            tower["layer_norm_eps"] = eps
        assumed.append("the original's norms and special tokens")
    for number, tower, size in zip(heads or (), towers, sizes):
        if size["hidden_size"] % number:
            raise ValueError(
                f"heads={tuple(heads)}: a tower is {size['hidden_size']} wide, expected a number that divides it."
            )
        tower["num_attention_heads"] = number
    for tower, size in zip(towers, sizes):
        tower.update(size)
        if activation is not None:
            tower["hidden_act"] = activation
    _set_special_tokens(fields, is_original=config is None, is_clip=is_clip)
    if is_clip:
        dim = shape_of(state_dict, "visual.proj", "width", "feature width")[1]
        for part in (fields, *towers):
            part["projection_dim"] = dim
    elif "vision_proj" in task.original_parts:
        fields["image_text_hidden_size"] = shape_of(state_dict, "vision_proj.weight", "feature width", "width")[0]
    if "space_dict" in state_dict:
        fields["num_alignment_tokens"], fields["alignment_dim"] = shape_of(state_dict, "space_dict", "tokens", "width")
    return config_class(**fields), assumed


def _set_special_tokens(fields: dict, is_original: bool, is_clip: bool) -> None:
    """Set the special tokens that follow from the size of the vocabulary, where the configuration's don't fit."""
    text_config = fields["text_config"]
    vocab_size = text_config["vocab_size"]
    if is_clip:  # the last two tokens are the start and the end of text
        if text_config["eos_token_id"] not in range(vocab_size):
            text_config.update(bos_token_id=max(vocab_size - 2, 0), eos_token_id=vocab_size - 1, pad_token_id=0)
        return
    if is_original:
        text_config["eos_token_id"] = text_config["sep_token_id"]
    text_config["label_smoothing"] = text_config.get("label_smoothing") or 0.1  # the original's, to train and to rank
    # The original adds two tokens to the vocabulary: [DEC], the decoder's start token, and [ENC].
    if is_original or text_config["bos_token_id"] not in range(vocab_size):
        text_config["bos_token_id"] = max(vocab_size - 2, 0)
    if fields["encoder_token_id"] is None:
        fields["encoder_token_id"] = vocab_size - 1


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
                f"The checkpoint's {original_names[name]} can't be kept: in this package a branch as wide as the"
                " alignment tokens has no projection. To convert the rest, remove the projection's tensors from the"
                " state dict, and train with pruning on before you prune."
            )
        del state_dict[name]


def _check_tensors(model, state_dict: dict[str, torch.Tensor], original_names: dict[str, str]) -> str:
    """Return what is missing, unexpected or of another shape, an empty string if nothing is.

    The output layer's tensors are tied, so one name of each pair is enough.
    """
    expected, tied = model.state_dict(), model.all_tied_weights_keys
    findings = {
        "missing": [
            name
            for name in expected
            if name not in state_dict and tied.get(name) not in state_dict and not name.startswith("alignment.")
        ],
        "unexpected": [original_names[name] for name in state_dict if name not in expected],
        "with another shape": [
            f"{original_names[name]} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            for name, tensor in state_dict.items()
            if name in expected and tensor.shape != expected[name].shape
        ],
    }
    for name, twin in tied.items():
        both = name in state_dict and twin in state_dict
        if both and not any(findings.values()) and not torch.equal(state_dict[name], state_dict[twin]):
            raise ValueError(
                f"The checkpoint's {original_names[name]} differs from its {original_names[twin]}: expected"
                " equal tensors, because BLIP ties the two."
            )
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in findings.items()
        if names
    )


def convert_original_checkpoint(
    path_or_state_dict: str | os.PathLike | dict,
    task: str,
    *,
    config: MadtpBlipConfig | MadtpClipConfig | None = None,
    heads: tuple[int, int] | None = None,
    activation: str | None = None,
    image_size: int | None = None,
) -> Any:  # a model of the task's class
    """Convert a checkpoint of the original BLIP, CLIP or MADTP code, or of open_clip, to a model of this package.

    Args:
        path_or_state_dict (`str`, `os.PathLike` or `dict`): A `.pth` or `.pt` file (read with `weights_only=True`),
            OpenAI's TorchScript archive of CLIP, a `.safetensors` file, or the state dict itself, at the top level or
            under `"model"`, `"state_dict"` or `"module"`. `module.` and `_orig_mod.` are removed from names. Training
            state (momentum encoders, feature queues, the optimizer, ...) is dropped. Weights in half precision become
            float32.
        task (`str`): The task of the checkpoint: `"vqa"`, `"captioning"`, `"nlvr2"` or `"retrieval"` for BLIP, or
            `"clip"`.
        config (`MadtpBlipConfig` or `MadtpClipConfig`, *optional*): Provides what weights don't tell: attention heads,
            activation, the norms' eps, special tokens. Defaults to the original's, for the base or the large vision
            tower, and a warning says what was assumed. Sizes, including the image size, always come from the weights.
            For BLIP, label smoothing of 0 is replaced by the original's 0.1, and a `bos_token_id` outside the
            vocabulary by `[DEC]`, the last token but one.
        heads (`tuple[int, int]`, *optional*): The numbers of attention heads of the vision and the text tower,
            whatever `config` says. By default, and without `config`, heads are 64 wide.
        activation (`str`, *optional*): The activation of both towers, whatever `config` says: `"gelu"` for BLIP and
            for most models of open_clip, `"quick_gelu"` for OpenAI's CLIP.
        image_size (`int`, *optional*): The image size in pixels that the model takes, a multiple of the patch size.
            Position embeddings are interpolated to it, as BLIP does. Defaults to the checkpoint's own size.

    Returns:
        The task's model in float32 and eval mode, with pruning as in `config` (off by default). From a BLIP or CLIP
        checkpoint, alignment tokens and the projections to their width are new. From a MADTP checkpoint, they are
        loaded, and if the file holds the training temperature next to the model, it is saved as
        `model.config.original_temperature`, for `model.set_pruning(temperature=...)`.

    Raises:
        FileNotFoundError: if the file does not exist.
        TypeError: if `config` belongs to another model.
        ValueError: if the task is unknown, the file is damaged, its tensors don't belong to the task, `image_size`
            is not a multiple of the patch size, or `heads` or `activation` can't be.
    """
    entry = get_task(task)
    config_class = entry.model_class.config_class
    if config is not None and not isinstance(config, config_class):
        raise TypeError(f"config is a {type(config).__name__}: expected a {config_class.__name__}, or None.")
    numbers = heads if isinstance(heads, (list, tuple)) else ()
    if heads is not None and (len(numbers) != 2 or not all(isinstance(n, int) and n > 0 for n in numbers)):
        raise ValueError(f"heads={heads!r}: expected two numbers, of the vision and the text tower's attention heads.")
    if activation is not None and activation not in ACT2FN:
        raise ValueError(f"activation={activation!r}: expected one of transformers, such as gelu or quick_gelu.")
    content = path_or_state_dict if isinstance(path_or_state_dict, dict) else read_checkpoint(path_or_state_dict)
    original, layout = own_tensors(content, "The dictionary given"), _LAYOUTS[entry.family.name]

    def refuse(findings: str) -> ValueError:
        return ValueError(f"The checkpoint is not of task {task!r}: {findings}.{_hint(original, task)}")

    try:
        if image_size is not None:
            original[layout.patches[1]] = resize_positions(original, *layout.patches, image_size)
        config, assumed = _read_config(original, entry, config, heads, activation)
    except KeyError as error:
        raise refuse(f"it has no tensor {error}") from error
    model = entry.model_class(config)

    state_dict, original_names = _rename(original, layout.renames)
    _drop_idle_maps(state_dict, model.state_dict(), original_names)
    if findings := _check_tensors(model, state_dict, original_names):
        raise refuse(findings)
    if assumed:
        warnings.warn(
            f"Assumed, because weights don't tell: {', '.join(assumed)}. If the checkpoint was trained with others,"
            " pass `heads`, `activation` or `config`.",
            stacklevel=2,
        )
    new = [name for name in model.state_dict() if name.startswith("alignment.") and name not in state_dict]
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
