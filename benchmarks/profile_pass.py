"""Profile a forward pass on the CPU: the share of time of each part, in all and layer by layer.

    python benchmarks/profile_pass.py --output benchmarks/results/profile_cpu.json
    python benchmarks/profile_pass.py --size tiny --batch_sizes 2 --rounds 2   # a quick trial

Parts: `products`, linear maps and convolutions; `attention with maps`, of the layers that prune; `fused attention`, of
all others; `gate`, which scores tokens and decides (its steps are in the file); `gather`, the surviving and merged
tokens into new rows; `rest`, norms, activations, residuals, embeddings and Python. `maps over fused` is the extra time
of attention with maps over fused attention of the same queries, keys and values, which runs beside it and is left out
of the pass. Times are torch.profiler's, which make small operations look slower than they are; each is the median over
rounds. (A file named profile.py would hide Python's own module.)
"""

import collections
import contextlib
import itertools
import statistics
from unittest import mock

import torch
from calibrating import calibrate_all
from random_models import (
    MODELS,
    add_arguments,
    calibration_batches,
    make_inputs,
    make_models,
    read_setup,
)
from reporting import environment, make_parser, print_table, settings_of, write_json
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.modeling_layers import GradientCheckpointingLayer

from madtp_hf.modeling import encoder, method_madtp, pruning_method
from madtp_hf.modeling.attention import attend


PARTS = ("products", "attention with maps", "fused attention", "gate", "gather", "rest")
# The engine's functions of a part, where it looks them up; whatever they call belongs to the part.
FUNCTIONS = {
    "gate: alignment scores": (method_madtp.MadtpMethod, "read_input"),
    "gate: importance": (method_madtp, "token_importance"),
    "gate: threshold": (method_madtp, "importance_threshold"),
    "gate: selection": (method_madtp, "select_tokens"),
    "gate: weights": (method_madtp, "merge_weights"),
    "gate: other": (method_madtp.MadtpMethod, "decide"),
    "attention with maps": (pruning_method, "attend_with_statistics"),
    "gather": (encoder, "repack"),
}
# The operations of a part anywhere else, by what their names contain.
OPERATIONS = {
    "products": ("linear", "addmm", "::mm", "bmm", "matmul", "convolution"),
    "fused attention": ("scaled_dot_product",),
}
PART, LAYER, BESIDE = "part: ", "layer: ", "beside"


def layers_of(model) -> dict[str, torch.nn.Module]:
    """Return the layers of all towers by a short name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            found[f"{name.split('.')[0].removesuffix('_model')} {name.rpartition('.')[2]}"] = module
    return found


@contextlib.contextmanager
def labels(model):
    """Name the engine's parts and the model's layers in the profiler's records."""

    def named(part, function):
        def call(*args, **kwargs):
            with record_function(PART + part):
                return function(*args, **kwargs)

        return call

    def beside(function):
        fused, fused_first = named(BESIDE, attend), itertools.cycle((True, False))

        def call(query_key_value, chunk, *options):
            query, key, value = chunk.pad(query_key_value).flatten(0, 1).unbind(1)
            first = next(fused_first)  # in turns, so that neither always finds the other's data in cache
            for now in (first, not first):
                if now:
                    fused(None, "sdpa", query, key, value, chunk)
                else:
                    result = function(query_key_value, chunk, *options)
            return result

        return call

    open_layers, handles = [], []

    def enter(name):
        def hook(module, args, kwargs):
            open_layers.append(record_function(LAYER + name))
            open_layers[-1].__enter__()

        return hook

    def leave(module, args, output):
        open_layers.pop().__exit__(None, None, None)

    with contextlib.ExitStack() as stack:
        for part, (owner, name) in FUNCTIONS.items():
            function = named(part, getattr(owner, name))
            function = beside(function) if part == "attention with maps" else function
            stack.enter_context(mock.patch.object(owner, name, function))
        for name, layer in layers_of(model).items():
            handles.append(layer.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(layer.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def part_of(event) -> tuple[str, str]:
    """Return the layer and the part that an event's own time belongs to."""
    part, layer, by_name = None, "outside", None
    while event is not None:
        name = event.name
        if name.startswith(PART):
            part = part or name.removeprefix(PART)
        elif name.startswith(LAYER):
            layer = name.removeprefix(LAYER)
            break
        elif by_name is None:
            by_name = next((key for key, texts in OPERATIONS.items() if any(text in name for text in texts)), None)
        event = event.cpu_parent
    return layer, part or by_name or "rest"


@torch.no_grad()
def profile_once(model, inputs: dict) -> dict[tuple[str, str], float]:
    """Return the milliseconds of each layer and part of one pass."""
    with labels(model), profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("pass"):
        model(**inputs)
    spent = collections.Counter()
    for event in profiler.events():
        spent[part_of(event)] += event.self_cpu_time_total / 1000
    return spent


def profile_run(model, inputs: dict, rounds: int) -> dict:
    """Return medians over rounds: milliseconds, shares of the parts and of the gate's steps, and the layers."""
    profile_once(model, inputs)
    found = [profile_once(model, inputs) for _ in range(rounds)]
    layers: dict[str, collections.Counter] = {}
    steps = collections.Counter()
    for layer, part in dict.fromkeys(key for spent in found for key in spent):
        spent = statistics.median(round[layer, part] for round in found)
        steps[part] += spent
        layers.setdefault(layer, collections.Counter())[part.partition(":")[0]] += spent
    totals = {part: sum(parts[part] for parts in layers.values()) for part in PARTS}
    whole = sum(totals.values())
    return {
        "milliseconds": whole,
        "shares": {part: spent / whole for part, spent in totals.items()},
        "gate": {step.removeprefix("gate: "): steps[step] / whole for step in FUNCTIONS if step.startswith("gate")},
        "maps over fused": (totals["attention with maps"] - steps[BESIDE]) / whole,
        "layers": {layer: {part: parts[part] for part in PARTS} for layer, parts in layers.items()},
    }


def print_rows(rows: list[dict]) -> None:
    lines = []
    for row in rows:
        shares = (f"{100 * share:.1f}" for share in (*row["shares"].values(), row["maps over fused"]))
        lines.append([f"{row['reduction']:.2f}", row["batch_size"], f"{row['milliseconds']:.1f}", *shares])
    print_table("percent of a pass", ["reduction", "batch", "ms", *PARTS, "maps over fused"], lines)
    lines = [[layer, *(f"{spent:.2f}" for spent in parts.values())] for layer, parts in rows[-1]["layers"].items()]
    print_table("milliseconds by layer, of the last of these", ["layer", *PARTS], lines)


def main(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument("--task", choices=MODELS, default="vqa")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--calibration_samples", type=int, default=8)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    setup = read_setup(args, prepack=True)
    _, model = make_models(args.task, setup)
    batches = calibration_batches(model.task, model.config, args.calibration_samples, setup)
    budgets = [0.0, *calibrate_all(model, batches, args.reductions)]
    rows = []
    for batch_size in args.batch_sizes:
        inputs = make_inputs(model.task, model.config, batch_size, setup)
        for reduction in budgets:
            model.set_pruning(reduction=reduction)
            rows.append({"batch_size": batch_size, "reduction": reduction, **profile_run(model, inputs, args.rounds)})
    print_rows(rows)
    write_json(args.output, {"settings": settings_of(args), **environment(), "rows": rows})


if __name__ == "__main__":
    main()
