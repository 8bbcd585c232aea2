"""Attention over the sequences of a batch: fused, or with what a pruning method needs from its maps.

Shapes: R rows of all sequences; in a chunk of the batch, n sequences of up to L tokens, N of which are removable; H
heads, d head width.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .chunks import divide, takes_chunks, whole
from .sequences import Sequences, join
from .token_pruning import AttentionStatistics
from .triton_kernels import COMPUTE_CAPABILITY, KERNEL_ERRORS, disable, is_available, varlen_attention


ATTENTION_BLOCK = 3 * 2**19  # attention probabilities computed at a time on a CPU: 6 MB, which fit into the cache


class BranchSpec(NamedTuple):
    """What a host says about the sequences of one of its branches.

    Protected tokens are never removed; the others are *removable*.

    num_prefix_tokens, num_suffix_tokens: how many tokens at the front and at the end of each sequence are protected,
        such as a class token, registers or an end of text.
    pooling: the query that reads the sequence as a whole, whose attention is s_cls: `"first"` or `"last"`, the first
        or the last token's; `"mean"`, the mean over all queries; or a tensor (H, d), a query from outside.
    is_causal: whether a token attends to itself and to the tokens before it alone.
    """

    num_prefix_tokens: int = 1
    num_suffix_tokens: int = 0
    pooling: str | torch.Tensor = "first"
    is_causal: bool = False

    @property
    def num_protected(self) -> int:
        return self.num_prefix_tokens + self.num_suffix_tokens

    def num_removable(self, sequences: Sequences) -> int:
        """Return N, the number of removable tokens in a longest sequence."""
        return sequences.max_seqlen - self.num_protected

    def removable(self, sequences: Sequences) -> slice:
        """Return the positions of the removable tokens in padded states."""
        return slice(self.num_prefix_tokens, self.num_prefix_tokens + self.num_removable(sequences))

    def mask(self, sequences: Sequences) -> torch.Tensor | None:
        """Return an (n, N) bool mask, True where a removable token is real, or None if all are."""
        # A removable token is real if, behind it, there are the real tokens of the suffix.
        return None if sequences.mask is None else sequences.mask[:, self.num_protected :]

    def sizes(self, sequences: Sequences) -> torch.Tensor:
        """Return the sizes (n, N) of the removable tokens, 1 if none was merged yet."""
        if sequences.sizes is None:
            shape = sequences.batch_size, self.num_removable(sequences)
            return torch.ones(shape, dtype=torch.float32, device=sequences.device)
        return sequences.pad(sequences.sizes)[:, self.removable(sequences)]

    def float_mask(self, sequences: Sequences) -> torch.Tensor | None:
        """Return `mask` as floats."""
        return None if sequences.mask is None else sequences.float_mask[:, self.num_protected :]

    def counts(self, sequences: Sequences) -> torch.Tensor | int:
        """Return the number of removable tokens of each sequence, (n, 1), or N if it is the same for all."""
        if sequences.mask is None:
            return self.num_removable(sequences)
        return sequences.lengths.unsqueeze(1) - self.num_protected


CLASS_TOKEN_FIRST = BranchSpec()


# Kernels: torch's varlen attention, or Triton's


@functools.cache
def varlen_parameters() -> frozenset[str]:
    """Return the names of the arguments of torch's varlen attention, none if this torch has no such function.

    It is imported here because its import registers FLOP formulas with torch.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen_attn(*args, **options) -> torch.Tensor:
    """Call torch's varlen attention so that a sample's result is independent of its batch, where torch can."""
    from torch.nn.attention import varlen

    if "num_splits" in varlen_parameters():
        options["num_splits"] = 1
    return varlen.varlen_attn(*args, **options)


def has_varlen_attn(device: torch.device) -> bool:
    """Return whether torch's varlen attention, which is flash attention, runs on a device."""
    return (
        device.type == "cuda"
        and "window_size" in varlen_parameters()  # its first versions had other arguments
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= COMPUTE_CAPABILITY
    )


def takes_varlen_attn(query: torch.Tensor, *layouts: Sequences, dropout: float = 0.0) -> bool:
    """Return whether torch's varlen attention can take queries (R, H, d) like these, of batches laid out like these.

    It takes half precision only.
    """
    return (
        not dropout
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and has_varlen_attn(query.device)
        and all(layout.has_only_real_rows for layout in layouts)
    )


