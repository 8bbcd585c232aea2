"""The benchmarks: every script says what it does, and runs at a tiny size to a file that has its rows."""

import importlib
import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
for library in ("datasets", "evaluate", "matplotlib", "peft", "psutil", "sklearn"):
    pytest.importorskip(library, reason="the benchmarks need pip install 'madtp_hf[test]'")

SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if "\ndef main(" in path.read_text())
TINY = ["--size", "tiny", "--reductions", "0.4", "--calibration_samples", "4", "--threads", "1"]
FEW_QUESTIONS = ["--train_questions", "64", "--calibration_questions", "32", "--evaluation_questions", "16"]


def run(name: str, output: Path, *options) -> dict:
    """Run a script in this process; return what it wrote."""
    importlib.import_module(name).main(["--output", str(output), *map(str, options)])
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    assert module.__doc__.splitlines()[0] in capsys.readouterr().out


def test_scripts_import_one_another_in_no_circle():
    modules = {path.stem: path for path in BENCHMARKS.rglob("*.py")}

    def imported(name):
        lines = (line.split() for line in modules[name].read_text().splitlines())
        return {words[1] for words in lines if len(words) > 1 and words[0] in ("import", "from")} & set(modules)

    remaining = {name: imported(name) for name in modules}
    while remaining:
        free = {name for name, needs in remaining.items() if not needs & set(remaining)}
        assert free, f"a circle among {sorted(remaining)}"
        remaining = {name: needs for name, needs in remaining.items() if name not in free}


@pytest.fixture(scope="module")
def speed(tmp_path_factory):
    output = tmp_path_factory.mktemp("speed") / "speed.json"
    options = ["--tasks", "captioning", "--batch_sizes", "2", "--rounds", "2", "--granularities", "instance"]
    return run("speed", output, *TINY, *options, "--baselines", "tome", "--baseline_reductions", "0.4"), output


def test_speed_compares_runs_of_equal_flops(speed):
    rows = {(row["task"], row["run"], row["images"]): row for row in speed[0]["rows"]}
    assert {name for _, name, _ in rows} == {"transformers", "off", "instance", "tome"}
    for name in ("captioning", "captioning-generate"):
        timed = [rows[name, run, "photographs"] for run in ("transformers", "off", "instance", "tome")]
        assert timed[0]["time_ratio"] == 1 and all(row["milliseconds"] > 0 for row in timed)
        assert timed[1]["flops_ratio"] == pytest.approx(1) and timed[1]["computed"] == pytest.approx(1)
        assert all(1.2 < row["flops_ratio"] < 2.6 and row["memory_mb"] > 0 for row in timed[2:])
    assert rows["captioning", "instance", "mixed"]["flops_ratio"] > 1
    assert set(speed[0]["machine"]) >= {"processor", "threads", "size", "dtype"} and speed[0]["versions"]["torch"]


def test_speed_keeps_other_rows_of_the_same_machine(speed):
    before, output = speed
    options = ["--tasks", "--training_step", "--training_batch_size", "2", "--rounds", "1"]
    after = run("speed", output, *TINY, *options, "--granularities", "instance", "--training_reduction", "0.4")
    assert after["rows"][: len(before["rows"])] == before["rows"]
    assert {row["task"] for row in after["rows"][len(before["rows"]) :]} == {"vqa-training"}
    with pytest.raises(SystemExit, match="expected the same"):
        run("speed", output, *TINY, "--tasks", "--dtype", "bfloat16")


def test_the_plot_of_speed(speed, capsys):
    importlib.import_module("plot").main([str(speed[1])])
    assert "| captioning, generation | 2 | off |" in capsys.readouterr().out
    assert speed[1].with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_launches(tmp_path):
    found = run("launches", tmp_path / "launches.json", *TINY, "--batch_sizes", "2", "--kernels")
    operations = {(row["run"], row["path"]): row["operations"] for row in found["rows"]}
    pruned = next(name for name, _ in operations if name not in ("transformers", "off"))
    assert operations["off", "plain"] < operations[pruned, "kernels"] < operations[pruned, "plain"]
    assert all(row["operations"] == sum(row["by_name"].values()) for row in found["rows"])


