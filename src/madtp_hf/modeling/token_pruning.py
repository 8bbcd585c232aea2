"""MADTP's token pruning (arXiv 2403.02991), as functions of tensors that know nothing of the network that calls them.

Shapes: B batch, L = 1 + N sequence (the class token, then N tokens), T alignment tokens, D width, H heads, d head width. Where sequences
of different lengths are taken together there is padding behind the real tokens: `mask` (B, L) is True at the real ones, and None says
that there is no padding. Padding takes part in no score, threshold or mean. Scores are computed in float32. What tokens are left is made anew
as rows end to end, see `packing.py`.

A pruned layer, step by step:

1. a = x S^T                                                         `alignment_scores`
2. softmax_n(a / sqrt(D))^T x, summed over layers; 1 - cos            `alignment_feature`, `alignment_loss`
3. attention, and what the scores need to know of it                 `scored_attention`
4. s = (s_self + s_cls + s_tok) / 3                                  `token_importance`
5. theta = min_t sum_n softmax_n(a / tau)[n, t] s[n]                 `importance_threshold`
6. keep s > theta, merge the rest into one token                     `select_tokens`, `merge_tokens`
7. (the layer's feed-forward on what is left)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .packing import Layout
from .triton_attention import disable, is_available, triton_scored_attention


ATTENTION_BLOCK = 3 * 2**19  # attention probabilities at a time on a CPU: 6 MB, which stay in cache


class AttentionScores(NamedTuple):
    """What the importance of tokens needs of a self-attention A (B, H, L, L) with per-head outputs O (B, H, L, d).

    received (B, N): sum over the queries of the maximum over the heads of A[:, :, 1:, 1:]
    from_class (B, H, N): A[:, :, 0, 1:]
    output_norm (B, H, N): the norm of O's rows, the class token's left out
    """

    received: torch.Tensor
    from_class: torch.Tensor
    output_norm: torch.Tensor


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the tokens, dimension 1 of `scores` (B, N, T), in float32; padding gets 0, where there is a real token at all."""
    if mask is not None:
        # The lowest finite number, not -inf: a text of its class token alone has no token to attend to, and must not become NaN.
        scores = scores.float().masked_fill(~mask.unsqueeze(-1), torch.finfo(torch.float32).min)
    return scores.softmax(dim=1, dtype=torch.float32)


def normalize_over_tokens(scores: torch.Tensor) -> torch.Tensor:
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-8)


def alignment_scores(tokens: torch.Tensor, alignment_tokens: torch.Tensor) -> torch.Tensor:
    """Step 1: tokens (B, N, D) and alignment tokens (T, D) -> a (B, N, T)."""
    return tokens @ alignment_tokens.T


