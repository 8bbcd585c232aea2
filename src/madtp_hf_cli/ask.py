"""`madtp-hf ask`: answer every question about an image."""

from typing import Annotated

import typer

from . import bulk


Images = Annotated[
    str,
    typer.Argument(metavar="IMAGES", help="A list, *.parquet, tars or data set of images and questions; or images."),
]


def ask(
    model: bulk.Model,
    images: Images,
    out: bulk.Out,
    question: Annotated[str | None, typer.Option(metavar="TEXT", help="Ask this of every image.")] = None,
    suffix: bulk.Suffix = None,
    reduction: bulk.Reduction = None,
    max_new_tokens: bulk.NewTokens = 10,
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
    question_column: bulk.QuestionColumn = None,
    key_column: bulk.KeyColumn = None,
    image_root: bulk.ImageRoot = None,
    max_pixels: bulk.MaxPixels = None,
    force: bulk.Force = False,
) -> None:
    """Answer every question. Stopped or killed, the same command goes on; unreadable images are listed.

    Example: madtp-hf ask org/blip-vqa-madtp questions.jsonl answers.parquet --reduction 0.5
    """
    bulk.run("vqa", model, images, out, dict(locals()), question)
