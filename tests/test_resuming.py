"""Training that is killed and resumed ends where it would have without; see `helpers/killed_training.py`."""

import multiprocessing
import random
import signal
from pathlib import Path

import pytest
import torch

from madtp_hf import last_checkpoint

from .helpers import killed_training as killed


# The server imports what is needed once; each training is a fork of it, and dies by itself.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.helpers.killed_training"])


def run(folder, **options) -> int:
    process = PROCESSES.Process(target=killed.train, args=(str(folder),), kwargs=options)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(folder, save_strategy="no") == 0
    return torch.load(folder / "final.pt", weights_only=True)


@pytest.mark.parametrize("seed", (0, pytest.param(1, marks=pytest.mark.slow)))
def test_killed_three_times(uninterrupted, tmp_path, seed):
    """At steps drawn by chance, and once half-way through writing a checkpoint."""
    draw = random.Random(seed)
    first, saving, last = draw.randrange(5, 8), draw.choice((8, 12)), draw.randrange(13, killed.STEPS)
    assert run(tmp_path, step=first) == -signal.SIGKILL
    assert run(tmp_path, resume=True, saving=saving) == -signal.SIGKILL
    half = tmp_path / f"checkpoint-{saving}"
    assert (half / "model.safetensors").exists() and not (half / "trainer_state.json").exists()
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{saving - killed.SAVE_STEPS}")
    assert run(tmp_path, resume="last_checkpoint", step=last) == -signal.SIGKILL
    # Whether or not `Trainer` restores callbacks by itself.
    assert run(tmp_path, resume=True, restore_callback_states_from_checkpoint=bool(seed)) == 0

    got = torch.load(tmp_path / "final.pt", weights_only=True)
    assert got["metrics"][0] == pytest.approx(uninterrupted["metrics"][0], rel=1e-6)
    for mine, expected in zip(got["metrics"][1:], uninterrupted["metrics"][1:]):
        assert len(mine) == killed.STEPS and mine == pytest.approx(expected, rel=1e-5)
    assert got["temperatures"] == pytest.approx(uninterrupted["temperatures"], rel=1e-6)
    assert len(set(got["temperatures"])) == 3
    for name, value in uninterrupted["weights"].items():
        torch.testing.assert_close(got["weights"][name], value, rtol=0, atol=1e-6)


def test_a_folder_that_is_not_complete_is_no_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "nowhere") is None
    for step, state in {9: "{}", 100: '{"global_step": 10', 20: None, 10: '{"global_step": 10}'}.items():
        folder = Path(tmp_path / f"checkpoint-{step}")
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")  # by number, not by name
