"""Training that keeps every budget: the dense pass and pruned passes of a step learn together."""

import copy

import pytest
import torch

from madtp_hf import MadtpBlipForQuestionAnswering, ReductionCallback
from madtp_hf.modeling.training_passes import distillation_loss

from .conftest import TASKS, make_inputs, make_task_model
from .helpers.clip import make_clip_inputs, make_clip_model
from .test_reduction_callback import Rows, train


SETTING = {"temperature": 1.0, "factor": 1.0}


def test_the_loss_is_the_mean_of_the_passes_and_of_what_pruned_ones_learn_from_the_dense_one(model):
    batch = make_inputs()
    model.train()
    with model.pruning(None):
        dense = model(**batch)
    with model.pruning(**SETTING):
        pruned = model(**batch)
    distilled = distillation_loss(pruned, dense, model.distilled, batch)
    assert distilled > 0 and not distillation_loss(dense, dense, model.distilled, batch)
    for weight in (0.0, 2.0):
        model.config.distillation_weight = weight
        model.set_training_passes([None, SETTING])
        output = model(**batch)
        assert torch.isclose(output.loss, (dense.loss + pruned.loss + weight * distilled) / 2)
        assert torch.equal(output.vision_tokens, pruned.vision_tokens)  # the output is the last pass's
    # Evaluation runs the one pass that the model is set to.
    assert torch.isclose(model.eval()(**batch).loss, dense.loss)
    model.set_training_passes(None)
    assert torch.isclose(model.train()(**batch).loss, dense.loss)


@pytest.mark.parametrize("task", [*TASKS, "clip"])
def test_every_task_learns_from_its_dense_pass(task):
    if task == "clip":
        model, batch = make_clip_model(), {**make_clip_inputs(), "return_loss": True}
    else:
        model = make_task_model(task)
        batch = {**TASKS[task].make_inputs(), **TASKS[task].to_train}
    model.train().set_training_passes([None, SETTING])
    output = model(**batch)
    model.config.distillation_weight = 0.0
    assert output.loss > model(**batch).loss
    output.loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not [name for name in missing if "alignment" in name]


def test_a_teacher_takes_the_place_of_the_dense_pass(model):
    batch, teacher = make_inputs(), copy.deepcopy(model).eval()
    model.train().set_training_passes([None, SETTING], teacher=teacher)
    same = model(**batch).loss
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    other = model(**batch).loss
    assert other > same
    other.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any("teacher" in name for name in model.state_dict())


def test_the_reduction_is_measured_in_the_pruned_passes_alone(model, tmp_path):
    callback = ReductionCallback((0.2, 0.5), num_targets=2, largest_pass=True)
    trainer = train(model, callback, tmp_path, max_steps=60)
    reached = [entry["reduction"] for entry in trainer.state.log_history if "reduction" in entry]
    for index, target in enumerate((0.2, 0.5)):
        last = [value for step, value in enumerate(reached) if callback._current(step) == index][-8:]
        assert sum(last) / len(last) == pytest.approx(target, abs=0.03)
    assert model._training_passes is None


def test_with_a_dense_pass_the_dense_model_learns_as_well(model, tmp_path):
    rows = Rows(64)
    batch = {name: torch.stack([row[name] for row in rows.rows]) for name in rows.rows[0]}
    losses = {}
    for dense_pass in (True, False):
        trained = copy.deepcopy(model)
        callback = ReductionCallback(0.5, dense_pass=dense_pass)
        train(trained, callback, tmp_path, rows, max_steps=30, learning_rate=1e-3, per_device_train_batch_size=16)
        trained.eval().set_pruning(None)
        with torch.no_grad():
            losses[dense_pass] = trained(**batch).loss.item()
    assert losses[True] < losses[False]


def test_targets_that_are_not_numbers_are_refused_in_a_sentence():
    for target in ("0.5", None, (0.3, 0.5, 0.8)):
        with pytest.raises(TypeError, match=r"target_reduction=.*: expected a number in \(0, 1\)"):
            ReductionCallback(target)
    assert MadtpBlipForQuestionAnswering._training_passes is None
