"""Measure latency, throughput and memory of a pruned model at each budget, next to transformers' dense model."""

import contextlib
import ctypes
import gc
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from PIL import Image
from tqdm.auto import tqdm

from ..data.rows import load_rows
from ..modeling.versions import VERSION as __version__
from ..tasks import TASKS, Task, make_batches
from .alignment import init_alignment_from
from .calibration import calibrate
from .evaluation import prepared, public_name, synchronize
from .passes import complete, encode, measure, restored


ROUNDS, BATCH_SIZES = 3, (1, 8)
CALIBRATION_SAMPLES, DEFAULT_REDUCTIONS = 8, (0.5, 0.8)


class TimedRun(NamedTuple):
    """A run to time: its name in the table, its model, and the reduction to set (None for transformers' model)."""

    name: str
    model: torch.nn.Module
    reduction: float | None


def stock_model(model):
    """Return transformers' model for the task with the same weights; None for NLVR2, which transformers lacks."""
    if TASKS[model.task].num_images > 1:
        return None
    dense_class = model._dense_classes[0]
    fields = {name: value for name, value in model.config.to_dict().items() if not name.startswith("pruning_")}
    dense = dense_class(dense_class.config_class(**{**fields, "model_type": dense_class.config_class.model_type}))
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("alignment.")}
    dense.load_state_dict(weights)
    if dense.can_generate():
        dense.generation_config = model.generation_config
    return dense.to(model.device, model.dtype).eval()


def synthetic_images(number: int, size: int, seed: int = 0) -> list:
    """Generate `number` PIL images of coarse and fine noise, size x size pixels, for timing without real images."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(number, 3, size, size)
    for side in (2, 8, 32, size):
        noise = torch.rand(number, 3, side, side, generator=generator)
        images += torch.nn.functional.interpolate(noise, size=(size, size), mode="bilinear") / 4
    return [Image.fromarray(pixels) for pixels in (255 * images).byte().permute(0, 2, 3, 1).numpy()]


def peak_memory(device: torch.device, function: Callable) -> tuple[float | None, object]:
    """Return the peak memory in MB that `function` takes beyond what was in use before, and its result.

    On CUDA: allocated tensors. On a CPU: the process's resident memory, whose peak only Linux lets a process reset;
    None elsewhere.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        allocated = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - allocated) / 1e6, result
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed but resident memory would hide what the function takes
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _resident("VmRSS")
    except OSError:
        return None, function()
    result = function()
    return max(_resident("VmHWM") - before, 0.0), result


