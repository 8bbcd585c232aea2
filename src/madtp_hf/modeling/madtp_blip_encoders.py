"""BLIP's encoders: transformers' layers with the same parameter names, extended by token pruning.

The engine (`encoder.py`) decides which tokens to prune and when. The layers here define projections, norms and
feed-forward.
"""

import torch
from torch import nn
from transformers.models.blip.modeling_blip import BlipEncoderLayer, BlipVisionEmbeddings
from transformers.models.blip.modeling_blip_text import BlipTextEmbeddings, BlipTextLayer, BlipTextSelfAttention
from transformers.utils import can_return_tuple

from .attention import attend
from .encoder import BranchOutput, EncoderOutput, LayerPlan, PrunedLayer, Tower, run_layers
from .padding import check_images, check_no_empty_text, check_text_length
from .prepared_linear import keep_dtype
from .pruning_method import PruningMethod
from .sequences import Sequences, lay_out, unpad


# From this layer on, NLVR2's text encoder concatenates and projects its cross-attention outputs for the two images.
# Earlier layers average them.
MERGE_FROM_LAYER = 6


class MadtpBlipVisionLayer(PrunedLayer, BlipEncoderLayer):
    @property
    def attention_dropout(self) -> float:
        return self.self_attn.dropout.p

    def project(self, states):
        (qkv,) = keep_dtype(self.self_attn.qkv)
        return qkv(self.layer_norm1(states)).unflatten(1, (3, self.self_attn.num_heads, -1))

    def add_attention(self, output, states):
        return states + self.self_attn.projection(output)

    def feed_forward(self, states, sequences, plan):
        return states + self.mlp(self.layer_norm2(states))


