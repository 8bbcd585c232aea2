"""The method's steps against their equations, written out sample by sample and token by token."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from madtp_hf.modeling import token_pruning
from madtp_hf.modeling.packing import Layout, pack
from madtp_hf.modeling.token_pruning import (
    AttentionScores,
    alignment_feature,
    alignment_loss,
    alignment_scores,
    importance_threshold,
    keep_all_or_enough,
    merge_tokens,
    most_important,
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


def lengths_to_mask(lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def lay_out(padded, mask, rectangle):
    """Padded states (B, L, D) as rows end to end: the real ones alone, or in a rectangle padding as well."""
    if rectangle:
        return padded.flatten(0, 1), Layout.rectangle(*padded.shape[:2], padded.device, mask)
    return pack(padded, mask)


def samples_of(states, layout):
    """The real rows of each sample."""
    return [rows[:number] for rows, number in zip(layout.pad(states), layout.num_tokens)]


def prune_together(layers, alignment, temperature, rectangle=False):
    """Steps 1 to 6 for several samples (x, states, query, key, value): what is left of each."""
    mask = lengths_to_mask([len(layer[0]) for layer in layers])

    def pad(part):  # what lies in the padding is large, so that it shows wherever it takes part
        longest = mask.shape[1]
        pads = [torch.nn.functional.pad(t, (0, 0, 0, longest - t.shape[-2]), value=30.0) for t in part]
        return torch.stack(pads)

    x, padded, query, key, value = map(pad, zip(*layers))
    mask = None if mask.all() else mask
    tokens = None if mask is None else mask[:, 1:]
    scores = alignment_scores(x[:, 1:], alignment)
    _, attention = scored_attention(query, key, value, mask)
    importance = token_importance(attention, scores, tokens)
    threshold = importance_threshold(scores, importance, temperature, tokens)
    states, layout = lay_out(padded, mask, rectangle)
    keep = select_tokens(importance, threshold, tokens)
    result, left, source = merge_tokens(states, layout, keep, importance)
    if source is not None:  # the tokens that stayed are where `source` says they were, the merged ones behind all
        stayed = source < len(states)
        torch.testing.assert_close(result[stayed], states[source[stayed]], atol=0, rtol=0)
        assert torch.equal(source[~stayed] - len(states), left.samples[~stayed])
    return samples_of(result, left)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0, 50.0])  # lower ones leave rounding to decide what stays
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("neighbours", [(), (19,), (6, 14, 23)])
def test_a_layer_follows_the_equations_padded_or_not(temperature, seed, neighbours):
    layer = random_layer(seed=seed)
    alignment = layer[-1]
    layers = [layer[:5]] + [random_layer(length, seed=20 + length)[:5] for length in neighbours]
    for rectangle in (False, True):
        results = prune_together(layers, alignment, temperature, rectangle)
        for result, sample in zip(results, layers, strict=True):
            expected = written_out(*sample, alignment, temperature)
            assert len(result) == len(expected)
            torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_attention_output_is_that_of_fused_attention():
    query, key, value = torch.randn(3, 2, 3, 7, 4)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    output, _ = scored_attention(query, key, value, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask[:, None, None])
    torch.testing.assert_close(output, expected)


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest tensor has that is made meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "block",
    [
        2 * 50**2,  # two of a sample's three heads, then the third
        3 * 50**2,  # one sample
        3 * 50**2 * 2,  # two of the five samples
    ],
)
def test_blocks_of_samples_and_of_heads_add_up(block, padded, monkeypatch):
    query, key, value = torch.randn(3, 5, 3, 50, 4)
    mask = torch.arange(50) < torch.tensor([[50], [31], [1], [17], [49]]) if padded else None
    whole = scored_attention(query, key, value, mask)
    monkeypatch.setattr(token_pruning, "ATTENTION_BLOCK", block)
    with LargestTensor() as largest:
        blocks = scored_attention(query, key, value, mask)
    assert largest.numbers <= max(block, query.numel())  # never the maps of all, of 37,500
    torch.testing.assert_close(blocks[0], whole[0])
    for mine, theirs in zip(blocks[1], whole[1], strict=True):
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


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3)])
def test_nothing_to_prune_leaves_the_states_as_they_are(lengths):
    states, layout = pack(torch.randn(2, 5, 4), lengths_to_mask(lengths))
    keep = lengths_to_mask(lengths)[:, 1:]
    result, left, source = merge_tokens(states, layout, keep, torch.rand(2, 4))
    assert result is states and left is layout and source is None


def test_what_stays_stays_in_its_order_and_the_rest_becomes_one():
    states = torch.arange(1.0, 10.0).unsqueeze(1)  # 1 to 5 and 6 to 9, the class tokens 1 and 6
    layout = Layout(2, 5, states.device, lengths=torch.tensor([5, 4]), total=9)
    keep = torch.tensor([[False, True, False, True], [True, True, True, False]])
    importance = torch.tensor([[0.1, 0.5, 0.3, 0.5], [0.5, 0.5, 0.5, 9.0]])
    result, left, source = merge_tokens(states, layout, keep, importance)
    merged = (0.1 * 2 + 0.3 * 4) / 0.4
    torch.testing.assert_close(result.flatten(), torch.tensor([1, 3, 5, merged, 6, 7, 8, 9]))
    assert source.tolist() == [0, 2, 4, 9, 5, 6, 7, 8]  # 9 rows before: the tenth is the first sample's merged one
    assert left.row_counts.tolist() == [4, 4] and left.total == 8 and left.padded_mask is None


def test_a_sample_without_tokens_is_no_trouble_to_its_neighbours():
    mask = torch.tensor([[True] * 5, [True] + [False] * 4])
    scores = torch.tensor([[9.0], [1.0], [2.0], [3.0]]).repeat(2, 1, 3).requires_grad_()
    received = (torch.tensor([[2.0, 0.1, 0.2, 0.3]]) * mask[:, 1:]).requires_grad_()
    attention = AttentionScores(received, torch.full((2, 2, 4), 0.1), torch.rand(2, 2, 4))
    padded = torch.randn(2, 5, 6, requires_grad=True)

    def prune(samples, rectangle):
        attention_of, tokens = AttentionScores(*(part[samples] for part in attention)), mask[samples, 1:]
        importance = token_importance(attention_of, scores[samples], tokens)
        threshold = importance_threshold(scores[samples], importance, 50.0, tokens)
        assert importance.isfinite().all() and threshold.isfinite().all()
        keep = select_tokens(importance, threshold, tokens)
        result, layout, _ = merge_tokens(*lay_out(padded[samples], mask[samples], rectangle), keep, importance)
        return samples_of(result, layout)

    (alone,) = prune(slice(0, 1), False)
    assert len(alone) == 3  # the class token, the first token, and one for the rest
    for rectangle in (False, True):
        first, second = prune(slice(0, 2), rectangle)
        torch.testing.assert_close(first, alone)
        assert torch.equal(second, padded[1, :1])
        gradients = torch.autograd.grad((first**2).sum() + (second**2).sum(), (padded, scores, received))
        assert all(gradient.isfinite().all() for gradient in gradients)
    feature = alignment_feature(scores, padded[:, 1:], mask[:, 1:])
    assert feature[1].abs().max() == 0 and feature.isfinite().all()


# A fixed number of rows


@pytest.mark.parametrize("lengths", [(14, 14, 14), (14, 6, 9, 14, 1, 10)])
@pytest.mark.parametrize("length", [3, 6, 8, 9, 13])
def test_with_a_fixed_length_every_sample_has_as_many_rows(lengths, length):
    uniform = min(lengths) == max(lengths)
    mask = None if uniform else lengths_to_mask(lengths)
    tokens = None if uniform else mask[:, 1:]
    padded, importance = torch.randn(len(lengths), 14, 5), torch.rand(len(lengths), 13)
    keep = keep_all_or_enough(most_important(importance, length - 2, tokens), tokens)
    states, layout = lay_out(padded, mask, rectangle=True)
    result, left, source = merge_tokens(states, layout, keep, importance, length)

    assert result.shape == (len(lengths) * length, 5) and source.shape == (len(lengths) * length,)
    assert left.lengths is None and left.longest == length and left.batch_size == len(lengths)
    assert (left.mask is None) == uniform  # there is padding where a sample needs fewer
    counts = [min(number, length) for number in lengths]
    assert left.num_tokens.tolist() == counts
    if not uniform:
        assert torch.equal(left.mask, torch.arange(length) < torch.tensor(counts)[:, None])
    # The real rows are those of the same tokens kept without a fixed length.
    free, free_layout, free_source = merge_tokens(*lay_out(padded, mask, rectangle=False), keep, importance)
    assert free_layout.num_tokens.tolist() == counts
    for mine, theirs in zip(samples_of(result, left), samples_of(free, free_layout), strict=True):
        torch.testing.assert_close(mine, theirs)
    if uniform:
        assert torch.equal(source, free_source)
    # And each stands in for the row that `source` names.
    stayed = source < len(states)
    assert torch.equal(result[stayed], states[source[stayed]])


def test_a_fixed_length_that_is_the_length_already_changes_nothing():
    states, layout = lay_out(torch.randn(2, 7, 4), lengths_to_mask((7, 4)), rectangle=True)
    keep = lengths_to_mask((7, 4))[:, 1:]
    result, left, source = merge_tokens(states, layout, keep, torch.rand(2, 6), 7)
    assert result is states and left is layout and source is None


# Gradients


def merged_in_a_loop(padded, lengths, keep, importance):
    """What `merge_tokens` is to leave of each sample, one after the other."""
    results = []
    for sample, length in enumerate(lengths):
        states, kept, weights = padded[sample, :length], keep[sample, : length - 1], importance[sample, : length - 1]
        tokens, left = states[1:], [states[:1], states[1:][kept]]
        if not kept.all():
            dropped = weights[~kept]
            left.append((dropped[:, None] / dropped.sum() * tokens[~kept]).sum(0, keepdim=True))
        results.append(torch.cat(left))
    return results


@pytest.mark.parametrize(
    "lengths, rectangle, fixed",
    [
        ((9, 5, 12, 1, 7), False, False),
        ((9, 5, 12, 1, 7), True, False),
        ((9, 5, 12, 1, 7), True, True),
        ((12, 12, 12), False, False),
        ((12, 12, 12), True, True),
    ],
    ids=["packed", "padded", "padded to a fixed length", "uniform", "uniform to a fixed length"],
)
def test_gradients_of_merging_are_those_of_a_loop_over_samples(lengths, rectangle, fixed):
    mask = lengths_to_mask(lengths)
    padded = torch.randn(len(lengths), 12, 5, dtype=torch.float64, requires_grad=True)
    importance = torch.rand(len(lengths), 11, dtype=torch.float64, requires_grad=True)
    tokens = mask[:, 1:]
    if fixed:
        keep = keep_all_or_enough(most_important(importance.detach(), 4, tokens), tokens)
    else:  # a different number in each
        keep = select_tokens(importance.detach(), torch.linspace(0.2, 0.8, len(lengths)), tokens)
    length = 6 if fixed else None
    expected = merged_in_a_loop(padded, lengths, keep, importance)
    mask = None if mask.all() else mask
    result, layout, source = merge_tokens(*lay_out(padded, mask, rectangle), keep, importance, length)
    results = samples_of(result, layout)
    assert source is not None and any(len(rows) < length for rows, length in zip(results, lengths))
    assert layout.total == (6 * len(lengths) if fixed else sum(map(len, expected)))

    weights = [torch.randn_like(rows) for rows in expected]
    gradients = []
    for rows in (results, expected):
        loss = sum((mine**2 * weight).sum() for mine, weight in zip(rows, weights, strict=True))
        gradients.append(torch.autograd.grad(loss, (padded, importance)))
    for mine, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(mine, theirs)
