"""What lasts: a checkpoint says which code it holds, and what earlier versions have saved gives what was recorded with
it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoProcessor
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

import madtp_hf
from madtp_hf import MadtpBlipConfig, MadtpBlipForQuestionAnswering
from madtp_hf.modeling.versions import TESTED_TRANSFORMERS, VERSION

from .helpers import check_checkpoint, make_frozen_checkpoint
from .test_checkpoint import WITHOUT_PACKAGE


FIXTURES = sorted(path for path in make_frozen_checkpoint.FIXTURES.glob("checkpoint-v*") if path.is_dir())
MODELING = Path(madtp_hf.__file__).parent / "modeling"
# The loader's own code, in a transformers that says to be another one.
LOAD_TWICE = """
sys.modules["transformers"].__version__ = task
from transformers.utils import logging
logging.disable_progress_bar()
for _ in range(2):
    AutoModel.from_pretrained(folder, trust_remote_code=True)
for _ in range(2):
    model_class = type(AutoModel.from_pretrained(folder, trust_remote_code=True))
    model_class(AutoConfig.from_pretrained(folder, trust_remote_code=True))
modules = [name for name in sys.modules if name.endswith(".versions") and "transformers_modules" in name]
assert len(modules) > 1, modules  # the loader imports it once for the configuration, and again for the model
print("RESULT" + json.dumps(sorted({sys.modules[name].VERSION for name in modules})))
"""


@pytest.fixture
def folder(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_checkpoint_says_which_version_it_is_of(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["madtp_version"] == VERSION == madtp_hf.__version__
    assert f'VERSION = "{VERSION}"' in (folder / "versions.py").read_text()
    # What an older version has saved is, saved again, this version's: its code goes with it.
    (folder / "config.json").write_text(json.dumps({**config, "madtp_version": "0.0.1"}))
    MadtpBlipConfig.from_pretrained(folder).save_pretrained(folder / "again")
    assert json.loads((folder / "again" / "config.json").read_text())["madtp_version"] == VERSION


def _next_minor(version: str, step: int) -> str:
    major, minor, *_ = map(int, version.split("."))
    return f"{major}.{minor + step}.0"


@pytest.mark.parametrize(
    ("installed", "says"),
    [
        pytest.param(TESTED_TRANSFORMERS[0], None, marks=pytest.mark.slow),
        # A patch of what was tested.
        (TESTED_TRANSFORMERS[1].rpartition(".")[0] + ".9", None),
        (
            _next_minor(TESTED_TRANSFORMERS[1], 1) + ".dev0",
            f"was tested with transformers up to {TESTED_TRANSFORMERS[1]} and this is "
            f'.*"transformers<={TESTED_TRANSFORMERS[1]}"',
        ),
        ("4.57.6", f"needs transformers {TESTED_TRANSFORMERS[0]} or newer and this is 4.57.6: install"),
    ],
)
def test_another_transformers_is_warned_of_once(folder, tmp_path, installed, says):

    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE + LOAD_TWICE, str(folder), installed],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == f'RESULT["{VERSION}"]'
    warnings = [line for line in result.stderr.splitlines() if f"The code of madtp_hf {VERSION}" in line]
    if says is None:
        assert warnings == []
    else:
        assert len(warnings) == 1 and re.search(says, warnings[0]), result.stderr


def test_a_checkpoint_s_files_require_torch_and_transformers_alone():
    """By transformers' own reading of them: it refuses to load a file whose imports are not installed."""
    needed = {package for path in MODELING.glob("*.py") for package in get_imports(path)}
    theirs = {"numpy", "typing_extensions"}  # which transformers and torch require
    assert needed - sys.stdlib_module_names - theirs == {"torch", "transformers"}


def test_the_model_file_imports_all_others_itself():
    """transformers 5.0 copies from a local folder what a file imports, and not what that imports in turn."""
    for name in ("configuration_madtp_blip", "modeling_madtp_blip", "pipeline_madtp_blip"):
        path = MODELING / f"{name}.py"
        all_files = {Path(file).stem for file in get_relative_import_files(path)}
        assert set(get_relative_imports(path)) == all_files - {name}


def test_there_is_a_frozen_checkpoint():
    if f"## {VERSION} (unreleased)" in (Path(__file__).parents[1] / "CHANGELOG.md").read_text():
        pytest.skip(f"{VERSION} is not released: its frozen checkpoint is made with the release")
    assert f"checkpoint-v{VERSION}" in [folder.name for folder in FIXTURES], (
        "a release has a frozen checkpoint: run `python -m tests.helpers.make_frozen_checkpoint`"
    )


@pytest.mark.parametrize("frozen", FIXTURES, ids=lambda folder: folder.name)
def test_a_frozen_checkpoint_keeps_its_code_and_weights(frozen):
    """It stands for what users have saved: a later version may not touch it."""
    recorded = frozen.with_name(f"{frozen.name}.sha256").read_text()
    assert "model.safetensors\n" in recorded and "modeling_madtp_blip.py\n" in recorded
    found = make_frozen_checkpoint.hashes(frozen)
    assert found == recorded, f"{frozen.name} was changed: restore it; a new version gets a folder of its own"


def test_a_frozen_checkpoint_is_made_for_a_new_version_alone(tmp_path):
    make_frozen_checkpoint.main(tmp_path)
    folder = tmp_path / f"checkpoint-v{VERSION}"
    made = make_frozen_checkpoint.hashes(folder)
    assert folder.with_name(f"{folder.name}.sha256").read_text() == made
    with pytest.raises(SystemExit, match=rf"checkpoint-v{re.escape(VERSION)} is there already.*raise VERSION"):
        make_frozen_checkpoint.main(tmp_path)
    assert make_frozen_checkpoint.hashes(folder) == made


@pytest.mark.parametrize("frozen", FIXTURES, ids=lambda folder: folder.name)
def test_todays_code_loads_what_earlier_versions_saved(frozen):
    model = check_checkpoint.load_whole(MadtpBlipForQuestionAnswering, frozen)
    assert type(model) is MadtpBlipForQuestionAnswering
    inputs, recorded = (load_file(frozen / name) for name in (check_checkpoint.INPUTS, check_checkpoint.OUTPUTS))
    for name, function in check_checkpoint.RECORDED.items():
        check_checkpoint.compare(function(model, inputs), recorded, name)
    processor = AutoProcessor.from_pretrained(frozen, trust_remote_code=True)
    answers = check_checkpoint.ask(model.as_pipeline(processor))
    check_checkpoint.compare_answers(answers, json.loads((frozen / check_checkpoint.ANSWER).read_text()))


@pytest.mark.parametrize("frozen", FIXTURES, ids=lambda folder: folder.name)
def test_a_frozen_checkpoints_own_code_still_runs(frozen):
    result = subprocess.run(
        [sys.executable, check_checkpoint.__file__, frozen], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert {"load", "pipeline", "save_and_load", *check_checkpoint.RECORDED} == set(found)
    assert set(found.values()) == {"passed"}


def test_a_changed_number_is_found():
    """The check itself: it fails where outputs differ."""
    import torch

    inputs = load_file(FIXTURES[-1] / check_checkpoint.INPUTS)
    recorded = load_file(FIXTURES[-1] / check_checkpoint.OUTPUTS)
    model = MadtpBlipForQuestionAnswering.from_pretrained(FIXTURES[-1])
    with torch.no_grad():
        model.alignment.tokens.mul_(0.5)
    with pytest.raises(AssertionError, match=r"pruned\.\w+ is .* recorded"):
        check_checkpoint.compare(check_checkpoint.pruned(model, inputs), recorded, "pruned")
