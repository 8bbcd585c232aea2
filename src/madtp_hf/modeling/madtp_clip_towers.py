"""CLIP's two towers: transformers' layers with the same parameter names, extended by token pruning.

The engine (`encoder.py`) decides which tokens to prune and when. The layer here defines projections, norms and
feed-forward.
"""

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPTextEmbeddings, CLIPVisionEmbeddings
from transformers.utils import can_return_tuple

from .attention import BranchSpec
from .encoder import BranchOutput, EncoderOutput, PrunedLayer, Tower, run_layers
from .padding import check_images, check_same_shape, check_text_length, left_align, put_back
from .prepared_linear import keep_dtype
from .pruning_method import PruningMethod
from .sequences import Sequences, lay_out, take_tokens


# The first token and the end of text are never pruned. The end of text attends to the whole text and pools it.
TEXT_SPEC = BranchSpec(num_suffix_tokens=1, pooling="last", is_causal=True)
# Configurations from before transformers 4.31 hold this id; the end of text is then the text's highest token id.
LEGACY_EOS_TOKEN_ID = 2


class MadtpClipLayer(PrunedLayer, CLIPEncoderLayer):
    @property
    def attention_dropout(self) -> float:
        return self.self_attn.dropout

    def project(self, states):
        attention, states = self.self_attn, self.layer_norm1(states)
        maps = keep_dtype(attention.q_proj, attention.k_proj, attention.v_proj)
        return torch.stack([apply(states) for apply in maps], dim=1).unflatten(2, (attention.num_heads, -1))

    def add_attention(self, output, states):
        return states + self.self_attn.out_proj(output)

    def feed_forward(self, states, sequences, plan):
        return states + self.mlp(self.layer_norm2(states))


class MadtpClipEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([MadtpClipLayer(config) for _ in range(config.num_hidden_layers)])


class MadtpClipVisionModel(Tower):
    """The image tower, pooled at the class token."""

    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = MadtpClipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, as_branch: bool = False, **options
    ) -> EncoderOutput | BranchOutput:
        """Encode images: pixel_values (B, 3, H, W) -> `last_hidden_state` (B, L, D) and `pooler_output` (B, D).

        options: `output_hidden_states`, `output_attentions`, `return_dict`. With `as_branch`, those of `encode`.
        """
        encode = self.encode if as_branch else self.call_alone
        return encode(pixel_values, interpolate_pos_encoding, **options)

    def encode_alone(self, model, pruning, *inputs, **outputs):
        branch = self.encode(*inputs, model.make_method(pruning, "vision"), **outputs)
        return branch, branch.pooled

    def encode(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        method: PruningMethod | None = None,
        **outputs,
    ) -> BranchOutput:
        check_images(pixel_values, self.embeddings.image_size, interpolate_pos_encoding)
        states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        sequences = Sequences.padded(*states.shape[:2], states.device)
        states = self.pre_layrnorm(states.flatten(0, 1))
        attention = self.config._attn_implementation or "sdpa"
        output = run_layers(self.encoder.layers, states, sequences, attention, method, **outputs)
        return output._replace(pooled=self.post_layernorm(output.first_states))


class MadtpClipTextModel(Tower):
    """The text tower, pooled at the end of text."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = MadtpClipEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def find_ends(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the position (B, 1) of the first `eos_token_id` in each text or, by the legacy rule, its highest id.

        For a text without an end it is the first token, as in transformers.
        """
        eos, ids = self.config.eos_token_id, input_ids.int()  # ONNX's argmax takes no int64
        return (ids if eos == LEGACY_EOS_TOKEN_ID else (ids == eos).int()).argmax(dim=1, keepdim=True)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        as_branch: bool = False,
        **options,
    ) -> EncoderOutput | BranchOutput:
        """Encode texts: input_ids (B, L) -> `last_hidden_state` (B, L, D) and `pooler_output` (B, D).

        options: `output_hidden_states`, `output_attentions`, `return_dict`. With `as_branch`, those of `encode`.
        """
        encode = self.encode if as_branch else self.call_alone
        return encode(input_ids, attention_mask, position_ids, **options)

    def encode_alone(self, model, pruning, *inputs, **outputs):
        branch = model._encode_text(*inputs, pruning=pruning, **outputs)
        return branch, branch.pooled

    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        layout: str = "dense",
        puts_back: bool = False,
        method: PruningMethod | None = None,
        **outputs,
    ) -> BranchOutput:
        """Encode texts; all tokens after the end of text are padding.

        layout: How texts are laid out, one of `sequences.TEXT_LAYOUTS`.
        puts_back: Whether to return states at the positions of `input_ids`, with zeros at padding.
        """
        if attention_mask is not None:
            check_same_shape("attention_mask", attention_mask, input_ids)
        check_text_length(input_ids.shape[1], self.embeddings.position_embedding.num_embeddings)
        ends, positions = self.find_ends(input_ids), torch.arange(input_ids.shape[1], device=input_ids.device)
        real = positions <= ends
        if attention_mask is not None:
            real = real & (attention_mask.bool() | (positions == ends))
        states = self.embeddings(input_ids, position_ids)
        if layout == "dense":
            mask = None if attention_mask is None else attention_mask.bool()
            output = self._run(*lay_out(states, mask, layout), None, outputs)
            end_states = take_tokens(output.hidden_states, ends).squeeze(1)
            return output._replace(pooled=end_states, num_tokens=real.sum(dim=1).expand_as(output.num_tokens))
        order = positions.expand_as(input_ids)
        if attention_mask is not None:  # without a mask, texts are left-aligned already
            order, real = left_align(order, real)
            states = take_tokens(states, order)
        states, sequences = lay_out(states, real, layout)
        output = self._run(states, sequences, method, outputs)
        output = output._replace(pooled=output.sequences.last(output.states))
        if puts_back:
            states = put_back(output.hidden_states, order).flatten(0, 1)
            output = output._replace(states=states, sequences=Sequences.padded(*input_ids.shape, input_ids.device))
        return output

    def _run(self, states, sequences: Sequences, method: PruningMethod | None, outputs: dict) -> BranchOutput:
        attention = self.config._attn_implementation or "sdpa"
        output = run_layers(self.encoder.layers, states, sequences, attention, method, TEXT_SPEC, **outputs)
        return output._replace(states=self.final_layer_norm(output.states))
