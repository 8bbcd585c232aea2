"""MADTP's token pruning (arXiv 2403.02991), as pure functions of tensors that are independent of the network.

Shapes: B batch, N removable tokens (the caller leaves out protected tokens, such as the class token), T alignment
tokens, D width, H heads, d head width. `mask` (B, N) marks the real tokens; None means that there is no padding.
Padding takes part in no score, threshold or mean. Scores are computed in float32.

A pruned layer, step by step:

1. a = x S^T                                                         `alignment_scores`
2. softmax_n(a / sqrt(D))^T x, summed over layers; 1 - cos            `alignment_feature`, `alignment_loss`
3. attention, and the statistics that the scores need from it        `AttentionStatistics`, filled by `attention.py`
4. s = (s_self + s_cls + s_tok) / 3                                  `token_importance`
5. theta = f min_t sum_n softmax_n(a / tau)[n, t] s[n]               `importance_threshold`
6. keep s > theta, merge the rest into one token                     `select_tokens`, `most_important`, `merge_weights`
7. (the layer's feed-forward on the remaining tokens)

Merging into similar tokens changes three steps:

3. attention's logits of key m rise by log z_m, the log of its size  `size_bias` in `attention.py`
5. s' = s (1 - max_m cos(k_n, k_m)), m: the tokens with s_m > s_n    `cosine_similarity`, `distinctness`
6. keep s' > theta, theta of s'; merge the rest into similar ones    `merge_into_similar`
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F


class AttentionStatistics(NamedTuple):
    """What token importance needs from self-attention with maps A (B, H, L, L) and per-head outputs O (B, H, L, d).

    The *pooling query* is the one whose row of A says what the sample as a whole attends to, such as a class token's.

    received (B, N): the sum over queries, without those of protected tokens at the front, of A's maximum over heads
    pooling_attention (H, B, N): the pooling query's row of A
    output_norm (H, B, N): the norms of O's rows
    keys (B, N, d): for methods that ask for them, the keys, their mean over heads
    """

    received: torch.Tensor
    pooling_attention: torch.Tensor
    output_norm: torch.Tensor
    keys: torch.Tensor | None = None


def sum_over_tokens(scores: torch.Tensor) -> torch.Tensor:
    """Compute the divisor that normalises scores over tokens, their sum + 1e-8: (B, N) -> (B, 1)."""
    return scores.sum(dim=-1, keepdim=True) + 1e-8


def alignment_scores(tokens: torch.Tensor, alignment_tokens: torch.Tensor) -> torch.Tensor:
    """Step 1: compute the alignment scores a (..., T) of tokens (..., D) with the alignment tokens (T, D)."""
    return tokens @ alignment_tokens.T


def alignment_feature(scores: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Step 2: compute the feature (B, T, D) that alignment tokens gather from tokens (B, N, D) by a (B, N, T)."""
    logits = scores.float() / tokens.shape[-1] ** 0.5
    if mask is not None:
        # The lowest finite number, not -inf, which would give NaN for a text without words: all its tokens are masked.
        logits = logits.masked_fill(~mask.unsqueeze(-1), torch.finfo(torch.float32).min)
    weights = logits.softmax(dim=1)
    if mask is not None:
        weights = weights * mask.unsqueeze(-1)
    return weights.transpose(1, 2).to(tokens.dtype) @ tokens


def alignment_loss(image_feature: torch.Tensor, text_feature: torch.Tensor) -> torch.Tensor:
    """Step 2: compute the mean over samples and alignment tokens of 1 - cos of two features (B, T, D)."""
    return 1 - F.cosine_similarity(image_feature.float(), text_feature.float(), dim=-1).mean()


def pooling_importance(statistics: AttentionStatistics) -> torch.Tensor:
    """Step 4: compute s_cls (B, N), the pooling query's attention to each token, weighted by its output norms."""
    norm = statistics.output_norm
    return (statistics.pooling_attention * norm).sum(dim=0) / norm.sum(dim=0)


