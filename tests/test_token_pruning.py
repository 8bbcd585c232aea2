"""The method's steps against their equations, written out sample by sample and token by token in float64."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from madtp_hf.modeling import attention as attention_module
from madtp_hf.modeling.attention import CLASS_TOKEN_FIRST, BranchSpec, attend_with_statistics
from madtp_hf.modeling.chunks import Chunking, divide, whole
from madtp_hf.modeling.method_madtp import AlignmentTokens, MadtpMethod
from madtp_hf.modeling.pruning_method import Attended, Decision
from madtp_hf.modeling.repack import repack
from madtp_hf.modeling.sequences import Sequences, unpad
from madtp_hf.modeling.token_pruning import (
    AttentionStatistics,
    alignment_feature,
    alignment_loss,
    alignment_scores,
    importance_threshold,
    merge_weights,
    most_important,
    select_tokens,
    token_importance,
)


BLIP, CLIP_TEXT = CLASS_TOKEN_FIRST, BranchSpec(num_suffix_tokens=1, pooling="last", is_causal=True)
OTHERS = (BranchSpec(0, 0, "mean"), BranchSpec(3), BranchSpec(2, 2, "last"))  # protected at the front and at the end
SPECS = pytest.mark.parametrize("spec", [BLIP, CLIP_TEXT, CLIP_TEXT._replace(is_causal=False), *OTHERS], ids=str)


def removable_of(spec, length) -> slice:
    """The positions of the tokens that can go in a sample of this length."""
    return slice(spec.num_prefix_tokens, max(length - spec.num_suffix_tokens, spec.num_prefix_tokens))


def apply(states, sequences, decisions, spec, chunking=None):
    """What `repack` leaves of states by these decisions."""
    return repack(states, sequences, Attended(states, chunking or whole(sequences), decisions), spec)


LAYOUTS = pytest.mark.parametrize("kind", ["varlen", "padded"])


def attention_written_out(query, key, value, spec, sizes=None):
    """Self-attention (H, L, d) of one sample: its outputs, and what the importance of the tokens that can go needs of
    it. A key of size 2 counts as two keys."""
    length = query.shape[1]
    logits = query @ key.transpose(1, 2) / math.sqrt(query.shape[2])
    if sizes is not None:
        logits = logits + sizes.log()
    if spec.is_causal:
        logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    maps = logits.softmax(dim=-1)
    outputs = maps @ value
    removable = removable_of(spec, length)
    pooled = {"first": maps[:, 0], "last": maps[:, -1], "mean": maps.mean(dim=1)}[spec.pooling]
    return outputs, AttentionStatistics(
        maps.amax(dim=0)[spec.num_prefix_tokens :, removable].sum(dim=0),
        pooled[:, removable],
        outputs[:, removable].norm(dim=-1),
        key[:, removable].mean(dim=0),
    )


def importance_written_out(x, alignment, statistics, tokens):
    """Steps 1 and 4: the alignment scores and the importance of the tokens that can go, as lists."""
    a = [[float(x[n] @ s) for s in alignment] for n in tokens]

    def norm(values):
        return [v / (sum(values) + 1e-8) for v in values]

    attention, output_norm = statistics.pooling_attention, statistics.output_norm
    s_self = norm(statistics.received.tolist())
    s_cls = [float((attention[:, i] * output_norm[:, i] / output_norm[:, i].sum()).sum()) for i in range(len(tokens))]
    s_tok = norm([max(row) for row in a])
    return a, [sum(terms) / 3 for terms in zip(s_self, s_cls, s_tok)]


def threshold_written_out(a, s, temperature):
    """Step 5."""
    return min(
        sum(g * v for g, v in zip(torch.tensor([row[t] / temperature for row in a]).double().softmax(0).tolist(), s))
        for t in range(len(a[0]))
    )


def layer_written_out(x, states, query, key, value, alignment, temperature, spec=BLIP, min_kept=1):
    """Steps 1 to 6 for one sample, from the equations: x (L, D) the layer's input, states (L, D) what is pruned."""
    x, states, query, key, value, alignment = (t.double() for t in (x, states, query, key, value, alignment))
    tokens = range(*removable_of(spec, len(x)).indices(len(x)))
    if not tokens:
        return states
    a, s = importance_written_out(x, alignment, attention_written_out(query, key, value, spec)[1], tokens)
    theta = threshold_written_out(a, s, temperature)
    kept = [n for n, v in zip(tokens, s) if v > theta]
    dropped = [n for n in tokens if n not in kept]
    if len(kept) < min_kept or len(dropped) <= 1:
        return states
    weights = torch.tensor([s[n - tokens.start] for n in dropped]).double()
    merged = (weights[:, None] / weights.sum() * states[dropped]).sum(0)
    return torch.stack([*states[: tokens.start], *(states[n] for n in kept), merged, *states[tokens.stop :]])


