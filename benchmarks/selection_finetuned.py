"""Accuracy at equal FLOPs after fine-tuning: MADTP beside other ways, one checkpoint for all budgets beside one each.

    python benchmarks/selection_finetuned.py --tasks vqa nlvr2     # all rows; run again, it goes on where it was
    python benchmarks/selection_finetuned.py --tasks vqa --methods tome evit --seeds 0
    python benchmarks/selection_finetuned.py --methods madtp_data own_0.5 own_0.8
    python benchmarks/selection_finetuned.py --tasks vqa --seeds 0 --split validation --learning_rate 5e-5 \\
        --output benchmarks/results/selection_validation_5e-5.json

Every row is one training run of the same steps, data and optimizer (`examples/prune_digit_vqa.py`'s recipe), from the
shipped dense model; the seed draws scenes, their order, and what is random in a method. The learning rate is the
better one of 5e-5 and 2e-4 on validation samples, which the last command measures; it is the same for all methods.
Methods, tables and the rest as in selection.py. Beside them:

- `dense`: the dense model as it is; `dense_finetuned`: trained without pruning, for the same steps
- `own_0.5`, `own_0.8`: MADTP trained for one budget alone, and evaluated there

All but `own_` draw the reduction of a step from 0.5, 0.65 and 0.8: by `ReductionCallback`, or as the schedule of a
fixed number of tokens."""

import argparse
import functools
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import methods  # noqa: F401 (registers the ablations)
import torch
from selection import calibrate_all, init_from_training_data
from selection_tasks import (
    BATCH_SIZE,
    LOADERS,
    ROOT,
    Evaluation,
    Results,
    finish_row,
    load_model,
    make_batches,
    make_collator,
    shipped_models,
    study_header,
)
from transformers import Trainer, TrainingArguments, set_seed

from madtp_hf import ReductionCallback, RetrievalTrainer, create_optimizer
from madtp_hf.modeling.pruning_method import METHODS as METHODS_BY_NAME
from madtp_hf.tasks import TASKS


TARGETS = [0.5, 0.65, 0.8]  # of a training step
REDUCTIONS = [0.5, 0.7, 0.8]  # evaluated
METHODS = (
    "dense",
    "dense_finetuned",
    "tome",
    "evit",
    "random",
    "class_attention",
    "madtp_data",
    "own_0.5",
    "own_0.8",
)
LEARNING_RATES = {"captioning": 1e-4, "retrieval": 1e-4}  # of examples/run_TASK.py, for all methods
LEARNING_RATE = 5e-5
QUEUE = {"queue_size": 1024, "momentum": 0.995, "distillation": 0.4}  # examples/run_retrieval.py's


def train(model, task: str, dataset, collator, callbacks: list, seed: int, learning_rate: float) -> None:
    """One epoch by the demo's recipe: AdamW with slow alignment parameters, cosine with a warm-up of a twentieth."""
    trainer_class = Trainer
    if TASKS[task].metric == "retrieval_recall":
        trainer_class = functools.partial(RetrievalTrainer, **QUEUE)
    with TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH_SIZE,
                num_train_epochs=1,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                logging_steps=20,
                save_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                use_cpu=True,
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=dataset,
            data_collator=collator,
            callbacks=callbacks,
            optimizers=(create_optimizer(model, learning_rate), None),
        )
        trainer.train()
    model.eval()


def prepare(model, method: str, task: str, collator, validation: list[dict], seed: int) -> list:
    """Set a model up for training by a method; its callbacks."""
    if method.startswith("dense"):
        return []
    init_from_training_data(model, task, collator, seed)
    if method in METHODS_BY_NAME:
        model.set_pruning_method(method)
    targets = [float(method.removeprefix("own_"))] if method.startswith("own_") else TARGETS
    calibrate_all(model, validation, targets)  # where the callback begins
    target = targets[0] if len(targets) == 1 else (targets[0], targets[-1])
    return [ReductionCallback(target, num_targets=len(TARGETS), seed=seed)]


