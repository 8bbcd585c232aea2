"""What people ask `from_pretrained` and `save_pretrained` for: shards, half precision, devices, 8 bits."""

import json

import pytest
import torch
from transformers import AutoModel, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from .conftest import TASKS, make_task_model


WRITERS = ("vqa", "captioning")  # the tasks that generate
NEEDS_BITSANDBYTES = pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")


@pytest.fixture(params=TASKS)
def saved(request, tmp_path):
    """A task, its model, pruning, its inputs, its scores of them, and the folder that it is saved in, in several
    shards.
    """
    task = request.param
    model = make_task_model(task, {"alignment_dim": 8})
    model.set_pruning(temperature=1.0)
    folder = (
        tmp_path / task
    )  # of two folders of one name, `AutoModel` would load the second with the first one's class
    model.save_pretrained(folder, max_shard_size="100KB")
    inputs = TASKS[task].make_inputs()
    if task != "vqa":
        inputs.pop("labels", None)
    return task, model, inputs, scores(task, model, inputs), folder


def scores(task, model, inputs):
    with torch.no_grad():
        output = model(**inputs)
    assert (output.vision_tokens[-1] < output.vision_tokens[0]).all()  # it prunes
    return output[TASKS[task].scores]


def load(folder, **options):
    model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def write(task, model, inputs):
    """The token ids that a task of WRITERS generates."""
    if task == "captioning":
        return model.generate(inputs["pixel_values"], max_new_tokens=4, num_beams=2)
    questions = {name: value for name, value in inputs.items() if name != "labels"}
    return model.generate(**questions, max_new_tokens=4, num_beams=2)


def assert_written(written, inputs):
    """A sequence a sample, of the start token and more."""
    assert written.dtype == torch.int64 and len(written) == len(inputs["pixel_values"]) and written.shape[1] > 1


def test_shards(saved):
    task, _, inputs, expected, folder = saved
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 3
    torch.testing.assert_close(scores(task, load(folder), inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(saved, dtype):
    task, model, inputs, expected, folder = saved
    model = load(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    got = scores(task, model, inputs)
    assert got.dtype == dtype and got.isfinite().all()
    # Not pruned: there, a rounded score that falls to the other side of a threshold makes another token sequence.
    model.set_pruning(None)
    exact = load(folder)
    exact.set_pruning(None)
    with torch.no_grad():
        got = model(**inputs)[TASKS[task].scores].float()
        inputs["pixel_values"] = inputs["pixel_values"].float()
        expected = exact(**inputs)[TASKS[task].scores]
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("saved", WRITERS, indirect=True)
def test_half_precision_generates(saved, dtype):
    task, _, inputs, _, folder = saved
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    assert_written(write(task, load(folder, dtype=dtype), inputs), inputs)


def test_device_map_auto(saved):
    task, _, inputs, expected, folder = saved
    model = load(folder, device_map="auto")
    assert model.device.type == "cpu"
    torch.testing.assert_close(scores(task, model, inputs), expected, atol=1e-5, rtol=1e-5)


def load_half_from_disk(saved, tmp_path):
    """The model with layers 1 and 2 of each stack on the disk."""
    _, model, _, _, folder = saved
    device_map = {}
    for name, module in model.named_modules():
        if type(module).__name__ in model._no_split_modules:
            on_disk = name.rpartition(".")[2] in ("1", "2")
            device_map[name] = "disk" if on_disk else "cpu"
    rest = {name for name in model.state_dict() if not name.startswith(tuple(f"{key}." for key in device_map))}
    device_map.update(dict.fromkeys(rest, "cpu"))
    return load(folder, device_map=device_map, offload_folder=tmp_path / "offload")


def test_layers_on_the_disk(saved, tmp_path):
    """Half of each stack's layers is fetched when it is needed, as of a model that does not fit; what they are told
    goes with them.
    """
    task, _, inputs, expected, folder = saved
    loaded = load_half_from_disk(saved, tmp_path)
    on_disk = [name for name, parameter in loaded.named_parameters() if parameter.device.type == "meta"]
    assert any(name.startswith("vision_model.") for name in on_disk)
    assert any(name.startswith("text_") for name in on_disk)
    torch.testing.assert_close(scores(task, loaded, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("saved", WRITERS, indirect=True)
def test_layers_on_the_disk_generate(saved, tmp_path):
    task, model, inputs, _, _ = saved
    written = write(task, load_half_from_disk(saved, tmp_path), inputs)
    assert_written(written, inputs)
    assert torch.equal(written, write(task, model, inputs))


@NEEDS_BITSANDBYTES
@pytest.mark.parametrize("saved", WRITERS, indirect=True)
def test_eight_bits_generate(saved):
    task, _, inputs, _, folder = saved
    quantized = load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    inputs["pixel_values"] = inputs["pixel_values"].to(quantized.dtype)
    assert_written(write(task, quantized, inputs), inputs)


@NEEDS_BITSANDBYTES
def test_eight_bits(saved):
    task, model, inputs, _, folder = saved
    quantized = load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert quantized.vision_model.encoder.layers[0].mlp.fc1.weight.dtype == torch.int8
    assert quantized.alignment.tokens.dtype.is_floating_point
    inputs["pixel_values"] = inputs["pixel_values"].to(quantized.dtype)
    assert scores(task, quantized, inputs).isfinite().all()
    quantized.set_pruning(None)
    model.set_pruning(None)
    with torch.no_grad():
        got = quantized(**inputs)[TASKS[task].scores].float()
        inputs["pixel_values"] = inputs["pixel_values"].float()
        expected = model(**inputs)[TASKS[task].scores]
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()
