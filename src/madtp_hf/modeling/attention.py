"""Attention over the sequences of a batch: fused, or with the statistics that a reduction method needs from its maps.

Shapes: R rows of all sequences; in a chunk of the batch, n sequences of up to L tokens, N of which are removable; H
heads, d head width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .sequences import Sequences, join, takes_chunks
from .token_pruning import AttentionStatistics
from .triton_kernels import KERNEL_ERRORS, disable, is_available, varlen_attention


ATTENTION_BLOCK = 3 * 2**19  # attention probabilities computed at a time on a CPU: 6 MB, which fit into the cache


class BranchSpec(NamedTuple):
    """The spec of a host's tokens: which are protected, which is the pooling query, and which tokens they attend to.

    The first token of a sequence is always protected, that is, never removed. The *pooling query* is the token whose row of
    the attention map says what the sequence as a whole attends to.

    protects_last: the last token is protected as well and is the pooling query, as CLIP's end of text. Otherwise the first
        token is the pooling query.
    is_causal: a token attends to itself and to the tokens before it.
    """

    protects_last: bool = False
    is_causal: bool = False

    def num_removable(self, sequences: Sequences) -> int:
        """Return N, the number of indices for removable tokens in padded states; the first of them is index 1."""
        return sequences.max_seqlen - 1 - self.protects_last

    def removable(self, sequences: Sequences) -> torch.Tensor | None:
        """Return an (n, N) bool mask of the indices that hold a removable token, or None if all do."""
        if sequences.mask is None:
            return None
        # Where the last token is protected, a index holds a removable token if a real token follows it.
        return sequences.mask[:, 1 + self.protects_last :]

    def removable_weights(self, sequences: Sequences) -> torch.Tensor | None:
        """Return `removable` as floats."""
        return None if sequences.mask is None else sequences.real[:, 1 + self.protects_last :]

    def removable_counts(self, sequences: Sequences) -> torch.Tensor | int:
        """Return the number of removable tokens of each sequence, (n, 1), or N if it is the same for all."""
        if sequences.mask is None:
            return self.num_removable(sequences)
        return sequences.lengths.unsqueeze(1) - (1 + self.protects_last)


CLASS_TOKEN_FIRST = BranchSpec()  # only the first token, the class token, is protected


# Fused attention


def attend(
    attention: nn.Module,
    implementation: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    context: Sequences | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
) -> torch.Tensor:
    """Compute attention without collecting statistics, by the fastest path that these inputs allow.

    Args:
        attention (`nn.Module`):
            The attention module, an argument of transformers' flash attention.
        implementation (`str`):
            `"eager"`, `"sdpa"`, or one of transformers' flash attention implementations, which take varlen rows
            without padding them.
        query (`torch.Tensor` of shape `(R, H, d)`):
            Queries, laid out as `sequences`.
        key, value (`torch.Tensor` of shape `(S, H, d)`):
            Keys and values, laid out as `context`.
        context (`Sequences`, *optional*):
            The layout of keys and values; defaults to `sequences`, as in self-attention.

    Returns:
        `torch.Tensor` of shape `(R, H * d)`.
    """
    context = sequences if context is None else context
    varlen = sequences.is_varlen or context.is_varlen
    if "flash" in implementation and has_only_real_rows(sequences, context):
        return _flash_attention(attention, implementation, query, key, value, sequences, context, dropout, is_causal)
    if varlen and not dropout and has_only_real_rows(sequences, context) and is_available(query):
        lengths = (sequences.cu_seqlens, context.cu_seqlens, sequences.max_seqlen)
        try:
            return varlen_attention(query, key, value, *lengths, is_causal).flatten(1)
        except KERNEL_ERRORS as error:
            disable(error)
    chunking = sequences.whole
    if varlen:
        chunking = (context if context.is_varlen else sequences).divide(key.shape[1] * key.shape[2])
    outputs = []
    for asking, asked in zip(sequences.chunks(chunking), context.chunks(chunking)):
        states = padded_attention(
            implementation,
            asking.pad(query).transpose(1, 2),
            asked.pad(key).transpose(1, 2),
            asked.pad(value).transpose(1, 2),
            asked.mask,
            dropout,
            is_causal,
        )
        outputs.append(asking.unpad(states.transpose(1, 2).flatten(2)))
    return sequences.join_rows(outputs, chunking)


def has_only_real_rows(*batches: Sequences) -> bool:
    """Return whether none of these batches has padding among its rows."""
    return all(sequences.is_varlen or sequences.mask is None for sequences in batches)


def _flash_attention(attention, implementation, query, key, value, sequences, context, dropout, is_causal):
    states, _ = ALL_ATTENTION_FUNCTIONS[implementation](
        attention,
        *(states.transpose(0, 1).unsqueeze(0) for states in (query, key, value)),
        None,
        dropout=dropout,
        is_causal=is_causal,
        cu_seq_lens_q=sequences.cu_seqlens,
        cu_seq_lens_k=context.cu_seqlens,
        max_length_q=sequences.max_seqlen,
        max_length_k=context.max_seqlen,
    )
    return states.squeeze(0).flatten(1)


def padded_attention(implementation: str, query, key, value, mask=None, dropout: float = 0.0, is_causal: bool = False):
    """Compute attention of query (B, H, L, d) to key and value (B, H, M, d) -> (B, H, L, d).

    mask (B, M): True at real keys; None means that all are.
    """
    if mask is not None:
        mask = mask[:, None, None, :]
    if implementation != "eager":
        if is_causal and mask is not None:
            mask, is_causal = mask & causal_mask(query.shape[2], query.device), False
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=is_causal)
    return F.dropout(attention_maps(query, key, mask, is_causal), dropout) @ value


def attention_maps(query, key, mask=None, is_causal: bool = False) -> torch.Tensor:
    """Compute the attention probabilities (B, H, L, M) of query (B, H, L, d) over key (B, H, M, d).

    mask: broadcasts to the probabilities; True where a query may attend to a key.
    """
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if is_causal:
        causal = causal_mask(logits.shape[-1], logits.device)
        mask = causal if mask is None else mask & causal
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1)


def attend_and_keep_maps(query_key_value: torch.Tensor, sequences: Sequences, spec: BranchSpec, dropout: float = 0.0):
    """Compute self-attention of (R, 3, H, d); return its output (R, H * d) and its maps (B, H, L, L)."""
    query, key, value = (states.transpose(1, 2) for states in sequences.pad(query_key_value).unbind(2))
    mask = None if sequences.mask is None else sequences.mask[:, None, None, :]
    maps = attention_maps(query, key, mask, spec.is_causal)
    output = F.dropout(maps, dropout) @ value
    return sequences.unpad(output.transpose(1, 2).flatten(2)), maps


def causal_mask(length: int, device) -> torch.Tensor:
    """Return a (length, length) bool mask: True where the row's token may attend to the column's."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