def takes_kernels(query: torch.Tensor, *layouts: Sequences, dropout: float = 0.0) -> bool:
    """Return whether Triton's kernels can take queries (R, H, d) like these, of batches laid out like these."""
    return not dropout and is_available(query) and all(layout.has_only_real_rows for layout in layouts)


def in_kernels(function: Callable, *args):
    """Call a function that launches kernels; return None, and switch them off, if they can't be built."""
    try:
        return function(*args)
    except KERNEL_ERRORS as error:
        disable(error)
        return None


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
    if "flash" in implementation and sequences.has_only_real_rows and context.has_only_real_rows:
        return _flash_attention(attention, implementation, query, key, value, sequences, context, dropout, is_causal)
    if varlen and takes_varlen_attn(query, sequences, context, dropout=dropout):
        lengths = (sequences.cu_seqlens, context.cu_seqlens, sequences.max_seqlen, context.max_seqlen)
        window = (-1, 0 if is_causal else -1)
        return varlen_attn(query, key, value, *lengths, window_size=window).flatten(1)
    if varlen and takes_kernels(query, sequences, context, dropout=dropout):
        lengths = (sequences.cu_seqlens, context.cu_seqlens, sequences.max_seqlen)
        output = in_kernels(varlen_attention, query, key, value, *lengths, is_causal)
        if output is not None:
            return output.flatten(1)
    chunking = whole(sequences)
    if varlen:
        chunking = divide(context if context.is_varlen else sequences, key.shape[1] * key.shape[2])
    outputs = []
    for of_query, of_key in zip(chunking.chunks(sequences), chunking.chunks(context)):
        states = padded_attention(
            implementation,
            of_query.pad(query).transpose(1, 2),
            of_key.pad(key).transpose(1, 2),
            of_key.pad(value).transpose(1, 2),
            of_key.mask,
            dropout,
            is_causal,
        )
        outputs.append(of_query.unpad(states.transpose(1, 2).flatten(2)))
    return chunking.join_rows(outputs, sequences)


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

    mask: broadcasts to the probabilities; True where a query may attend to a key, or what is added to the logits.
    """
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if is_causal:
        causal = causal_mask(logits.shape[-1], logits.device)
        mask = causal if mask is None else mask & causal
    if mask is not None and mask.dtype != torch.bool:
        logits = logits + mask
    elif mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(query.dtype)


def attend_and_keep_maps(query_key_value: torch.Tensor, sequences: Sequences, is_causal: bool, dropout: float = 0.0):
    """Compute self-attention of (R, 3, H, d); return its output (R, H * d) and its maps (B, H, L, L)."""
    query, key, value = (states.transpose(1, 2) for states in sequences.pad(query_key_value).unbind(2))
    maps = attention_maps(query, key, layout_mask(sequences, is_causal, query.dtype))
    output = F.dropout(maps, dropout) @ value
    return sequences.unpad(output.transpose(1, 2).flatten(2)), maps


def size_bias(chunk: Sequences) -> torch.Tensor | None:
    """Return what is added to the attention logits of each key, the log of its size, (n, L); None without sizes."""
    return None if chunk.sizes is None else chunk.pad(chunk.sizes).log()


def layout_mask(chunk: Sequences, is_causal: bool, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the mask of attention within a chunk, (1 or n, 1, 1 or L, L), or None; with sizes, a bias of logits."""
    mask = None if chunk.mask is None else chunk.mask[:, None, None, :]
    if is_causal:
        past = causal_mask(chunk.max_seqlen, chunk.device)[None, None]
        mask = past if mask is None else mask & past
    if chunk.sizes is None:
        return mask
    bias = size_bias(chunk).to(dtype)[:, None, None, :]
    return bias if mask is None else bias.where(mask, torch.finfo(dtype).min)