def random_layer(length=14, heads=3, head_width=5, num_alignment=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = heads * head_width
    x, states = torch.randn(2, length, width, generator=generator)
    query, key, value = torch.randn(3, heads, length, head_width, generator=generator)
    return x, states, query, key, value, torch.randn(num_alignment, width, generator=generator)


def lengths_to_mask(lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def lay_out(padded, lengths, kind):
    """Padded states (B, L, ...) as rows: the real ones alone, or padding as well; and how they lie."""
    mask = lengths_to_mask(lengths)
    if kind == "varlen":
        return unpad(padded, mask)
    return padded.flatten(0, 1), Sequences.padded(*mask.shape, padded.device, None if mask.all() else mask)


def stack(samples, dim=-2, fill=30.0):
    """Samples of different lengths, padded. What lies in the padding is large, so that it shows wherever it takes
    chunk."""
    longest = max(sample.shape[dim] for sample in samples)
    pads = [torch.nn.functional.pad(t, (0, 0, 0, longest - t.shape[dim]), value=fill) for t in samples]
    return torch.stack(pads)


def samples_of(states, sequences):
    """The real rows of each sample."""
    return [rows[:number] for rows, number in zip(sequences.pad(states), sequences.lengths)]


def project(layers, kind):
    """query_key_value (R, 3, H, d) of several samples (x, states, query, key, value)."""
    lengths = [len(layer[0]) for layer in layers]
    padded = torch.stack([stack([layer[i] for layer in layers]) for i in (2, 3, 4)], dim=1)  # (B, 3, H, L, d)
    return lay_out(padded.permute(0, 3, 1, 2, 4), lengths, kind)[0]


def prune_together(layers, alignment, temperature, kind, spec=BLIP, min_kept=1):
    """Steps 1 to 6 for several samples (x, states, query, key, value): what is left of each."""
    lengths = [len(layer[0]) for layer in layers]
    x, _ = lay_out(stack([layer[0] for layer in layers]), lengths, kind)
    states, sequences = lay_out(stack([layer[1] for layer in layers]), lengths, kind)
    setting = {"temperature": temperature}
    madtp = MadtpMethod(spec, setting, AlignmentTokens(alignment, weight=alignment), min_kept=min_kept)
    scores, _ = madtp.read_input(0, x, sequences)
    attended = madtp.attend(0, project(layers, kind), scores, sequences, 0.0)
    result, left, move = repack(states, sequences, attended, spec)
    if move is not None:  # the tokens that stayed are where it says they were
        where = lay_out(torch.arange(max(lengths)).expand(len(lengths), -1), lengths, kind)[0]
        for rows, positions, layer in zip(samples_of(result, left), samples_of(move(where), left), layers):
            stayed = positions >= 0
            assert torch.equal(rows[stayed], layer[1][positions[stayed]])
            assert (~stayed).sum() == (len(rows) < len(layer[1]))
    return samples_of(result, left)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0, 50.0])  # lower ones leave rounding to decide what stays
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("neighbours", [(), (19,), (6, 14, 23), (3, 2, 9)], ids=str)
@pytest.mark.parametrize(
    "spec, min_kept", [(BLIP, 1), (BLIP, 2), (CLIP_TEXT, 1), (CLIP_TEXT, 2), *((spec, 1) for spec in OTHERS)], ids=str
)
def test_a_layer_follows_the_equations_padded_or_not(temperature, seed, neighbours, spec, min_kept, path):
    layer = random_layer(seed=seed)
    alignment = layer[-1]
    layers = [layer[:5]] + [random_layer(length, seed=20 + length)[:5] for length in neighbours]
    expected = [layer_written_out(*sample, alignment, temperature, spec, min_kept) for sample in layers]
    for kind in ("padded", "varlen"):
        results = prune_together(layers, alignment, temperature, kind, spec, min_kept)
        for result, sample in zip(results, expected, strict=True):
            assert len(result) == len(sample)
            torch.testing.assert_close(result, sample.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_the_scores_of_a_protected_last_token_decide_nothing(temperature):
    """Not even where they are so high that beside them those of the words vanish."""
    layers = []
    for seed, length in enumerate((14, 9, 6)):
        x, *others = random_layer(length, seed=seed)[:5]
        layers.append((x, *others))
    alignment = random_layer()[-1]
    for kind in ("varlen", "padded"):
        expected = prune_together(layers, alignment, temperature, kind, CLIP_TEXT)
        assert any(len(result) < len(layer[0]) for result, layer in zip(expected[1:], layers[1:]))
        raised = [(torch.cat([x[:-1], 100 * alignment.sum(0, keepdim=True)]), *others) for x, *others in layers]
        for mine, theirs in zip(
            prune_together(raised, alignment, temperature, kind, CLIP_TEXT), expected, strict=True
        ):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("min_kept, merges", [(1, True), (2, True), (3, False)])
def test_a_layer_prunes_only_if_as_many_stay_as_the_host_wants(min_kept, merges):
    importance = torch.tensor([[0.1, 0.2, 0.4, 0.3, 0.1]])
    stays, merging = select_tokens(importance <= 0.25, min_kept=min_kept)
    assert merging.item() == merges and stays.sum() == (2 if merges else 5)


# Attention


@SPECS
@LAYOUTS
@pytest.mark.parametrize("lengths", [(9,), (7, 7, 7), (7, 4, 9, 2, 5)], ids=str)
def test_attention_and_its_evidence_are_the_formulas(lengths, kind, spec, path):
    layers = [random_layer(length, seed=length)[:5] for length in lengths]
    sequences = lay_out(stack([layer[1] for layer in layers]), lengths, kind)[1]
    chunking = divide(sequences, 15)
    chunks, order = chunking.chunks(sequences), chunking.order or range(len(layers))
    outputs = [attend_with_statistics(project(layers, kind), chunk, spec, with_keys=True) for chunk in chunks]
    results = [rows for (output, _), chunk in zip(outputs, chunks) for rows in samples_of(output, chunk)]
    statistics = [
        [*(e[..., i, :] for e in found[:3]), found.keys[i]]
        for (_, found), chunk in zip(outputs, chunks)
        for i in range(chunk.batch_size)
    ]
    layers = [layers[sample] for sample in order]
    for layer, output, found in zip(layers, results, statistics, strict=True):
        expected, expected_statistics = attention_written_out(*(t.double() for t in layer[2:]), spec)
        torch.testing.assert_close(output, expected.transpose(0, 1).flatten(1).float())
        removable = max(len(layer[0]) - spec.num_protected, 0)
        for name, mine, theirs in zip(AttentionStatistics._fields, found, expected_statistics, strict=True):
            mine, theirs = (mine.T, theirs.T) if name == "keys" else (mine, theirs)
            torch.testing.assert_close(mine[..., :removable], theirs.float(), msg=lambda m, n=name: f"{n}: {m}")
            if name in ("received", "pooling_attention"):  # the others count where they are attended to
                assert (mine[..., removable:] == 0).all(), name


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest tensor has that is made meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("lengths", [(50,), (50, 31, 1, 17, 49)], ids=str)
@pytest.mark.parametrize("heads_at_once", [2, 4])
@torch.no_grad()
def test_blocks_of_heads_add_up(heads_at_once, lengths, monkeypatch):
    layers = [random_layer(length, heads=6, seed=length)[:5] for length in lengths]
    rows, sequences = lay_out(stack([layer[1] for layer in layers]), lengths, "varlen")
    query_key_value = project(layers, "varlen")
    maps = len(lengths) * 50**2  # of a head
    monkeypatch.setattr(attention_module, "ATTENTION_BLOCK", 6 * maps)
    at_once = attend_with_statistics(query_key_value, sequences, BLIP, with_keys=True)
    monkeypatch.setattr(attention_module, "ATTENTION_BLOCK", heads_at_once * maps)
    with LargestTensor() as largest:
        blocks = attend_with_statistics(query_key_value, sequences, BLIP, with_keys=True)
    assert largest.numbers == heads_at_once * maps  # never the maps of all six
    torch.testing.assert_close(blocks[0], at_once[0])
    for mine, theirs in zip(blocks[1], at_once[1], strict=True):
        torch.testing.assert_close(mine, theirs)


# The steps by hand


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


@SPECS
@LAYOUTS
def test_the_alignment_feature_is_of_the_tokens_that_can_go(kind, spec, path):
    lengths = (7, 4, 9, 5)
    layers = [random_layer(length, seed=length)[:5] for length in lengths]
    alignment = random_layer()[-1]
    x, sequences = lay_out(stack([layer[0] for layer in layers]), lengths, kind)
    madtp = MadtpMethod(spec, {"temperature": 1.0}, AlignmentTokens(alignment), with_feature=True)
    scores, feature = madtp.read_input(0, x, sequences)
    torch.testing.assert_close(scores, x @ alignment.T)
    for layer, mine in zip(layers, feature, strict=True):
        tokens = layer[0][removable_of(spec, len(layer[0]))].double()
        weights = (tokens @ alignment.double().T / math.sqrt(15)).softmax(dim=0)
        torch.testing.assert_close(mine, (weights.T @ tokens).float())


@pytest.mark.parametrize(
    "importance, threshold, kept",
    [
        ([0.1, 0.2, 0.3, 0.4], 0.25, 2),
        ([0.1, 0.2, 0.3, 0.4], 0.9, 4),  # nothing would stay
        ([0.1, 0.2, 0.3, 0.4], 0.15, 4),  # one would go
        ([0.1, 0.2, 0.3, 0.4], 0.05, 4),  # none would go
        ([0.2, 0.2, 0.2, 0.4], 0.2, 1),  # the threshold itself is not above the threshold
        ([0.1, 0.2, 0.3, 0.4], float("nan"), 4),
    ],
)
def test_what_stays(importance, threshold, kept):
    stays, merges = select_tokens(torch.tensor([importance]) <= threshold)
    assert stays.sum() == kept and merges.item() == (kept < 4)
    # And with padding behind it, however important.
    mask = torch.tensor([[True] * 4 + [False] * 2])
    stays, merges = select_tokens(torch.tensor([[*importance, 9.0, 9.0]]) <= threshold, mask)
    assert stays.sum() == kept and not stays[:, 4:].any() and merges.item() == (kept < 4)


def test_the_most_important_are_as_many_as_asked_and_never_padding():
    importance = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.05], [0.4, 0.1, 0.3, 0.2, 0.05], [0.5, 0.4, 0.3, 9.0, 9.0]])
    mask = torch.tensor([[True] * 5, [True] * 5, [True, True, True, False, False]])
    for number in (3, torch.tensor(3)):
        assert most_important(importance, number, mask).tolist() == [
            [True, True, True, False, False],
            [True, False, True, True, False],
            [True, True, True, False, False],
        ]
    for number in (4, torch.tensor(4)):
        assert most_important(importance, number, mask)[2].tolist() == [True, True, True, False, False]  # has no more
        assert most_important(importance[:2], number, None).sum(1).tolist() == [4, 4]


