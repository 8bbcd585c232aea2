"""The kernels of merging against the equations in torch, on a GPU; without one in Triton's interpreter."""

import pytest
import torch

from madtp_hf.modeling.token_pruning import (
    AttentionStatistics,
    cosine_similarity,
    distinctness,
    importance_threshold,
    merge_into_similar,
    select_tokens,
    token_importance,
)


pytest.importorskip("triton", reason="triton is not installed")

from madtp_hf.modeling.triton_kernels import scored_varlen_attention, varlen_attention
from madtp_hf.modeling.triton_merging import MERGE_SIMILAR_BLOCKS, gate_and_assign, merge_similar

from .test_triton_kernels import (
    DEVICE,
    MIXED,
    TOLERANCE,
    assert_near,
    attention_inputs,
    cumulative,
    every_dtype,
    every_role,
    gate_inputs,
    run_in_the_interpreter,
    runs_itself,
    runs_kernels,
    samples_of,
    token_rows,
)


def some_sizes(lengths):
    return torch.rand(sum(lengths)).to(DEVICE) * 3 + 0.5


@runs_kernels
@every_dtype
@every_role
@pytest.mark.parametrize(("lengths", "num_heads", "width"), [(MIXED, 3, 16), ((150,), 2, 64)])
def test_sizes_weight_the_keys(lengths, num_heads, width, is_causal, protects_last, dtype):
    query, key, value = attention_inputs(lengths, num_heads, width, dtype)
    sizes, cu_seqlens = some_sizes(lengths), cumulative(lengths)
    layout = cu_seqlens, max(lengths), is_causal
    found = scored_varlen_attention(query, key, value, *layout, protects_last, sizes)
    output, received, pooling_attention, output_norm = found
    plain = varlen_attention(query, key, value, cu_seqlens, *layout, sizes)
    tolerance = TOLERANCE[dtype]
    for rows in samples_of(lengths):
        q, k, v = (x[rows].double().transpose(0, 1) for x in (query, key, value))
        logits = q @ k.transpose(1, 2) / width**0.5
        if is_causal:
            logits = logits.masked_fill(torch.ones_like(logits[0]).triu(1).bool(), -torch.inf)
        weights = logits.exp() * sizes[rows].double()
        maps = weights / weights.sum(dim=-1, keepdim=True)
        target = (maps @ v).transpose(0, 1)
        for result in (output, plain):
            assert_near(result[rows], target, tolerance)
        assert_near(output_norm[:, rows], target.norm(dim=-1).T, 2 * tolerance)
        assert_near(received[:, rows].sum(dim=0), maps[:, 1:].amax(dim=0).sum(dim=0), 2 * tolerance)
        assert_near(pooling_attention[:, rows], maps[:, -1 if protects_last else 0], tolerance)


def merging_inputs(lengths, num_heads=3, width=16, dtype=torch.float32, **options):
    """Statistics and alignment scores, and keys of which many are alike."""
    kinds = torch.randn(9, num_heads, width)
    key = kinds[torch.randint(9, (sum(lengths),))] + 0.3 * torch.randn(sum(lengths), num_heads, width)
    return *gate_inputs(lengths, 20, num_heads, dtype, **options), key.to(DEVICE, dtype)


def expected_decision(tokens, scores, received, pooled, norm, key, sizes, temperature, min_kept, factor):
    """One sample by the equations: importance, what stays, into and the sizes of the tokens that stay, (1, N) each."""
    statistics = AttentionStatistics(
        received[None, :, tokens].sum(dim=1), pooled[:, None, tokens], norm[:, None, tokens]
    )
    scores, sizes = scores[None, tokens].float(), sizes[None, tokens]
    importance = token_importance(statistics, scores)
    similarity = cosine_similarity(key[None, tokens].float().mean(dim=2))
    ranked = importance.clamp(min=0) * distinctness(importance, similarity)
    theta = importance_threshold(scores, ranked, temperature, factor=factor)
    stays, merges = select_tokens(ranked <= theta, min_kept=min_kept)
    into, weight, new_sizes = merge_into_similar(importance, similarity, sizes, stays)
    return importance, stays, into, weight, new_sizes


