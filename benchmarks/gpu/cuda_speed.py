"""The timed part of the GPU benchmark: one cell is a task's pass at one batch size, and all of its runs take turns.

Passes: `vqa`, a forward pass with one decoder token; `captioning`, a teacher-forced one; `captioning-generate`, ten
tokens, greedy.
"""

import copy
import gc
import sys
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from calibrating import calibrate_all
from cuda_checks import kernels
from random_models import Setup, calibration_batches, make_inputs, make_models
from timing import Run, compare, peak_memory, time_runs
from torch.profiler import ProfilerActivity, profile

from madtp_hf.budgets.passes import encode, measure
from madtp_hf.modeling import attention


GENERATION = {"max_new_tokens": 10, "min_new_tokens": 10, "num_beams": 1, "do_sample": False}
PROFILED_BATCHES = (1, 8)
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
HAS_VARLEN_ATTN = attention.has_varlen_attn
TASK_OF = {"vqa": "vqa", "captioning": "captioning", "captioning-generate": "captioning"}


class Skipped(Exception):
    """What can't be measured on this device."""


class Cell(NamedTuple):
    """One of the things that take turns. prepare() -> call() -> output; what is slow and done once is in `prepare`."""

    name: str
    prepare: Callable
    flops_of: object = None  # the model of ours whose reduction is reported
    setup: Callable = lambda: None  # before each call, not timed


class Limits(NamedTuple):
    """deadline: of `time.time()`, no row begins after it; cell_seconds: that the rounds of a cell may take."""

    reductions: list[float]
    deadline: float
    cell_seconds: float
    rounds: int


def pass_of(name: str, model, inputs: dict) -> Callable:
    """What is timed: () -> the output."""
    if name != "captioning-generate":
        return lambda: model(**inputs)
    return lambda: model.generate(inputs["pixel_values"], **GENERATION)


def graphed(name: str, model, inputs: dict) -> Callable:
    """The pass as a CUDA graph, with the copy of new inputs into it; of `generate` the vision tower alone."""
    if not inputs["pixel_values"].is_cuda:
        raise Skipped("skipped: no CUDA")
    static = {key: value.clone() for key, value in inputs.items()}
    if name == "captioning-generate":
        begins = (len(inputs["pixel_values"]), 1), model.config.text_config.bos_token_id
        start = torch.full(*begins, device=model.device)

        def captured():
            return model._encode_images(static["pixel_values"])

        def go_on(vision):
            return model._generate(start, vision, masked=True, **GENERATION)
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


def quantized(model):
    """A copy whose linear maps are int8: weights per channel, activations dynamically, per token."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise Skipped("skipped: no torchao") from error
    other = copy.deepcopy(model)
    quantize_(other, Int8DynamicActivationInt8WeightConfig())
    return other


# The runs of a cell


def set_up(model, granularity: str, reduction: float, varlen_attn: bool = True) -> None:
    attention.has_varlen_attn = HAS_VARLEN_ATTN if varlen_attn else lambda device: False
    model.config.pruning_granularity = "instance"  # whose settings are free
    model.set_pruning(reduction=reduction)
    model.config.pruning_granularity = granularity


def copy_of(model, granularity: str, reduction: float):
    """A model of its own for what is compiled: its configuration doesn't change from call to call."""
    other = copy.deepcopy(model)
    set_up(other, granularity, reduction)
    return other


def plain_runs(name: str, models: dict, reductions: list[float], inputs: dict, device) -> list[Cell]:
    """transformers' as it ships and with sdpa, ours off and pruned, frozen, and frozen as a CUDA graph; int8.

    Without torch's varlen attention, other operations do what it does in the pruned run of the same reduction.
    """
    model = models["ours"]
    runs = [
        Cell(label, lambda dense=dense: pass_of(name, dense, inputs))
        for label, dense in models.items()
        if label != "ours"
    ]
    states = [("off", "instance", 0.0)]
    for granularity in ("instance", "frozen"):
        states += [(f"{granularity} {asked:.2g}", granularity, asked) for asked in reductions]
    for label, granularity, reduction in states:

        def setup(granularity=granularity, reduction=reduction):
            set_up(model, granularity, reduction)

        runs.append(Cell(label, lambda: pass_of(name, model, inputs), model, setup))
        if granularity == "frozen":
            runs.append(Cell(f"{label} CUDA graph", lambda: graphed(name, model, inputs), model, setup))
    for asked in reductions:

        def without(reduction=asked):
            set_up(model, "instance", reduction, varlen_attn=False)

        def call():
            if not HAS_VARLEN_ATTN(device):
                raise Skipped("skipped: no varlen_attn")
            return pass_of(name, model, inputs)

        runs.append(Cell(f"instance {asked:.2g} without varlen_attn", call, model, without))
    return runs + int8_runs(name, models, reductions, inputs)


