"""Weights prepacked for inference on a CPU: nothing that a user sees changes but the time it takes."""

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from madtp_hf import MadtpBlipForQuestionAnswering
from madtp_hf.modeling.madtp_blip_encoders import MergeLayer
from madtp_hf.modeling.prepacked_linear import (
    FusedFeedForward,
    PrepackedLinear,
    can_prepack,
    prepack_linear_maps,
    unpack_linear_maps,
)

from .conftest import TASKS, make_inputs, make_task_model


pytestmark = pytest.mark.skipif(not can_prepack(), reason="this build of torch has no oneDNN")
LENGTHS = (9, 3, 7, 16, 5)
TEMPERATURES = pytest.mark.parametrize("temperature", [0.0, 3.0])


def make_models(task, temperature=3.0):
    """The same model twice, the second with its weights prepacked."""
    layers = (
        {"text_config": {"num_hidden_layers": 7}} if task == "nlvr2" else {}
    )  # the last of seven has a merge layer
    models = make_task_model(task, **layers), make_task_model(task, **layers).prepack_weights()
    for model in models:
        model.set_pruning(temperature=temperature)
    return models


def kinds_of_linear_maps(model):
    return {type(module) for module in model.modules() if isinstance(module, nn.Linear)}


def plain_kinds(task):
    return {nn.Linear, MergeLayer} if task == "nlvr2" else {nn.Linear}


def holds_prepacked_weights(model):
    return any(name.startswith("_packed") for module in model.modules() for name in vars(module))


