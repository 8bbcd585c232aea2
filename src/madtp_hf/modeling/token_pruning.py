"""MADTP's token pruning (arXiv 2403.02991) as functions of tensors, independent of the network that calls them.

Shapes: B batch, N tokens that can go (protected tokens, such as the class token, are left out by the caller), T
alignment tokens, D width, H heads, d head width. `mask` (B, N) says which are real; None says that there is no
padding. Padding takes part in no score, threshold or mean. Scores are computed in float32.

A pruned layer, step by step:

1. a = x S^T                                                         `alignment_scores`
2. softmax_n(a / sqrt(D))^T x, summed over layers; 1 - cos            `alignment_feature`, `alignment_loss`
3. attention, and what the scores need to know of it                 `AttentionEvidence`, filled by `attention.py`
4. s = (s_self + s_cls + s_tok) / 3                                  `token_importance`
5. theta = f min_t sum_n softmax_n(a / tau)[n, t] s[n]               `importance_threshold`
6. keep s > theta, merge the rest into one token                     `select_tokens`, `most_important`, `merge_weights`
7. (the layer's feed-forward on what is left)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class AttentionEvidence(NamedTuple):
    """What token importance needs of a self-attention with probabilities A (B, H, L, L) and per-head outputs O (B,
    H, L, d).

    The *reader* is the token whose row says what the sample as a whole attends to: the class token.

    received (B, N): the sum over queries of the maximum over heads of A, the first token's query left out
    from_reader (H, B, N): the reader's row of A
    output_norm (H, B, N): the norm of O's rows
    """

    received: torch.Tensor
    from_reader: torch.Tensor
    output_norm: torch.Tensor


def sum_over_tokens(scores: torch.Tensor) -> torch.Tensor:
    """Sum (B, N) over tokens -> (B, 1), the divisor that turns scores into shares."""
    return scores.sum(dim=-1, keepdim=True) + 1e-8


def alignment_scores(tokens: torch.Tensor, alignment_tokens: torch.Tensor) -> torch.Tensor:
    """Step 1: compute the scores a (..., T) of tokens (..., D) against alignment tokens (T, D)."""
    return tokens @ alignment_tokens.T


def alignment_feature(scores: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Step 2: compute what each alignment token gathers from the tokens: a (B, N, T), tokens (B, N, D) -> (B, T,
    D)."""
    logits = scores.float() / tokens.shape[-1] ** 0.5
    if mask is not None:
        # The lowest finite number, not -inf: a text without a word has no token to attend to, and must not become NaN.
        logits = logits.masked_fill(~mask.unsqueeze(-1), torch.finfo(torch.float32).min)
    weights = logits.softmax(dim=1)
    if mask is not None:
        weights = weights * mask.unsqueeze(-1)
    return weights.transpose(1, 2).to(tokens.dtype) @ tokens


def alignment_loss(image_feature: torch.Tensor, text_feature: torch.Tensor) -> torch.Tensor:
    """Step 2: compute the mean of 1 - cos between two features (B, T, D), over samples and alignment tokens."""
    return 1 - F.cosine_similarity(image_feature.float(), text_feature.float(), dim=-1).mean()


def reader_importance(evidence: AttentionEvidence) -> torch.Tensor:
    """Step 4: compute s_cls (B, N), the reading token's attention to each token in each head, weighted by the norm
    of the token's output there."""
    norm = evidence.output_norm
    return (evidence.from_reader * norm).sum(dim=0) / norm.sum(dim=0)


