"""Accuracy at equal FLOPs after fine-tuning: MADTP beside other ways, one checkpoint for all budgets beside one each.

    python benchmarks/selection_finetuned.py --tasks vqa nlvr2     # all rows; run again, it resumes
    python benchmarks/selection_finetuned.py --tasks vqa --methods tome evit --seeds 0
    python benchmarks/selection_finetuned.py --methods madtp_data own_0.5 own_0.8
    python benchmarks/selection_finetuned.py --tasks vqa --seeds 0 --split validation --learning_rate 5e-5 \\
        --output benchmarks/results/selection_validation_5e-5.json

    python benchmarks/selection_finetuned.py --tasks vqa --model examples/blip-vqa-digits-plain \\
        --methods dense dense_finetuned first_2_layers --steps 600 --learning_rate 3e-4 --teacher \\
        --distillation_weight 4 --output benchmarks/results/selection_finetuned_plain.json

    python benchmarks/selection_finetuned.py --tasks vqa --model examples/blip-vqa-digits \\
        --methods dense madtp_data --learning_rate 2e-5 \\
        --output benchmarks/results/selection_finetuned_dense_pass.json

    python benchmarks/selection_finetuned.py --tasks vqa --photographs FOLDER \\
        --model examples/blip-vqa-garments --learning_rate 3e-4 --teacher --distillation_weight 4 \\
        --methods dense madtp_data first_2_layers class_attention evit random \\
        --output benchmarks/results/selection_finetuned_photographs.json

With `--methods madtp_merge tome`, and with `--methods dense_finetuned --seeds 0`, the last added their rows. With
`--tasks clip` and `--model examples/clip-garments`, it made selection_finetuned_photographs_clip.json. Rows that were
made before 0.3 was among the reductions do not have it.

Every row is one training run of the same steps, data and optimizer (`examples/prune_digit_vqa.py`'s recipe), from the
shipped dense model; the seed draws scenes, their order, and what is random in a method. The learning rate is the
better one of 5e-5 and 2e-4 on validation samples, which the fourth command measures; it is the same for all methods.
Photographs have the plain model's settings: none was chosen on photographs.
Methods, tables and the rest as in selection.py. Beside them:

- `dense`: the dense model as it is; `dense_finetuned`: trained without pruning, for the same steps
- `first_layer`, `first_2_layers`: MADTP that prunes in these layers alone
- `madtp_merge`, `merge_first_2_layers`: MADTP that merges similar tokens, in all layers or in two
- `own_0.5`, `own_0.8`: MADTP trained for one budget alone, and evaluated there

All but `own_` draw the reduction of a step from 0.5, 0.65 and 0.8 by `ReductionCallback`. Each step also trains the
dense model unless `--pruned_only` is given, as it was for the rows in selection_finetuned.json. The plain model's
learning rate, distillation and layers were chosen on validation samples.
"""

import functools
import time

from calibrating import calibrate_all
from digit_tasks import BATCH_SIZE, LOADERS, Evaluation, load_model, make_batches, run_study, shipped_models, train
from reporting import environment
from selection import FROM_DATA, init_from_training_data, metric, parse_study, set_method, study_parser
from transformers import set_seed

from madtp_hf import ReductionCallback


TARGETS = [0.5, 0.65, 0.8]  # of a training step
REDUCTIONS = [0.0, 0.3, 0.5, 0.7, 0.8]  # evaluated; 0: with pruning off
METHODS = (
    "dense",
    "dense_finetuned",
    "tome",
    "evit",
    "random",
    "class_attention",
    "madtp_data",
    "first_layer",
    "first_2_layers",
    "madtp_merge",
    "merge_first_2_layers",
    "own_0.5",
    "own_0.8",
)
LEARNING_RATES = {"captioning": 1e-4, "retrieval": 1e-4, "clip": 1e-4}  # of examples/run_TASK.py, for all methods
LEARNING_RATE = 5e-5
SETTINGS = ("steps", "validation_samples", "test_samples", "split")
SETTINGS += ("teacher", "distillation_weight", "largest_pass", "pruned_only")


