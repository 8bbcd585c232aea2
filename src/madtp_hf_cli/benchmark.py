"""`madtp-hf benchmark`: time each budget on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .common import check_new_file, exit_if_rows_were_left_out, print_table, warnings_as_messages


def benchmark(
    model: options.Model,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Images, as for prune; by default noise, which prunes differently."),
    ] = None,
    text: options.Text = None,
    image_dir: options.ImageDir = None,
    columns: options.Columns = None,
    skip_unreadable: options.SkipUnreadable = False,
    reductions: Annotated[
        list[float] | None,
        typer.Option(metavar="R ...", help="By default the calibrated ones, or 0.5 and 0.8, calibrated here."),
    ] = None,
    batch_sizes: Annotated[
        list[int] | None, typer.Option(metavar="N ...", min=1, help="Samples per forward pass. Default: 1 8.")
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="How often each run is timed.")] = 3,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The JSON file to write.")] = Path("benchmark.json"),
    task: options.Task = None,
    device: options.Device = None,
    precision: options.Precision = options.Precisions.auto,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads; by default torch's choice.")
    ] = None,
    force: options.Force = False,
) -> None:
    """Time each budget on this machine, next to the same weights in transformers' own class: a table, and JSON.

    Runs alternate in each round. Memory is the peak beyond the weights.

    Example: madtp-hf benchmark blip-vqa-madtp --data photos --batch-sizes 1 8
    """
    check_new_file(out, force)
    import torch

    from madtp_hf.budgets.benchmark import BATCH_SIZES, run_benchmark
    from madtp_hf.checkpoints.load import load

    if threads:
        torch.set_num_threads(threads)
    loaded = load(model, task, device=device, precision=precision.value)
    how = options.how_to_read(image_dir, columns, skip_unreadable)
    with warnings_as_messages() as messages:
        title, rows = run_benchmark(loaded, data, text, reductions, batch_sizes or BATCH_SIZES, rounds, out, **how)
    print_table(title, rows)
    typer.echo(f"Wrote {out}.")
    exit_if_rows_were_left_out(messages)
