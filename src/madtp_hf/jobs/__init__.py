"""Bulk captioning and question answering: the parts behind `madtp-hf caption` and `madtp-hf ask`."""

from ..data.sources import Row, open_rows
from ..modeling.images import UnreadableImage, read_image
from .image_to_text import Generation, ImageToText, prepare
from .output import Counts, Output
from .run import Batch, PreparedBatches, Summary, finish_batch, places, run_job


__all__ = [
    "Batch",
    "Counts",
    "Generation",
    "ImageToText",
    "Output",
    "PreparedBatches",
    "Row",
    "Summary",
    "UnreadableImage",
    "finish_batch",
    "open_rows",
    "places",
    "prepare",
    "read_image",
    "run_job",
]
