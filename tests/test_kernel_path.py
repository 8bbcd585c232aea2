"""The path through Triton's kernels, which plain torch stands in for: what a model computes there, on any machine."""

import sys
from pathlib import Path

import pytest
import torch

from madtp_hf.modeling import attention, triton_kernels

from .conftest import TASKS, TEMPERATURES, close, make_task_model
from .helpers.kernel_standins import LAUNCHES, kernel_path


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import methods  # noqa: F401 (registers the ablations)
from launches import count


LENGTHS = (16, 3, 9, 12)
WIDE_HEADS = {"num_attention_heads": 2}  # of 16, the least that the kernels take
every_task = pytest.mark.parametrize("task", list(TASKS))


def make_model(task, temperature, **config_overrides):
    model = make_task_model(task, config_overrides, text_config=WIDE_HEADS, vision_config=WIDE_HEADS)
    model.set_pruning(temperature=temperature)
    return model


def run_on_kernel_path(model, inputs):
    """Its output, and the names of the functions that stood in for kernels."""
    called = []

    def call(function, names, *args):
        called.append(function.__name__)
        return function(*args)

    with kernel_path(call):
        output = model(**inputs, output_positions=True)
    return output, called


def check_same(found, expected, scores):
    assert torch.equal(found.vision_tokens, expected.vision_tokens)
    if expected.text_tokens is not None:
        assert torch.equal(found.text_tokens, expected.text_tokens)
    for mine, theirs in zip(found.vision_positions, expected.vision_positions, strict=True):
        assert torch.equal(mine, theirs)
    close(found.image_embeds, expected.image_embeds, atol=1e-4)
    close(found[scores], expected[scores], atol=1e-4)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@every_task
@torch.no_grad()
def test_a_model_gives_the_same_output_through_kernels(task, temperature):
    model, inputs = make_model(task, temperature), TASKS[task].make_inputs(lengths=LENGTHS)
    inputs.pop("labels", None)  # for inference
    if task == "vqa":
        inputs["decoder_input_ids"] = torch.full((len(LENGTHS), 1), 38)
    expected = model(**inputs, output_positions=True)
    found, called = run_on_kernel_path(model, inputs)
    check_same(found, expected, TASKS[task].scores)
    assert (expected.vision_tokens[-1] < expected.vision_tokens[0]).any()
    assert set(called) >= {"scored_varlen_attention", "gate", "merge"}
    # Texts attend to images of different lengths; captions do so in transformers' decoder.
    assert set(called) == set(LAUNCHES) or task == "captioning"


@every_task
@torch.no_grad()
def test_a_projection_before_the_alignment_tokens(task):
    model = make_model(task, 3.0, alignment_dim=24)
    inputs = TASKS[task].make_inputs(lengths=LENGTHS)
    expected = model(**inputs, output_positions=True)
    found, called = run_on_kernel_path(model, inputs)
    check_same(found, expected, TASKS[task].scores)
    assert "gate" in called


@pytest.mark.parametrize("setting", ({"pruning_granularity": "batch"}, {"pruning_modalities": ("vision",)}))
@torch.no_grad()
def test_other_settings(setting):
    model, inputs = make_model("vqa", 3.0, **setting), TASKS["vqa"].make_inputs(lengths=LENGTHS)
    expected = model(**inputs, output_positions=True)
    found, called = run_on_kernel_path(model, inputs)
    check_same(found, expected, "logits")
    assert ("gate" in called) == ("pruning_granularity" not in setting)


@every_task
@torch.no_grad()
def test_merging_gives_the_same_output_through_kernels(task):
    model, inputs = make_model(task, 3.0), TASKS[task].make_inputs(lengths=LENGTHS)
    inputs.pop("labels", None)
    if task == "vqa":
        inputs["decoder_input_ids"] = torch.full((len(LENGTHS), 1), 38)
    model.set_pruning_method("madtp_merge")
    model.set_pruning(temperature=3.0)
    expected = model(**inputs, output_positions=True)
    found, called = run_on_kernel_path(model, inputs)
    check_same(found, expected, TASKS[task].scores)
    assert (expected.vision_tokens[-1] < expected.vision_tokens[0]).any()
    assert set(called) >= {"scored_varlen_attention", "gate_and_assign", "merge_similar"} and "gate" not in called


