"""The published implementation's numbers: a committed part of them (see golden/README.md), and all where they are."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from . import golden
from .golden.comparison import check_case, load_model


WHOLE = Path(__file__).parents[2] / "shared" / "reference"
NEEDS_WHOLE = pytest.mark.skipif(not WHOLE.is_dir(), reason=f"all golden cases are not there: no folder {WHOLE}")
TASKS = ("vqa", "nlvr2", "captioning", "retrieval")
COMMITTED = sorted({tuple(entry["key"].split(".")[:2]) for entry in golden.load_cases()[0]["cases"]})
# NLVR2 runs two images at once, case 3 three samples: recorded in batch granularity. The others are the same in both.
RUNS = [
    pytest.param(which, task, case, granularity, marks=marks, id=f"{which}-{task}-{case}-{granularity}")
    for which, cases, marks in (
        ("committed", COMMITTED, ()),
        ("whole", [(task, case) for task in TASKS for case in "0123"], NEEDS_WHOLE),
    )
    for task, case in cases
    for granularity in (("batch",) if task == "nlvr2" or case == "3" else ("instance", "batch"))
]


@pytest.fixture(scope="session")
def load_golden(tmp_path_factory):
    """A function: "committed" or "whole" -> (what cases.json holds, tensors, the folder of the weights)."""

    @functools.cache
    def load(which):
        if which == "whole":
            return json.loads((WHOLE / "cases.json").read_text()), load_file(WHOLE / "cases.safetensors"), WHOLE
        folder = tmp_path_factory.mktemp("golden")
        for task, weights in golden.load_weights().items():
            weights = {name: torch.from_numpy(values) for name, values in weights.items()}
            save_file(weights, folder / f"{task}.weights.safetensors")
        cases, tensors = golden.load_cases()
        return cases, {name: torch.from_numpy(values) for name, values in tensors.items()}, folder

    return load


@pytest.mark.parametrize("which, task, case, granularity", RUNS)
def test_the_published_numbers(load_golden, which, task, case, granularity, path):
    cases, tensors, folder = load_golden(which)
    model = load_model(cases, folder / f"{task}.weights.safetensors", task)
    check_case(model, cases, tensors, task, case, granularity)


def test_the_committed_part_is_of_all_tasks():
    """Each has a single sample and several at once."""
    for task in TASKS:
        assert {(task, "0"), (task, "3")} <= set(COMMITTED)


@NEEDS_WHOLE
def test_the_committed_part_is_of_the_whole():
    for task, weights in golden.load_weights().items():
        expected = load_file(WHOLE / f"{task}.weights.safetensors")
        assert weights.keys() == expected.keys()
        for name, values in weights.items():
            # Exactly what was recorded; another machine's logarithm may round once otherwise.
            np.testing.assert_array_max_ulp(values, expected[name].numpy(), maxulp=1)
    cases, tensors = golden.load_cases()
    whole = json.loads((WHOLE / "cases.json").read_text())
    assert cases["config"] == whole["config"] and all(entry in whole["cases"] for entry in cases["cases"])
    expected = load_file(WHOLE / "cases.safetensors")
    for name, values in tensors.items():
        assert np.array_equal(values, expected[name].numpy()), name


def test_the_random_stream_is_torchs():
    """What the committed weights are drawn from is, but for rounding, what torch draws with the same seed."""
    theirs = torch.randn(1000, generator=torch.Generator().manual_seed(golden.SEED)).numpy()
    np.testing.assert_allclose(golden.normals(golden.uniform_stream(), 0, 1000), theirs, atol=1e-6)
