"""Run a job: worker processes read and resize images, this process generates texts, part by part."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data.sources import Row
from ..modeling.images import MAX_PIXELS, UnreadableImage, read_image
from .image_to_text import prepare
from .output import Output


# At the end, processes wait for the slowest one without a practical limit.
_PATIENCE = timedelta(days=365)


@dataclass
class Batch:
    """Consecutive rows: those with an image, and those without one together with the reason.

    rows: "row", "key" and, if there is one, "question" of each image. pixels: (len(rows), 3, height, width) uint8.
    errors: rows without an image, with the same fields and "error". part: the output part that they belong to.
    """

    part: int
    rows: list[dict] = field(default_factory=list)
    pixels: np.ndarray | None = None
    errors: list[dict] = field(default_factory=list)


class PreparedBatches(Dataset):
    """Read and resize batches given as (part, first row, row after the last); an unreadable row affects no other.

    Args:
        source: rows, see `open_rows`.
        image_processor: the checkpoint's.
        asks (`bool`): whether rows need a question.
        question (`str`, *optional*): a question to ask about all images.
        refused (`dict[int, str]`): rows not to read, with the reason.
    """

    def __init__(self, source, image_processor, asks=False, question=None, max_pixels=MAX_PIXELS, refused=None):
        self.source, self.image_processor, self.max_pixels = source, image_processor, max_pixels
        self.asks, self.question, self.refused = asks, question, refused or {}

    def __getitem__(self, place: tuple[int, int, int]) -> Batch:
        part, start, stop = place
        batch, pixels = Batch(part), []
        for row in self._rows(start, stop):
            content = {"row": row.index, "key": row.key}
            question = self.question if self.question is not None else row.values.get("question")
            if self.asks:
                content["question"] = question
            try:
                pixels.append(self._prepared(row, question))
                batch.rows.append(content)
            except UnreadableImage as error:
                batch.errors.append({**content, "error": error.reason})
        batch.pixels = np.stack(pixels) if pixels else None
        return batch

    def _rows(self, start: int, stop: int):
        """Yield the rows, also those that the source can't read, such as those of a damaged file, with the reason."""
        following = start
        try:
            for row in self.source.rows(start, stop):
                following = row.index + 1
                yield row
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            for index in range(following, stop):
                yield Row(index, str(index), {}, reason)

    def _prepared(self, row, question) -> np.ndarray:
        if row.error is not None or row.index in self.refused:
            raise UnreadableImage(row.error or self.refused[row.index])
        if self.asks and not (isinstance(question, str) and question.strip()):
            raise UnreadableImage("the row has no question")
        if row.values.get("image") is None:
            raise UnreadableImage("the row has no image")
        image = read_image(row.values["image"], self.max_pixels)
        try:
            return prepare(image, self.image_processor)
        except (ValueError, MemoryError) as error:
            raise UnreadableImage(f"{image.width} x {image.height} pixels: {error}") from None


@dataclass(frozen=True)
class Summary:
    """A job's result: images with and without a text; how many rows this run processed, and in how many seconds."""

    images: int
    errors: int
    done_now: int
    seconds: float


def finish_batch(batch: Batch, write_texts: Callable, column: str) -> list[dict]:
    """Return the rows of a batch in order, each with its text or the reason why it has none."""
    rows = []
    if batch.rows:
        asks = "question" in batch.rows[0]
        questions = [row["question"] for row in batch.rows] if asks else None
        texts = write_texts(batch.pixels, questions, batch.rows[0]["row"])
        rows = [{**row, column: text} for row, text in zip(batch.rows, texts, strict=True)]
    return sorted(rows + batch.errors, key=lambda row: row["row"])


def places(output: Output, parts: list[int], batch_size: int) -> list[tuple[int, int, int]]:
    """Return (part, first row, row after the last) of each batch of these parts; no batch spans two parts."""
    return [
        (part, start, min(start + batch_size, stop))
        for part in parts
        for first, stop in [output.part_rows(part)]
        for start in range(first, stop, batch_size)
    ]


