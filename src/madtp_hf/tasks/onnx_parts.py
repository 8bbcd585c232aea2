"""The parts of models that are exported as ONNX graphs: what all tasks share. Each task's file lists its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ..modeling.encoder import real_tokens
from ..modeling.madtp_blip_decoder import CACHE_ARGUMENT, cross_attention_cache
from ..modeling.sequences import Sequences


# Names of the dynamic dimensions.
BATCH, LENGTH, STEP, PAST, TOTAL, KEPT = "batch", "length", "step", "past", "past + step", "kept"


class Sizes(NamedTuple):
    """The sizes of an example: batch, text length, the decoder's new tokens, and the tokens already in its cache."""

    batch: int
    length: int
    step: int
    past: int


# All different, and none 1, so that the exporter doesn't equate two dimensions.
TRACED = Sizes(3, 7, 2, 5)
# Sizes at which graphs are compared with the model: the first step and a later one, short texts and the longest.
COMPARED = (Sizes(1, 3, 1, 0), Sizes(2, 10**6, 2, 0), Sizes(2, 6, 1, 4))


@dataclass
class Graph:
    """One graph to export.

    run: computes the graph's outputs from a model and the inputs; inputs: from each name to an example and the names
    of its dynamic dimensions, `{index: name}`; outputs: their names.
    """

    what: str
    run: Callable
    inputs: dict[str, tuple[torch.Tensor, dict[int, str]]]
    outputs: list[str]

    @property
    def examples(self) -> tuple[torch.Tensor, ...]:
        return tuple(example for example, _ in self.inputs.values())


def pad_texts(model, input_ids, attention_mask):
    """Pad texts (B, L) to more tokens than any layer leaves, so that no shape depends on which of the two is smaller.

    This doesn't change the output: a frozen model ignores padding.
    """
    counts = model.start_pass().token_counts
    if counts is None:
        return input_ids, attention_mask
    shortest, longest = max(counts["text"]) + 1, model.config.text_config.max_position_embeddings
    width = torch.sym_max(input_ids.shape[1], shortest) if shortest < longest else longest
    return tuple(nn.functional.pad(x, (0, min(shortest, longest)))[:, :width] for x in (input_ids, attention_mask))


def layout(states: torch.Tensor) -> tuple[torch.Tensor, Sequences]:
    """Return images' states (B, M, D) as the flat states and `Sequences` that an encoder takes."""
    return states.flatten(0, 1), Sequences.padded(states.shape[0], states.shape[1], states.device)


def encoder_states(model, pixel_values):
    return model._encode_images(pixel_values).hidden_states


def for_decoder(model, encoded, masked: bool):
    """Return what the decoder reads of an encoder: a mask, and all layers' cross-attention keys and values."""
    mask = real_tokens(encoded)
    cache = cross_attention_cache(model.text_decoder, encoded.states, encoded.sequences)
    # With pruning off, question answering's decoder attends to padding as well, as transformers' BLIP does.
    return (mask if masked else torch.ones_like(mask)).long(), *_keys_and_values(cache)


