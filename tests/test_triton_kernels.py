"""The kernels against float64, on a GPU; without one in Triton's interpreter, where this file runs itself again."""

import os
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from madtp_hf.modeling import triton_kernels
from madtp_hf.modeling.triton_kernels import (
    KERNEL_ERRORS,
    gate,
    is_available,
    merge,
    scored_varlen_attention,
    varlen_attention,
)


pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # from before triton was imported
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="without a GPU, `test_in_the_interpreter` runs these"
)
needs_bfloat16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies bfloat16's bits as integers"),
)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, needs_bfloat16])
every_role = pytest.mark.parametrize(
    ("is_causal", "protects_last"), [(False, False), (True, False), (False, True), (True, True)]
)
MIXED = (3, 130, 1, 65, 2)
runs_itself = pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="the kernels are run already")


def run_in_the_interpreter(file: str):
    """Run a file of tests in Triton's interpreter, which has to be chosen before triton is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stdout + run.stderr


def cumulative(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)


def samples_of(lengths):
    """The slice of each sample's rows."""
    ends = cumulative(lengths).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def attention_inputs(lengths, num_heads, width, dtype=torch.float32):
    """Queries, keys and values as the encoders make them: views of one linear map's output."""
    return torch.randn(sum(lengths), 3, num_heads, width).to(DEVICE, dtype).unbind(1)


def expected_attention(query, key, value, is_causal):
    """One sample, in float64: output (L, H, d) and probabilities (H, Lq, Lk)."""
    query, key, value = (x.double().transpose(0, 1) for x in (query, key, value))
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if is_causal:
        logits = logits.masked_fill(torch.ones_like(logits[0]).triu(1).bool(), -torch.inf)
    probabilities = logits.softmax(dim=-1)
    return (probabilities @ value).transpose(0, 1), probabilities


def assert_near(result, target, tolerance):
    torch.testing.assert_close(result.double(), target, rtol=tolerance, atol=tolerance)


def check_attention(query, key, value, lengths_q, lengths_k, is_causal=False):
    tolerance = TOLERANCE[query.dtype]
    output = varlen_attention(
        query, key, value, cumulative(lengths_q), cumulative(lengths_k), max(lengths_q), is_causal
    )
    assert output.shape == query.shape and output.dtype == query.dtype and output.is_contiguous()
    for queries, keys in zip(samples_of(lengths_q), samples_of(lengths_k)):
        target, _ = expected_attention(query[queries], key[keys], value[keys], is_causal)
        assert_near(output[queries], target, tolerance)


def check_scored(query, key, value, lengths, is_causal=False, protects_last=False, tolerance=None):
    tolerance = tolerance or TOLERANCE[query.dtype]
    output, received, pooling_attention, output_norm = scored_varlen_attention(
        query, key, value, cumulative(lengths), max(lengths), is_causal, protects_last
    )
    assert output.dtype == query.dtype and output.is_contiguous()
    assert received.dtype == pooling_attention.dtype == output_norm.dtype == torch.float32
    assert pooling_attention.shape == output_norm.shape == query.shape[1::-1] and received.shape[1] == query.shape[0]
    for rows in samples_of(lengths):
        target, probabilities = expected_attention(query[rows], key[rows], value[rows], is_causal)
        assert_near(output[rows], target, tolerance)
        assert_near(output_norm[:, rows], target.norm(dim=-1).T, 2 * tolerance)
        assert_near(received[:, rows].sum(dim=0), probabilities[:, 1:].amax(dim=0).sum(dim=0), tolerance)
        assert_near(pooling_attention[:, rows], probabilities[:, -1 if protects_last else 0], tolerance)


@runs_kernels
@every_dtype
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("lengths", "num_heads", "width"), [(MIXED, 2, 16), ((37,), 3, 64), ((129, 128), 1, 32), ((70,), 1, 128)]
)
def test_attention_equals_the_formulas(lengths, num_heads, width, is_causal, dtype):
    check_attention(*attention_inputs(lengths, num_heads, width, dtype), lengths, lengths, is_causal)


@runs_kernels
@every_dtype
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [((1, 1, 1), (70, 1, 33)), ((5, 130, 3), (2, 65, 129)), ((140,), (1,))]
)
def test_queries_attend_to_keys_of_another_sequence(lengths_q, lengths_k, dtype):
    query = attention_inputs(lengths_q, 2, 16, dtype)[0]
    _, key, value = attention_inputs(lengths_k, 2, 16, dtype)
    check_attention(query, key, value, lengths_q, lengths_k)