@runs_kernels
@every_dtype
@pytest.mark.parametrize("protects_last", [False, True])
@pytest.mark.parametrize(("sized", "factor", "temperature"), [(False, 1.0, 3.0), (True, 1.0, 0.5), (True, 0.3, 3.0)])
def test_a_layer_merges_as_the_equations_do(sized, factor, temperature, protects_last, dtype):
    lengths = (20, 3, 110, 1, 6)
    inputs = merging_inputs(lengths, dtype=dtype, protects_last=protects_last)
    sizes, states = some_sizes(lengths), torch.randn(sum(lengths), 40).to(DEVICE, dtype)
    given, cu_seqlens = sizes if sized else None, cumulative(lengths)
    sizes = sizes if sized else torch.ones_like(sizes)
    setting = temperature, 1, protects_last, factor
    importance, destination, counts, new_cu_seqlens = gate_and_assign(
        *inputs, given, cu_seqlens, max(lengths), *setting
    )
    new_lengths = new_cu_seqlens.diff().tolist()
    layouts = cu_seqlens, new_cu_seqlens, sum(new_lengths), max(new_lengths)
    merged, new_sizes = merge_similar(states, destination, counts, *layouts)
    assert merged.dtype == dtype and new_sizes.dtype == torch.float32 and destination.dtype == torch.int32
    gone = 0
    for rows, new_rows in zip(samples_of(lengths), samples_of(new_lengths)):
        tokens = token_rows(rows, protects_last)
        behind = slice(tokens.stop, rows.stop)
        if tokens.start == tokens.stop:
            assert torch.equal(merged[new_rows], states[rows])
            continue
        s, stays, into, weight, kept_sizes = expected_decision(tokens, *inputs, sizes, temperature, 1, factor)
        assert_near(importance[tokens], s[0].double(), 1e-5)
        assert torch.equal(destination[tokens] >= 0, stays[0])
        position = stays[0].cumsum(0)  # among the new rows, after the protected one
        assert destination[rows.start] == 0
        assert destination[tokens].tolist() == torch.where(stays[0], position, -1 - position[into[0]]).tolist()
        own = torch.zeros_like(s).scatter_add(1, into, weight)
        x = states[tokens].float()
        mixed = (x * (1 - own[0])[:, None]).index_add(0, into[0], x * weight[0][:, None])[stays[0]]
        target = torch.cat([states[rows.start : tokens.start].float(), mixed, states[behind].float()])
        assert_near(merged[new_rows], target.double(), TOLERANCE[dtype])
        target = torch.cat([sizes[rows.start : tokens.start], kept_sizes[0][stays[0]], sizes[behind]])
        assert_near(new_sizes[new_rows], target.double(), 1e-5)
        gone += int((~stays).sum())
    assert gone > 10 and (factor == 1 or max(new_lengths) > MERGE_SIMILAR_BLOCKS["NEW_ROWS"])
    # A state that none was merged into is copied to the last bit.
    untouched = 0
    for start, rows in zip(new_cu_seqlens.tolist(), samples_of(lengths)):
        for row in range(rows.start, rows.stop):
            new = start + int(destination[row])
            if destination[row] >= 0 and new_sizes[new] == sizes[row]:
                assert torch.equal(merged[new], states[row])
                untouched += 1
    assert untouched > len(lengths)


@runs_kernels
def test_a_row_that_is_not_finite_reaches_no_other():
    destination = torch.tensor([0, 1, -2, 2, 3], dtype=torch.int32, device=DEVICE)
    counts, states = torch.ones(5, device=DEVICE), torch.randn(5, 40).to(DEVICE)
    states[0, 5], states[3, 7] = torch.inf, torch.nan
    merged, _ = merge_similar(states, destination, counts, cumulative((5,)), cumulative((4,)), 4, 4)
    expected = torch.stack([states[0], (states[1] + states[2]) / 2, states[3], states[4]])
    finite = expected.isfinite()
    assert torch.equal(merged.isfinite(), finite) and not finite.all()
    assert_near(merged[finite], expected[finite].double(), 1e-5)


@runs_kernels
def test_a_token_of_unknown_importance_removes_none():
    lengths = (40, 40)
    scores, received, pooled, norm, key = merging_inputs(lengths)
    pooled[0, 7] = torch.nan
    decision = gate_and_assign(scores, received, pooled, norm, key, None, cumulative(lengths), 40, 3.0, 1)
    assert decision[-1].diff().tolist()[0] == 40 and decision[-1].diff().tolist()[1] < 40


@runs_kernels
def test_any_strides():
    lengths = (30, 22)
    *statistics, key = merging_inputs(lengths)
    options = cumulative(lengths), 30, 3.0, 1
    expected = gate_and_assign(*statistics, key, None, *options)
    wide = torch.cat([key, key], dim=2)[..., key.shape[2] :]
    columns_first = key.transpose(1, 2).contiguous().transpose(1, 2)
    for same in (wide, columns_first):
        for found, target in zip(gate_and_assign(*statistics, same, None, *options), expected):
            assert torch.equal(found, target)


@runs_kernels
@every_role
def test_a_sample_does_not_see_its_batch(is_causal, protects_last):
    lengths = (50, 3, 100, 1)
    query, key, value = attention_inputs(lengths, 2, 32)
    scores, states = torch.randn(sum(lengths), 20).to(DEVICE), torch.randn(sum(lengths), 40).to(DEVICE)
    sizes = some_sizes(lengths)

    def run(rows, *lengths):
        layout = cumulative(lengths), max(lengths)
        q, k, v = query[rows], key[rows], value[rows]
        output, *statistics = scored_varlen_attention(q, k, v, *layout, is_causal, protects_last, sizes[rows])
        decision = gate_and_assign(scores[rows], *statistics, k, sizes[rows], *layout, 1.0, 1, protects_last)
        _, destination, counts, new = decision
        longest = int(new.diff().max())
        merged = merge_similar(states[rows], destination, counts, layout[0], new, int(new[-1]), longest)
        return (output, *decision[:3]), merged, new

    together, merged, new = run(slice(None), *lengths)
    for rows, new_rows in zip(samples_of(lengths), samples_of(new.diff().tolist())):
        alone, merged_alone, _ = run(rows, rows.stop - rows.start)
        for found, target in zip(alone, together):
            assert torch.equal(found, target[rows])
        for found, target in zip(merged_alone, merged):
            assert torch.equal(found, target[new_rows])
    assert new[-1] < sum(lengths)


@runs_itself
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)