def strongest_alignment(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Step 4: compute s_tok (B, N), each token's largest alignment score, before normalisation over tokens."""
    strongest = scores.amax(dim=-1).float()
    return strongest if mask is None else strongest * mask


def token_importance(
    statistics: AttentionStatistics, scores: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Step 4: compute the importance s (B, N) from attention's statistics and the alignment scores a (B, N, T).

    mask (B, N): 1.0 at real tokens, 0.0 at padding. So are all masks below unless they are described as boolean.
    """
    by_pooling = pooling_importance(statistics)
    terms = torch.stack([statistics.received, strongest_alignment(scores, mask), by_pooling], dim=1)
    normed = terms[:, :2]
    normed.div_(sum_over_tokens(normed))  # two at once, because on a GPU each operation costs a launch
    return terms.mean(dim=1)


@torch.no_grad()  # importance is only compared with the threshold, which needs no gradient
def importance_threshold(
    scores: torch.Tensor,
    importance: torch.Tensor,
    temperature: float,
    mask: torch.Tensor | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    """Step 5: compute the threshold theta (B, 1).

    Each alignment token averages the importance over the tokens, weighted by the softmax of its scores at
    `temperature`. Theta is the smallest of these T means, times `factor`.

    Args:
        scores (`torch.Tensor` of shape `(B, N, T)`):
            The alignment scores; at padding, those of any real token of the same sample.
        importance (`torch.Tensor` of shape `(B, N)`):
            The importance of the tokens, 0 at padding.
        factor (`float`, *optional*, defaults to 1.0):
            1 in the paper; smaller values prune fewer tokens than any temperature alone does.
    """
    gate = scores.float() / temperature
    # The softmax's division comes last. At small temperatures an alignment token attends to a single token, theta
    # equals that token's importance to the last bit, and rounding decides whether the token stays: this order rounds
    # as the published implementation does.
    gate = gate.sub_(gate.amax(dim=1, keepdim=True))
    if gate.device.type == "cpu":  # where denormal numbers are 30 times as slow; smaller terms don't change the sums
        gate = gate.clamp_(min=-80)
    gate = gate.exp_()
    with without_autocast(gate.device.type):
        seen = importance.float().unsqueeze(1) @ gate
        total = gate.sum(dim=1, keepdim=True) if mask is None else mask.unsqueeze(1) @ gate
    threshold = (seen / total).amin(dim=-1)
    return threshold if factor == 1 else threshold * factor


def without_autocast(device_type: str):
    """Switch autocast off where it is on; elsewhere return no context, which an exporter would trace as a subgraph."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def select_tokens(
    goes: torch.Tensor,
    mask: torch.Tensor | None = None,
    num_tokens: torch.Tensor | int | None = None,
    min_kept: int = 1,
    min_gone: int = 2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 6: select the tokens that stay (B, N), False at padding, and the samples that merge the others (B, 1).

    All tokens of a sample stay if fewer than `min_kept` would stay, or if fewer than `min_gone` would go. goes, mask
    (B, N): boolean, the tokens that would go, and the real ones; num_tokens (B, 1): the number of removable tokens, by
    default all that are real.
    """
    if num_tokens is None:
        num_tokens = goes.shape[1] if mask is None else mask.sum(dim=1, keepdim=True)
    if mask is not None:
        goes = goes & mask
    num_gone = goes.sum(dim=1, keepdim=True)
    merges = (num_gone >= min_gone) & (num_gone <= num_tokens - min_kept)
    goes = goes & merges
    return ~goes if mask is None else mask ^ goes, merges


def most_important(importance: torch.Tensor, number: torch.Tensor | int, mask: torch.Tensor | None) -> torch.Tensor:
    """Select the `number` most important tokens of each sample, all if it has fewer: (B, N) bool.

    mask (B, N): boolean.
    """
    ranked = importance if mask is None else importance.masked_fill(~mask, -torch.inf)
    if isinstance(number, torch.Tensor):
        # Rank 0 is the most important token; padding ranks last.
        keep = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < number
    else:  # an int, known from shapes: `topk`, because ONNX has no stable sort
        keep = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, ranked.topk(number).indices, True)
    return keep if mask is None else keep & mask


def merge_weights(importance: torch.Tensor, stays: torch.Tensor, merges: torch.Tensor) -> torch.Tensor:
    """Step 6: compute each removed token's weight (B, N) in the merged token, its share of their total importance.

    importance (B, N), 0 at padding; stays (B, N); merges (B, 1).
    """
    weights = importance.masked_fill(stays, 0)
    total = weights.sum(dim=1, keepdim=True)
    return weights / total.where(merges, 1)


def cosine_similarity(keys: torch.Tensor) -> torch.Tensor:
    """Compute the cosine of each two tokens' keys (B, N, d): (B, N, N)."""
    keys = F.normalize(keys.float(), dim=-1)
    with without_autocast(keys.device.type):
        return keys @ keys.transpose(1, 2)


def distinctness(importance: torch.Tensor, similarity: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Compute how different each token (B, N) is from all more important ones: 1 - the largest similarity to one.

    The most important token has 2, as if it were the opposite of all others. importance (B, N); similarity (B, N, N);
    mask (B, N): boolean.
    """
    is_no_more_important = importance.unsqueeze(1) <= importance.unsqueeze(2)
    if mask is not None:
        is_no_more_important = is_no_more_important | ~mask.unsqueeze(1)
    return 1 - similarity.masked_fill(is_no_more_important, -1).amax(dim=-1)


def merge_into_similar(
    importance: torch.Tensor,
    similarity: torch.Tensor,
    sizes: torch.Tensor,
    stays: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step 6: merge each removed token into the most similar one that stays.

    A removed token n counts there as `sizes[n] min(1, s_n / s_m)` tokens of m's kind, so that a token of little
    importance is not looked at more because it was merged; importance below 0 counts as 0. A merged token is the mean
    of its tokens by these counts, and their sum is its new size.

    importance, sizes (B, N); similarity (B, N, N); stays, mask (B, N): boolean.

    Returns:
        into (B, N) int64: the token that each removed token is merged into; weight (B, N): its weight there, 0 at
        tokens that stay and at padding; sizes (B, N): the new sizes of the tokens that stay.
    """
    goes = ~stays if mask is None else mask & ~stays
    into = similarity.where(stays.unsqueeze(1), -2).argmax(dim=-1)
    share = (importance / importance.gather(1, into).clamp(min=1e-8)).clamp(0, 1)
    counts = sizes * share * goes
    total = sizes.scatter_add(1, into, counts)
    # Later layers take sizes as given: no gradient flows through them.
    return into, counts / total.gather(1, into), total.detach()
