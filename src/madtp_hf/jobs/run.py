"""Run a job: processes read and resize images, this one computes results and saves them every few seconds."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.sources import require
from ..modeling.images import UnreadableImage
from .on_ray import run_on_ray
from .outputs import FileOutput
from .reading import Batch, Reader, default_readers, read_rows
from .state import ROWS_AT_ONCE, State, printable
from .workers import Worker


BAR_DELAY = 3.0  # seconds before a progress bar appears
SAVE_INTERVAL = 20.0  # seconds of work that a kill may cost, and a batch
# At the end, processes wait for the slowest one without a practical limit.
_PATIENCE = timedelta(days=365)


@dataclass(frozen=True)
class Summary:
    """A job's result: rows with and without a result; how many this run did, in how many seconds, how many failed."""

    images: int
    errors: int
    done_now: int
    failed_now: int
    seconds: float


class Plan(NamedTuple):
    """What a run has to do: the indices of rows to compute, and all rows' identities and keys."""

    todo: np.ndarray
    ids: np.ndarray
    keys: list[str]


def run_job(
    reader: Reader,
    worker: Worker,
    output: FileOutput,
    *,
    batch_size: int | None = None,
    num_workers: int | None = None,
    force: bool = False,
    retry_errors: bool = False,
    save_interval: float = SAVE_INTERVAL,
    show_progress: bool | None = None,
    ray: int | None = None,
) -> Summary | None:
    """Compute a result for every row of a source, or for the rows that an earlier run left and those that are new.

    Processes started by `torchrun` or `accelerate launch` share the rows.

    Args:
        reader (`Reader`): reads the rows.
        worker (`Worker`): computes the results.
        output (`FileOutput`): where they are written.
        batch_size (`int`, *optional*): the largest batch; by default what memory allows.
        num_workers (`int`, *optional*): processes that read images; 0 reads in this process, by default a few.
        force (`bool`): whether to start over, and to replace what is there.
        retry_errors (`bool`): whether to try rows again that have failed before.
        save_interval (`float`): seconds between saves.
        show_progress (`bool`, *optional*): whether to show a progress bar; by default one appears after a few seconds.
        ray (`int`, *optional*): how many models to run on a Ray cluster, instead of
            this process's; 0 is one for each of its GPUs.

    Returns: `Summary` in the first process, None in others.

    Raises:
        ValueError: if the job was started with other settings, or there is output that isn't the job's.
        KeyboardInterrupt: as raised; its message says how many rows are kept.
    """
    began, (processes, tell) = time.perf_counter(), _processes()
    state = State(output.folder, output.out, worker.column, worker.value_type())
    try:
        plan = problem = None
        batch_size = batch_size or worker.batch_size()
        if processes.is_main_process:
            try:
                plan = _plan(reader, worker, output, state, batch_size, force, retry_errors)
            except (OSError, ValueError) as error:
                problem = error
        problem, told = tell([problem, plan and plan._replace(keys=[])])
        plan = plan or told
        if problem is not None:
            raise problem
        if not processes.is_main_process:
            state.join(processes.process_index)
        batches = [plan.todo[start : start + batch_size] for start in range(0, len(plan.todo), batch_size)]
        mine = batches[processes.process_index :: processes.num_processes]
        share = f", process 1 of {processes.num_processes}" * (processes.num_processes > 1)
        show_progress = show_progress if processes.is_main_process and mine else False
        bar = progress(sum(map(len, mine)), "row", show_progress, desc=output.out.name + share)
        done = (
            run_on_ray(reader, worker, mine, ray) if ray is not None else run_here(reader, worker, mine, num_workers)
        )
        with bar:
            _save(state, plan, done, save_interval, bar)
        processes.wait_for_everyone()
        if not processes.is_main_process:
            return None
        good = _finish(reader, output, state, plan)
        failed_now = int((~good[plan.todo]).sum())
        images = int(good.sum())
        return Summary(images, len(good) - images, len(plan.todo), failed_now, time.perf_counter() - began)
    finally:
        state.release()


def _plan(reader, worker, output, state: State, batch_size: int, force: bool, retry_errors: bool) -> Plan:
    """Begin or resume the job, and return what is to be done."""
    source, settings = reader.source, worker.settings()
    settings |= {"max_pixels": reader.max_pixels} if worker.reads_images else {}
    settings |= {"text": reader.text} if worker.text_column else {}
    if settings.get("generation", {}).get("do_sample"):
        settings["batch_size"] = batch_size  # tokens are sampled for a whole batch
    if not force:
        output.check(state.read_manifest())
    name = os.path.abspath(source.name) if os.path.exists(source.name) else source.name
    notes = {
        "model": worker.model.config.name_or_path,
        "reduction": worker.reduction,
        "pruning": worker.pruning_note(),
    }
    state.begin(settings, name, notes, force)
    ids, keys = source.identities(), [row.key for row in read_rows(source.without_images(), 0, len(source))]
    results = state.results()
    places, good = results.find(ids)
    if len(results) and name != state.manifest["source"] and not (places >= 0).any():
        raise ValueError(
            f"{output.out} is of {state.manifest['source']}, and none of its rows is in {name}: choose another output,"
            " or replace it with `force=True`."
        )
    state.manifest["source"] = name
    state.write_manifest()
    todo = ~good if retry_errors else places < 0
    todo[list(output.refused(keys, state.manifest["replaces"]))] = False
    todo = np.flatnonzero(todo)
    _, first = np.unique(ids[todo], return_index=True)  # equal rows have equal results
    return Plan(todo[np.sort(first)], ids, keys)


