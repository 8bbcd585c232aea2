"""`madtp-hf index`: embed a folder of images into an index for `madtp-hf search`."""

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .common import one_message_of_errors


class Kind(str, Enum):
    flat = "flat"
    hnsw = "hnsw"
    ivf = "ivf"


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def index(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="BLIP for retrieval or CLIP, MADTP's or not: a folder or Hub id.")
    ],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="A folder, or a text file with a path a line.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The index's folder: new, or an index to update.")],
    reduction: Annotated[
        float | None, typer.Option(metavar="SHARE", help="The calibrated share of FLOPs to save.")
    ] = None,
    kind: Annotated[
        Kind, typer.Option(help="flat is exact; beyond a million images hnsw and ivf are faster.")
    ] = Kind.flat,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images per forward pass.")] = 64,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Processes that decode; a CPU core each, up to 8.")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="What to compute in, queries as well.")] = DType.float32,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="Such as cuda:1; by default a GPU if there is one.")
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="REVISION", help="Of MODEL on the Hub.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Embed all anew, whatever OUT is an index of.")] = False,
) -> None:
    """Embed images into an index on disk.

    Run again on the same OUT, it embeds only what is new or changed and drops what is gone. Images that can't be read
    are listed and left out.

    Example: madtp-hf index org/blip-madtp-retrieval photos photos-index
    """
    with one_message_of_errors():
        from transformers.utils import logging

        from madtp_hf.checkpoints.load import load
        from madtp_hf.search import index_images
        from madtp_hf.search.embedding import EMBEDDING_TASKS

        logging.disable_progress_bar()  # of loading
        loaded = load(model, EMBEDDING_TASKS, revision=revision, dtype=dtype.value, device=device, precision="auto")
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
            typer.echo("madtp-hf: interrupted; run it again to go on with the images that are missing.", err=True)
            raise typer.Exit(130) from None
    unreadable = made.info["unreadable"]
    for name, reason in list(unreadable.items())[:20]:
        typer.echo(f"left out: {name}: {reason}", err=True)
    if len(unreadable) > 20:
        typer.echo(f"left out: {len(unreadable) - 20} more, see {out / 'index.json'}", err=True)
    typer.echo(
        f"{out}: {len(made)} images; {made.embedded} embedded, {made.kept} kept, {made.removed} dropped,"
        f" {len(unreadable)} unreadable."
    )
