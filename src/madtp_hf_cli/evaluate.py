"""`madtp-hf evaluate`: compute a task's metric at each budget."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .common import check_new_file


def evaluate(
    model: options.Model,
    data: options.Data,
    reductions: options.Reductions = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to write results.json.")] = Path("."),
    image_dir: options.ImageDir = None,
    samples: options.Samples = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 16,
    task: options.Task = None,
    device: options.Device = None,
    force: options.Force = False,
) -> None:
    """Evaluate a checkpoint with its task's metric, at each budget: a table, and results.json.

    With --out MODEL, `madtp-hf push` puts the figures into the model card.

    Example: madtp-hf evaluate blip-vqa-madtp --data questions.csv --out blip-vqa-madtp
    """
    check_new_file(out / "results.json", force)
    from madtp_hf.budgets.evaluation import report
    from madtp_hf.budgets.task_evaluation import evaluate_task
    from madtp_hf.checkpoints.card import public_name
    from madtp_hf.checkpoints.load import load_model
    from madtp_hf.data.rows import load_rows
    from madtp_hf.tasks import TASKS

    loaded, processor, _ = load_model(model, task, device)
    entry = TASKS[loaded.task]
    # A missing text is not replaced by a default, which the metric would not notice.
    rows = load_rows(entry, data, image_dir=image_dir, split="test", samples=samples, seed=seed)
    results = evaluate_task(loaded, processor, rows, reductions, batch_size)
    name = "digit scenes" if data == "digits" and not Path(data).exists() else public_name(data)
    facts = {"dataset": {"name": name}, "source": f"`madtp-hf evaluate` on {len(rows)} samples"}
    report(f"{len(rows)} samples of {name}", results, out, metric=entry.headline, **facts)
    typer.echo(f"Wrote {out / 'results.json'}.")
