"""The method's steps against their equations, written out sample by sample and token by token."""

import math

import pytest
import torch

from madtp_hf.modeling import token_pruning
from madtp_hf.modeling.token_pruning import (
    AttentionScores,
    alignment_feature,
    alignment_loss,
    alignment_scores,
    importance_threshold,
    merge_tokens,
    prune_tokens,
    scored_attention,
    select_tokens,
    token_importance,
)


def written_out(x, states, query, key, value, alignment, temperature):
    """Steps 1 to 6 for one sample, from the equations: x (L, D) the layer's input, states (L, D) what is pruned."""
    heads, length, width = query.shape
    tokens = range(1, length)
    a = [[float(x[n] @ s) for s in alignment] for n in tokens]
    maps = [torch.softmax(query[h] @ key[h].T / math.sqrt(width), dim=-1) for h in range(heads)]
    outputs = [maps[h] @ value[h] for h in range(heads)]

    def norm(values):
        return [v / (sum(values) + 1e-8) for v in values]

    s_self = norm([sum(max(float(maps[h][q, n]) for h in range(heads)) for q in tokens) for n in tokens])
    s_cls = [
        sum(
            float(maps[h][0, n]) * float(outputs[h][n].norm()) / sum(float(outputs[i][n].norm()) for i in range(heads))
            for h in range(heads)
        )
        for n in tokens
    ]
    s_tok = norm([max(row) for row in a])
    s = [sum(parts) / 3 for parts in zip(s_self, s_cls, s_tok)]
    theta = min(
        sum(g * v for g, v in zip(torch.softmax(torch.tensor([row[t] for row in a]) / temperature, 0).tolist(), s))
        for t in range(len(alignment))
    )
    kept = [n for n, v in zip(tokens, s) if v > theta]
    dropped = [n for n in tokens if n not in kept]
    if not kept or len(dropped) <= 1:
        return states
    weights = torch.tensor([s[n - 1] for n in dropped])
    merged = (weights[:, None] / weights.sum() * states[dropped]).sum(0)
    return torch.stack([states[0], *(states[n] for n in kept), merged])


