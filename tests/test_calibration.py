import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

from madtp_hf import calibrate
from madtp_hf.budgets.calibration import measure_reduction
from madtp_hf.budgets.passes import decoder_tokens, measure

from .conftest import TASKS, make_inputs, make_task_model


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from any_budget import random_batches, random_model, reach


def settings_of(schedule):
    """Each reduction of a schedule, with its setting."""
    for entry in schedule:
        yield entry["reduction"], {name: value for name, value in entry.items() if name != "reduction"}


@pytest.fixture
def batches():
    return [make_inputs(lengths=(9, 5, 7, 12), seed=seed) for seed in range(6)]


def test_reductions_are_reached_and_written_down(model, batches):
    before = model.config.pruning_temperature
    model.train()
    schedule = calibrate(model, batches, [0.5, 0.4, 0.45])
    assert model.training and model.config.pruning_temperature == before
    assert schedule == model.config.pruning_schedule
    assert model.config.calibrated_reductions == [0.4, 0.45, 0.5]
    model.eval()
    for reduction, setting in settings_of(schedule):
        assert measure_reduction(model, batches, **setting) == pytest.approx(reduction, abs=0.01)
        model.set_pruning(reduction=reduction)
        assert model.config.pruning_setting == pytest.approx(setting)
        assert model.config.pruning_temperature == pytest.approx(setting["temperature"])


def test_batches_without_answers_will_do(model, batches):
    for batch in batches:
        batch.pop("labels")
    (entry,) = calibrate(model, batches, [0.5])
    assert entry["reduction"] == 0.5


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
    with pytest.raises(ValueError, match="yields no batch"):
        calibrate(model, [], [0.5])
    assert model.config.pruning_schedule == [{"reduction": 0.5, "temperature": 1.0, "factor": 1.0}]
    assert model.config.pruning_temperature == 0.0 and not model.training


def test_what_is_out_of_reach_is_left_out_with_a_warning(model, batches):
    with pytest.warns(
        UserWarning, match=r"Left out of the schedule: .* 0\.99 .*the largest reduction .* about (0\.\d+)"
    ) as told:
        schedule = calibrate(model, batches, [0.5, 0.99, 0.4])
    assert model.config.calibrated_reductions == [0.4, 0.5] and model.config.pruning_schedule == schedule
    largest = float(re.search(r"largest reduction that it reaches is about ([\d.]+\d)", str(told[0].message))[1])
    assert 0.5 < largest < 0.99
    assert measure_reduction(model, batches, temperature=1e6) <= largest + 1e-3
    with pytest.raises(ValueError, match="outside what this model's schedule covers"):
        model.set_pruning(reduction=0.99)
    (entry,) = calibrate(model, batches, [largest - 0.005])  # what is said to be reached is
    assert entry["reduction"] == largest - 0.005


@pytest.mark.parametrize("task", TASKS)
def test_labels_change_nothing_but_what_the_decoder_reads(task):
    """Reductions are measured without losses, and are those of the forward pass of the batch as it is."""
    model = make_task_model(task)
    batch = TASKS[task].make_inputs((9, 5, 7, 12))
    measured = measure_reduction(model, [batch], temperature=3.0)
    assert not model.is_pruning
    model.set_pruning(temperature=3.0)
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
    for reduction, setting in settings_of(schedule):
        assert measure_reduction(model, batches, **setting) == pytest.approx(reduction, abs=0.01)
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


@pytest.mark.filterwarnings("ignore:The schedule rests on")
@pytest.mark.parametrize("draw", (0, *(pytest.param(draw, marks=pytest.mark.slow) for draw in (1, 2))))
@pytest.mark.parametrize("task", TASKS)
def test_small_reductions_are_reached_whatever_the_draw(task, draw):
    """No temperature saves so little with these alignment tokens, of one norm; a factor on the threshold does."""
    model = make_task_model(task, text_config={"num_hidden_layers": 2})
    generator = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        model.alignment.tokens.copy_(torch.randn(model.alignment.tokens.shape, generator=generator))
    batches = [TASKS[task].make_inputs((9, 5, 7, 12), seed=seed) for seed in range(6)]
    schedule = calibrate(model, batches, [0.05, 0.1, 0.2, 0.3])
    assert model.config.calibrated_reductions == [0.05, 0.1, 0.2, 0.3]
    assert 0 < schedule[0]["factor"] < 1
    for reduction, setting in settings_of(schedule):
        assert measure_reduction(model, batches, **setting) == pytest.approx(reduction, abs=0.01)
    # In between, too, it saves something in between.
    model.set_pruning(reduction=0.15)
    assert 0.1 < measure_reduction(model, batches, **model.config.pruning_setting) < 0.2


def test_too_few_samples_to_trust_get_a_warning_with_their_number(model, batches):
    with pytest.warns(
        UserWarning, match=r"rests on 2 samples, too few .* Pass at least (\d+) samples for 0\.01"
    ) as told:
        calibrate(model, [make_inputs(lengths=(3, 16))], [0.4])
    needed = int(re.search(r"Pass at least (\d+)", str(told[-1].message))[1])
    assert 2 < needed < 10_000
    with pytest.warns(UserWarning, match="rests on 1 sample, which doesn't show"):
        calibrate(model, [make_inputs(lengths=(9,))], [0.4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, [make_inputs(lengths=(9,) * 40, seed=seed) for seed in range(12)], [0.4])


def test_a_model_is_calibrated_on_the_path_that_it_was_trained_on(model, batches):
    model.set_pruning(temperature=0.5, factor=0.7)
    (first, *_, last) = calibrate(model, batches, [0.05, 0.1, 0.5])
    assert first["temperature"] == 0.5 and first["factor"] < 1 and last["temperature"] >= 0.5


@pytest.mark.parametrize("task", [t if t == "nlvr2" else pytest.param(t, marks=pytest.mark.slow) for t in TASKS])
def test_any_budget_on_an_untrained_model_of_default_settings(task):
    """As `benchmarks/any_budget.py` does on larger ones."""
    found = reach(random_model(task, 3, 32, seed=4), random_batches(task, 64, 32, seed=0), [0.05, 0.1, 0.3, 0.5, 0.95])
    for asked, measured in found["reached"].items():
        assert measured == pytest.approx(asked, abs=0.01)
    assert {0.05, 0.1, 0.3} <= set(found["reached"]) and 0.95 not in found["reached"]
    largest = float(re.search(r"largest reduction that it reaches is about (0\.\d+)", found["told"][0])[1])
    assert all((asked in found["reached"]) == (asked <= largest + 0.01) for asked in (0.3, 0.5, 0.95))