def test_batch_granularity_keeps_the_largest_count_in_the_batch():
    """Each sample its own most important, and no more than it has."""
    lengths = (14, 9, 12, 4)
    layers = [random_layer(length, seed=30 + length)[:5] for length in lengths]
    alignment = random_layer()[-1]
    sequences = Sequences.varlen(list(lengths), "cpu")
    x = torch.cat([layer[0] for layer in layers])
    chosen = {}
    for granularity in ("instance", "batch"):
        madtp = MadtpMethod(BLIP, {"temperature": 5.0}, AlignmentTokens(alignment, weight=alignment), granularity)
        scores, _ = madtp.read_input(0, x, sequences)
        _, chunking, decisions = madtp.attend(0, project(layers, "varlen"), scores, sequences, 0.0)
        assert len(chunking.bounds) == 2 or granularity == "instance"
        chosen[granularity] = [
            stays[: length - 1]
            for stays, length in zip([row for r in decisions for row in r.stays], lengths, strict=True)
        ]
    largest = max(int(stays.sum()) for stays, length in zip(chosen["instance"], lengths) if not stays.all())
    counts = [int(stays.sum()) for stays in chosen["batch"]]
    # Where all but one or all would be kept, all stay.
    assert counts == [largest if largest < length - 2 else length - 1 for length in lengths]
    assert sum(count < length - 1 for count, length in zip(counts, lengths)) >= 2
    for alone, together in zip(chosen["instance"], chosen["batch"]):
        if not alone.all():
            assert (together | ~alone).all()  # what stays by itself stays in the batch


