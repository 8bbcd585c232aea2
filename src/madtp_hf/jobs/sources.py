"""Sources of a job's rows: a folder, a list, parquet files, WebDataset tars or a `datasets` data set.

Each source has a length, yields the rows of any range in order, and has a fingerprint that changes with its rows. It
keeps at most one string per row in memory; files are opened and images read only when their range is requested.
"""

import csv
import glob
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


IMAGE_COLUMNS = ("image", "image_path", "path", "file_name", "file", "img", "jpg", "png")
QUESTION_COLUMNS = ("question", "text", "prompt")
KEY_COLUMNS = ("key", "id", "question_id", "image_id", "__key__")
_LISTS = (".txt", ".jsonl", ".csv", ".tsv")


@dataclass(frozen=True)
class Row:
    """One image and, if the source has one, the question about it.

    index: the row's index in the source, from 0. key: the row's name in the output. image: a path, or the bytes of an
    image file; None if the row has none.
    """

    index: int
    key: str
    image: str | bytes | None
    question: str | None = None


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns; names not given are looked up among the usual ones."""

    image: str | None = None
    question: str | None = None
    key: str | None = None

    def choose(self, names: Iterable[str], where) -> "Columns":
        """Choose the columns of a table with `names`; a missing image column is an error, others are None."""
        names, chosen = list(names), {}
        usual_names = {"image": IMAGE_COLUMNS, "question": QUESTION_COLUMNS, "key": KEY_COLUMNS}
        for kind, usual in usual_names.items():
            given = getattr(self, kind)
            if given is not None and given not in names:
                raise ValueError(f"{where} has no column {given!r}: expected one of {', '.join(names)}.")
            chosen[kind] = given or next((name for name in usual if name in names), None)
        if chosen["image"] is None:
            raise ValueError(
                f"{where} has the columns {', '.join(names)}: name the one with the images, "
                'pass columns={"image": NAME}.'
            )
        return Columns(**chosen)


def require(module: str):
    """Import a library of the `jobs` extra."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"This needs {module.partition('.')[0]}: pip install 'madtp_hf[jobs]'.") from error


def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the image files that Pillow can read, in lower case, with their dots."""
    from PIL import Image

    Image.init()
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return frozenset(readable - {".pdf", ".ps", ".eps", ".mpg", ".mpeg"})


def open_source(images, columns: Columns = Columns(), split: str | None = None, image_root=None):
    """Determine what `images` is, and open it as a source.

    Args:
        images (`str` or `Path`): a folder of images, tars or parquet files, or one saved by `datasets`; a list of
            images (`.txt`, `.jsonl`, `.csv`, `.tsv`); parquet files or tars, also as a pattern such as
            `train-{000..099}.tar` or `data/*.parquet`; else the id of a data set on the Hub.
        columns (`Columns`): the names of a table's columns.
        split (`str`, *optional*): the split of a data set with several.
        image_root (`str` or `Path`, *optional*): the folder that relative paths in a list or table start from, by
            default the list's folder.

    Returns: a source with `len`, `rows(start, stop)`, `fingerprint` and `root`, the folder that keys are relative to,
        if any.

    Raises: `ValueError` or `OSError` if `images` is none of these, or holds no image.
    """
    text = os.path.expanduser(os.fspath(images))
    path = Path(text)
    root = None if image_root is None else Path(image_root).expanduser()
    if path.is_dir():
        source = _open_folder(path, columns, split, root)
    elif path.suffix in (".tar", ".parquet"):
        files = _expand(text)
        source = TarSource(files) if path.suffix == ".tar" else ParquetSource(files, columns, root)
    elif path.suffix.lower() in _LISTS:
        source = _read_list(path, columns, root)
    elif path.is_file():
        expected = f"a folder, {', '.join(_LISTS)}, .parquet or .tar"
        if path.suffix.lower() not in image_suffixes():
            raise ValueError(f"{text} is no list of images: expected {expected}.")
        source = ListSource([path.name], [str(path)], None, path.parent)
    elif path.is_absolute() or text.startswith(".") or text.count("/") > 1:
        raise FileNotFoundError(f"There is no {text}: expected images, a list of them, or the id of a data set.")
    else:
        source = DatasetSource(require("datasets").load_dataset(text, split=split), columns, text, root)
    if not len(source):
        raise ValueError(f"{text} holds no image: expected files with the suffix of an image, or rows of a table.")
    return source


def _open_folder(path: Path, columns: Columns, split: str | None, root: Path | None):
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return DatasetSource(require("datasets").load_from_disk(str(path)), columns, str(path), root, split)
    names = list(_walk(path))
    if names:
        return ListSource(names, [], None, path)
    for suffix in (".tar", ".parquet"):
        files = sorted(str(file) for file in path.rglob(f"*{suffix}"))
        if files:
            return TarSource(files) if suffix == ".tar" else ParquetSource(files, columns, root)
    return ListSource([], [], None, path)


def _walk(folder: Path) -> Iterator[str]:
    """Yield the paths, relative to `folder`, of all entries named like images, in fixed order; no folder links."""
    suffixes = image_suffixes()
    for parent, folders, files in os.walk(folder):
        folders.sort()
        # A folder or a broken link that is named like an image is included, and later reported as unreadable: nothing
        # is skipped silently.
        for name in sorted(files + folders):
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith("._"):
                yield os.path.relpath(os.path.join(parent, name), folder)


def _expand(pattern: str) -> list[str]:
    """Return the files of a brace pattern, a glob or a single name."""
    names = require("braceexpand").braceexpand(pattern) if "{" in pattern else [pattern]
    files = [file for name in names for file in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing or not files:
        raise FileNotFoundError(
            f"There is no file {missing[0] if missing else pattern}: expected the files of {pattern}."
        )
    return files


def _digest(parts: Iterable) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


class ListSource:
    """Paths and, if there are any, questions. A folder's keys are its paths, so one list of strings is enough."""

    def __init__(self, keys: list[str], paths: list[str], questions: list[str] | None, root: Path):
        self.keys, self.paths, self.questions, self.root = keys, paths, questions, root

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def fingerprint(self) -> str:
        return _digest(part for part in (self.keys, self.paths, self.questions or ()) for part in (len(part), *part))

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        paths = self.paths or self.keys
        for index in range(start, min(stop, len(self))):
            path = os.path.join(self.root, paths[index]) if paths[index] else None
            yield Row(index, self.keys[index], path, self.questions[index] if self.questions else None)