def run_here(reader: Reader, worker: Worker, batches: list, num_workers: int | None) -> Iterator[tuple[Batch, list]]:
    """Yield each batch with the results of its usable rows."""
    num_workers = default_readers() if num_workers is None else num_workers
    workers = min(num_workers, len(batches))
    loader = DataLoader(reader, batch_size=None, sampler=batches, num_workers=workers, collate_fn=_as_it_is)
    try:
        for batch in loader:
            yield batch, worker(batch)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(
            f"A process that reads images was killed ({str(error).splitlines()[0]}); finished rows are kept. Run the"
            " same command again, with fewer `workers` if memory was short."
        ) from error


def _as_it_is(batch):
    return batch


def progress(total: int, unit: str, show: bool | None, **options) -> tqdm:
    """Return a progress bar; with `show=None` it appears after a few seconds, if it takes that long."""
    delay = 0.0 if show else BAR_DELAY
    return tqdm(
        total=total,
        unit=f" {unit}s",
        disable=show is False,
        delay=delay,
        leave=bool(show),
        dynamic_ncols=True,
        **options,
    )


def _save(state: State, plan: Plan, done: Iterator[tuple[Batch, list]], interval: float, bar) -> None:
    """Save results by time, and at the end, whatever ends it."""
    rows: list[tuple[int, object, str | None]] = []
    saved, num_errors = time.monotonic(), 0

    def save():
        nonlocal saved
        saving, rows[:] = [*rows], []
        if saving:
            indices, values, errors = map(list, zip(*saving))
            state.add(plan.ids[indices].tolist(), values, errors)
        saved = time.monotonic()

    try:
        for batch, values in done:
            failed = {
                row: value.reason for row, value in zip(batch.rows, values) if isinstance(value, UnreadableImage)
            }
            rows += [(row, value, None) for row, value in zip(batch.rows, values) if row not in failed]
            failed |= batch.errors
            rows += [(row, None, reason) for row, reason in failed.items()]
            num_errors += len(failed)
            if num_errors:
                bar.set_postfix_str(f"{num_errors} errors", refresh=False)
            bar.update(len(batch.rows) + len(batch.errors))
            if time.monotonic() - saved >= interval:
                save()
    except KeyboardInterrupt:
        save()
        places, _ = state.results().find(plan.ids)
        raise KeyboardInterrupt(f"{int((places >= 0).sum())} of {len(places)} rows are kept") from None
    finally:
        save()


def _finish(reader: Reader, output: FileOutput, state: State, plan: Plan) -> np.ndarray:
    """Write the output from the results; called by one process only, once every row has one.

    Returns, for each row, whether its result is in the output.
    """
    results, pyarrow = state.results(), require("pyarrow")
    places, good = results.find(plan.ids)
    refused = output.refused(plan.keys, state.manifest["replaces"])
    good[list(refused)] = False
    missing = [row for row in np.flatnonzero(places < 0) if row not in refused]
    if missing:
        raise OSError(f"{len(missing)} rows have no result: run the same command again.")
    column, texts = state.schema.names[1], reader.source.without_images()
    failed: list[dict] = []
    folder = reader.source.folder if reader.source.in_memory else None
    made_by = {name: state.manifest[name] for name in ("model", "pruning", "settings")} | {"folder": folder}
    made_by = {"madtp_hf": json.dumps(made_by)}

    def described(start, stop) -> Iterator[tuple[int, dict]]:
        for row in read_rows(texts, start, stop):
            content = {"row": row.index, "key": printable(plan.keys[row.index])}
            if reader.text_column is not None:
                text = reader.text if reader.text is not None else row.values.get(reader.text_column)
                text = text[0] if isinstance(text, list) and len(text) == 1 else text
                name = "question" if reader.text_column == "question" else "text"
                content[name] = text if isinstance(text, (str, type(None))) else repr(text)
            yield row.index, content

    def tables():
        for start in range(0, len(places), ROWS_AT_ONCE):
            rows = dict(described(start, min(start + ROWS_AT_ONCE, len(places))))
            usable = [row for row in rows if good[row]]
            bad = [row for row in rows if not good[row] and row not in refused]
            reasons = refused | dict(zip(bad, results.table["error"].take(places[bad]).to_pylist()))
            failed.extend({**rows[row], "error": printable(reasons[row])} for row in rows if not good[row])
            names = ["row", "key", *(name for name in next(iter(rows.values())) if name not in ("row", "key"))]
            kinds = [pyarrow.int64(), *[pyarrow.string()] * (len(names) - 1)]
            columns = [pyarrow.array([rows[row][name] for row in usable], kind) for name, kind in zip(names, kinds)]
            columns.append(results.table[column].take(places[usable]))
            yield [plan.keys[row] for row in usable], pyarrow.table(columns, [*names, column], metadata=made_by)

    output.write(state, tables(), failed)
    state.compact(results, plan.ids)
    state.write_manifest()
    return good


# Processes


def _processes():
    """Return accelerate's process state, or a stand-in for a single process, and a function that tells all processes
    the first one's values.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        one = {"process_index": 0, "num_processes": 1, "is_main_process": True, "wait_for_everyone": lambda: None}
        return SimpleNamespace(**one), lambda values: values
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    return PartialState(cpu=True, timeout=_PATIENCE), broadcast_object_list