# What a method answers becomes new rows


def answer(stays, importance, merges=None, **others):
    """A `Decision` that merges what doesn't stay, by importance (B, N), 0 at padding."""
    if merges is None:
        merges = (~stays & (importance > 0)).any(dim=1, keepdim=True)
    return Decision(merge_weights(importance, stays, merges), stays, merges, **others)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3)])
def test_nothing_to_prune_leaves_the_states_as_they_are(lengths):
    states, sequences = unpad(torch.randn(2, 5, 4), lengths_to_mask(lengths))
    mask = lengths_to_mask(lengths)[:, 1:]
    result, left, move = apply(states, sequences, [answer(mask, torch.rand(2, 4) * mask)], BLIP)
    assert result is states and left is sequences and move is None


def test_what_stays_stays_in_its_order_and_the_rest_becomes_one():
    states = torch.arange(1.0, 10.0).unsqueeze(1)  # 1 to 5 and 6 to 9, the class tokens 1 and 6
    sequences = Sequences.varlen([5, 4], "cpu")
    stays = torch.tensor([[False, True, False, True], [True, True, True, False]])
    importance = torch.tensor([[0.1, 0.5, 0.3, 0.5], [0.5, 0.5, 0.5, 0.0]])
    result, left, move = apply(states, sequences, [answer(stays, importance)], BLIP)
    merged = (0.1 * 2 + 0.3 * 4) / 0.4
    torch.testing.assert_close(result.flatten(), torch.tensor([1, 3, 5, merged, 6, 7, 8, 9]))
    assert move(sequences.positions).tolist() == [0, 2, 4, -1, 0, 1, 2, 3]
    assert left.row_counts == [4, 4] and left.num_rows == 8 and left.mask is None


