"""`madtp-hf index`: embed a folder of images into an index for `madtp-hf search`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from . import bulk, options
from .common import SOME_FAILED, check_writable


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
    memory: options.Memory = None,
    batch_size: options.AutoBatchSize = None,
    workers: options.Workers = None,
    ray: options.Ray = None,
    dtype: options.AutoDtype = None,
    precision: options.Precision = options.Precisions.auto,
    device: options.Device = None,
    revision: options.Revision = None,
    image_dir: options.ImageDir = None,
    retry_errors: options.RetryErrors = False,
    force: options.Force = False,
) -> None:
    """Embed images into an index on disk, or build it from a Parquet file that `madtp-hf embed` has written.

    Run it again on the same OUT to embed only new and changed images and to drop those that are gone.
    Unreadable images are listed and left out.

    Example: madtp-hf index org/blip-madtp-retrieval photos photos-index
    """
    given = dict(locals())
    check_writable(out / "index.json")
    from madtp_hf.jobs import ImageEmbedder
    from madtp_hf.search.index import build_index

    with bulk.says_what_is_kept():
        worker = bulk.load_worker(ImageEmbedder, model, given)
        how = {"image_dir": image_dir, "retry_errors": retry_errors, **bulk.running(worker, given)}
        made = build_index(worker, images, out, kind.value, **how)
    if made is None:  # another process prints it
        return
    unreadable = made.info["unreadable"]
    for name, reason in list(unreadable.items())[:20]:
        typer.echo(f"left out: {name}: {reason}", err=True)
    if len(unreadable) > 20:
        typer.echo(f"left out: {len(unreadable) - 20} more, see {out / 'index.json'}", err=True)
    typer.echo(
        f"{out}: {len(made)} images; {made.embedded} embedded, {made.kept} kept, {made.removed} dropped,"
        f" {len(unreadable)} unreadable; pruning: {worker.pruning_note()}"
    )
    if unreadable:
        raise typer.Exit(SOME_FAILED)