def int8_runs(name: str, models: dict, reductions: list[float], inputs: dict) -> list[Cell]:
    """transformers' and ours in int8: off, and pruned."""
    try:
        dense, model = quantized(models["transformers"]), quantized(models["ours"])
    except Exception as error:
        message = message_of(error)

        def fail():
            raise Skipped(message)

        return [Cell("int8", fail)]
    runs = [Cell("transformers int8", lambda: pass_of(name, dense, inputs))]
    for asked in (0.0, *reductions):

        def setup(reduction=asked):
            set_up(model, "instance", reduction)

        label = f"instance {asked:.2g} int8" if asked else "off int8"
        runs.append(Cell(label, lambda: pass_of(name, model, inputs), model, setup))
    return runs


def compiled_runs(name: str, models: dict, reductions: list[float], inputs: dict, device) -> list[Cell]:
    """transformers' as it ships, for comparison, then compiled; ours frozen and compiled, with CUDA graphs."""
    dense, model = models["transformers"], models["ours"]

    def compile_dense(mode):
        # The run that is not compiled goes on with its own.
        other = copy.deepcopy(dense)
        return compiled(name, other, inputs, mode)

    runs = [
        Cell("transformers", lambda: pass_of(name, dense, inputs)),
        Cell("transformers torch.compile", lambda: compile_dense(None)),
    ]
    for asked in reductions:

        def compile_frozen(reduction=asked):
            return compiled(name, copy_of(model, "frozen", reduction), inputs, "reduce-overhead")

        def setup(reduction=asked):  # of the model that counts FLOPs
            set_up(model, "frozen", reduction)

        runs.append(Cell(f"frozen {asked:.2g} torch.compile", compile_frozen, model, setup))
    if device.type == "cuda":
        runs.append(Cell("transformers torch.compile reduce-overhead", lambda: compile_dense("reduce-overhead")))
    return runs


# What is measured


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


def message_of(error: Exception) -> str:
    return str(error) if isinstance(error, Skipped) else f"{type(error).__name__}: {str(error)[:500]}"


def prepare(run: Cell, device: torch.device) -> tuple[dict, Callable | None]:
    """Return the row of a run, warmed up, and its call; None and an `error` in the row where it fails."""
    row, started = {"run": run.name}, time.time()

    def warm_up():
        call = run.prepare()
        for _ in range(3):
            call()
        return call

    try:
        run.setup()
        gc.collect()
        with kernels(True) as state:
            memory, call = peak_memory(device, warm_up) if device.type == "cuda" else (None, warm_up())
    except Exception as error:  # every other row is still to be had
        return {**row, "error": message_of(error)}, None
    row["prepare_seconds"] = round(time.time() - started, 2)
    row |= {"memory_mb": memory / 1e6} if memory is not None else {}
    return {**row, **({"kernels": state.error} if state.error else {})}, call


def add_tokens(row: dict, run: Cell, inputs: dict) -> None:
    """Add the reduction of FLOPs of this very batch, by the tokens that the encoders leave."""
    run.setup()
    output = encode(run.flops_of, inputs)
    row["reduction"] = measure(run.flops_of, inputs, output).mean().item()
    row["vision_tokens"] = output.vision_tokens.double().mean(dim=1).tolist()


