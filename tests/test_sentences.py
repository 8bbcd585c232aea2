"""Mistakes that people make are answered by one sentence: what was given, what is expected, what to do."""

import builtins

import pytest
import torch

from madtp_hf import MadtpBlipForQuestionAnswering, calibrate
from madtp_hf.budgets.calibration import ACCEPTED
from madtp_hf.data import digit_scenes
from madtp_hf.metrics import METRICS, load_metric

from .conftest import make_inputs, make_task_model
from .helpers.clip import make_clip, make_clip_model


def test_a_checkpoint_of_another_family_is_named(tmp_path):
    make_clip().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a CLIPModel: expected a BlipForQuestionAnswering"):
        MadtpBlipForQuestionAnswering.from_blip(tmp_path)
    with pytest.raises(ValueError, match=r"other shapes than a Madtp.*expected a checkpoint.*from_blip"):
        MadtpBlipForQuestionAnswering.from_pretrained(tmp_path)


@pytest.mark.parametrize("model", [make_task_model("vqa"), make_clip_model()], ids=["blip", "clip"])
def test_pruning_needs_a_setting(model):
    model.set_pruning(temperature=3.0)
    for call in (model.set_pruning, lambda: model.pruning().__enter__()):
        with pytest.raises(
            TypeError, match=r"no setting: expected reduction=\.\.\. or temperature=.*set_pruning\(None\)"
        ):
            call()
    assert model.is_pruning  # as before
    model.set_pruning(None)
    assert not model.is_pruning


ROW = {"input_ids": torch.ones(5, dtype=torch.long), "pixel_values": torch.rand(3, 48, 48)}


@pytest.mark.parametrize(
    "row, named",
    [
        (ROW, r"pixel_values of shape \(3, 48, 48\)"),
        ({"image": None, "question": "is there a seven"}, "dicts of image, question"),
        ("scene.png", "a str"),
    ],
)
def test_calibrating_on_rows_names_the_loader(row, named):
    model = make_task_model("vqa")
    with pytest.raises(TypeError, match=rf"yields {named}, not batches.*DataLoader\(rows.*collate_fn=collator"):
        calibrate(model, [row] * 4, [0.5])


def test_what_is_not_reached_comes_with_the_range_and_the_accepted_distance():
    batches = [make_inputs(seed=seed) for seed in range(3)]
    with pytest.raises(ValueError, match=rf"to within {ACCEPTED}; the largest.* about 0\.\d+, the smallest about .*"):
        calibrate(make_task_model("vqa"), batches, [0.97])


def test_missing_extras_are_named(monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("sklearn", "evaluate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(digit_scenes.importlib, "import_module", without)
    digit_scenes.digit_scans.cache_clear()
    with pytest.raises(ImportError, match=r"digit scenes need sklearn.*pip install 'madtp_hf\[digits\]'"):
        digit_scenes.digit_scans("train")
    with pytest.raises(ImportError, match=r"metrics need evaluate.*pip install 'madtp_hf\[metrics\]'"):
        load_metric(METRICS[0])
