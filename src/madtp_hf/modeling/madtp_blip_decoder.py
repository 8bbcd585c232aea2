"""BLIP's text decoder: transformers' own with another attention.

The attention is fused, applies masks, and computes cross-attention keys and values once per sample.
"""

import inspect
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.blip import modeling_blip_text
from transformers.models.blip.modeling_blip_text import (
    BlipTextLMHeadModel,
    BlipTextLMPredictionHead,
    BlipTextModel,
    BlipTextOnlyMLMHead,
    BlipTextPreTrainedModel,
    BlipTextSelfAttention,
)

from .attention import attention_maps, causal_mask
from .madtp_blip_encoders import split_heads
from .prepared_linear import keep_dtype
from .sequences import Sequences


# transformers' name for the cached keys and values: `cache` since 5.24. Under another name they would be ignored
# silently.
CACHE_ARGUMENT = (
    "cache" if "cache" in inspect.signature(BlipTextSelfAttention.forward).parameters else "past_key_values"
)
# Newer versions use a four-dimensional mask unchanged. For other masks they read the values, which synchronizes with
# the device.
TAKES_FINISHED_MASKS = hasattr(modeling_blip_text, "create_causal_mask")


# Whether the pass of this thread returns attention maps.
_KEEPS_MAPS: ContextVar[bool] = ContextVar("maps of one pass", default=False)


def keeps_maps() -> bool:
    return not torch.compiler.is_compiling() and _KEEPS_MAPS.get()  # compiled code can't read it


def cross_attention_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Convert a mask (B, M) bool, True at real tokens, to the decoder's `encoder_attention_mask`."""
    return mask[:, None, None, :] if mask is not None and TAKES_FINISHED_MASKS else mask


def self_attention_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Convert a mask (B, L), nonzero at real tokens, to the decoder's `attention_mask` of a whole text."""
    if mask is None or not TAKES_FINISHED_MASKS:
        return mask
    return mask.bool()[:, None, None, :] & causal_mask(mask.shape[1], mask.device)


class DecoderAttention(BlipTextSelfAttention):
    """Fused attention of the text decoder.

    It applies `encoder_attention_mask`, which transformers' BLIP drops.
    """

    def __init__(self, config, is_cross_attention: bool, layer_idx: int, encoder_width: int | None = None):
        super().__init__(config, is_cross_attention, layer_idx=layer_idx)
        if is_cross_attention and encoder_width != config.encoder_hidden_size:
            self.key = nn.Linear(encoder_width, self.all_head_size)
            self.value = nn.Linear(encoder_width, self.all_head_size)

    def forward(
        self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query_map, *key_value_maps = keep_dtype(self.query, self.key, self.value)
        query = split_heads(query_map(hidden_states), self.num_attention_heads).transpose(1, 2)
        is_cross = encoder_hidden_states is not None
        key, value = self._key_and_value(
            key_value_maps, hidden_states, encoder_hidden_states, kwargs.get(CACHE_ARGUMENT)
        )
        # Sequences generated for one sample, such as beams, share its keys and values.
        copies = query.shape[0] // key.shape[0]
        mask = attention_mask
        if mask is not None and mask.ndim == 2:  # the form that flash attention takes
            mask = self_attention_mask(mask)[:, :, -query.shape[2] :]
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        is_causal = mask is None and not is_cross and query.shape[2] > 1
        if self.config._attn_implementation == "eager" or keeps_maps():
            context, maps = self._attend_eagerly(query, key, value, mask, is_causal, copies)
            return context.to(hidden_states.dtype), maps
        if copies > 1:
            query = query.unflatten(0, (-1, copies)).transpose(1, 2).flatten(2, 3)
            mask = None if mask is None else mask[::copies, :, :1]
        dropout = self.dropout.p if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=is_causal)
        if copies > 1:
            context = context.unflatten(2, (copies, -1)).transpose(1, 2).flatten(0, 1)
        return context.transpose(1, 2).flatten(2).to(hidden_states.dtype), None

    def _attend_eagerly(self, query, key, value, mask, is_causal, copies):
        key, value = key.repeat_interleave(copies, 0), value.repeat_interleave(copies, 0)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask >= 0
        maps = attention_maps(query, key, mask, is_causal)
        return (self.dropout(maps) @ value).transpose(1, 2).flatten(2), maps

    def _key_and_value(self, maps, hidden_states, encoder_hidden_states, cache) -> tuple[torch.Tensor, torch.Tensor]:
        """Return key and value (B, H, M, d), from the cache where it holds them already."""
        is_cross, given = encoder_hidden_states is not None, cache
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.cross_attention_cache if is_cross else cache.self_attention_cache
        if is_cross and cache is not None and given.is_updated.get(self.layer_idx):
            return cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        source = encoder_hidden_states if is_cross else hidden_states
        key, value = (split_heads(apply(source), self.num_attention_heads).transpose(1, 2) for apply in maps)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
            if is_cross:
                given.is_updated[self.layer_idx] = True
        return key, value


