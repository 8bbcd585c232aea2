"""Two processes on the CPU do what one does on the whole batch; see `helpers/two_process_training.py`."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .helpers import two_process_training as two
from .test_examples import check_output, make_dense


ROOT = Path(__file__).parents[1]


def close(ours, theirs, **tolerances):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **tolerances, msg=lambda text, name=name: f"{name}: {text}")


def torchrun(module: str, folder) -> None:
    """Run a module with a folder in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*command, "-m", module, str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, printed[-6000:]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes has come to, and the folder; all of it in one launch, most of which is spent on
    imports.
    """
    folder = tmp_path_factory.mktemp("two")
    make_dense("retrieval", folder / "dense")
    torchrun("tests.helpers.two_process_training", folder)
    return *(torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)), folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process comes to, each run when it is first asked for."""
    folder, done = tmp_path_factory.mktemp("one"), {}

    def run(name):
        if name not in done:
            done[name] = two.run_training(name, folder, 1)
        return done[name]

    return run


@pytest.mark.parametrize("run", two.RUNS)
def test_all_processes_end_with_the_same(ranks, run):
    first, second = ranks[0][run], ranks[1][run]
    for part in ("gradients", "weights", "memory", "temperatures"):
        close(first[part], second[part], rtol=0, atol=0)


@pytest.mark.parametrize("run", two.RUNS)
def test_two_processes_learn_what_one_learns(ranks, one, run):
    """From the same global batches: gradients, weights, twin, queues in order of rank, the learned and the pruning
    temperature.
    """
    expected, got = one(run.removesuffix("_resumed")), ranks[0][run]
    if not run.endswith("_resumed"):
        assert max(gradient.abs().max() for gradient in got["gradients"].values()) > 0.01
        close(got["gradients"], expected["gradients"], rtol=1e-4, atol=1e-5)
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    close(got["weights"], expected["weights"], rtol=0, atol=1e-6)
    close(got["memory"], expected["memory"], rtol=1e-5, atol=1e-5)
    close(got["temperatures"], expected["temperatures"])
    assert bool(got["memory"]) == two.RUNS[run][1]


@pytest.mark.parametrize("count", two.EVALUATED)
def test_budgets_are_evaluated_by_all_processes_together(ranks, count):
    expected = two.run_evaluation(count)
    for rank in ranks[:2]:
        got = rank["evaluation"][count]
        assert len(got) == len(expected) == 3
        for (predictions, *costs), (expected_predictions, *expected_costs) in zip(got, expected):
            assert [index for index, _ in predictions] == list(range(count))
            assert [margin for _, margin in predictions] == pytest.approx(
                [margin for _, margin in expected_predictions], abs=1e-5
            )
            assert costs == pytest.approx(expected_costs)


def test_one_process_with_an_accelerator_evaluates_as_without():
    assert two.run_evaluation(5, two.Accelerator(cpu=True)) == two.run_evaluation(5)


def test_pairs_are_scored_by_all_processes_together(ranks):
    expected = two.run_scoring()
    for rank in ranks[:2]:
        for got, scores in zip(rank["scoring"], expected):
            torch.testing.assert_close(got, scores, atol=1e-5, rtol=1e-5)


def test_rows_of_all_processes_are_gathered_with_their_gradients(ranks):
    ranks = ranks[:2]
    for rank, other in (ranks, ranks[::-1]):
        rank, other = rank["gathering"], other["gathering"]
        torch.testing.assert_close(rank["gathered"], other["gathered"], rtol=0, atol=0)
        assert rank["ids"].tolist() == [0, 1, 10, 11]
        # Both losses, 1 and 2 times the sum of squares, are of these rows.
        torch.testing.assert_close(rank["gradient"], 3 * 2 * rank["rows"])
        lengths = rank["mask"].sum(dim=1).tolist()
        assert lengths == [3, 3, 5, 4] and rank["gathered"].shape == (4, 5, 4)
    gathered = ranks[0]["gathering"]["gathered"]
    assert torch.equal(gathered[:2, :3], ranks[0]["gathering"]["rows"]) and not gathered[:2, 3:].any()
    assert torch.equal(gathered[2:], ranks[1]["gathering"]["rows"])


def test_a_script_runs_in_two_processes(ranks):
    check_output(ranks[2] / "pruned-twice", steps=2)  # each of twice as many samples