def causal_mask(length: int, device) -> torch.Tensor:
    """Return a (length, length) bool mask: True where the row's token may attend to the column's."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


# Attention that collects what a pruning method needs


def attend_with_statistics(
    query_key_value: torch.Tensor,
    chunk: Sequences,
    spec: BranchSpec,
    dropout: float = 0.0,
    all_maps: list | None = None,
    with_keys: bool = False,
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
            Which tokens are protected, and which query pools the sequence.
        dropout (`float`, *optional*, defaults to 0.0):
            The dropout probability of the attention maps.
        all_maps (`list`, *optional*):
            If given, the chunk's maps (n, H, L, L) are appended to it.
        with_keys (`bool`, *optional*, defaults to `False`):
            Whether the statistics include the keys.

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
    bias, space = size_bias(chunk), None
    if heads < num_heads and all_maps is None and not torch.is_grad_enabled():
        space = query.new_empty(heads * chunk.batch_size, length, length)
    outputs, pooled, kept_maps, strongest = [], [], [], None
    for block in zip(query.split(heads), key.split(heads), value.split(heads)):
        output, maps = _attention_of_heads(*block, seen, bias, dropout, space)
        outputs.append(output)
        if all_maps is not None:
            kept_maps.append(maps)
        row, most = _pooling_row(maps, chunk, spec), maps.amax(dim=0)
        if row is not None:
            pooled.append(row if space is None else row.clone())
        strongest = most if strongest is None else torch.maximum(strongest, most)
    output = join(outputs)
    pooling_attention = join(pooled) if pooled else _attention_from_outside(key, chunk, spec)
    tokens, removable = spec.removable(chunk), spec.float_mask(chunk)
    by_query = strongest[:, spec.num_prefix_tokens :, tokens]
    if chunk.mask is None:
        received = by_query.sum(dim=1)
    else:  # zero out padded queries
        received = (chunk.float_mask[:, None, spec.num_prefix_tokens :] @ by_query).squeeze(1)
    if spec.num_suffix_tokens and chunk.mask is not None:  # a shorter sample's suffix is among the removable positions
        received, pooling_attention = received * removable, pooling_attention * removable
    keys = key[:, :, tokens].float().mean(dim=0) if with_keys else None
    statistics = AttentionStatistics(received, pooling_attention, output[:, :, tokens].float().norm(dim=-1), keys)
    if all_maps is not None:  # the output depends on the returned maps, so that users can read their gradients
        maps = join(kept_maps).transpose(0, 1)
        all_maps.append(maps if chunk.mask is None else maps * chunk.float_mask[:, None, :, None])
        output = all_maps[-1].transpose(0, 1).to(value.dtype) @ value
    return chunk.unpad_rows(output.flatten(1, 2).transpose(0, 1)).flatten(1), statistics


def _split_and_pad(query_key_value: torch.Tensor, chunk: Sequences) -> tuple[torch.Tensor, ...]:
    """Split (R, 3, H, d) into the padded query, key and value of a chunk, (H, n, L, d) each.

    Heads come first, so that a block of heads multiplies as one batch.
    """
    states = chunk.pad(query_key_value.permute(1, 2, 0, 3), dim=2)
    if takes_chunks(states.device):  # oneDNN compiles half-precision products again for each new length
        states = states.float()
    return (states if chunk.batch_size == 1 else states.contiguous()).unbind()


def _attention_of_heads(
    query, key, value, seen, bias, dropout: float, space=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the outputs (H, n, L, d) and float32 maps (H, n, L, L) of some heads from their (H, n, L, d) inputs.

    seen: True where a query may attend to a key, or None. bias (n, L): added to the logits of each key, or None.
    space: an optional buffer (H * n or more, L, L) for the maps.
    """
    shape = query.shape[:2]
    query, key, value = (states.flatten(0, 1) for states in (query, key, value))
    in_place = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    scale = query.shape[-1] ** -0.5
    out = None if space is None else space[: query.shape[0]]
    added, beta = query.new_empty(1, 1, 1), 0
    if bias is not None:
        added, beta = bias.to(query.dtype).repeat(shape[0], 1).unsqueeze(1), 1
    logits = torch.baddbmm(added, query, key.transpose(1, 2), beta=beta, alpha=scale, out=out).unflatten(0, shape)
    if seen is not None:
        logits = logits.where(seen, torch.finfo(logits.dtype).min)
    maps = torch.softmax(logits, -1, torch.float32, out=logits if in_place and logits.dtype == torch.float32 else None)
    output = F.dropout(maps, dropout).to(value.dtype).flatten(0, 1) @ value
    return output.unflatten(0, shape), maps


