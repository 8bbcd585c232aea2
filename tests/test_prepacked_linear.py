"""Weights laid out for inference on a CPU: nothing that a user sees changes but the time it takes."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from madtp_hf import MadtpBlipForQuestionAnswering
from madtp_hf.modeling.packed_linear import PackedLinear, can_pack

from .conftest import TASKS, make_inputs, make_task_model


pytestmark = pytest.mark.skipif(not can_pack(), reason="this build of torch has no oneDNN")
LENGTHS = (9, 3, 7, 16, 5)
TEMPERATURES = pytest.mark.parametrize("temperature", [0.0, 3.0])


def make_models(task, temperature=3.0):
    """The same model twice, the second with its weights packed."""
    models = make_task_model(task), make_task_model(task).pack_weights()
    for model in models:
        model.set_pruning(temperature=temperature)
    return models


def kinds_of_linear_maps(model):
    """Merge layers, which are a class of their own, left out."""
    return {type(module) for module in model.modules() if type(module) in (nn.Linear, PackedLinear)}


def holds_packed_weights(model):
    return any(name.startswith("_packed") for module in model.modules() for name in vars(module))


def check_same_outputs(mine, theirs, atol=1e-5):
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(mine[name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@TEMPERATURES
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_packed_weights_give_the_same_outputs(task, temperature):
    plain, packed = make_models(task, temperature)
    assert kinds_of_linear_maps(packed) == {PackedLinear} and kinds_of_linear_maps(plain) == {nn.Linear}
    inputs = TASKS[task].make_inputs(LENGTHS)
    check_same_outputs(packed(**inputs), plain(**inputs))
    assert holds_packed_weights(packed)  # they were used
    single = TASKS[task].make_inputs((5,))
    check_same_outputs(packed(**single), plain(**single))


@TEMPERATURES
@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_packed_weights_generate_the_same(task, temperature):
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
    assert holds_packed_weights(packed)


def test_packed_weights_rank_the_same():
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
def test_weights_that_have_changed_are_packed_anew(change):
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
def test_weights_that_changed_behind_autograds_back_are_packed_anew_on_request():
    plain, packed = make_models("vqa")
    inputs = make_inputs(LENGTHS)
    packed(**inputs)
    for model in (plain, packed):
        for parameter in model.parameters():
            parameter.data.mul_(0.9)  # leaves no trace
    packed.pack_weights(False).pack_weights()
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
    assert not holds_packed_weights(twin) and kinds_of_linear_maps(twin) == {PackedLinear}
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
    assert kinds_of_linear_maps(loaded) == {nn.Linear}
    check_same_outputs(loaded(**inputs), expected)
    check_same_outputs(loaded.pack_weights()(**inputs), expected)


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
    assert packed.pack_weights() is packed
    check_same_outputs(packed(**inputs), expected)
    assert packed.pack_weights(False) is packed
    assert kinds_of_linear_maps(packed) == {nn.Linear} and not holds_packed_weights(packed)
    check_same_outputs(packed(**inputs), expected, atol=0)
    assert packed.pack_weights(False) is packed  # nothing to undo
    check_same_outputs(packed.pack_weights()(**inputs), expected)


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


def test_a_linear_map_takes_states_of_any_shape():
    plain = nn.Linear(6, 4)
    packed = copy.deepcopy(plain)
    packed.__class__ = PackedLinear
    unbiased = nn.Linear(6, 4, bias=False)
    packed_unbiased = copy.deepcopy(unbiased)
    packed_unbiased.__class__ = PackedLinear
    strided = torch.randn(6, 5).T
    with torch.no_grad():
        for states in (torch.randn(6), torch.randn(1, 6), torch.randn(2, 3, 6), torch.randn(0, 6), strided):
            for mine, theirs in ((packed, plain), (packed_unbiased, unbiased)):
                torch.testing.assert_close(mine(states), theirs(states))
                torch.testing.assert_close(mine(states, gelu=True), F.gelu(theirs(states)))


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
@torch.no_grad()
def test_other_activations_stay_what_they_are(activation):
    config = make_task_model("vqa").config
    config.vision_config.hidden_act = activation
    plain = MadtpBlipForQuestionAnswering(config).eval()
    expected = plain(**make_inputs(LENGTHS))
    check_same_outputs(plain.pack_weights()(**make_inputs(LENGTHS)), expected)


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
    with pytest.raises(RuntimeError, match=r"pack_weights needs torch with oneDNN.*go on without"):
        model.pack_weights()
    assert kinds_of_linear_maps(model) == {nn.Linear}
    assert model.pack_weights(False) is model
