"""The kernels against float64, on a GPU; where there is none, by Triton's interpreter, for which this file is run once more by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from madtp_hf.modeling.triton_attention import is_available, triton_scored_attention


pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # from before triton was imported
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="without a GPU, `test_by_the_interpreter` runs these"
)
needs_bfloat16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies bfloat16's bits as integers"),
)


def expected(query, key, value, lengths):
    """The formulas as they stand, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    length = query.shape[2]
    real = torch.arange(length, device=query.device) < lengths.view(-1, 1)
    probabilities = logits.masked_fill(~real[:, None, None, :], -torch.inf).softmax(dim=-1)
    received = (probabilities.amax(dim=1) * real[:, :, None])[:, 1:, 1:].sum(dim=1)
    return probabilities @ value, received, probabilities[:, :, 0, 1:]


def attention_inputs(batch_size, num_heads, length, width, dtype, fused=True):
    """Queries, keys and values as the encoders make them: views of one linear map's output, or of three."""
    if fused:
        states = torch.randn(batch_size, length, 3, num_heads, width).to(DEVICE, dtype)
        return states.permute(2, 0, 3, 1, 4).unbind()
    return [torch.randn(batch_size, length, num_heads, width).to(DEVICE, dtype).transpose(1, 2) for _ in range(3)]


def check(query, key, value, lengths=None, tolerance=None):
    batch_size, _, length, _ = query.shape
    given = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=query.device)
    tolerance = tolerance or TOLERANCE[query.dtype]
    results = triton_scored_attention(query, key, value, given)
    full = torch.full((batch_size,), length, device=query.device)
    wanted = expected(query, key, value, full if given is None else given)
    assert results[0].dtype == query.dtype and results[1].dtype == results[2].dtype == torch.float32
    for name, result, target in zip(("output", "received", "from_class"), results, wanted):
        assert result.shape == target.shape, name
        torch.testing.assert_close(
            result.double(), target, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    for number, received, from_class in zip(lengths or (), *results[1:]):
        assert not received[number - 1 :].any() and not from_class[:, number - 1 :].any()


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, needs_bfloat16])
@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        ((2, 3, 37, 64), None),
        ((2, 2, 150, 16), None),
        ((3, 4, 130, 64), (130, 65, 1)),
        ((4, 2, 64, 16), (64, 3, 40, 33)),
        ((1, 12, 129, 64), None),
        ((2, 1, 66, 32), (2, 66)),
        ((1, 2, 70, 128), (69,)),
        ((1, 1, 2, 16), None),
    ],
)
def test_equals_the_formulas(shape, lengths, dtype):
    check(*attention_inputs(*shape, dtype), lengths)


@runs_kernels
def test_any_strides():
    query, key, _ = attention_inputs(2, 3, 40, 16, torch.float32)
    _, _, value = attention_inputs(2, 3, 40, 16, torch.float32, fused=False)
    check(query, key.contiguous(), value, (40, 21))
    check(query, key, value.transpose(-1, -2).contiguous().transpose(-1, -2))


@runs_kernels
def test_large_logits_do_not_overflow():
    query, key, value = attention_inputs(1, 2, 80, 64, torch.float32)
    check(query * 30, key * 3, value, tolerance=1e-3)  # logits in the hundreds, and their rounding
    check(query * 30, key * 3, value, (50,), tolerance=1e-3)


@runs_kernels
def test_a_sample_does_not_see_its_batch():
    query, key, value = attention_inputs(3, 2, 90, 32, torch.float32)
    lengths = torch.tensor([50, 90, 70], device=DEVICE)
    together = triton_scored_attention(query, key, value, lengths)
    for index, number in enumerate(lengths.tolist()):
        alone = triton_scored_attention(*(x[index : index + 1, :, :number] for x in (query, key, value)))
        assert torch.equal(together[0][index, :, :number], alone[0][0])
        assert torch.equal(together[1][index, : number - 1], alone[1][0])
        assert torch.equal(together[2][index, :, : number - 1], alone[2][0])


@runs_kernels
def test_output_is_ready_to_join_its_heads():
    output, _, _ = triton_scored_attention(*attention_inputs(2, 3, 20, 16, torch.float32))
    assert output.transpose(1, 2).is_contiguous()


def test_not_available_on_a_cpu():
    assert not is_available(torch.zeros(1, 2, 8, 64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_availability():
    query = torch.zeros(1, 2, 8, 64, device="cuda")
    assert is_available(query) == (torch.cuda.get_device_capability() >= (8, 0))
    assert not is_available(query.double())
    assert not is_available(query[..., :48])
    query.requires_grad_()
    assert not is_available(query)


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="the kernels are run already")
def test_by_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(Path(__file__))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stdout + run.stderr