def _read_list(path: Path, columns: Columns, root: Path | None) -> ListSource:
    """Read a list: lines with a path, or a path, a tab and a question; or a table as JSONL, CSV or TSV."""
    keys, paths, questions, has_keys = [], [], [], False
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, (image, question, key) in enumerate(_list_entries(file, path, columns)):
            for kind, value in (("path", image), ("question", question)):
                if value is not None and not isinstance(value, str):
                    raise ValueError(f"{path}, row {number + 1}: the {kind} is {value!r}: expected a string.")
            has_keys |= key is not None
            paths.append(image or "")
            questions.append(question)
            keys.append(str(key if key is not None else image or number))
    has_questions = any(question is not None for question in questions)
    return ListSource(keys, paths if has_keys else [], questions if has_questions else None, root or path.parent)


def _list_entries(file, path: Path, columns: Columns) -> Iterator[tuple]:
    """Yield (path of the image, question, key) for each row, with None for missing values."""
    suffix = path.suffix.lower()
    if suffix == ".txt":
        for line in file:
            if line.strip():
                image, _, question = line.rstrip("\r\n").partition("\t")
                yield image, question or None, None
        return
    if suffix == ".jsonl":
        entries = _json_lines(file, path)
    else:
        entries = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
        columns = columns.choose(entries.fieldnames or (), path)
    chosen = columns if suffix != ".jsonl" else None
    for entry in entries:
        chosen = chosen or columns.choose(entry, path)
        yield tuple(entry.get(name) if name else None for name in (chosen.image, chosen.question, chosen.key))


def _json_lines(file, path: Path) -> Iterator[dict]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is no JSON ({error}): expected an object a line.") from error
            if not isinstance(entry, dict):
                raise ValueError(f'{path}, line {number}: expected an object, such as {{"image": "a.jpg"}}.')
            yield entry


def _table_row(index: int, values: dict, columns: Columns, root) -> Row:
    """Return a row of a table whose images are paths, bytes, or both in a dictionary, as written by `datasets`."""
    image, path = values[columns.image], None
    if isinstance(image, dict):
        image, path = image.get("bytes"), image.get("path")
        image = path if image is None else image
    if isinstance(image, str) and root is not None:
        image = os.path.join(root, image)
    key = values[columns.key] if columns.key else None
    question = values[columns.question] if columns.question else None
    return Row(index, str(index if key is None else key), image, None if question is None else str(question))


