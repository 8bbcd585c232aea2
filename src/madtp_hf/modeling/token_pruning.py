"""MADTP's token pruning (arXiv 2403.02991), as functions of tensors that know nothing of the network that calls them.

Shapes: B batch, L = 1 + N sequence (the class token, then N tokens), T alignment tokens, D width, H heads, d head width. Sequences
of different lengths lie in one batch with padding behind the real tokens: `mask` (B, L) is True at the real ones, and None says
that there is no padding. Padding takes part in no score, threshold or mean. Scores are computed in float32.

A pruned layer, step by step:

1. a = x S^T                                                         `alignment_scores`
2. softmax_n(a / sqrt(D))^T x, summed over layers; 1 - cos            `alignment_feature`, `alignment_loss`
3. attention, and what the scores need to know of it                 `scored_attention`
4. s = (s_self + s_cls + s_tok) / 3                                  `token_importance`
5. theta = min_t sum_n softmax_n(a / tau)[n, t] s[n]                 `importance_threshold`
6. keep s > theta, merge the rest into one token                     `select_tokens`, `merge_tokens`
7. (the layer's feed-forward on what is left)

`prune_tokens` is steps 4 to 6 in one call.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


ATTENTION_BLOCK = 2**21  # attention probabilities at a time on a CPU: 8 MB


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
) -> tuple[torch.Tensor, AttentionScores]:
    """Step 3: self-attention of (B, H, L, d) queries, keys and values: its output O (B, H, L, d) and its scores.

    A block of queries at a time, so that all heads' maps of a long sequence are never held at once and a block's stay in cache.
    """
    batch_size, num_heads, length, width = query.shape
    block = length
    if query.device.type == "cpu":
        block = max(ATTENTION_BLOCK // (batch_size * num_heads * length), 16)
    query, key = query * width**-0.5, key.transpose(-1, -2)
    outputs, received, from_class = [], 0, None
    for start in range(0, length, block):
        rows = slice(start, start + block)
        logits = query[:, :, rows] @ key
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :], torch.finfo(logits.dtype).min)
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
        outputs.append(F.dropout(probabilities, dropout).to(value.dtype) @ value)
        strongest = probabilities[..., 1:].amax(dim=1)
        if mask is not None:
            strongest = strongest * mask[:, rows, None]  # what padding asks for is not asked
        if start == 0:
            from_class, strongest = probabilities[:, :, 0, 1:], strongest[:, 1:]
        received = received + strongest.sum(dim=1)
    output = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
    return output, AttentionScores(received, from_class, output[:, :, 1:].norm(dim=-1, dtype=torch.float32))


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


def importance_threshold(
    scores: torch.Tensor, importance: torch.Tensor, temperature: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Step 5: theta (B,): the smallest importance that an alignment token sees, looking at the tokens with `temperature`."""
    gate = scores.float() / temperature  # float16 would overflow at small temperatures
    if mask is not None:
        gate = gate.masked_fill(~mask.unsqueeze(-1), torch.finfo(torch.float32).min)
    # The softmax's division comes last. At small temperatures an alignment token sees one token alone, theta is the importance of a
    # token to the last bit, and rounding decides: this order decides as the published implementation does.
    gate = (gate - gate.amax(dim=1, keepdim=True)).exp()
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
        # Rank 0 is the most important token; padding ranks last.
        ranked = importance if mask is None else importance.masked_fill(~mask, -torch.inf)
        rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        keep = rank < keep.sum(dim=-1).amax()
        if mask is not None:
            keep = keep & mask
    num_tokens = keep.shape[1] if mask is None else mask.sum(dim=-1)
    num_kept = keep.sum(dim=-1)
    prunes = (num_kept > 0) & (num_tokens - num_kept > 1)
    everything = torch.ones_like(keep) if mask is None else mask
    return torch.where(prunes.unsqueeze(-1), keep, everything)


def merge_tokens(
    hidden_states: torch.Tensor, keep: torch.Tensor, importance: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Step 6: the class token, the tokens to keep in their order, and one more for all that go: their mean weighted by importance.

    hidden_states (B, L, D), keep (B, N), importance (B, N), mask (B, L) -> hidden_states (B, M, D), mask (B, M) or None, M the
    longest of the results, and source (B, M), which of the L each token was, -1 for merged ones and padding; None where nothing
    changed at all. Waits for the device once, to learn M.
    """
    drop = ~keep if mask is None else mask[:, 1:] & ~keep
    merges = drop.any(dim=-1)
    position = 1 + keep.sum(dim=-1)  # of the merged token, behind those that stay
    lengths = position + merges
    longest, shortest, merges_any = torch.stack([lengths.amax(), lengths.amin(), merges.any()]).tolist()
    if not merges_any:
        return hidden_states, mask, None

    weights = importance * drop
    weights = (weights / weights.sum(dim=-1, keepdim=True).where(merges.unsqueeze(-1), 1)).to(hidden_states.dtype)
    merged = weights.unsqueeze(1) @ hidden_states[:, 1:]

    source = keep.logical_not().to(torch.uint8).argsort(dim=-1, stable=True) + 1
    source = F.pad(source, (1, 0))[:, :longest]
    hidden_states = hidden_states.gather(1, source.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))
    slot = torch.arange(longest, device=keep.device)
    is_kept = slot < position.unsqueeze(-1)
    is_merged = (slot == position.unsqueeze(-1)) & merges.unsqueeze(-1)
    hidden_states = torch.where(is_merged.unsqueeze(-1), merged, hidden_states)
    mask = None if shortest == longest else is_kept | is_merged
    return hidden_states, mask, source.masked_fill(~is_kept, -1)


def prune_tokens(
    hidden_states: torch.Tensor,
    attention: AttentionScores,
    scores: torch.Tensor,
    temperature: float,
    granularity: str = "instance",
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Steps 4 to 6: hidden_states (B, L, D) with the layer's attention and alignment scores -> what enters its feed-forward.

    Returns what `merge_tokens` does: the tokens, their mask, and where each of them comes from.
    """
    if hidden_states.shape[1] < 4:  # at least one token stays and two go
        return hidden_states, mask, None
    token_mask = None if mask is None else mask[:, 1:]
    importance = token_importance(attention, scores, token_mask)
    threshold = importance_threshold(scores, importance, temperature, token_mask)
    keep = select_tokens(importance, threshold, token_mask, granularity)
    return merge_tokens(hidden_states, keep, importance, mask)
