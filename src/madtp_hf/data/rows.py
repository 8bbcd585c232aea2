"""Read your own data as rows for the collators: folders of images, tables, tars, `datasets`, or the digit scenes.

`load_rows` gives a list of dicts, `load_table` a `datasets.Dataset`; both read what `open_rows` opens. Rows are
counted from 1 in messages, without a table's header.
"""

import os
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..modeling.images import read_image
from .columns import ALIASES, IMAGES, TASK_COLUMNS, missing_column, read_value
from .sources import TABLES, Row, Rows, TarRows, find_files, open_rows


if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Row", "Rows", "load_rows", "load_table", "open_rows"]

DIGITS = "digits"  # the source name of the embedded data
_SHOWN = 5  # how many problems a message names


def load_rows(
    task,
    source,
    texts=(),
    *,
    image_dir=None,
    columns: dict[str, str] | None = None,
    where: dict | None = None,
    split: str = "validation",
    samples: int | None = None,
    seed: int = 0,
    on_error: str = "raise",
) -> list[dict]:
    """Read rows for a task's collator.

    Args:
        task (`Task`): One of `madtp_hf.tasks.TASKS`; it determines the columns.
        source (`str`, `Path` or `list`): What `open_rows` takes, or `"digits"`, the embedded digit scenes. Captions of
            one image may be in several rows of a table. Images of a folder, two by two, are the pairs of a task with
            two images.
        texts (`list[str]`, *optional*): Questions, sentences or captions for images that have none; they are assigned
            to the images in turn.
        image_dir, columns (*optional*): As in `open_rows`.
        where (`dict`, *optional*): Keep only rows with these values, for tables with a column for the split:
            `{"split": "train"}`.
        split (`str`, *optional*, defaults to `"validation"`): The split of a data set, or of the digit scenes.
        samples (`int`, *optional*): How many rows to draw at random; by default all rows, and 200 for the digit
            scenes.
        seed (`int`, *optional*, defaults to 0): Seed for drawing rows.
        on_error (`str`, *optional*, defaults to `"raise"`): What to do with rows that can't be used: `"skip"` leaves
            them out, with a warning that names them, and decodes each image to find out.

    Returns:
        `list[dict]`: rows whose images are paths or the bytes of image files, or PIL images for digit scenes. A row
        has no answer, label or caption where the data have none.

    Raises:
        FileNotFoundError: if the source or an image doesn't exist.
        ValueError: for a source or a row that can't be read, or for data that lack a text that the task needs.
    """
    if str(source) == DIGITS and not os.path.exists(DIGITS):
        return _digit_rows(task, split, samples or 200, seed)
    wanted = [name.rstrip("*") for name in TASK_COLUMNS[task.name]]
    rows = open_rows(source, image_dir=image_dir, columns=columns, split=split, wanted=_wanted(wanted, where))
    text = task.text_column
    if text is not None and not texts and text not in rows.columns:
        raise ValueError(
            f"{rows.name} has no {text.removesuffix('s')}: {task.title} reads a text with each image; expected a table"
            f" with a column {' or '.join(ALIASES[text])}, or `texts` for images without one."
        )
    indices: list[int] | range = range(len(rows))
    if not rows.in_memory and not where and samples is not None and samples < len(rows):
        indices = sorted(random.Random(seed).sample(indices, samples))
    found = (row for index in indices for row in rows.rows(index, index + 1))
    if not {*task.image_columns} <= {*rows.columns}:
        found = _in_pairs(found, task.image_columns, rows)
    needed = {text} if text is not None and not texts else set()
    good = _usable(rows, found, wanted, needed, where, on_error, decode=on_error == "skip")
    read = list(_one_sample_an_image(good).values())
    if samples is not None and samples < len(read):
        read = [read[index] for index in sorted(random.Random(seed).sample(range(len(read)), samples))]
    for index, row in enumerate(read):
        if text is not None and not row.get(text):
            given = texts[index % len(texts)]
            row[text] = [given] if text == "captions" else given
    return read