class ParquetSource:
    """Rows of parquet files whose images are paths or bytes, read one row group, a few rows, at a time."""

    root = None
    rows_at_once = 32

    def __init__(self, files: list[str], columns: Columns, root: Path | None):
        self._parquet = "pyarrow.parquet"
        parquet, self.files, self._firsts, self._groups, total = require(self._parquet), files, [], [], 0
        self.image_root = root
        for number, name in enumerate(files):
            file = parquet.ParquetFile(name)
            chosen = columns.choose(file.schema_arrow.names, name)
            if number and chosen != self.columns:
                raise ValueError(f"{name} has other columns than {files[0]}: expected files of one table.")
            self.columns = chosen
            for group in range(file.metadata.num_row_groups):
                self._firsts.append(total)
                self._groups.append((number, group))
                total += file.metadata.row_group(group).num_rows
        self._total, self._current, self._batches = total, None, None

    def __len__(self) -> int:
        return self._total

    @property
    def fingerprint(self) -> str:
        sizes = [(os.path.basename(file), os.path.getsize(file)) for file in self.files]
        return _digest((*sizes, self._total, self.columns))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_current": None, "_batches": None}  # open files can't move to another process

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        stop = min(stop, self._total)
        while start < stop:
            first, batch = self._batch_with(start)
            end = min(stop, first + batch.num_rows)
            for index, values in enumerate(batch.slice(start - first, end - start).to_pylist(), start):
                root = self.image_root or os.path.dirname(self.files[self._groups[self._group_of(index)][0]])
                yield _table_row(index, values, self.columns, root)
            start = end

    def _group_of(self, row: int) -> int:
        return bisect_right(self._firsts, row) - 1

    def _batch_with(self, row: int):
        """Return the first row index of the record batch that holds `row`, and the batch; continues the open group."""
        group = self._group_of(row)
        if self._current is not None:
            opened, first, batch = self._current
            if opened != group or row < first:
                self._current = None
            elif row < first + batch.num_rows:
                return first, batch
        if self._current is None:
            number, of_file = self._groups[group]
            file = require(self._parquet).ParquetFile(self.files[number], buffer_size=2**20, pre_buffer=False)
            names = [name for name in (self.columns.image, self.columns.question, self.columns.key) if name]
            self._batches = file.iter_batches(self.rows_at_once, row_groups=[of_file], columns=names)
            following = self._firsts[group]
        else:
            following = first + batch.num_rows
        for batch in self._batches:
            if row < following + batch.num_rows:
                self._current = (group, following, batch)
                return following, batch
            following += batch.num_rows
        raise ValueError(f"{self.files[self._groups[group][0]]} has fewer rows than it says: write it again.")


class TarSource:
    """Images in uncompressed tars, read in place.

    A sample's question is its `.txt` file, or "question" in its `.json` file.
    """

    root = None

    def __init__(self, files: list[str]):
        import tarfile

        base_plus_ext = require("webdataset.tariterators").base_plus_ext
        suffixes, self.files, self.keys, places, texts = image_suffixes(), files, [], [], {}
        for number, name in enumerate(files):
            try:
                with tarfile.open(name, "r:") as tar:
                    for member in tar:
                        key, extension = base_plus_ext(member.name) if member.isfile() else (None, None)
                        suffix = "." + (extension or "").lower().rpartition(".")[2]
                        place = (number, member.offset_data, member.size)
                        if key is not None and suffix in suffixes:
                            self.keys.append(key)
                            places.append(place)
                        elif suffix in (".txt", ".json"):
                            texts[number, key, suffix] = place
                        tar.members = []  # otherwise tarfile keeps every member in memory
            except tarfile.TarError as error:
                raise ValueError(
                    f"{name} can't be read ({error}): expected an uncompressed tar; mend it or leave it out."
                ) from error
        self._places = np.array(places, dtype=np.int64).reshape(-1, 3)
        self._texts, self._open = texts, {}

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def fingerprint(self) -> str:
        return _digest([*map(os.path.basename, self.files), *self.keys, self._places.sum()])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def _read(self, number: int, offset: int, size: int) -> bytes:
        # Only one tar is open at a time, since rows come in order.
        if number not in self._open or self._open["process"] != os.getpid():
            self._open = {number: open(self.files[number], "rb"), "process": os.getpid()}
        self._open[number].seek(offset)
        return self._open[number].read(size)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for index in range(start, min(stop, len(self))):
            key, place = self.keys[index], self._places[index].tolist()
            yield Row(index, key, self._read(*place), self._question(place[0], key))

    def _question(self, number: int, key: str) -> str | None:
        if (number, key, ".txt") in self._texts:
            return self._read(*self._texts[number, key, ".txt"]).decode("utf-8", "replace").strip()
        if (number, key, ".json") in self._texts:
            try:
                entry = json.loads(self._read(*self._texts[number, key, ".json"]))
            except ValueError:
                return None
            return entry.get("question") if isinstance(entry, dict) else None
        return None


class DatasetSource:
    """A `datasets` data set whose images stay encoded."""

    root = None

    def __init__(self, dataset, columns: Columns, name: str, root: Path | None = None, split: str | None = None):
        datasets = require("datasets")
        if isinstance(dataset, dict):
            names = list(dataset)
            if (split or len(names) > 1) and split not in names:
                raise ValueError(f"{name} has the splits {', '.join(names)}: choose one with --split.")
            dataset = dataset[split or names[0]]
        features = dataset.features
        pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
        if columns.image is None and pictures:
            columns = Columns(pictures[0], columns.question, columns.key)
        self.columns, self.image_root = columns.choose(features, name), root
        self._fingerprint = dataset._fingerprint  # taken before the cast, which changes no row
        if self.columns.image in pictures:
            dataset = dataset.cast_column(self.columns.image, datasets.Image(decode=False))
        wanted = {self.columns.image, self.columns.question, self.columns.key} - {None}
        self.dataset = dataset.select_columns(sorted(wanted))

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def fingerprint(self) -> str:
        return _digest((self._fingerprint, len(self), self.columns))

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for index in range(start, min(stop, len(self))):
            yield _table_row(index, self.dataset[index], self.columns, self.image_root)
