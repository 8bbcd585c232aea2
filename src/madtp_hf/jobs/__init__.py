"""Bulk jobs: captions, answers, embeddings and matching scores of any number of images, resumed after a stop."""

from ..data.sources import open_rows
from .outputs import FileOutput, SideFiles, make_output
from .reading import Batch, Reader
from .run import Summary, run_job
from .workers import Answerer, Generation, ImageEmbedder, Matcher, TextEmbedder, Worker, Writer


__all__ = [
    "Answerer",
    "Batch",
    "FileOutput",
    "Generation",
    "ImageEmbedder",
    "Matcher",
    "Reader",
    "SideFiles",
    "Summary",
    "TextEmbedder",
    "Worker",
    "Writer",
    "make_output",
    "open_rows",
    "run_job",
]
