"""BLIP's encoders, layer by layer as in transformers and with its parameter names, for tokens that become fewer; and its text decoder.

What a pruned layer does to its tokens is in `token_pruning.py`; each branch says in one line where.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.blip.modeling_blip import BlipEncoderLayer, BlipVisionEmbeddings
from transformers.models.blip.modeling_blip_text import (
    BlipTextEmbeddings,
    BlipTextLayer,
    BlipTextLMHeadModel,
    BlipTextSelfAttention,
)

from .token_pruning import AttentionScores, alignment_feature, alignment_scores, prune_tokens, scored_attention


MERGE_FROM_LAYER = (
    6  # where the text of NLVR2 begins to concatenate and project what it sees of two images; before, it averages
)


class BranchPruning(NamedTuple):
    """What the layers of one branch need to know to prune. A temperature of 0 leaves the tokens alone, but aligns them."""

    alignment_tokens: torch.Tensor
    projection: nn.Module | None
    temperature: float
    granularity: str
    with_feature: bool


# What a layer leaves: hidden_states (B, L, D), mask (B, L) or None, feature (B, T, D) or None, and source (B, L) or None, where its tokens
# come from. A plain tuple, which is what gradient checkpointing passes through.
LayerOutput = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class BranchOutput(NamedTuple):
    """hidden_states (B, L, D), mask (B, L) or None, feature (B, T, D) or None, num_tokens (layers + 1, B) int64.

    On request, all_hidden_states, what enters the branch and leaves each layer, and positions, layers + 1 tensors (B, L) that say where in
    the branch's input each token was, -1 for merged ones and padding.
    """

    hidden_states: torch.Tensor
    mask: torch.Tensor | None
    feature: torch.Tensor | None
    num_tokens: torch.Tensor
    all_hidden_states: tuple[torch.Tensor, ...] | None
    positions: tuple[torch.Tensor, ...] | None


def split_heads(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    return states.unflatten(-1, (num_heads, -1)).transpose(-2, -3)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scored: bool = False,
) -> tuple[torch.Tensor, AttentionScores | None]:
    """Attention of (B, H, L, d) to (B, H, M, d) with mask (B, M) -> (B, L, H * d), and its scores where they are asked for."""
    if scored:
        context, scores = scored_attention(query, key, value, mask, dropout)
    else:
        mask = None if mask is None else mask[:, None, None, :]
        context = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=is_causal)
        scores = None
    return context.transpose(1, 2).flatten(2), scores


def align(hidden_states: torch.Tensor, mask: torch.Tensor | None, pruning: BranchPruning):
    """A layer's alignment scores and, where the loss is wanted, its alignment feature, from the layer's input."""
    tokens = hidden_states[:, 1:]
    if pruning.projection is not None:
        tokens = pruning.projection(tokens)
    scores = alignment_scores(tokens, pruning.alignment_tokens)
    if not pruning.with_feature:
        return scores, None
    return scores, alignment_feature(scores, tokens, None if mask is None else mask[:, 1:])


class MadtpBlipVisionLayer(BlipEncoderLayer):
    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        pruning: BranchPruning | None = None,
    ) -> LayerOutput:
        scores, feature = (None, None) if pruning is None else align(hidden_states, mask, pruning)
        prunes = pruning is not None and pruning.temperature > 0
        source = None

        attention = self.self_attn
        query, key, value = split_heads(attention.qkv(self.layer_norm1(hidden_states)), 3 * attention.num_heads).chunk(
            3, 1
        )
        dropout = attention.dropout.p if self.training else 0.0
        context, attention_scores = attend(query, key, value, mask, dropout, scored=prunes)
        hidden_states = hidden_states + attention.projection(context)

        if prunes:
            hidden_states, mask, source = prune_tokens(
                hidden_states, attention_scores, scores, pruning.temperature, pruning.granularity, mask
            )
        hidden_states = hidden_states + self.mlp(self.layer_norm2(hidden_states))
        return hidden_states, mask, feature, source


def text_context(
    attention: nn.Module,
    hidden_states: torch.Tensor,
    context_states: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scored: bool = False,
) -> tuple[torch.Tensor, AttentionScores | None]:
    """A `BlipTextSelfAttention` of hidden_states (B, L, D) to context_states (B, M, E) with mask (B, M) -> (B, L, D), and its scores."""
    query, key, value = (
        split_heads(linear(states), attention.num_attention_heads)
        for linear, states in (
            (attention.query, hidden_states),
            (attention.key, context_states),
            (attention.value, context_states),
        )
    )
    dropout = attention.dropout.p if attention.training else 0.0
    return attend(query, key, value, mask, dropout, is_causal, scored)


def text_attention(attention: nn.Module, hidden_states: torch.Tensor, *context, **options):
    """A `BlipTextAttention`: `text_context` with its projection, residual and norm."""
    context_states, scores = text_context(attention.self, hidden_states, *context, **options)
    return attention.output(context_states, hidden_states), scores


class MadtpBlipTextLayer(BlipTextLayer):
    def forward(
        self,
        hidden_states: torch.Tensor,
        *images: torch.Tensor | None,
        mask: torch.Tensor | None = None,
        pruning: BranchPruning | None = None,
    ) -> LayerOutput:
        """`images`: what `attend_to_images` takes; nothing for a text by itself."""
        scores, feature = (None, None) if pruning is None else align(hidden_states, mask, pruning)
        prunes = pruning is not None and pruning.temperature > 0
        source = None

        hidden_states, attention_scores = text_attention(
            self.attention, hidden_states, hidden_states, mask, scored=prunes
        )
        if prunes:
            hidden_states, mask, source = prune_tokens(
                hidden_states, attention_scores, scores, pruning.temperature, pruning.granularity, mask
            )
        if images:
            hidden_states = self.attend_to_images(hidden_states, *images)
        return self.feed_forward_chunk(hidden_states), mask, feature, source

    def attend_to_images(self, hidden_states, image_states, image_mask):
        return text_attention(self.crossattention, hidden_states, image_states, image_mask)[0]


class MergeLayer(nn.Linear):
    """A learned mixture of two states (..., width): of their concatenation (..., 2 * width). It begins as their mean."""


class PairCrossAttentionOutput(nn.Module):
    """What a text sees of two images becomes one: the mean of the two, or with a merge layer their learned mixture."""

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
    """A text's cross-attention to two images, with a query, key and value of its own for each."""

    def __init__(self, config, merges: bool):
        super().__init__()
        self.self0 = BlipTextSelfAttention(config, is_cross_attention=True)
        self.self1 = BlipTextSelfAttention(config, is_cross_attention=True)
        self.output = PairCrossAttentionOutput(config, merges)

    def forward(self, hidden_states, left_states, left_mask, right_states, right_mask):
        left, _ = text_context(self.self0, hidden_states, left_states, left_mask)
        right, _ = text_context(self.self1, hidden_states, right_states, right_mask)
        return self.output(left, right, hidden_states)


