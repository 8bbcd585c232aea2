"""The checkpoint layout of OpenAI's CLIP and of MADTP's CLIP, for `conversion`."""

import re

import torch

from ..modeling.configuration_madtp_clip import MadtpClipConfig
from .original import count_heads, count_layers, read_patches, shape_of


PATCHES = ("visual.conv1.weight", "visual.positional_embedding")
# Original names -> ours, applied in order.
_RENAMES = (
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
)
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def rename(state_dict: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors by our names, and a dict from our names to the original ones.

    The original's fused query, key and value tensors are split in three.
    """
    renamed, original_names = {}, {}
    for original_name, tensor in state_dict.items():
        name, parts = original_name, {}
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if original_name in _TRANSPOSED and tensor.ndim == 2:
            parts[_TRANSPOSED[original_name]] = tensor.T
        elif (fused := re.fullmatch(r"(.+)\.attn\.in_proj_(weight|bias)", name)) and tensor.shape[0] % 3 == 0:
            for kind, part in zip("qkv", tensor.chunk(3)):
                parts[f"{fused[1]}.self_attn.{kind}_proj.{fused[2]}"] = part
        else:
            parts[name] = tensor
        renamed |= parts
        original_names |= dict.fromkeys(parts, original_name)
    return renamed, original_names


def read_config(state_dict: dict[str, torch.Tensor], task, config: MadtpClipConfig | None) -> MadtpClipConfig:
    """Infer the configuration from tensor shapes; heads, norms and activation are `config`'s or CLIP's."""
    vision_width, patch_size, grid = read_patches(state_dict, *PATCHES)
    vocab_size, text_width = shape_of(state_dict, "token_embedding.weight", "words", "width")
    projection_dim = shape_of(state_dict, "visual.proj", "width", "feature width")[1]

    fields = (MadtpClipConfig() if config is None else config).to_dict()
    fields.pop("model_type", None)
    vision_config, text_config = fields["vision_config"], fields["text_config"]
    if config is None:
        vision_config["num_attention_heads"] = count_heads(vision_width, "vision")
        text_config["num_attention_heads"] = count_heads(text_width, "text")
    # The last two tokens of the vocabulary are the start and the end of text.
    if text_config["eos_token_id"] not in range(vocab_size):
        text_config.update(bos_token_id=max(vocab_size - 2, 0), eos_token_id=vocab_size - 1, pad_token_id=0)

    def inner_width(tower: str) -> int:
        return shape_of(state_dict, f"{tower}transformer.resblocks.0.mlp.c_fc.weight", "inner width", "width")[0]

    vision_config.update(
        hidden_size=vision_width,
        patch_size=patch_size,
        image_size=grid * patch_size,
        intermediate_size=inner_width("visual."),
        num_hidden_layers=count_layers(state_dict, r"visual\.transformer\.resblocks\.(\d+)\."),
        projection_dim=projection_dim,
    )
    text_config.update(
        vocab_size=vocab_size,
        hidden_size=text_width,
        intermediate_size=inner_width(""),
        num_hidden_layers=count_layers(state_dict, r"transformer\.resblocks\.(\d+)\."),
        max_position_embeddings=shape_of(state_dict, "positional_embedding", "positions", "width")[0],
        projection_dim=projection_dim,
    )
    fields["projection_dim"] = projection_dim
    if "space_dict" in state_dict:
        fields["num_alignment_tokens"], fields["alignment_dim"] = shape_of(state_dict, "space_dict", "tokens", "width")
    return MadtpClipConfig(**fields)
