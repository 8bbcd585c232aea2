"""Stand-ins for the Triton kernels in plain torch, one sample at a time.

With them the kernel path runs, and its launches are counted, without a GPU. Shapes and meanings are those of
`madtp_hf.modeling.triton_kernels`.
"""

import contextlib
import itertools
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F

from madtp_hf.modeling import attention, chunks, method_madtp, repack
from madtp_hf.modeling.attention import attention_maps
from madtp_hf.modeling.token_pruning import (
    AttentionStatistics,
    importance_threshold,
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


def is_available(query: torch.Tensor) -> bool:
    """Report the kernels as available, as if there were a GPU."""
    needs_gradient = torch.is_grad_enabled() and query.requires_grad
    compiling = torch.compiler.is_compiling()
    return not (needs_gradient or compiling) and query.dtype in DTYPES and query.shape[-1] in HEAD_WIDTHS


def samples(cu_seqlens: torch.Tensor) -> list[slice]:
    """Return the row slice of each sample."""
    return [slice(*ends) for ends in itertools.pairwise(cu_seqlens.tolist())]


def varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, is_causal=False):
    outputs = []
    for asking, asked in zip(samples(cu_seqlens_q), samples(cu_seqlens_k)):
        states = (query[asking], key[asked], value[asked])
        outputs.append(F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in states), is_causal=is_causal))
    return torch.cat(outputs, dim=1).transpose(0, 1).contiguous()


def scored_varlen_attention(query, key, value, cu_seqlens, max_seqlen, is_causal=False, protects_last=False):
    outputs, received, pooling_attention = [], [], []
    for rows in samples(cu_seqlens):
        q, k, v = (x[rows].transpose(0, 1) for x in (query, key, value))
        maps = attention_maps(q.float(), k.float(), is_causal=is_causal)
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


@contextlib.contextmanager
def kernel_path(call: Callable = lambda function, names, *args: function(*args)):
    """Run models as with Triton on a GPU, with these functions in place of the kernels. CPU only.

    call(function, names, *args): runs one of the functions, which stands for launches of these names.
    """

    def standing_in(function):
        return lambda *args: call(function, LAUNCHES[function.__name__], *args)

    places = {
        varlen_attention: (attention,),
        scored_varlen_attention: (method_madtp,),
        gate: (method_madtp,),
        merge: (repack,),
    }
    with contextlib.ExitStack() as stack:
        for function, modules in places.items():
            for module in modules:
                stack.enter_context(mock.patch.object(module, function.__name__, standing_in(function)))
        stack.enter_context(mock.patch.object(attention, "is_available", is_available))
        stack.enter_context(mock.patch.object(chunks, "CPU_TAKES_CHUNKS", False))
        yield