def alignment_feature(scores: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Step 2: what each alignment token gathers from the tokens: a (B, N, T), tokens (B, N, D) -> (B, T, D)."""
    weights = masked_softmax(scores / tokens.shape[-1] ** 0.5, mask)
    if mask is not None:
        weights = weights * mask.unsqueeze(-1)
    return weights.transpose(1, 2).to(tokens.dtype) @ tokens


def alignment_loss(image_feature: torch.Tensor, text_feature: torch.Tensor) -> torch.Tensor:
    """Step 2: mean over samples and alignment tokens of 1 - cos between (B, T, D) and (B, T, D)."""
    return 1 - F.cosine_similarity(image_feature.float(), text_feature.float(), dim=-1).mean()


def scored_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[torch.Tensor, AttentionScores]:
    """Step 3: self-attention of (B, H, L, d) queries, keys and values: its output O (B, H, L, d) and its scores.

    On CUDA, unless `training`, a kernel computes what is needed of the heads' maps without holding them. On a CPU it is some samples, or of a long
    one some heads, at a time, whose maps stay in cache; all of them are kept only for a backward pass.
    """
    if not training and is_available(query):
        try:
            lengths = None if mask is None else mask.sum(dim=1)
            output, received, from_class = triton_scored_attention(query, key, value, lengths)
            return output, AttentionScores(received, from_class, output[:, :, 1:].float().norm(dim=-1))
        except Exception as error:  # no compiler, or a GPU that the kernels don't fit
            disable(error)
    batch_size, num_heads, length, _ = query.shape
    samples, heads = batch_size, num_heads
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        maps = ATTENTION_BLOCK // length**2
        # An even number of heads: there mostly is an even number of cores.
        samples, heads = (maps // num_heads, num_heads) if maps >= num_heads else (1, max(maps // 2 * 2, 2))
    if samples >= batch_size:
        return _attention_of_samples(query, key, value, mask, dropout, heads)
    masks = [None] * -(-batch_size // samples) if mask is None else mask.split(samples)
    blocks = [
        _attention_of_samples(*block, dropout, heads)
        for block in zip(query.split(samples), key.split(samples), value.split(samples), masks)
    ]
    return torch.cat([output for output, _ in blocks]), AttentionScores(*map(torch.cat, zip(*(s for _, s in blocks))))


def _attention_of_samples(query, key, value, mask, dropout, heads) -> tuple[torch.Tensor, AttentionScores]:
    """`scored_attention` with the maps of so many `heads` at a time."""
    in_place = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    outputs, from_class, strongest = [], [], None
    for some_query, some_key, some_value in zip(query.split(heads, 1), key.split(heads, 1), value.split(heads, 1)):
        logits = (some_query * query.shape[-1] ** -0.5) @ some_key.transpose(-1, -2)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :], torch.finfo(logits.dtype).min)
        probabilities = torch.softmax(
            logits, -1, dtype=torch.float32, out=logits if in_place and logits.dtype == torch.float32 else None
        )
        outputs.append(F.dropout(probabilities, dropout).to(value.dtype) @ some_value)
        from_class.append(probabilities[:, :, 0, 1:].clone())  # not to keep the maps
        most = probabilities.amax(dim=1)
        strongest = most if strongest is None else torch.maximum(strongest, most)
    strongest = strongest[:, 1:, 1:]
    if mask is not None:
        strongest = strongest * mask[:, 1:, None]  # what padding asks for is not asked
    output = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
    from_class = torch.cat(from_class, dim=1) if len(from_class) > 1 else from_class[0]
    return output, AttentionScores(strongest.sum(dim=1), from_class, output[:, :, 1:].float().norm(dim=-1))


def token_importance(
    attention: AttentionScores, scores: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Step 4: the importance s (B, N) of the tokens, from their attention and their alignment scores a (B, N, T)."""
    head_share = attention.output_norm / attention.output_norm.sum(dim=1, keepdim=True)
    by_alignment = scores.float().amax(dim=-1)
    if mask is not None:
        by_alignment = by_alignment * mask
    by_self = normalize_over_tokens(attention.received)
    by_class = (attention.from_class * head_share).sum(dim=1)
    return (by_self + by_class + normalize_over_tokens(by_alignment)) / 3


@torch.no_grad()  # a threshold is compared with, and passes no gradient on
def importance_threshold(
    scores: torch.Tensor, importance: torch.Tensor, temperature: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Step 5: theta (B,): the smallest importance that an alignment token sees, looking at the tokens with `temperature`."""
    gate = scores / temperature if scores.dtype == torch.float32 else scores.float().div_(temperature)
    if mask is not None:
        gate.masked_fill_(~mask.unsqueeze(-1), torch.finfo(torch.float32).min)
    # The softmax's division comes last. At small temperatures an alignment token sees one token alone, theta is the importance of a
    # token to the last bit, and rounding decides: this order decides as the published implementation does.
    gate = gate.sub_(gate.amax(dim=1, keepdim=True)).exp_()
    with torch.autocast(gate.device.type, enabled=False):
        seen = (importance.float().unsqueeze(1) @ gate).squeeze(1)  # padding has no importance
    return (seen / gate.sum(dim=1)).amin(dim=-1)


def select_tokens(
    importance: torch.Tensor,
    threshold: torch.Tensor,
    mask: torch.Tensor | None = None,
    granularity: str = "instance",
) -> torch.Tensor:
    """Step 6: which tokens stay, (B, N) bool; False at padding.

    "instance": those above the sample's own threshold. "batch", as the published implementation: as many of the most important
    ones in every sample as the neediest sample of the batch has above its threshold. Where nothing would stay, or one token or none
    would go, all stay.
    """
    keep = importance > threshold.unsqueeze(-1)
    if mask is not None:
        keep = keep & mask
    if granularity == "batch":
        keep = most_important(importance, keep.sum(dim=-1).amax(), mask)
    return keep_all_or_enough(keep, mask)


def most_important(importance: torch.Tensor, number: torch.Tensor | int, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, N) bool: the `number` most important tokens of each sample, all where it has fewer."""
    ranked = importance if mask is None else importance.masked_fill(~mask, -torch.inf)
    if isinstance(number, int):
        keep = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, ranked.topk(number).indices, True)
    else:
        # Rank 0 is the most important token; padding ranks last.
        keep = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < number
    return keep if mask is None else keep & mask


def keep_all_or_enough(keep: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Where nothing would stay, or one token or none would go, all stay."""
    num_tokens = keep.shape[1] if mask is None else mask.sum(dim=-1)
    num_kept = keep.sum(dim=-1)
    prunes = (num_kept > 0) & (num_tokens - num_kept > 1)
    everything = ~prunes.unsqueeze(-1)
    return keep | (everything if mask is None else everything & mask)


def merge_tokens(
    states: torch.Tensor, layout: Layout, keep: torch.Tensor, importance: torch.Tensor, length: int | None = None
) -> tuple[torch.Tensor, Layout, torch.Tensor | None]:
    """Step 6: the class token, the tokens to keep in their order, and one more for all that go: their mean weighted by importance.

    states (R, D) in `layout`, keep (B, N), importance (B, N) -> states (R', D), their layout, and source (R',), which of the R rows each was, or R + b
    for the merged token of sample b; None where nothing changed at all. With `length`, every sample gets that many rows, the last ones of those that
    need fewer being padding; else it waits for the device once, to learn how many there are.
    """
    mask = layout.token_mask
    drop = ~keep if mask is None else mask & ~keep
    merges = drop.any(dim=-1, keepdim=True)
    stays = torch.cat([torch.ones_like(merges), keep, merges], dim=1)  # the class token, the tokens, the merged one
    lengths = stays.sum(dim=1)
    if length is None:
        total, longest = torch.stack([lengths.sum(), lengths.amax()]).tolist()
        if total == layout.total:  # one that merges has fewer
            return states, layout, None
    elif length == layout.longest:
        return states, layout, None

    weights = importance * drop
    weights = weights / weights.sum(dim=-1, keepdim=True).where(merges, 1)
    if layout.lengths is None:
        with torch.autocast(states.device.type, enabled=False):
            merged = (weights.unsqueeze(1).to(states.dtype) @ layout.pad(states)[:, 1:]).squeeze(1)
    else:
        weighted = layout.unpad(F.pad(weights, (1, 0))).unsqueeze(1) * states
        merged = weighted.new_zeros(layout.batch_size, states.shape[1]).index_add(0, layout.samples, weighted)
        merged = merged.to(states.dtype)

    # Where each slot of `stays` comes from; the merged tokens lie behind all rows.
    slots = torch.arange(layout.longest, device=states.device)
    rows = layout.starts.unsqueeze(1) + slots
    behind = layout.total + torch.arange(layout.batch_size, device=states.device)
    rows = torch.cat([rows, behind.unsqueeze(1)], dim=1)
    if length is None:
        slot = torch.where(stays, stays.flatten().cumsum(0).view_as(rows) - 1, total)
        source = rows.new_empty(total + 1).scatter_(0, slot.flatten(), rows.flatten())[:total]
        layout = Layout(layout.batch_size, longest, layout.device, lengths=lengths, total=total)
    else:
        order = (stays * stays.shape[1] - torch.arange(stays.shape[1], device=states.device)).topk(length).indices
        source = rows.gather(1, order).flatten()
        mask = None if mask is None else torch.arange(length, device=states.device) < lengths.unsqueeze(1)
        layout = Layout.rectangle(layout.batch_size, length, layout.device, mask)
    # The merged token is the last of its sample, where there is one.
    last = layout.starts + lengths - 1
    states = states.index_select(0, source.clamp(max=states.shape[0] - 1))
    merged = torch.where(merges, merged, states.index_select(0, last))
    return states.index_copy_(0, last, merged), layout, source
