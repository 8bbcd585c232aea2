"""What a forward pass asks of a device: its operations, and how often the host waits for one.

On a GPU a pass costs its arithmetic or its launches, whichever is more. This counts them on any machine: question answering at
BLIP-base size (or `--size tiny`) runs on the path of devices other than the CPU, and every operation that torch dispatches and that is
no view is one launch; a wait is a value that the host reads. With `--kernels`, Triton's kernels are counted as the launches they
are, while plain torch computes their results.

    python benchmarks/launches.py --output benchmarks/results/launches.json
    python benchmarks/launches.py --size tiny --batch_sizes 4   # does it run?
"""

import argparse
import collections
import contextlib
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from speed import calibrate_reachable, calibration_batches, machine, make_inputs, make_models
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from madtp_hf.modeling import sequences


# No launch: views, what only allocates, and the Python side of reading a value.
FREE = {
    *(
        "view",
        "_unsafe_view",
        "reshape",
        "expand",
        "transpose",
        "t",
        "permute",
        "select",
        "slice",
        "unsqueeze",
        "squeeze",
    ),
    *(
        "unflatten",
        "flatten",
        "split",
        "split_with_sizes",
        "unbind",
        "narrow",
        "as_strided",
        "alias",
        "detach",
        "view_as",
    ),
    *(
        "empty",
        "new_empty",
        "empty_like",
        "empty_strided",
        "scalar_tensor",
        "lift_fresh",
        "_to_copy_noop",
        "is_same_size",
        "sym_size",
    ),
}
WAITS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select", "cpu", "numpy"}


class Launches(TorchDispatchMode):
    """Counts operations by name and by the function of the package that asked for them."""

    def __init__(self):
        super().__init__()
        self.by_name, self.by_place, self.paused = collections.Counter(), collections.Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        result = function(*args, **(kwargs or {}))
        if not self.paused and name not in FREE and not self._is_view(args, result, name):
            self.add(name)
        return result

    @staticmethod
    def _is_view(args, result, name) -> bool:
        return name in ("_to_copy", "contiguous") and args and result is args[0]

    def add(self, name: str, number: int = 1) -> None:
        self.by_name[name] += number
        self.by_place[place()] += number

    @contextlib.contextmanager
    def pause(self):
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    @property
    def total(self) -> int:
        return sum(self.by_name.values())


class Waits(TorchFunctionMode):
    """Counts the values that the host reads."""

    def __init__(self):
        super().__init__()
        self.by_place = collections.Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in WAITS:
            self.by_place[place()] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.by_place.values())


def place() -> str:
    """The innermost function of the package on the stack, or of transformers."""
    frame, fallback = sys._getframe(1), "elsewhere"
    while frame is not None:
        path = frame.f_code.co_filename
        if "madtp_hf" in path and "benchmarks" not in path:
            return f"{Path(path).stem}.{frame.f_code.co_name}"
        if "transformers" in path and fallback == "elsewhere":
            fallback = f"transformers.{Path(path).stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return fallback


@torch.no_grad()
def count(model, inputs) -> tuple[Launches, Waits]:
    with Waits() as waits, Launches() as launches:
        model(**inputs)
    return launches, waits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="vqa")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--calibration_samples", type=int, default=4)
    parser.add_argument("--size", choices=("base", "tiny"), default="base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.device, args.dtype, args.torch_dtype = torch.device("cpu"), "float32", torch.float32
    args.plain_weights = True

    dense, model = make_models(args.task, args)
    schedule = calibrate_reachable(model, calibration_batches(args.task, model.config, args), args.reductions)
    sequences.CPU_TAKES_PARTS = False
    rows = []
    for batch_size in args.batch_sizes:
        inputs = make_inputs(args.task, model.config, batch_size, args)
        runs = [("transformers", dense, None), ("off", model, 0.0), *((str(r), model, t) for r, t in schedule)]
        off = None
        for name, run_model, temperature in runs:
            if temperature is not None:
                model.set_pruning(temperature=temperature)
            launches, waits = count(run_model, inputs)
            off = launches.total if name == "off" else off
            rows.append(
                {
                    "batch_size": batch_size,
                    "run": name,
                    "operations": launches.total,
                    "of off": None if off is None else round(launches.total / off, 2),
                    "waits": waits.total,
                    "by name": dict(launches.by_name.most_common()),
                    "by place": dict(launches.by_place.most_common()),
                    "waits by place": dict(waits.by_place.most_common()),
                }
            )
    table = Table(title=f"{args.task}, {args.size}")
    for column in ("batch_size", "run", "operations", "of off", "waits"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            *("" if row[c] is None else str(row[c]) for c in ("batch_size", "run", "operations", "of off", "waits"))
        )
    Console().print(table)
    for row in rows[: 2 + len(schedule)]:
        print(row["run"], json.dumps(row["by place"]))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": machine(args), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