def test_profile(tmp_path):
    found = run("profile_pass", tmp_path / "profile.json", *TINY, "--batch_sizes", "2", "--rounds", "2")
    off, pruned = found["rows"]
    for row in found["rows"]:
        assert sum(row["shares"].values()) == pytest.approx(1) and row["shares"]["products"] > 0
        assert sum(sum(parts.values()) for parts in row["layers"].values()) == pytest.approx(row["milliseconds"])
        assert len(row["layers"]) == 6 + 8 + 8 + 1  # of the three towers, and what is outside them
    assert off["shares"]["gate"] == off["shares"]["attention with maps"] == 0 < off["shares"]["fused attention"]
    assert min(pruned["shares"].values()) > 0
    assert sum(pruned["gate"].values()) == pytest.approx(pruned["shares"]["gate"])


@pytest.mark.slow
def test_any_budget(tmp_path):
    options = ["--tasks", "vqa", "--samples", "16", "--reductions", "0.3"]
    found = run("any_budget", tmp_path / "any.json", *options)
    assert len(found["models"]) == 5 and all(row["worst"] < 0.05 for row in found["models"])


def test_search(tmp_path):
    pytest.importorskip("faiss", reason="search needs faiss")
    found = run("search", tmp_path / "search.json", "--images", "40", "--queries", "3")
    assert found["updating, nothing new"]["embedded"] == 0
    assert all(kind["equal to brute force"] for kind in found["results"].values())


@pytest.mark.slow
def test_lora(tmp_path):
    found = run("lora", tmp_path / "lora.json", *FEW_QUESTIONS)
    full, lora = found["runs"]
    assert full["trained share"] == 1 and lora["trained share"] < 0.2 and lora["saved bytes"] < full["saved bytes"]
    assert [point["asked"] for point in lora["results"]] == [0.0, 0.5]


@pytest.mark.slow
def test_caption_speed(tmp_path):
    options = ["--size", "tiny", "--images", "4", "--calibration_images", "8", "--pipeline_batches", "1", "2"]
    found = run("caption_speed", tmp_path / "captions.json", *options, "--beams", "1")
    assert {row["run"] for row in found["1 beam"]["rows"]} >= {"pipeline", "pipeline-best", "off"}


FEW_ROWS = ["--train_samples", "64", "--validation_samples", "32", "--use_cpu"]


@pytest.mark.slow
def test_clip_digits(tmp_path):
    few = [
        "--images",
        "16",
        "--validation_images",
        "32",
        "--seeds",
        "0",
        "--work_dir",
        tmp_path,
        "--reductions",
        "0.5",
    ]
    found = run("clip_digits", tmp_path / "clip.json", *few, "--options", *FEW_ROWS)
    # A line for each kind and reduction: the fine-tuned model is measured without pruning as well.
    assert [row["kind"] for row in found["rows"]] == list(dict.fromkeys(row["kind"] for row in found["summary"]))
    assert found["rows"][0]["recalls"]["mean %"] == pytest.approx(found["summary"][0]["mean %"], abs=1e-4)


@pytest.mark.slow
def test_budgets(tmp_path):
    few = ["--work_dir", tmp_path, "--reductions", "0.5"]
    options = ["--options", *FEW_ROWS, "--test_samples", "16"]
    found = run("budgets", tmp_path / "b.json", *few, *options)
    assert [row["reduction"] for row in found["rows"]] == [0.5]


@pytest.mark.slow
def test_bulk(tmp_path):
    pytest.importorskip("typer", reason="bulk captioning needs typer")
    options = ["--images", "120", "--fewer", "60", "--resumed", "40", "--kills", "2"]
    content = run("bulk", tmp_path / "bulk.json", *options, "--only", "bad_images", "killed", "two_writers", "memory")
    found = content["bad_images"]
    assert found["each to its own file"] and found["listed"] and found["odd"] + found["broken"] == 37
    assert len(content["killed"]) == 12 and all(row["kills"] == 2 for row in content["killed"])
    assert not any(row["rows lost or doubled, or index damaged"] for row in content["killed"])
    assert content["two_writers"]["complete"] == 2 and content["two_writers"]["failed"] == 0
    assert content["memory"]["ratio"] < 1.15
