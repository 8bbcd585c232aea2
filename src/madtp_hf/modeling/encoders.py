"""BLIP's encoders, layer by layer as in transformers and with its parameter names, for tokens that become fewer; and its text decoder.

What a pruned layer does to its tokens is in `token_pruning.py`; each branch says in one line where.
"""

import copy
import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip.modeling_blip import BlipEncoderLayer, BlipVisionEmbeddings
from transformers.models.blip.modeling_blip_text import (
    BlipTextEmbeddings,
    BlipTextLayer,
    BlipTextLMHeadModel,
    BlipTextSelfAttention,
)

from .packing import Layout, pack
from .token_pruning import (
    alignment_feature,
    alignment_scores,
    importance_threshold,
    keep_all_or_enough,
    merge_tokens,
    most_important,
    scored_attention,
    select_tokens,
    token_importance,
)


MIN_LENGTH = 4  # of a sequence that can be pruned: the class token, one token that stays and two that go
MERGE_FROM_LAYER = (
    6  # where the text of NLVR2 begins to concatenate and project what it sees of two images; before, it averages
)
# What transformers calls the keys and values of earlier steps: since 5.24 `cache`. Under a name that it doesn't pass, they would be ignored unseen.
CACHE_ARGUMENT = (
    "cache" if "cache" in inspect.signature(BlipTextSelfAttention.forward).parameters else "past_key_values"
)


class BranchPruning(NamedTuple):
    """What the layers of one branch need to know to prune. A temperature of 0 leaves the tokens alone, but aligns them.

    token_counts: for "frozen" granularity, how many tokens each layer leaves.
    """

    alignment_tokens: torch.Tensor
    projection: nn.Module | None
    temperature: float
    granularity: str
    with_feature: bool
    token_counts: tuple[int, ...] | None = None


# What a layer leaves: states (R, D), their layout, the alignment feature (B, T, D) or None, and source (R,) or None, where its tokens come from.
# A plain tuple, which is what gradient checkpointing passes through.
LayerOutput = tuple[torch.Tensor, Layout, torch.Tensor | None, torch.Tensor | None]


class BranchOutput(NamedTuple):
    """states (R, D) in `layout`, feature (B, T, D) or None, num_tokens (layers + 1, B) int64.

    On request, all_hidden_states, what enters the branch and leaves each layer, and positions, layers + 1 tensors (B, L) that say where in
    the branch's input each token was, -1 for merged ones and padding.
    """

    states: torch.Tensor
    layout: Layout
    feature: torch.Tensor | None
    num_tokens: torch.Tensor
    all_hidden_states: tuple[torch.Tensor, ...] | None = None
    positions: tuple[torch.Tensor, ...] | None = None

    @property
    def hidden_states(self) -> torch.Tensor:
        """(B, L, D), padding behind the real tokens."""
        return self.layout.pad(self.states)

    @property
    def mask(self) -> torch.Tensor | None:
        """(B, L) bool: the real tokens of `hidden_states`, None without padding."""
        return self.layout.padded_mask

    @property
    def class_states(self) -> torch.Tensor:
        """(B, D): the class tokens."""
        return self.states.index_select(0, self.layout.starts)


def attention_function(implementation: str, query, key, value, mask, dropout: float, is_causal: bool = False):
    """Attention of (B, H, L, d) to (B, H, M, d) with mask (B, M), True at real tokens, or None -> (B, H, L, d)."""
    if mask is not None:
        mask = mask[:, None, None, :]
    if implementation != "eager":
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=is_causal)
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if is_causal:
        causal = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        mask = causal if mask is None else mask & causal
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return F.dropout(logits.softmax(dim=-1), dropout) @ value


def attend(
    attention: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    context_layout: Layout | None = None,
) -> torch.Tensor:
    """Attention of query (R, H, d) in `layout` to key and value (S, H, d) in `context_layout`, the same if not given -> (R, H * d).

    As `attention.config` asks: "eager", "sdpa", or flash attention as transformers has it, which takes tokens end to end.
    """
    implementation = attention.config._attn_implementation or "sdpa"
    dropout = attention.dropout.p if attention.training else 0.0
    context = layout if context_layout is None else context_layout
    if "flash" in implementation and layout.mask is None and context.mask is None:
        states, _ = ALL_ATTENTION_FUNCTIONS[implementation](
            attention,
            *(states.transpose(0, 1).unsqueeze(0) for states in (query, key, value)),
            None,
            dropout=dropout,
            is_causal=False,
            cu_seq_lens_q=layout.boundaries,
            cu_seq_lens_k=context.boundaries,
            max_length_q=layout.longest,
            max_length_k=context.longest,
        )
        return states.squeeze(0).flatten(1)
    keys = context.groups(key.shape[1] * key.shape[2])
    queries = keys if context is layout else layout.partition(keys.samples)
    outputs = []
    for asking, asked in zip(queries.groups, keys.groups):
        states = attention_function(
            implementation,
            asking.take(query).transpose(1, 2),
            asked.take(key).transpose(1, 2),
            asked.take(value).transpose(1, 2),
            asked.mask,
            dropout,
        )
        outputs.append(states.transpose(1, 2).flatten(2))
    return queries.join(outputs)


