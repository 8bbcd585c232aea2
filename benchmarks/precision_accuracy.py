"""Accuracy of each precision of inference on a CPU, on digit scenes, at the same budgets.

    python benchmarks/precision_accuracy.py --output benchmarks/results/precision_accuracy.json

Every task's dense model is pruned without training, as in selection.py's `madtp_data`, and calibrated once, in
float32; then each precision answers the same test samples at the same settings. All linear maps in the layers are
prepared, although `prepare_for_inference` leaves maps as small as these models' in float32: they would gain nothing.
`tokens` is the number of tokens that the encoders' layers keep, over that of float32: which tokens stay must not
change with the precision.
"""

import torch
from calibrating import calibrate_all
from digit_tasks import LOADERS, Evaluation, load_model, make_batches, make_collator, shipped_models
from reporting import Rows, environment, make_parser, print_table, settings_of
from selection import init_from_training_data

from madtp_hf.budgets.passes import encode, restored
from madtp_hf.modeling import prepared_linear


REDUCTIONS = [0.0, 0.5, 0.8]
KEY = ("task", "model", "precision")


@torch.no_grad()
def count_tokens(model, batches: list[dict], reductions: list[float]) -> list[int]:
    """Return the number of tokens that layers keep on these batches, at each reduction."""
    counts = []
    with restored(model):
        for reduction in reductions:
            model.set_pruning(reduction=reduction)
            outputs = [encode(model, batch) for batch in batches]
            tokens = [out.get(name) for out in outputs for name in ("vision_tokens", "text_tokens")]
            counts.append(sum(int(of_layers[1:].sum()) for of_layers in tokens if of_layers is not None))
    return counts


def measure_model(task: str, folder, args) -> list[dict]:
    """Return a row per precision: score, reduction reached and tokens at each budget."""
    collator = make_collator(task, folder)
    evaluation = Evaluation(task, LOADERS[task]("test", args.test_samples), collator)
    model = load_model(task, folder)
    init_from_training_data(model, task, collator, seed=0)
    calibrate_all(model, make_batches(task, LOADERS[task]("validation", 512), collator), REDUCTIONS[1:])
    rows, in_float32 = [], []
    for precision in prepared_linear.PRECISIONS:
        model.prepare_for_inference(precision)
        points = evaluation.at(model, REDUCTIONS)
        counts = count_tokens(model, evaluation.batches, REDUCTIONS)
        in_float32 = in_float32 or counts
        for point, mine, theirs in zip(points, counts, in_float32):
            point["tokens"] = round(mine / theirs, 4)
        rows.append({"task": task, "model": folder.name, "precision": precision, "points": points})
    return rows


def print_rows(rows: list[dict]) -> None:
    lines = []
    for row in rows:
        scores = [f"{100 * point['score']:.1f}" for point in row["points"]]
        tokens = [f"{point['tokens']:.3f}" for point in row["points"][1:]]
        lines.append([row["model"], row["precision"], *scores, *tokens])
    columns = ["model", "precision", "off", *(f"{r:g}" for r in REDUCTIONS[1:])]
    print_table("score, and tokens over float32's", [*columns, *(f"tokens at {r:g}" for r in REDUCTIONS[1:])], lines)


def main(arguments=None):
    parser = make_parser(__doc__, "precision_accuracy.json")
    parser.add_argument("--tasks", nargs="+", choices=LOADERS, default=list(LOADERS), help="Default: all.")
    parser.add_argument("--test_samples", type=int, default=1000, help="Default: 1000.")
    args = parser.parse_args(arguments)
    prepared_linear.LARGE = 1
    results = Rows(args.output, {"settings": settings_of(args, "tasks"), **environment()}, KEY)
    for task, folder in shipped_models(args.tasks):
        if (task, folder.name, "float32") in results:  # a model's rows are added together
            continue
        results.add(*measure_model(task, folder, args))
    print_rows(list(results.rows.values()))


if __name__ == "__main__":
    main()