@torch.no_grad()
def time_cell(name: str, runs: list[Cell], inputs: dict, device: torch.device, limits: Limits) -> list[dict]:
    """Return the rows of a cell, each run timed once a round."""
    batch_size = len(inputs["pixel_values"])
    torch._dynamo.reset()
    rows, ready = [], []
    for run in runs:
        if time.time() > limits.deadline:
            row, call = {"run": run.name, "error": "not started: out of time"}, None
        else:
            row, call = prepare(run, device)
            print(f"  {name} {batch_size} {run.name}: {row.get('error', 'ready')}", flush=True)
        rows.append({"task": name, "batch_size": batch_size, **row})
        if call is not None:
            ready.append((rows[-1], run, Run({}, call, run.setup)))

    def on_error(index, error):
        ready[index][0]["error"] = message_of(error)

    deadline = min(time.time() + limits.cell_seconds, limits.deadline + 5)
    seconds = time_runs([timed for *_, timed in ready], limits.rounds, device, name, deadline, on_error)
    of_transformers = seconds[0] if ready and "error" not in rows[0] else []
    for (row, run, timed), times in zip(ready, seconds):
        if "error" not in row:
            finish_row(row, run, timed.call, times, of_transformers, inputs, device)
            if run.name.endswith(("CUDA graph", "torch.compile")) and run.flops_of is not None:
                add_difference(row, name, run, timed.call, inputs)
    return rows


def add_difference(row: dict, name: str, run: Cell, call: Callable, inputs: dict) -> None:
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
        row["note"] = message_of(error)
    finally:
        pixel_values.copy_(before)


def finish_row(row, run: Cell, call, times, of_transformers, inputs, device) -> None:
    row |= compare(times, of_transformers)
    row["images_per_second"] = 1000 * len(inputs["pixel_values"]) / row["milliseconds"]
    try:
        if run.flops_of is not None:
            add_tokens(row, run, inputs)
        if device.type == "cuda" and len(inputs["pixel_values"]) in PROFILED_BATCHES:
            run.setup()
            row.update(device_work(call, row["milliseconds"]))
    except Exception as error:
        row["note"] = message_of(error)


def stop_if_device_is_lost(device: torch.device) -> None:
    """After an illegal memory access nothing runs any more in this process: leave the rest to another one."""
    if device.type == "cuda":
        try:
            torch.zeros(1, device=device).add_(1).item()
        except Exception as error:
            sys.exit(f"the device is lost: {error}")


def make_task(task: str, setup: Setup, limits: Limits, record: Callable) -> tuple[dict, list]:
    """Return transformers' model, with sdpa where that version has it, and ours, calibrated and frozen."""
    dense, model = make_models(task, setup)
    models = {"transformers": dense, "ours": model}
    try:
        models = {"transformers": dense, "transformers sdpa": make_models(task, setup, "sdpa")[0], "ours": model}
    except Exception as error:
        record("sdpa", {"task": task, "transformers sdpa": f"not supported: {str(error)[:200]}"})
    started = time.time()
    batches = calibration_batches(task, model.config, 4 if setup.size == "tiny" else 16, setup)
    reductions = calibrate_all(model, batches, limits.reductions, freeze=True)
    facts = {"task": task, "asked": limits.reductions, "schedule": model.config.pruning_schedule}
    record("calibration", {**facts, "seconds": round(time.time() - started, 1)})
    return models, reductions


def run_speed(setup: Setup, limits: Limits, record: Callable, make_runs: Callable, order: list) -> None:
    """Time all cells in `order`, as long as there is time; each is recorded when it is done."""
    tasks = {}
    for name, batch_size in order:
        whole = {"task": name, "batch_size": batch_size, "run": "all"}
        if time.time() > limits.deadline:
            record("row", {**whole, "error": "not started: out of time"})
            continue
        try:
            task = TASK_OF[name]
            if task not in tasks:
                tasks[task] = make_task(task, setup, limits, record)
            models, reductions = tasks[task]
            # A mask of captions is checked by the host, which no CUDA graph can capture.
            inputs = make_inputs(task, models["ours"].config, batch_size, setup, padded=task != "captioning")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                runs = make_runs(name, models, reductions, inputs, setup.device)
                rows = time_cell(name, runs, inputs, setup.device, limits)
        except Exception as error:
            rows = [{**whole, "error": message_of(error)}]
        for row in rows:
            record("row", row)
        if any("error" in row for row in rows):
            stop_if_device_is_lost(setup.device)
        gc.collect()
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