def attend_and_score(
    attention: nn.Module, query, key, value, layout: Layout, scores: list[torch.Tensor], pruning: BranchPruning, length
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Self-attention of (R, H, d) that prunes: its output (R, H * d), and which tokens stay and their importance, (B, N) both.

    scores: the tokens' alignment scores, (n, N, T) for each group of samples; `length`: how many tokens the layer leaves, where that is fixed.
    """
    dropout = attention.dropout.p if attention.training else 0.0
    partition = layout.groups(query.shape[1] * query.shape[2])
    outputs, importances, thresholds = [], [], []
    for group, group_scores in zip(partition.groups, scores):
        states, attention_scores = scored_attention(
            *(group.take(states).transpose(1, 2) for states in (query, key, value)),
            group.mask,
            dropout,
            attention.training,
        )
        outputs.append(states.transpose(1, 2).flatten(2))
        mask = None if group.mask is None else group.mask[:, 1:]
        importance = token_importance(attention_scores, group_scores, mask)
        importances.append(importance)
        if pruning.token_counts is None:
            thresholds.append(importance_threshold(group_scores, importance, pruning.temperature, mask))
    context = partition.join(outputs)
    importance = importances[0]
    if len(importances) > 1:
        importance = layout.pad(partition.join([F.pad(importance, (1, 0)) for importance in importances]))[:, 1:]
    mask = layout.token_mask
    if pruning.token_counts is None:
        keep = select_tokens(importance, partition.join_samples(thresholds), mask, pruning.granularity)
    else:
        # The class token and the merged one are among those that it leaves.
        keep = keep_all_or_enough(most_important(importance, length - 2, mask), mask)
    return context, keep, importance


def align(
    states: torch.Tensor, layout: Layout, pruning: BranchPruning
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """From a layer's input (R, D): its tokens' alignment scores, (n, N, T) for each group of samples, and, where the loss is wanted, its
    alignment feature (B, T, D)."""
    partition = layout.groups(states.shape[1])
    scores, features = [], []
    for group in partition.groups:
        tokens = group.take(states)[:, 1:]
        if pruning.projection is not None:
            tokens = pruning.projection(tokens)
        scores.append(alignment_scores(tokens, pruning.alignment_tokens))
        if pruning.with_feature:
            mask = None if group.mask is None else group.mask[:, 1:]
            features.append(alignment_feature(scores[-1], tokens, mask))
    return scores, partition.join_samples(features) if features else None


class MadtpBlipVisionLayer(BlipEncoderLayer):
    def forward(
        self, states: torch.Tensor, layout: Layout, pruning: BranchPruning | None = None, length: int | None = None
    ) -> LayerOutput:
        """`length`: how many tokens to leave, where the number is fixed."""
        scores, feature = (None, None) if pruning is None else align(states, layout, pruning)
        prunes = pruning is not None and pruning.temperature > 0 and layout.longest >= MIN_LENGTH
        source = None

        attention = self.self_attn
        query_key_value = attention.qkv(self.layer_norm1(states)).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
        if not prunes:
            context = attend(attention, *query_key_value, layout)
        else:
            context, keep, importance = attend_and_score(attention, *query_key_value, layout, scores, pruning, length)
        states = states + attention.projection(context)
        if prunes:
            states, layout, source = merge_tokens(states, layout, keep, importance, length)
        states = states + self.mlp(self.layer_norm2(states))
        return states, layout, feature, source


def split_heads(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(..., D) -> (..., H, d)."""
    return states.unflatten(-1, (num_heads, -1))


def query_key_value(attention: nn.Module, states: torch.Tensor, context_states: torch.Tensor):
    """Of a `BlipTextSelfAttention` of states (R, D) to context_states (S, E): three tensors (R or S, H, d)."""
    heads = attention.num_attention_heads
    query, key, value = attention.query(states), attention.key(context_states), attention.value(context_states)
    return split_heads(query, heads), split_heads(key, heads), split_heads(value, heads)


class MadtpBlipTextLayer(BlipTextLayer):
    def forward(
        self,
        states: torch.Tensor,
        layout: Layout,
        pruning: BranchPruning | None = None,
        length: int | None = None,
        *images: torch.Tensor | Layout,
    ) -> LayerOutput:
        """`images`: the states and the layout of each image that a text meets, one after the other; nothing for a text by itself."""
        scores, feature = (None, None) if pruning is None else align(states, layout, pruning)
        prunes = pruning is not None and pruning.temperature > 0 and layout.longest >= MIN_LENGTH
        source = None

        attention = self.attention.self
        projected = query_key_value(attention, states, states)
        if not prunes:
            context = attend(attention, *projected, layout)
        else:
            context, keep, importance = attend_and_score(attention, *projected, layout, scores, pruning, length)
        states = self.attention.output(context, states)
        if prunes:
            states, layout, source = merge_tokens(states, layout, keep, importance, length)
        if images:
            states = self.attend_to_images(states, layout, *images)
        return self.feed_forward_chunk(states), layout, feature, source

    def attend_to_images(self, states, layout, image_states, image_layout):
        seen = attend_to_image(self.crossattention.self, states, layout, image_states, image_layout)
        return self.crossattention.output(seen, states)


def attend_to_image(attention: nn.Module, states, layout: Layout, image_states, image_layout: Layout) -> torch.Tensor:
    """A `BlipTextSelfAttention` of the text's states (R, D) to an image's (S, E) -> (R, D)."""
    return attend(attention, *query_key_value(attention, states, image_states), layout, image_layout)


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

    def forward(self, states, layout, left_states, left_layout, right_states, right_layout) -> torch.Tensor:
        left = attend_to_image(self.self0, states, layout, left_states, left_layout)
        right = attend_to_image(self.self1, states, layout, right_states, right_layout)
        return self.output(left, right, states)


class MadtpBlipPairTextLayer(MadtpBlipTextLayer):
    """The text layer of NLVR2: a sentence about two images."""

    def __init__(self, config, layer_num: int):
        super().__init__(config, layer_num)
        self.crossattention = PairCrossAttention(config, merges=layer_num >= MERGE_FROM_LAYER)

    def attend_to_images(self, states, layout, *images):
        return self.crossattention(states, layout, *images)


def run_layers(
    layers: nn.ModuleList,
    states: torch.Tensor,
    layout: Layout,
    pruning: BranchPruning | None = None,
    output_hidden_states: bool = False,
    output_positions: bool = False,
    context: tuple = (),
) -> BranchOutput:
    """Both encoders: layer after layer on the tokens that the one before has left; `context` is what each layer looks at besides."""
    num_tokens = [layout.num_tokens]
    all_hidden_states = [layout.pad(states)] if output_hidden_states else None
    positions = all_positions = None
    if output_positions:
        positions = torch.arange(layout.longest, device=states.device).repeat(layout.batch_size)
        all_positions = [layout.pad(positions)]
    feature = None
    for index, layer in enumerate(layers):
        length = None
        if pruning is not None and pruning.token_counts is not None:
            length = min(pruning.token_counts[index], layout.longest)
        states, layout, layer_feature, source = layer(states, layout, pruning, length, *context)
        if layer_feature is not None:
            feature = layer_feature if feature is None else feature + layer_feature
        num_tokens.append(layout.num_tokens)
        if output_hidden_states:
            all_hidden_states.append(layout.pad(states))
        if output_positions:
            if source is not None:
                positions = torch.cat([positions, positions.new_full((layout.batch_size,), -1)])[source]
            padded, mask = layout.pad(positions), layout.padded_mask
            all_positions.append(padded if mask is None else padded.where(mask, -1))
    return BranchOutput(
        states,
        layout,
        feature,
        torch.stack(num_tokens),
        None if all_hidden_states is None else tuple(all_hidden_states),
        None if all_positions is None else tuple(all_positions),
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
        states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        layout = Layout.rectangle(*states.shape[:2], states.device)
        output = run_layers(
            self.encoder.layers, states.flatten(0, 1), layout, pruning, output_hidden_states, output_positions
        )
        return output._replace(states=self.post_layernorm(output.states))


class MadtpBlipTextEncoder(nn.Module):
    def __init__(self, config, layer_class):
        super().__init__()
        self.layer = nn.ModuleList([layer_class(config, index) for index in range(config.num_hidden_layers)])


class MadtpBlipTextModel(nn.Module):
    """The text branch: input_ids (B, L) with mask (B, L), padding behind the text, and the images that it is about -> `BranchOutput`."""

    def __init__(self, config, layer_class=MadtpBlipTextLayer):
        super().__init__()
        self.embeddings = BlipTextEmbeddings(config)
        self.encoder = MadtpBlipTextEncoder(config, layer_class)

    def forward(
        self,
        input_ids: torch.Tensor,
        *images: torch.Tensor | Layout,
        mask: torch.Tensor | None = None,
        packed: bool = False,
        pruning: BranchPruning | None = None,
    ) -> BranchOutput:
        """`packed`: leave padding out; else it is computed as if it were text, as transformers does, and only not attended to."""
        longest = self.embeddings.position_embeddings.num_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(
                f"input_ids holds a text of {input_ids.shape[1]} tokens: this model reads at most {longest}. Tokenize with"
                f" truncation=True, max_length={longest}."
            )
        if packed:
            input_ids, layout = pack(input_ids, mask)
        else:
            layout = Layout.rectangle(*input_ids.shape, input_ids.device, mask)
            input_ids = input_ids.flatten()
        positions = torch.arange(layout.total, device=input_ids.device) - layout.starts[layout.samples]
        states = self.embeddings(input_ids=input_ids.unsqueeze(0), position_ids=positions.unsqueeze(0)).squeeze(0)
        return run_layers(self.encoder.layer, states, layout, pruning, context=images)


class DecoderAttention(BlipTextSelfAttention):
    """transformers' attention of the text decoder, fused, and in cross-attention minding the mask, which transformers' own loses on the way."""

    def forward(
        self, hidden_states, attention_mask=None, encoder_hidden_states=None, **kwargs
    ) -> tuple[torch.Tensor, None]:
        query = split_heads(self.query(hidden_states), self.num_attention_heads).transpose(1, 2)
        is_cross = encoder_hidden_states is not None
        given = cache = kwargs.get(CACHE_ARGUMENT)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.cross_attention_cache if is_cross else cache.self_attention_cache
        copies = 1
        if is_cross and cache is not None and given.is_updated.get(self.layer_idx):
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
            # Sequences that are written about a sample, such as beams, all ask its keys.
            copies = query.shape[0] // key.shape[0]
        else:
            source = encoder_hidden_states if is_cross else hidden_states
            key, value = (
                split_heads(linear(source), self.num_attention_heads).transpose(1, 2)
                for linear in (self.key, self.value)
            )
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
                if is_cross:
                    given.is_updated[self.layer_idx] = True
        dropout = self.dropout.p if self.training else 0.0
        mask = attention_mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        if copies > 1:
            query = query.unflatten(0, (-1, copies)).transpose(1, 2).flatten(2, 3)
            mask = None if mask is None else mask[::copies, :, :1]
        context = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        if copies > 1:
            context = context.unflatten(2, (copies, -1)).transpose(1, 2).flatten(0, 1)
        return context.transpose(1, 2).flatten(2), None


def build_text_decoder(config, encoder_width: int) -> BlipTextLMHeadModel:
    """The text decoder, transformers' own but for its attention; it reads states of `encoder_width`."""
    config = copy.deepcopy(config)
    config.encoder_hidden_size = encoder_width
    # So transformers makes masks that can be added to scores, which fused attention takes as well.
    config._attn_implementation = "eager"
    decoder = BlipTextLMHeadModel(config)
    for index, layer in enumerate(decoder.bert.encoder.layer):
        layer.attention.self = DecoderAttention(config, is_cross_attention=False, layer_idx=index)
        layer.crossattention.self = DecoderAttention(config, is_cross_attention=True, layer_idx=index)
    return decoder


class SampleCache(DynamicCache):
    """Keys and values of samples, shared by the sequences that are written about each: nothing moves when beams change places."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        pass


def cross_attention_cache(decoder: BlipTextLMHeadModel, states, layout: Layout) -> EncoderDecoderCache:
    """The keys and values of all the decoder's cross-attentions to states (R, D), computed once before generation, on no padding."""
    cache = SampleCache()
    for index, layer in enumerate(decoder.bert.encoder.layer):
        attention = layer.crossattention.self
        key, value = (
            layout.pad(split_heads(linear(states), attention.num_attention_heads)).transpose(1, 2)
            for linear in (attention.key, attention.value)
        )
        cache.update(key, value, index)
    return EncoderDecoderCache(DynamicCache(), cache)
