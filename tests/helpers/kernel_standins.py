"""Stand-ins for the Triton kernels in plain torch, one sample at a time.

With them the kernel path runs, and its launches are counted, without a GPU. Shapes and meanings are those of
`madtp_hf.modeling.triton_kernels` and `triton_merging`.
"""

import contextlib
import itertools
from collections.abc import Callable
from unittest import mock

import torch

from madtp_hf.modeling import attention, chunks, method_madtp, method_madtp_merge, repack
from madtp_hf.modeling.attention import attention_maps
from madtp_hf.modeling.token_pruning import (
    AttentionStatistics,
    cosine_similarity,
    distinctness,
    importance_threshold,
    merge_into_similar,
    merge_weights,
    select_tokens,
    token_importance,
)
from madtp_hf.modeling.triton_kernels import DTYPES, HEAD_WIDTHS


# The kernels that each function launches.
LAUNCHES = {
    "varlen_attention": ("_attend",),
    "scored_varlen_attention": ("_attend", "_sum_received"),
    "gate": ("_gate", "cumsum"),
    "merge": ("_merge",),
}
MERGING_LAUNCHES = {
    "gate_and_assign": ("_mean_key", "_importance", "_rank", "_select", "_assign", "cumsum"),
    "merge_similar": ("_merge_similar",),
}


def is_available(query: torch.Tensor) -> bool:
    """Report the kernels as available, as if there were a GPU."""
    needs_gradient = torch.is_grad_enabled() and query.requires_grad
    compiling = torch.compiler.is_compiling()
    return not (needs_gradient or compiling) and query.dtype in DTYPES and query.shape[-1] in HEAD_WIDTHS


def samples(cu_seqlens: torch.Tensor) -> list[slice]:
    """Return the row slice of each sample."""
    return [slice(*ends) for ends in itertools.pairwise(cu_seqlens.tolist())]


def maps_of(query, key, is_causal, sizes) -> torch.Tensor:
    """Return one sample's attention maps (H, Lq, Lk)."""
    bias = None
    if sizes is not None:
        bias = sizes.log().expand(query.shape[1], -1)
        if is_causal:
            bias = bias.where(torch.ones_like(bias, dtype=torch.bool).tril(), -torch.inf)
    return attention_maps(query.float(), key.float(), bias, is_causal and bias is None)


def varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, is_causal=False, sizes=None):
    outputs = []
    for asking, asked in zip(samples(cu_seqlens_q), samples(cu_seqlens_k)):
        q, k, v = (x.transpose(0, 1) for x in (query[asking], key[asked], value[asked]))
        outputs.append(maps_of(q, k, is_causal, None if sizes is None else sizes[asked]).to(v.dtype) @ v)
    return torch.cat(outputs, dim=1).transpose(0, 1).contiguous()


def scored_varlen_attention(
    query, key, value, cu_seqlens, max_seqlen, is_causal=False, protects_last=False, sizes=None
):
    outputs, received, pooling_attention = [], [], []
    for rows in samples(cu_seqlens):
        q, k, v = (x[rows].transpose(0, 1) for x in (query, key, value))
        maps = maps_of(q, k, is_causal, None if sizes is None else sizes[rows])
        outputs.append((maps.to(v.dtype) @ v).transpose(0, 1))
        received.append(maps[:, 1:].amax(dim=0).sum(dim=0))
        pooling_attention.append(maps[:, -1 if protects_last else 0])
    output = torch.cat(outputs).contiguous()
    norm = output.float().norm(dim=-1).T.contiguous()
    return output, torch.cat(received).unsqueeze(0), torch.cat(pooling_attention, dim=1), norm


