"""Rows of images and texts from any source: folders, lists, tables, WebDataset tars and `datasets` data sets.

All are opened by `open_rows`, have a length, yield the rows of any range in order, and say by a number for each row
whether what it holds has changed. Texts and paths are kept in memory; the bytes of images are read in place when their
rows are.
"""

import copy
import csv
import glob
import hashlib
import importlib
import itertools
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .columns import ALIASES, IMAGES, TEXTS, clean, match_columns, read_value
from .image_files import is_image, path_inside, walk_images


if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Self

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_EXPECTED = f"a folder of images, a table ({', '.join(TABLES)}), a .txt list, .tar files or the id of a data set"


@dataclass(frozen=True)
class Row:
    """A row of a source.

    index: from 0; messages count rows from 1, without a table's header. key: its name in outputs. values: the wanted
    columns that it has, by our names: images as paths or the bytes of image files, other values as the source has
    them. error: why the row can't be used, if it can't.
    """

    index: int
    key: str
    values: dict = field(default_factory=dict)
    error: str | None = None


class Rows:
    """A source's rows. Subclasses have `rows(start, stop)` and what identifies a row.

    columns: the wanted columns that the source has, by our names, and the source's names for them. found: all names.
    name: for messages. folder: the image folder. in_memory: whether images are files, which reading rows doesn't read.
    """

    in_memory = False
    dataset: "Dataset"  # of rows whose images are bytes: the same rows in `datasets`' form

    def __init__(self, name, columns: dict[str, str], found: Iterable[str], folder):
        self.name, self.columns, self.found = str(name), columns, [*found]
        self.folder = folder and os.path.abspath(folder)

    def identities(self) -> np.ndarray:
        """Return an int64 for each row, which changes with its texts, its image's name, size or modification time.

        Rows of the same content have the same. For images in Parquet files, tars and data sets, the file that holds a
        row and its place there count.
        """
        columns = sorted(item for item in self.columns.items() if item[0] != "key")
        digests = (
            hashlib.blake2b(repr((columns, origin)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
            for origin in self._origins()
        )
        return np.frombuffer(b"".join(digests), np.int64)

    def __len__(self) -> int:
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """Yield the rows from `start` up to `stop`."""
        raise NotImplementedError

    def _origins(self) -> Iterable[tuple]:
        """Yield, for each row, what its result depends on."""
        raise NotImplementedError

    def without_images(self) -> "Self":
        """Return the same rows without the images' columns, for reading the others alone."""
        rows = copy.copy(self)
        rows.columns = {name: theirs for name, theirs in self.columns.items() if name not in IMAGES}
        return rows

    def keys(self) -> list[str]:
        rows = self if self.in_memory else self.without_images()
        return [row.key for row in rows.rows(0, len(self))]

    def _row(self, index: int, values: dict) -> Row:
        """Return a row, the paths of its images looked up in the image folder."""
        values = {k: clean(v) if isinstance(v, str) and k not in IMAGES else v for k, v in values.items()}
        key, problem = read_value("key", values.pop("key", None)), None
        for name in [name for name in IMAGES if name in values]:
            image = values[name]
            if isinstance(image, dict):  # as written by `datasets`
                image = image.get("path") if image.get("bytes") is None else image["bytes"]
            try:
                if isinstance(image, str) and image:
                    if self.folder is None:
                        raise ValueError(f"image path {image!r} in tables of several folders: pass `image_dir`")
                    key = _as_key(image) if key is None and self.in_memory else key
                    image = path_inside(image, self.folder)
                elif image and not isinstance(image, bytes):
                    raise ValueError(f"{name}: expected a path or the bytes of an image, got {repr(image)[:60]}")
            except ValueError as error:
                image, problem = None, str(error)
            values[name] = image or None
        return Row(index, str(index) if key is None else key, values, problem)


def open_rows(source, *, columns=None, image_dir=None, split: str | None = None, wanted=("image", "question", "key")):
    """Open a source of rows.

    Args:
        source (`str`, `Path` or `list`): A folder of images, of tars or of tables of one kind, or one saved by
            `datasets`; a table (`.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet`), or a `.txt` with a path, or a path, a
            tab and a text in each line; tars of WebDataset's layout, uncompressed; several of them as a list or a
            pattern such as `train-{000..099}.tar` or `data/*.parquet`; a list of images; else the id of a data set on
            the Hub. A folder's `metadata.csv` or `metadata.jsonl` is read where texts are wanted.
        columns (`dict[str, str]`, *optional*): The source's names of columns, by ours, where they have none of the
            usual names (`columns.ALIASES`).
        image_dir (`str` or `Path`, *optional*): The folder that image paths start from and stay in, by default that of
            the table.
        split (`str`, *optional*): The split of a data set with several.
        wanted (`tuple[str]`, *optional*): The columns to read: names of `columns.ALIASES`, or a table's own.

    Returns:
        `Rows` with `len`, `rows(start, stop)`, `keys()`, `identities()`, `columns`, `name` and `folder`.

    Raises:
        ValueError, FileNotFoundError: if the source is not one of these, can't be read, has no row, or lacks a column
            of images or one of `columns`.
    """
    rows = _open(source, (wanted, columns, image_dir and Path(image_dir).expanduser()), split)
    if not len(rows):
        raise ValueError(f"{rows.name} holds no image: expected {_EXPECTED}.")
    return rows


def _open(source, options: tuple[tuple[str, ...], dict[str, str] | None, Path | None], split) -> Rows:
    if isinstance(source, (list, tuple)):
        files = [Path(one).expanduser() for one in source]
        if any(file.suffix.lower() in (*TABLES, ".tar") for file in files):
            return _open_files(files, options)
        return _images("The list", [os.path.abspath(file) for file in files], os.path.abspath(os.sep))
    text = os.path.expanduser(os.fspath(source))
    path = Path(text)
    if path.is_dir():
        return _open_folder(path, options, split)
    if path.is_file() and is_image(path.name):
        return _images(path, [path.name], path.parent)
    if not path.exists() and (glob.has_magic(text) or "{" in text):
        names = require("braceexpand").braceexpand(text) if "{" in text else [text]
        found = [file for name in names for file in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
        return _open_files([Path(file) for file in found or [text]], options)
    if path.exists() or path.suffix.lower() in (*_ENTRIES, ".parquet", ".tar"):
        return _open_files([path], options)
    if path.is_absolute() or text.startswith(".") or text.count("/") > 1:
        raise FileNotFoundError(f"There is no {text}: expected {_EXPECTED}.")
    return DatasetRows(text, *options, split)


def _open_folder(path: Path, options: tuple[tuple[str, ...], dict[str, str] | None, Path | None], split) -> Rows:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return DatasetRows(path, *options, split)
    for table in (path / "metadata.csv", path / "metadata.jsonl"):
        if table.is_file() and {*options[0]} & {*TEXTS, "answers", "label"}:
            return _open_files([table], options)
    found = list(walk_images(path))
    problems = {row: reason for row, (_, reason) in enumerate(found) if reason}
    files = find_files(path) if len(found) == len(problems) else None
    if files and problems:
        raise ValueError(f"{path / found[0][0]}: {found[0][1]}. Make it readable, or name the files to read.")
    return _open_files(files, options) if files else _images(path, [name for name, _ in found], path, problems)


def find_files(folder: Path, suffixes=(".tar", *TABLES)) -> list[Path]:
    """Return the files of the first of these suffixes that a folder has any of, in it or in its folders; or none."""
    of_suffixes = ([file for file in sorted(folder.rglob(f"*{suffix}")) if file.name[0] != "."] for suffix in suffixes)
    return next(filter(None, of_suffixes), [])


def _open_files(files: list[Path], options: tuple) -> Rows:
    """Open files of one kind as one source."""
    missing, kinds = [file for file in files if not file.is_file()], {file.suffix.lower() for file in files}
    if missing:
        raise FileNotFoundError(f"There is no file {missing[0]}: expected {_EXPECTED}.")
    if len(kinds) > 1 or not kinds <= {*_ENTRIES, ".parquet", ".tar"}:
        raise ValueError(f"{files[0]}: unsupported table format {', '.join(sorted(kinds))}: expected {_EXPECTED}.")
    return {".tar": TarRows, ".parquet": _open_parquet}.get(kinds.pop(), _read_table)(files, *options)


def require(module: str):
    """Import a library of the `jobs` extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"This needs {module.partition('.')[0]}: pip install 'madtp_hf[jobs]'.") from error


def _as_key(path: str) -> str:
    """Return a path as it is, also where the file's name isn't UTF-8, unless no file can have that name."""
    try:
        os.fsencode(path)
        return path
    except UnicodeEncodeError:
        return clean(path)


def _stamps(files: Iterable) -> Iterator[tuple]:
    """Yield what shows that a file has changed: its size and modification time."""
    for file in files:
        try:
            status = os.stat(file)
            yield status.st_size, status.st_mtime_ns
        except (OSError, ValueError):  # reading it later gives the reason
            yield ()


class TableRows(Rows):
    """Rows whose images are files, with all else in memory: of a folder, a list or a table.

    values: by column, one for each row, None where there is none. problems: why rows can't be used.
    """

    in_memory = True

    def __init__(self, name, columns: dict[str, str], found, folder, values: dict[str, list], problems=None):
        super().__init__(name, columns, found, folder)
        self.values, self.problems = values, problems or {}

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for index in range(start, min(stop, len(self))):
            values = {name: of_rows[index] for name, of_rows in self.values.items()}
            if index in self.problems:
                yield Row(index, str(values.get("image") or index), {}, self.problems[index])
            else:
                yield self._row(index, values)

    def _origins(self):
        for row in self.rows(0, len(self)):
            raw = [of_rows[row.index] for name, of_rows in self.values.items() if name != "key"]
            yield row.error, raw, *_stamps(row.values[name] for name in IMAGES if row.values.get(name))


def _images(name, names: list[str], folder, problems: dict[int, str] | None = None) -> TableRows:
    return TableRows(name, {"image": "image"}, ["image"], folder, {"image": names}, problems)


def _read_table(files: list[Path], wanted, given, image_dir) -> TableRows:
    """Read text tables with the same columns; a row that can't be read is kept as a problem."""
    name, header = _shown(files), None
    entries: list[dict | str] = []
    for file in files:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            try:
                for entry in _ENTRIES[file.suffix.lower()](lines):
                    if isinstance(entry, str):
                        entries.append(f"{file.name}, {entry}")
                    elif isinstance(entry, dict):
                        entries.append(entry)
                    elif header in (None, entry):
                        header = entry
                    else:
                        raise ValueError(f"{file} has other columns than {files[0]}: expected files of one table.")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 text ({error.reason}): save it as UTF-8.") from error
    problems = {row: entry for row, entry in enumerate(entries) if isinstance(entry, str)}
    found = header or list(dict.fromkeys(column for entry in entries if isinstance(entry, dict) for column in entry))
    if not entries or not found:
        raise ValueError(
            f"{name} has no row that can be used ({problems.get(0, 'it is empty')}): expected one per sample."
        )
    columns = match_columns(found, wanted, given, name)
    values = {
        ours: [None if isinstance(entry, str) else entry.get(theirs) for entry in entries]
        for ours, theirs in columns.items()
    }
    return TableRows(name, columns, found, _folder(files, image_dir), values, problems)


def _shown(files: list[Path]) -> Path:
    return files[0] if len(files) == 1 else files[0].parent


def _folder(files: list[Path], image_dir):
    """Return the image folder of tables; None if they are in several, so that paths start nowhere."""
    return image_dir or (files[0].parent if len({file.parent for file in files}) == 1 else None)


def _csv_entries(lines, delimiter: str = ",") -> Iterator[list | dict | str]:
    """Yield the header, and for each row a dict of strings, or what is wrong with it."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header = next(reader, [])
    if not header or len(set(header)) < len(header):
        raise ValueError(f"{lines.name}, line 1: expected names of columns, each once, got {', '.join(header)!r}.")
    yield header
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"line {reader.line_num} can't be read ({error})"
            continue
        if len(cells) == len(header):
            yield dict(zip(header, cells))
        elif cells:
            yield (
                f"line {reader.line_num}: {len(cells)} cells, expected {len(header)}: put text with {delimiter!r} into"
                " double quotes"
            )


def _json_entries(lines) -> Iterator[dict | str]:
    """Yield the objects of a JSON list or of JSON lines, or what is wrong with one."""
    text = lines.read()
    what, entries = "line", text.split("\n")
    if text.lstrip().startswith("["):
        try:
            what, entries = "entry", json.loads(text)
        except ValueError as error:
            raise ValueError(f"{lines.name} is not JSON ({error}): expected a list of objects.") from error
    for number, entry in enumerate(entries, 1):
        if what == "line" and not entry.strip():
            continue
        try:
            entry = json.loads(entry) if what == "line" else entry
        except ValueError as error:
            yield f"{what} {number}: not JSON ({error})"
            continue
        yield entry if isinstance(entry, dict) else f"{what} {number}: expected a JSON object, got {repr(entry)[:60]}"


def _list_entries(lines) -> Iterator[dict]:
    for line in lines:
        if line.strip():
            image, tab, text = line.rstrip("\r\n").partition("\t")
            yield {"image": image.strip(), **({"text": text} if tab else {})}


_ENTRIES: dict[str, Callable[..., Iterator]] = {
    ".txt": _list_entries,
    ".csv": _csv_entries,
    ".tsv": lambda lines: _csv_entries(lines, "\t"),
    ".jsonl": _json_entries,
    ".json": _json_entries,
}


class ParquetRows(Rows):
    """Rows of Parquet files that hold the bytes of images, read one row group, a few rows, at a time."""

    rows_at_once = 32

    def __init__(self, files: list[Path], wanted, given, image_dir):
        self.files, self._total = files, 0
        self._groups: list[tuple[int, int, int]] = []  # (first row, file, row group in it)
        for number, name in enumerate(files):
            try:
                file = require("pyarrow.parquet").ParquetFile(name)
            except (OSError, ValueError) as error:
                raise ValueError(f"{name} can't be read as Parquet ({str(error).partition(chr(10))[0]}).") from error
            if number == 0:
                self.schema = file.schema_arrow
            if file.schema_arrow.names != self.schema.names:
                raise ValueError(f"{name} has other columns than {files[0]}: expected files of one table.")
            for group in range(file.metadata.num_row_groups):
                self._groups.append((self._total, number, group))
                self._total += file.metadata.row_group(group).num_rows
        columns = match_columns(self.schema.names, wanted, given, _shown(files))
        super().__init__(_shown(files), columns, self.schema.names, _folder(files, image_dir))
        self._reader: tuple[int, Iterator[Row]] | tuple[None, None] = None, None

    def __len__(self) -> int:
        return self._total

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_reader": (None, None)}  # open files can't move to another process

    def _origins(self):
        stamps = [(file.name, *stamp) for file, stamp in zip(self.files, _stamps(self.files))]
        stops = [*(first for first, _, _ in self._groups[1:]), self._total]
        for (first, number, of_file), stop in zip(self._groups, stops):
            yield from ((stamps[number], of_file, place) for place in range(stop - first))

    @cached_property
    def dataset(self):
        """The same rows as a `datasets.Dataset`, which keeps a copy of them in its cache."""
        return require("datasets").load_dataset("parquet", data_files=[*map(str, self.files)], split="train")

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        stop = min(stop, self._total)
        position, reader = self._reader
        self._reader = None, None  # while it is in use here
        if reader is None or position != start:
            reader = self._rows_from(start)
        for row in itertools.islice(reader, max(0, stop - start)):
            start = row.index + 1
            yield row
        if start < stop:
            raise ValueError(f"{self.name} has fewer rows than its metadata says: write it again.")
        self._reader = start, reader

    def _rows_from(self, start: int) -> Iterator[Row]:
        names = list(dict.fromkeys(self.columns.values()))
        for index, number, of_file in self._groups[bisect_right(self._groups, start, key=itemgetter(0)) - 1 :]:
            file = require("pyarrow.parquet").ParquetFile(self.files[number], buffer_size=2**20, pre_buffer=False)
            for batch in file.iter_batches(self.rows_at_once, row_groups=[of_file], columns=names):
                skipped = min(max(0, start - index), batch.num_rows)
                for entry in batch.slice(skipped).to_pylist():
                    yield self._row(index + skipped, {ours: entry[theirs] for ours, theirs in self.columns.items()})
                    skipped += 1
                index += batch.num_rows


def _open_parquet(files: list[Path], wanted, given, image_dir) -> Rows:
    rows = ParquetRows(files, wanted, given, image_dir)
    types = [str(rows.schema.field(rows.columns[name]).type) for name in IMAGES if name in rows.columns]
    if not all(kind in ("string", "large_string", "string_view") for kind in types):
        return rows
    read, names = require("pyarrow.parquet").read_table, list(dict.fromkeys(rows.columns.values()))
    tables = [read(file, columns=names) for file in files]
    values = {
        ours: [v for table in tables for v in table[theirs].to_pylist()] for ours, theirs in rows.columns.items()
    }
    return TableRows(rows.name, rows.columns, rows.found, rows.folder, values)


class TarRows(Rows):
    """Images in uncompressed tars, read in place.

    A sample's text is its `.txt` file, or the value of the column in its `.json` file. A damaged tar gives a row with
    the error, after its samples that can be read.
    """

    def __init__(self, files: list[Path], wanted, given=None, image_dir=None):
        self._base_plus_ext = require("webdataset.tariterators").base_plus_ext
        self.files, places = files, []
        self._keys: list[str] = []
        self._texts: dict[tuple, tuple] = {}
        self._problems: dict[int, str] = {}
        for number, name in enumerate(files):
            for key, suffix, *place in self._members(name):
                if suffix in (".txt", ".json"):
                    self._texts[number, key, suffix] = (number, *place)
                    continue
                if suffix is None:
                    self._problems[len(self._keys)] = f"{name} {key}: expected a whole, uncompressed tar"
                self._keys.append(key if suffix else name.name)
                places.append((number, *place))
        if len(self._keys) == len(self._problems):
            raise ValueError(f"{next(iter(self._problems.values()), f'{_shown(files)} holds no image')}.")
        self._places = np.array(places, dtype=np.int64)
        texts = [name for name in wanted if name in (*TEXTS, "answers", "label")] if self._texts else []
        super().__init__(_shown(files), {name: name for name in ("image", *texts)}, ["image"], files[0].parent)

    def _members(self, name: Path) -> Iterator[tuple]:
        """Yield (key, suffix, offset, size) of images and texts; at the end of a damaged tar (problem, None, 0, 0)."""
        try:
            with tarfile.open(name, "r:") as tar:
                for member in tar:
                    key, extension = self._base_plus_ext(member.name) if member.isfile() else (None, None)
                    suffix = "." + (extension or "").lower().rpartition(".")[2]
                    if key is not None and (is_image(suffix) or suffix in (".txt", ".json")):
                        yield key, suffix, member.offset_data, member.size
                    tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps every member in memory
                # tarfile takes a damaged header for the end, which is blocks of zeros and nothing after them.
                tar.fileobj.seek(tar.offset)
                end = tar.fileobj.read(2 * tarfile.RECORDSIZE)
                if len(end) < tarfile.BLOCKSIZE or end.strip(tarfile.NUL):
                    raise tarfile.ReadError(f"it is truncated or damaged at byte {tar.offset}")
        except (tarfile.TarError, OSError) as error:
            yield f"can't be read to its end ({error})", None, 0, 0

    def __len__(self) -> int:
        return len(self._keys)

    def _origins(self):
        stamps = [(file.name, *stamp) for file, stamp in zip(self.files, _stamps(self.files))]
        for index, (number, *place) in enumerate(self._places.tolist()):
            yield stamps[number], place, self._problems.get(index)

    def keys(self) -> list[str]:
        return list(self._keys)

    def _read(self, number: int, offset: int, size: int) -> bytes:
        with open(self.files[number], "rb") as file:
            file.seek(offset)
            return file.read(size)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for index in range(start, min(stop, len(self))):
            key, (number, *place) = self._keys[index], self._places[index].tolist()
            if index in self._problems:
                yield Row(index, key, {}, self._problems[index])
            else:
                image = {"image": self._read(number, *place)} if "image" in self.columns else {}
                yield self._row(index, {"key": key, **image, **self._text(number, key)})

    def _text(self, number: int, key: str) -> dict:
        """Return the wanted columns that a sample's `.json` or `.txt` has."""
        try:
            entry = json.loads(self._read(*self._texts[number, key, ".json"]))
        except (KeyError, ValueError):
            entry = {}
        entry = entry if isinstance(entry, dict) else {}
        if (number, key, ".txt") in self._texts:
            entry["text"] = self._read(*self._texts[number, key, ".txt"]).decode("utf-8", "replace").strip()
        names = {name: next((one for one in ALIASES[name] if one in entry), None) for name in self.columns}
        return {name: entry[theirs] for name, theirs in names.items() if theirs and name != "image"}


class DatasetRows(Rows):
    """Rows of a `datasets` data set, saved or on the Hub, whose images stay encoded."""

    def __init__(self, source, wanted, given, image_dir, split: str | None):
        datasets = require("datasets")
        saved = isinstance(source, Path)
        dataset = datasets.load_from_disk(str(source)) if saved else datasets.load_dataset(source, split=split)
        if isinstance(dataset, dict):
            names = list(dataset)
            if (split or len(names) > 1) and split not in names:
                raise ValueError(f"{source} has the splits {', '.join(names)}: choose one of them, not {split!r}.")
            dataset = dataset[split or names[0]]
        pictures = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        given = dict(given or {})
        if "image" in wanted and not given.get("image") and pictures:
            given["image"] = "image" if "image" in pictures else pictures[0]
        # Images that `datasets` itself has downloaded are in its cache.
        folder = image_dir or (source if saved else datasets.config.HF_CACHE_HOME)
        super().__init__(source, match_columns(dataset.features, wanted, given, source), dataset.features, folder)
        self._saved = [file["filename"] for file in dataset.cache_files] if saved else []
        self._fingerprint = dataset._fingerprint  # taken before the cast, which changes no row
        for name in {*self.columns.values()} & {*pictures}:
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        self.dataset = dataset.select_columns(sorted({*self.columns.values()}))

    def without_images(self) -> "Self":
        rows = super().without_images()
        rows.dataset = self.dataset.select_columns(sorted({*rows.columns.values()}))
        return rows

    def __len__(self) -> int:
        return len(self.dataset)

    def _origins(self):
        return ((self._fingerprint, *_stamps(self._saved), index) for index in range(len(self)))

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for index in range(start, min(stop, len(self))):
            entry = self.dataset[index]
            yield self._row(index, {ours: entry[theirs] for ours, theirs in self.columns.items()})