def strongest_alignment(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Step 4: compute s_tok (B, N) before it is divided by its sum over tokens."""
    strongest = scores.amax(dim=-1).float()
    return strongest if mask is None else strongest * mask


def token_importance(
    evidence: AttentionEvidence, scores: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Step 4: compute the importance s (B, N) of the tokens from their attention and their alignment scores a (B,
    N, T).

    mask (B, N): 1.0 at real tokens, 0.0 at padding, as are all masks below that are not said to be boolean.
    """
    by_alignment = strongest_alignment(scores, mask)
    importance = reader_importance(evidence).addcdiv(evidence.received, sum_over_tokens(evidence.received))
    return importance.addcdiv(by_alignment, sum_over_tokens(by_alignment)) / 3


@torch.no_grad()  # a threshold is compared with, and passes no gradient on
def importance_threshold(
    scores: torch.Tensor,
    importance: torch.Tensor,
    temperature: float,
    mask: torch.Tensor | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    """Step 5: compute the threshold theta (B, 1): the smallest importance that an alignment token sees when it
    attends to the tokens with `temperature`, times `factor`. The factor is 1 in the paper; below 1 it reaches
    smaller reductions than any temperature does.

    scores (B, N, T) at padding are to be those of a real token of the same sample; importance (B, N) is 0 there.
    """
    gate = scores.float() / temperature
    # The softmax's division comes last. At small temperatures an alignment token sees one token alone, theta is the
    # importance of a token to the last bit, and rounding decides: this order decides as the published implementation
    # does.
    gate = gate.sub_(gate.amax(dim=1, keepdim=True)).exp_()
    with torch.autocast(gate.device.type, enabled=False):
        seen = importance.float().unsqueeze(1) @ gate
        total = gate.sum(dim=1, keepdim=True) if mask is None else mask.unsqueeze(1) @ gate
    threshold = (seen / total).amin(dim=-1)
    return threshold if factor == 1 else threshold * factor


def select_tokens(
    importance: torch.Tensor,
    threshold: torch.Tensor,
    mask: torch.Tensor | None = None,
    num_tokens: torch.Tensor | int | None = None,
    min_kept: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 6: select which tokens stay (B, N), False at padding, and which samples merge the others (B, 1).

    Where fewer than `min_kept` would stay, or one token or none would go, all stay. mask (B, N): boolean; num_tokens
    (B, 1): how many tokens can go, N if not given.
    """
    keep = importance > threshold
    return keep_all_or_enough(keep if mask is None else keep & mask, mask, num_tokens, min_kept)


def keep_all_or_enough(
    keep: torch.Tensor,
    mask: torch.Tensor | None,
    num_tokens: torch.Tensor | int | None = None,
    min_kept: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the rules of `select_tokens` for too few remaining tokens to a selection (B, N)."""
    if num_tokens is None:
        num_tokens = keep.shape[1] if mask is None else mask.sum(dim=1, keepdim=True)
    num_kept = keep.sum(dim=1, keepdim=True)
    merges = (num_kept >= min_kept) & (num_kept < num_tokens - 1)
    # Not by `torch.where`, which ONNX runtime lacks for booleans.
    return keep | (~merges if mask is None else mask & ~merges), merges


def most_important(importance: torch.Tensor, number: torch.Tensor | int, mask: torch.Tensor | None) -> torch.Tensor:
    """Return a mask (B, N) of the `number` most important tokens of each sample, or of all where it has fewer; mask
    (B, N) is boolean."""
    ranked = importance if mask is None else importance.masked_fill(~mask, -torch.inf)
    if isinstance(number, torch.Tensor):
        # Rank 0 is the most important token; padding ranks last.
        keep = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < number
    else:  # a number that shapes give: a sort with a stable order is none that ONNX knows
        keep = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, ranked.topk(number).indices, True)
    return keep if mask is None else keep & mask


def merge_weights(importance: torch.Tensor, stays: torch.Tensor, merges: torch.Tensor) -> torch.Tensor:
    """Step 6: compute the weight (B, N) of each dropped token in the merged token: its share of their importance.

    importance (B, N), 0 at padding; stays (B, N); merges (B, 1).
    """
    weights = importance.masked_fill(stays, 0)
    total = weights.sum(dim=1, keepdim=True)
    return weights / total.where(merges, 1)
