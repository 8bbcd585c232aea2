"""Count a forward pass's operations on the device and how often the host waits for a result.

On a GPU a pass takes the time of its arithmetic or of its launches, whichever is longer. This script counts launches
on any machine: question answering runs on the path of devices other than the CPU, where every operation that torch
dispatches and that is not a view counts as one launch, and every value that the host reads as one wait. `--kernels`
also counts the path through Triton's kernels: each kernel counts as one launch, while plain torch computes its result
(tests/helpers/kernel_standins.py).

    python benchmarks/launches.py --kernels --output benchmarks/results/launches.json
    python benchmarks/launches.py --size tiny --batch_sizes 4   # a quick trial
    python benchmarks/launches.py --method madtp_merge --kernels --batch_sizes 4 \\
        --output benchmarks/results/launches_madtp_merge.json

The counts depend on layers and tokens: the default model has those of BLIP-base at 384 px, 12 layers per branch, and
is narrow, so that counting is fast. `off` is our model with pruning off; the numbers are the reductions of FLOPs that
pruning is calibrated to, on separate images and texts. In the file, `by_name` counts by operation and kernel,
`by_place` by calling function.
"""

import collections
import contextlib
import sys
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
from reporting import ROOT, environment, make_parser, print_table, settings_of, write_json
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from madtp_hf.modeling import chunks


sys.path.insert(0, str(ROOT))
from tests.helpers.kernel_standins import kernel_path


# Not launches: views, and operations that only allocate.
FREE = set(
    "view _unsafe_view reshape expand transpose t permute select slice unsqueeze squeeze unflatten flatten split"
    " split_with_sizes unbind narrow as_strided alias detach view_as empty new_empty empty_like empty_strided"
    " scalar_tensor"
    " lift_fresh is_same_size sym_size".split()
)
WAITS = set("item tolist __bool__ __int__ __float__ __index__ nonzero masked_select cpu numpy".split())


class Launches(TorchDispatchMode):
    """Count operations by name and by the calling function of the package."""

    def __init__(self):
        super().__init__()
        self.by_name, self.by_place, self.paused = collections.Counter(), collections.Counter(), False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        # A conversion without effect returns its argument; so does an operation that writes to it, by name or `out`.
        is_itself = bool(args) and result is args[0] and not name.endswith("_") and "out" not in (kwargs or {})
        if not self.paused and name not in FREE and not is_itself:
            self.add(name)
        return result

    def add(self, name: str) -> None:
        self.by_name[name] += 1
        self.by_place[place()] += 1


class Waits(TorchFunctionMode):
    """Count the values that the host reads."""

    def __init__(self):
        super().__init__()
        self.by_place, self.paused = collections.Counter(), False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not self.paused and getattr(function, "__name__", "") in WAITS:
            self.by_place[place()] += 1
        return function(*args, **(kwargs or {}))


def place() -> str:
    """Return the innermost function on the stack that belongs to the package, or else to transformers."""
    frame, fallback = sys._getframe(1), "elsewhere"
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("madtp_hf."):
            return f"{module.rpartition('.')[2]}.{frame.f_code.co_name}"
        if module.startswith("transformers.") and fallback == "elsewhere":
            fallback = f"transformers {module.rpartition('.')[2]}.{frame.f_code.co_name}"
        frame = frame.f_back
    return fallback


@torch.no_grad()
def count(model, inputs: dict, kernels: bool) -> dict:
    """Count launches and waits of one forward pass."""
    launches, waits = Launches(), Waits()

    def call(function, names, *args):
        for name in names:
            launches.add(name)
        launches.paused = waits.paused = True
        try:
            return function(*args)
        finally:
            launches.paused = waits.paused = False

    path = kernel_path(call) if kernels else mock.patch.object(chunks, "CPU_TAKES_CHUNKS", False)
    with contextlib.ExitStack() as stack:
        for context in (path, waits, launches):
            stack.enter_context(context)
        model(**inputs)
    return {
        "operations": launches.by_name.total(),
        "waits": waits.by_place.total(),
        "by_name": dict(launches.by_name.most_common()),
        "by_place": dict(launches.by_place.most_common()),
        "waits_by_place": dict(waits.by_place.most_common()),
    }


def count_all(args) -> list[dict]:
    setup = read_setup(args)
    dense, model = make_models(args.task, setup)
    model.set_pruning_method(args.method)
    batches = calibration_batches(model.task, model.config, args.calibration_samples, setup)
    reductions = calibrate_all(model, batches, args.reductions)
    runs = [("transformers", dense, 0.0), ("off", model, 0.0), *((f"{r:.2g}", model, r) for r in reductions)]
    rows = []
    for batch_size in args.batch_sizes:
        inputs = make_inputs(model.task, model.config, batch_size, setup)
        for name, run_model, reduction in runs:
            model.set_pruning(reduction=reduction)
            for path in ["plain", "kernels"][: 1 + (args.kernels and run_model is model)]:
                found = count(run_model, inputs, kernels=path == "kernels")
                rows.append({"batch_size": batch_size, "run": name, "path": path, **found})
    return rows


# Results


def print_counts(title: str, rows: list[dict]) -> None:
    """Print one line per run: each path's counts, and their ratio to those with pruning off."""
    found = {(row["batch_size"], row["run"], row["path"]): row for row in rows}
    paths, lines = list(dict.fromkeys(row["path"] for row in rows)), []
    for batch_size, run in dict.fromkeys((row["batch_size"], row["run"]) for row in rows):
        line = [run, batch_size]
        for path in paths:
            row, off = found.get((batch_size, run, path)), found[batch_size, "off", path]["operations"]
            line += (
                ["", "", ""] if row is None else [row["operations"], f"{row['operations'] / off:.2f}", row["waits"]]
            )
        lines.append(line)
    print_table(title, ["run", "batch", *(name for path in paths for name in (path, "of off", "waits"))], lines)


def print_makers(title: str, rows: list[dict], key: str, number: int = 20) -> None:
    """Print the largest contributors to the counts: one per line, with a column for each row of results."""
    totals = sum((collections.Counter(row[key]) for row in rows), collections.Counter())
    columns = [key.replace("_", " ").removeprefix("by "), *(f"{row['run']}, {row['path']}" for row in rows)]
    print_table(
        title, columns, [[name, *(row[key].get(name) for row in rows)] for name, _ in totals.most_common(number)]
    )


def main(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument("--task", choices=MODELS, default="vqa")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 32], help="Default: 1 4 32.")
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.5, 0.8], help="Default: 0.5 0.8.")
    parser.add_argument("--method", default="madtp", help="The pruning method; default: madtp.")
    parser.add_argument("--kernels", action="store_true", help="Also count the path with Triton kernels.")
    parser.add_argument("--calibration_samples", type=int, default=4, help="Samples to calibrate on; default: 4.")
    add_arguments(parser, size="narrow")  # as many layers and tokens as base
    args = parser.parse_args(arguments)
    rows = count_all(args)
    print_counts(f"{args.task}, {args.size}: operations", rows)
    last = [row for row in rows if row["batch_size"] == args.batch_sizes[-1] and row["run"] != "transformers"]
    for key in ("by_name", "by_place", "waits_by_place"):
        print_makers(f"what makes them, batches of {args.batch_sizes[-1]}", last, key)
    write_json(args.output, {"settings": settings_of(args), **environment(), "rows": rows})


if __name__ == "__main__":
    main()
