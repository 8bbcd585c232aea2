"""However weights change, a prepared model computes with the weights as they are: like a freshly loaded one."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from madtp_hf.modeling import prepared_linear
from madtp_hf.modeling.prepared_linear import PRECISIONS, PreparedForward

from .conftest import TASKS, make_task_model
from .helpers.clip import make_clip_inputs, make_clip_model


MODELS = (*TASKS, "clip")
LENGTHS = (9, 3, 7)


@pytest.fixture(autouse=True)
def small_maps_are_prepared(monkeypatch):
    monkeypatch.setattr(prepared_linear, "LARGE", 512)  # those of adapters are smaller


def make(name):
    """A model that prunes; its alignment tokens have a width of their own, so that there are projections."""
    if name == "clip":
        model = make_clip_model({"num_alignment_tokens": 12})
    else:
        layers = {"text_config": {"num_hidden_layers": 7}} if name == "nlvr2" else {}
        model = make_task_model(name, {"alignment_dim": 8}, **layers)
    model.set_pruning(temperature=1.0)
    return model.eval()


def make_inputs(name):
    inputs = make_clip_inputs(LENGTHS) if name == "clip" else TASKS[name].make_inputs(LENGTHS)
    inputs.pop("labels", None)
    if name == "vqa":
        inputs["decoder_input_ids"] = torch.tensor([[38, 7, 9]] * len(LENGTHS))
    return inputs


def scores(name, model, inputs):
    output = model.eval()(**inputs)
    return output.logits_per_image if name == "clip" else output[TASKS[name].scores]


def noise(tensor, seed=7):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)) * 0.05


# The ways to change weights: each takes a model and returns it, or the one that takes its place.


def optimizer_step(model, optimizer=torch.optim.AdamW):
    optimizer = optimizer(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = noise(parameter)
    optimizer.step()
    return model


def plain_optimizer_step(model):
    return optimizer_step(model, lambda parameters, lr: torch.optim.SGD(parameters, lr=1.0, foreach=False))


def average_by_data(model):
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data * 0.7 + noise(parameter))
    return model


def average_by_swa_utils(model):
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for _ in range(2):
        average.update_parameters(optimizer_step(model))
    return average.module


def swap_parameters(model):
    """As EMA libraries do for evaluation: values change places with those of a copy, behind autograd's back."""
    other = optimizer_step(copy.deepcopy(model))
    for mine, theirs in zip(model.parameters(), other.parameters()):
        before = mine.data.clone()
        mine.data.copy_(theirs.data)
        theirs.data.copy_(before)
    return model


def load(model):
    model.load_state_dict({name: tensor + noise(tensor) for name, tensor in model.state_dict().items()})
    return model


def assign(model):
    weights = {name: tensor * 0.9 for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


def scale_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    return model


def change_few_elements(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight[1, -1] += 5.0
    return model


def set_storage(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.set_(parameter * 0.8)
    return model


def new_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.8
    return model


def new_parameters(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach() * 0.8)
    return model


def add_lora(model):
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)


def merge_adapter_in_place(model):
    adapted = add_lora(model)
    adapted.merge_adapter()
    return adapted


def use_merge_and_unmerge(model):
    adapted = merge_adapter_in_place(model)
    with torch.no_grad():
        for module in adapted.eval().modules():
            if isinstance(module, nn.Linear):
                module(torch.zeros(1, module.in_features))
    adapted.unmerge_adapter()
    return adapted


def merge_and_unload(model):
    return add_lora(model).merge_and_unload()


def to_half_and_back(model):
    return model.half().float()


def to_bfloat16_and_back(model):
    return model.to(torch.bfloat16).to(torch.float32)


def to_float64(model):
    return model.double()


def train_and_back(model):
    model.train()
    average_by_data(model)
    return model.eval()


def quantize_dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def quantize_by_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def resize_embeddings(model):
    torch.manual_seed(3)
    embeddings = model.get_input_embeddings()
    model.resize_token_embeddings(embeddings.num_embeddings + 6, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    return model


def tie_weights(model):
    """As in a model whose layers share weights."""
    for stack in (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1):
        for name, module in stack[1].named_modules():
            if isinstance(module, nn.Linear) and module.weight.shape == stack[0].get_submodule(name).weight.shape:
                module.weight = stack[0].get_submodule(name).weight
    model.tie_weights()
    return model


CHANGES = (
    optimizer_step,
    plain_optimizer_step,
    average_by_data,
    average_by_swa_utils,
    swap_parameters,
    load,
    assign,
    scale_in_place,
    change_few_elements,
    set_storage,
    new_data,
    new_parameters,
    merge_adapter_in_place,
    use_merge_and_unmerge,
    merge_and_unload,
    to_half_and_back,
    to_bfloat16_and_back,
    to_float64,
    train_and_back,
    quantize_dynamic,
    quantize_by_torchao,
    resize_embeddings,
    tie_weights,
)
KEEPS_VALUES = (to_half_and_back, to_bfloat16_and_back, to_float64)  # but for rounding


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", [n if n == "vqa" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_outputs_are_those_of_a_model_that_changed_before_it_was_prepared(name, change):
    inputs = make_inputs(name)
    for precision in PRECISIONS:
        model = make(name).prepare_for_inference(precision)
        with torch.no_grad():
            before = scores(name, model, inputs)  # prepares
            assert any(getattr(module.__dict__.get("forward"), "prepared", None) for module in model.modules())
        changed = change(model)
        fresh = change(make(name))
        mine = inputs
        if fresh.get_input_embeddings().weight.dtype == torch.float64:
            mine = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        with torch.no_grad():
            expected = scores(name, fresh, mine)
            got = scores(name, changed, mine)
            getattr(changed, "get_base_model", lambda c=changed: c)().prepare_for_inference(None)
            plain = scores(name, changed, mine)
            getattr(fresh, "get_base_model", lambda f=fresh: f)().prepare_for_inference(precision)
            again = expected if change is to_float64 else scores(name, fresh, mine)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(plain, expected, atol=0, rtol=0)  # nothing of the preparation is left
        torch.testing.assert_close(got, again, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)
        if change not in KEEPS_VALUES and got.shape == before.shape:
            assert (got - before).abs().max() > 1e-3 * before.abs().max()


def test_a_prepared_map_is_the_same_module():
    model = make("vqa")
    before = {name: type(module) for name, module in model.named_modules()}
    parameters, keys = dict(model.named_parameters()), model.state_dict().keys()
    model.prepare_for_inference("int8")
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.state_dict().keys() == keys
    number = sum(type(module.__dict__.get("forward")) is PreparedForward for module in model.modules())
    assert number == sum(isinstance(m, nn.Linear) and m.weight.numel() >= 512 for m in model.modules()) > 30
    model.prepare_for_inference(None)
    assert not any("forward" in module.__dict__ for module in model.modules())
