"""`madtp-hf index`: embed a folder of images into an index for `madtp-hf search`."""

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .common import INTERRUPTED, SOME_FAILED, check_writable


class Kind(str, Enum):
    flat = "flat"
    hnsw = "hnsw"
    ivf = "ivf"


def index(
    model: options.Model,
    images: options.Images,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The index's folder: new, or an index to update.")],
    reduction: options.Reduction = None,
    kind: Annotated[
        Kind, typer.Option(metavar="KIND", help="flat is exact; hnsw and ivf are faster beyond a million images.")
    ] = Kind.flat,
    batch_size: options.BatchSize = 64,
    workers: options.Workers = None,
    dtype: options.Dtype = options.Dtypes.float32,
    precision: options.Precision = options.Precisions.auto,
    device: options.Device = None,
    revision: options.Revision = None,
    force: options.Force = False,
) -> None:
    """Embed images into an index on disk.

    Run it again on the same OUT to embed only new and changed images and to drop those that are gone.
    Unreadable images are listed and left out.

    Example: madtp-hf index org/blip-madtp-retrieval photos photos-index
    """
    check_writable(out / "index.json")
    from transformers.utils import logging

    from madtp_hf.checkpoints.load import load
    from madtp_hf.search import index_images
    from madtp_hf.search.embedding import EMBEDDING_TASKS

    logging.disable_progress_bar()  # of loading
    how = {"dtype": dtype.value, "precision": precision.value, "device": device, "revision": revision}
    loaded = load(model, EMBEDDING_TASKS, **how)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        made = index_images(
            loaded.model,
            loaded.processor,
            images,
            out,
            kind=kind.value,
            reduction=reduction,
            batch_size=batch_size,
            num_workers=min(cores, 8) if workers is None else workers,
            force=force,
            show_progress_bar=True,
        )
    except KeyboardInterrupt:
        typer.echo("Stopped. Finished embeddings are kept: run the same command again to resume.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    unreadable = made.info["unreadable"]
    for name, reason in list(unreadable.items())[:20]:
        typer.echo(f"left out: {name}: {reason}", err=True)
    if len(unreadable) > 20:
        typer.echo(f"left out: {len(unreadable) - 20} more, see {out / 'index.json'}", err=True)
    typer.echo(
        f"{out}: {len(made)} images; {made.embedded} embedded, {made.kept} kept, {made.removed} dropped,"
        f" {len(unreadable)} unreadable."
    )
    if unreadable:
        raise typer.Exit(SOME_FAILED)
