"""The timed part of the GPU benchmark: one cell is a task's pass at one batch size, and all of its runs take turns.

Passes: `vqa`, a forward pass with one decoder token; `captioning`, a teacher-forced one; `captioning-generate`, ten
tokens, greedy.
"""

import contextlib
import copy
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from cuda_models import calibrated, kernels, make_inputs, make_models
from torch.profiler import ProfilerActivity, profile

from madtp_hf.budgets.passes import encode, measure


NEW_TOKENS = 10
PROFILED_BATCHES = (1, 8)
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
TASK_OF = {"vqa": "vqa", "captioning": "captioning", "captioning-generate": "captioning"}


class Skipped(Exception):
    """What can't be measured on this device."""


class Run(NamedTuple):
    """One of the things that take turns. prepare() -> call() -> output; what is slow and done once is in `prepare`."""

    name: str
    prepare: Callable
    flops_of: object = None  # the model of ours whose reduction is reported
    setup: Callable = lambda: None  # before each call, not timed


class Settings(NamedTuple):
    size: str
    device: torch.device
    dtype: torch.dtype
    batch_sizes: list[int]
    reductions: list[float]
    deadline: float  # of `time.time()`; no row begins after it
    cell_seconds: float  # that the rounds of a cell may take
    rounds: int


def pass_of(name: str, model, inputs: dict) -> Callable:
    """What is timed: () -> the output."""
    if name != "captioning-generate":
        return lambda: model(**inputs)
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "num_beams": 1, "do_sample": False}
    return lambda: model.generate(inputs["pixel_values"], **lengths)


def graphed(name: str, model, inputs: dict) -> Callable:
    """The pass as a CUDA graph, with the copy of new inputs into it; of `generate` the vision tower alone."""
    if not inputs["pixel_values"].is_cuda:
        raise Skipped("skipped: no CUDA")
    static = {key: value.clone() for key, value in inputs.items()}
    if name == "captioning-generate":
        start = torch.full(
            (len(inputs["pixel_values"]), 1), model.config.text_config.bos_token_id, device=model.device
        )
        lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "num_beams": 1, "do_sample": False}

        def captured():
            return model._encode_images(static["pixel_values"])

        def go_on(vision):
            return model._generate(start, vision, masked=True, **lengths)
    else:

        def captured():
            return model(**static)

        def go_on(output):
            return output

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            captured()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = captured()

    def call():
        for key, value in inputs.items():
            static[key].copy_(value)
        graph.replay()
        return go_on(output)

    return call


def compiled(name: str, model, inputs: dict, mode: str | None) -> Callable:
    """The pass through `torch.compile`; of `generate` the vision tower is compiled. On a CPU it is only traced."""
    how = {"mode": mode} if inputs["pixel_values"].is_cuda else {"backend": "eager"}
    if name == "captioning-generate":
        model.vision_model.forward = torch.compile(model.vision_model.forward, dynamic=False, **how)
        return pass_of(name, model, inputs)
    return pass_of(name, torch.compile(model, dynamic=False, **how), inputs)


# The runs of a cell


def set_up(model, granularity: str, reduction: float) -> None:
    model.config.pruning_granularity = "instance"  # whose settings are free
    model.set_pruning(reduction=reduction)
    model.config.pruning_granularity = granularity


def copy_of(model, granularity: str, reduction: float):
    """A model of its own for what is compiled: its configuration doesn't change from call to call."""
    other = copy.deepcopy(model)
    set_up(other, granularity, reduction)
    return other


def plain_runs(name: str, models: dict, schedule: list, inputs: dict, device) -> list[Run]:
    """transformers' as it ships and with sdpa, ours off and pruned, frozen, and frozen as a CUDA graph."""
    model = models["ours"]
    runs = [
        Run(label, lambda dense=dense: pass_of(name, dense, inputs))
        for label, dense in models.items()
        if label != "ours"
    ]
    states = [("off", "instance", 0.0)]
    for granularity in ("instance", "frozen"):
        states += [(f"{granularity} {asked:.2g}", granularity, asked) for asked in (entry["reduction"] for entry in schedule)]
    for label, granularity, reduction in states:

        def setup(granularity=granularity, reduction=reduction):
            set_up(model, granularity, reduction)

        runs.append(Run(label, lambda: pass_of(name, model, inputs), model, setup))
        if granularity == "frozen":
            runs.append(Run(f"{label} CUDA graph", lambda: graphed(name, model, inputs), model, setup))
    return runs


