"""The benchmark for a GPU runs from end to end on a CPU, with the package's own dependencies and scikit-learn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# What the machine with the GPU may not have.
BLOCK = """import sys
sys.modules.update(dict.fromkeys(["datasets", "evaluate", "rich", "typer", "pytest"]))
"""


pytestmark = pytest.mark.slow  # a benchmark, whole


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The printed report and the JSON file of a run."""
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "sitecustomize.py").write_text(BLOCK)
    output = folder / "cuda.json"
    options = ["--device", "cpu", "--size", "tiny", "--minutes", "4", "--tasks", "vqa", "--output", output]
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "cuda.py", *options],
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(output.read_text())


def test_every_stage_ends_by_itself(run):
    printed, found = run
    assert list(found["stages"]) == ["facts", "checks", "speed", "compiled"]
    assert all(how.startswith("exit status 0") for how in found["stages"].values())
    assert found["facts"]["device"] == "cpu" and found["facts"]["torch"]
    assert "skipped: no CUDA" in printed


def test_the_checks_pass_where_they_can(run):
    checks = run[1]["checks"]
    assert [check for check in checks if check["passed"] is False] == []
    assert [check["note"] for check in checks if check["passed"] is None] == ["skipped: no CUDA"]
    names = " ".join(check["check"] for check in checks)
    for part in (
        "golden nlvr2",
        "golden vqa",
        "parity captioning bfloat16",
        "batch invariance pruned",
        "training",
        "generate",
    ):
        assert part in names


def test_each_run_is_timed_or_says_why_not(run):
    rows = {(row["stage"], row["run"]): row for row in run[1]["rows"]}
    assert rows.pop(("speed", "frozen 0.5 CUDA graph"))["error"] == "skipped: no CUDA"
    assert {name for _, name in rows} >= {
        "transformers",
        "off",
        "instance 0.5",
        "frozen 0.5",
        "frozen 0.5 torch.compile",
    }
    for row in rows.values():
        assert row["images_per_second"] > 0 and row["rounds"] > 1
    assert rows["speed", "frozen 0.5"]["reduction"] == pytest.approx(0.5, abs=0.1)
    assert rows["compiled", "frozen 0.5 torch.compile"]["difference"] < 1e-4
