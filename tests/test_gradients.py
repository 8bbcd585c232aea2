"""What each task's model learns from: gradients, with checkpointing and in lower precision."""

import copy

import pytest
import torch

from .conftest import LENGTHS, TASKS, TEMPERATURES, close, make_task_model


def missing_gradients(model):
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("temperature", (0.0, 1e-6, *TEMPERATURES))
@pytest.mark.parametrize("task", TASKS)
def test_every_parameter_gets_a_gradient_in_every_step(task, temperature):
    """As distributed training needs them, which waits for each; also where pruning is on and finds nothing to
    prune."""
    small = (
        temperature == 1e-6
    )  # images of four patches, of which an alignment token likes each best; texts of two words
    # An alignment width of its own, for there to be maps to it; 7 layers, for one to merge.
    model = make_task_model(
        task,
        {"alignment_dim": 16, "num_alignment_tokens": 200},
        text_config={"num_hidden_layers": 7},
        vision_config={"image_size": 16 if small else 48},
    ).train()
    assert model.alignment.vision_projection is not None and model.alignment.text_projection is not None
    lengths, image_size = ((3, 3, 3), 16) if small else ((9, 5, 7), 48)
    inputs = {**TASKS[task].make_inputs(lengths, image_size=image_size), **TASKS[task].to_train}
    model.set_pruning(temperature=temperature)
    for modalities in (("vision", "text"), ("vision",), ("text",), ()):
        model.config.pruning_modalities = modalities
        model.zero_grad()
        output = model(**inputs)
        pruned = (output.vision_tokens[-1] < output.vision_tokens[0]).any()
        assert pruned == (temperature > 1e-6 and "vision" in modalities)
        output.loss.backward()
        assert not missing_gradients(model)
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        learns = model.alignment.tokens.grad.abs().max() > 0
        assert learns == (pruned if task == "captioning" else temperature > 0)
        close(output.loss, output.task_loss + 0.1 * output.alignment_loss)


@pytest.mark.parametrize("temperature", (0.0, 3.0))
@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("task", TASKS)
def test_gradient_checkpointing_changes_no_gradient(task, reentrant, temperature):
    model = make_task_model(task, text_config={"num_hidden_layers": 7}).train()
    model.set_pruning(temperature=temperature)
    inputs = {**TASKS[task].make_inputs(), **TASKS[task].to_train}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        model.zero_grad()
        torch.manual_seed(3)
        model(**inputs).loss.backward()
        assert not missing_gradients(model)
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "checkpointing, dtype", [(False, torch.bfloat16), (True, torch.bfloat16), (False, torch.float16)]
)
@pytest.mark.parametrize("task", TASKS)
def test_autocast_trains_close_to_float32(task, checkpointing, dtype):
    model = make_task_model(task, text_config={"num_hidden_layers": 7}).train()
    model.set_pruning(temperature=3.0)
    inputs = {**TASKS[task].make_inputs(LENGTHS), **TASKS[task].to_train}
    if checkpointing:
        model.gradient_checkpointing_enable()
    torch.manual_seed(3)
    exact = model(**inputs).loss
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=dtype):
        output = model(**inputs)
    assert output[TASKS[task].scores].dtype == dtype
    output.loss.backward()
    assert not missing_gradients(model)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert abs(output.loss - exact) < 0.1 * abs(exact)


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_bfloat16_weights(task):
    model = make_task_model(task)
    model.set_pruning(temperature=3.0)
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    differences = []
    for seed in range(15):
        inputs = {**TASKS[task].make_inputs(LENGTHS, seed=seed), **TASKS[task].to_train}
        torch.manual_seed(3)
        exact = model(**inputs).loss
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
        torch.manual_seed(3)
        output = rounded(**inputs)
        assert output[TASKS[task].scores].dtype == torch.bfloat16
        differences.append(abs(output.loss - exact) / abs(exact))
    # Now and then rounding decides what stays, and the loss is another.
    assert torch.stack(differences).median() < 0.1 and max(differences) < 0.5


@torch.no_grad()
def test_bfloat16_weights_generate():
    inputs = TASKS["vqa"].make_inputs(LENGTHS)
    pixel_values = inputs["pixel_values"].to(torch.bfloat16)
    for task, text in (("captioning", {}), ("vqa", {name: inputs[name] for name in ("input_ids", "attention_mask")})):
        model = make_task_model(task).to(torch.bfloat16)
        model.set_pruning(temperature=3.0)
        assert len(model.generate(pixel_values=pixel_values, **text, max_new_tokens=3)) == 8
