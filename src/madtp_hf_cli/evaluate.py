"""`madtp-hf evaluate`: compute a task's metric at each budget."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .common import check_new_file, exit_if_rows_were_left_out, warnings_as_messages


def _compare(loaded, rows: list[dict], methods: list[str], reductions: list[float] | None, **how):
    """Evaluate pruning methods at equal budgets -> the rows of a table, each with its method.

    Each method is calibrated on the rows, without their labels.
    """
    from madtp_hf import calibrate, init_alignment_from
    from madtp_hf.budgets.evaluation import evaluate_task
    from madtp_hf.modeling.pruning_method import get_method
    from madtp_hf.tasks import make_batches

    model, processor, table = loaded.model, loaded.processor, []
    wanted = [reduction for reduction in reductions or model.config.calibrated_reductions if reduction] or [
        0.3,
        0.5,
        0.7,
    ]
    batches = make_batches(model, processor, rows, how["batch_size"])
    if loaded.is_dense and any(get_method(method).importance_is_aligned for method in methods):
        init_alignment_from(model, batches)
    for method in methods:
        model.config.pruning_schedule = None  # each method gets its own
        model.set_pruning_method(method)
        with warnings_as_messages():
            reached = [entry["reduction"] for entry in calibrate(model, batches, wanted)]
        found = evaluate_task(model, processor, rows, [0.0, *reached], **how)
        table += [{"method": "off" if row["reduction asked"] == 0 else method, **row} for row in found]
    return table[:1] + [row for row in table if row["method"] != "off"]


def evaluate(
    model: options.Model,
    data: options.Data,
    reductions: options.Reductions = None,
    methods: options.Methods = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to write results.json.")] = Path("."),
    image_dir: options.ImageDir = None,
    columns: options.Columns = None,
    skip_unreadable: options.SkipUnreadable = False,
    samples: options.Samples = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 16,
    task: options.Task = None,
    device: options.Device = None,
    precision: options.Precision = options.Precisions.auto,
    force: options.Force = False,
) -> None:
    """Evaluate a checkpoint with its task's metric, at each budget: a table, and results.json.

    With --out MODEL, `madtp-hf push` puts the figures into the model card, but not those of --methods.

    Example: madtp-hf evaluate blip-vqa-madtp --data questions.csv --out blip-vqa-madtp
    """
    check_new_file(out / "results.json", force)
    from madtp_hf.budgets.evaluation import evaluate_task, public_name, report
    from madtp_hf.checkpoints.load import load
    from madtp_hf.data.rows import load_rows
    from madtp_hf.modeling.pruning_method import get_method

    for method in methods or ():
        get_method(method)  # fail before the model is loaded
    loaded = load(model, task, device=device).require_trained()
    entry = loaded.task
    # A missing text is not replaced by a default, which the metric would not notice.
    how = options.how_to_read(image_dir, columns, skip_unreadable)
    with warnings_as_messages() as messages:
        rows = load_rows(entry, data, split="test", samples=samples, seed=seed, **how)
    how = {"batch_size": batch_size, "precision": None if precision == "auto" else precision.value}
    if methods:
        results = _compare(loaded, rows, methods, reductions, **how)
    else:
        results = evaluate_task(loaded.model, loaded.processor, rows, reductions, **how)
    name = "digit scenes" if data == "digits" and not Path(data).exists() else public_name(data)
    facts = {"dataset": {"name": name}, "source": f"`madtp-hf evaluate` on {len(rows)} samples"}
    report(f"{len(rows)} samples of {name}", results, out, metric=entry.headline, **facts)
    typer.echo(f"Wrote {out / 'results.json'}.")
    exit_if_rows_were_left_out(messages)
