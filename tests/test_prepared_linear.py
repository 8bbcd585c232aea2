"""Weights prepared for inference on a CPU: nothing that a user sees changes but the time it takes, and rounding."""

import copy
import io
import sys

import pytest
import torch
import torch.nn.functional as F
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from madtp_hf import MadtpBlipForQuestionAnswering
from madtp_hf.modeling import prepared_linear
from madtp_hf.modeling.prepared_linear import (
    FusedForward,
    PreparedForward,
    can_prepack,
    prepare_linear_maps,
    reorder,
    restore_linear_maps,
)

from .conftest import TASKS, make_inputs, make_task_model


pytestmark = pytest.mark.skipif(not can_prepack(), reason="this build of torch has no oneDNN")
LENGTHS = (9, 3, 7, 16, 5)
TEMPERATURES = pytest.mark.parametrize("temperature", [0.0, 3.0])


@pytest.fixture(autouse=True)
def small_maps_are_prepared(monkeypatch):
    monkeypatch.setattr(prepared_linear, "LARGE", 1)


def make_models(task, temperature=3.0):
    """The same model twice, the second with its weights prepared."""
    layers = (
        {"text_config": {"num_hidden_layers": 7}} if task == "nlvr2" else {}
    )  # the last of seven has a merge layer
    models = make_task_model(task, **layers), make_task_model(task, **layers).prepare_for_inference("float32")
    for model in models:
        model.set_pruning(temperature=temperature)
    return models


def is_prepared(model):
    """Whether all linear maps are prepared, or none is."""
    forwards = {type(m.__dict__.get("forward")) for m in model.modules() if isinstance(m, nn.Linear)}
    assert len(forwards) == 1
    return forwards == {PreparedForward}


def holds_prepared_weights(model):
    return any(getattr(module.__dict__.get("forward"), "prepared", None) for module in model.modules())


def check_same_outputs(mine, theirs, atol=1e-5):
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(mine[name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@TEMPERATURES
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_prepared_weights_give_the_same_outputs(task, temperature):
    plain, packed = make_models(task, temperature)
    assert is_prepared(packed) and not is_prepared(plain)
    inputs = TASKS[task].make_inputs(LENGTHS)
    check_same_outputs(packed(**inputs), plain(**inputs))
    assert holds_prepared_weights(packed)  # they were used
    single = TASKS[task].make_inputs((5,))
    check_same_outputs(packed(**single), plain(**single))


@TEMPERATURES
@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_prepared_weights_generate_the_same(task, temperature):
    plain, packed = make_models(task, temperature)
    inputs = TASKS[task].make_inputs(LENGTHS)
    names = ("pixel_values",) if task == "captioning" else ("pixel_values", "input_ids", "attention_mask")
    inputs = {name: inputs[name] for name in names}
    for settings in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        results = [
            model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True, output_scores=True, **settings)
            for model in (packed, plain)
        ]
        assert torch.equal(results[0].sequences, results[1].sequences)
        for mine, theirs in zip(results[0].scores, results[1].scores, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert holds_prepared_weights(packed)


def test_prepared_weights_rank_the_same():
    plain, packed = make_models("vqa")
    inputs = make_inputs(LENGTHS)
    inputs.pop("labels")
    answers = torch.randint(4, 38, (20, 5))
    ranked = [model.rank_answers(**inputs, answer_input_ids=answers, k=10) for model in (packed, plain)]
    assert torch.equal(*ranked)


@TEMPERATURES
@pytest.mark.parametrize("task", TASKS)
def test_training_a_packed_model_gives_the_same_gradients(task, temperature):
    plain, packed = make_models(task, temperature)
    inputs = {**TASKS[task].make_inputs(LENGTHS), **TASKS[task].to_train}
    with torch.no_grad():
        packed(**inputs)  # packs
    gradients = []
    for model in (plain, packed):
        torch.manual_seed(3)  # hard negatives are drawn
        model.train()(**inputs).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


# Copies and files


def scale(model):
    for parameter in model.parameters():
        parameter.mul_(0.9)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False), buffer.getbuffer().nbytes


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickled(model)[0]], ids=["deepcopy", "pickle"])
@torch.no_grad()
def test_a_copy_has_weights_of_its_own(copy_of):
    _, packed = make_models("vqa")
    inputs = make_inputs(LENGTHS)
    expected = packed(**inputs)
    twin = copy_of(packed)
    assert not holds_prepared_weights(twin) and is_prepared(twin)
    check_same_outputs(twin(**inputs), expected)
    scale(twin)
    assert (twin(**inputs).logits - expected.logits).abs().max() > 0.01
    check_same_outputs(packed(**inputs), expected, atol=0)
    scale(packed)
    check_same_outputs(twin(**inputs), packed(**inputs), atol=0)