@LAYOUTS
def test_a_merged_token_stands_before_a_protected_last(kind):
    padded = torch.arange(1.0, 21.0).view(2, 10, 1)  # of the second, 11 to 17 are real
    lengths = (10, 7)
    states, sequences = lay_out(padded, lengths, kind)
    stays = torch.zeros(2, 8, dtype=torch.bool)
    stays[0, [0, 3, 7]] = stays[1, [1, 4]] = True
    importance = torch.full((2, 8), 0.25)
    importance[1, 5:] = 0  # its last token, and padding
    result, left, move = apply(states, sequences, [answer(stays, importance)], CLIP_TEXT)
    of_first, of_second = samples_of(result, left)
    assert of_first.flatten().tolist() == pytest.approx([1, 2, 5, 9, (3 + 4 + 6 + 7 + 8) / 5, 10])
    assert of_second.flatten().tolist() == pytest.approx([11, 13, 16, (12 + 14 + 15) / 3, 17])
    positions = sequences.positions if kind == "varlen" else torch.arange(10).repeat(2)
    assert move(positions).tolist() == [0, 1, 4, 8, -1, 9, 0, 2, 5, -1, 6]
    # With one that doesn't merge beside it.
    stays[1] = torch.arange(8) < 5
    result, left, _ = apply(states, sequences, [answer(stays, importance)], CLIP_TEXT)
    assert samples_of(result, left)[1].flatten().tolist() == [11, 12, 13, 14, 15, 16, 17]