def run_row(method, task, folder, seed, args, evaluation, validation) -> tuple[list[dict], float]:
    """Train and evaluate; the points, and the seconds of the training alone."""
    set_seed(seed)
    model, collator = load_model(task, folder, seed), evaluation.collator
    callbacks = prepare(model, method, task, collator, validation, seed)
    dataset = LOADERS[task]("train", args.steps * BATCH_SIZE, seed)
    started = time.perf_counter()
    if method != "dense":
        learning_rate = args.learning_rate or LEARNING_RATES.get(task, LEARNING_RATE)
        train(model, task, dataset, collator, callbacks, seed, learning_rate)
    seconds = round(time.perf_counter() - started, 1)
    if method.startswith("dense"):
        return evaluation.at(model, [0.0]), seconds
    reductions = [float(method.removeprefix("own_"))] if method.startswith("own_") else REDUCTIONS
    calibrate_all(model, validation, reductions)
    return evaluation.at(model, reductions), seconds


def prepare_data(task: str, collator, args) -> tuple[Evaluation, list[dict]]:
    """What is evaluated on, and the batches that thresholds are calibrated on: other samples, of either split."""
    if args.split == "test":
        calibrated = LOADERS[task]("validation", args.validation_samples)
        evaluated = LOADERS[task]("test", args.test_samples)
    else:
        rows = LOADERS[task]("validation", args.validation_samples + args.test_samples)
        calibrated = rows.select(range(args.validation_samples))
        evaluated = rows.select(range(args.validation_samples, len(rows)))
    return Evaluation(task, evaluated, collator), make_batches(task, calibrated, collator)


def keys_of(args) -> list[tuple]:
    """(task, folder, method, seed) of the rows that are asked for, in order: a seed of all methods before the next."""
    models = [(args.tasks[0], args.model)] if args.model else []
    for task in [] if args.model else args.tasks:
        models += shipped_models([task])[:1]
    keys = []
    for task, folder in models:
        for seed in args.seeds:
            keys += [(task, folder, method, seed) for method in args.methods if method != "dense" or seed == 0]
    return keys


def run(args) -> None:
    """Make the rows that are asked for and not there yet."""
    header = study_header(
        "fine-tuned",
        steps=args.steps,
        batch_size=BATCH_SIZE,
        validation_samples=args.validation_samples,
        test_samples=args.test_samples,
        split=args.split,
        learning_rate=args.learning_rate or LEARNING_RATE,
        other_learning_rates={} if args.learning_rate else LEARNING_RATES,
        targets=TARGETS,
    )
    results = Results(args.output, header)
    keys = keys_of(args)
    results.forget([(task, folder.name, *rest) for task, folder, *rest in keys if rest[0] in args.redo])
    loaded, prepared = None, None
    for task, folder, method, seed in keys:
        if (task, folder.name, method, seed) in results:
            continue
        if loaded != (task, folder):
            collator = make_collator(task, folder)
            prepared = prepare_data(task, collator, args)
            loaded = (task, folder)
        started = time.perf_counter()
        row = {"task": task, "model": folder.name, "method": method, "seed": seed}
        points, row["training_seconds"] = run_row(method, task, folder, seed, args, *prepared)
        results.add(finish_row(row, points, started))
        print(*row.values(), *(f"{point['reached']:.3f}: {point['score']:.4f}" for point in points), flush=True)


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["vqa", "nlvr2", "captioning", "retrieval"])
    parser.add_argument(
        "--model", type=Path, help="a dense model's folder, for the one task of --tasks; default: examples/"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--validation_samples", type=int, default=512)
    parser.add_argument("--test_samples", type=int, default=1000, help="to evaluate on")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="of which they are")
    parser.add_argument("--learning_rate", type=float, help="of all tasks and methods; default: what was chosen")
    parser.add_argument("--redo", nargs="+", choices=METHODS, default=[], help="make the rows of these methods again")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "selection_finetuned.json")
    args = parser.parse_args(arguments)
    if args.model and len(args.tasks) != 1:
        parser.error("--model needs one task: add --tasks TASK.")
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    torch.set_num_threads(1)
    try:
        run(args)
    except ValueError as error:
        if "is of a study" not in str(error):
            raise
        sys.exit(str(error))


if __name__ == "__main__":
    main()
