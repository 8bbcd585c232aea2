import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoProcessor, Trainer, TrainerCallback, TrainerState, TrainingArguments

from madtp_hf import MadtpBlipForQuestionAnswering, ReductionCallback, calibrate, init_alignment_from
from madtp_hf.data import QuestionAnsweringCollator, load_digit_questions

from .conftest import make_inputs


DIGITS = Path(__file__).parents[1] / "examples" / "blip-vqa-digits"


class Rows(torch.utils.data.Dataset):
    def __init__(self, count=256):
        inputs = make_inputs(lengths=(8,) * count, seed=3)
        self.rows = [{name: value[index] for name, value in inputs.items()} for index in range(count)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def train(model, callback, folder, rows=None, data_collator=None, **settings):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 60,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**{**defaults, **settings}),
        train_dataset=rows or Rows(),
        data_collator=data_collator,
        callbacks=[callback],
    )
    trainer.train()
    return trainer


# Each target and each start once; the other pairs are slow tests.
@pytest.mark.parametrize(
    "target, start",
    [
        (target, start) if row == column == 0 else pytest.param(target, start, marks=pytest.mark.slow)
        for row, target in enumerate((0.1, 0.35, 0.5))
        for column, start in enumerate((0.0, 0.01, 1000.0))
    ],
)
def test_the_reduction_settles_at_the_target(model, target, start, tmp_path):
    model.set_pruning(temperature=start)
    trainer = train(model, ReductionCallback(target), tmp_path)
    reductions = [entry["reduction"] for entry in trainer.state.log_history if "reduction" in entry]
    assert len(reductions) == 60
    assert sum(reductions[-20:]) / 20 == pytest.approx(target, abs=0.02)
    assert model.config.pruning_temperature > 0
    # The trained model is free of the callback: a forward pass measures nothing any more.
    assert not model._forward_hooks


def test_a_range_learns_a_temperature_for_each_target(model, tmp_path):
    callback = ReductionCallback((0.3, 0.5), num_targets=3)
    trainer = train(model, callback, tmp_path, max_steps=100)
    last = {}
    for step, entry in enumerate(entry for entry in trainer.state.log_history if "reduction" in entry):
        last.setdefault(callback._current(step), []).append(entry["reduction"])
    for index, target in enumerate(callback.targets):
        assert sum(last[index][-8:]) / 8 == pytest.approx(target, abs=0.03)


def test_resumed_training_goes_on_at_the_same_temperature(model, tmp_path):
    callback = ReductionCallback(0.5)
    train(model, callback, tmp_path, save_strategy="steps", save_steps=20, max_steps=20)

    class Seen(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.temperature = model.config.pruning_temperature

    model.set_pruning(None)  # so that the temperature comes from the checkpoint or from nowhere
    seen = Seen()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=21,
            per_device_train_batch_size=8,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            restore_callback_states_from_checkpoint=True,
        ),
        train_dataset=Rows(),
        callbacks=[ReductionCallback(0.5), seen],
    )
    trainer.train(resume_from_checkpoint=True)
    assert seen.temperature == pytest.approx(math.exp(callback.points[0]))


def test_a_callback_that_has_trained_on_goes_back_to_its_checkpoint(model, tmp_path):
    callback = ReductionCallback(0.5)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    trainer = train(model, callback, tmp_path, **settings)
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-2" / "trainer_state.json"))
    (saved,) = state.stateful_callbacks["ReductionCallback"]["attributes"]["points"]
    assert saved != callback.points[0]
    began = []

    class Seen(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            began.append((state.global_step, *callback.points))

    trainer.add_callback(Seen())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert began[0] == (2, saved)


def test_a_target_out_of_reach_does_not_wind_up(model, tmp_path):
    callback = ReductionCallback(0.99, gain=1000.0)
    train(model, callback, tmp_path, max_steps=50)
    assert math.exp(callback.points[0]) <= 1e6 * 1.001 and model.config.pruning_temperature > 0


@pytest.mark.parametrize("target", (0.0, 1.0, -0.2, (0.6, 0.3)))
def test_bad_targets_are_named(target):
    with pytest.raises(ValueError, match="target_reduction="):
        ReductionCallback(target)


@pytest.mark.slow
def test_it_holds_the_target_where_the_reduction_answers_steeply(tmp_path):
    """With alignment tokens fitted to its data, a hundredth of the threshold's factor is 0.05 of the reduction."""
    processor = AutoProcessor.from_pretrained(DIGITS)
    model = MadtpBlipForQuestionAnswering.from_blip(DIGITS, num_alignment_tokens=64)
    collator = QuestionAnsweringCollator(processor, model.config.text_config.bos_token_id)
    rows = load_digit_questions("train", 288)
    batches = DataLoader(rows, 64, collate_fn=collator)
    init_alignment_from(model, batches)
    calibrate(model, list(batches)[:1], [0.5])
    settings = {"max_steps": 12, "per_device_train_batch_size": 24, "learning_rate": 1e-5}
    trainer = train(model, ReductionCallback(0.5), tmp_path, rows, collator, **settings)
    reductions = [entry["reduction"] for entry in trainer.state.log_history if "reduction" in entry]
    assert sum(abs(reduction - 0.5) for reduction in reductions) / 12 < 0.05
