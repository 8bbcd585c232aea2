"""`madtp-hf embed`: embeddings of images or texts, or scores of how well they match."""

from typing import Annotated

import typer

from . import bulk, options


def embed(
    model: options.Model,
    images: options.Images,
    out: options.OutFile,
    texts: Annotated[bool, typer.Option("--texts", help="Embed texts: a table's, or a .txt file's lines.")] = False,
    scores: Annotated[bool, typer.Option("--scores", help="Score how well each image and its text match.")] = False,
    text: options.Text = None,
    reduction: options.Reduction = None,
    device: options.Device = None,
    dtype: options.AutoDtype = None,
    precision: options.Precision = options.Precisions.auto,
    revision: options.Revision = None,
    memory: options.Memory = None,
    batch_size: options.AutoBatchSize = None,
    workers: options.Workers = None,
    ray: options.Ray = None,
    split: options.Split = None,
    columns: options.Columns = None,
    image_dir: options.ImageDir = None,
    max_pixels: options.MaxPixels = None,
    retry_errors: options.RetryErrors = False,
    force: options.Force = False,
) -> None:
    """Embed every image, also for `madtp-hf index`. Run it again to resume after a stop.

    Example: madtp-hf embed org/blip-madtp-retrieval photos/ embeddings.parquet --reduction 0.5
    """
    if texts and scores:
        raise ValueError("--texts and --scores: expected one of them.")
    if text is not None and not scores:
        raise ValueError("--text has no effect without --scores.")
    kind = "Matcher" if scores else "TextEmbedder" if texts else "ImageEmbedder"
    bulk.run(kind, model, images, out, dict(locals()), text)
