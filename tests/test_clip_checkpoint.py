"""A saved CLIP, used where this package cannot be imported; its conversion, card and publication."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, pipeline
from typer.testing import CliRunner

from madtp_hf import MadtpClipConfig, MadtpClipModel, push_checkpoint
from madtp_hf.checkpoints.card import create_model_card
from madtp_hf.checkpoints.push import find_checkpoint_files
from madtp_hf.serving.visualization import draw_surviving_patches
from madtp_hf_cli import app

from .helpers.clip import make_clip, make_clip_inputs, make_clip_model, make_clip_processor
from .test_checkpoint import run
from .test_clip_conversion import to_original


LABELS = ["cat", "dog", "toad"]


@pytest.fixture
def checkpoint(tmp_path):
    model = make_clip_model({"pruning_schedule": [[0.4, 1.0], [0.6, 4.0]]})
    model.set_pruning(reduction=0.5)
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    make_clip_processor().save_pretrained(folder)
    return folder


def test_a_checkpoint_has_clips_code_alone(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "modeling_madtp_clip.py", "configuration_madtp_clip.py"} <= names
    assert {"token_pruning.py", "tokenizer.json"} <= names
    assert not any("blip" in name or name.endswith((".bin", ".pth", ".pt", ".pkl")) for name in names)
    config = json.loads((checkpoint / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("madtp_clip", ["MadtpClipModel"])
    assert config["auto_map"] == {
        "AutoConfig": "configuration_madtp_clip.MadtpClipConfig",
        "AutoModel": "modeling_madtp_clip.MadtpClipModel",
        "AutoModelForZeroShotImageClassification": "modeling_madtp_clip.MadtpClipModel",
    }
    assert (
        set(find_checkpoint_files(checkpoint)) == names
    )  # no file is left out of what is published, and none too many


def test_it_loads_and_classifies_without_the_package(checkpoint, tmp_path):
    model, inputs = MadtpClipModel.from_pretrained(checkpoint).eval(), make_clip_inputs()
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
    torch.save(inputs, tmp_path / "inputs.pt")
    Image.effect_noise((48, 48), 90).convert("RGB").save(tmp_path / "image.png")
    result = run(
        """
from transformers import AutoModelForZeroShotImageClassification
inputs = torch.load(sys.argv[2], weights_only=True)
logits = []
for auto in (AutoModel, AutoModelForZeroShotImageClassification):
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__ == "MadtpClipModel", type(model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        logits.append(model(**inputs).logits_per_image.tolist())
model.set_pruning(reduction=0.6)
assert model.config.pruning_temperature == 4.0
again = sys.argv[3] + "/again"
model.save_pretrained(again)
AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
answers = []
for source in (folder, again):
    classify = pipeline("zero-shot-image-classification", model=source, trust_remote_code=True)
    classify.model.set_pruning(reduction=0.5)
    answers.append(classify(sys.argv[3] + "/image.png", candidate_labels=["cat", "dog", "toad"]))
print("RESULT" + json.dumps([logits, answers]))
""",
        checkpoint,
        tmp_path / "inputs.pt",
        tmp_path,
        cache=tmp_path / "modules",
    )
    for logits in result[0]:
        torch.testing.assert_close(torch.tensor(logits), expected)
    here = pipeline("zero-shot-image-classification", model=str(checkpoint))
    answers = here(str(tmp_path / "image.png"), candidate_labels=LABELS)
    assert [answer["label"] for answer in answers] == [answer["label"] for answer in result[1][0]]
    for mine, theirs, again in zip(answers, *result[1]):
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-4)
        assert again["score"] == pytest.approx(theirs["score"], abs=1e-4)


def test_whoever_has_the_package_needs_no_trust(checkpoint):
    assert type(AutoConfig.from_pretrained(checkpoint)) is MadtpClipConfig
    for auto_class in (AutoModel, AutoModelForZeroShotImageClassification):
        model = auto_class.from_pretrained(checkpoint)
        assert type(model) is MadtpClipModel and model.is_pruning


def test_converted_by_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 64, "num_attention_heads": 1}
    clip = make_clip(text_config=sizes, vision_config=sizes)
    torch.save(to_original(clip, alignment=False), "clip.pth")
    make_clip_processor().save_pretrained("tokenizer")
    arguments = ["convert", "clip.pth", "out", "--task", "clip", "--tokenizer", "tokenizer"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "MadtpClipModel" in result.output and "48 x 48" in result.output
    model, inputs = MadtpClipModel.from_pretrained("out").eval(), make_clip_inputs()
    torch.testing.assert_close(model(**inputs).logits_per_image, clip(**inputs).logits_per_image, atol=1e-4, rtol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: zero-shot-image-classification" in card and "radford2021clip" in card
    assert "transformers' CLIP" in card and "BLIP" not in card.replace("https", "")
    Image.effect_noise((60, 40), 90).convert("RGB").save("image.jpg")
    code = card.partition("```python\n")[2].partition("```")[0]
    exec(code.replace('"out"', repr(str(tmp_path / "out"))), {})
    # A tokenizer of another vocabulary is refused.
    torch.save(
        to_original(make_clip(text_config={**sizes, "vocab_size": 120}, vision_config=sizes), False), "clip.pth"
    )
    result = CliRunner().invoke(app, [*arguments, "--force"])
    assert result.exit_code == 1
    assert "has 98 tokens" in result.output and "openai/clip-vit-base-patch32" in result.output


def test_the_card_of_a_dense_clip_says_how_to_prune_it():
    clip = make_clip()
    clip.config.architectures = ["CLIPModel"]
    card = create_model_card(clip.config, "org/clip").text
    assert "MadtpClipModel.from_clip(" in card and "A dense CLIP that" in card


def test_it_is_published_and_drawn(checkpoint, capsys):
    model, processor = MadtpClipModel.from_pretrained(checkpoint), make_clip_processor()
    push_checkpoint(model, processor, "org/clip", metrics={"accuracy": 0.5}, dry_run=True)
    shown = capsys.readouterr().out
    assert "modeling_madtp_clip.py" in shown and "- clip" in shown and "blip" not in shown
    images = [Image.effect_noise((48, 48), 90).convert("RGB")] * 2
    picture = draw_surviving_patches(model, processor, images, ["a dog on a beach", "a cat"], size=48)
    assert picture.width > 4 * 48