def run_job(
    batches: PreparedBatches,
    write_texts: Callable,
    output: Output,
    batch_size: int,
    workers: int | None = None,
    force: bool = False,
    show_progress: bool = True,
) -> Summary | None:
    """Write a text for every row of a source, or for the rows that an earlier run left.

    Processes started by `torchrun` or `accelerate launch` share the parts.

    Args:
        batches (`PreparedBatches`): the rows.
        write_texts: called like `ImageToText.__call__`: pixels, questions or None, index of the first row -> one text
            for each image.
        output (`Output`): where the rows are written.
        batch_size (`int`): the maximum number of images per batch.
        workers (`int`, *optional*): the number of processes that read images; 0 reads in this process, by default a
            few.
        force (`bool`): whether to start over if the output exists already.

    Returns: `Summary` in the first process, None in others.
    """
    state = _process_state()
    finished, problem = None, None
    if state.is_main_process:
        try:
            finished = output.begin(force)
        except (OSError, ValueError) as error:
            problem = error
    problem, finished = state.tell([problem, finished])
    if problem is not None:
        raise problem
    if finished is not None:
        return Summary(finished.images, finished.errors, 0, 0.0) if state.is_main_process else None
    if not state.is_main_process:
        output.join(state.process_index)
    began, missing = time.perf_counter(), output.missing_parts()
    left = sum(stop - start for start, stop in map(output.part_rows, missing))
    state.wait_for_everyone()  # all processes list the missing parts before any part is written
    mine = missing[state.process_index :: state.num_processes]
    bar = tqdm(
        total=sum(stop - start for start, stop in map(output.part_rows, mine)),
        unit=" images",
        dynamic_ncols=True,
        disable=not (show_progress and state.is_main_process and mine),
        file=sys.stderr,
        desc=f"{output.out.name}" + (f", process 1 of {state.num_processes}" if state.num_processes > 1 else ""),
    )
    with bar:
        _run_parts(
            batches, write_texts, output, places(output, mine, min(batch_size, output.rows_per_part)), workers, bar
        )
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    counts = output.finish()
    return Summary(counts.images, counts.errors, left, time.perf_counter() - began)


def _run_parts(batches, write_texts, output: Output, todo: list, workers: int | None, bar) -> None:
    workers = default_workers() if workers is None else workers
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=todo,
        num_workers=min(workers, len(todo)),
        collate_fn=_as_it_is,
    )
    rows, num_errors = [], 0
    try:
        for batch in loader:
            rows += finish_batch(batch, write_texts, output.column)
            if rows[-1]["row"] + 1 == output.part_rows(batch.part)[1]:
                output.write_part(batch.part, rows)
                rows = []
            num_errors += len(batch.errors)
            if num_errors:
                bar.set_postfix_str(f"{num_errors} errors", refresh=False)
            bar.update(len(batch.rows) + len(batch.errors))
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(
            f"A process that reads images was killed ({str(error).splitlines()[0]}); finished parts are kept. Run"
            " the same command again, with fewer `workers` if memory was short."
        ) from error


def _as_it_is(batch):
    return batch


def default_workers() -> int:
    """Return the default number of processes that read images: one per available processor, at most 8."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, processors // here - 1))


def _process_state():
    """Return accelerate's process state, or a stand-in for a single process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return _OneProcess()
    from accelerate import PartialState

    return _SeveralProcesses(PartialState(cpu=True, timeout=_PATIENCE))


class _OneProcess:
    process_index, num_processes, is_main_process = 0, 1, True

    def wait_for_everyone(self) -> None:
        pass

    def tell(self, values: list) -> list:
        return values


class _SeveralProcesses:
    def __init__(self, state):
        self.wait_for_everyone, self.is_main_process = state.wait_for_everyone, state.is_main_process
        self.process_index, self.num_processes = state.process_index, state.num_processes

    def tell(self, values: list) -> list:
        """Broadcast the first process's values to all processes."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list(values)