@pytest.mark.parametrize("method", ("madtp", "madtp_merge"))
@torch.no_grad()
def test_rows_are_merged_in_torch_where_a_kernel_cannot_be_built(method, monkeypatch):
    model, inputs = make_model("vqa", 3.0), TASKS["vqa"].make_inputs(lengths=LENGTHS)
    model.set_pruning_method(method)
    model.set_pruning(temperature=3.0)
    expected = model(**inputs, output_positions=True)
    failed = []

    class NoCompiler(RuntimeError):
        pass

    def call(function, names, *args):
        if function.__name__ in ("merge", "merge_similar"):
            failed.append(function.__name__)
            raise NoCompiler("no compiler")
        return function(*args)

    monkeypatch.setattr(attention, "KERNEL_ERRORS", NoCompiler)
    monkeypatch.setattr(triton_kernels, "_enabled", True)
    with kernel_path(call), pytest.warns(UserWarning, match="no compiler"):
        found = model(**inputs, output_positions=True)
    check_same(found, expected, "logits")
    assert failed


@torch.no_grad()
def test_layers_after_the_last_that_merges_weight_keys_by_size_in_kernels():
    model, inputs = make_model("vqa", 3.0), TASKS["vqa"].make_inputs(lengths=LENGTHS)
    model.set_pruning_method("madtp_merge")
    model.config.pruning_layers = 1
    model.set_pruning(temperature=3.0)
    expected = model(**inputs, output_positions=True)
    sized = []

    def call(function, names, *args):
        sized.append(function.__name__ == "varlen_attention" and len(args) == 8)
        return function(*args)

    with kernel_path(call):
        found = model(**inputs, output_positions=True)
    check_same(found, expected, "logits")
    assert sum(sized) == 3 + 2  # of 4 layers of vision and 3 of text, all but the first


@pytest.mark.parametrize("method", ("class_attention", "without_self"))
@torch.no_grad()
def test_another_importance_is_not_the_gates(method):
    model, inputs = make_model("vqa", 3.0), TASKS["vqa"].make_inputs(lengths=LENGTHS)
    model.set_pruning_method(method)
    model.set_pruning(temperature=3.0)
    expected = model(**inputs, output_positions=True)
    found, called = run_on_kernel_path(model, inputs)
    check_same(found, expected, "logits")
    assert "gate" not in called and "varlen_attention" in called


def test_gradients_take_the_plain_path():
    model, inputs = make_model("vqa", 3.0), TASKS["vqa"].make_inputs(lengths=LENGTHS)
    output, called = run_on_kernel_path(model, inputs)
    assert called == [] and output.loss.requires_grad


def test_what_pruning_adds_to_the_operations_of_a_pass():
    model, inputs = make_model("vqa", 3.0), TASKS["vqa"].make_inputs(lengths=LENGTHS)
    inputs["decoder_input_ids"] = inputs.pop("labels")
    plain, kernels = (count(model, inputs, kernels=kernels) for kernels in (False, True))
    model.set_pruning(None)
    off = count(model, inputs, kernels=True)
    num_layers = 4 + 3
    assert off["waits"] == 0
    # For how many rows each layer leaves, and for the lengths of the texts.
    assert plain["waits"] == kernels["waits"] <= num_layers + 1
    assert off["operations"] < kernels["operations"] <= off["operations"] + 6 * num_layers + 10
    assert kernels["operations"] < plain["operations"]
    assert kernels["by_name"]["_gate"] == kernels["by_name"]["_sum_received"] <= num_layers
    assert "_gate" not in plain["by_name"] and "_gate" not in off["by_name"]
