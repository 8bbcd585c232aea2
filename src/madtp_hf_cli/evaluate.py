"""`madtp-hf evaluate`: compute a task's metric at each budget."""

from pathlib import Path
from typing import Annotated

import typer

from .common import check_new_file, one_message_of_errors, warnings_as_messages


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A pruned checkpoint, or a dense one: folder or Hub id.")
    ],
    data: Annotated[
        str,
        typer.Option(metavar="PATH", help="Labelled data: a .csv or .jsonl table, a folder with one, or digits."),
    ],
    reductions: Annotated[
        list[float] | None,
        typer.Option(metavar="R ...", help="Reductions to evaluate; by default 0 and all that are calibrated."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to write results.json.")] = Path("."),
    image_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where a table's image paths start.")
    ] = None,
    samples: Annotated[int | None, typer.Option(metavar="N", min=1, help="Draw so many samples.")] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Samples at a time.")] = 16,
    task: Annotated[str | None, typer.Option(metavar="TASK", help="The task, if not the checkpoint's own.")] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out rows that can't be read.")
    ] = False,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu or cuda; found if not given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace results.json.")] = False,
) -> None:
    """Evaluate a checkpoint with its task's metric, at each budget: a table, and results.json.

    With --out MODEL, `madtp-hf push` puts the figures into the model card.

    Example: madtp-hf evaluate blip-vqa-madtp --data questions.csv --out blip-vqa-madtp
    """
    with one_message_of_errors():
        from madtp_hf.budgets.evaluation import report
        from madtp_hf.budgets.task_evaluation import evaluate_task
        from madtp_hf.checkpoints.card import public_name
        from madtp_hf.checkpoints.load import load_model
        from madtp_hf.data.rows import load_rows
        from madtp_hf.tasks import TASKS

        check_new_file(out / "results.json", force)
        loaded, processor, _ = load_model(model, task, device)
        entry = TASKS[loaded.task]
        # A missing text is not replaced by a default, which the metric would not notice.
        skip = "skip" if skip_unreadable else "raise"
        with warnings_as_messages():
            rows = load_rows(entry, data, image_dir=image_dir, split="test", samples=samples, on_error=skip)
        results = evaluate_task(loaded, processor, rows, reductions, batch_size)
        name = "digit scenes" if data == "digits" and not Path(data).exists() else public_name(data)
        facts = {"dataset": {"name": name}, "source": f"`madtp-hf evaluate` on {len(rows)} samples"}
        report(f"{len(rows)} samples of {name}", results, out, metric=entry.headline, **facts)
    typer.echo(f"{out / 'results.json'}: written.")
