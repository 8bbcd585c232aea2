"""Checkpoints of the original BLIP and MADTP code -> models of this package."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .modeling.configuration_madtp_blip import MadtpBlipConfig
from .modeling.modeling_madtp_blip import (
    MadtpBlipForConditionalGeneration,
    MadtpBlipForImagesAndTextClassification,
    MadtpBlipForImageTextRetrieval,
    MadtpBlipForQuestionAnswering,
)


TASK_MODELS = {
    "vqa": MadtpBlipForQuestionAnswering,
    "captioning": MadtpBlipForConditionalGeneration,
    "nlvr2": MadtpBlipForImagesAndTextClassification,
    "retrieval": MadtpBlipForImageTextRetrieval,
}

# Original names -> ours, in order; the text stacks have the same names in both.
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
)
# What training keeps beside the model: momentum twins, feature queues, index buffers, the hand-stepped temperature.
_TRAINING_ONLY = re.compile(r"(^|\.)position_ids$|_queue$|^queue_ptr$|^ptr_queue$|_m\.|^temperature$|^temp$")


def read_state_dict(path) -> dict[str, torch.Tensor]:
    """The state dict in an original checkpoint: a `.safetensors` file, or a `.pth` one, read with `weights_only=True`.

    Raises:
        ValueError: if the file is damaged, holds anything but tensors and plain values, or no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint file at {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable checkpoint, it may be truncated: {error}") from error
    except Exception as error:  # pickle.UnpicklingError and what a hostile or damaged pickle makes the unpickler raise
        raise ValueError(
            f"{path} was refused: it is damaged, or holds more than tensors and plain values, which could run code: {error}"
        ) from error
    state_dict = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state_dict, dict) or not any(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f'{path} holds no state dict: expected one, or one under "model".')
    return state_dict


def _count(state_dict, pattern) -> int:
    return len({match.group(1) for name in state_dict if (match := re.match(pattern, name))})


def _read_config(state_dict: dict[str, torch.Tensor], task: str, config: MadtpBlipConfig | None) -> MadtpBlipConfig:
    """The configuration that the tensors' shapes imply; heads, norms and special tokens from `config`, or BLIP-base's."""
    if config is None:
        fields = MadtpBlipConfig().to_dict()
        fields["vision_config"].update(layer_norm_eps=1e-6, hidden_act="gelu")
        fields["text_config"].update(num_attention_heads=12, layer_norm_eps=1e-12)
        # BLIP's large vision tower (width 1024) has heads of the base one's size.
        fields["vision_config"]["num_attention_heads"] = max(state_dict["visual_encoder.cls_token"].shape[-1] // 64, 1)
    else:
        fields = config.to_dict()
    fields.pop("model_type", None)
    if config is None or config.text_config.label_smoothing == 0.0:
        fields["text_config"]["label_smoothing"] = 0.1  # the original's, in training and in ranking answers

    patch = state_dict["visual_encoder.patch_embed.proj.weight"]
    grid = round((state_dict["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
    fields["vision_config"].update(
        hidden_size=patch.shape[0],
        patch_size=patch.shape[-1],
        image_size=grid * patch.shape[-1],
        intermediate_size=state_dict["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count(state_dict, r"visual_encoder\.blocks\.(\d+)\."),
    )
    text = "text_decoder.bert." if task == "captioning" else "text_encoder."
    words = state_dict[f"{text}embeddings.word_embeddings.weight"]
    fields["text_config"].update(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        intermediate_size=state_dict[f"{text}encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_count(state_dict, re.escape(text) + r"encoder\.layer\.(\d+)\."),
        max_position_embeddings=state_dict[f"{text}embeddings.position_embeddings.weight"].shape[0],
    )
    if fields["encoder_token_id"] is None:
        fields["encoder_token_id"] = (
            words.shape[0] - 1
        )  # [ENC], the last token that the original adds to its vocabulary
    if task == "retrieval":
        fields["image_text_hidden_size"] = state_dict["vision_proj.weight"].shape[0]
    if "space_dict" in state_dict:
        fields["num_alignment_tokens"], fields["alignment_dim"] = state_dict["space_dict"].shape
    return MadtpBlipConfig(**fields)


def convert_original_checkpoint(path_or_state_dict, task: str, *, config: MadtpBlipConfig | None = None):
    """Make a model of this package from a checkpoint of the original BLIP or MADTP code.

    Args:
        path_or_state_dict (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
            A `.pth` file (read with `weights_only=True`), a `.safetensors` file, or the state dict itself.
        task (`str`):
            The task that it was trained for: `"vqa"`.
        config (`MadtpBlipConfig`, *optional*):
            For what cannot be read off the weights: attention heads, the norms' eps, special tokens. BLIP-base's if not given. Where it has
            no label smoothing, the original's, 0.1, is set.

    Returns:
        The task's model, in eval mode with pruning as `config` says (off if not given). From a BLIP checkpoint the alignment tokens are
        new; from a MADTP one they are its own.

    Raises:
        ValueError: if the task is unknown, the file is damaged, or its tensors are not those of the task.
    """
    if task not in TASK_MODELS:
        raise ValueError(f"task={task!r}: expected one of {', '.join(map(repr, TASK_MODELS))}.")
    if isinstance(path_or_state_dict, dict):
        original = path_or_state_dict.get("model", path_or_state_dict)
    else:
        original = read_state_dict(path_or_state_dict)
    original = {name: tensor for name, tensor in original.items() if not _TRAINING_ONLY.search(name)}

    state_dict = {}
    for name, tensor in original.items():
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        state_dict[name] = tensor
    try:
        model = TASK_MODELS[task](_read_config(original, task, config))
    except KeyError as error:
        raise ValueError(f"The checkpoint is not of task {task!r}: it has no tensor {error}.") from error
    expected = model.state_dict()
    missing = [name for name in expected if name not in state_dict and not name.startswith("alignment.")]
    unexpected = [name for name in state_dict if name not in expected]
    misshapen = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in state_dict.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    # The output layer's tensors are tied: one name of each pair is enough.
    missing = [name for name in missing if model.all_tied_weights_keys.get(name) not in state_dict]
    if missing or unexpected or misshapen:
        findings = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
            if names
        )
        raise ValueError(f"The checkpoint is not of task {task!r}: {findings}.")
    model.load_state_dict(state_dict, strict=False)
    model.tie_weights()
    return model.eval()
