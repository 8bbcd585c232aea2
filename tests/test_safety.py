"""What SECURITY.md promises: nothing is unpickled, nothing is fetched by importing, nothing leaves or enters by a path
that a file names."""

import ast
import json
import os
import pickle
import re
import runpy
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import torch

import madtp_hf
from madtp_hf import convert_original_checkpoint, push_folder
from madtp_hf.checkpoints.card import create_model_card
from madtp_hf.data import load_flickr30k

from .conftest import TASKS, make_task_model
from .test_versions import FIXTURES


ROOT = Path(__file__).parents[1]
PACKAGE = Path(madtp_hf.__file__).parent


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


@pytest.fixture
def hostile(tmp_path):
    """Checkpoints that make the file `touched` if they are unpickled, in every form that torch has had."""
    content = {"model": {"space_dict": torch.ones(1), "more": Touch(tmp_path / "touched")}}
    files = [tmp_path / f"{form}.pth" for form in ("zip", "legacy", "plain", "tar")]
    torch.save(content, files[0])
    torch.save(content, files[1], _use_new_zipfile_serialization=False)
    files[2].write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with tarfile.open(files[3], "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = files[2].stat().st_size
            archive.addfile(member, BytesIO(files[2].read_bytes()))
    return files


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_hostile_checkpoint_is_refused_unrun(hostile, tmp_path):
    for file in hostile:
        with pytest.raises(
            ValueError, match=r"was refused: .* could run code; expected the file as its authors"
        ) as error:
            convert_original_checkpoint(file, "vqa")
        # One sentence, and not torch's advice to read it all the same.
        assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert not (tmp_path / "touched").exists()
    pickle.loads(hostile[2].read_bytes())  # it would have been
    assert (tmp_path / "touched").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_the_command_refuses_it_too(hostile, tmp_path):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from madtp_hf_cli import app

    for file in hostile:
        result = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "out"), "--task", "vqa"])
        assert result.exit_code == 1
        assert re.fullmatch(r"madtp-hf: .* was refused: .*\.\n", result.output), result.output
    assert not (tmp_path / "touched").exists() and not (tmp_path / "out").exists()


# What can run code that a file brings: by the name of the call, with the keyword that makes it harmless or harmful.
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def find_unsafe(source: str) -> list[str]:
    """The calls and imports in Python code that could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in FORBIDDEN_CALLS:
                found.append(name)
            if name == "torch.load" and given.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if re.fullmatch(r"yaml\.(unsafe_load|full_load|load)", name):
                found.append(name)
            for keyword in ("allow_pickle", "shell", "trust_remote_code"):
                if given.get(keyword, "False") != "False":
                    found.append(f"{keyword}={given[keyword]}")
    return found


def test_no_code_of_ours_runs_what_a_file_holds():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    found = {file.name: unsafe for file in files if (unsafe := find_unsafe(file.read_text()))}
    # An endpoint's handler is a part of the checkpoint whose code it runs.
    assert found == {"endpoint_handler.py": ["trust_remote_code=True"]}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval('1')",
        "import pickle",
        "np.load(path, allow_pickle=True)",
        "run(command, shell=True)",
        "os.system('true')",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_what_that_test_would_find(line):
    assert find_unsafe(line) and not find_unsafe("torch.load(path, weights_only=True); model.eval()")


NO_NETWORK = """
import socket, sys
def refuse(*arguments, **options):
    tried.append(arguments)
    raise OSError("no network in this test")
tried = []
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.create_connection = socket.gethostbyname = refuse
"""


@pytest.mark.parametrize(
    "code",
    [
        "import madtp_hf, madtp_hf_cli, madtp_hf.data, madtp_hf.metrics",
        """
