"""The one way to load a model with its processor: ours and transformers', of every task, and what can't be loaded."""

import json
import time

import pytest
import torch
from huggingface_hub import constants
from transformers import (
    Blip2Config,
    BlipModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    ViTConfig,
    ViTForImageClassification,
)

from madtp_hf import MadtpBlipForQuestionAnswering, MadtpClipModel, push_folder
from madtp_hf.checkpoints.load import load

from .conftest import TASKS, blip_config, make_processor, make_task_blip, make_task_model
from .helpers.clip import make_clip_model, make_clip_processor


@pytest.fixture
def vqa(tmp_path):
    """The folder of a dense question answering checkpoint."""
    make_task_blip("vqa").save_pretrained(tmp_path / "vqa")
    make_processor().save_pretrained(tmp_path / "vqa")
    return tmp_path / "vqa"


@pytest.mark.parametrize("task", [*TASKS, "clip"])
def test_every_task_loads_with_its_pruning(task, tmp_path):
    model = make_clip_model() if task == "clip" else make_task_model(task)
    model.config.pruning_schedule = [[0.5, 2.0]]
    model.set_pruning(reduction=0.5)
    model.save_pretrained(tmp_path)
    (make_clip_processor() if task == "clip" else make_processor()).save_pretrained(tmp_path)
    for expected in (None, task, ("captioning", task)):
        loaded = load(tmp_path, expected, dtype="bfloat16", device="cpu", num_alignment_tokens=99)
        assert type(loaded.model) is type(model) and loaded.task.name == task
        assert loaded.model.dtype == torch.bfloat16 and not loaded.model.training
        assert loaded.model.config.pruning_temperature == 2.0
        assert torch.equal(loaded.model.alignment.tokens, model.alignment.tokens.bfloat16())  # calibrated: kept
        assert not loaded.is_dense and loaded.is_trained and loaded.revision is None
        assert loaded.source == str(tmp_path.resolve())
        assert isinstance(loaded.processor, loaded.task.family.processor_class)


def test_a_dense_model_becomes_ours_with_overrides(vqa):
    loaded = load(vqa, num_alignment_tokens=7, pruning_temperature=1.0, precision="auto")
    assert type(loaded.model) is MadtpBlipForQuestionAnswering and loaded.is_dense and loaded.is_trained
    assert loaded.model.alignment.tokens.shape[0] == 7 and loaded.model.is_pruning
    assert loaded.model.config.name_or_path == str(vqa.resolve())
    loaded.model.save_pretrained(vqa.parent / "ours")
    loaded.processor.save_pretrained(vqa.parent / "ours")
    anew = load(vqa.parent / "ours", num_alignment_tokens=5)  # not calibrated yet
    assert anew.is_dense and anew.model.alignment.tokens.shape[0] == 5
    assert not load(vqa.parent / "ours", num_alignment_tokens=7).is_dense


def test_another_tasks_blip_is_a_start_for_training_alone(vqa):
    loaded = load(vqa, "nlvr2")
    assert loaded.task.name == loaded.model.task == "nlvr2" and loaded.is_dense and not loaded.is_trained
    with pytest.raises(ValueError, match="not a checkpoint for 'nlvr2', and nothing is trained here"):
        loaded.require_trained()
    with pytest.raises(ValueError, match="has a BlipForQuestionAnswering, for 'vqa', and the task is 'retrieval'"):
        load(vqa, "retrieval")
    with pytest.raises(ValueError, match="and the task is 'retrieval' or 'clip'"):
        load(vqa, ("retrieval", "clip"))


@pytest.mark.parametrize("source", ["nowhere/vqa/too", "./nowhere", "~/nowhere", "folder/nowhere", "C:\\nowhere"])
def test_a_folder_that_is_not_there_is_named_without_asking_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("madtp_hf.checkpoints.load.HfApi", None)  # would raise if it were asked
    with pytest.raises(FileNotFoundError, match="does not exist: expected a checkpoint's folder") as error:
        load(source)
    assert str(error.value).startswith(source)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="file is not a directory"):
        load("file")


def test_a_model_that_the_hub_lacks_is_asked_for_once(hub):
    started = time.perf_counter()
    with pytest.raises(FileNotFoundError, match="org/none is not a directory, and can't be read from the Hub"):
        load("org/none")
    assert [request for request in hub.requests if "none" in request] == ["GET /api/models/org/none"]
    with pytest.raises(FileNotFoundError, match="not a model's id"):
        load("no such model")
    hub.stop()
    with pytest.raises(FileNotFoundError, match="org/none"):
        load("org/none")
    assert time.perf_counter() - started < 5


def test_from_the_hub_all_files_are_of_one_commit_and_then_cached(hub, tmp_path, monkeypatch):
    make_task_model("vqa").save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    push_folder(tmp_path, "org/tiny", token="hf_alice")
    sha = hub.repositories["org/tiny"].find("main").sha
    for revision in (None, "main"):
        loaded = load("org/tiny", revision=revision)
        assert (loaded.source, loaded.revision, loaded.model.config._commit_hash) == ("org/tiny", sha, sha)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert load("org/tiny").revision == sha and len(hub.requests) == before


def test_models_that_are_not_supported_are_named(vqa, tmp_path):
    ViTForImageClassification(
        ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(tmp_path / "vit")
    BlipModel(blip_config()).save_pretrained(tmp_path / "blip")
    Blip2Config(architectures=["Blip2ForConditionalGeneration"]).save_pretrained(tmp_path / "blip2")
    text = CLIPTextConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    CLIPTextModelWithProjection(text).save_pretrained(tmp_path / "tower")
    names = {
        "vit": "ViTForImageClassification",
        "blip": "BlipModel",
        "blip2": "Blip2ForConditionalGeneration",
        "tower": "CLIPTextModelWithProjection",
    }
    for folder, name in names.items():
        with pytest.raises(ValueError, match=f"{folder} is a {name}: expected a checkpoint of .*BlipForQuestion"):
            load(tmp_path / folder)
        with pytest.raises(ValueError, match=f"from_blip got .*{folder}, a {name}: expected a BlipForQuestion"):
            MadtpBlipForQuestionAnswering.from_blip(tmp_path / folder)
    with pytest.raises(ValueError, match=r"from_clip got .*vqa, a BlipForQuestionAnswering: expected a CLIPModel or"):
        MadtpClipModel.from_clip(vqa)
    content = json.loads((vqa / "config.json").read_text())
    content["text_config"]["vocab_size"] += 1
    (vqa / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is not a checkpoint of a BlipForQuestionAnswering .* of another shape"):
        load(vqa)


def test_what_a_folder_lacks_is_named(vqa):
    for name in ("preprocessor_config.json", "processor_config.json"):
        (vqa / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="vqa has no complete processor"):
        load(vqa)
    with pytest.raises(ValueError, match=r"dtype='int3': expected float32"):
        load(vqa, dtype="int3")
    with pytest.raises(ValueError, match="expected one of 'vqa'"):
        load(vqa, "gqa")
    (vqa / "config.json").unlink()
    with pytest.raises(ValueError, match=r"vqa can't be loaded .*config.json"):
        load(vqa)
