"""Accuracy at equal FLOPs, training-free: MADTP beside other ways to choose tokens, on the same dense models.

    python benchmarks/selection.py                                   # all rows; run again, it resumes
    python benchmarks/selection.py --tasks vqa nlvr2 --methods tome evit
    python benchmarks/selection.py --model FOLDER --tasks vqa        # a dense model of your own, on the digit scenes
    python benchmarks/selection.py --model FOLDER --tasks clip --photographs FOLDER --output FILE   # or vqa
    python benchmarks/selection.py --redo madtp_data                 # makes these rows again
    python benchmarks/selection.py --table                           # tables, see selection_tables.py

A row is a task, a dense model, a method and a seed; its points are one for each budget. Thresholds and schedules are
found on the validation split, the metric is of the test split. Methods:

- `madtp`: random alignment tokens, drawn by the seed; `madtp_data`: those of `init_alignment_from`, of training data
  drawn by the seed
- `class_attention`, `without_self`, `without_class`, `without_alignment`: MADTP with another importance, random
  alignment tokens as `madtp`
- `first_layer`, `first_2_layers`: as `madtp_data`, but these layers alone prune
- `madtp_merge`, `merge_first_2_layers`: the same two, merging similar tokens; `merge_without_distinctness`,
  `merge_without_sizes`, `merge_into_one`: without a part of it, see methods.py
- `tome`, `evit`, `random` (tokens drawn by the seed): see methods.py
- `smaller_image`: the dense model on smaller images, positions interpolated; the size whose FLOPs are nearest

What no threshold or schedule reaches is measured at the nearest that there is, and marked `missed`.
"""

from pathlib import Path

import torch
from calibrating import calibrate_all
from digit_tasks import (
    LOADERS,
    Evaluation,
    load_model,
    make_batches,
    run_study,
    shipped_models,
    smaller_images,
)
from methods import ABLATIONS, MERGE_ABLATIONS
from reporting import environment, make_parser
from selection_tables import print_tables
from torch.utils.data import DataLoader

from madtp_hf import init_alignment_from
from madtp_hf.budgets.flops import dense_flops
from madtp_hf.budgets.passes import decoder_tokens
from madtp_hf.tasks import TASKS


REDUCTIONS = [0.3, 0.5, 0.6, 0.7, 0.8]
# By method, how many seeds. MADTP's tokens from data come last: they are what may change.
SEEDS = {
    "dense": 1,
    "tome": 1,
    "evit": 1,
    "smaller_image": 1,
    "random": 5,
    "madtp": 5,
    "class_attention": 5,
    **dict.fromkeys(ABLATIONS, 3),
    "madtp_data": 5,
    "first_layer": 5,
    "first_2_layers": 5,
    "madtp_merge": 5,
    "merge_first_2_layers": 5,
    **dict.fromkeys(MERGE_ABLATIONS, 3),
}
# Methods whose alignment tokens are made of data: what they are called in the package, and how many layers prune.
FROM_DATA = {
    "madtp_data": ("madtp", None),
    "first_layer": ("madtp", 1),
    "first_2_layers": ("madtp", 2),
    "madtp_merge": ("madtp_merge", None),
    "merge_first_2_layers": ("madtp_merge", 2),
    **{name: (name, None) for name in MERGE_ABLATIONS},
}
INIT_SAMPLES = 640  # of the training split, that alignment tokens are made of


# MADTP and its variants


def init_from_training_data(model, task: str, collator, seed: int) -> None:
    """Alignment tokens from images and texts of the training split, drawn by the seed; no labels are used."""
    samples = LOADERS[task]("train", INIT_SAMPLES, seed)
    init_alignment_from(model, DataLoader(samples, 64, collate_fn=collator))


def set_method(model, method: str, seed: int) -> None:
    """Choose tokens by a method, whose own draws, if it has any, begin with the seed."""
    model.set_pruning_method(method)
    if "seed" in model.pruning_method.fields:
        model.set_pruning(keep_rate=0.5, seed=seed)  # calibration keeps the seed


def run_method(method, task, folder, seed, evaluation, validation, reductions) -> list[dict]:
    """Points of a method, calibrated once for all reductions."""
    name, layers = FROM_DATA.get(method, (method, None))
    model = load_model(task, folder, seed, pruning_layers=layers)
    if method in FROM_DATA:
        init_from_training_data(model, task, evaluation.collator, seed)
    set_method(model, name, seed)
    calibrate_all(model, validation, reductions)
    return evaluation.at(model, reductions)


def text_lengths(model, batches: list[dict]) -> dict:
    """What a schedule's FLOPs depend on besides: the lengths of texts and of what a decoder reads, of all samples."""
    lengths = {}
    if TASKS[model.task].text_encoder:
        lengths["text_tokens"] = torch.cat([batch["attention_mask"].sum(dim=1) for batch in batches])
    read = [torch.as_tensor(decoder_tokens(batch, model.task, model.config)) for batch in batches]
    lengths["answer_tokens"] = torch.cat(
        [tokens.expand(len(batch["pixel_values"])) for tokens, batch in zip(read, batches)]
    )
    return lengths


