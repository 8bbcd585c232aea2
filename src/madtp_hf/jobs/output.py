"""Write a job's output part by part, so that an interrupted job can resume, and merge the parts at the end.

Beside `captions.parquet`, the folder `captions.parquet.job` holds `manifest.json`, the job's settings, and one file
for each finished part, `part-00000.jsonl`. The rows of a part are fixed, and a part's file is written atomically:
missing parts are the remaining work, whichever process does it. At the end the parts are merged into the output, and
their rows that could not be read into `captions.errors.jsonl`. Only the manifest stays in the folder; it identifies a
finished job.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROWS_PER_PART = 256
_ROWS_PER_GROUP = 2**14  # row group size of a parquet file


@dataclass(frozen=True)
class Counts:
    """Counts of rows: `images` with a text, `errors` without."""

    images: int
    errors: int


class Output:
    """The destination of a job's rows.

    Args:
        out (`str` or `Path`): `*.jsonl` or `*.parquet`; with `suffix`, the folder of the side files.
        settings (`dict`): the settings that the rows depend on, by user-facing names, with JSON values.
        num_rows (`int`): the number of rows of the source.
        column (`str`): the name of the text column, `"caption"` or `"answer"`.
        suffix (`str`, *optional*): write the text of the image `a/b.jpg` to `a/b` plus this suffix, below `out`.
    """

    def __init__(self, out, settings: dict, num_rows: int, column: str, suffix=None, rows_per_part=ROWS_PER_PART):
        self.out, self.suffix, self.column = Path(os.path.normpath(Path(out).expanduser())), suffix, column
        self.settings = {**settings, "rows": num_rows, "rows_per_part": rows_per_part, "suffix": suffix}
        self.num_rows, self.rows_per_part = num_rows, rows_per_part
        self.folder = self.out.with_name(self.out.name + ".job")
        stem = self.out.name if suffix else self.out.stem
        self.errors_file = self.out.with_name(f"{stem}.errors.jsonl")
        self._lock_file = None
        self._check_name()

    def _check_name(self) -> None:
        if self.suffix is None and self.out.suffix not in (".jsonl", ".parquet"):
            raise ValueError(
                f"{self.out}: expected a name that ends in .jsonl or .parquet, or suffix='.txt' for a file per image."
            )
        if self.suffix is None and self.out.is_dir():
            raise ValueError(f"{self.out} is a folder: expected the name of a file.")
        if self.suffix is not None and (not self.suffix.startswith(".") or "/" in self.suffix or self.suffix == "."):
            raise ValueError(f"suffix={self.suffix!r}: expected a suffix with its dot, such as .txt or .caption.")
        if self.suffix is not None and self.out.is_file():
            raise ValueError(f"{self.out} is a file: expected the folder of the {self.suffix} files.")

    @property
    def num_parts(self) -> int:
        return -(-self.num_rows // self.rows_per_part)

    def part_rows(self, part: int) -> tuple[int, int]:
        """Return the index of a part's first row and the index after its last row."""
        return part * self.rows_per_part, min((part + 1) * self.rows_per_part, self.num_rows)

    def begin(self, force: bool = False) -> Counts | None:
        """Start or resume the job; called by one process only.

        Returns: the counts of the job if it has finished, else None.

        Raises: `ValueError` if the job was started with other settings, or the output exists and isn't this job's.
        """
        try:
            finished = self._begin(force)
        except ValueError:
            self._unlock()
            raise
        if finished is not None:
            self._unlock()
        return finished

    def _begin(self, force: bool) -> Counts | None:
        manifest = self._read_manifest()
        if manifest is not None or force:
            self._lock()
        if force:
            self._remove_parts()
            manifest = None
        elif manifest is not None:
            self._check_settings(manifest["settings"])
            if manifest["finished"] and self.out.exists():
                self._remove_parts()
                return Counts(**manifest["finished"])
        elif self.suffix is None and self.out.exists():
            raise ValueError(
                f"{self.out} exists, but is not the output of an unfinished job: choose another, or pass `force=True`."
            )
        self._lock()
        self._write_manifest(None)
        return None

    def _lock(self) -> None:
        """Keep other jobs from writing here while this or a joined process lives; child processes don't inherit it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Locking the whole file fails if another process holds any byte; then release all but the first byte, so that
        # others can join.
        self._take_lock(0, 0)
        if fcntl is not None:
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

    def _unlock(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    def _read_manifest(self) -> dict | None:
        file = self.folder / "manifest.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def _write_manifest(self, finished: dict | None) -> None:
        content = {"settings": self.settings, "finished": finished}
        write_atomically(self.folder / "manifest.json", json.dumps(content, indent=2) + "\n")

    def _check_settings(self, begun: dict) -> None:
        now = json.loads(json.dumps(self.settings))
        names = [name for name in {**begun, **now} if begun.get(name) != now.get(name)]
        if names:
            changes = "; ".join(f"{name} was {begun.get(name)!r}, now {now.get(name)!r}" for name in names)
            raise ValueError(
                f"{self.out} was started with other settings ({changes}): repeat the same, choose another"
                " output, or start over with `force=True`."
            )

    def _part_file(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.jsonl"

    def missing_parts(self) -> list[int]:
        done = {name for name in os.listdir(self.folder) if name.endswith(".jsonl")}
        return [part for part in range(self.num_parts) if self._part_file(part).name not in done]

    def write_part(self, part: int, rows: list[dict]) -> None:
        """Write all rows of a part, each with "row", "key" and the text or "error"; writes side files first."""
        if self.suffix is not None:
            for row in rows:
                if "error" not in row:
                    write_atomically(self.side_file(row["key"]), row[self.column] + "\n", durable=False)
        # ASCII JSON can also represent file names that are not valid text.
        lines = (json.dumps(row) + "\n" for row in rows)
        write_atomically(self._part_file(part), "".join(lines))

    def side_file(self, key: str) -> Path:
        """Return the path of the side file of the image with this key."""
        if os.path.isabs(key):
            key = os.path.relpath(key, os.path.abspath(self.out))
        name = PurePosixPath(Path(key).as_posix())
        if ".." in name.parts or not name.name:
            raise ValueError(f"its text file would lie outside of {self.out}")
        return self.out / name.parent / (name.stem + self.suffix)

    def shared_side_files(self, keys: list[str]) -> dict[int, str]:
        """Return, with the reason, the rows whose side file is an earlier row's or would lie outside `out`."""
        owners, refused = {}, {}
        for row, key in enumerate(keys):
            try:
                name = str(self.side_file(key))
            except ValueError as error:
                refused[row] = str(error)
                continue
            first = owners.setdefault(name, row)
            if first != row:
                refused[row] = f"its text file is that of {keys[first]}"
        return refused

    def finish(self) -> Counts:
        """Merge all parts into the output; called by one process only, once no part is missing."""
        scratch = self.folder / "output.writing"
        with open(self.folder / "errors.writing", "w", encoding="utf-8") as errors:
            good = _Counted(self._good_rows(errors))
            if self.suffix is not None:
                for _ in good:
                    pass
                self.out.mkdir(parents=True, exist_ok=True)
            elif self.out.suffix == ".parquet":
                _write_parquet(scratch, good, self.column)
            else:
                with open(scratch, "w", encoding="utf-8") as file:
                    for row in good:
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if self.suffix is None:
            _sync(scratch)
            os.replace(scratch, self.out)
        counts = Counts(good.number, self.num_rows - good.number)
        if counts.errors:
            os.replace(errors.name, self.errors_file)
        else:
            os.unlink(errors.name)
            self.errors_file.unlink(missing_ok=True)
        self._write_manifest({"images": counts.images, "errors": counts.errors})
        self._remove_parts()
        self._unlock()
        return counts

    def _good_rows(self, errors) -> Iterator[dict]:
        """Yield all rows that have a text, in order; write the others to the file `errors`."""
        for part in range(self.num_parts):
            with open(self._part_file(part), encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
            if [row["row"] for row in rows] != list(range(*self.part_rows(part))):
                raise ValueError(f"{self._part_file(part)} is damaged: delete it, and run the same command again.")
            for row in rows:
                row["key"] = row["key"].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                if "error" not in row:
                    yield row
                else:
                    errors.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _remove_parts(self) -> None:
        for file in self.folder.glob("part-*.jsonl"):
            file.unlink()


class _Counted:
    """An iterator that counts the items it has yielded."""

    def __init__(self, items: Iterator):
        self.items, self.number = items, 0

    def __iter__(self):
        for item in self.items:
            self.number += 1
            yield item


def _write_parquet(file: Path, rows, column: str) -> None:
    from ..data.sources import require

    pyarrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    names = ["key", "question", column] if column == "answer" else ["key", column]
    schema = pyarrow.schema([("row", pyarrow.int64()), *((name, pyarrow.string()) for name in names)])
    with parquet.ParquetWriter(file, schema) as writer:
        group = []
        for row in rows:
            group.append(row)
            if len(group) == _ROWS_PER_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(group, schema))
                group = []
        if group:
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


def write_atomically(path: Path, text: str, durable: bool = True) -> None:
    """Write a file atomically; `durable` makes it survive a power failure, which takes longer.

    The temporary file's name is always the same, so a new attempt overwrites what a killed process left; only one
    process writes each file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.writing")
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(text)
        if durable:
            _sync(scratch)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
