"""`madtp-hf caption`: caption every image of a folder, a list, parquet files, tars or a data set."""

from typing import Annotated

import typer

from . import bulk, options


def caption(
    model: options.Model,
    images: options.Images,
    out: options.OutFile,
    suffix: options.Suffix = None,
    reduction: options.Reduction = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Prompt that captions continue; not part of the output.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = 30,
    num_beams: options.NumBeams = 1,
    do_sample: options.DoSample = False,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.AutoDtype = None,
    precision: options.Precision = options.Precisions.auto,
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
    """Caption every image. Run it again to resume after a stop; unreadable images are listed.

    Example: madtp-hf caption org/blip-madtp photos/ captions.parquet --reduction 0.5
    """
    bulk.run("Writer", model, images, out, dict(locals()))