def pruning_method(method: str) -> tuple[str, int | None]:
    """Return what a method is called in the package, and how many layers prune."""
    if method.startswith(("dense", "own_")):
        return "madtp", None
    return FROM_DATA.get(method, (method, None))


def prepare(model, method: str, task: str, collator, validation: list[dict], seed: int, **passes) -> list:
    """Set a model up for training by a method; its callbacks."""
    if method.startswith("dense"):
        return []
    init_from_training_data(model, task, collator, seed)
    set_method(model, pruning_method(method)[0], seed)
    targets = [float(method.removeprefix("own_"))] if method.startswith("own_") else TARGETS
    calibrate_all(model, validation, targets)  # where the callback begins
    target = targets[0] if len(targets) == 1 else (targets[0], targets[-1])
    return [ReductionCallback(target, num_targets=len(TARGETS), seed=seed, **passes)]


def make_points(args, task, folder, method, seed, evaluation, validation) -> tuple[list[dict], dict]:
    """Train and evaluate; the points, and the seconds of the training alone."""
    set_seed(seed)
    overrides = {"distillation_weight": args.distillation_weight, "pruning_layers": pruning_method(method)[1]}
    model, collator = load_model(task, folder, seed, **overrides), evaluation.collator
    passes = {"dense_pass": not args.pruned_only, "largest_pass": args.largest_pass}
    passes["teacher"] = load_model(task, folder) if args.teacher and not args.pruned_only else None
    callbacks = prepare(model, method, task, collator, validation, seed, **passes)
    dataset = LOADERS[task]("train", args.steps * BATCH_SIZE, seed)
    started = time.perf_counter()
    if method != "dense":
        learning_rate = args.learning_rate or LEARNING_RATES.get(task, LEARNING_RATE)
        train(model, task, dataset, collator, callbacks, seed, learning_rate)
    seconds = {"training_seconds": round(time.perf_counter() - started, 1)}
    if method.startswith("dense"):
        return evaluation.at(model, [0.0]), seconds
    reductions = [float(method.removeprefix("own_"))] if method.startswith("own_") else REDUCTIONS
    calibrate_all(model, validation, [reduction for reduction in reductions if reduction > 0])
    return evaluation.at(model, reductions), seconds


def prepare_data(args, task: str, collator) -> tuple[Evaluation, list[dict]]:
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


def main(arguments=None):
    parser = study_parser(__doc__, "selection_finetuned.json", METHODS, ("vqa", "nlvr2", "captioning", "retrieval"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--test_samples", type=int, default=1000, help="Samples to evaluate on.")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="The split of these samples.")
    parser.add_argument(
        "--learning_rate", type=float, help="Learning rate for all tasks and methods; default: the chosen ones."
    )
    parser.add_argument("--teacher", action="store_true", help="All passes learn from the frozen dense model.")
    parser.add_argument("--distillation_weight", type=float, default=1.0, help="Weight of the distillation loss.")
    parser.add_argument("--largest_pass", action="store_true", help="Add a pass at the largest target to each step.")
    parser.add_argument("--pruned_only", action="store_true", help="No dense pass and no distillation.")
    args = parse_study(parser, arguments)
    if args.photographs and args.split == "validation":  # one half to calibrate on, one to evaluate on
        args.validation_samples, args.test_samples = args.validation_samples // 2, -(-args.validation_samples // 2)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {
        "batch_size": BATCH_SIZE,
        "learning_rate": args.learning_rate or LEARNING_RATE,
        "other_learning_rates": {} if args.learning_rate else LEARNING_RATES,
        "targets": TARGETS,
    }
    header = {"study": "fine-tuned", "settings": settings, **metric(args), **environment()}
    functions = (functools.partial(function, args) for function in (prepare_data, make_points))
    run_study(args, header, keys_of(args), *functions)


if __name__ == "__main__":
    main()