def check_same_outputs(mine, theirs, atol=1e-5):
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(mine[name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@TEMPERATURES
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_prepacked_weights_give_the_same_outputs(task, temperature):
    plain, packed = make_models(task, temperature)
    assert kinds_of_linear_maps(packed) == {PrepackedLinear} and kinds_of_linear_maps(plain) == plain_kinds(task)
    inputs = TASKS[task].make_inputs(LENGTHS)
    check_same_outputs(packed(**inputs), plain(**inputs))
    assert holds_prepacked_weights(packed)  # they were used
    single = TASKS[task].make_inputs((5,))
    check_same_outputs(packed(**single), plain(**single))


@TEMPERATURES
@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_prepacked_weights_generate_the_same(task, temperature):
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
    assert holds_prepacked_weights(packed)


def test_prepacked_weights_rank_the_same():
    plain, packed = make_models("vqa")
    inputs = make_inputs(LENGTHS)
    inputs.pop("labels")
    answers = torch.randint(4, 38, (20, 5))
    ranked = [model.rank_answers(**inputs, answer_input_ids=answers, k=10) for model in (packed, plain)]
    assert torch.equal(*ranked)


# Weights that change


def take_a_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(**make_inputs(LENGTHS)).loss.backward()
    optimizer.step()


def take_a_plain_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    model(**make_inputs(LENGTHS)).loss.backward()
    optimizer.step()


def load_other_weights(model):
    generator = torch.Generator().manual_seed(7)
    weights = {
        name: tensor + torch.randn(tensor.shape, generator=generator) * 0.02
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(weights)


def assign_other_weights(model):
    model.load_state_dict({name: tensor * 0.9 for name, tensor in model.state_dict().items()}, assign=True)
    model.tie_weights()


@torch.no_grad()
def scale_in_place(model):
    for parameter in model.parameters():
        parameter.mul_(0.9)


@torch.inference_mode()
def scale_in_inference_mode(model):
    for parameter in model.parameters():
        parameter.mul_(0.9)


def replace_behind_autograd(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9


def initialize(model):
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)


@pytest.mark.parametrize(
    "change",
    [
        take_a_step,
        take_a_plain_step,
        load_other_weights,
        assign_other_weights,
        scale_in_place,
        scale_in_inference_mode,
        replace_behind_autograd,
        initialize,
    ],
)
def test_weights_that_have_changed_are_repacked(change):
    plain, packed = make_models("vqa")
    inputs = make_inputs(LENGTHS)
    with torch.no_grad():
        before = plain(**inputs)
        check_same_outputs(packed(**inputs), before)
    for model in (plain, packed):
        change(model)
    with torch.no_grad():
        expected = plain(**inputs)
        assert (expected.logits - before.logits).abs().max() > 0.01
        check_same_outputs(packed(**inputs), expected, atol=1e-4)


@torch.no_grad()
def test_weights_that_changed_behind_autograds_back_are_repacked_on_request():
    plain, packed = make_models("vqa")
    inputs = make_inputs(LENGTHS)
    packed(**inputs)
    for model in (plain, packed):
        for parameter in model.parameters():
            parameter.data.mul_(0.9)  # leaves no trace
    packed.prepack_weights(False).prepack_weights()
    check_same_outputs(packed(**inputs), plain(**inputs))


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
    assert not holds_prepacked_weights(twin) and kinds_of_linear_maps(twin) == {PrepackedLinear}
    check_same_outputs(twin(**inputs), expected)
    scale_in_place(twin)
    assert (twin(**inputs).logits - expected.logits).abs().max() > 0.01
    check_same_outputs(packed(**inputs), expected, atol=0)
    scale_in_place(packed)
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
    assert kinds_of_linear_maps(loaded) == plain_kinds(task)
    check_same_outputs(loaded(**inputs), expected)
    check_same_outputs(loaded.prepack_weights()(**inputs), expected)


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
    assert packed.prepack_weights() is packed
    check_same_outputs(packed(**inputs), expected)
    assert packed.prepack_weights(False) is packed
    assert kinds_of_linear_maps(packed) == plain_kinds("nlvr2") and not holds_prepacked_weights(packed)
    check_same_outputs(packed(**inputs), expected, atol=0)
    assert packed.prepack_weights(False) is packed  # nothing to undo
    check_same_outputs(packed.prepack_weights()(**inputs), expected)


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
    size = prepack_linear_maps(packed, (nn.Linear,), {Feed: ("fc", "act")} if fused else {})
    assert type(packed[0].fc) is PrepackedLinear and (type(packed[0]) is FusedFeedForward) == fused
    assert size == plain.fc.weight.numel() * 4  # bytes of a weight in float32
    strided = torch.randn(6, 5).T
    for states in (torch.randn(6), torch.randn(1, 6), torch.randn(2, 3, 6), torch.randn(0, 6), strided):
        torch.testing.assert_close(packed(states), plain(states))
        torch.testing.assert_close(packed[0].fc(states), plain.fc(states))
        torch.testing.assert_close(packed[0].fc(states, packed[0].act), plain(states))
    unpack_linear_maps(packed)
    assert type(packed[0]) is Feed and type(packed[0].fc) is nn.Linear and type(packed[0].act) is nn.GELU
    assert torch.equal(packed(strided), plain(strided))


@pytest.mark.parametrize("activation", [nn.GELU(approximate="tanh"), nn.ReLU(), nn.Identity()], ids=repr)
@torch.no_grad()
def test_only_the_exact_gelu_is_applied_by_the_map(activation):
    plain = Feed(activation)
    packed = nn.Sequential(copy.deepcopy(plain))
    prepack_linear_maps(packed, (nn.Linear,), {Feed: ("fc", "act")})
    assert type(packed[0]) is Feed and type(packed[0].fc) is PrepackedLinear
    states = torch.randn(2, 3, 6)
    torch.testing.assert_close(packed(states), plain(states))


def test_maps_are_replaced_and_share_their_parameters():
    model = make_task_model("vqa")
    layer = model.vision_model.encoder.layers[0]
    mlp, before = layer.mlp, layer.mlp.fc1
    model.prepack_weights()
    assert type(before) is nn.Linear and layer.mlp.fc1 is not before and layer.mlp is not mlp
    assert layer.mlp.fc1.weight is before.weight and layer.mlp.fc1.bias is before.bias
    model.train().prepack_weights(False)
    assert layer.mlp is mlp and mlp.training
    assert type(mlp.fc1) is nn.Linear and mlp.fc1.weight is before.weight


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
def test_maps_with_hooks_stay_as_they_are(hook):
    models = make_task_model("vqa"), make_task_model("vqa")
    unhooked = models[0](**make_inputs(LENGTHS))
    for model in models:
        for layer in model.vision_model.encoder.layers:
            hook(layer.mlp.fc1)
            hook(layer.self_attn.qkv)
    plain, packed = models[0], models[1].prepack_weights()
    layer = packed.vision_model.encoder.layers[0]
    assert type(layer.mlp.fc1) is type(layer.self_attn.qkv) is nn.Linear and type(layer.mlp.fc2) is PrepackedLinear
    expected = plain(**make_inputs(LENGTHS))
    assert (expected.logits - unhooked.logits).abs().max() > 0.01
    check_same_outputs(packed(**make_inputs(LENGTHS)), expected)


@torch.no_grad()
def test_who_listens_to_an_activation_hears_it():
    """Whenever the hook came: before the weights were prepacked or after."""
    plain, packed = make_task_model("vqa"), make_task_model("vqa")
    inputs, heard = make_inputs(LENGTHS), []
    for model in (plain, packed):
        mlp = model.vision_model.encoder.layers[0].mlp
        mlp.activation_fn.register_forward_hook(lambda module, inputs, output: heard.append(output))
        if model is packed:
            model.prepack_weights()
        fc1 = model.vision_model.encoder.layers[1].mlp.fc1
        fc1.register_forward_hook(lambda module, inputs, output: heard.append(output))
    check_same_outputs(packed(**inputs), plain(**inputs))
    assert len(heard) == 4
    for mine, theirs in zip(heard[:2], heard[2:], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_former_name_does_the_same():
    model = make_task_model("vqa")
    assert model.pack_weights() is model and kinds_of_linear_maps(model) == {PrepackedLinear}
    assert model.pack_weights(False) is model and kinds_of_linear_maps(model) == {nn.Linear}
    assert kinds_of_linear_maps(model.pack_weights(packed=True)) == {PrepackedLinear}
    assert kinds_of_linear_maps(model.prepack_weights(prepacked=False)) == {nn.Linear}


def test_what_prepares_for_inference_prepacks_where_that_helps(monkeypatch):
    # Small weights stay in cache as they are.
    assert kinds_of_linear_maps(make_task_model("vqa").prepack_for_inference()) == {nn.Linear}
    monkeypatch.setattr("madtp_hf.modeling.pruned_model.LARGE", 1)
    assert kinds_of_linear_maps(make_task_model("vqa").prepack_for_inference()) == {PrepackedLinear}
    for model in (make_task_model("vqa").train(), make_task_model("vqa").to(torch.bfloat16)):
        assert model.prepack_for_inference() is model and kinds_of_linear_maps(model) == {nn.Linear}


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
@torch.no_grad()
def test_other_activations_stay_what_they_are(activation):
    config = make_task_model("vqa").config
    config.vision_config.hidden_act = activation
    plain = MadtpBlipForQuestionAnswering(config).eval()
    expected = plain(**make_inputs(LENGTHS))
    check_same_outputs(plain.prepack_weights()(**make_inputs(LENGTHS)), expected)


@torch.no_grad()
def test_an_adapter_on_a_packed_model_comes_before_the_activation():
    config = LoraConfig(target_modules=["fc1", "fc2"], init_lora_weights=False)
    results = []
    for model in make_models("vqa"):
        torch.manual_seed(3)  # of the adapter's weights
        results.append(get_peft_model(model, config).eval()(**make_inputs(LENGTHS)))
    check_same_outputs(*results)


def test_without_onednn_the_error_says_what_is_missing(monkeypatch):
    model = make_task_model("vqa")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"prepack_weights needs torch with oneDNN.*the model still runs"):
        model.prepack_weights()
    assert kinds_of_linear_maps(model) == {nn.Linear}
    assert model.prepack_weights(False) is model