@runs_kernels
@every_dtype
@every_role
@pytest.mark.parametrize(
    ("lengths", "num_heads", "width"),
    [(MIXED, 3, 16), ((150,), 2, 64), ((1, 2), 1, 32), ((66, 129), 1, 128), ((64, 64), 12, 16)],
)
def test_scores_equal_the_formulas(lengths, num_heads, width, is_causal, protects_last, dtype):
    check_scored(*attention_inputs(lengths, num_heads, width, dtype), lengths, is_causal, protects_last)


@runs_kernels
def test_any_strides():
    lengths = (40, 21)
    query, key, value = attention_inputs(lengths, 3, 16)
    heads_first = value.transpose(0, 1).contiguous().transpose(0, 1)
    columns_first = value.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (value.contiguous(), heads_first, columns_first):
        check_scored(query, key.contiguous(), other, lengths)
        check_attention(other, key, query, lengths, lengths, is_causal=True)


@runs_kernels
@pytest.mark.parametrize("is_causal", [False, True])
def test_large_logits_do_not_overflow(is_causal):
    lengths = (80, 50)
    query, key, value = attention_inputs(lengths, 2, 64)
    # Logits in the hundreds, and their rounding.
    check_scored(query * 30, key * 3, value, lengths, is_causal, tolerance=1e-3)


def gate_inputs(lengths, num_columns, num_heads=3, dtype=torch.float32, query_blocks=3, protects_last=False):
    """Scores, and evidence of the kind that attention leaves; NaN at protected rows, which must not be read."""
    num_rows = sum(lengths)
    scores = torch.randn(num_rows, num_columns) * 3
    received = torch.rand(query_blocks, num_rows)
    pooling_attention, output_norm = torch.rand(2, num_heads, num_rows)
    pooling_attention = pooling_attention / num_rows
    for rows in samples_of(lengths):
        for row in (rows.start, rows.stop - 1) if protects_last else (rows.start,):
            scores[row] = received[:, row] = pooling_attention[:, row] = output_norm[:, row] = torch.nan
    return scores.to(DEVICE, dtype), *(x.to(DEVICE) for x in (received, pooling_attention, output_norm))


def expected_importance(scores, received, pooling_attention, output_norm):
    """s of the tokens of one sample, in float64."""
    scores, received, pooling_attention, output_norm = (
        x.double() for x in (scores, received, pooling_attention, output_norm)
    )
    by_all = received.sum(dim=0)
    by_reader = (pooling_attention * output_norm / output_norm.sum(dim=0)).sum(dim=0)
    by_alignment = scores.amax(dim=1)
    return (by_all / (by_all.sum() + 1e-8) + by_reader + by_alignment / (by_alignment.sum() + 1e-8)) / 3


def expected_threshold(scores, importance, temperature):
    return (importance.double() @ (scores.double() / temperature).softmax(dim=0)).min()


def token_rows(rows, protects_last):
    return slice(rows.start + 1, max(rows.stop - protects_last, rows.start + 1))


def expected_destination(length, goes, protects_last):
    """Where the rows of a sample go, in plain Python. goes: of each token."""
    stay = goes.count(False)
    new_rows = [0, *(index + 1 for index, gone in enumerate(goes) if not gone)]
    if True in goes:
        new_rows.append("merged")
    if protects_last and length > 1:
        new_rows.append(length - 1)
    place = {row: index for index, row in enumerate(new_rows)}
    return [place[row] if row in place else -1 - place["merged"] for row in range(length)], len(new_rows), stay


def check_gate(inputs, lengths, temperature, min_kept, protects_last=False, factor=1.0):
    """Returns for each sample whether it merges."""
    results = gate(*inputs, cumulative(lengths), temperature, min_kept, protects_last, factor)
    importance, destination, new_cu_seqlens = results
    assert importance.dtype == torch.float32
    assert destination.dtype == new_cu_seqlens.dtype == torch.int32 and new_cu_seqlens[0] == 0
    scores, merged = inputs[0], []
    for rows, new_length in zip(samples_of(lengths), new_cu_seqlens.diff().tolist()):
        tokens = token_rows(rows, protects_last)
        s = importance[tokens]
        protected = torch.cat([importance[rows.start : tokens.start], importance[tokens.stop : rows.stop]])
        assert not protected.any()
        goes = (destination[tokens] < 0).tolist()
        place, num_new, num_kept = expected_destination(rows.stop - rows.start, goes, protects_last)
        assert destination[rows].tolist() == place and new_length == num_new
        merged.append(any(goes))
        if not goes:
            continue
        assert_near(s, expected_importance(scores[tokens], *(x[:, tokens] for x in inputs[1:])), 1e-5)
        theta = factor * expected_threshold(scores[tokens], s, temperature)
        # Where float32 may round to either side: `test_small_temperature_decides_to_the_last_bit`.
        doubtful = (s - theta).abs() < 1e-6 * theta.abs()
        above = s > theta
        assert doubtful.sum() <= 1
        if any(goes):
            assert torch.equal((destination[tokens] >= 0) | doubtful, above | doubtful)
            assert num_kept >= min_kept and goes.count(True) > 1
        else:
            sure = int((above & ~doubtful).sum())
            numbers = range(sure, sure + int(doubtful.sum()) + 1)
            assert any(number < min_kept or len(goes) - number <= 1 for number in numbers)
    return merged


