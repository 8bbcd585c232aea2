"""Compare stores for an image index: FAISS with Parquet, as `madtp_hf.search` keeps it, and LanceDB.

    pip install lancedb
    python benchmarks/index_stores.py --numbers 10000 100000 --output benchmarks/results/index_stores.json

Random normalised vectors of 256 numbers with a name each. Each store runs in a process of its own: `build` writes all
of them; `update` drops 1 % and adds 1 %; `query` asks for the nearest 10 of one vector, the median of 50, in a store
that has just been opened; `disk` is all that the folder holds; `memory` the peak of the process above what imports
take. LanceDB searches without an index of its own, which is exact, as FAISS's flat index is. For FAISS, `disk` counts
the job's embeddings as well.
"""

import importlib.metadata
import json
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from reporting import environment, make_parser, print_table, settings_of, write_json


SIZE, QUERIES, TOP_K = 256, 50, 10


def draw(number: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((number, SIZE), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def names_of(start: int, stop: int) -> list[str]:
    return [f"{index % 100}/{index:07}.jpg" for index in range(start, stop)]


class FaissAndParquet:
    """The job's state and the index's own writer and reader."""

    def __init__(self, folder: Path):
        import pyarrow

        from madtp_hf.jobs.state import State
        from madtp_hf.search.index import IndexOutput, load_index

        self.folder, self.load, self.index = folder, load_index, None
        self.output = IndexOutput(folder, "flat", {"root": ""})
        self.state = State(self.output.folder, folder, "embedding", pyarrow.list_(pyarrow.float32(), SIZE))
        self.names = []

    def build(self, names: list[str], vectors: np.ndarray) -> None:
        self.state.begin({}, "benchmark", {}, False)
        self._add(names, vectors)

    def _add(self, names: list[str], vectors: np.ndarray) -> None:
        self.state.add([hash(name) for name in names], [*vectors], [None] * len(names))
        self._write([*self.names, *names])

    def _write(self, names: list[str]) -> None:
        results, ids = self.state.results(), np.array([hash(name) for name in names])
        table = results.table.select(["embedding"]).take(results.find(ids)[0])
        self.output.write(self.state, [(names, table)], [])
        self.state.compact(results, ids)
        self.state.write_manifest()
        self.names = names

    def update(self, gone: list[str], names: list[str], vectors: np.ndarray) -> None:
        gone = {*gone}
        self.names = [name for name in self.names if name not in gone]
        self._add(names, vectors)

    def query(self, vector: np.ndarray) -> list[str]:
        self.index = self.index or self.load(self.folder)
        return [self.index.names[row] for row in self.index.vectors.search(vector[None], TOP_K)[1][0]]


class Lance:
    def __init__(self, folder: Path):
        import lancedb

        self.database, self.table = lancedb.connect(folder), None

    @staticmethod
    def _rows(names: list[str], vectors: np.ndarray):
        import pyarrow

        column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), SIZE)
        return pyarrow.table({"name": names, "vector": column})

    def build(self, names: list[str], vectors: np.ndarray) -> None:
        self.table = self.database.create_table("images", self._rows(names, vectors))

    def update(self, gone: list[str], names: list[str], vectors: np.ndarray) -> None:
        for start in range(0, len(gone), 1000):
            listed = ", ".join(f"'{name}'" for name in gone[start : start + 1000])
            self.table.delete(f"name in ({listed})")
        self.table.merge_insert("name").when_matched_update_all().when_not_matched_insert_all().execute(
            self._rows(names, vectors)
        )

    def query(self, vector: np.ndarray) -> list[str]:
        self.table = self.table or self.database.open_table("images")
        found = self.table.search(vector).distance_type("dot").select(["name", "_distance"]).limit(TOP_K).to_arrow()
        return found["name"].to_pylist()


STORES = {"FAISS and Parquet": FaissAndParquet, "LanceDB": Lance}


def _seconds(call, *arguments) -> float:
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(name: str, number: int, folder: Path, pipe) -> None:
    store, vectors, few = STORES[name](folder), draw(number, 0), max(1, number // 100)
    names, base = names_of(0, number), _peak()
    row = {"store": name, "vectors": number, "build s": _seconds(store.build, names, vectors)}
    row["update s"] = _seconds(store.update, names[:few], names_of(number, number + few), draw(few, 1))
    row["memory MiB"] = _peak() - base
    row["disk MiB"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
    opened = STORES[name](folder)
    row["first query ms"] = 1000 * _seconds(opened.query, vectors[-1])
    queries = vectors[np.random.default_rng(2).integers(few, number, QUERIES)]
    row["query ms"] = 1000 * statistics.median(_seconds(opened.query, vector) for vector in queries)
    row["finds itself"] = all(opened.query(vectors[at])[0] == names[at] for at in (few, number // 2, number - 1))
    pipe.send({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})


def installed_size(names: tuple[str, ...]) -> float:
    """Return the MiB that distributions take, without what they depend on; 0 for one that isn't installed."""
    total = 0
    for name in names:
        for file in importlib.metadata.files(name) or ():
            path = Path(file.locate())
            total += path.stat().st_size if path.is_file() else 0
    return round(total / 2**20, 1)


def main(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument("--numbers", type=int, nargs="+", default=[10_000, 100_000])
    args = parser.parse_args(arguments)
    rows = []
    processes = multiprocessing.get_context("spawn")
    for number in args.numbers:
        for name in STORES:
            with TemporaryDirectory() as folder:
                ours, theirs = processes.Pipe()
                process = processes.Process(target=measure, args=(name, number, Path(folder) / "index", theirs))
                process.start()
                theirs.close()
                rows.append(ours.recv())
                process.join()
            print(json.dumps(rows[-1]), file=sys.stderr)
    title = f"Stores of vectors of {SIZE} numbers"
    print_table(title, [*rows[0]], [[*row.values()] for row in rows])
    sizes = {"faiss-cpu MiB": installed_size(("faiss-cpu",)), "lancedb MiB": installed_size(("lancedb",))}
    packages = ("faiss-cpu", "lancedb", "pyarrow")
    content = {"title": title, "settings": settings_of(args), **environment(packages=packages), "installed": sizes}
    write_json(args.output, {**content, "rows": rows})


if __name__ == "__main__":
    main()
