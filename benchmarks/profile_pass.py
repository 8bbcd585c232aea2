"""Profile a forward pass on the CPU: the share of time of each part, in all and layer by layer.

    python benchmarks/profile_pass.py --output benchmarks/results/profile_cpu.json
    python benchmarks/profile_pass.py --size tiny --batch_sizes 2 --rounds 2   # a quick trial

Parts: `products`, linear maps and convolutions; `attention with maps`, of the layers that prune; `fused attention`, of
all others; `gate`, alignment scores, importance, threshold and choice; `gather`, the surviving and merged tokens into
new rows; `rest`, norms, activations, residuals, embeddings and Python. Times are torch.profiler's, which make small
operations look somewhat slower than they are; each is the median over rounds. (A file named profile.py would hide
Python's own module.)
"""

import collections
import contextlib
import statistics
from unittest import mock

import torch
from random_models import (
    MODELS,
    add_arguments,
    calibrate_reachable,
    calibration_batches,
    make_inputs,
    make_models,
    read_setup,
)
from reporting import environment, make_parser, print_table, settings_of, write_json
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.modeling_layers import GradientCheckpointingLayer

from madtp_hf.modeling import encoder


PARTS = ("products", "attention with maps", "fused attention", "gate", "gather", "rest")
# The engine's functions of a part, where it looks them up; whatever they call belongs to the part.
FUNCTIONS = {
    "gate": ((encoder.MadtpReduction, "read_input"), (encoder.MadtpReduction, "choose")),
    "attention with maps": ((encoder, "attend_with_evidence"),),
    "gather": ((encoder, "reduce"),),
}
# The operations of a part anywhere else, by what their names contain.
OPERATIONS = {
    "products": ("linear", "addmm", "::mm", "bmm", "matmul", "convolution"),
    "fused attention": ("scaled_dot_product",),
}
PART, LAYER = "part: ", "layer: "


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

    open_layers, handles = [], []

    def enter(name):
        def hook(module, args, kwargs):
            open_layers.append(record_function(LAYER + name))
            open_layers[-1].__enter__()

        return hook

    def leave(module, args, output):
        open_layers.pop().__exit__(None, None, None)

    with contextlib.ExitStack() as stack:
        for part, functions in FUNCTIONS.items():
            for owner, name in functions:
                stack.enter_context(mock.patch.object(owner, name, named(part, getattr(owner, name))))
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
    """Return the medians over rounds: milliseconds of the pass, shares of its parts, milliseconds by layer and part."""
    profile_once(model, inputs)
    found = [profile_once(model, inputs) for _ in range(rounds)]
    keys = dict.fromkeys(key for spent in found for key in spent)
    layers: dict[str, dict[str, float]] = {}
    for layer, part in keys:
        layers.setdefault(layer, {})[part] = statistics.median(spent[layer, part] for spent in found)
    totals = {part: sum(parts.get(part, 0.0) for parts in layers.values()) for part in PARTS}
    whole = sum(totals.values())
    return {"milliseconds": whole, "shares": {part: spent / whole for part, spent in totals.items()}, "layers": layers}


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
    calibrate_reachable(model, batches, args.reductions)
    budgets = [0.0, *(entry[0] for entry in model.config.pruning_schedule or ())]
    rows = []
    for batch_size in args.batch_sizes:
        inputs = make_inputs(model.task, model.config, batch_size, setup)
        for reduction in budgets:
            model.set_pruning(reduction=reduction)
            rows.append({"batch_size": batch_size, "reduction": reduction, **profile_run(model, inputs, args.rounds)})
        lines = [
            [
                f"{row['reduction']:.2f}",
                f"{row['milliseconds']:.1f}",
                *(f"{100 * row['shares'][part]:.1f}" for part in PARTS),
            ]
            for row in rows[-len(budgets) :]
        ]
        print_table(f"percent of a pass, batches of {batch_size}", ["reduction", "ms", *PARTS], lines)
    lines = [
        [layer, *(f"{parts.get(part, 0.0):.2f}" for part in PARTS)] for layer, parts in rows[-1]["layers"].items()
    ]
    print_table(f"milliseconds of each layer at {budgets[-1]:.2f}", ["layer", *PARTS], lines)
    write_json(args.output, {"settings": settings_of(args), **environment(), "rows": rows})


if __name__ == "__main__":
    main()