@LAYOUTS
@pytest.mark.parametrize("spec", [BLIP, CLIP_TEXT], ids=str)
def test_tokens_may_enter_tokens_that_stay(kind, spec):
    """As ToMe merges: each goes into another, which is the mean of all in it."""
    lengths = (6, 5) if spec.num_suffix_tokens else (5, 4)
    padded = torch.randn(2, max(lengths), 3, requires_grad=True)
    states, sequences = lay_out(padded, lengths, kind)
    stays = torch.tensor([[True, False, True, False], [True, True, False, False]])
    into = torch.tensor([[0, 2, 0, 2], [0, 0, 0, 0]])  # of the first, tokens 1 and 3 enter token 2
    weight = torch.tensor([[0, 0.25, 0, 0.5], [0, 0, 0.5, 0]])
    decision = Decision(weight, stays, torch.tensor([[True], [True]]), into=into)
    result, left, move = apply(states, sequences, [decision], spec)
    first, second = samples_of(result, left)
    last = [[padded[0, 5]], [padded[1, 4]]] if spec.num_suffix_tokens else [[], []]
    target = 0.25 * padded[0, 3] + 0.25 * padded[0, 2] + 0.5 * padded[0, 4]
    torch.testing.assert_close(first, torch.stack([padded[0, 0], padded[0, 1], target, *last[0]]))
    mixed = (padded[1, 1] + padded[1, 3]) / 2
    torch.testing.assert_close(second, torch.stack([padded[1, 0], mixed, padded[1, 2], *last[1]]))
    (gradient,) = torch.autograd.grad(first.sum(), padded)
    assert gradient[0, :, 0].tolist()[:5] == [1, 1, 0.25, 0.25, 0.5]


@LAYOUTS
def test_a_sample_without_tokens_is_no_trouble_to_its_neighbours(kind):
    lengths = (5, 1)
    mask = lengths_to_mask(lengths)
    real = mask[:, 1:].float()
    scores = torch.tensor([[9.0], [1.0], [2.0], [3.0]]).repeat(2, 1, 3).requires_grad_()
    received = (torch.tensor([[2.0, 0.1, 0.2, 0.3]]) * real).requires_grad_()
    statistics = AttentionStatistics(received, torch.full((2, 2, 4), 0.1) * real, torch.rand(2, 2, 4))
    padded = torch.randn(2, 5, 6, requires_grad=True)

    def prune(number, kind):
        of_samples = AttentionStatistics(statistics[0][:number], *(chunk[:, :number] for chunk in statistics[1:3]))
        weights, tokens = (real[:number], mask[:number, 1:]) if number > 1 else (None, None)
        importance = token_importance(of_samples, scores[:number], weights)
        threshold = importance_threshold(scores[:number], importance, 50.0, weights)
        assert importance.isfinite().all() and threshold[0].isfinite().all()
        stays, merges = select_tokens(importance <= threshold, tokens)
        states, sequences = lay_out(padded[:number], lengths[:number], kind)
        decision = answer(stays, importance, merges)
        result, left, _ = apply(states, sequences, [decision], BLIP)
        return samples_of(result, left)

    (alone,) = prune(1, "varlen")
    assert len(alone) == 3  # the class token, the first token, and one for the rest
    first, second = prune(2, kind)
    torch.testing.assert_close(first, alone)
    assert torch.equal(second, padded[1, :1])
    gradients = torch.autograd.grad((first**2).sum() + (second**2).sum(), (padded, scores, received))
    assert all(gradient.isfinite().all() for gradient in gradients)
    feature = alignment_feature(scores, padded[:, 1:], mask[:, 1:])
    assert feature[1].abs().max() == 0 and feature.isfinite().all()