@torch.no_grad()
def test_what_is_pickled_is_no_larger():
    plain, packed = make_models("vqa")
    for model in (plain, packed):
        model(**make_inputs(LENGTHS))
    sizes = [pickled(model)[1] for model in (plain, packed)]
    assert abs(sizes[1] - sizes[0]) < 10_000


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_a_checkpoint_of_a_packed_model_is_that_of_the_model(task, tmp_path):
    plain, packed = make_models(task)
    inputs = TASKS[task].make_inputs(LENGTHS)
    expected = packed(**inputs)
    names = plain.state_dict().keys()
    assert packed.state_dict().keys() == names
    assert dict(packed.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    for model, folder in ((plain, "plain"), (packed, "packed")):
        model.save_pretrained(tmp_path / folder)
    files = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("plain", "packed")]
    assert files[0] == files[1]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded, info = type(packed).from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(info.values())
    assert not is_prepared(loaded)
    check_same_outputs(loaded(**inputs), expected)
    check_same_outputs(loaded.prepare_for_inference("float32")(**inputs), expected)


# Other types, and back


@TEMPERATURES
@torch.no_grad()
def test_a_packed_model_may_be_cast(temperature):
    plain, packed = make_models("vqa", temperature)
    inputs = make_inputs(LENGTHS)
    expected = plain(**inputs)
    packed(**inputs)
    for dtype in (torch.bfloat16, torch.float32):
        plain, packed = plain.to(dtype), packed.to(dtype)
        cast = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
        result = packed(**cast)
        assert result.logits.dtype == dtype
        check_same_outputs(result, plain(**cast))
    assert (result.logits - expected.logits).abs().max() > 1e-4  # by bfloat16's rounding, which the weights keep


@TEMPERATURES
@torch.no_grad()
def test_autocast_is_as_it_is_without(temperature):
    plain, packed = make_models("vqa", temperature)
    inputs = make_inputs(LENGTHS)
    expected = packed(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        results = [model(**inputs) for model in (packed, plain)]
    check_same_outputs(*results, atol=0)
    assert (results[0].logits.float() - expected.logits).abs().max() > 1e-4
    check_same_outputs(packed(**inputs), expected, atol=0)


@torch.no_grad()
def test_packing_twice_and_back_leaves_plain_linear_maps():
    plain, packed = make_models("nlvr2")
    inputs = TASKS["nlvr2"].make_inputs(LENGTHS)
    expected = plain(**inputs)
    assert packed.prepare_for_inference("float32") is packed
    check_same_outputs(packed(**inputs), expected)
    assert packed.prepare_for_inference(None) is packed
    assert not is_prepared(packed) and not holds_prepared_weights(packed)
    check_same_outputs(packed(**inputs), expected, atol=0)
    assert packed.prepare_for_inference(None) is packed  # nothing to undo
    check_same_outputs(packed.prepare_for_inference("float32")(**inputs), expected)


@torch.no_grad()
def test_inference_mode_is_as_good_as_no_grad():
    plain, packed = make_models("vqa")
    inputs = make_inputs(LENGTHS)
    with torch.inference_mode():
        result = packed(**inputs)
    check_same_outputs(result, plain(**inputs))


def test_a_model_made_in_inference_mode_may_be_packed():
    with torch.inference_mode():
        plain, packed = make_models("vqa")
        inputs = make_inputs(LENGTHS)
        check_same_outputs(packed(**inputs), plain(**inputs))


class Feed(nn.Module):
    """A map and the activation behind it, as a host has them."""

    def __init__(self, activation, bias=True):
        super().__init__()
        self.fc = nn.Linear(6, 4, bias=bias)
        self.act = activation

    def forward(self, states):
        return self.act(self.fc(states))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_linear_map_takes_states_of_any_shape(bias, fused):
    plain = Feed(nn.GELU(), bias)
    packed = nn.Sequential(copy.deepcopy(plain))
    prepare_linear_maps(packed, "float32", {Feed: ("fc", "act")} if fused else {})
    assert is_prepared(packed) and (type(packed[0].__dict__.get("forward")) is FusedForward) == fused
    strided = torch.randn(6, 5).T
    for states in (torch.randn(6), torch.randn(1, 6), torch.randn(2, 3, 6), torch.randn(0, 6), strided):
        torch.testing.assert_close(packed(states), plain(states))
        torch.testing.assert_close(packed[0].fc(states), plain.fc(states))
    restore_linear_maps(packed)
    assert not is_prepared(packed) and "forward" not in packed[0].__dict__
    assert torch.equal(packed(strided), plain(strided))


@pytest.mark.parametrize("activation", [nn.GELU(approximate="tanh"), nn.ReLU(), nn.Identity()], ids=repr)
@torch.no_grad()
def test_only_the_exact_gelu_is_applied_by_the_map(activation):
    plain = Feed(activation)
    packed = nn.Sequential(copy.deepcopy(plain))
    prepare_linear_maps(packed, "float32", {Feed: ("fc", "act")})
    assert is_prepared(packed)
    states = torch.randn(2, 3, 6)
    torch.testing.assert_close(packed(states), plain(states))


def hooked_before(linear):
    linear.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def hooked_after(linear):
    linear.register_forward_hook(lambda module, inputs, output: output * 2)


def hooked_by_accelerate(linear):
    """As accelerate does, which puts a function of its own before a module's."""
    forward = linear.forward
    linear.forward = lambda states: forward(states) * 2


@pytest.mark.parametrize("hook", [hooked_before, hooked_after, hooked_by_accelerate])
@torch.no_grad()
def test_hooks_of_maps_run(hook):
    models = make_task_model("vqa"), make_task_model("vqa")
    unhooked = models[0](**make_inputs(LENGTHS))
    for model in models:
        for layer in model.vision_model.encoder.layers:
            hook(layer.mlp.fc1)
            hook(layer.self_attn.qkv)
    plain, packed = models[0], models[1].prepare_for_inference("float32")
    expected = plain(**make_inputs(LENGTHS))
    assert (expected.logits - unhooked.logits).abs().max() > 0.01
    check_same_outputs(packed(**make_inputs(LENGTHS)), expected)


@torch.no_grad()
def test_who_listens_to_an_activation_hears_it():
    """Whenever the hook came: before the weights were prepared or after."""
    plain, packed = make_task_model("vqa"), make_task_model("vqa")
    inputs, heard = make_inputs(LENGTHS), []
    for model in (plain, packed):
        mlp = model.vision_model.encoder.layers[0].mlp
        mlp.activation_fn.register_forward_hook(lambda module, inputs, output: heard.append(output))
        if model is packed:
            model.prepare_for_inference("float32")
        fc1 = model.vision_model.encoder.layers[1].mlp.fc1
        fc1.register_forward_hook(lambda module, inputs, output: heard.append(output))
    check_same_outputs(packed(**inputs), plain(**inputs))
    assert len(heard) == 4
    for mine, theirs in zip(heard[:2], heard[2:], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_small_weights_stay_as_they_are(monkeypatch):
    monkeypatch.undo()  # they stay in cache
    assert not is_prepared(make_task_model("vqa").prepare_for_inference())


@torch.no_grad()
def test_auto_is_the_models_own_dtype():
    for dtype, precision in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, None)):
        plain, model = make_task_model("vqa").to(dtype), make_task_model("vqa").to(dtype)
        assert model.prepare_for_inference() is model and model.inference_precision == precision
        assert is_prepared(model) == (precision is not None)
        atol = 0.15 if dtype == torch.bfloat16 else 1e-5
        check_same_outputs(model(**make_inputs(LENGTHS)), plain(**make_inputs(LENGTHS)), atol=atol)