@runs_kernels
@pytest.mark.parametrize("protects_last", [False, True])
@pytest.mark.parametrize("min_kept", [1, 2])
@pytest.mark.parametrize("temperature", [0.01, 0.5, 3.0, 100.0])
def test_gate_equals_the_formulas(temperature, min_kept, protects_last):
    inputs = gate_inputs(MIXED, 100, protects_last=protects_last)
    merged = check_gate(inputs, MIXED, temperature, min_kept, protects_last)
    assert merged[1] and not merged[2] and not merged[4]


@runs_kernels
@pytest.mark.parametrize("factor", [0.9, 0.3])
def test_gate_multiplies_the_threshold(factor):
    inputs = gate_inputs(MIXED, 100)
    check_gate(inputs, MIXED, 3.0, 1, factor=factor)
    whole, part = (gate(*inputs, cumulative(MIXED), 3.0, 1, False, f)[1] for f in (1.0, factor))
    assert (part >= 0).sum() > (whole >= 0).sum()


@runs_kernels
@pytest.mark.parametrize(
    ("num_columns", "num_heads", "query_blocks", "dtype"),
    [
        (5, 1, 1, torch.float32),
        (130, 4, 9, torch.float32),
        (256, 12, 2, torch.float16),
        (12, 16, 17, torch.float16),
        (12, 3, 1, torch.float64),
    ],
)
def test_gate_of_any_size(num_columns, num_heads, query_blocks, dtype):
    lengths = (20, 129, 1, 300)
    check_gate(gate_inputs(lengths, num_columns, num_heads, dtype, query_blocks), lengths, 1.0, 1)


@runs_kernels
@pytest.mark.parametrize("protects_last", [False, True])
def test_small_temperature_decides_to_the_last_bit(protects_last):
    lengths, num_columns = (40, 150), 9
    inputs = gate_inputs(lengths, num_columns, protects_last=protects_last)
    for rows in samples_of(lengths):  # no two tokens of similar score
        order = torch.stack([torch.randperm(rows.stop - rows.start) for _ in range(num_columns)], dim=1)
        inputs[0][rows] = order.to(DEVICE, torch.float32)
    importance, destination, _ = gate(*inputs, cumulative(lengths), 1e-3, 1, protects_last)
    for rows in samples_of(lengths):
        tokens = token_rows(rows, protects_last)
        s = importance[tokens]
        theta = s[inputs[0][tokens].argmax(dim=0)].min()
        assert torch.equal(destination[tokens] >= 0, s > theta) and (destination[tokens] < 0).any()


@runs_kernels
@pytest.mark.parametrize("protects_last", [False, True])
@pytest.mark.parametrize(("num_tokens", "min_kept", "merges"), [(5, 1, True), (5, 2, False), (2, 1, False)])
def test_one_token_above_the_threshold(num_tokens, min_kept, merges, protects_last):
    lengths = (1 + num_tokens + protects_last, 30)
    inputs = gate_inputs(lengths, 7, protects_last=protects_last)
    received = inputs[1]
    received[:, 2] = 1000.0  # the second token's
    merged = check_gate(inputs, lengths, 100.0, min_kept, protects_last)
    assert merged == [merges, True]


@runs_kernels
def test_gate_takes_scores_of_any_strides():
    lengths = (30, 12)
    scores, *others = gate_inputs(lengths, 10)
    expected = gate(scores, *others, cumulative(lengths), 1.0, 1)
    wide = torch.cat([scores, scores], dim=1)[:, 10:]
    for same in (wide, scores.T.contiguous().T):
        for result, target in zip(gate(same, *others, cumulative(lengths), 1.0, 1), expected):
            assert torch.equal(result, target)


