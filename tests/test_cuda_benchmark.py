"""The benchmark for a GPU runs from end to end on a CPU, with the package's own dependencies and scikit-learn."""

import copy
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[1]
# What the machine with the GPU may not have.
BLOCK = """import sys
sys.modules.update(dict.fromkeys(["datasets", "evaluate", "rich", "typer", "pytest"]))
"""

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import cuda_speed  # noqa: E402
from random_models import Setup, make_inputs, make_models  # noqa: E402


whole = pytest.mark.slow  # a benchmark, whole


@pytest.mark.slow
def test_the_runs_of_a_cell(monkeypatch):
    """In this process, one round of a tiny model; where torchao is missing, its row says so."""
    device = torch.device("cpu")
    setup = Setup("tiny", device)
    dense, model = make_models("vqa", setup)
    model.config.pruning_schedule = [{"reduction": 0.5, "temperature": 0.3}]
    counts = {"vision": [100, 80, 60, 50, 40, 30], "text": [9] * 8}
    model.config.pruning_token_counts = [{"temperature": 0.3, **counts}]
    inputs = make_inputs("vqa", model.config, 2, setup)
    given = ("vqa", {"transformers": dense, "ours": model}, [0.5], inputs)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchao.quantization", None)
        (missing,) = cuda_speed.int8_runs(*given)
    with pytest.raises(cuda_speed.Skipped, match="no torchao"):
        missing.prepare()
    monkeypatch.setattr(cuda_speed, "quantized", copy.deepcopy)  # in its place
    limits = cuda_speed.Limits([0.5], time.time() + 300, 0.01, 1)
    found = cuda_speed.time_cell("vqa", cuda_speed.plain_runs(*given, device), inputs, device, limits)
    rows = {row["run"]: row for row in found}
    runs = ["off", "instance 0.5", "frozen 0.5", "frozen 0.5 CUDA graph", "instance 0.5 without varlen_attn"]
    assert list(rows) == ["transformers", *runs, "transformers int8", "off int8", "instance 0.5 int8"]
    assert {name: row["error"] for name, row in rows.items() if "error" in row} == {
        "frozen 0.5 CUDA graph": "skipped: no CUDA",
        "instance 0.5 without varlen_attn": "skipped: no varlen_attn",
    }
    assert rows["frozen 0.5"]["vision_tokens"][1:] == counts["vision"]
    assert rows["instance 0.5 int8"]["vision_tokens"][-1] < rows["off int8"]["vision_tokens"][-1]
    assert all(row["images_per_second"] > 0 for row in rows.values() if "error" not in row)


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


@whole
def test_every_stage_ends_by_itself(run):
    printed, found = run
    assert list(found["stages"]) == ["facts", "checks", "speed", "compiled"]
    assert all(how.startswith("exit status 0") for how in found["stages"].values())
    assert found["facts"]["device"] == "cpu" and found["facts"]["torch"]
    assert "skipped: no CUDA" in printed


@whole
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


@whole
def test_each_run_is_timed_or_says_why_not(run):
    rows = {(row["stage"], row["run"]): row for row in run[1]["rows"]}
    assert rows.pop(("speed", "frozen 0.5 CUDA graph"))["error"] == "skipped: no CUDA"
    assert rows.pop(("speed", "instance 0.5 without varlen_attn"))["error"] == "skipped: no varlen_attn"
    if ("speed", "int8") in rows:
        assert rows.pop(("speed", "int8"))["error"] == "skipped: no torchao"
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
