"""Publishing a Space, against a hub on 127.0.0.1; what is published is run as the real one would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from madtp_hf import push_folder
from madtp_hf.serving.space import push_space, read_examples

from .conftest import make_processor, make_task_model


typer = pytest.importorskip("typer", reason="the command needs typer")
QUESTION = "how many sevens are there?"


def picture(seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 48, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    model = make_task_model("vqa", {"pruning_schedule": [[0.2, 0.3], [0.5, 3.0], [0.7, 30.0]]})
    model.save_pretrained(tmp_path / "tiny-vqa")
    make_processor().save_pretrained(tmp_path / "tiny-vqa")
    return tmp_path / "tiny-vqa"


def header(readme: bytes) -> dict:
    return yaml.safe_load(readme.decode().split("---")[1])


RUN = """
import sys
import app, madtp_hf
assert madtp_hf.__file__.startswith(sys.argv[1]), madtp_hf.__file__
show = next(function.fn for function in app.app.fns.values() if function.fn.__name__ == "show")
from PIL import Image
image, question = app.examples[0]
print("ANSWER", show(Image.open(image), question, 0.6)[0])
"""


def run_space(files: dict[str, bytes], where: Path, **environment) -> str:
    """Start what a Space holds as its own process does, ask the first example, and return what is printed."""
    for name, content in files.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_bytes(content)
    environment = {**os.environ, "PYTHONPATH": str(where), "GRADIO_ANALYTICS_ENABLED": "False", **environment}
    command = [sys.executable, "-c", RUN, str(where)]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_space_of_a_folder_is_complete(hub, folder):
    url = push_space(folder, "org/look", examples=[(picture(), QUESTION)], token="hf_alice")
    assert url == f"{hub.url}/spaces/org/look"
    files = hub.files("spaces/org/look")
    assert {"app.py", "requirements.txt", "README.md", "examples/0.png", "model/model.safetensors"} <= set(files)
    assert header(files["README.md"])["sdk"] == "gradio" and header(files["README.md"])["app_file"] == "app.py"
    assert "transformers" in files["requirements.txt"].decode()
    assert len(hub.repositories["spaces/org/look"].commits) == 2  # the first is the hub's own


@pytest.mark.slow
def test_a_space_of_a_folder_runs(hub, folder, tmp_path):
    pytest.importorskip("gradio", reason="the app needs gradio")
    push_space(folder, "org/look", examples=[(picture(), QUESTION)], token="hf_alice")
    assert "GFLOPs" in run_space(hub.files("spaces/org/look"), tmp_path / "space", HF_HUB_OFFLINE="1")


@pytest.mark.slow
def test_a_space_of_a_model_on_the_hub_loads_it_from_there(hub, folder, tmp_path):
    pytest.importorskip("gradio", reason="the app needs gradio")
    push_folder(folder, "org/tiny-vqa", token="hf_alice")
    push_space("org/tiny-vqa", "look", examples=[(picture(), QUESTION)], token="hf_alice")
    files = hub.files("spaces/alice/look")
    assert header(files["README.md"])["models"] == ["org/tiny-vqa"]
    assert not [name for name in files if name.startswith("model/")]
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    assert "GFLOPs" in run_space(files, tmp_path / "space", HF_HUB_DISABLE_XET="1", **environment)


def test_what_a_former_space_had_goes(hub, folder):
    push_space(folder, "org/look", examples=[(picture(seed), QUESTION) for seed in range(3)], token="hf_alice")
    assert "examples/2.png" in hub.files("spaces/org/look")
    push_space(folder, "org/look", examples=[(picture(), QUESTION)], token="hf_alice", requirement="madtp_hf[app]")
    files = hub.files("spaces/org/look")
    assert "examples/0.png" in files and "examples/2.png" not in files
    assert not [name for name in files if name.startswith("madtp_hf/")]
    assert files["requirements.txt"] == b"madtp_hf[app]\n"


def test_a_dry_run_shows_and_touches_nothing(hub, folder, capsys):
    push_space(folder, "org/look", dry_run=True)
    shown = capsys.readouterr().out
    assert f"{hub.url}/spaces/org/look" in shown
    assert "sdk: gradio" in shown and "model/model.safetensors" in shown and "madtp_hf/" in shown
    push_space("org/tiny-vqa", "org/look", dry_run=True)
    assert "org/tiny-vqa" in capsys.readouterr().out
    assert hub.requests == []


def test_what_cannot_be_published_is_named_before_anything_is_made(hub, folder, tmp_path):
    make_task_model("vqa").save_pretrained(tmp_path / "dense")
    make_processor().save_pretrained(tmp_path / "dense")
    cases = [
        ((tmp_path / "dense", "org/look"), {}, ValueError, "has no calibrated schedule"),
        ((folder, "org/look/too"), {}, ValueError, "can't be the name of a repository"),
        ((folder, "org/look"), {"examples": ["scene.png"]}, ValueError, "examples has 'scene.png' as its item 0"),
        (
            (folder, "org/look"),
            {"examples": [(tmp_path / "no.png", "?")]},
            ValueError,
            "no.png can't be read: no such file",
        ),
        ((tmp_path, "org/look"), {}, FileNotFoundError, "config.json"),
        ((folder, "bob/look"), {}, PermissionError, "may not write"),
        ((3, "org/look"), {}, TypeError, "a int as model"),
        ((folder, "org/look"), {"examples": [(Image.new("1", (5000, 5000)), "?")]}, ValueError, "5000 x 5000 pixels"),
        ((folder, "org/look"), {"examples": [(picture(), "a" * 2001)]}, ValueError, "example 0 has 2,001 characters"),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            push_space(*arguments, **{"token": "hf_alice", **options})
    with pytest.raises(PermissionError, match="no token"):
        push_space(folder, "org/look")
    assert hub.repositories == {}


def test_examples_are_read_from_a_file(tmp_path):
    picture().save(tmp_path / "scene.png")
    (tmp_path / "examples.json").write_text(json.dumps([["scene.png", QUESTION]]))
    assert read_examples(tmp_path / "examples.json") == [(tmp_path / "scene.png", QUESTION)]
    for content, message in (("{", "is not valid JSON"), ("{}", "holds a dict"), ('[["scene.png"]]', "as its item 0")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_examples(tmp_path / "bad.json")


def call(*arguments):
    from typer.testing import CliRunner

    from madtp_hf_cli import app

    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_publishes_both(hub, folder, tmp_path):
    picture().save(tmp_path / "scene.png")
    (tmp_path / "examples.json").write_text(json.dumps([["scene.png", QUESTION]]))
    done = call(
        "push", folder, "org/tiny", "--space", "org/look", "--examples", tmp_path / "examples.json", "--dry-run"
    )
    assert done.exit_code == 0 and "model.safetensors" in done.output and f"{hub.url}/spaces/org/look" in done.output
    assert hub.requests == []
    publish = ("push", folder, "org/tiny", "--space", "org/look", "--token", "hf_alice")
    done = call(*publish, "--examples", tmp_path / "examples.json")
    assert done.stdout == f"{hub.url}/org/tiny\n{hub.url}/spaces/org/look\n"
    assert b"load('org/tiny'" in hub.files("spaces/org/look")["app.py"]
    assert "examples/0.png" in hub.files("spaces/org/look")
    done = call("push", folder, "org/tiny2", "--space", "org/look2", "--private", "--token", "hf_alice")
    assert done.exit_code == 0 and "model/config.json" in hub.files("spaces/org/look2")
    assert hub.repositories["spaces/org/look2"].private


def test_the_command_names_what_is_wrong_and_publishes_nothing(hub, folder, tmp_path):
    make_task_model("retrieval").save_pretrained(tmp_path / "retrieval")
    make_processor().save_pretrained(tmp_path / "retrieval")
    for arguments, message in (
        ((tmp_path / "retrieval", "org/a", "--space", "org/b"), "is a model for retrieval"),
        ((folder, "org/a", "--examples", "x.json"), "--examples is for a Space"),
        ((folder, "org/a", "--space", "org/b", "--examples", tmp_path / "no.json"), "no.json"),
    ):
        done = call("push", *arguments, "--token", "hf_alice")
        assert done.exit_code == 1 and message in done.output.replace("\n", " "), done.output
    assert hub.repositories == {}