@runs_kernels
@every_dtype
@pytest.mark.parametrize("protects_last", [False, True])
@pytest.mark.parametrize("width", [40, 64, 100])
def test_merge_equals_the_formulas(width, protects_last, dtype):
    lengths = (20, 3, 130, 1, 6)
    going = ((2, 3, 9), (), tuple(range(1, 128)), (), (1, 2))  # of the tokens, counted from 1
    states = torch.randn(sum(lengths), width).to(DEVICE, dtype)
    importance = torch.rand(sum(lengths), device=DEVICE)
    destination, new_lengths, targets = [], [], []
    for rows, gone in zip(samples_of(lengths), going):
        length = rows.stop - rows.start
        num_tokens = max(length - 1 - protects_last, 0)
        place, new_length, _ = expected_destination(length, [n + 1 in gone for n in range(num_tokens)], protects_last)
        destination += place
        new_lengths.append(new_length)
        target = states.new_empty(new_length, width, dtype=torch.float64)
        for row, to in enumerate(place):
            if to >= 0:
                target[to] = states[rows.start + row].double()
        if gone:
            gone = [rows.start + row for row in gone]
            weights = importance[gone].double()
            target[new_length - 1 - protects_last] = weights @ states[gone].double() / weights.sum()
        targets.append(target)
    destination = torch.tensor(destination, dtype=torch.int32, device=DEVICE)
    states[0] = torch.inf  # a row that stays must not reach the merged one
    targets[0][0] = torch.inf
    cu_seqlens, new_cu_seqlens = cumulative(lengths), cumulative(new_lengths)
    result = merge(states, importance, destination, cu_seqlens, new_cu_seqlens, sum(new_lengths))
    assert result.dtype == dtype and result.is_contiguous()
    assert_near(result, torch.cat(targets), TOLERANCE[dtype])
    strided = torch.cat([states, states], dim=1)[:, width:]
    again = merge(strided, importance, destination, cu_seqlens, new_cu_seqlens, sum(new_lengths))
    assert torch.equal(result, again)


@runs_kernels
@every_role
def test_a_sample_does_not_see_its_batch(is_causal, protects_last):
    lengths = (50, 3, 200, 1, 70)
    query, key, value = attention_inputs(lengths, 2, 32)
    scores, states = torch.randn(sum(lengths), 20).to(DEVICE), torch.randn(sum(lengths), 40).to(DEVICE)

    def run(rows, *lengths):
        cu_seqlens = cumulative(lengths)
        q, k, v = query[rows], key[rows], value[rows]
        attended = varlen_attention(q, k, v, cu_seqlens, cu_seqlens, max(lengths), is_causal)
        scored = scored_varlen_attention(q, k, v, cu_seqlens, max(lengths), is_causal, protects_last)
        importance, destination, new = gate(scores[rows], *scored[1:], cu_seqlens, 1.0, 1, protects_last)
        merged = merge(states[rows], importance, destination, cu_seqlens, new, int(new[-1]))
        return attended, *scored, importance, destination, merged, new

    together = run(slice(None), *lengths)
    new_rows = samples_of(together[-1].diff().tolist())
    for rows, new in zip(samples_of(lengths), new_rows):
        alone = run(rows, rows.stop - rows.start)
        for result, target in zip(alone[:2], together[:2]):
            assert torch.equal(result, target[rows])
        blocks = alone[2].shape[0]
        assert torch.equal(alone[2], together[2][:blocks, rows]) and not together[2][blocks:, rows].any()
        for result, target in zip(alone[3:5], together[3:5]):
            assert torch.equal(result, target[:, rows])
        for result, target in zip(alone[5:7], together[5:7]):
            assert torch.equal(result, target[rows])
        assert torch.equal(alone[7], together[7][new])
    assert together[-1][-1] < sum(lengths)


def test_not_available_on_a_cpu():
    assert not is_available(torch.zeros(8, 2, 64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_availability():
    query = torch.zeros(8, 2, 64, device="cuda")
    assert is_available(query) == (torch.cuda.get_device_capability() >= (8, 0))
    assert not is_available(query.double())
    assert not is_available(query[..., :48])
    query.requires_grad_()
    assert not is_available(query)
    with torch.no_grad():
        assert is_available(query) == (torch.cuda.get_device_capability() >= (8, 0))


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="there is a driver, or none is needed")
def test_a_missing_driver_is_a_kernel_error():
    query = torch.zeros(4, 1, 16)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(KERNEL_ERRORS, match="can't be built or launched"):
        varlen_attention(query, query, query, cu_seqlens, cu_seqlens, 4)


def test_disabling_warns_once(monkeypatch):
    monkeypatch.setattr(triton_kernels, "_enabled", True)
    with pytest.warns(UserWarning, match="no compiler"):
        triton_kernels.disable(KERNEL_ERRORS[0]("no compiler"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        triton_kernels.disable(KERNEL_ERRORS[0]("no compiler"))


@runs_itself
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)