def compiled_runs(name: str, models: dict, schedule: list, inputs: dict, device) -> list[Run]:
    """transformers' as it ships, for comparison, then compiled; ours frozen and compiled, with CUDA graphs."""
    dense, model = models["transformers"], models["ours"]

    def compile_dense(mode):
        # The run that is not compiled goes on with its own.
        other = copy.deepcopy(dense)
        return compiled(name, other, inputs, mode)

    runs = [
        Run("transformers", lambda: pass_of(name, dense, inputs)),
        Run("transformers torch.compile", lambda: compile_dense(None)),
    ]
    for asked in (entry["reduction"] for entry in schedule):

        def compile_frozen(reduction=asked):
            return compiled(name, copy_of(model, "frozen", reduction), inputs, "reduce-overhead")

        def setup(reduction=asked):  # of the model that counts FLOPs
            set_up(model, "frozen", reduction)

        runs.append(Run(f"frozen {asked:.2g} torch.compile", compile_frozen, model, setup))
    if device.type == "cuda":
        runs.append(Run("transformers torch.compile reduce-overhead", lambda: compile_dense("reduce-overhead")))
    return runs


# What is measured


def seconds_of(call: Callable, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def device_work(call: Callable, milliseconds: float) -> dict:
    """What a pass asks of the device: operations, launches, waits of the host, and the share of time without work."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    busy, operations, launches, waits = 0, 0, 0, 0
    for event in profiler.profiler.kineto_results.events():
        name = event.name()
        is_annotation = getattr(event, "is_user_annotation", lambda: False)()
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            if not is_annotation:
                busy += event.duration_ns() if hasattr(event, "duration_ns") else 1000 * event.duration_us()
                operations += 1
        else:
            launches += "Launch" in name and name.startswith("cu")
            waits += name in WAITS
    busy /= 1e6
    return {
        "device operations": operations,
        "launches": launches,
        "waits": max(waits - 1, 0),  # the last is ours
        "device milliseconds": busy,
        "share without device work": max(0.0, 1 - busy / milliseconds) if milliseconds else None,
    }


def prepare(run: Run, device: torch.device) -> tuple[dict, Callable | None]:
    """The row of a run, warmed up, and its call; None and an `error` in the row where it fails."""
    row = {"run": run.name}
    started = time.time()
    try:
        run.setup()
        if device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        call = run.prepare()
        with kernels(True) if device.type == "cuda" else contextlib.nullcontext() as state:
            for _ in range(3):
                call()
        if state is not None and state.error:
            row["kernels"] = state.error
        if device.type == "cuda":
            torch.cuda.synchronize()
            row["memory_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        row["prepare_seconds"] = round(time.time() - started, 2)
        return row, call
    except Exception as error:  # every other row is still to be had
        row["error"] = str(error) if isinstance(error, Skipped) else f"{type(error).__name__}: {str(error)[:500]}"
        return row, None


def add_tokens(row: dict, run: Run, inputs: dict) -> None:
    """The reduction of FLOPs of this very batch, by the tokens that the encoders leave."""
    run.setup()
    output = encode(run.flops_of, inputs)
    row["reduction"] = measure(run.flops_of, inputs, output).mean().item()
    row["vision_tokens"] = output.vision_tokens.double().mean(dim=1).tolist()


@torch.no_grad()
def time_cell(name: str, runs: list[Run], inputs: dict, settings: Settings) -> list[dict]:
    """The rows of a cell, each run timed once a round."""
    device, batch_size = settings.device, len(inputs["pixel_values"])
    torch._dynamo.reset()
    rows, calls = [], []
    for run in runs:
        if time.time() > settings.deadline:
            row, call = {"run": run.name, "error": "not started: out of time"}, None
        else:
            row, call = prepare(run, device)
            print(f"  {name} {batch_size} {run.name}: {row.get('error', 'ready')}", flush=True)
        rows.append({"task": name, "batch_size": batch_size, **row})
        calls.append(call)
    seconds = [[] for _ in runs]
    started = time.time()
    for turn in range(settings.rounds):
        if turn >= 2 and time.time() > min(started + settings.cell_seconds, settings.deadline + 5):
            break
        for index, run in enumerate(runs):
            if calls[index] is None:
                continue
            try:
                run.setup()
                seconds[index].append(seconds_of(calls[index], device))
            except Exception as error:
                rows[index]["error"], calls[index] = f"{type(error).__name__}: {str(error)[:500]}", None
    for row, run, call, times in zip(rows, runs, calls, seconds):
        if call is not None:
            finish_row(row, run, call, times, seconds[0], inputs, settings)
            if run.name.endswith(("CUDA graph", "torch.compile")) and run.flops_of is not None:
                add_difference(row, name, run, call, inputs)
    return rows


def add_difference(row: dict, name: str, run: Run, call: Callable, inputs: dict) -> None:
    """How far what was captured or compiled is from the plain pass, on other images, over the largest output."""
    pixel_values = inputs["pixel_values"]
    before = pixel_values.clone()
    try:
        pixel_values.copy_(before.flip(3))
        run.setup()
        expected = pass_of(name, run.flops_of, inputs)()
        found = call()
        if name == "captioning-generate":  # the share of tokens that differ
            row["difference"] = (found != expected).double().mean().item()
        else:
            largest = expected.logits.float().abs().max()
            row["difference"] = ((found.logits.float() - expected.logits.float()).abs().max() / largest).item()
    except Exception as error:
        row["note"] = f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        pixel_values.copy_(before)


def finish_row(row, run: Run, call, times, of_transformers, inputs, settings: Settings) -> None:
    row["rounds"] = len(times)
    row["milliseconds"] = 1000 * statistics.median(times)
    row["images_per_second"] = len(inputs["pixel_values"]) / statistics.median(times)
    ratios = [theirs / mine for theirs, mine in zip(of_transformers, times)]
    row["times_faster"] = statistics.median(ratios) if ratios else None
    try:
        if run.flops_of is not None:
            add_tokens(row, run, inputs)
        if settings.device.type == "cuda" and len(inputs["pixel_values"]) in PROFILED_BATCHES:
            run.setup()
            row.update(device_work(call, row["milliseconds"]))
    except Exception as error:
        row["note"] = f"{type(error).__name__}: {str(error)[:300]}"


def stop_if_device_is_lost(device: torch.device) -> None:
    """After an illegal memory access nothing runs any more in this process: leave the rest to another one."""
    if device.type == "cuda":
        try:
            torch.zeros(1, device=device).add_(1).item()
        except Exception as error:
            sys.exit(f"the device is lost: {error}")


def make_task(task: str, settings: Settings, record: Callable) -> tuple[dict, list]:
    """transformers' model, with sdpa where that version has it, and ours, calibrated and frozen."""
    size, device, dtype = settings.size, settings.device, settings.dtype
    dense, model = make_models(task, size, device, dtype)
    models = {"transformers": dense, "ours": model}
    try:
        with_sdpa = make_models(task, size, device, dtype, attention="sdpa")[0]
        models = {"transformers": dense, "transformers sdpa": with_sdpa, "ours": model}
    except Exception as error:
        record("sdpa", {"task": task, "transformers sdpa": f"not supported: {str(error)[:200]}"})
    started = time.time()
    schedule = calibrated(model, 16 if size == "base" else 4, settings.reductions, freeze=True)
    record(
        "calibration",
        {"task": task, "asked": settings.reductions, "schedule": schedule, "seconds": round(time.time() - started, 1)},
    )
    return models, schedule


def run_speed(settings: Settings, record: Callable, make_runs: Callable, order: list[tuple[str, int]]) -> None:
    """All cells in `order`, as long as there is time; each is recorded when it is done."""
    tasks = {}
    for name, batch_size in order:
        if time.time() > settings.deadline:
            record("row", {"task": name, "batch_size": batch_size, "run": "all", "error": "not started: out of time"})
            continue
        try:
            task = TASK_OF[name]
            if task not in tasks:
                tasks[task] = make_task(task, settings, record)
            models, schedule = tasks[task]
            # A mask of captions is checked by the host, which no CUDA graph can capture.
            padded, config = task != "captioning", models["ours"].config
            inputs = make_inputs(task, config, batch_size, settings.device, settings.dtype, padded=padded)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows = time_cell(name, make_runs(name, models, schedule, inputs, settings.device), inputs, settings)
            for row in rows:
                record("row", row)
            if any("error" in row for row in rows):
                stop_if_device_is_lost(settings.device)
        except Exception as error:
            message = f"{type(error).__name__}: {str(error)[:500]}"
            record("row", {"task": name, "batch_size": batch_size, "run": "all", "error": message})
            stop_if_device_is_lost(settings.device)
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
