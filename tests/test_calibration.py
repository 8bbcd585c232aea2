import pytest
import torch

from madtp_hf import calibrate
from madtp_hf.calibration import decoder_tokens, measure_reduction

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


def test_what_cannot_be_reached_is_named_and_the_old_schedule_kept(model, batches):
    model.config.pruning_schedule = [[0.5, 1.0]]
    with pytest.raises(
        ValueError, match=r"reduction=0.99 is out of this model's reach.*lie between.*ReductionCallback"
    ):
        calibrate(model, batches, [0.5, 0.99])
    with pytest.raises(ValueError, match="expected numbers between 0 and 1"):
        calibrate(model, batches, [1.0, 0.5])
    with pytest.raises(ValueError, match="only once"):
        calibrate(model, iter(batches), [0.5])
    with pytest.raises(ValueError, match="gave no batch"):
        calibrate(model, [], [0.5])
    assert model.config.pruning_schedule == [[0.5, 1.0]]
    assert model.config.pruning_temperature == 0.0 and not model.training


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