def _resident(name: str) -> float:
    return int(re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1e3


@torch.no_grad()
def _call(run: TimedRun, inputs: dict, task: Task):
    """Run the model as a user does: generate an answer or a caption, or compute the scores of other tasks."""
    if task.generate is None:
        return run.model(**inputs)
    # So many tokens in every run, even past the end token.
    return task.generate(run.model, inputs, max_new_tokens=task.timed_tokens, min_new_tokens=task.timed_tokens)


def benchmark(model, processor, rows: list[dict], reductions=None, batch_sizes=BATCH_SIZES, rounds: int = ROUNDS):
    """Time a model's budgets and transformers' dense model on rows of data, alternating within each round.

    Args:
        model: One of this package's models, calibrated.
        processor: Its processor.
        rows (`list[dict]`): As `madtp_hf.data.rows.load_rows` returns them; repeated if a batch is larger.
        reductions (`list[float]`, *optional*): By default those of the schedule.
        batch_sizes (`list[int]`): The batch sizes to time.
        rounds (`int`): How often each run is timed, after a warm-up pass and a pass that measures memory.

    Returns:
        `list[dict]`: one row per batch size and run. `run` is `"transformers"`, `"pruning off"` or the reduction;
        `reached` the FLOPs reduction of that batch; `milliseconds` the median over rounds; `samples/s`; `times faster`
        the median of the speed-up over the first run in the same round; `memory MB` the peak, beyond weights.
    """
    task = TASKS[model.task]
    if reductions is None:
        reductions = model.config.calibrated_reductions
    for reduction in reductions:
        model.setting_for(reduction)
    dense = stock_model(model)
    runs = [TimedRun("transformers", dense, None)] if dense is not None else []
    runs += [TimedRun("pruning off", model, 0.0), *(TimedRun(f"{r:g}", model, r) for r in reductions)]
    results = []
    with restored(model), prepared(model):
        for batch_size in batch_sizes:
            some = [rows[index % len(rows)] for index in range(batch_size)]
            batch = complete(model, make_batches(model, processor, some, batch_size)[0])
            names = ["pixel_values"] if task.text_column is None else ["pixel_values", "input_ids", "attention_mask"]
            inputs = {name: batch[name] for name in names}
            results += _time(runs, inputs, batch, batch_size, rounds, task)
    return results


@torch.no_grad()
def _time(runs: list[TimedRun], inputs: dict, batch: dict, batch_size: int, rounds: int, task: Task) -> list[dict]:
    def set_up(run):
        if run.reduction is not None:
            run.model.set_pruning(reduction=run.reduction)

    device, results = inputs["pixel_values"].device, []
    seconds: list[list[float]] = [[] for _ in runs]
    with tqdm(total=len(runs) * (rounds + 1), desc=f"batches of {batch_size}", unit=" runs", leave=False) as progress:
        for run in runs:
            set_up(run)
            _call(run, inputs, task)  # warm up: what is made once, such as prepared weights, isn't a run's memory
            memory, _ = peak_memory(device, lambda run=run: _call(run, inputs, task))
            reached = measure(run.model, batch, encode(run.model, batch)).mean().item() if run.reduction else 0.0
            results.append({"batch size": batch_size, "run": run.name, "reached": reached, "memory MB": memory})
            progress.update()
        for turn in range(rounds):
            # A different run goes first in each round.
            for index in [(turn + step) % len(runs) for step in range(len(runs))]:
                set_up(runs[index])
                synchronize(device)
                started = time.perf_counter()
                _call(runs[index], inputs, task)
                synchronize(device)
                seconds[index].append(time.perf_counter() - started)
                progress.update()
    for row, times in zip(results, seconds):
        median = statistics.median(times)
        row |= {
            "milliseconds": 1000 * median,
            "samples/s": batch_size / median,
            "times faster": statistics.median(first / mine for first, mine in zip(seconds[0], times)),
            "memory MB": row.pop("memory MB"),
        }
    return results


def run_benchmark(loaded, images, text, reductions, batch_sizes, rounds, out, **reading):
    """Calibrate a checkpoint if it isn't, time it and write `out`; return the table's title and rows.

    Args:
        loaded: What [`~madtp_hf.checkpoints.load.load`] returned.
        images (`str` or `Path`, *optional*): What [`~madtp_hf.data.rows.load_rows`] reads; noise if None.
        text (`str`, *optional*): The text for all images; the task's default if None.
        reductions, batch_sizes, rounds: As [`benchmark`] takes them.
        out (`str` or `Path`): The JSON file to write.
        reading: `image_dir`, `columns` and `on_error` of `load_rows`.
    """
    model, processor, entry = loaded.model, loaded.processor, loaded.task
    number = max(*batch_sizes, CALIBRATION_SAMPLES)
    texts = [text or entry.text]
    if images is None:
        pictures = iter(synthetic_images(number * entry.num_images, model.config.vision_config.image_size))
        column = (
            {entry.text_column: texts if entry.text_column == "captions" else texts[0]} if entry.text_column else {}
        )
        rows = [
            {**{name: next(pictures) for name in entry.image_columns}, **column, "image_id": str(index)}
            for index in range(number)
        ]
    else:
        rows = load_rows(entry, images, texts, samples=number, **reading)
    calibrated_here = not model.config.calibrated_reductions
    if calibrated_here:
        batches = make_batches(model, processor, rows, 4)
        if loaded.is_dense:
            init_alignment_from(model, batches)
        calibrate(model, batches, reductions or DEFAULT_REDUCTIONS)
        reductions = model.config.calibrated_reductions
    results = benchmark(model, processor, rows, reductions, batch_sizes, rounds)
    threads = torch.get_num_threads()
    machine = f"{platform.processor() or platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"
    machine = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else machine
    facts = {
        "model": public_name(loaded.source),
        "task": model.task,
        "images": "noise" if images is None else public_name(images),
        "calibrated here": calibrated_here,
        "rounds": rounds,
        "machine": machine,
        "versions": {"madtp_hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps({"results": results, **facts}, indent=2) + "\n")
    return f"{type(model).__name__} on {machine}", results
