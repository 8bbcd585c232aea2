"""Time runs that take turns in one process, so that a slowdown of the machine affects all of them."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from madtp_hf.budgets.evaluation import synchronize


CPU = torch.device("cpu")


class Run(NamedTuple):
    """A run that a round times: `labels` name its row, `setup` puts the model into the run's state, untimed."""

    labels: dict
    call: Callable
    setup: Callable[[], None] = lambda: None
    model: torch.nn.Module | None = None


def timed(call: Callable, device: torch.device = CPU) -> tuple[float, object]:
    """Return the seconds of a call, on CUDA by events on the device, and its result."""
    synchronize(device)
    if device.type != "cuda":
        started = time.perf_counter()
        result = call()
        synchronize(device)
        return time.perf_counter() - started, result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000, result


def time_runs(
    runs: list[Run],
    rounds: int,
    device: torch.device = CPU,
    description: str = "",
    deadline: float = float("inf"),
    on_error: Callable | None = None,
) -> list[list[float]]:
    """Return the seconds of each run in each round; each round starts with another run.

    Args:
        runs (`list[Run]`): What takes turns.
        rounds (`int`): How many rounds; fewer if the deadline passes, but at least two.
        device (`torch.device`): Where the calls run.
        description (`str`): Of the progress bar.
        deadline (`float`): Of `time.time()`; no round begins after it.
        on_error (`Callable`, *optional*): `on_error(index, error)` for a run that raises, which then is left out.
    """
    seconds, failed = [[] for _ in runs], set()
    for turn in tqdm(range(rounds), desc=description, leave=False):
        if turn >= 2 and time.time() > deadline:
            break
        first = turn * len(runs) // rounds
        for index in [*range(first, len(runs)), *range(first)]:
            if index in failed:
                continue
            try:
                runs[index].setup()
                seconds[index].append(timed(runs[index].call, device)[0])
            except Exception as error:
                if on_error is None:
                    raise
                failed.add(index)
                on_error(index, error)
    return seconds


def compare(mine: list[float], theirs: list[float]) -> dict:
    """Return the row of a run's times: the median, and the ratio of another run's time to its own, round by round."""
    ratios = [other / own for own, other in zip(mine, theirs)]
    return {
        "rounds": len(mine),
        "milliseconds": 1000 * statistics.median(mine),
        "time_ratio": statistics.median(ratios) if ratios else None,
        "time_quartiles": np.percentile(ratios, [25, 75]).tolist() if ratios else None,
    }


def peak_memory(device: torch.device, function: Callable) -> tuple[int, object]:
    """Return the peak of allocated bytes while `function` runs, above those allocated before, and its result."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return max(int(allocated.max(initial=0)), 0), result