# A fixed number of rows


@pytest.mark.parametrize("spec", [BLIP, CLIP_TEXT], ids=str)
@pytest.mark.parametrize("lengths", [(14, 14, 14), (14, 6, 9, 14, 3, 10)], ids=str)
@pytest.mark.parametrize("length", [4, 6, 8, 9, 13])
def test_with_a_fixed_length_every_sample_has_as_many_rows(lengths, length, spec):
    uniform = min(lengths) == max(lengths)
    states, sequences = lay_out(torch.randn(len(lengths), 14, 5), lengths, "padded")
    tokens, weights = spec.mask(sequences), spec.float_mask(sequences)
    importance = torch.rand(len(lengths), 13 - spec.num_suffix_tokens)
    if not uniform:
        importance = importance * weights
    keep = most_important(importance, length - 2 - spec.num_suffix_tokens, tokens)
    stays, merges = select_tokens(~keep, tokens, spec.counts(sequences))
    decision = answer(stays, importance, merges, length=length)
    result, left, move = apply(states, sequences, [decision], spec)

    assert result.shape == (len(lengths) * length, 5)
    assert not left.is_varlen and left.max_seqlen == length and left.batch_size == len(lengths)
    assert (left.mask is None) == uniform  # there is padding where a sample needs fewer
    counts = [min(number, length) for number in lengths]
    assert left.lengths.tolist() == counts
    if not uniform:
        assert torch.equal(left.mask, torch.arange(length) < torch.tensor(counts)[:, None])
    # The real rows are those of the same tokens kept without a fixed length.
    positions = torch.arange(14).expand(len(lengths), -1)
    for kind in ("varlen", "padded"):
        others, other_sequences = lay_out(sequences.pad(states), lengths, kind)
        free, free_left, free_move = apply(others, other_sequences, [decision._replace(length=None)], spec)
        assert free_left.lengths.tolist() == counts
        for mine, theirs in zip(samples_of(result, left), samples_of(free, free_left), strict=True):
            torch.testing.assert_close(mine, theirs)
        places = [
            samples_of(moved(lay_out(positions, lengths, of)[0]), at)
            for moved, of, at in ((move, "padded", left), (free_move, kind, free_left))
        ]
        for mine, theirs in zip(*places, strict=True):
            assert torch.equal(mine, theirs)


def test_a_fixed_length_that_is_the_length_already_changes_nothing():
    states, sequences = lay_out(torch.randn(2, 7, 4), (7, 4), "padded")
    stays = lengths_to_mask((7, 4))[:, 1:]
    decision = answer(stays, torch.rand(2, 6) * stays, length=7)
    result, left, move = apply(states, sequences, [decision], BLIP)
    assert result is states and left is sequences and move is None


# Gradients


def merged_in_a_loop(padded, lengths, keep, importance, spec):
    """What `repack` is to leave of each sample, one after the other."""
    results = []
    for sample, length in enumerate(lengths):
        states, number = padded[sample, :length], length - 1 - spec.num_suffix_tokens
        kept, weights, tokens = keep[sample, :number], importance[sample, :number], states[1 : 1 + number]
        left = [states[:1], tokens[kept]]
        if not kept.all():
            dropped = weights[~kept]
            left.append((dropped[:, None] / dropped.sum() * tokens[~kept]).sum(0, keepdim=True))
        results.append(torch.cat([*left, states[1 + number :]]))
    return results