def load_table(
    path: str | Path | Sequence[str | Path],
    task: str,
    image_dir: str | Path | None = None,
    columns: dict[str, str] | None = None,
    where: dict | None = None,
    on_error: str = "raise",
) -> "Dataset":
    """Read a table of your own as a `datasets.Dataset` for a task's collator.

    Args:
        path (`str`, `Path` or `list` of them): What `open_rows` takes: a `.csv`, `.tsv`, `.json`, `.jsonl` or
            `.parquet` file, several files of one kind (shards), a folder of files of one kind, a data set that
            `datasets` saved, or one on the Hub.
        task (`str`): `"vqa"`: `image`, `question` and, except for prediction, `answers` (a string or a list).
            `"captioning"`: `image` and `captions` (a string or a list). `"retrieval"`, `"clip"`: the same and,
            optionally, `image_id`. `"nlvr2"`: `left_image`, `right_image`, `sentence` and, except for prediction,
            `label` (0 or 1, true or false). An image is a path, or the bytes of an image file (Parquet).
        image_dir, columns (*optional*): As in `open_rows`; the usual other names, such as `answer` or `file_name`, are
            known.
        where (`dict`, *optional*): Keep only rows with these values, for tables with a column for the split:
            `{"split": "train"}`.
        on_error (`str`, *optional*, defaults to `"raise"`): What to do with rows that lack a value or whose image file
            doesn't exist: `"skip"` leaves them out, with a warning that names them.

    Returns:
        `datasets.Dataset`, whose images are decoded when their row is read. Rows with the same image path are merged
        into one row with all its captions. If retrieval data have no `image_id`, it is the image's path or, for images
        in bytes, the row number.

    Raises:
        FileNotFoundError: if the table or an image file doesn't exist.
        ValueError: for a table that can't be read, a missing column or value, an unknown task.
    """
    if task not in TASK_COLUMNS:
        raise ValueError(f"task={task!r}: expected one of {', '.join(TASK_COLUMNS)}.")
    wanted = [name.rstrip("*") for name in TASK_COLUMNS[task]]
    folder = Path(path).expanduser() if isinstance(path, (str, os.PathLike)) else None
    if folder is not None and folder.is_dir() and not (folder / "state.json").is_file():
        path = find_files(folder, TABLES)
        if not path:
            raise FileNotFoundError(f"The folder {folder} has no table: expected {', '.join(TABLES)} files.")
    rows = open_rows(path, image_dir=image_dir, columns=columns, wanted=_wanted(wanted, where))
    for name in TASK_COLUMNS[task]:
        if not name.endswith("*") and name not in rows.columns:
            raise missing_column(rows.name, ALIASES[name], name, rows.found)
    texts = rows if rows.in_memory else rows.without_images()
    if isinstance(rows, TarRows):
        raise ValueError(f"{rows.name} is not a table: read it with load_rows.")
    present = {name for name in wanted if name in texts.columns}
    good = _usable(rows, texts.rows(0, len(rows)), wanted, present, where, on_error)
    if task == "retrieval":
        good = {index: {"image_id": str(index + 1), **row} for index, row in good.items()}
    elif "image_id" not in rows.columns:
        for row in good.values():
            row.pop("image_id", None)
    good = _one_sample_an_image(good)
    return _to_dataset(
        rows, good, [name for name in wanted if name in next(iter(good.values())) or name in rows.columns]
    )


def _wanted(names: list[str], where: dict | None) -> tuple[str, ...]:
    return (*names, *(name for name in where or () if name not in names))


def _digit_rows(task, split: str, samples: int, seed: int) -> list[dict]:
    from .digit_scenes import load_digit_captions, load_digit_questions, load_digit_statements

    load = {"question": load_digit_questions, "sentence": load_digit_statements}.get(
        task.text_column, load_digit_captions
    )
    return list(load(split, samples, seed))


def _in_pairs(rows, image_columns, source: Rows):
    """Yield rows of one image two by two, as rows of several."""
    number, group = len(image_columns), []
    if len(source) < number:
        raise ValueError(
            f"{source.name} has {len(source)} image: expected at least {number}, because each sample has {number}."
        )
    for row in rows:
        group.append(row)
        if len(group) == number:
            values = {name: one.values.get("image") for name, one in zip(image_columns, group)}
            problem = next((one.error for one in group if one.error), None)
            yield Row(group[0].index, group[0].key, values, problem)
            group = []


