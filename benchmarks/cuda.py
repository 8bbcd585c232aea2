"""Check correctness and measure speed on a GPU, in one call of some minutes.

It needs this repository, the dependencies of its package, and scikit-learn, whose two photographs are the images.

    python benchmarks/cuda.py                                        # on a GPU, 8.5 minutes at most
    python benchmarks/cuda.py --stages facts compiled --output benchmarks/results/cuda_compiled.json
    python benchmarks/cuda.py --device cpu --size tiny --minutes 2    # a quick trial

The second call is for the stages that the first did not reach. It HAS NOT BEEN RUN ON A GPU YET, only on a CPU, where
everything that needs CUDA reports "skipped: no CUDA".

Each stage runs in a process of its own, so that a stage that crashes the device or hangs doesn't affect the others:
- `facts`: GPU, versions.
- `checks`: golden cases; pruning off against transformers' BLIP, in float32 and bfloat16; a sample alone against the
  same sample in a batch; Triton's kernels against the plain path; generation; a training step. See gpu/cuda_checks.py.
- `speed`: question answering (a forward pass with one decoder token), captioning (a teacher-forced forward pass) and
  caption generation (ten tokens, greedy) in bfloat16: transformers' BLIP with its defaults and, where supported, with
  sdpa; ours with pruning off, pruned ("instance"), pruned to fixed token counts ("frozen"), and these as CUDA graphs;
  pruned without torch's `varlen_attn`; transformers' and ours in int8, if torchao is installed. transformers' BLIP has
  eager attention alone: how far "off" is ahead of it says what attention without maps gains, before any pruning.
  Weights are random, images are crops of photographs. See gpu/cuda_speed.py.
- `compiled`: transformers' BLIP with torch.compile, and ours frozen with torch.compile(mode="reduce-overhead").

Runs of a task and batch size are interleaved and timed by CUDA events. Columns: `images/s` and `ms`, medians;
`times faster`, transformers' time over the run's, median over rounds; `FLOPs`, the reduction reached on the batch;
`MB`, peak memory above the memory in use before (for CUDA graphs and compiled models, with everything they keep);
`ops`, `launches` and `waits`: operations on the device, calls that launch them, waits of the host (batches of 1 and
8); `idle`, the share of the time in which the device is idle; `differs`, the difference from the same model neither
captured nor compiled, on images that it wasn't captured with, relative to the largest output (for generated tokens,
the share that differs). Results are written to `--output` as they come; it names what was not reached in time.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path


HERE = Path(__file__).resolve().parent
STAGES = ("facts", "checks", "speed", "compiled")
# The share of the time until which each stage may start new work.
SHARES = {"facts": 0.1, "checks": 0.25, "speed": 0.55, "compiled": 0.82}
SPEED_TASKS = ("vqa", "captioning-generate", "captioning")


@contextlib.contextmanager
def own_modules():
    """Make this folder's modules importable, for now: libraries that look for `cuda` must not find this file."""
    folders = [str(HERE), str(HERE / "gpu"), str(HERE.parent), str(HERE.parent / "src")]
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE] + folders
    try:
        yield
    finally:
        sys.path.remove(str(HERE))


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="Time limit of the whole run; default: 8.5.")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="Stages to run; default: all."
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--size", choices=("base", "large", "tiny"), default="base", help="Model size; tiny is for a trial run."
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=SPEED_TASKS, default=list(SPEED_TASKS), help="Tasks to time; default: all."
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="Default: 1 8 64 256; on a CPU 2.")
    parser.add_argument("--reductions", type=float, nargs="+", help="Default: 0.5 0.8; on a CPU 0.5.")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(os.environ.get("OUT") or HERE / "results") / "cuda.json",
        help="Default: $OUT/cuda.json or benchmarks/results/cuda.json.",
    )
    parser.add_argument("--child", choices=STAGES, help=argparse.SUPPRESS)  # a stage in its own process
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--no_kernels", action="store_true", help="Don't use Triton kernels.")
    args = parser.parse_args(arguments)
    on_cuda = args.device == "cuda"
    args.batch_sizes = args.batch_sizes or ([1, 8, 64, 256] if on_cuda else [2])
    args.reductions = args.reductions or ([0.5, 0.8] if on_cuda else [0.5])
    args.output = args.output.resolve()
    return args