@pytest.mark.parametrize("spec", [BLIP, CLIP_TEXT], ids=str)
@pytest.mark.parametrize(
    "lengths, kind, fixed",
    [
        ((9, 5, 12, 2, 7), "varlen", False),
        ((9, 5, 12, 2, 7), "padded", False),
        ((9, 5, 12, 2, 7), "padded", True),
        ((12, 12, 12), "varlen", False),
        ((12, 12, 12), "padded", True),
    ],
    ids=["varlen", "padded", "padded to a fixed length", "uniform", "uniform to a fixed length"],
)
def test_gradients_of_merging_are_those_of_a_loop_over_samples(lengths, kind, fixed, spec):
    padded = torch.randn(len(lengths), 12, 5, dtype=torch.float64, requires_grad=True)
    number = 11 - spec.num_suffix_tokens
    tokens = torch.arange(number) < torch.tensor(lengths)[:, None] - 1 - spec.num_suffix_tokens
    free_importance = torch.rand(len(lengths), number, dtype=torch.float64, requires_grad=True)
    importance = free_importance * tokens
    if fixed:
        keep = most_important(importance.detach(), 4, tokens)
    else:  # a different number in each
        keep = (importance.detach() > torch.linspace(0.2, 0.8, len(lengths))[:, None]) & tokens
    stays, merges = select_tokens(~keep, tokens, tokens.sum(1, keepdim=True))
    expected = merged_in_a_loop(padded, lengths, stays, importance, spec)
    length = 6 + spec.num_suffix_tokens if fixed else None
    states, sequences = lay_out(padded, lengths, kind)
    # In two chunks, but for a fixed length: samples don't know of one another.
    chunking = whole(sequences) if fixed else Chunking((0, 2, len(lengths)))
    chunks = chunking.chunks(sequences)
    ends = [0, *itertools.accumulate(chunk.batch_size for chunk in chunks)]
    decisions = []
    for chunk, (start, stop) in zip(chunks, itertools.pairwise(ends), strict=True):
        width = spec.num_removable(chunk)
        cut = (table[start:stop, :width] for table in (stays, importance))
        decisions.append(answer(*cut, merges[start:stop], length=length))
    result, left, move = apply(states, sequences, decisions, spec, chunking)
    results = samples_of(result, left)
    assert move is not None and any(len(rows) < length for rows, length in zip(results, lengths))
    assert left.num_rows == (length * len(lengths) if fixed else sum(map(len, expected)))

    weights = [torch.randn_like(rows) for rows in expected]
    gradients = []
    for rows in (results, expected):
        loss = sum((mine**2 * weight).sum() for mine, weight in zip(rows, weights, strict=True))
        gradients.append(torch.autograd.grad(loss, (padded, free_importance), retain_graph=True))
    for mine, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("spec", [BLIP, CLIP_TEXT], ids=str)
@LAYOUTS
def test_gradients_of_a_layer_are_those_of_its_samples_alone(kind, spec, path):
    """Of attention, statistics, importance and merging together: padding gets none, and a neighbour changes none."""
    lengths = (14, 9, 12, 4, 17)
    layers = [random_layer(length, seed=length)[:5] for length in lengths]
    alignment = random_layer()[-1]
    inputs = [[t.clone().requires_grad_() for t in layer] for layer in layers]
    leaves = [t for layer in inputs for t in layer]
    together = prune_together(inputs, alignment, 5.0, kind, spec)
    alone = [rows for layer in inputs for rows in prune_together([layer], alignment, 5.0, "padded", spec)]
    weights = [torch.randn_like(rows) for rows in alone]
    assert sum(len(rows) < length for rows, length in zip(alone, lengths)) > 2
    mine, theirs = (
        torch.autograd.grad(sum((r * w).sum() for r, w in zip(rows, weights, strict=True)), leaves, allow_unused=True)
        for rows in (together, alone)
    )
    for gradient, expected in zip(mine, theirs, strict=True):
        expected = torch.zeros_like(gradient) if expected is None and gradient is not None else expected
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
    assert theirs[2].abs().max() > 1e-4  # the importance of what is merged learns from the attention


@pytest.mark.parametrize("temperature", [1.0, 0.05, 1e-4])
def test_terms_too_small_for_the_sum_do_not_change_the_threshold(temperature):
    scores, importance = torch.randn(3, 20, 5), torch.rand(3, 20)
    gate = scores / temperature
    gate = (gate - gate.amax(dim=1, keepdim=True)).exp()
    expected = ((importance.unsqueeze(1) @ gate) / gate.sum(dim=1, keepdim=True)).amin(dim=-1)
    assert torch.equal(importance_threshold(scores, importance, temperature), expected)
