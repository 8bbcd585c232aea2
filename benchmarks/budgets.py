"""Compare one checkpoint for all budgets with one checkpoint per budget, on digit scenes, at equal training steps.

    python benchmarks/budgets.py --tasks vqa --output benchmarks/results/budgets_digits.json

For each task, `examples/run_TASK.py` fine-tunes the shipped dense BLIP once with the reduction drawn from a range at
each step, and then once for each single reduction. All models are calibrated for every reduction and evaluated on the
same unseen scenes.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from madtp_hf.tasks import TASKS


EXAMPLES = Path(__file__).parents[1] / "examples"


def fine_tune(task: str, targets: list[float], reductions: list[float], folder: Path, options: list[str]) -> dict:
    """Run one training; return the script's results and the seconds that it took."""
    command = [sys.executable, str(EXAMPLES / f"run_{task}.py"), "--output_dir", str(folder), *options]
    command += ["--target_reduction", *map(str, targets), "--reductions", *map(str, reductions)]
    if len(targets) > 1:
        command += ["--num_targets", str(len(reductions))]
    started = time.perf_counter()
    with open(folder.parent / f"{folder.name}.log", "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return {**json.loads((folder / "results.json").read_text()), "seconds": time.perf_counter() - started}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["vqa"])
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.3, 0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="for the training scripts, last")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/budgets"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/budgets_digits.json"))
    args = parser.parse_args()

    options = ["--seed", str(args.seed), *args.options]
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    for task in args.tasks:
        folder = args.work_dir / task
        folder.mkdir(parents=True, exist_ok=True)
        span = [min(args.reductions), max(args.reductions)]
        together = fine_tune(task, span, args.reductions, folder / "all", options)
        metric = TASKS[task].headline
        of_all = {row["reduction asked"]: row for row in together["results"]}
        rows = []
        for reduction in args.reductions:
            alone = fine_tune(task, [reduction], [reduction], folder / str(reduction), options)
            row = {
                "reduction": reduction,
                "one checkpoint": of_all[reduction][metric],
                "its own": alone["results"][-1][metric],
                "reached": [of_all[reduction]["reached"], alone["results"][-1]["reached"]],
            }
            rows.append(row)
            print(task, metric, json.dumps(row), flush=True)
        results[task] = {"metric": metric, "options": options, "seconds": together["seconds"], "rows": rows}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
