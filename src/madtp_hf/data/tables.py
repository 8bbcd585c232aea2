"""Read your own data as rows for the collators: CSV, JSON lines or Parquet, images as paths or bytes in the table."""

import csv
import os
import warnings
from pathlib import Path

from .published import _rows_where


# For each task, its columns and their alternative names in tables; a * marks columns that may be missing.
_COLUMNS = {
    "vqa": {"image": (), "question": (), "answers*": ("answer",)},
    "captioning": {"image": (), "captions": ("caption",)},
    "retrieval": {"image": (), "captions": ("caption",), "image_id*": ()},
    "nlvr2": {"left_image": (), "right_image": (), "sentence": (), "label*": ()},
}
_IMAGES = ("image", "left_image", "right_image")
_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_LABELS = {"true": 1, "false": 0, "1": 1, "0": 0}
_SHOWN = 5  # how many problems a message names


def load_table(
    path,
    task: str,
    image_dir=None,
    columns: dict[str, str] | None = None,
    where: dict[str, str] | None = None,
    on_error: str = "raise",
):
    """Read a table of your own as rows for a task's collator.

    Args:
        path (`str`, `Path` or `list` of them):
            A `.csv`, `.tsv`, `.json`, `.jsonl` or `.parquet` file, several files of one kind (shards), or a folder of
            files of one kind. A `.csv` or `.tsv` starts with a header of column names.
        task (`str`):
            `"vqa"`: `image`, `question` and, except for prediction, `answers` (a string or a list). `"captioning"`:
            `image` and `captions` (a string or a list). `"retrieval"`: the same and, optionally, `image_id`.
            `"nlvr2"`: `left_image`, `right_image`, `sentence` and, except for prediction, `label` (0 or 1, true or
            false). `answers` and `captions` may also be called `answer` and `caption`. An image is a path, or the
            bytes of an image file (Parquet).
        image_dir (`str` or `Path`, *optional*):
            The folder that relative image paths start from; by default the table's folder.
        columns (`dict[str, str]`, *optional*):
            A mapping from the columns named above to the table's names, where they differ: `{"image": "file_name"}`.
        where (`dict[str, str]`, *optional*):
            Keep only rows with these values, for tables with a column for the split: `{"split": "train"}`.
        on_error (`str`, *optional*, defaults to `"raise"`):
            What to do with rows that lack a required value or whose image file doesn't exist: `"skip"` leaves them
            out, with a warning that names them.

    Returns:
        `datasets.Dataset`. For captions, rows with the same image path are merged into one row with all its captions.
        If retrieval data have no `image_id`, it is the image's path or, for images in bytes, the row number.

    Raises:
        FileNotFoundError: if the table or an image file doesn't exist. ValueError: for a table that can't be read, a
        missing column or value, an unknown task. Rows are counted from 1, without the header.
    """
    if task not in _COLUMNS:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(_COLUMNS)}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: expected 'raise' or 'skip'")
    files = _find_tables(path)
    shown = str(files[0] if len(files) == 1 else files[0].parent)
    table, malformed = _read(files)
    theirs = _match_columns(table.column_names, _COLUMNS[task], columns or {}, shown)
    numbers = list(range(1, len(table) + 1))
    if where:
        unknown = [name for name in where if name not in table.column_names]
        if unknown:
            raise ValueError(f"{shown} has no column {', '.join(unknown)}: it has {', '.join(table.column_names)}")
        table = _rows_where(table.add_column("row number", numbers), where, shown)
        numbers = table["row number"][:]
    table = table.select_columns(list(theirs.values())).rename_columns({name: ours for ours, name in theirs.items()})

    folder = os.path.abspath(files[0].parent if image_dir is None else Path(image_dir).expanduser())
    values, problems = _values(table, folder)
    problems |= {row: (ValueError, malformed[number]) for row, number in enumerate(numbers) if number in malformed}
    if problems:
        _report(problems, numbers, shown, on_error)
    rows = [row for row in range(len(table)) if row not in problems]
    if not rows:
        raise ValueError(f"{shown} has no row that can be used")
    if task == "retrieval":
        paths = values.get("image", numbers)
        values["image_id"] = [str(name) for name in values.get("image_id", paths)]
    if "captions" in values and "image" in values:
        rows = _one_row_an_image(values, rows)
    return _assemble(table, values, rows, [name.rstrip("*") for name in _COLUMNS[task]])


def _assemble(table, values: dict[str, list], rows: list[int], order: list[str]):
    """Build the data set of these rows, in column order: `values`, plus the table's own columns of images in bytes."""
    from datasets import Image, Sequence, Value

    texts = Sequence(Value("string"))
    features = {"answers": texts, "captions": texts, "label": Value("int64")}
    result = table.select(rows)
    for name, of_rows in values.items():
        if name in result.column_names:
            result = result.remove_columns(name)
        kept = [of_rows[row] for row in rows]
        result = result.add_column(name, kept, feature=features.get(name, Value("string")))
    for name in _IMAGES:
        if name in result.column_names:
            result = result.cast_column(name, Image())
    return result.select_columns([name for name in order if name in result.column_names])


def _find_tables(path) -> list[Path]:
    """Return the files of a table, all of one kind."""
    paths = [Path(one).expanduser() for one in (path if isinstance(path, list) else [path])]
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        paths = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
        if not paths:
            raise FileNotFoundError(f"no {', '.join(_SUFFIXES)} file in the folder {folder}")
    for file in paths:
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}: expected a table, {', '.join(_SUFFIXES)}")
    kinds = sorted({file.suffix.lower() for file in paths})
    if len(kinds) != 1 or kinds[0] not in _SUFFIXES:
        raise ValueError(
            f"{paths[0].parent}: tables of the kinds {', '.join(kinds)}: expected one of {', '.join(_SUFFIXES)}"
        )
    return paths


