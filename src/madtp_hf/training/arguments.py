"""Command-line arguments of the example scripts for pruning and data, and what the scripts derive from them."""

import argparse
import json
from dataclasses import dataclass, field, fields

import torch
from transformers import HfArgumentParser, TrainingArguments

from ..budgets.alignment import init_alignment_from
from ..budgets.calibration import calibrate
from ..budgets.evaluation import public_name
from ..checkpoints.load import load
from ..data import load_coco_captions, load_digit_captions, load_flickr30k
from .reduction_callback import ReductionCallback


class _HelpAll(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        parser.print_all_help()
        parser.exit()


class ScriptParser(HfArgumentParser):
    """`HfArgumentParser` whose `--help` shows a script's own options; `--help-all` shows all of them.

    dataclass_types: as in `HfArgumentParser`; defaults (`dict`): values that override the classes' own defaults.
    """

    def __init__(self, dataclass_types, description: str, **defaults):
        super().__init__(
            dataclass_types, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        own = [cls for cls in dataclass_types if not issubclass(cls, TrainingArguments)]
        self._own = {"help", "help_all", "output_dir", *(name.name for cls in own for name in fields(cls))}
        self.add_argument(
            "--help-all",
            action=_HelpAll,
            nargs=0,
            default=argparse.SUPPRESS,
            help="show the options of `TrainingArguments` as well",
        )
        # Without a GPU, torch warns of pinned memory with every loader.
        self.set_defaults(dataloader_pin_memory=torch.cuda.is_available(), **defaults)

    def print_all_help(self) -> None:
        """Print the help of all options."""
        print(super().format_help())

    def format_help(self) -> str:
        hidden = [action for action in self._actions if action.dest not in self._own]
        texts = [action.help for action in hidden]
        for action in hidden:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in zip(hidden, texts):
                action.help = text


@dataclass
class PruningArguments:
    """Pruning options for `HfArgumentParser`, to use with `TrainingArguments`."""

    dense: bool = field(default=False, metadata={"help": "Train and evaluate without pruning."})
    target_reduction: list[float] = field(
        default_factory=lambda: [0.5, 0.8],
        metadata={"help": "The reduction of FLOPs to train at, or two: a range to draw from."},
    )
    num_targets: int = field(default=3, metadata={"help": "How many targets in that range."})
    reductions: list[float] = field(
        default_factory=lambda: [0.3, 0.5, 0.8], metadata={"help": "Reductions to calibrate and evaluate."}
    )
    num_alignment_tokens: int = field(default=64, metadata={"help": "How many alignment tokens."})
    alignment_dim: int = field(default=0, metadata={"help": "Their width; 0 for the text's."})
    random_alignment: bool = field(
        default=False, metadata={"help": "Start from random alignment tokens, not from what the model reads."}
    )

    def __post_init__(self):
        if self.dense:
            self.reductions = []

    def load(self, source: str, task: str):
        """Load a task's model and processor: a pruned one unchanged, a dense one with new alignment tokens."""
        shape = {"num_alignment_tokens": self.num_alignment_tokens, "alignment_dim": self.alignment_dim or None}
        loaded = load(source, task, device="cpu", **shape)  # in float32: weights in half precision don't train
        return loaded.model, loaded.processor

    def prepare(self, model, train_batches, validation_batches, do_train: bool) -> None:
        """Fit new alignment tokens to training batches, and calibrate the starting point of training or evaluation."""
        if self.dense:
            return
        if not model.config.pruning_schedule and not self.random_alignment:
            init_alignment_from(model, train_batches)
        calibrate(model, validation_batches, self.target_reduction if do_train else self.reductions)

    def budgets(self, model) -> list[float]:
        """Return the reductions to evaluate: 0, and the requested ones that calibration reached."""
        reached = {entry[0] for entry in model.config.pruning_schedule or ()}
        return [0.0, *(reduction for reduction in self.reductions if reduction in reached)]

    def callbacks(self) -> list:
        """Return the callbacks that control the temperature during training."""
        if self.dense:
            return []
        target = self.target_reduction[0] if len(self.target_reduction) == 1 else tuple(self.target_reduction)
        return [ReductionCallback(target, num_targets=self.num_targets)]

    def settings(self, args, trainer) -> dict:
        """Return the training settings for results and model card; `args` has `model` and `train_samples`."""
        training = trainer.args
        steps = trainer.state.global_step
        settings = {"from": public_name(args.model), "steps": steps}
        if steps:
            settings.update(
                {
                    "training rows": args.train_samples or "all",
                    "batch size": training.train_batch_size
                    * training.gradient_accumulation_steps
                    * training.world_size,
                    "learning rate": training.learning_rate,
                    "learning rate schedule": str(
                        getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
                    ),
                    "seed": training.seed,
                }
            )
            if not self.dense:
                settings["target reduction"] = self.target_reduction
                settings["number of targets"] = self.num_targets
        return settings


@dataclass
class RetrievalArguments:
    """Options for `HfArgumentParser`: data and contrastive training of image-text retrieval."""

    model: str = field(metadata={"help": "A dense model, or a pruned one to go on with: a folder or Hub id."})
    dataset: str | None = field(
        default=None, metadata={"help": "The folder of Flickr30k or COCO, or a Hub id; the digit scenes if not given."}
    )
    image_dir: str | None = field(default=None, metadata={"help": "Its image folder; the data set's if not given."})
    columns: str | None = field(
        default=None, metadata={"help": "What a Hub data set's columns are called, as JSON: ours to theirs."}
    )
    train_samples: int | None = field(default=12800, metadata={"help": "Rows to train on; 0 for all."})
    validation_samples: int | None = field(default=512, metadata={"help": "Rows to calibrate on; 0 for all."})
    test_samples: int | None = field(default=250, metadata={"help": "Images to evaluate on; 0 for all."})
    evaluation_split: str = field(default="test", metadata={"help": "To evaluate on; validation to choose settings."})
    max_length: int | None = field(default=None, metadata={"help": "Cut captions to so many tokens."})
    queue_size: int = field(default=1024, metadata={"help": "Features of earlier batches to contrast with."})
    momentum: float = field(default=0.995, metadata={"help": "How much of the momentum encoder stays at a step."})
    distillation: float = field(default=0.4, metadata={"help": "How much of the targets are the momentum encoder's."})

    def load_data(self) -> tuple:
        """Return the rows for training, calibration and evaluation."""
        numbers = (self.train_samples, self.validation_samples, self.test_samples)
        splits = ("train", "validation", self.evaluation_split)
        return tuple(self._load(split, rows) for split, rows in zip(splits, numbers))

    def _load(self, split: str, rows: int | None):
        if self.dataset is None:
            return load_digit_captions(split, rows)
        columns = json.loads(self.columns) if self.columns else None
        load = load_flickr30k if "flickr" in self.dataset.lower() else load_coco_captions
        data = load(self.dataset, split, image_dir=self.image_dir, columns=columns)
        return data.shuffle(seed=0).select(range(min(rows, len(data)))) if rows else data

    def dataset_facts(self, example: str) -> dict:
        """Return the facts about the data that results and model card report."""
        name = public_name(self.dataset) if self.dataset else "digit scenes"
        return {"name": name, "split": self.evaluation_split, "example": example}