def image_sizes(model, lengths: dict) -> dict[int, float]:
    """By the size of a smaller image, the mean reduction of FLOPs against the dense model."""
    vision, task = model.config.vision_config, TASKS[model.task]
    number = len(lengths["answer_tokens"])

    def flops(size):
        tokens = torch.full((vision.num_hidden_layers + 1, number), (size // vision.patch_size) ** 2 + 1)
        tokens = torch.stack([tokens] * task.num_images, dim=1) if task.num_images > 1 else tokens
        text = None
        if task.text_encoder:
            text = lengths["text_tokens"].repeat(model.config.text_config.num_hidden_layers + 1, 1)
        return dense_flops(model.config, model.task, tokens, text, lengths["answer_tokens"])

    dense = flops(vision.image_size)
    sizes = range(2 * vision.patch_size, vision.image_size, vision.patch_size)
    return {size: (1 - flops(size) / dense).mean().item() for size in sizes}


def run_smaller_image(method, task, folder, seed, evaluation, validation, reductions) -> list[dict]:
    model, points = load_model(task, folder, seed), {}
    sizes = image_sizes(model, text_lengths(model, validation))
    for reduction in reductions:
        size = min(sizes, key=lambda size: abs(sizes[size] - reduction))
        if size not in points:
            points[size] = evaluation.at(model, [0.0], smaller_images(evaluation.batches, size))[0]
        points[size, reduction] = {**points[size], "asked": reduction, "reached": round(sizes[size], 4), "size": size}
    return [points[key] for key in points if isinstance(key, tuple)]


def run_dense(method, task, folder, seed, evaluation, validation, reductions) -> list[dict]:
    return evaluation.at(load_model(task, folder, seed), [0.0])


def points_of(method: str):
    """The function that makes a method's points."""
    return {"dense": run_dense, "smaller_image": run_smaller_image}.get(method, run_method)


# The study


def keys_of(args) -> list[tuple]:
    """(task, folder, method, seed) of the rows that are asked for, in order."""
    models = [(args.tasks[0], args.model)] if args.model else shipped_models(args.tasks)
    keys = []
    for task, folder in models:
        if args.model_names and folder.name not in args.model_names:
            continue
        for method in args.methods:
            seeds = args.seeds if args.seeds is not None else range(SEEDS[method])
            keys += [(task, folder, method, seed) for seed in seeds if seed < SEEDS[method] or SEEDS[method] > 1]
    return keys


def run(args) -> None:
    settings = {name: getattr(args, name) for name in ("validation_samples", "test_samples", "reductions")}

    def prepare_data(task, collator):
        data = {split: LOADERS[task](split, settings[f"{split}_samples"]) for split in ("validation", "test")}
        return Evaluation(task, data["test"], collator), make_batches(task, data["validation"], collator)

    def make_points(task, folder, method, seed, *prepared):
        return points_of(method)(method, task, folder, seed, *prepared, args.reductions), {}

    header = {"study": "training-free", "settings": settings, **metric(args), **environment()}
    run_study(args, header, keys_of(args), prepare_data, make_points)


def study_parser(description: str, output: str, methods, tasks):
    """Return a parser with the options that both studies have."""
    parser = make_parser(description, output)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(tasks))
    parser.add_argument(
        "--model", type=Path, help="Folder of a dense model, for the one task of --tasks; default: from examples/."
    )
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument(
        "--photographs", type=Path, help="Folder of photographs of garments to evaluate on; needs --model."
    )
    parser.add_argument("--validation_samples", type=int, default=512)
    parser.add_argument(
        "--redo", nargs="+", choices=methods, default=[], help="Measure the rows of these methods again."
    )
    return parser


def parse_study(parser, arguments):
    args = parser.parse_args(arguments)
    if args.model and len(args.tasks) != 1:
        parser.error("--model needs one task: add --tasks TASK.")
    if args.photographs and not args.model:
        parser.error("--photographs needs a model that knows garments: add --model FOLDER.")
    if args.photographs:
        from garment_tasks import use_photographs

        try:
            args.validation_samples, args.test_samples = use_photographs(args.photographs, args.tasks[0])
        except (FileNotFoundError, ValueError) as error:
            parser.error(str(error))
    torch.set_num_threads(1)
    return args


def metric(args) -> dict:
    """What a file's tables call the metric, where it isn't the task's own."""
    return {"metric": "accuracy"} if args.photographs else {}


def main(arguments=None):
    parser = study_parser(__doc__, "selection.json", SEEDS, TASKS)
    parser.add_argument("--model_names", nargs="+", help="Use only these of the shipped models.")
    parser.add_argument("--seeds", type=int, nargs="+", help="Default: each method's number in SEEDS.")
    parser.add_argument("--reductions", type=float, nargs="+", default=REDUCTIONS)
    parser.add_argument("--test_samples", type=int, default=600)
    parser.add_argument(
        "--table",
        nargs="?",
        const="all",
        choices=("all", "readme", "docs"),
        help="Print tables of the results; run nothing.",
    )
    args = parse_study(parser, arguments)
    if args.table:
        print_tables(args.output, args.table)
    else:
        run(args)


if __name__ == "__main__":
    main()