def _read(files: list[Path]):
    """Read the table; also return, for each malformed row (counted from 1), what is wrong with it."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    suffix = files[0].suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _read_csv(files, "\t" if suffix == ".tsv" else ",")
    kind = "parquet" if suffix == ".parquet" else "json"
    try:
        return load_dataset(kind, data_files=[str(file) for file in files], split="train"), {}
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(f"{', '.join(map(str, files))[:300]}: no table that can be read ({reason})") from error


def _read_csv(files: list[Path], delimiter: str):
    """Read CSV as `_read` does, with every value a string: an answer "2" is not a number."""
    from datasets import Dataset

    names, rows, malformed = None, [], {}
    for file in files:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            try:
                heading = next(reader, [])
                if names not in (None, heading):
                    raise ValueError(f"{file} has the columns {', '.join(heading)}: expected {', '.join(names)}")
                names = heading
                if len(set(names)) < len(names) or not names:
                    raise ValueError(f"{file}, line 1: expected names of columns, each once, got {', '.join(names)!r}")
                for cells in filter(None, reader):
                    rows.append((cells + [""] * len(names))[: len(names)])
                    if len(cells) != len(names):
                        malformed[len(rows)] = (
                            f"{file.name}, line {reader.line_num}: {len(cells)} cells, expected {len(names)}: put text"
                            f" with {delimiter!r} in it into double quotes"
                        )
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{file}, line {reader.line_num}: no table that can be read ({error})") from error
    if not rows:
        raise ValueError(f"{files[0]} has no row")
    return Dataset.from_dict({name: list(column) for name, column in zip(names, zip(*rows))}), malformed


def _match_columns(found: list[str], expected: dict, columns: dict[str, str], shown) -> dict[str, str]:
    """Return the mapping from our column names to the table's."""
    known = [name.rstrip("*") for name in expected]
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise ValueError(f"columns={columns}: expected columns out of {', '.join(known)}, got {', '.join(unknown)}")
    theirs = {}
    for marked, others in expected.items():
        name = marked.rstrip("*")
        candidates = [columns[name]] if name in columns else [name, *others]
        match = next((candidate for candidate in candidates if candidate in found), None)
        if match is not None:
            theirs[name] = match
        elif name in columns or not marked.endswith("*"):
            raise ValueError(
                f"{shown} has no column {' or '.join(candidates)}: it has {', '.join(found)}; say with columns= which"
                f" it is: columns={{{name!r}: ...}}"
            )
    return theirs


def _values(table, folder: str) -> tuple[dict[str, list], dict[int, tuple[type, str]]]:
    """Convert all columns but images in bytes for the collators; also return the problem of each bad row."""
    values, problems = {}, {}

    def note(row, error, problem):
        problems.setdefault(row, (error, problem))

    for name in table.column_names:
        given = table.features[name]
        if name in _IMAGES and getattr(given, "dtype", None) not in ("string", "large_string"):
            continue
        of_rows = list(table[name])
        if name in _IMAGES:
            of_rows = [os.path.normpath(os.path.join(folder, path)) if path else path for path in of_rows]
        elif name in ("captions", "answers"):
            of_rows = [[text] if isinstance(text, str) and text.strip() else text for text in of_rows]
        elif name == "label":
            of_rows = [_LABELS.get(str(value).lower(), value) for value in of_rows]
        for row, value in enumerate(of_rows):
            if value is None or value == "" or value == [] or (isinstance(value, str) and not value.strip()):
                note(row, ValueError, f"no {name}")
            elif name in _IMAGES and not os.path.isfile(value):
                note(row, FileNotFoundError, f"{name}: no file {value}")
            elif name in ("captions", "answers") and not _are_texts(value):
                note(row, ValueError, f"{name}: expected a string or a list of strings, got {repr(value)[:60]}")
            elif name == "label" and value not in (0, 1):
                note(row, ValueError, f"label {value!r}: expected 0 or 1")
            elif name in ("question", "sentence") and not isinstance(value, str):
                note(row, ValueError, f"{name}: expected a string, got {repr(value)[:60]}")
        values[name] = of_rows
    return values, problems


def _are_texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)


def _report(problems: dict, numbers: list[int], shown, on_error: str) -> None:
    """Raise the first problem, or warn about all of them."""
    if on_error == "raise":
        row, (error, problem) = min(problems.items())
        raise error(f"{shown}, row {numbers[row]}: {problem}; mend it, or leave such rows out with on_error='skip'")
    named = "; ".join(f"row {numbers[row]}: {problem}" for row, (_, problem) in sorted(problems.items())[:_SHOWN])
    more = "; ..." if len(problems) > _SHOWN else ""
    warnings.warn(f"{shown}: {len(problems)} rows are left out ({named}{more})", stacklevel=3)


def _one_row_an_image(values: dict[str, list], rows: list[int]) -> list[int]:
    """Return the first row of each image path, after adding the captions of the path's other rows to it."""
    first = {}
    for row in rows:
        kept = first.setdefault(values["image"][row], row)
        if kept != row:
            values["captions"][kept] = values["captions"][kept] + values["captions"][row]
    return list(first.values())