def _usable(rows: Rows, found, wanted, needed, where, on_error: str, decode: bool = False) -> dict[int, dict]:
    """Return the columns of each row that can be used, by its index; raise an error or warn about the others.

    needed: columns that no row may lack, besides images. decode: whether to read each image.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: expected 'raise' or 'skip'.")
    good: dict[int, dict] = {}
    problems: list[str] = []
    others: dict[str, set[str]] = {name: set() for name in where or ()}
    for row in found:
        if row.error is None and where and not all(_is(row.values.get(name), value) for name, value in where.items()):
            for name in where:
                others[name].add(str(row.values.get(name)))
            continue
        try:
            good[row.index] = _sample(row, wanted, needed, decode)
        except (ValueError, OSError) as error:
            problem = f"row {row.index + 1}: {getattr(error, 'reason', error)}".rstrip(".")
            if on_error == "raise":
                raise type(error)(
                    f"{rows.name}, {problem}. Fix it, or pass on_error='skip' to leave such rows out."
                ) from error
            problems.append(problem)
    if not good and where and not problems:
        values = {name: sorted(values)[:10] for name, values in others.items()}
        raise ValueError(f"{rows.name} has no row where {where}: its values are {values}.")
    if not good:
        raise ValueError(f"{rows.name} has no row that can be used ({'; '.join(problems[:1]) or 'it is empty'}).")
    if problems:
        shown = "; ".join(problems[:_SHOWN]) + "; ..." * (len(problems) > _SHOWN)
        warnings.warn(f"Left out {len(problems)} of the rows of {rows.name} ({shown}).", stacklevel=3)
    return good


def _is(value, wanted) -> bool:
    return value == wanted or str(value) == str(wanted)


def _sample(row: Row, wanted, needed, decode: bool) -> dict:
    """Return a row's columns as the collators take them; raise an error that says what is wrong with it."""
    if row.error is not None:
        raise ValueError(row.error)
    sample = {}
    for name in wanted:
        value = read_value(name, row.values.get(name))
        if value is not None:
            sample[name] = value
        elif name in needed or (name in IMAGES and name in row.values):
            raise ValueError(f"no {name}")
        if name in IMAGES and isinstance(value, str) and not os.path.isfile(value):
            raise FileNotFoundError(f"{name}: no file {value}" + " (a broken symlink)" * os.path.islink(value))
        if name in IMAGES and value is not None and decode:
            read_image(value)
    first = next((sample[name] for name in wanted if name in IMAGES and name in sample), None)
    if "image_id" not in sample and first is not None:
        sample["image_id"] = read_value("image_id", first) if isinstance(first, str) else str(row.index + 1)
    return sample


def _one_sample_an_image(good: dict[int, dict]) -> dict[int, dict]:
    """Gather the captions of rows with the same image path; each question about an image is its own sample."""
    merged: dict[int, dict] = {}
    first: dict[str, int] = {}
    for index, row in good.items():
        key = row.get("image") if "captions" in row and isinstance(row.get("image"), str) else None
        kept = index if key is None else first.setdefault(key, index)
        if kept == index:
            merged[index] = dict(row)
        else:
            merged[kept]["captions"] = merged[kept]["captions"] + row["captions"]
    return merged


def _to_dataset(rows: Rows, good: dict[int, dict], order: list[str]):
    """Build the data set of these rows, with columns in this order."""
    from datasets import Dataset, Features, Image, Value
    from datasets import Sequence as ListOf

    kinds = {"answers": ListOf(Value("string")), "captions": ListOf(Value("string")), "label": Value("int64")}
    kinds = {name: Image() if name in IMAGES else kinds.get(name, Value("string")) for name in order}
    texts = {name: [row.get(name) for row in good.values()] for name in order if name not in IMAGES or rows.in_memory}
    if rows.in_memory:
        return Dataset.from_dict(texts, features=Features(kinds))
    images = {rows.columns[name]: name for name in order if name in IMAGES}
    dataset = rows.dataset.select(list(good)).select_columns(list(images)).rename_columns(images)
    for name in images.values():
        dataset = dataset.cast_column(name, Image())
    for name, values in texts.items():
        dataset = dataset.add_column(name, values, feature=kinds[name])
    return dataset.select_columns(order)