# A stage, in a process of its own


def facts(device: str) -> dict:
    import torch
    from reporting import environment

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "--device cuda, but torch sees no GPU here: expected one, or pass --device cpu --size tiny --minutes 2."
        )
    found = environment(torch.device(device))
    found = {
        **found["machine"],
        **found["versions"],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except Exception as error:
        found["triton"] = f"none: {error}"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["capability"] = list(torch.cuda.get_device_capability())
        found["memory_gb"] = round(properties.total_memory / 1e9, 1)
        found["multiprocessors"] = properties.multi_processor_count
    return found


def order_of(stage: str, tasks: list[str], batch_sizes: list[int], done: set) -> list[tuple[str, int]]:
    """Return the cells of a stage that are not done, most informative first."""
    first = sorted(batch_sizes, key=lambda size: [8, 1, 64, 256].index(size) if size in (8, 1, 64, 256) else 9)
    cells = [(task, size) for task in tasks for size in first]
    if stage == "compiled":  # a cell takes minutes
        cells.sort(key=lambda cell: (first.index(cell[1]) + 1) * (tasks.index(cell[0]) + 1))
    return [cell for cell in cells if cell not in done]


def run_child(args) -> None:
    """Run one stage; append each finding as a line of JSON."""
    lines = args.output.with_suffix(".jsonl")

    def record(kind: str, finding: dict) -> None:
        with lines.open("a") as file:
            file.write(json.dumps({"stage": args.child, "kind": kind, **finding}) + "\n")

    with own_modules():
        import torch
        from cuda_checks import run_checks, triton_kernels
        from cuda_speed import Limits, compiled_runs, plain_runs, run_speed
        from random_models import Setup

        if args.child == "facts":
            record("facts", facts(args.device))
            return
    device, on_cuda = torch.device(args.device), args.device == "cuda"
    if not on_cuda:
        torch.set_num_threads(1)
    if args.no_kernels:
        triton_kernels._enabled = False
    if args.child == "checks":
        run_checks(Setup(args.size, device), args.deadline, record)
        return
    setup = Setup(args.size, device, torch.bfloat16 if on_cuda else torch.float32)
    limits = Limits(args.reductions, args.deadline, *((5.0, 25) if on_cuda else (1.0, 3)))
    rows = [row for row in read_lines(lines) if row["kind"] == "row" and row["stage"] == args.child]
    done = {(row["task"], row["batch_size"]) for row in rows if "milliseconds" in row}
    order = order_of(args.child, args.tasks, args.batch_sizes, done)
    run_speed(setup, limits, record, compiled_runs if args.child == "compiled" else plain_runs, order)


# All stages


def read_lines(path: Path) -> list[dict]:
    """Read the findings; the last line of a killed process may be incomplete."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def collect(args, state: dict) -> dict:
    """Write the findings so far as one JSON file, and return them."""
    found = read_lines(args.output.with_suffix(".jsonl"))

    def of_kind(*kinds):
        return [{k: v for k, v in item.items() if k != "kind"} for item in found if item["kind"] in kinds]

    settings = {"size": args.size, "minutes": args.minutes, "stages": args.stages, "kernels": not args.no_kernels}
    result = {
        "settings": settings,
        "facts": (of_kind("facts") or [{}])[0],
        "stages": state,
        "checks": of_kind("check"),
        "calibration": of_kind("calibration", "sdpa"),
        "rows": of_kind("row"),
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def run_stage(stage: str, args, started: float, state: dict, no_kernels: bool = False) -> int | None:
    """Run a stage until it ends or reaches its deadline; work in progress gets a little longer.

    Returns its exit status, or None if it was killed.
    """
    total = 60 * args.minutes
    soft, hard = started + total * SHARES[stage], started + total * min(SHARES[stage] + 0.15, 0.97)
    if soft < time.time() + 2:
        state[stage] = "not started: out of time"
        return 0
    print(f"{stage}, {time.time() - started:.0f} s after the start", flush=True)
    given = ["--child", stage, "--deadline", soft, "--device", args.device, "--size", args.size]
    given += ["--output", args.output, "--tasks", *args.tasks, "--batch_sizes", *args.batch_sizes]
    given += ["--reductions", *args.reductions, *["--no_kernels"] * (no_kernels or args.no_kernels)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    child = subprocess.Popen([sys.executable, __file__, *map(str, given)], env=environment)
    began = time.time()
    while child.poll() is None and time.time() < hard:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(min(2.0, max(hard - time.time(), 0.1)))
        collect(args, state)
    if child.poll() is None:
        child.kill()
        child.wait()
        state[stage] = f"ended by force after {time.time() - began:.0f} s"
        return None
    state[stage] = f"exit status {child.returncode}, {time.time() - began:.0f} s"
    return child.returncode


def main(arguments=None) -> None:
    args = parse_arguments(arguments)
    if args.child:
        run_child(args)
        return
    started, state = time.time(), {}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".jsonl").unlink(missing_ok=True)
    for stage in args.stages:
        status = run_stage(stage, args, started, state)
        if status and stage == "facts":
            sys.exit(status)
        if status and args.device == "cuda" and not args.no_kernels:
            state[f"{stage}, first"] = state[stage]
            run_stage(stage, args, started, state, no_kernels=True)
            state[stage] += ", without Triton's kernels"
        collect(args, state)
    print_report(collect(args, state))
    print(f"{time.time() - started:.0f} s; {args.output}")


# The report

# By title of a column: the row's entry, and its format.
COLUMNS = {
    "images/s": ("images_per_second", ".1f"),
    "ms": ("milliseconds", ".2f"),
    "times faster": ("time_ratio", ".2f"),
    "FLOPs": ("reduction", ".2f"),
    "MB": ("memory_mb", ".0f"),
    "ops": ("device operations", "d"),
    "launches": ("launches", "d"),
    "waits": ("waits", "d"),
    "idle": ("share without device work", ".2f"),
    "differs": ("difference", ".1g"),
}


def print_report(result: dict) -> None:
    with own_modules():
        from reporting import print_table, show

    print("\n" + "  ".join(f"{name} {value}" for name, value in result["facts"].items() if name != "stage"))
    print("\n".join(f"{stage}: {how}" for stage, how in result["stages"].items()))
    verdicts = {True: "passed", False: "FAILED", None: "-"}
    if result["checks"]:
        passed = [check["passed"] for check in result["checks"]]
        print(f"\nchecks: {passed.count(True)} passed, {passed.count(False)} failed, {passed.count(None)} open")
    for check in result["checks"]:
        if check["passed"] and check["check"].startswith("golden"):
            continue
        found = {name: value for name, value in check.items() if name not in ("check", "passed", "stage")}
        texts = (
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
        )
        print(f"{verdicts[check['passed']]:7} {check['check']}: {', '.join(texts)}")
    lines = []
    for row in result["rows"]:
        cells = [show(row.get(key), form) for key, form in COLUMNS.values()]
        name = f"{row['run']}: {row['error'][:110]}" if "error" in row else row["run"]
        lines.append([row["task"], row["batch_size"], name, *cells])
    print_table("passes", ["task", "batch", "run", *COLUMNS], lines)
    if result["facts"].get("device") == "cpu":
        print("skipped: no CUDA: kernels, CUDA graphs, memory, launches")


if __name__ == "__main__":
    main()