def _pooling_row(maps: torch.Tensor, chunk: Sequences, spec: BranchSpec) -> torch.Tensor | None:
    """Return the pooling query's attention to the removable tokens: maps (H, n, L, L) -> (H, n, N).

    It is None if the query comes from outside.
    """
    if not isinstance(spec.pooling, str):
        return None
    tokens = spec.removable(chunk)
    if spec.pooling == "mean":
        if chunk.mask is None:
            return maps[..., tokens].mean(dim=2)
        queries = chunk.float_mask / chunk.lengths.unsqueeze(1)
        return (queries[:, None, :] @ maps[..., tokens]).squeeze(2)
    if spec.pooling == "first":
        return maps[:, :, 0, tokens]
    if chunk.mask is None:
        return maps[:, :, -1, tokens]
    last = (chunk.lengths - 1).view(1, -1, 1, 1).expand(maps.shape[0], -1, 1, maps.shape[3])
    return maps.gather(2, last)[:, :, 0, tokens]


def _attention_from_outside(key: torch.Tensor, chunk: Sequences, spec: BranchSpec) -> torch.Tensor:
    """Compute the attention (H, n, N) that a pooling query (H, d) from outside pays to keys (H, n, L, d)."""
    query = spec.pooling.to(key)[:, None, None, :]
    mask = None if chunk.mask is None else chunk.mask[:, None, :]
    return attention_maps(query, key, mask)[:, :, 0, spec.removable(chunk)].float()


def attend_fused(
    query_key_value: torch.Tensor,
    chunk: Sequences,
    spec: BranchSpec,
    needs: str | None = None,
    dropout: float = 0.0,
    all_maps: list | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute self-attention within a chunk of the batch by fused attention, which keeps no maps.

    Args:
        query_key_value (`torch.Tensor` of shape `(R, 3, H, d)`):
            Queries, keys and values of the whole batch.
        needs (`str`, *optional*):
            `"pooling_attention"`: what the pooling query pays to each removable token, its mean over heads, (n, N).
            `"keys"`: each removable token's key, its mean over heads, (n, N, d).
        all_maps (`list`, *optional*):
            If given, the chunk's maps (n, H, L, L) are computed and appended to it.

    Returns:
        The output (rows of the chunk, H * d), and what the method needs.
    """
    query, key, value = chunk.pad(query_key_value).permute(2, 0, 3, 1, 4).unbind()  # (n, H, L, d) each
    mask = layout_mask(chunk, spec.is_causal, query.dtype)
    if all_maps is None:
        output = F.scaled_dot_product_attention(query, key, value, mask, dropout)
    else:
        all_maps.append(attention_maps(query, key, mask))
        output = F.dropout(all_maps[-1], dropout) @ value
    found = None
    if needs == "pooling_attention":
        found = _pooling_attention(query, key, mask, chunk, spec).mean(dim=0)
    elif needs == "keys":
        found = key[:, :, spec.removable(chunk)].float().mean(dim=1)
    return chunk.unpad(output.transpose(1, 2).flatten(2)), found


def attend_by_size(query_key_value: torch.Tensor, sequences: Sequences, spec: BranchSpec, dropout: float = 0.0):
    """Compute self-attention of (R, 3, H, d) -> (R, H * d) over rows that have sizes."""
    if takes_kernels(query_key_value, sequences, dropout=dropout):
        layout = (sequences.cu_seqlens, sequences.cu_seqlens, sequences.max_seqlen)
        states = query_key_value.unbind(1)
        output = in_kernels(varlen_attention, *states, *layout, spec.is_causal, sequences.sizes)
        if output is not None:
            return output.flatten(1)
    width = query_key_value.shape[2] * query_key_value.shape[3]
    chunking = divide(sequences, width) if sequences.is_varlen else whole(sequences)
    chunks = chunking.chunks(sequences)
    outputs = [attend_fused(query_key_value, chunk, spec, dropout=dropout)[0] for chunk in chunks]
    return chunking.join_rows(outputs, sequences)


def _pooling_attention(query, key, mask, chunk: Sequences, spec: BranchSpec) -> torch.Tensor:
    """Compute the pooling query's attention (H, n, N) again, from queries and keys (n, H, L, d)."""
    if not isinstance(spec.pooling, str):
        return _attention_from_outside(key.transpose(0, 1), chunk, spec)
    if spec.pooling == "first":
        query, mask = query[:, :, :1], mask if mask is None or mask.shape[2] == 1 else mask[:, :, :1]
    elif spec.pooling == "last" and chunk.mask is None:
        query, mask = query[:, :, -1:], mask if mask is None or mask.shape[2] == 1 else mask[:, :, -1:]
    maps = attention_maps(query, key, mask).float().transpose(0, 1)
    if maps.shape[2] == 1:
        return maps[:, :, 0, spec.removable(chunk)]
    return _pooling_row(maps, chunk, spec)
