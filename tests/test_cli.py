import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import BertTokenizer


pytest.importorskip("typer")
from typer.testing import CliRunner

from madtp_hf import MadtpBlipConfig, __version__, convert_original_checkpoint
from madtp_hf.tasks import TASKS as ALL_TASKS
from madtp_hf_cli import app

from .conftest import WORDS, blip_config
from .test_conversion import assert_same, outputs, to_original, with_training_state


REPOSITORY = Path(__file__).parents[1]
LAYOUTS = {"vqa": "madtp", "captioning": "blip", "nlvr2": "madtp", "retrieval": "blip"}


def invoke(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


TASKS = {name: task for name, task in ALL_TASKS.items() if task.family.name == "BLIP"}


def make_checkpoint(task, folder):
    """A small checkpoint in the original layout, with heads as wide as BLIP's; the vision towers of two tasks are
    wider than their text."""
    vision_width = 128 if task in ("vqa", "captioning") else 64
    config = blip_config(
        text_config={"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1},
        vision_config={"hidden_size": vision_width, "num_attention_heads": vision_width // 64, "num_hidden_layers": 2},
        image_text_hidden_size=24,
    ).to_dict()
    config.pop("model_type")
    torch.manual_seed(3)
    model = TASKS[task].model_class(MadtpBlipConfig(num_alignment_tokens=12, **config))
    content = with_training_state(to_original(model, alignment=LAYOUTS[task] == "madtp"))
    if LAYOUTS[task] == "blip":
        del content["temperature"]
    torch.save(content, folder / f"{task}.pth")
    return folder / f"{task}.pth"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a checkpoint of each task and the tokenizer of them all, of 38 tokens, without BLIP's two."""
    folder = tmp_path_factory.mktemp("source")
    for task in TASKS:
        make_checkpoint(task, folder)
    (folder / "bert").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "?"]
    words += [f"[unused{index}]" for index in range(38 - len(words))]
    (folder / "bert" / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


LOAD = """
import json, os, re, sys
import torch
from transformers import AutoModel, AutoProcessor
from tests.test_conversion import assert_same, outputs
os.chdir(sys.argv[1])  # the model cards name the folders by their last part
for task, expected in torch.load("expected.pt", weights_only=True).items():
    model, info = AutoModel.from_pretrained(f"{task}-model", trust_remote_code=True, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__module__.startswith("madtp_hf."), type(model)  # where the package is, its own code is taken
    assert_same(outputs(model, task), expected[0])
    assert_same(outputs(model, task, 3.0), expected[1])
    processor = AutoProcessor.from_pretrained(f"{task}-model", trust_remote_code=True)
    assert type(processor).__name__ == "BlipProcessor", type(processor)
    image_size = processor.image_processor.size
    assert image_size["height"] == image_size["width"] == model.config.vision_config.image_size
    assert [round(mean, 3) for mean in processor.image_processor.image_mean] == [0.481, 0.458, 0.408]
    assert processor.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]", "[SEP]"]) == [38, 39, 3]
    assert processor.tokenizer.bos_token == "[DEC]" and processor.tokenizer.model_max_length == 24
    if model.can_generate():
        settings = json.load(open(f"{task}-model/generation_config.json"))
        assert (settings["bos_token_id"], settings["eos_token_id"], settings["pad_token_id"]) == (38, 3, 0)
    usage = re.search(r"```python\\n(.*?)```", open(f"{task}-model/README.md").read(), re.DOTALL).group(1)
    exec(usage, {})
print("all four")
"""


def run(*arguments, cache):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=REPOSITORY,
        timeout=240,
    )


def test_what_it_writes_loads_with_auto_classes(source, tmp_path):
    expected = {}
    for task in TASKS:
        checkpoint = source / f"{task}.pth"
        size = ["--image-size", 64] if task == "retrieval" else []
        folder = tmp_path / f"{task}-model"
        result = invoke(checkpoint, folder, "--task", task, "--tokenizer", source / "bert", *size)
        assert result.exit_code == 0, result.stderr
        assert str(folder) in result.stdout and f"images of {64 if size else 48} x" in result.stdout
        assert {
            "README.md",
            "config.json",
            "configuration_madtp_blip.py",
            "model.safetensors",
            "modeling_madtp_blip.py",
            "token_pruning.py",
            "tokenizer.json",
            "tokenizer_config.json",
        } <= set(listing(folder))
        assert not any(name.endswith((".bin", ".pth", ".pt", ".pkl")) for name in listing(folder))

        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "transformers" and {"blip", "madtp"} <= set(card.data.tags)
        assert card.data.license is None and "license" in card.text and f"`{task}.pth`" in card.text
        tags = {"vqa": "visual-question-answering", "captioning": "image-to-text"}
        assert card.data.pipeline_tag == tags.get(task)
        temperature = "temperature=7.5)" if LAYOUTS[task] == "madtp" else "temperature=1.0)"
        assert temperature in card.text and ("alignment tokens are new" in card.text) == (LAYOUTS[task] == "blip")

        model = convert_original_checkpoint(checkpoint, task, image_size=64 if size else None)
        model.config.text_config.sep_token_id = 3
        if LAYOUTS[task] == "blip":  # new alignment tokens are random: take those that were written
            saved = TASKS[task].model_class.from_pretrained(folder)
            model.alignment.load_state_dict(saved.alignment.state_dict())
        images = {"image_size": 64 if size else 48}
        expected[task] = outputs(model, task, **images), outputs(model, task, 3.0, **images)
        if size:  # the subprocess gives images of 48 pixels: compare those of 64 here
            assert_same(outputs(saved, task, 3.0, **images), expected[task][1])
            del expected[task]
    assert listing(tmp_path)[0] == "captioning-model"  # no scratch folder, whose name begins with a dot

    torch.save(expected, tmp_path / "expected.pt")
    for name in ("image", "left", "right"):
        Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / f"{name}.jpg")
    loaded = run("-c", LOAD, tmp_path, cache=tmp_path / "modules")
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert loaded.stdout.endswith("all four\n")


def test_the_command_as_a_process(source, tmp_path):
    out = tmp_path / "new" / "model"
    arguments = source / "vqa.pth", out, "--task", "vqa", "--tokenizer", source / "bert"
    written = run("-m", "madtp_hf_cli", "convert", *arguments, cache=tmp_path)
    assert written.returncode == 0, written.stderr
    assert written.stdout == f"{out}: MadtpBlipForQuestionAnswering, 0.3 M parameters, images of 48 x 48 pixels.\n"
    assert (out / "model.safetensors").is_file() and listing(out.parent)[0] == "model"


def test_what_weights_do_not_tell_is_an_option_or_said(source, tmp_path):
    arguments = source / "vqa.pth", tmp_path / "out", "--task", "vqa", "--tokenizer", source / "bert"
    assumed = invoke(*arguments)
    assert assumed.exit_code == 0, assumed.output
    said = "madtp-hf: Assumed, because weights don't tell: 2 attention heads in the vision and 1 in the text tower,"
    said += " the activation gelu, the original's norms and special tokens. If the checkpoint was trained with others,"
    assert f"{said} pass --heads, --activation or --config.\n" in assumed.stderr
    given = invoke(*arguments, "--heads", 8, 4, "--activation", "quick_gelu", "--force")
    assert (
        given.exit_code == 0 and "heads in" not in given.stderr and "activation" not in given.stderr.split(". If")[0]
    )
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    towers = [fields[f"{name}_config"] for name in ("vision", "text")]
    assert [(tower["num_attention_heads"], tower["hidden_act"]) for tower in towers] == [
        (8, "quick_gelu"),
        (4, "quick_gelu"),
    ]
    # The configuration that was written says it all.
    arguments = arguments[0], tmp_path / "again", *arguments[2:]
    again = invoke(*arguments, "--config", tmp_path / "out")
    assert again.exit_code == 0 and "Assumed" not in again.stderr, again.output
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written == fields
    (tmp_path / "other.json").write_text("{}")
    for file, message in (("nowhere.json", "can't be read"), ("other.json", "has no text_config and vision_config")):
        refused = invoke(*arguments, "--config", tmp_path / file, "--force")
        assert refused.exit_code == 1 and message in refused.stderr


def test_help_and_version():
    assert CliRunner().invoke(app, ["version"]).stdout.strip() == __version__
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == __version__
    # Wherever colours or a narrow terminal put their marks, the words are there.
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    whole = CliRunner().invoke(app, ["--help"], env=environment).stdout
    assert "convert" in whole and "push" in whole and "version" in whole
    shown = CliRunner().invoke(app, ["convert", "--help"], env=environment).stdout
    for word in ("IN", "OUT", "--task", "--tokenizer", "--image-size", "--force", "bert-base-uncased", *ALL_TASKS):
        assert word in shown
    unknown = invoke("model.pth", "out", "--task", "gqa")
    assert unknown.exit_code == 2 and "gqa" in unknown.stderr


def test_help_is_quick():
    """What pip installs as `madtp-hf` imports no torch, not even by way of this package."""
    module = re.search(r'^madtp-hf = "(\w+):app"', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)[1]
    code = f"""
import sys
from {module} import app
try:
    app(["convert", "--help"])
finally:
    print(sorted({{"torch", "transformers", "madtp_hf"}} & set(sys.modules)))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--image-size" in shown and shown.endswith("[]\n")


def test_bad_inputs_are_one_message_and_leave_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    bert = source / "bert"
    (tmp_path / "truncated.pth").write_bytes((source / "vqa.pth").read_bytes()[:5000])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog"]) + "\n"
    )
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text("{}")
    (tmp_path / "without").mkdir()
    before = listing(tmp_path)
    vqa, out = source / "vqa.pth", tmp_path / "out"
    for arguments, message in (
        ((tmp_path / "nowhere.pth", out, "vqa", bert), "No checkpoint file at .*nowhere.pth"),
        ((tmp_path / "truncated.pth", out, "vqa", bert), "truncated"),
        (
            (source / "retrieval.pth", out, "vqa", bert),
            "not of task 'vqa': .* looks like a checkpoint of task 'retrieval'",
        ),
        (
            (vqa, tmp_path / "full", "vqa", bert),
            "full is not empty: choose another folder, or replace everything in it with --force",
        ),
        ((vqa, tmp_path / "file", "vqa", bert), "file is a file: expected the name of a folder"),
        ((vqa, out, "vqa", bert, "--image-size", "50"), "--image-size 50: expected a multiple of .* patch size, 8"),
        (
            (vqa, out, "vqa", tmp_path / "few"),
            "few' has 8 tokens, .DEC. 6 and .ENC. 7; the checkpoint has 40, 38 and 39",
        ),
        ((vqa, out, "vqa", tmp_path / "damaged"), "damaged' could not be loaded .*: pass --tokenizer FOLDER"),
        ((vqa, out, "vqa", tmp_path / "without"), "without' could not be loaded .*: pass --tokenizer FOLDER"),
        (
            (vqa, out, "vqa", "no-such/tokenizer"),
            "'no-such/tokenizer' could not be loaded .*: pass --tokenizer FOLDER",
        ),
    ):
        checkpoint, folder, task, tokenizer, *more = arguments
        result = invoke(checkpoint, folder, "--task", task, "--tokenizer", tokenizer, *more)
        assert (result.exit_code, result.stdout) == (1, ""), result.output
        assert re.fullmatch(f"madtp-hf: .*{message}.*\n", result.stderr, re.DOTALL), result.stderr
        assert "Traceback" not in result.stderr
        assert listing(tmp_path) == before


def test_force_replaces_a_folder_and_failure_does_not(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()  # empty: no need of --force
    arguments = source / "nlvr2.pth", out, "--task", "nlvr2", "--tokenizer", source / "bert"
    assert invoke(*arguments).exit_code == 0
    (out / "stale.txt").touch()
    assert invoke(*arguments).exit_code == 1
    with monkeypatch.context() as patch:  # a full disk, when all but the card is written
        patch.setattr(ModelCard, "save", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
        result = invoke(*arguments, "--force")
    assert result.exit_code == 1 and result.stderr.endswith(
        "madtp-hf: no space left on device\n"
    )  # behind a progress bar
    assert (out / "stale.txt").exists() and listing(tmp_path)[0] == "out"
    assert invoke(*arguments, "--force").exit_code == 0
    assert not (out / "stale.txt").exists() and (out / "config.json").exists()
    assert listing(tmp_path)[0] == "out"
    # What is to be read, and where one stands, is not swept away.
    checkpoint = make_checkpoint("nlvr2", out)
    for folder in (out, tmp_path):
        result = invoke(checkpoint, folder, *arguments[2:], "--force")
        assert result.exit_code == 1 and "can't be replaced, because " in result.stderr
    monkeypatch.chdir(out)
    result = invoke(*arguments, "--force")
    assert result.exit_code == 1 and "can't be replaced, because " in result.stderr and checkpoint.exists()


def test_a_tokenizer_that_has_blip_tokens_is_taken_as_it_is(source, tmp_path):
    tokenizer = BertTokenizer.from_pretrained(source / "bert")
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    tokenizer.save_pretrained(tmp_path / "blip")
    result = invoke(source / "vqa.pth", tmp_path / "out", "--task", "vqa", "--tokenizer", tmp_path / "blip")
    assert result.exit_code == 0, result.stderr
    assert len(BertTokenizer.from_pretrained(tmp_path / "out")) == 40
