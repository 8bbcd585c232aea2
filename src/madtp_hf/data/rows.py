"""Read a user's data as rows: a folder of images, a CSV or JSONL table, or the embedded digit scenes."""

import csv
import io
import json
import random
from pathlib import Path

from .published import _checked_entry, _image_finder, _lines, _parse, _read_text


DIGITS = "digits"  # the source name of the embedded data
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
# The table in a folder, named as in the image folders of `datasets`.
_FOLDER_TABLES = ("metadata.csv", "metadata.jsonl")
# Each column of a row and its alternative names in tables; the first name that the table has is used.
_ALIASES = {
    "image": ("image", "file_name", "image_path", "path"),
    "left_image": ("left_image", "left"),
    "right_image": ("right_image", "right"),
    "question": ("question",),
    "answers": ("answers",),
    "answer": ("answer",),
    "sentence": ("sentence", "statement", "text"),
    "label": ("label",),
    "captions": ("captions", "caption", "text"),
    "image_id": ("image_id",),
}
_LABELS = {"1": 1, "true": 1, "0": 0, "false": 0}


def find_images(folder) -> list[Path]:
    """Return all images in a folder and its subfolders, sorted by path."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: expected one with images ({', '.join(IMAGE_SUFFIXES)}).")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"{folder} has no image in it: expected files ending in {', '.join(IMAGE_SUFFIXES)}.")
    return found


def load_rows(
    task, source, texts=(), image_dir=None, split: str = "validation", samples: int | None = None, seed: int = 0
) -> list[dict]:
    """Read rows for a task's collator.

    Args:
        task (`Task`):
            One of `madtp_hf.tasks.TASKS`; it determines the columns.
        source (`str` or `Path`):
            A folder of images, whose `metadata.csv` or `metadata.jsonl` is read if it has one; a table (`.csv`,
            `.tsv`, `.jsonl`, `.json`) with one row per sample; or `"digits"`, the embedded digit scenes. A table's
            image paths start from `image_dir`. Captions of one image may be in several rows.
        texts (`list[str]`, *optional*):
            Questions, sentences or captions for images that have none; they are assigned to the images in turn.
        image_dir (`str` or `Path`, *optional*):
            The folder that a table's image paths start from; by default the table's folder.
        split (`str`, *optional*, defaults to `"validation"`):
            The split of the digit scenes.
        samples (`int`, *optional*):
            How many rows to draw at random; by default all rows, and 200 for the digit scenes.
        seed (`int`, *optional*, defaults to 0):
            Seed for drawing rows.

    Returns:
        `list[dict]`: rows whose images are paths, or PIL images for digit scenes. A row has no answer, label or
        caption where the data have none.

    Raises:
        FileNotFoundError: if the source or an image doesn't exist.
        ValueError: for a table that can't be read (the message names the line), or for data that lack a text that the
            task needs.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if str(source) == DIGITS:
            return _digit_rows(task, split, samples or 200, seed)
        raise FileNotFoundError(
            f"{source} is not there: expected a folder of images, a table ({', '.join(TABLE_SUFFIXES)}),"
            f" or {DIGITS!r}."
        )
    table = path if path.is_file() else next((path / n for n in _FOLDER_TABLES if (path / n).is_file()), None)
    rows = _folder_rows(task, path) if table is None else _table_rows(task, table, image_dir)
    rows = [_with_text(task, row, texts, index) for index, row in enumerate(rows)]
    if samples is not None and samples < len(rows):
        rows = [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), samples))]
    return rows


def _digit_rows(task, split: str, samples: int, seed: int) -> list[dict]:
    from .digit_scenes import load_digit_captions, load_digit_questions, load_digit_statements

    load = {"question": load_digit_questions, "sentence": load_digit_statements}.get(
        task.text_column, load_digit_captions
    )
    return list(load(split, samples, seed))


def _folder_rows(task, folder: Path) -> list[dict]:
    images = [str(path) for path in find_images(folder)]
    number = len(task.image_columns)
    if len(images) < number:
        raise ValueError(f"{folder} has {len(images)} image: expected at least {number}, for a sample has {number}.")
    # Consecutive images form a pair.
    groups = [images[index : index + number] for index in range(0, len(images) - number + 1, number)]
    return [{**dict(zip(task.image_columns, group)), "image_id": group[0]} for group in groups]


def _entries(table: Path):
    """Yield (place, entry) for each row of a table."""
    suffix = table.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{table} is no table that is known: expected a file ending in {', '.join(TABLE_SUFFIXES)}.")
    text = _read_text(table)
    if suffix in (".csv", ".tsv"):
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ",")
        for entry in reader:
            # `DictReader` puts surplus fields of a row under the key None, and fills missing fields with None.
            yield f"{table}, line {reader.line_num}", {name: value for name, value in entry.items() if name and value}
    elif suffix == ".jsonl":
        for number, line in _lines(text):
            place = f"{table}, line {number}"
            yield place, _checked_entry(_parse(line, table, number), place)
    else:
        content = _parse(text, table)
        if not isinstance(content, list):
            raise ValueError(f"{table} has a JSON {type(content).__name__}: expected a list of objects.")
        for number, entry in enumerate(content, 1):
            yield f"{table}, entry {number}", _checked_entry(entry, f"{table}, entry {number}")


def _as_list(value) -> list[str]:
    """Return answers or captions as a list, from a list, a JSON list in a string (as in CSV files) or one string."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return [value]
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _table_rows(task, table: Path, image_dir) -> list[dict]:
    wanted = {*task.image_columns, *task.target_columns, "image_id"} | ({task.text_column} - {None})
    find_image, rows = _image_finder(image_dir, table), {}
    for place, entry in _entries(table):
        row = {}
        for column in _ALIASES:
            name = next((name for name in _ALIASES[column] if entry.get(name) not in (None, "")), None)
            if column in wanted and name is not None:
                row[column] = entry[name]
        for column in task.image_columns:
            if not isinstance(row.get(column), str):
                raise ValueError(
                    f"{place}: no {column!r}, only {', '.join(map(str, entry)) or 'nothing'}: expected a path in a"
                    f" column of one of the names {', '.join(_ALIASES[column])}."
                )
            row[column] = find_image(row[column], place)
        for column in {"answers", "captions"} & row.keys():
            row[column] = _as_list(row[column])
        if "label" in row:
            label = _LABELS.get(str(row["label"]).strip().lower())
            if label is None:
                raise ValueError(f"{place}: the label is {row['label']!r}: expected 1 or true, 0 or false.")
            row["label"] = label
        row["image_id"] = str(row.get("image_id", row[task.image_columns[0]]))
        # Captions of one image in several rows make one sample; each question about an image is its own sample.
        key = row["image_id"] if "captions" in row else len(rows)
        if key in rows:
            rows[key]["captions"] += row["captions"]
        else:
            rows[key] = row
    if not rows:
        raise ValueError(f"{table} has no row: expected one a sample.")
    return list(rows.values())


def _with_text(task, row: dict, texts, index: int) -> dict:
    """Return the row with a text added, if the task needs one and the row has none."""
    column = task.text_column
    if column is None or row.get(column):
        return row
    if not texts:
        raise ValueError(
            f"{row[task.image_columns[0]]} has no {column.removesuffix('s')}: {task.title} reads a text with each"
            f" image; expected a table with a column {column!r}, or texts for all (`texts`; on the command line --text"
            " TEXT)."
        )
    text = texts[index % len(texts)]
    return {**row, column: [text] if column == "captions" else text}
