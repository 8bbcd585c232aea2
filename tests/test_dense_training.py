"""The scripts that train the shipped dense models: a few steps of each, prepared for pruning or plain."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModel


EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, output, monkeypatch, *options) -> list[dict]:
    """Run a script in this process; its log."""
    options = [*options, "--output_dir", output, "--batch_size", 4, "--threads", 1]
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return [json.loads(line) for line in (output / "train.log").read_text().splitlines()]


@pytest.mark.parametrize(
    "task, plain", [("nlvr2", True), ("captioning", False), ("retrieval", True), ("clip", False), ("clip", True)]
)
def test_a_task_trains_from_another_model(task, plain, tmp_path, monkeypatch):
    start = "blip-retrieval-digits" if task == "clip" else "blip-vqa-digits"
    script, name = ("train_dense_clip.py", []) if task == "clip" else ("train_dense_tasks.py", [task])
    options = [*name, "--start_from", EXAMPLES / start, "--steps", 2, *(["--plain"] if plain else [])]
    log = run(script, tmp_path, monkeypatch, *options)
    steps = [record for record in log if "step" in record]
    assert len(steps) == 2 and all(record["loss"] > 0 for record in steps)
    assert (log[0]["args"]["guidance"] == "0.0") == plain
    if task != "nlvr2":  # transformers has no such model
        assert sum(p.numel() for p in AutoModel.from_pretrained(tmp_path).parameters()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True], ids=["prepared", "plain"])
def test_the_first_model_trains_from_scratch(plain, tmp_path, monkeypatch):
    stages = ("patch", "caption", "question", "settle", "thin")
    steps = [text for stage in stages for text in (f"--{stage}_steps", 1)]
    sizes = ["--vision_layers", 2, "--text_layers", 2, *(["--plain"] if plain else [])]
    log = run("train_dense_blip.py", tmp_path, monkeypatch, *steps, *sizes)
    assert log[-1]["stage"] == "test" and 0 <= log[-1]["accuracy"] <= 1
