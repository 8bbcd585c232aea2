"""Quantization by other libraries: each converts the linear maps, prepared or not, and leaves the alignment alone."""

import pytest
import torch
from torch import nn

from madtp_hf import MadtpBlipForQuestionAnswering, MadtpClipModel
from madtp_hf.modeling import prepared_linear

from .conftest import make_inputs, make_task_model
from .helpers.clip import make_clip_inputs, make_clip_model


@pytest.fixture(autouse=True)
def small_maps_are_prepared(monkeypatch):
    monkeypatch.setattr(prepared_linear, "LARGE", 1)


def make(name):
    if name == "clip":
        return make_clip_model({"num_alignment_tokens": 12}), make_clip_inputs()
    inputs = make_inputs()
    inputs.pop("labels")
    return make_task_model("vqa", {"alignment_dim": 8}), {**inputs, "decoder_input_ids": torch.tensor([[38, 7]] * 3)}


def scores(model, inputs):
    with torch.no_grad():
        output = model(**inputs)
    return output.logits_per_image if "logits_per_image" in output else output.logits


def check_close(model, inputs, expected):
    got = scores(model, inputs)
    assert 0 < (got - expected).norm() < 0.1 * expected.norm()
    model.set_pruning(temperature=1.0)
    assert scores(model, inputs).isfinite().all()


@pytest.mark.parametrize("precision", (None, "float32", "int8"))
@pytest.mark.parametrize("name", ("vqa", "clip"))
def test_quantize_dynamic_converts_all_linear_maps(name, precision):
    model, inputs = make(name)
    expected = scores(model, inputs)
    number = sum(isinstance(module, nn.Linear) for module in model.modules())
    scores(model.prepare_for_inference(precision), inputs)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert (
        sum("quantized" in type(module).__module__ for module in quantized.modules() if hasattr(module, "scale"))
        == number
    )
    assert not any(isinstance(module, nn.Linear) for module in quantized.modules())
    check_close(quantized, inputs, expected)


@pytest.mark.parametrize("kind", ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"))
@pytest.mark.parametrize("precision", (None, "float32", "int8"))
@pytest.mark.parametrize("name", ("vqa", "clip"))
def test_torchao_converts_all_linear_maps(name, precision, kind):
    quantization = pytest.importorskip("torchao.quantization")
    model, inputs = make(name)
    expected = scores(model, inputs)
    scores(model.prepare_for_inference(precision), inputs)
    quantization.quantize_(model, getattr(quantization, kind)())
    maps = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(maps) > 20 and all(type(module.weight) is not nn.Parameter for module in maps)
    assert all(type(parameter) is nn.Parameter for parameter in model.alignment.parameters())
    check_close(model, inputs, expected)


@pytest.mark.parametrize("name", ("vqa", "clip"))
def test_torchao_config(name, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    model, inputs = make(name)
    expected = scores(model, inputs)
    model.save_pretrained(tmp_path)
    model_class = MadtpClipModel if name == "clip" else MadtpBlipForQuestionAnswering
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    loaded = model_class.from_pretrained(tmp_path, quantization_config=config)
    maps = [module for module in loaded.modules() if isinstance(module, nn.Linear)]
    assert sum(type(module.weight) is not nn.Parameter for module in maps) > 20
    check_close(loaded.eval().prepare_for_inference(), inputs, expected)
