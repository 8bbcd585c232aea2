"""A job's state on disk: its settings and its results so far, from which a stopped job resumes.

The folder beside the output, such as `captions.parquet.job`, holds `manifest.json` and parts,
`part-<time>-<digest>.arrow`: results, each by its row's identity (`Rows.identities`). A part is written in one step,
whenever some seconds have passed, by whichever process has computed its results. Rows without a result are the
remaining work. At the end one part holds all results that are in the output.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ..data.columns import clean
from ..data.sources import require


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ROWS_AT_ONCE = 2**14  # of tables in memory


class Results:
    """The results in a job's parts, read in place. Of several of one row, the latest that is not an error counts."""

    def __init__(self, table):
        self.table = table
        ids, is_good = table["id"].to_numpy(), table["error"].is_null().to_numpy()
        order = np.argsort(is_good, kind="stable")[::-1]
        self._ids, first = np.unique(ids[order], return_index=True)
        self._places = order[first]
        self._is_good = is_good

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each identity, the place of its result in `table`, -1 without one, and whether it is good."""
        if not len(self):
            return np.full(len(ids), -1), np.zeros(len(ids), bool)
        at = np.minimum(np.searchsorted(self._ids, ids), len(self) - 1)
        places = np.where(self._ids[at] == ids, self._places[at], -1)
        return places, (places >= 0) & self._is_good[places]


class State:
    """The state of a job.

    Args:
        folder (`Path`): where it is kept.
        out (`Path`): the job's output, for messages.
        column (`str`), kind (`pyarrow.DataType`): the name and the type of the results.
    """

    def __init__(self, folder: Path, out: Path, column: str, kind):
        pyarrow = require("pyarrow")
        self.folder, self.out = folder, out
        self.manifest: dict = {}
        fields = [("id", pyarrow.int64()), (column, kind), ("error", pyarrow.string())]
        self.schema = pyarrow.schema(fields)
        self._lock_file: IO | None = None

    def begin(self, settings: dict, source: str, notes: dict, force: bool) -> None:
        """Start or resume the job; called by one process only. The new manifest is not yet written.

        settings: what the results depend on, with JSON values. source: the name of the rows' source. notes: what the
        manifest says besides.

        Raises: `ValueError` if the job was started with other settings, is damaged, or is written by another process.
        """
        settings = json.loads(json.dumps(settings, default=str))
        self._lock()
        for scratch in self.folder.glob(".*.writing"):  # left by a killed process
            scratch.unlink()
        known = None if force else self.read_manifest()
        if known is None:
            # Without a manifest, parts may be of other settings; they go before a new one is there.
            for file in self._parts():
                file.unlink()
            known = {"source": source, "outputs": [], "replaces": force}
        else:
            self._check_settings(known, settings, notes)
            self._check_parts()
        self.manifest = {**known, "settings": settings, **notes}

    def read_manifest(self) -> dict | None:
        file = self.folder / "manifest.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            stamps = content["outputs"]
            if not (isinstance(content["settings"], dict) and isinstance(content["source"], str)):
                raise ValueError("it has no settings or no source")
            if not all(isinstance(stamp, list) and [*map(type, stamp)] == [int, int] for stamp in stamps):
                raise ValueError(f"its outputs are {stamps!r}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}): start over with `force=True`.") from error
        return content

    def write_manifest(self) -> None:
        write_atomically(self.folder / "manifest.json", (json.dumps(self.manifest, indent=2) + "\n").encode())

    def _check_settings(self, known: dict, now: dict, notes: dict) -> None:
        begun, now = dict(_leaves(known["settings"])), dict(_leaves(now))
        names = [name for name in {**begun, **now} if begun.get(name) != now.get(name)]
        if names:
            if "weights" in names:
                names = ["model", *names]
                begun["model"], now["model"] = known.get("model"), notes.get("model")
            changes = "; ".join(f"{name} was {begun.get(name)!r}, now {now.get(name)!r}" for name in names)
            raise ValueError(
                f"{self.out} was started with other settings: {changes}. Repeat the earlier settings, choose another"
                " output, or start over with `force=True`."
            )

    # One writer

    def _lock(self) -> None:
        """Keep other jobs from writing here while this or a joined process lives; child processes don't inherit it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Locking the whole file fails if another process holds any byte; then release all but the first byte, so that
        # others can join.
        self._take_lock(0, 0)
        if self._lock_file is not None:
            fcntl.lockf(self._lock_file, fcntl.LOCK_UN, 0, 1)

    def join(self, process_index: int) -> None:
        """Join a job that the first process has begun."""
        self._take_lock(1, process_index)

    def _take_lock(self, length: int, first: int) -> None:
        if fcntl is None:
            return
        if self._lock_file is None:
            self._lock_file = open(self.folder / "lock", "a")  # stays open while the process lives
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, first)
        except OSError:
            raise ValueError(f"Another process is writing {self.out}: wait for it, or end it first.") from None

    def release(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    # Results

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.arrow"))

    def _check_parts(self) -> None:
        for file in self._parts():
            try:
                if file.stem.rpartition("-")[2] != _digest(file):
                    raise ValueError("its content has changed")
                self._read(file)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{file} is damaged ({error}): delete it to compute its rows again, or start over with"
                    " `force=True`."
                ) from error

    def _read(self, file: Path):
        pyarrow = require("pyarrow")
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all()
        if table.schema != self.schema:
            raise ValueError(f"its columns are {', '.join(table.column_names)}: expected {self.schema.names}")
        return table

    def results(self) -> Results:
        """Return all results so far, of all processes."""
        tables = [self._read(file) for file in self._parts()]
        return Results(require("pyarrow").concat_tables(tables) if tables else self.schema.empty_table())

    def add(self, ids: list[int], values: list, errors: list[str | None]) -> None:
        """Write results as a part; a row with an error has no value."""
        pyarrow = require("pyarrow")
        errors = [error and printable(error) for error in errors]
        columns = [pyarrow.array(of, field.type) for of, field in zip((ids, values, errors), self.schema)]
        self._write([pyarrow.table(columns, schema=self.schema)])

    def _write(self, tables) -> Path:
        name = f"part-{time.time_ns():020}"
        scratch = self.folder / f".{name}-{os.getpid()}.writing"
        with require("pyarrow").ipc.new_file(str(scratch), self.schema) as writer:
            for table in tables:
                writer.write_table(table)
        sync(scratch)
        file = self.folder / f"{name}-{_digest(scratch)}.arrow"
        os.replace(scratch, file)
        return file

    def compact(self, results: Results, ids: np.ndarray) -> None:
        """Keep only the results of these rows, in one part."""
        parts = self._parts()
        places, _ = results.find(np.unique(ids))
        places = np.sort(places[places >= 0])
        if len(parts) == 1 and len(places) == len(results.table):
            return
        chunks = (places[start : start + ROWS_AT_ONCE] for start in range(0, len(places), ROWS_AT_ONCE))
        kept = self._write(results.table.take(chunk) for chunk in chunks)
        for file in parts:
            if file != kept:
                file.unlink()


def _leaves(settings: dict) -> Iterator[tuple[str, object]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield name, value


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]


def printable(text: str) -> str:
    """Escape what UTF-8 can't encode, such as bytes of file names that aren't UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON can write it
        return clean(text)


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a file in one step; `durable` makes it survive a power failure, which takes longer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.writing")
    try:
        scratch.write_bytes(content)
        if durable:
            sync(scratch)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