def split_heads(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Split states (..., D) into heads (..., H, d)."""
    return states.unflatten(-1, (num_heads, -1))


class MadtpBlipTextLayer(PrunedLayer, BlipTextLayer):
    """BLIP's text layer with token pruning between self-attention and cross-attention.

    `context` holds the states and the layout of each image for cross-attention, one after the other. It is empty for
    text only.
    """

    @property
    def attention_dropout(self) -> float:
        return self.attention.self.dropout.p

    def project(self, states):
        attention = self.attention.self
        maps = keep_dtype(attention.query, attention.key, attention.value)
        projected = torch.stack([apply(states) for apply in maps], dim=1)
        return split_heads(projected, attention.num_attention_heads)

    def add_attention(self, output, states):
        return self.attention.output(output, states)

    def feed_forward(self, states, sequences, plan, *images):
        if images:
            states = self.attend_to_images(states, sequences, plan, *images)
        return self.feed_forward_chunk(states)

    def attend_to_images(self, states, sequences, plan, image_states, image_sequences):
        seen = attend_to_image(self.crossattention.self, plan, states, sequences, image_states, image_sequences)
        return self.crossattention.output(seen, states)


def attend_to_image(
    attention: BlipTextSelfAttention, plan: LayerPlan, states, sequences: Sequences, image_states, images: Sequences
) -> torch.Tensor:
    """Compute cross-attention of text states (R, D) to image states (S, E) -> (R, D)."""
    maps = keep_dtype(attention.query, attention.key, attention.value)
    inputs = (states, image_states, image_states)
    projected = (split_heads(apply(x), attention.num_attention_heads) for apply, x in zip(maps, inputs))
    dropout = attention.dropout.p if attention.training else 0.0
    return attend(attention, plan.attention, *projected, sequences, images, dropout).to(states.dtype)


class MergeLayer(nn.Linear):
    """Map the concatenation (..., 2 * width) of two states to their learned mixture (..., width).

    It is initialized to their mean.
    """


class PairCrossAttentionOutput(nn.Module):
    """Combine the cross-attention outputs for two images: their mean or, with `merges`, a learned mixture."""

    def __init__(self, config, merges: bool):
        super().__init__()
        width = config.hidden_size
        self.dense0 = nn.Linear(width, width)
        self.dense1 = nn.Linear(width, width)
        self.merge_layer = MergeLayer(2 * width, width) if merges else None
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, left: torch.Tensor, right: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        left, right = self.dense0(left), self.dense1(right)
        seen = (left + right) / 2 if self.merge_layer is None else self.merge_layer(torch.cat([left, right], dim=-1))
        return self.LayerNorm(self.dropout(seen) + hidden_states)


class PairCrossAttention(nn.Module):
    """Cross-attention of a text to two images, with separate query, key and value projections for each."""

    def __init__(self, config, merges: bool):
        super().__init__()
        self.self0 = BlipTextSelfAttention(config, is_cross_attention=True)
        self.self1 = BlipTextSelfAttention(config, is_cross_attention=True)
        self.output = PairCrossAttentionOutput(config, merges)

    def forward(self, states, sequences, plan, left_states, left, right_states, right) -> torch.Tensor:
        seen_left = attend_to_image(self.self0, plan, states, sequences, left_states, left)
        seen_right = attend_to_image(self.self1, plan, states, sequences, right_states, right)
        return self.output(seen_left, seen_right, states)


class MadtpBlipPairTextLayer(MadtpBlipTextLayer):
    """NLVR2's text layer, with cross-attention to two images."""

    def __init__(self, config, layer_num: int):
        super().__init__(config, layer_num)
        self.crossattention = PairCrossAttention(config, merges=layer_num >= MERGE_FROM_LAYER)

    def attend_to_images(self, states, sequences, plan, *images):
        return self.crossattention(states, sequences, plan, *images)


class MadtpBlipVisionEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([MadtpBlipVisionLayer(config) for _ in range(config.num_hidden_layers)])


class MadtpBlipVisionModel(Tower):
    """The image branch."""

    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = BlipVisionEmbeddings(config)
        self.encoder = MadtpBlipVisionEncoder(config)
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
        return branch, self.post_layernorm(branch.first_states)  # normalised twice, as in transformers

    def encode(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        method: PruningMethod | None = None,
        **outputs,
    ) -> BranchOutput:
        """Encode images; `outputs` are further arguments of `run_layers`."""
        check_images(pixel_values, self.embeddings.image_size, interpolate_pos_encoding)
        states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        output = run_layers(
            self.encoder.layers,
            states.flatten(0, 1),
            Sequences.padded(*states.shape[:2], states.device),
            self.config._attn_implementation or "sdpa",
            method,
            **outputs,
        )
        return output._replace(states=self.post_layernorm(output.states))


class MadtpBlipTextEncoder(nn.Module):
    def __init__(self, config, layer_class):
        super().__init__()
        self.layer = nn.ModuleList([layer_class(config, index) for index in range(config.num_hidden_layers)])


class MadtpBlipTextModel(Tower):
    """The text branch, with cross-attention to image states or text only."""

    def __init__(self, config, layer_class=MadtpBlipTextLayer):
        super().__init__()
        self.config = config
        self.embeddings = BlipTextEmbeddings(config)
        self.encoder = MadtpBlipTextEncoder(config, layer_class)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | list[torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | list[torch.Tensor] | None = None,
        as_branch: bool = False,
        **options,
    ) -> EncoderOutput | BranchOutput:
        """Encode texts: input_ids, attention_mask (B, L) -> `last_hidden_state` (B, L, D), real tokens first.

        encoder_hidden_states (B, M, E), encoder_attention_mask (B, M): the image of each text; a list of two for two
        images per text. options: `output_hidden_states`, `output_attentions`, `return_dict`. With `as_branch`, the
        arguments are those of `encode`.
        """
        if as_branch:
            return self.encode(input_ids, **options)
        return self.call_alone(input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask, **options)

    def encode_alone(self, model, pruning, input_ids, attention_mask, states, masks, **outputs):
        if isinstance(states, torch.Tensor):
            states, masks = [states], [masks]
        states = states or []
        images = [part for image in zip(states, masks or [None] * len(states)) for part in unpad(*image)]
        return model._encode_text(input_ids, attention_mask, *images, pruning=pruning, **outputs), None

    def encode(
        self,
        input_ids: torch.Tensor,
        images: tuple[torch.Tensor | Sequences, ...] = (),
        mask: torch.Tensor | None = None,
        layout: str = "dense",
        method: PruningMethod | None = None,
        **outputs,
    ) -> BranchOutput:
        """Encode texts, padded on the right.

        Args:
            images: The states and the layout of each image, one after the other; none for text only.
            mask: The real tokens (B, L).
            layout: How texts are laid out, one of `sequences.TEXT_LAYOUTS`.
            outputs: Further arguments of `run_layers`.
        """
        input_ids, sequences = lay_out(input_ids, mask, layout)
        if layout == "varlen":
            check_no_empty_text(sequences.row_counts)
        check_text_length(sequences.max_seqlen, self.embeddings.position_embeddings.num_embeddings)
        states = self.embeddings(
            input_ids=input_ids.unsqueeze(0), position_ids=sequences.positions.unsqueeze(0)
        ).squeeze(0)
        attention = self.config._attn_implementation or "sdpa"
        return run_layers(self.encoder.layer, states, sequences, attention, method, context=images, **outputs)