sys.modules["madtp_hf"] = None
from transformers import AutoModel, pipeline
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline("visual-question-answering", model=sys.argv[1], trust_remote_code=True)
""",
    ],
    ids=["package", "remote code"],
)
def test_importing_and_loading_ask_no_network(code, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    result = subprocess.run(
        [sys.executable, "-c", NO_NETWORK + code + "\nassert not tried, tried", FIXTURES[-1]],
        capture_output=True,
        text=True,
        timeout=240,
        env={**environment, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "a/../../secret.jpg", "..\\secret.jpg"])
def test_a_reader_follows_no_path_out_of_the_image_folder(tmp_path, path):
    pytest.importorskip("datasets")
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    file = images / "flickr30k_train.json"
    file.write_text(json.dumps([{"image": path, "caption": "a caption"}]))
    with pytest.raises(ValueError, match=r"entry 1: image path .* leads out of the image folder"):
        load_flickr30k(file, "train")


@pytest.fixture
def folder(model, processor, tmp_path):
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (tmp_path / "secret.py").write_text("KEY = 1\n")
    (tmp_path / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return folder


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_push_takes_no_file_from_outside_the_folder(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())

    def refused(message):
        with pytest.raises(ValueError, match=message):
            push_folder(folder, "org/name", dry_run=True)

    push_folder(folder, "org/name", dry_run=True)  # as it is, it goes
    for name in ("../secret", str(tmp_path / "secret"), "..\\secret", "sub/../../secret"):
        edit(folder / "config.json", auto_map={**config["auto_map"], "AutoModelForCausalLM": f"{name}.Model"})
        refused("expected the name of a file in that folder, without a path")
    edit(folder / "config.json", auto_map=config["auto_map"])
    pipelines = {"secret": {**config["custom_pipelines"]["visual-question-answering"], "impl": "../secret.Pipeline"}}
    edit(folder / "config.json", custom_pipelines=pipelines)
    refused("refers to '../secret.py'")
    edit(folder / "config.json", custom_pipelines=config["custom_pipelines"])

    module = folder / "versions.py"
    code = module.read_text()
    module.write_text(
        f"{code}\nfrom ./../secret import KEY\n"
    )  # no Python, but the loader's search for imports takes it
    refused("expected the name of a file in that folder")
    module.unlink()
    module.symlink_to(tmp_path / "secret.py")
    refused(r"versions.py is a symlink to .*secret.py, outside the folder: replace it with the file")
    module.unlink()
    module.write_text(code)
    (folder / "NOTICE").symlink_to(tmp_path / "secret.py")
    refused("NOTICE is a symlink to")
    (folder / "NOTICE").unlink()

    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    for shard in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"alignment.tokens": shard}}))
        refused("expected the name of a file in that folder")


def test_a_download_can_be_pushed_on(folder, tmp_path):
    """The hub's cache is made of links from snapshots to blobs, which leave the folder and not the repository."""
    blobs, snapshot = tmp_path / "models--org--name" / "blobs", tmp_path / "models--org--name" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    push_folder(snapshot, "org/again", dry_run=True)


def unpinned(document: str, code: str) -> list[str]:
    """Calls in `code` that run a Hub repository's code, whatever it is by then: trust_remote_code=True without
    revision.

    A source is local if the document saves to it under that very name, or if it is a path.
    """
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if "trust_remote_code" not in given or ast.unparse(given["trust_remote_code"]) == "False":
            continue
        is_pipeline = ast.unparse(node.func) == "pipeline"
        source = given.get("model") if is_pipeline else (node.args or [None])[0]
        name = source.value if isinstance(source, ast.Constant) else None
        is_local = name is not None and (
            name.startswith(("/", "./", "../"))
            or f'save_pretrained("{name}")' in document
            or Path(ROOT, name).is_dir()
        )
        if not is_local and "revision" not in given:
            found.append(ast.unparse(node))
    return found


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def documents() -> list[Path]:
    return [
        ROOT / "README.md",
        *sorted(ROOT.glob("docs/*.md")),
        *sorted(ROOT.glob("examples/*/README.md")),
        *sorted(ROOT.glob("model_cards/*.md")),
    ]


def test_documented_remote_code_is_pinned(monkeypatch):
    seen = 0
    for path in documents():
        for block in code_blocks(path.read_text()):
            if "trust_remote_code" in block:
                seen += 1
                assert unpinned(path.read_text(), block) == [], path
    assert seen  # README's
    # The examples take a folder from the command line, and one that is there: a Hub id there would run what it holds
    # by then.
    for path in sorted(ROOT.glob("examples/*.py")):
        for call in unpinned("", path.read_text()):
            assert path.name == "ask_checkpoint.py", (path, call)
    script = ROOT / "examples" / "ask_checkpoint.py"
    monkeypatch.setitem(sys.modules, "madtp_hf", madtp_hf)  # the script takes it away
    monkeypatch.setattr(sys, "argv", [str(script), "org/name", "[]"])
    with pytest.raises(SystemExit, match="There is no folder org/name"):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("task", TASKS)
def test_a_cards_remote_code_is_pinned(task):
    text = str(create_model_card(make_task_model(task).config, "org/name"))
    blocks = [block for block in code_blocks(text) if "trust_remote_code" in block]
    assert blocks and all("revision=" in block for block in blocks)
    assert [unpinned(text, block) for block in blocks] == [[]] * len(blocks)


def test_what_those_tests_would_find():
    call = 'AutoModel.from_pretrained("org/name", trust_remote_code=True{})'
    assert unpinned("", call.format("")) and not unpinned("", call.format(', revision="0a1b"'))
    assert not unpinned('model.save_pretrained("org/name")', call.format(""))
    assert unpinned("", 'pipeline("vqa", model=checkpoint, trust_remote_code=True)')
