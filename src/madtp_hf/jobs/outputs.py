"""The destinations of a job: a JSONL, CSV or Parquet file with a row for each result, or a text file per image."""

import csv
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

import numpy as np

from ..data.sources import require
from .state import sync, write_atomically


SUFFIXES = (".parquet", ".jsonl", ".csv")


class FileOutput:
    """A table of results, `*.parquet`, `*.jsonl` or `*.csv`; rows without one go to `*.errors.jsonl` beside it."""

    def __init__(self, out):
        self.out = Path(os.path.normpath(Path(out).expanduser()))
        self.folder = self.out.with_name(self.out.name + ".job")
        self.errors_file = self.out.with_name(f"{self.out.stem}.errors.jsonl")
        self.check_name()

    def check_name(self) -> None:
        if self.out.suffix not in SUFFIXES:
            raise ValueError(
                f"{self.out}: expected a name that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, or"
                " suffix='.txt' for a file per image."
            )
        if self.out.is_dir():
            raise ValueError(f"{self.out} is a folder: expected the name of a file.")

    def check(self, manifest: dict | None) -> None:
        """Raise a `ValueError` if there is something that the job has not written.

        manifest: of the job so far, whose `outputs` are the size and time of what it has written, or is about to.
        """
        if not self.out.exists() or (manifest and _stamp(self.out) in manifest["outputs"]):
            return
        if manifest is None or not manifest["outputs"]:
            raise ValueError(
                f"{self.out} exists, but is not the output of an unfinished job: choose another, or pass `force=True`."
            )
        raise ValueError(
            f"{self.out} has changed since the job wrote it. Move it elsewhere to have it written again from the job's"
            " results, or start over with `force=True`."
        )

    def refused(self, keys: list[str], replaces: bool) -> dict[int, str]:
        """Return, with the reason, the rows that can't have a result here."""
        return {}

    def write(self, state, tables, errors: Iterable[dict]) -> None:
        """Write tables of rows, and rows that have no result; see `run._finish`."""
        scratch = self.folder / f".{self.out.name}.writing"
        write = {".parquet": _write_parquet, ".jsonl": _write_jsonl, ".csv": _write_csv}[self.out.suffix]
        write(scratch, tables)
        sync(scratch)
        new, known = _stamp(scratch), state.manifest["outputs"]
        # Noted before the file is in place, so that after a kill at this point it is known as the job's.
        state.manifest["outputs"] = [*known, new]
        state.write_manifest()
        os.replace(scratch, self.out)
        self.write_errors(errors)
        state.manifest["outputs"] = [new]

    def write_errors(self, errors: Iterable[dict]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in errors)
        if text:
            write_atomically(self.errors_file, text.encode())
        else:
            self.errors_file.unlink(missing_ok=True)


class SideFiles(FileOutput):
    """A text file for each image: that of `a/b.jpg` is `a/b` plus the suffix, below the folder `out`.

    Files that the job has not written are kept, and their images refused. `written` in the job's folder holds a number
    for each name and content that the job has written.
    """

    def __init__(self, out, suffix: str):
        self.suffix = suffix
        super().__init__(out)
        self.errors_file = self.out.with_name(f"{self.out.name}.errors.jsonl")
        self._noted = self.folder / "written"

    def check_name(self) -> None:
        if not self.suffix.startswith(".") or "/" in self.suffix or self.suffix == ".":
            raise ValueError(f"suffix={self.suffix!r}: expected a suffix with its dot, such as .txt or .caption.")
        if self.out.is_file():
            raise ValueError(f"{self.out} is a file: expected the folder of the {self.suffix} files.")

    def check(self, manifest: dict | None) -> None:
        pass

    def _path(self, key: str) -> Path:
        if os.path.isabs(key):
            key = os.path.relpath(key, os.path.abspath(self.out))
        name = PurePosixPath(Path(key).as_posix())
        if ".." in name.parts or not name.name or "\0" in key:
            raise ValueError(f"its text file would lie outside of {self.out}")
        return self.out / name.parent / (name.stem + self.suffix)

    def refused(self, keys: list[str], replaces: bool) -> dict[int, str]:
        owners: dict[str, int] = {}
        refused, mine = {}, self._mine()
        for row, key in enumerate(keys):
            try:
                path = self._path(key)
            except ValueError as error:
                refused[row] = str(error)
                continue
            first = owners.setdefault(str(path), row)
            if first != row:
                refused[row] = f"its text file is that of {keys[first]}"
            elif os.path.lexists(path) and not replaces and self._mark(path, _content(path)) not in mine:
                refused[row] = f"{path.name} exists, and this job has not written it"
        return refused

    def _mine(self) -> set[int]:
        content = self._noted.read_bytes() if self._noted.is_file() else b""
        return set(np.frombuffer(content[: len(content) // 8 * 8], np.int64).tolist())

    def _mark(self, path: Path, content: bytes | None) -> int:
        name = os.fsencode(path.relative_to(self.out))
        digest = hashlib.blake2b(name + b"\0" + (content or b""), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)

    def write(self, state, tables, errors: Iterable[dict]) -> None:
        column, mine = state.schema.names[1], self._mine()
        self.out.mkdir(parents=True, exist_ok=True)
        for keys, table in tables:
            found = zip(keys, table[column].to_pylist())
            texts = {self._path(key): f"{text}\n".encode() for key, text in found}
            new = [mark for mark in (self._mark(*item) for item in texts.items()) if mark not in mine]
            with open(
                self._noted, "ab"
            ) as noted:  # before the texts, so that after a kill they are known as the job's
                noted.write(np.array(new, np.int64).tobytes())
            for path, text in texts.items():
                if _content(path) != text:
                    write_atomically(path, text, durable=False)
        self.write_errors(errors)
        state.manifest["replaces"] = False


def make_output(out, suffix: str | None = None) -> FileOutput:
    """Return the destination that a name stands for."""
    return FileOutput(out) if suffix is None else SideFiles(out, suffix)


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _write_parquet(file: Path, tables) -> None:
    with ExitStack() as stack:
        writer = None
        for _, table in tables:
            writer = writer or stack.enter_context(require("pyarrow.parquet").ParquetWriter(file, table.schema))
            writer.write_table(table)


def _write_jsonl(file: Path, tables) -> None:
    with open(file, "w", encoding="utf-8") as lines:
        for _, table in tables:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())


def _write_csv(file: Path, tables) -> None:
    with open(file, "w", encoding="utf-8", newline="") as lines:
        writer = None
        for _, table in tables:
            if writer is None:
                writer = csv.DictWriter(lines, table.column_names)
                writer.writeheader()
            writer.writerows(table.to_pylist())
