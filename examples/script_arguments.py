"""What the `run_*.py` scripts share: their options for data and pruning, and the folder that they write."""

import argparse
import copy
import inspect
import json
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from madtp_hf import (
    MadtpBlipConfig,
    ReductionCallback,
    RetrievalTrainer,
    calibrate,
    init_alignment_from,
    last_checkpoint,
)
from madtp_hf.budgets.evaluation import bare_name, conservative_budget, public_name, report
from madtp_hf.checkpoints.card import write_model_card
from madtp_hf.checkpoints.load import load


MAX_LOSS = 0.01  # how much of the metric on validation data the budget may cost that a checkpoint is saved with


def default_of(function, name: str):
    """Return the default of a parameter of the package, so that a script's default is the same."""
    return inspect.signature(function).parameters[name].default


class _HelpAll(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        parser.print_all_help()
        parser.exit()


class ScriptParser(HfArgumentParser):
    """`HfArgumentParser` that reads a recipe, a YAML file of options, from the first argument.

    Options after the recipe override its own. `--help` shows a script's own options; `--help-all` shows all of them.

    dataclass_types: as in `HfArgumentParser`; defaults (`dict`): values that override those below and the classes'
    own.
    """

    def __init__(self, dataclass_types, description: str, **defaults):
        super().__init__(
            dataclass_types,
            usage="%(prog)s [RECIPE.yaml] [options]",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own = [cls for cls in dataclass_types if not issubclass(cls, TrainingArguments)]
        self._own = {"help", "help_all", "output_dir", *(name.name for cls in own for name in fields(cls))}
        self.add_argument(
            "--help-all",
            action=_HelpAll,
            nargs=0,
            default=argparse.SUPPRESS,
            help="Also show the options of `TrainingArguments`.",
        )
        training = {
            "do_train": True,
            "per_device_train_batch_size": 64,
            "per_device_eval_batch_size": 64,
            "num_train_epochs": 1,
            "lr_scheduler_type": "cosine",
            "logging_steps": 20,
            "save_strategy": "no",
            "report_to": "none",
            "remove_unused_columns": False,
            "weight_decay": default_of(torch.optim.AdamW, "weight_decay"),
            "dataloader_pin_memory": torch.cuda.is_available(),  # without a GPU, torch warns with every loader
        }
        self.set_defaults(**{**training, **defaults})

    def parse_args_into_dataclasses(self, args=None, **options) -> tuple:
        args = sys.argv[1:] if args is None else list(args)
        if args and not args[0].startswith("-"):
            args = [*self.read_recipe(args[0]), *args[1:]]
        parsed = super().parse_args_into_dataclasses(args, look_for_args_file=False, **options)
        training = next((part for part in parsed if isinstance(part, TrainingArguments)), None)
        if training is not None and training.resume_from_checkpoint == "last":
            training.resume_from_checkpoint = last_checkpoint(training.output_dir)
        return parsed

    def read_recipe(self, file: str) -> list[str]:
        """Return the options of a YAML file as arguments; exit with a message if it can't be read or has others."""
        try:
            recipe = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(
                f"The recipe {file} can't be read ({error}): expected a YAML file of options as the first argument."
            )
        if not isinstance(recipe, dict):
            self.error(f"{file} holds {type(recipe).__name__}: expected lines of the form `option: value`.")
        known = {name.name for cls in self.dataclass_types for name in fields(cls)}
        if unknown := [str(name) for name in recipe if name not in known]:
            self.error(f"{file} has unknown options {', '.join(unknown)}: expected those that --help-all lists.")
        arguments = []
        for name, value in recipe.items():
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            arguments += [f"--{name}", *map(str, values)]
        return arguments

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


def clean_texts(data):
    """Return the rows with questions, sentences and captions in lower case, without the punctuation BLIP drops."""
    for name, space in {"question": "", "sentence": " ", "captions": " "}.items():
        if name in data.column_names:
            options = {"name": name, "space": space}
            data = data.map(_clean_column, input_columns=name, batched=True, fn_kwargs=options)
    return data


def _clean_column(texts, name: str, space: str) -> dict:
    return {name: [_clean(text, space) for text in texts]}


def _clean(text, space: str):
    if not isinstance(text, str):
        return [_clean(one, space) for one in text]
    return " ".join(re.sub(r'[.!"()*#:;~]', space, text.lower()).split())


@dataclass
class DataArguments:
    """Which rows to train, calibrate and evaluate on."""

    dataset: str | None = field(
        default=None, metadata={"help": "The data set's folder, or a Hub id; the digit scenes if not given."}
    )
    image_dir: str | None = field(
        default=None, metadata={"help": "The folder of its images; by default the data set's."}
    )
    columns: str | None = field(
        default=None, metadata={"help": "Columns of a Hub data set, as a JSON object from our names to its names."}
    )
    train_samples: int | None = field(default=12800, metadata={"help": "Rows to train on; 0 for all."})
    validation_samples: int | None = field(default=512, metadata={"help": "Rows to calibrate on; 0 for all."})
    test_samples: int | None = field(default=2000, metadata={"help": "Rows to evaluate on; 0 for all."})
    test_split: str = field(
        default="test", metadata={"help": "The split to evaluate on; `validation` to choose settings."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Truncate texts to this many tokens."})
    clean_texts: bool = field(
        default=False,
        metadata={"help": "Lower-case the data set's texts and drop their punctuation, as BLIP's own code does."},
    )

    def load(self, load_digits, load_published) -> tuple:
        """Return the rows to train, calibrate and evaluate on: of the digit scenes, or of the published data set."""
        columns = json.loads(self.columns) if self.columns else None
        parts = []
        for split, rows in (
            ("train", self.train_samples),
            ("validation", self.validation_samples),
            (self.test_split, self.test_samples),
        ):
            if self.dataset is None:
                parts.append(load_digits(split, rows))
                continue
            data = load_published(self.dataset, split, image_dir=self.image_dir, columns=columns)
            data = data.shuffle(seed=0).select(range(min(rows, len(data)))) if rows else data
            parts.append(clean_texts(data) if self.clean_texts else data)
        return tuple(parts)

    def facts(self, example: str) -> dict:
        """Return the facts about the data that results and model card report; `example` is a text of it."""
        name = public_name(self.dataset) if self.dataset else "digit scenes"
        return {"name": name, "split": self.test_split, "example": example}


@dataclass
class ContrastiveArguments:
    """How `RetrievalTrainer` contrasts images with texts."""

    queue_size: int = field(
        default=default_of(RetrievalTrainer, "queue_size"),
        metadata={"help": "Queue size: features of earlier batches to contrast with."},
    )
    momentum: float = field(
        default=default_of(RetrievalTrainer, "momentum"),
        metadata={"help": "Momentum of the momentum (EMA) encoder."},
    )
    distillation: float = field(
        default=default_of(RetrievalTrainer, "distillation"),
        metadata={"help": "The share of the momentum encoder's outputs in the targets."},
    )
    distillation_warmup_steps: int | None = field(
        default=default_of(RetrievalTrainer, "distillation_warmup_steps"),
        metadata={"help": "The steps over which that share grows; two epochs if not given."},
    )


@dataclass
class PruningArguments:
    """How to prune, and the steps of training and evaluation that depend on it."""

    dense: bool = field(default=False, metadata={"help": "Train and evaluate without pruning."})
    target_reduction: list[float] = field(
        default_factory=lambda: [0.5, 0.8],
        metadata={"help": "The reduction of FLOPs to train at, or two: a range to draw from."},
    )
    num_targets: int = field(
        default=default_of(ReductionCallback, "num_targets"), metadata={"help": "The number of targets in that range."}
    )
    without_dense_pass: bool = field(
        default=False,
        metadata={"help": "Leave out the dense pass of each training step, from which the pruned one learns."},
    )
    teacher: bool = field(
        default=False,
        metadata={"help": "All passes learn from the frozen model that training starts from."},
    )
    distillation_weight: float = field(
        default=MadtpBlipConfig().distillation_weight,
        metadata={"help": "The weight of learning from dense outputs, relative to the task loss."},
    )
    pruning_layers: int = field(
        default=0, metadata={"help": "Prune only in this many first layers; 0 for all layers."}
    )
    reductions: list[float] = field(
        default_factory=lambda: [0.3, 0.5, 0.8], metadata={"help": "Reductions to calibrate and evaluate."}
    )
    num_alignment_tokens: int = field(
        default=MadtpBlipConfig().num_alignment_tokens,
        metadata={"help": "The number of alignment tokens."},
    )
    alignment_dim: int = field(
        default=0, metadata={"help": "Width of the alignment tokens; 0 for the text encoder's."}
    )
    random_alignment: bool = field(
        default=False, metadata={"help": "Start from random alignment tokens instead of fitting them to data."}
    )

    def __post_init__(self):
        self._frozen = None
        if self.dense:
            self.reductions = []

    def load(self, source: str, task: str):
        """Load a task's model and processor: a pruned one unchanged, a dense one with new alignment tokens."""
        shape = {"num_alignment_tokens": self.num_alignment_tokens, "alignment_dim": self.alignment_dim or None}
        shape["distillation_weight"] = self.distillation_weight
        if self.pruning_layers:
            shape["pruning_layers"] = self.pruning_layers
        loaded = load(source, task, device="cpu", **shape)  # in float32: weights in half precision don't train
        return loaded.model, loaded.processor

    def prepare(self, model, train_batches, validation_batches, training_args) -> None:
        """Fit new alignment tokens to training batches, and calibrate the starting point of training or evaluation.

        Both run on the device that the model is trained on, where it stays.
        """
        if self.dense:
            return
        model.to(training_args.device)
        self._frozen = copy.deepcopy(model) if self.teacher else None
        if not model.config.pruning_schedule and not self.random_alignment:
            init_alignment_from(model, train_batches)
        calibrate(model, validation_batches, self.target_reduction if training_args.do_train else self.reductions)

    def callbacks(self) -> list:
        """Return the callbacks that control the temperature during training."""
        if self.dense:
            return []
        target = self.target_reduction[0] if len(self.target_reduction) == 1 else tuple(self.target_reduction)
        options = {"num_targets": self.num_targets, "dense_pass": not self.without_dense_pass}
        return [ReductionCallback(target, teacher=self._frozen, **options)]

    def budgets(self, model) -> list[float]:
        """Return the reductions to evaluate: 0, and the requested ones that calibration reached."""
        reached = model.config.calibrated_reductions
        return [0.0, *(reduction for reduction in self.reductions if reduction in reached)]

    def settings(self, args, trainer) -> dict:
        """Return the training settings for results and model card; `args` has `model` and `dataset`."""
        training, steps = trainer.args, trainer.state.global_step
        settings = {"from": public_name(args.model), "steps": steps}
        if steps:
            batch_size = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
            settings |= {
                "training data": public_name(args.dataset) if args.dataset else "digit scenes",
                "training rows": len(trainer.train_dataset),
                "batch size": batch_size,
                "learning rate": training.learning_rate,
                "learning rate schedule": str(
                    getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
                ),
                "seed": training.seed,
            }
            if not self.dense:
                settings["target reduction"] = self.target_reduction
                if len(self.target_reduction) > 1:
                    settings["number of targets"] = self.num_targets
        evaluated = self.budgets(trainer.accelerator.unwrap_model(trainer.model))
        missed = [reduction for reduction in self.reductions if reduction not in evaluated]
        return settings | ({"reductions not reached": missed} if missed else {})


def save_run(
    model, processor, folder, title: str, rows: list[dict], metric: str, validation: tuple[int, dict], **facts
) -> None:
    """Write results.json, the checkpoint at a conservative budget, and its model card to a folder, and print where.

    Args:
        model, processor: The trained model and its processor.
        folder (`str` or `Path`): The output folder.
        title (`str`): What was evaluated; the heading of the table.
        rows (`list[dict]`): One row per budget, as returned by [`~madtp_hf.budgets.evaluation.budget_rows`].
        metric (`str`): The column of the main metric.
        validation (`tuple[int, dict]`): The number of validation samples, and the metric on them by reduction. The
            checkpoint is saved at their [`~madtp_hf.budgets.evaluation.conservative_budget`].
        facts: Further entries of results.json; `base_model` and `datasets` go into the model card only.
    """
    base_model, datasets = facts.pop("base_model"), facts.pop("datasets", None)
    samples, scores = validation
    reduction = conservative_budget(scores, MAX_LOSS)
    default = {"reduction": reduction, "metric": metric, "samples": samples, "loss": MAX_LOSS}
    default["scores"] = {f"{budget:g}": score for budget, score in scores.items()}
    if len(scores) > 1:  # else there was no budget to choose from
        facts["default_budget"] = default
    report(title, rows, folder, metric=metric, **facts)
    model.set_pruning(reduction=reduction)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_model_card(folder, base_model=base_model, datasets=datasets)
    name, points = bare_name(metric), f"{100 * MAX_LOSS:g} point below that of pruning off"
    if len(scores) == 1:
        loads = "with pruning off"
    elif reduction:
        loads = f"at reduction {reduction:g}, the largest whose validation {name} is at most {points}"
    else:
        loads = f"with pruning off: at every budget, the validation {name} is more than {points}"
    print(f"Wrote the checkpoint, its card and results.json to {folder}. It loads {loads}.")