# Attention that collects statistics


def attend_with_statistics(
    query_key_value: torch.Tensor,
    chunk: Sequences,
    spec: BranchSpec,
    dropout: float = 0.0,
    all_maps: list | None = None,
) -> tuple[torch.Tensor, AttentionStatistics]:
    """Compute self-attention within a chunk of the batch, and collect the statistics that token importance needs.

    A CPU computes a few heads at a time, so that their maps fit into the cache. Without gradients these blocks of
    heads share one buffer; maps are kept only for a backward pass or for `all_maps`.

    Args:
        query_key_value (`torch.Tensor` of shape `(R, 3, H, d)`):
            Queries, keys and values of the whole batch.
        chunk (`Sequences`):
            The chunk of the batch to compute.
        spec (`BranchSpec`):
            Which tokens are protected, and which is the pooling query.
        dropout (`float`, *optional*, defaults to 0.0):
            The dropout probability of the attention maps.
        all_maps (`list`, *optional*):
            If given, the chunk's maps (n, H, L, L) are appended to it.

    Returns:
        The output (rows of the chunk, H * d) and the chunk's `AttentionStatistics`.
    """
    query, key, value = _split_and_pad(query_key_value, chunk)
    num_heads, length = query.shape[0], chunk.max_seqlen
    heads = num_heads
    if takes_chunks(query.device):
        # An even number of heads, because most CPUs have an even number of cores.
        heads = min(max(ATTENTION_BLOCK // (chunk.batch_size * length**2) // 2 * 2, 2), num_heads)
    seen = None if chunk.mask is None else chunk.mask[:, None, :]
    if spec.is_causal:
        past = causal_mask(length, query.device)
        seen = past if seen is None else seen & past
    space = None
    if heads < num_heads and all_maps is None and not torch.is_grad_enabled():
        space = query.new_empty(heads * chunk.batch_size, length, length)
    outputs, of_reader, kept_maps, strongest = [], [], [], None
    for block in zip(query.split(heads), key.split(heads), value.split(heads)):
        output, maps = _attention_of_heads(*block, seen, dropout, space)
        outputs.append(output)
        if all_maps is not None:
            kept_maps.append(maps)
        row, most = _row_of_reader(maps, chunk, spec), maps.amax(dim=0)
        of_reader.append(row if space is None else row.clone())
        strongest = most if strongest is None else torch.maximum(strongest, most)
    output, pooling_attention = join(outputs), join(of_reader)
    tokens = slice(1, 1 + spec.num_removable(chunk))
    asked = strongest[:, 1:, tokens]
    if chunk.mask is None:
        received = asked.sum(dim=1)
    else:  # zero out padded queries
        received = (chunk.real[:, None, 1:] @ asked).squeeze(1)
    if spec.protects_last and chunk.mask is not None:  # a shorter sample's last token is in a removable index
        removable = spec.removable_weights(chunk)
        received, pooling_attention = received * removable, pooling_attention * removable
    statistics = AttentionStatistics(received, pooling_attention, output[:, :, tokens].float().norm(dim=-1))
    if all_maps is not None:  # the output depends on the returned maps, so that users can read their gradients
        maps = join(kept_maps).transpose(0, 1)
        all_maps.append(maps if chunk.mask is None else maps * chunk.real[:, None, :, None])
        output = all_maps[-1].transpose(0, 1).to(value.dtype) @ value
    return chunk.unpad_rows(output.flatten(1, 2).transpose(0, 1)).flatten(1), statistics


def _split_and_pad(query_key_value: torch.Tensor, chunk: Sequences) -> tuple[torch.Tensor, ...]:
    """Split (R, 3, H, d) into the padded query, key and value of a chunk, (H, n, L, d) each.

    Heads come first, so that a block of heads multiplies as one batch.
    """
    states = chunk.pad(query_key_value.permute(1, 2, 0, 3), dim=2)
    return (states if chunk.batch_size == 1 else states.contiguous()).unbind()


def _attention_of_heads(query, key, value, seen, dropout: float, space=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the outputs (H, n, L, d) and float32 maps (H, n, L, L) of some heads from their (H, n, L, d) inputs.

    seen: True where a query may attend to a key, or None. space: an optional buffer (H * n or more, L, L) for the
    maps.
    """
    shape = query.shape[:2]
    query, key, value = (states.flatten(0, 1) for states in (query, key, value))
    in_place = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    scale = query.shape[-1] ** -0.5
    out = None if space is None else space[: query.shape[0]]
    nothing = query.new_empty(1, 1, 1)
    logits = torch.baddbmm(nothing, query, key.transpose(1, 2), beta=0, alpha=scale, out=out).unflatten(0, shape)
    if seen is not None:
        logits = logits.where(seen, torch.finfo(logits.dtype).min)
    maps = torch.softmax(logits, -1, torch.float32, out=logits if in_place and logits.dtype == torch.float32 else None)
    output = F.dropout(maps, dropout).to(value.dtype).flatten(0, 1) @ value
    return output.unflatten(0, shape), maps


def _row_of_reader(maps: torch.Tensor, chunk: Sequences, spec: BranchSpec) -> torch.Tensor:
    """Select the pooling query's attention to the removable indices: maps (H, n, L, L) -> (H, n, N)."""
    tokens = slice(1, 1 + spec.num_removable(chunk))
    if not spec.protects_last:
        return maps[:, :, 0, tokens]
    if chunk.mask is None:
        return maps[:, :, -1, tokens]
    last = (chunk.lengths - 1).view(1, -1, 1, 1).expand(maps.shape[0], -1, 1, maps.shape[3])
    return maps.gather(2, last)[:, :, 0, tokens]