def _keys_and_values(cache) -> list[torch.Tensor]:
    """Return the keys and values of a cache's layers as key, value, key, ..."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _decode(model, input_ids, attention_mask, encoder_attention_mask, *keys_and_values):
    """Run one step of the decoder: n new tokens after p cached ones.

    Returns the logits (B, n, V) and the self-attention keys and values of all p + n tokens. Keys and values are taken
    and returned as key, value, key, ...; `keys_and_values` holds those of self-attention, then those of
    cross-attention.
    """
    half = len(keys_and_values) // 2
    caches = []
    for tensors in (keys_and_values[:half], keys_and_values[half:]):
        cache = DynamicCache()
        for layer in range(half // 2):
            cache.update(tensors[2 * layer], tensors[2 * layer + 1], layer)
        caches.append(cache)
    both = EncoderDecoderCache(*caches)
    both.is_updated = dict.fromkeys(range(half // 2), True)
    step, total = input_ids.shape[1], attention_mask.shape[1]
    queries = torch.arange(step, device=input_ids.device) + (total - step)
    slots, queries_column = torch.arange(total, device=input_ids.device), queries.unsqueeze(1)
    mask = attention_mask.bool()[:, None, None, :] & (slots <= queries_column)
    mask = mask | (slots == queries_column)  # for padding as well: a row without any key would give NaN
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0).index_select(1, queries)
    output = model.text_decoder(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        encoder_hidden_states=keys_and_values[half],  # only checked for presence: the cached keys and values are read
        encoder_attention_mask=encoder_attention_mask.bool()[:, None, None, :],
        use_cache=True,
        **{CACHE_ARGUMENT: both},
    )
    return output.logits, *_keys_and_values(both.self_attention_cache)


def images(model, sizes: Sizes) -> dict:
    side = model.config.vision_config.image_size
    return {"pixel_values": (torch.randn(sizes.batch, 3, side, side), {0: BATCH})}


def texts(model, sizes: Sizes) -> dict:
    dims, config = {0: BATCH, 1: LENGTH}, model.config.text_config
    length = min(sizes.length, config.max_position_embeddings)
    ids = torch.randint(4, config.vocab_size - 2, (sizes.batch, length))
    mask = torch.ones_like(ids)
    if sizes.batch > 1:
        mask[0, 2:] = 0  # a short text
    if model.task == "clip":
        ids[torch.arange(sizes.batch), mask.sum(dim=1) - 1] = config.eos_token_id
    return {"input_ids": (ids, dims), "attention_mask": (mask, dims)}


def states(model, sizes: Sizes, *names: str) -> dict:
    """Return image states as the vision encoder outputs them; their number of tokens is fixed."""
    with torch.no_grad():
        states = encoder_states(model, images(model, sizes)["pixel_values"][0])
    # Distinct tensors with different values: the exporter merges inputs that share a tensor.
    return {name: (states.roll(index, dims=1), {0: BATCH}) for index, name in enumerate(names)}


def cache_names(model, kind: str, what: str) -> list[str]:
    layers = range(model.config.text_config.num_hidden_layers)
    return [f"{what}.{layer}.{kind}.{part}" for layer in layers for part in ("key", "value")]


def decoder(model, sizes: Sizes, num_states: int, varies: bool) -> Graph:
    """Describe the decoder's graph.

    varies: whether the number of the encoder's states is dynamic.
    """
    config = model.config.text_config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    ids = torch.randint(4, config.vocab_size - 2, (sizes.batch, sizes.step))
    mask = torch.ones(sizes.batch, sizes.past + sizes.step, dtype=torch.long)
    mask[-1, 0] = 0  # left padding
    states_mask = torch.ones(sizes.batch, num_states, dtype=torch.long)
    inputs = {
        "input_ids": (ids, {0: BATCH, 1: STEP}),
        "attention_mask": (mask, {0: BATCH, 1: TOTAL}),
        "encoder_attention_mask": (states_mask, {0: BATCH, 1: KEPT} if varies else {0: BATCH}),
    }
    cross_dims = {0: BATCH, 2: KEPT} if varies else {0: BATCH}
    for kind, number, dims in (("decoder", sizes.past, {0: BATCH, 2: PAST}), ("encoder", num_states, cross_dims)):
        # Distinct tensors: the exporter merges inputs that share a tensor.
        for name in cache_names(model, kind, "past_key_values"):
            inputs[name] = (torch.randn(sizes.batch, heads, number, width), dims)
    outputs = ["logits", *cache_names(model, "decoder", "present")]
    what = "One step of the decoder: scores of the next token after those whose keys and values are given."
    return Graph(what, _decode, inputs, outputs)


def vision_encoder_graph(model, sizes: Sizes) -> Graph:
    return Graph("Images: their tokens' states.", encoder_states, images(model, sizes), ["image_states"])
