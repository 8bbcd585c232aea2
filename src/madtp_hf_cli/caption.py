"""`madtp-hf caption`: caption every image of a folder, a list, parquet files, tars or a data set."""

from typing import Annotated

import typer

from . import bulk


Images = Annotated[
    str, typer.Argument(metavar="IMAGES", help="A folder, list, *.parquet, tars such as x-{00..99}.tar, or data set.")
]


def caption(
    model: bulk.Model,
    images: Images,
    out: bulk.Out,
    suffix: bulk.Suffix = None,
    reduction: bulk.Reduction = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What captions go on from; left out.")] = None,
    max_new_tokens: bulk.NewTokens = 30,
    num_beams: bulk.Beams = 1,
    do_sample: bulk.DoSample = False,
    temperature: bulk.Temperature = None,
    top_p: bulk.TopP = None,
    seed: bulk.Seed = 0,
    device: bulk.Device = None,
    dtype: bulk.Dtype = None,
    memory: bulk.Memory = None,
    batch_size: bulk.BatchSize = None,
    workers: bulk.Workers = None,
    split: bulk.Split = None,
    image_column: bulk.ImageColumn = None,
    key_column: bulk.KeyColumn = None,
    image_root: bulk.ImageRoot = None,
    max_pixels: bulk.MaxPixels = None,
    force: bulk.Force = False,
) -> None:
    """Caption every image. Stopped or killed, the same command goes on; unreadable images are listed.

    Example: madtp-hf caption org/blip-madtp photos/ captions.parquet --reduction 0.5
    """
    bulk.run("captioning", model, images, out, dict(locals()))
