"""Read the rows of a job's batches: decode and resize their images, find their texts; a bad row affects no other."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..data.sources import Row
from ..modeling.images import MAX_PIXELS, UnreadableImage, read_image


@dataclass
class Batch:
    """Rows of a source: those that can be used, and those that can't, with the reason.

    rows: indices of usable rows. pixels: their images (len(rows), 3, height, width), uint8. texts: their texts.
    errors: reasons by index.
    """

    rows: list[int] = field(default_factory=list)
    pixels: np.ndarray | None = None
    texts: list[str | None] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)


class Reader(Dataset):
    """Reads batches, given as arrays of row indices, as [`Batch`]es.

    Args:
        source: rows, see `open_rows`.
        image_processor: the checkpoint's; None leaves images unread.
        text_column (`str`, *optional*): the column of the text that each row needs.
        text (`str`, *optional*): a text for all rows instead.
    """

    def __init__(self, source, image_processor, text_column=None, text=None, max_pixels: int | None = None):
        self.source, self.image_processor = source, image_processor
        self.max_pixels: int = max_pixels or MAX_PIXELS  # type: ignore[assignment]  # Pillow's may be None
        self.text_column, self.text = text_column, text

    def __getitem__(self, rows: np.ndarray) -> Batch:
        batch, pixels, rows = Batch(), [], np.asarray(rows)
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            for row in read_rows(self.source, int(run[0]), int(run[-1]) + 1):
                try:
                    if row.error is not None:
                        raise UnreadableImage(row.error)
                    text = self.text_of(row)
                    if self.image_processor is not None:
                        pixels.append(self._read(row))
                except UnreadableImage as error:
                    batch.errors[row.index] = error.reason
                    continue
                batch.rows.append(row.index)
                batch.texts.append(text)
        batch.pixels = np.stack(pixels) if pixels else None
        return batch

    def text_of(self, row: Row) -> str | None:
        if self.text_column is None or self.text is not None:
            return self.text
        text = row.values.get(self.text_column)
        if isinstance(text, list) and len(text) == 1:
            text = text[0]
        if not (isinstance(text, str) and text.strip()):
            raise UnreadableImage(f"the row has no {self.text_column.removesuffix('s')}")
        return text

    def _read(self, row: Row) -> np.ndarray:
        if row.values.get("image") is None:
            raise UnreadableImage("the row has no image")
        image = read_image(row.values["image"], self.max_pixels)
        try:
            return prepare(image, self.image_processor)
        except (ValueError, MemoryError) as error:
            raise UnreadableImage(f"{image.width} x {image.height} pixels: {error}") from None


def read_rows(source, start: int, stop: int) -> Iterator[Row]:
    """Yield rows, also those that the source can't read, such as those of a damaged file, with the reason."""
    following = start
    try:
        for row in source.rows(start, stop):
            following = row.index + 1
            yield row
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        for index in range(following, stop):
            yield Row(index, str(index), {}, reason)


def prepare(image: Image.Image, image_processor) -> np.ndarray:
    """Resize an RGB image with the image processor -> uint8 (3, height, width); a `Worker` normalises it.

    Transferring uint8 between processes takes a quarter of the bytes of normalised pixels.
    """
    # Without the format, an image one or three pixels high would be taken for channels first.
    pixels = image_processor(
        images=image, do_rescale=False, do_normalize=False, input_data_format="channels_last", return_tensors="np"
    ).pixel_values
    return np.ascontiguousarray(pixels[0], dtype=np.uint8)


def default_readers() -> int:
    """Return the default number of processes that read images: one per available processor but one, at most 8."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, processors // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
