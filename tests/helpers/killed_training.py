"""A training that kills itself at a given point. `tests/test_resuming.py` runs it in separate processes."""

import os
import signal
from unittest import mock

import numpy as np
import torch
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainingArguments

from madtp_hf import MadtpBlipForQuestionAnswering, ReductionCallback, create_optimizer, last_checkpoint
from madtp_hf.data import QuestionAnsweringCollator

from ..conftest import make_blip, make_processor


SAVE_STEPS = 4  # an epoch has 6 steps, so training resumes within epochs
STEPS = 18


def make_rows(count):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 48, 48, 3), dtype=np.uint8)
    return [
        {
            "image": Image.fromarray(pixels[index]),
            "question": ["how many sevens are there?", "which digit?", "is the leftmost digit red?"][index % 3],
            "answers": ["seven", "three", "one", "two", "yes"][index % 3 :],
        }
        for index in range(count)
    ]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Death(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def train(folder, resume=False, step=None, saving=None, **settings):
    """Train with everything that is drawn at random: order, answers, dropout, targets.

    The process dies after `step`, or half-way through `saving` at a step. `resume` is passed to `Trainer.train`, or is
    "last_checkpoint". The values to compare are written to `folder`/final.pt.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MadtpBlipForQuestionAnswering.from_blip(
        make_blip(text_config={"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}),
        num_alignment_tokens=12,
    )
    rows = make_rows(24)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            save_steps=SAVE_STEPS,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            **settings,
        ),
        train_dataset=rows,
        eval_dataset=rows[:8],
        data_collator=QuestionAnsweringCollator(make_processor(), 38),
        callbacks=[ReductionCallback((0.3, 0.5), num_targets=3), Death(step)],
        optimizers=(create_optimizer(model, 1e-3), None),
    )
    save = Trainer._save_optimizer_and_scheduler

    def save_or_die(self, output_dir):
        if self.state.global_step == saving:
            die()
        save(self, output_dir)

    with mock.patch.object(Trainer, "_save_optimizer_and_scheduler", save_or_die):
        trainer.train(resume_from_checkpoint=last_checkpoint(folder) if resume == "last_checkpoint" else resume)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ReductionCallback))
    metrics = [trainer.evaluate()["eval_loss"]]  # at the threshold of the largest target
    history = trainer.state.log_history
    for name in ("loss", "reduction", "pruning_temperature", "learning_rate"):
        metrics.append([entry[name] for entry in history if name in entry])
    weights = model.state_dict()
    torch.save({"metrics": metrics, "weights": weights, "temperatures": callback.points}, f"{folder}/final.pt")
