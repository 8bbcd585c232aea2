"""`madtp-hf benchmark`: time each budget on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from .common import check_new_file, one_message_of_errors, print_table, warnings_as_messages


def benchmark(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A pruned checkpoint, or a dense one: folder or Hub id.")
    ],
    images: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Your images; noise if not given, which prunes otherwise than images."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The question, sentence or caption; one of the task if not given."),
    ] = None,
    reductions: Annotated[
        list[float] | None,
        typer.Option(metavar="R ...", help="Budgets; by default those calibrated, or 0.5 and 0.8, calibrated here."),
    ] = None,
    batch_sizes: Annotated[
        list[int] | None, typer.Option(metavar="N ...", min=1, help="Samples at a time; 1 8 if not given.")
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="How often each run is timed.")] = 3,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The JSON file to write.")] = Path("benchmark.json"),
    task: Annotated[str | None, typer.Option(metavar="TASK", help="The task, if not the checkpoint's own.")] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out rows that can't be read.")
    ] = False,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu or cuda; found if not given.")] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads; torch's choice if not given.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
) -> None:
    """Time each budget on this machine, beside the same weights in transformers' own class: a table, and JSON.

    Runs take turns in each round. Memory is the peak beyond the weights.

    Example: madtp-hf benchmark blip-vqa-madtp --images photos --batch-sizes 1 8
    """
    with one_message_of_errors():
        import torch

        from madtp_hf.budgets.benchmark import BATCH_SIZES, run_benchmark

        check_new_file(out, force)
        if threads:
            torch.set_num_threads(threads)
        skip = "skip" if skip_unreadable else "raise"
        with warnings_as_messages():
            title, rows = run_benchmark(
                model, images, text, reductions, batch_sizes or BATCH_SIZES, rounds, out, task, device, on_error=skip
            )
    print_table(title, rows)
    typer.echo(f"{out}: written.")
