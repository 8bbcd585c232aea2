"""The selection study: a run that is cut short goes on where it was and gives the same rows; its tables."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import BlipConfig, BlipForQuestionAnswering, BlipProcessor


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import selection
import selection_finetuned
import selection_tables


pytest.importorskip("datasets", reason="the digit scenes need datasets")
pytest.importorskip("sklearn", reason="the digit scenes need scikit-learn")
pytest.importorskip("evaluate", reason="the metrics need evaluate")


DIGITS = Path(__file__).parents[1] / "examples" / "blip-vqa-digits"
FEW = ["--validation_samples", "8", "--test_samples", "8"]


@pytest.fixture(scope="module", autouse=True)
def few_texts():
    """For alignment tokens from data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "INIT_SAMPLES", 24)
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A small dense model with random weights."""
    folder = tmp_path_factory.mktemp("dense")
    config = BlipConfig.from_pretrained(DIGITS)
    for branch, layers in ((config.vision_config, 4), (config.text_config, 2)):
        branch.num_hidden_layers, branch.initializer_range = layers, 0.2
    torch.manual_seed(0)
    BlipForQuestionAnswering(config).save_pretrained(folder)
    BlipProcessor.from_pretrained(DIGITS).save_pretrained(folder)
    return folder


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def run_selection(dense, output, *options):
    selection.main(
        ["--tasks", "vqa", "--model", str(dense), *FEW, "--reductions", "0.5", "--output", str(output), *options]
    )


METHODS = ("dense", "tome", "random", "smaller_image", "madtp", "class_attention", "madtp_data", "madtp_merge")


@pytest.fixture(scope="module")
def measured(dense, tmp_path_factory):
    output = tmp_path_factory.mktemp("selection") / "selection.json"
    run_selection(dense, output, "--seeds", "0", "--methods", *METHODS)
    return output


def test_a_row_for_every_method_at_the_budget(measured):
    rows = rows_of(measured)
    assert [row["method"] for row in rows] == list(METHODS)
    assert rows[0]["points"][0]["reached"] == 0
    dense_flops = rows[0]["points"][0]["mflops"]
    for row in rows[1:]:
        (point,) = row["points"]
        assert point["asked"] == 0.5 and 0 <= point["score"] <= 1
        assert ("missed" in point) == (abs(point["reached"] - 0.5) > 0.03)
        assert point["mflops"] / dense_flops == pytest.approx(1 - point["reached"], abs=0.02)


def test_a_run_that_was_cut_short_goes_on(dense, measured, tmp_path):
    output = tmp_path / "selection.json"
    content = json.loads(measured.read_text())
    kept = content["rows"][:4]
    kept[1]["points"][0]["score"] = 0.123  # as it was found, so it is not made again
    output.write_text(json.dumps(content | {"rows": kept}))
    run_selection(dense, output, "--seeds", "0", "--methods", *METHODS)
    rows, expected = without_times(rows_of(output)), without_times(rows_of(measured))
    assert rows[1]["points"][0]["score"] == 0.123
    assert rows[0] == expected[0] and rows[2:] == expected[2:]
    run_selection(dense, output, "--seeds", "0", "--methods", "tome", "--redo", "tome")
    assert sorted(without_times(rows_of(output)), key=str) == sorted(expected, key=str)


def test_other_settings_are_refused(dense, measured):
    before = measured.read_text()
    with pytest.raises(SystemExit, match="expected the same"):
        run_selection(dense, measured, "--test_samples", "4")
    assert measured.read_text() == before


def test_fine_tuning_resumes(dense, tmp_path):
    output = tmp_path / "selection_finetuned.json"
    command = ["--tasks", "vqa", "--model", str(dense), *FEW, "--steps", "1", "--seeds", "0", "--output", str(output)]
    selection_finetuned.main([*command, "--methods", "dense", "evit"])
    selection_finetuned.main([*command, "--methods", "dense", "evit", "own_0.5"])
    rows = rows_of(output)
    assert [(row["method"], len(row["points"])) for row in rows] == [("dense", 1), ("evit", 5), ("own_0.5", 1)]
    assert rows[1]["points"][0]["reached"] == 0 and abs(rows[1]["points"][2]["reached"] - 0.5) < 0.1


def row(method, seed, *points, task="vqa", model="blip-vqa-digits"):
    points = [{"asked": asked, "reached": reached, "score": score} for asked, reached, score in points]
    return {"task": task, "model": model, "method": method, "seed": seed, "points": points}


@pytest.fixture
def results(tmp_path):
    settings = {"test_samples": 600, "validation_samples": 512}
    rows = [row("dense", 0, (0.0, 0.0, 0.938)), row("evit", 0, (0.5, 0.5, 0.9), (0.8, 0.67, 0.4))]
    rows += [row("madtp", seed, (0.5, 0.49, 0.92 + 0.01 * seed), (0.8, 0.81, 0.88)) for seed in range(3)]
    path = tmp_path / "selection.json"
    path.write_text(json.dumps({"study": "training-free", "settings": settings, "rows": rows}))
    tuned = [row("madtp_data", seed, (0.5, 0.5, 0.93), (0.8, 0.8, 0.9)) for seed in range(2)]
    tuned.append(row("own_0.8", 1, (0.8, 0.8, 0.91)))
    settings |= {"steps": 5, "batch_size": 64}
    content = {"study": "fine-tuned", "settings": settings, "rows": tuned}
    for name in ("selection_finetuned", "selection_finetuned_dense_pass"):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_tables(results, capsys):
    selection.main(["--table", "--output", str(results)])
    lines = capsys.readouterr().out.splitlines()
    assert "**question answering, `blip-vqa-digits`**: accuracy in percent; dense 93.8." in lines
    assert "| MADTP, random alignment tokens | 3 | 93.0 ± 1.0 | 88.0 ± 0.0 |" in lines
    assert "| EViT | 1 | 90.0 | (40.0 at 0.67) |" in lines
    assert "| question answering | accuracy |  | 0.8 | 1 | 90.0 | 91.0 |" in lines  # of the seed that both have
    selection.main(["--table", "readme", "--output", str(results)])
    short = capsys.readouterr().out.splitlines()
    assert short[2] == "| prepared model, pruned without training | 93.8 |  |  |"
    assert short[3] == "| prepared model, fine-tuned |  | 93.0 ± 0.0 | 90.0 ± 0.0 |" and len(short) == 6


def test_tables_go_between_the_pages_marks(results, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    page = tmp_path / "accuracy.md"
    page.write_text(f"before\n{selection_tables.BEGIN}\nold\n{selection_tables.END}\nafter\n")
    for _ in range(2):
        selection_tables.write_docs(results, page)
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
        assert text.count("### Without training") == 1
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_results_that_are_not_there(tmp_path):
    with pytest.raises(SystemExit, match=r"run benchmarks/selection\.py first"):
        selection.main(["--table", "--output", str(tmp_path / "none.json")])