class DecoderModel(BlipTextModel):
    _supports_sdpa = _supports_flash_attn = True

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling() or not kwargs.get("output_attentions", self.config.output_attentions):
            return super().forward(*args, **kwargs)
        token = _KEEPS_MAPS.set(True)  # transformers' layers don't hand the argument on to attention
        try:
            return super().forward(*args, **kwargs)
        finally:
            _KEEPS_MAPS.reset(token)


class TextDecoder(BlipTextLMHeadModel):
    """transformers' decoder on the model's own text configuration, with encoder states of width `encoder_width`."""

    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config, encoder_width: int):
        BlipTextPreTrainedModel.__init__(self, config)
        self.bert = DecoderModel(config, add_pooling_layer=False)
        self.cls = BlipTextOnlyMLMHead(config)
        self.label_smoothing = config.label_smoothing
        for index, layer in enumerate(self.bert.encoder.layer):
            layer.attention.self = DecoderAttention(config, False, index)
            layer.crossattention.self = DecoderAttention(config, True, index, encoder_width)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, BlipTextLMPredictionHead):  # transformers leaves it uninitialized
            init.zeros_(module.bias)

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        """Prepare inputs as transformers does, with positions that start at 0 after left padding in every version."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and inputs.get("position_ids") is None:
            positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -inputs["input_ids"].shape[1] :]
        return inputs

    def resize_head(self, vocab_size: int) -> None:
        """Resize the head to `vocab_size` words.

        Its weight is tied to the word embeddings. New words get a bias of 0.
        """
        head = self.cls.predictions
        missing = vocab_size - head.bias.shape[0]
        head.bias = nn.Parameter(F.pad(head.bias.detach(), (0, missing)), requires_grad=head.bias.requires_grad)
        head.decoder.bias, head.decoder.out_features = head.bias, vocab_size

    def loss_of(self, output, shift_labels: torch.Tensor | None) -> torch.Tensor:
        """Return the output's loss or, given `shift_labels` (B, L) aligned with its logits, the loss on those."""
        if shift_labels is None:
            return output.loss
        targets = shift_labels.to(output.logits.device).flatten()
        return F.cross_entropy(output.logits.flatten(0, 1), targets, label_smoothing=self.label_smoothing)


class SampleCache(DynamicCache):
    """Cross-attention keys and values, one entry per sample.

    All sequences generated for a sample share its entry, so reordering beams moves nothing.
    """

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        pass


def cross_attention_cache(decoder: TextDecoder, states: torch.Tensor, sequences: Sequences) -> SampleCache:
    """Compute the keys and values of all the decoder's cross-attentions once, before generation.

    states (R, D) lie as `sequences` say; varlen states are projected without padding.
    """
    cache = SampleCache()
    for index, layer in enumerate(decoder.bert.encoder.layer):
        attention = layer.crossattention.self
        key, value = (
            sequences.pad_zeros(split_heads(apply(states), attention.num_attention_heads)).transpose(1, 2)
            for apply in keep_dtype(attention.query, attention.key, attention.value)[1:]
        )
        cache.update(key, value, index)
    return cache