def gate(
    scores,
    received,
    pooling_attention,
    output_norm,
    cu_seqlens,
    temperature,
    min_kept,
    protects_last=False,
    factor=1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    importance = torch.zeros(scores.shape[0], device=scores.device)
    destinations, lengths = [], [0]
    for rows in samples(cu_seqlens):
        tokens = slice(rows.start + 1, rows.stop - protects_last)
        stays, merges = torch.ones(1, max(tokens.stop - tokens.start, 0), dtype=torch.bool), False
        if stays.shape[1] > 0:
            statistics = AttentionStatistics(
                received[None, :, tokens].sum(dim=1), pooling_attention[:, None, tokens], output_norm[:, None, tokens]
            )
            s = token_importance(statistics, scores[None, tokens])
            theta = importance_threshold(scores[None, tokens], s, temperature, factor=factor)
            stays, merges = select_tokens(s <= theta, min_kept=min_kept)
            importance[tokens] = s[0]
        stays, merges = stays[0].int(), bool(merges)
        num_kept = int(stays.sum())
        length = 1 + num_kept + merges + (protects_last and rows.stop - rows.start > 1)
        to = torch.where(stays == 1, stays.cumsum(0), -1 - (1 + num_kept))
        ends = [torch.zeros(1), torch.full((rows.stop - rows.start - 1 - len(to),), length - 1)]
        destinations.append(torch.cat([ends[0].int(), to.int(), ends[1].int()]))
        lengths.append(length)
    return importance, torch.cat(destinations), torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def merge(states, importance, destination, cu_seqlens, new_cu_seqlens, num_rows):
    output = states.new_empty(num_rows, states.shape[1])
    for rows, new_rows in zip(samples(cu_seqlens), samples(new_cu_seqlens)):
        to, new = destination[rows].long(), output[new_rows]
        stays = to >= 0
        new[to[stays]] = states[rows][stays]
        if not stays.all():
            weights = merge_weights(importance[None, rows], stays[None], torch.ones(1, 1, dtype=torch.bool))
            new[-1 - int(to.min())] = (weights @ states[rows].float())[0].to(states.dtype)
    return output


def gate_and_assign(
    scores,
    received,
    pooling_attention,
    output_norm,
    key,
    sizes,
    cu_seqlens,
    max_seqlen,
    temperature,
    min_kept,
    protects_last=False,
    factor=1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    importance = torch.zeros(scores.shape[0])
    counts = torch.ones(scores.shape[0]) if sizes is None else sizes.clone()
    destinations, lengths = [], [0]
    for rows in samples(cu_seqlens):
        tokens = slice(rows.start + 1, max(rows.stop - protects_last, rows.start + 1))
        to = torch.zeros(0, dtype=torch.int32)
        if tokens.stop > tokens.start:
            statistics = AttentionStatistics(
                received[None, :, tokens].sum(dim=1), pooling_attention[:, None, tokens], output_norm[:, None, tokens]
            )
            s = token_importance(statistics, scores[None, tokens])
            similarity = cosine_similarity(key[None, tokens].float().mean(dim=2))
            ranked = s.clamp(min=0) * distinctness(s, similarity)
            theta = importance_threshold(scores[None, tokens], ranked, temperature, factor=factor)
            stays, _ = select_tokens(ranked <= theta, min_kept=min_kept)
            into, weight, new_sizes = merge_into_similar(s, similarity, counts[None, tokens], stays)
            importance[tokens] = s[0]
            counts[tokens] = counts[tokens].where(stays[0], (weight * new_sizes.gather(1, into))[0])
            position = stays[0].cumsum(0)
            to = torch.where(stays[0], position, -1 - position[into[0]])
        length = 1 + int((to >= 0).sum()) + (protects_last and rows.stop - rows.start > 1)
        behind = torch.full((rows.stop - tokens.stop,), length - 1)
        destinations.append(torch.cat([torch.zeros(1).int(), to.int(), behind.int()]))
        lengths.append(length)
    return importance, torch.cat(destinations), counts, torch.tensor(lengths, dtype=torch.int32).cumsum(0).int()


def merge_similar(states, destination, counts, cu_seqlens, new_cu_seqlens, num_rows, max_seqlen):
    starts = new_cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    into = (starts + torch.where(destination < 0, -1 - destination, destination)).long()
    sizes = torch.zeros(num_rows).index_add(0, into, counts)
    total = torch.zeros(num_rows, states.shape[1]).index_add(0, into, states.float() * counts[:, None])
    return (total / sizes[:, None]).to(states.dtype), sizes


@contextlib.contextmanager
def kernel_path(call: Callable = lambda function, names, *args: function(*args)):
    """Run models as with Triton on a GPU, with these functions in place of the kernels. CPU only.

    call(function, names, *args): runs one of the functions, which stands for launches of these names.
    """

    def standing_in(function):
        return lambda *args: call(function, (LAUNCHES | MERGING_LAUNCHES)[function.__name__], *args)

    places = {
        varlen_attention: (attention,),
        scored_varlen_attention: (method_madtp, method_madtp_merge),
        gate: (method_madtp,),
        gate_and_assign: (method_madtp_merge,),
        merge: (repack,),
        merge_similar: (repack,),
    }
    with contextlib.ExitStack() as stack:
        for function, modules in places.items():
            for module in modules:
                stack.enter_context(mock.patch.object(module, function.__name__, standing_in(function)))
        stack.enter_context(mock.patch.object(attention, "is_available", is_available))
        stack.enter_context(mock.patch.object(chunks, "CPU_TAKES_CHUNKS", False))
        yield
