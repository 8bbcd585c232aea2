"""The code blocks of docs/serving.md run."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .conftest import make_processor, make_task_model
from .helpers.clip import make_clip_model, make_clip_processor


DOCUMENT = Path(__file__).parents[1] / "docs" / "serving.md"
LAYERS = {"text_config": {"num_hidden_layers": 1}, "vision_config": {"num_hidden_layers": 1}}


def test_the_code_blocks_run(tmp_path, monkeypatch, capsys):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason=f"{library}, of the extra `export`, is not installed")
    for task in ("vqa", "captioning", "nlvr2", "retrieval", "clip"):
        model = make_clip_model(**LAYERS) if task == "clip" else make_task_model(task, **LAYERS)
        folder = tmp_path / ("clip" if task == "clip" else f"blip-{task}")
        processor = make_clip_processor() if task == "clip" else make_processor()
        model.config.pruning_schedule = [[0.5, 1.0]]
        for name in (folder, *([tmp_path / "blip-vqa-frozen"] if task == "vqa" else [])):
            model.save_pretrained(name)
            processor.save_pretrained(name)
    for seed, name in enumerate(("image.png", "other.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    names = {}
    for block in blocks:
        exec(block, names)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert len(printed) == 11
    assert names["answer"].task == "vqa" and len(names["handler"](names["request"])) == 1