def random_layer(length=14, heads=3, head_width=5, num_alignment=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = heads * head_width
    x, states = torch.randn(2, length, width, generator=generator)
    query, key, value = torch.randn(3, heads, length, head_width, generator=generator)
    return x, states, query, key, value, torch.randn(num_alignment, width, generator=generator)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0, 50.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_layer_follows_the_equations_padded_or_not(temperature, seed):
    x, states, query, key, value, alignment = random_layer(seed=seed)
    expected = written_out(x, states, query, key, value, alignment, temperature)

    for padding in (0, 5):
        mask = None
        if padding:
            mask = (torch.arange(len(x) + padding) < len(x))[None]
        # What lies in the padding is large, so that it shows wherever it takes part.

        def pad(tensor, padding=padding):
            return torch.nn.functional.pad(tensor, (0, 0, 0, padding), value=30.0)[None]

        scores = alignment_scores(pad(x)[:, 1:], alignment)
        _, attention = scored_attention(pad(query), pad(key), pad(value), mask)
        result, result_mask, source = prune_tokens(pad(states), attention, scores, temperature, mask=mask)
        length = result.shape[1] if result_mask is None else int(result_mask.sum())
        assert length == len(expected)
        torch.testing.assert_close(result[0, :length], expected, atol=1e-5, rtol=1e-5)
        if source is not None:  # the tokens that stayed are where `source` says they were
            kept = source[0] >= 0
            torch.testing.assert_close(result[0][kept], pad(states)[0][source[0][kept]])


def test_attention_output_is_that_of_fused_attention():
    query, key, value = torch.randn(3, 2, 3, 7, 4)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    output, _ = scored_attention(query, key, value, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask[:, None, None])
    torch.testing.assert_close(output, expected)


def test_blocks_of_queries_add_up(monkeypatch):
    query, key, value = torch.randn(3, 2, 3, 50, 4)
    mask = torch.arange(50) < torch.tensor([[50], [31]])
    whole = scored_attention(query, key, value, mask)
    monkeypatch.setattr(token_pruning, "ATTENTION_BLOCK", 1)  # the smallest blocks: 16 queries
    blocks = scored_attention(query, key, value, mask)
    torch.testing.assert_close(blocks[0], whole[0])
    for mine, theirs in zip(blocks[1], whole[1]):
        torch.testing.assert_close(mine, theirs)


def test_alignment_feature_and_loss_by_hand():
    tokens = torch.randn(1, 3, 4)
    alignment = torch.randn(2, 4)
    scores = alignment_scores(tokens, alignment)
    feature = alignment_feature(scores, tokens)
    for t in range(2):
        weights = torch.softmax(tokens[0] @ alignment[t] / 2, dim=0)
        torch.testing.assert_close(feature[0, t], weights @ tokens[0])
    other = torch.randn(1, 2, 4)
    cosines = [feature[0, t] @ other[0, t] / (feature[0, t].norm() * other[0, t].norm()) for t in range(2)]
    torch.testing.assert_close(alignment_loss(feature, other), 1 - sum(cosines) / 2)


@pytest.mark.parametrize(
    "importance, threshold, kept",
    [
        ([0.1, 0.2, 0.3, 0.4], 0.25, 2),
        ([0.1, 0.2, 0.3, 0.4], 0.9, 4),  # nothing would stay
        ([0.1, 0.2, 0.3, 0.4], 0.15, 4),  # one would go
        ([0.1, 0.2, 0.3, 0.4], 0.05, 4),  # none would go
        ([0.2, 0.2, 0.2, 0.4], 0.2, 1),  # the threshold itself is not above the threshold
    ],
)
def test_what_stays(importance, threshold, kept):
    keep = select_tokens(torch.tensor([importance]), torch.tensor([threshold]))
    assert keep.sum() == kept


def test_batch_granularity_keeps_as_many_as_the_neediest_sample_and_never_padding():
    importance = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.05], [0.4, 0.1, 0.3, 0.2, 0.05], [0.5, 0.4, 0.3, 9.0, 9.0]])
    threshold = torch.tensor([0.15, 0.35, 0.45])
    mask = torch.tensor([[True] * 5, [True] * 5, [True, True, True, False, False]])
    keep = select_tokens(importance, threshold, mask, "batch")
    assert keep.tolist() == [
        [True, True, True, False, False],
        [True, False, True, True, False],  # its three most important
        [True, True, True, False, False],  # it has no more than three
    ]
    assert select_tokens(importance, threshold, mask).sum(1).tolist() == [3, 1, 1]


def test_nothing_to_prune_leaves_the_states_as_they_are():
    states = torch.randn(2, 5, 4)
    keep = torch.ones(2, 4, dtype=torch.bool)
    result, mask, source = merge_tokens(states, keep, torch.rand(2, 4))
    assert result is states and mask is None and source is None


def test_a_sample_without_tokens_is_no_trouble_to_its_neighbours():
    mask = torch.tensor([[True] * 5, [True] + [False] * 4])
    scores = torch.randn(2, 4, 3)
    attention = AttentionScores(torch.rand(2, 4) * mask[:, 1:], torch.rand(2, 2, 4), torch.rand(2, 2, 4))
    states = torch.randn(2, 5, 6)
    importance = token_importance(attention, scores, mask[:, 1:])
    assert importance_threshold(scores, importance, 1.0, mask[:, 1:]).isfinite().all()
    _, result_mask, _ = prune_tokens(states, attention, scores, 1.0, mask=mask)
    assert result_mask[1].sum() == 1
    assert alignment_feature(scores, states[:, 1:], mask[:, 1:])[1].abs().max() == 0
