"""The shipped folders and the scripts beside them: complete, and loaded without a question."""

import ast
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModel, AutoProcessor, BlipProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .conftest import TASKS, make_task_model


EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("*/config.json"))
REGISTERED = pytest.mark.skipif(
    "madtp_blip" not in CONFIG_MAPPING, reason="madtp_hf doesn't register its configuration with the Auto classes"
)


@pytest.fixture
def asked(monkeypatch):
    """What the loader asks a person whether to run: nobody answers here."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
    return questions


def code_blocks(folder) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)


def test_there_is_a_folder_of_every_task():
    expected = {*(f"blip-{task}-digits" for task in TASKS), "clip-digits"}
    assert expected <= {folder.name for folder in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_shipped_configuration_refers_to_files_that_are_there(folder):
    config = json.loads((folder / "config.json").read_text())
    named = [*config.get("auto_map", {}).values()]
    named += [pipeline["impl"] for pipeline in config.get("custom_pipelines", {}).values()]
    assert [name for name in named if not (folder / f"{name.partition('.')[0]}.py").is_file()] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_line_of_a_shipped_card_runs(folder, tmp_path, monkeypatch, capsys, asked):
    for name in ("image", "left", "right"):
        Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = code_blocks(folder)
    assert len(blocks) >= 2
    for block in blocks:
        ast.parse(block)
        assert f'"examples/{folder.name}"' in block
        exec(block.replace(f"examples/{folder.name}", str(folder)), {})
    assert capsys.readouterr().out.strip() and asked == []


@REGISTERED
def test_auto_model_loads_the_shipped_nlvr2_model():
    folder = EXAMPLES / "blip-nlvr2-digits"
    for options in ({}, {"trust_remote_code": True}):
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
        assert type(model).__name__ == "MadtpBlipForImagesAndTextClassification"
        assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from .conftest import make_processor

    folder = tmp_path_factory.mktemp("saved")
    make_task_model("vqa").save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@REGISTERED
@pytest.mark.parametrize("loader", (AutoProcessor, BlipProcessor))
def test_a_checkpoints_processor_loads_without_a_question(loader, checkpoint, asked, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # for caplog to see it
    processor = loader.from_pretrained(checkpoint)
    assert type(processor) is BlipProcessor and asked == []
    assert "to instantiate a model of type" not in caplog.text


WITHOUT_PACKAGE = """
import sys
sys.modules["madtp_hf"] = None
from transformers import AutoProcessor, pipeline
for trust in (True, False):
    print(type(AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=trust)).__name__)
    if trust:
        pipeline("visual-question-answering", model=sys.argv[1], trust_remote_code=True)
        print("no longer trusted", file=sys.stderr)
"""


def test_the_documented_calls_for_a_processor_ask_nothing(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(checkpoint)]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240)
    assert result.returncode == 0 and result.stdout.split() == ["BlipProcessor"] * 2, result.stderr
    trusted = result.stderr.partition("no longer trusted")[0]
    assert "to instantiate a model of type" not in trusted


def ask_checkpoint(*arguments, **options):
    command = [sys.executable, str(EXAMPLES / "ask_checkpoint.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


def test_ask_checkpoint_says_how_it_is_called(checkpoint):
    shown = ask_checkpoint("--help")
    assert shown.returncode == 0 and "checkpoint" in shown.stdout and "JSON list of pairs" in shown.stdout
    for arguments in ((), (checkpoint,), (checkpoint, "how many?"), (checkpoint, '["scene.png", "how many?"]')):
        result = ask_checkpoint(*arguments)
        assert result.returncode == 2 and "usage:" in result.stderr and "Traceback" not in result.stderr


def test_ask_checkpoint_answers(checkpoint, tmp_path):
    Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / "scene.png")
    result = ask_checkpoint(checkpoint, json.dumps([["scene.png", "how many?"], ["scene.png", "red?"]]), cwd=tmp_path)
    lines = [line for line in result.stdout.splitlines() if line.startswith("scene.png")]
    assert len(lines) == 2 and all("'answer'" in line and "'score'" in line for line in lines), result.stderr
