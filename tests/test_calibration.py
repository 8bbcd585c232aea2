import re

import pytest
import torch

from madtp_hf import calibrate
from madtp_hf.calibration import decoder_tokens, measure, measure_reduction

from .conftest import TASKS, make_inputs, make_task_model


@pytest.fixture
def batches():
    return [make_inputs(lengths=(9, 5, 7, 12), seed=seed) for seed in range(6)]


def test_reductions_are_reached_and_written_down(model, batches):
    before = model.config.pruning_temperature
    model.train()
    schedule = calibrate(model, batches, [0.5, 0.4, 0.45])
    assert model.training and model.config.pruning_temperature == before
    assert schedule == model.config.pruning_schedule
    assert [reduction for reduction, _ in schedule] == [0.4, 0.45, 0.5]
    model.eval()
    for reduction, temperature in schedule:
        assert measure_reduction(model, batches, temperature) == pytest.approx(reduction, abs=0.01)
        model.set_pruning(reduction=reduction)
        assert model.config.pruning_temperature == pytest.approx(temperature)


def test_batches_without_answers_will_do(model, batches):
    for batch in batches:
        batch.pop("labels")
    (pair,) = calibrate(model, batches, [0.5])
    assert pair[0] == 0.5


def test_what_cannot_be_is_named_and_the_old_schedule_kept(model, batches):
    model.config.pruning_schedule = [[0.5, 1.0]]
    with pytest.raises(ValueError, match=r"can't reach 0.98 .*, 0.99 .*the largest reduction .*ReductionCallback"):
        calibrate(model, batches, [0.99, 0.98])
    with pytest.raises(ValueError, match="expected numbers between 0 and 1"):
        calibrate(model, batches, [1.0, 0.5])
    for number in (0.5, torch.tensor(0.5)):
        with pytest.raises(
            TypeError, match=r"^reductions=.*0\.5.*: expected a list of numbers .*, such as \[0\.3\]\.$"
        ):
            calibrate(model, batches, number)
    for strings in ("0.5", ["0.5"], [0.3, "0.5"], [None]):
        with pytest.raises(TypeError, match=r"^reductions=.*: expected .*numbers between 0 and 1"):
            calibrate(model, batches, strings)
    with pytest.raises(ValueError, match="only once"):
        calibrate(model, iter(batches), [0.5])
    with pytest.raises(ValueError, match="gave no batch"):
        calibrate(model, [], [0.5])
    assert model.config.pruning_schedule == [[0.5, 1.0]]
    assert model.config.pruning_temperature == 0.0 and not model.training


def test_what_is_out_of_reach_is_left_out_with_a_warning(model, batches):
    with pytest.warns(
        UserWarning, match=r"Left out of the schedule: .* 0\.99 .*the largest reduction .* about (0\.\d+)"
    ) as told:
        schedule = calibrate(model, batches, [0.5, 0.99, 0.4])
    assert [reduction for reduction, _ in schedule] == [0.4, 0.5] and model.config.pruning_schedule == schedule
    largest = float(re.search(r"largest reduction that it reaches is about ([\d.]+\d)", str(told[0].message))[1])
    assert 0.5 < largest < 0.99
    assert measure_reduction(model, batches, 1e6) <= largest + 1e-3
    with pytest.raises(ValueError, match="outside what this model's schedule covers"):
        model.set_pruning(reduction=0.99)
    (pair,) = calibrate(model, batches, [largest - 0.005])  # what is said to be reached is
    assert pair[0] == largest - 0.005


@pytest.mark.parametrize("task", TASKS)
def test_labels_change_nothing_but_what_the_decoder_reads(task):
    """Reductions are measured without losses, and are those of the forward pass of the batch as it is."""
    model = make_task_model(task)
    batch = TASKS[task].make_inputs((9, 5, 7, 12))
    measured = measure_reduction(model, [batch], 3.0)
    with torch.no_grad():
        assert measured == pytest.approx(measure(model, batch, model(**batch)).mean().item(), abs=1e-6)


def test_random_weights_of_transformers_own_initialisation(batches):
    from madtp_hf import MadtpBlipForQuestionAnswering

    from .conftest import make_blip

    blip = make_blip(vision_config={"initializer_range": 0.02}, text_config={"initializer_range": 0.02})
    model = MadtpBlipForQuestionAnswering.from_blip(blip, num_alignment_tokens=12)
    calibrate(model, batches, [0.5])
    model.set_pruning(reduction=0.5)
    with torch.no_grad():
        assert model(**batches[0]).loss.isfinite()


@pytest.mark.parametrize("task", ("captioning", "nlvr2", "retrieval"))
def test_every_task_is_calibrated(task):
    # Enough of a vision encoder for half of the FLOPs to be its own.
    model = make_task_model(task, text_config={"num_hidden_layers": 2})
    batches = [TASKS[task].make_inputs((9, 5, 7, 12), seed=seed) for seed in range(3)]
    schedule = calibrate(model, batches, [0.4, 0.5])
    assert model.config.pruning_temperature == 0.0
    for reduction, temperature in schedule:
        assert measure_reduction(model, batches, temperature) == pytest.approx(reduction, abs=0.01)
    for batch in batches:
        batch.pop("labels", None)
        batch["return_loss"] = True  # what a collator adds besides tensors does not matter
        if task == "captioning":  # images alone will do
            del batch["input_ids"], batch["attention_mask"], batch["return_loss"]
    calibrate(model, batches, [0.5])


def test_a_captions_padding_and_prompt_are_counted_as_they_are_read():
    model = make_task_model("captioning")
    batch = TASKS["captioning"].make_inputs((9, 5, 7))
    assert decoder_tokens(batch, "captioning", model.config).tolist() == [9, 5, 7]
    del batch["attention_mask"]
    assert decoder_tokens(batch, "captioning", model.config).tolist() == [9, 5, 7]
    assert decoder_tokens(make_inputs(), "vqa", model.config).tolist() == [4, 4, 4]
    for task in ("nlvr2", "retrieval"):
        assert decoder_tokens(TASKS[task].make_inputs(), task, model.config) == 0