class MadtpBlipPairTextLayer(MadtpBlipTextLayer):
    """The text layer of NLVR2: a sentence about two images."""

    def __init__(self, config, layer_num: int):
        super().__init__(config, layer_num)
        self.crossattention = PairCrossAttention(config, merges=layer_num >= MERGE_FROM_LAYER)

    def attend_to_images(self, hidden_states, *images):
        return self.crossattention(hidden_states, *images)


def run_layers(
    layers: nn.ModuleList,
    hidden_states: torch.Tensor,
    *context: torch.Tensor | None,
    mask: torch.Tensor | None = None,
    pruning: BranchPruning | None = None,
    output_hidden_states: bool = False,
    output_positions: bool = False,
) -> BranchOutput:
    """Both encoders: layer after layer on the tokens that the one before has left; `context` is what each layer looks at besides."""

    def count(hidden_states, mask):
        if mask is not None:
            return mask.sum(dim=1)
        return torch.full(hidden_states.shape[:1], hidden_states.shape[1], device=hidden_states.device)

    num_tokens = [count(hidden_states, mask)]
    all_hidden_states = [hidden_states]
    positions = [torch.arange(hidden_states.shape[1], device=hidden_states.device).expand(hidden_states.shape[:2])]
    feature = None
    for layer in layers:
        hidden_states, mask, layer_feature, source = layer(hidden_states, *context, mask=mask, pruning=pruning)
        if layer_feature is not None:
            feature = layer_feature if feature is None else feature + layer_feature
        num_tokens.append(count(hidden_states, mask))
        if output_hidden_states:
            all_hidden_states.append(hidden_states)
        if output_positions:
            last = positions[-1]
            positions.append(last if source is None else last.gather(1, source.clamp(min=0)).where(source >= 0, -1))
    return BranchOutput(
        hidden_states,
        mask,
        feature,
        torch.stack(num_tokens),
        tuple(all_hidden_states) if output_hidden_states else None,
        tuple(positions) if output_positions else None,
    )


class MadtpBlipVisionEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([MadtpBlipVisionLayer(config) for _ in range(config.num_hidden_layers)])


class MadtpBlipVisionModel(nn.Module):
    """The image branch: pixel_values (B, 3, H, W) -> `BranchOutput`."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = BlipVisionEmbeddings(config)
        self.encoder = MadtpBlipVisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        pixel_values: torch.Tensor,
        pruning: BranchPruning | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
        output_positions: bool = False,
    ) -> BranchOutput:
        size = self.embeddings.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: expected (batch_size, 3, height, width), as the model's"
                " image processor makes it."
            )
        if not interpolate_pos_encoding and tuple(pixel_values.shape[2:]) != (size, size):
            height, width = pixel_values.shape[2:]
            raise ValueError(
                f"pixel_values are images of {height} x {width} pixels: this model takes {size} x {size}. Resize them with its"
                " image processor, or pass interpolate_pos_encoding=True."
            )
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        output = run_layers(
            self.encoder.layers,
            hidden_states,
            pruning=pruning,
            output_hidden_states=output_hidden_states,
            output_positions=output_positions,
        )
        return output._replace(hidden_states=self.post_layernorm(output.hidden_states))


class MadtpBlipTextEncoder(nn.Module):
    def __init__(self, config, layer_class):
        super().__init__()
        self.layer = nn.ModuleList([layer_class(config, index) for index in range(config.num_hidden_layers)])


class MadtpBlipTextModel(nn.Module):
    """The text branch: input_ids (B, L), with padding behind the text, and the images that it is about -> `BranchOutput`."""

    def __init__(self, config, layer_class=MadtpBlipTextLayer):
        super().__init__()
        self.embeddings = BlipTextEmbeddings(config)
        self.encoder = MadtpBlipTextEncoder(config, layer_class)

    def forward(
        self,
        input_ids: torch.Tensor,
        *images: torch.Tensor | None,
        mask: torch.Tensor | None = None,
        pruning: BranchPruning | None = None,
    ) -> BranchOutput:
        longest = self.embeddings.position_embeddings.num_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(
                f"input_ids holds a text of {input_ids.shape[1]} tokens: this model reads at most {longest}. Tokenize with"
                f" truncation=True, max_length={longest}."
            )
        return run_layers(self.encoder.layer, self.embeddings(input_ids), *images, mask=mask, pruning=pruning)


class MaskedCrossAttention(BlipTextSelfAttention):
    """The decoder's cross-attention, minding the mask: transformers' own loses it on the way here, and reads padding as well."""

    def forward(
        self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs
    ):
        if encoder_attention_mask is None:
            encoder_attention_mask = attention_mask
        return super().forward(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **kwargs,
        )


def build_text_decoder(config, encoder_width: int) -> BlipTextLMHeadModel:
    """The text decoder, transformers' own but for the mask; it reads states of `encoder_width`."""
    config = copy.deepcopy(config)
    config.encoder_hidden_size = encoder_width
    decoder = BlipTextLMHeadModel(config)
    for index, layer in enumerate(decoder.bert.encoder.layer):
        layer.crossattention.self = MaskedCrossAttention(config, is_cross_attention=True, layer_idx=index)
    return decoder