def test_another_precision_is_refused():
    model = make_task_model("vqa").prepare_for_inference("int8")
    with pytest.raises(ValueError, match=r"precision='int4': expected one of auto, float32, bfloat16, int8, or None"):
        model.prepare_for_inference("int4")
    assert model.inference_precision == "int8"
    with pytest.raises(ValueError, match=r"precision='int8' on meta: expected a CPU.*torchao"):
        make_task_model("vqa").to("meta").prepare_for_inference("int8")


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_other_precisions_are_close_and_undone(task, precision):
    plain, model = make_models(task, 0.0)
    inputs, name = TASKS[task].make_inputs(LENGTHS), TASKS[task].scores
    expected = plain(**inputs)[name]
    model.prepare_for_inference(precision)
    got = model(**inputs)[name]
    assert got.dtype == torch.float32
    error = (got - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.05
    check_same_outputs(model.prepare_for_inference("float32")(**inputs), plain(**inputs))
    check_same_outputs(model.prepare_for_inference(None)(**inputs), plain(**inputs), atol=0)


@pytest.mark.parametrize("precision", prepared_linear.PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_inputs_of_any_floating_dtype(precision, dtype):
    _, model = make_models("vqa")
    model.prepare_for_inference(precision)
    inputs = make_inputs(LENGTHS)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    got = model(**inputs)
    assert got.logits.dtype == torch.float32
    check_same_outputs(got, model(**{**inputs, "pixel_values": inputs["pixel_values"].float()}))
    linear = model.vision_model.encoder.layers[0].mlp.fc1
    assert linear(torch.randn(3, 32, dtype=dtype)).dtype == dtype


@torch.no_grad()
def test_int8_quantizes_each_token_by_itself():
    linear = nn.Linear(64, 48)
    states = torch.randn(200, 64) * torch.logspace(-2, 2, 200).unsqueeze(1)
    expected = linear(states)
    layer = nn.Sequential(linear)
    prepare_linear_maps(layer, "float32", {})
    linear.forward = PreparedForward(linear, "int8")
    error = (linear(states) - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 0.05


@torch.no_grad()
def test_only_the_maps_of_layers_get_another_precision():
    for model in (make_task_model("vqa"), make_task_model("retrieval"), make_task_model("captioning")):
        model.prepare_for_inference("int8")
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                expected = torch.ops.quantized if ".layer" in name else None
                assert (module.forward.make is prepared_linear._quantize) == (expected is not None), name


@torch.no_grad()
def test_memory_of_weights_in_a_file_is_released(tmp_path):
    model = make_task_model("vqa")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).prepare_for_inference("int8")
    mapped = [m.forward.mapped_at for m in loaded.modules() if isinstance(m.__dict__.get("forward"), PreparedForward)]
    assert sys.platform != "linux" or all(mapped)
    inputs = make_inputs(LENGTHS)
    check_same_outputs(loaded(**inputs), model.prepare_for_inference("int8")(**inputs))
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
@torch.no_grad()
def test_other_activations_stay_what_they_are(activation):
    config = make_task_model("vqa").config
    config.vision_config.hidden_act = activation
    plain = MadtpBlipForQuestionAnswering(config).eval()
    expected = plain(**make_inputs(LENGTHS))
    check_same_outputs(plain.prepare_for_inference("float32")(**make_inputs(LENGTHS)), expected)


@torch.no_grad()
def test_an_adapter_on_a_packed_model_comes_before_the_activation():
    config = LoraConfig(target_modules=["fc1", "fc2"], init_lora_weights=False)
    results = []
    for model in make_models("vqa"):
        torch.manual_seed(3)  # of the adapter's weights
        results.append(get_peft_model(model, config).eval()(**make_inputs(LENGTHS)))
    check_same_outputs(*results)


def test_without_kernels_the_error_says_what_is_missing(monkeypatch):
    model = make_task_model("vqa")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"precision='float32' needs oneDNN.*the model still runs"):
        model.prepare_for_inference("float32")
    assert model.prepare_for_inference() is model and model.prepare_for_inference(None) is model
    assert not is_prepared(model)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_many_rows_go_through_mkl_on_intels_processors(monkeypatch, bias):
    plain = Feed(nn.GELU(), bias)
    states = torch.randn(7, 6)
    results = []
    for is_intel in (True, False):
        monkeypatch.setattr(prepared_linear, "_is_intel", lambda is_intel=is_intel: is_intel)
        monkeypatch.setattr(prepared_linear, "MANY_ROWS", 5)
        prepared = nn.Sequential(copy.deepcopy(plain)).eval()
        prepare_linear_maps(prepared, "float32", {Feed: ("fc", "act")})
        reorders = []
        monkeypatch.setattr(
            prepared_linear, "reorder", lambda *args, seen=reorders: seen.append(args) or reorder(*args)
        )
        few, many = prepared(states[:4]), prepared(states)
        assert len(reorders) == 1
        prepared(states)
        prepared[0].fc.weight.mul_(2)  # whichever product is next, it has the new weight
        results.append((few, many, prepared(states), prepared(states[:4])))
        torch.testing.assert_close(many, plain(states))
        torch.testing.assert_close(prepared(states)[:4], prepared(states[:4]))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_attention_computes_in_the_products_precision(task, monkeypatch):
    """In bfloat16, projections are not cast before attention; an adapter on one of them brings float32 back."""
    _, model = make_models(task, 0.0)
    inputs, seen = TASKS[task].make_inputs(LENGTHS), set()
    fused = F.scaled_dot_product_attention

    def record(query, key, value, *args, **kwargs):
        seen.add((query.dtype, key.dtype, value.dtype))
        return fused(query, key, value, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    model.prepare_for_inference("bfloat16")(**inputs)
    assert seen == {(torch.bfloat16,) * 3}
    seen.clear()
    adapted = get_peft_model(model, IA3Config(target_modules=["key", "qkv"], feedforward_modules=[])).eval()
    output = adapted(**inputs)
    assert (torch.float32,) * 3 in seen and all(len(set(dtypes)) == 1 for dtypes in seen)
    assert output[TASKS[task].scores].dtype == torch.float32


@torch.no_grad()
def test_bfloat16_keeps_as_many_tokens():
    plain, model = make_models("vqa", 1.0)
    inputs = make_inputs((9,) * 16)
    expected = plain(**inputs).vision_tokens
    got = model.prepare_for_inference("bfloat16")(**inputs).vision_tokens
    assert expected[-1].sum() < expected[0].sum()
    assert abs(got.sum() / expected.sum() - 1) < 0.02
