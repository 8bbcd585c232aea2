"""Compare one checkpoint for all budgets with one checkpoint per budget, on digit scenes, at equal training steps.

    python benchmarks/budgets.py --tasks vqa --output benchmarks/results/budgets_digits.json

For each task, `examples/run_TASK.py` fine-tunes the shipped dense BLIP once with the reduction drawn from a range at
each step, and then once for each single reduction. All models are calibrated for every reduction and evaluated on the
same unseen scenes.
"""

import argparse
import json
from pathlib import Path

from digit_tasks import run_example
from reporting import Rows, environment, make_parser, print_table

from madtp_hf.tasks import TASKS


def main(arguments=None):
    parser = make_parser(__doc__, "budgets_digits.json")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["vqa"])
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.3, 0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="Options for the training scripts; must come last."
    )
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/budgets"))
    args = parser.parse_args(arguments)
    results = Rows(
        args.output, {"settings": {"seed": args.seed, "options": args.options}, **environment()}, ("task", "reduction")
    )
    for task in args.tasks:
        metric, folder = TASKS[task].headline, args.work_dir / task

        def fine_tune(targets: list[float], reductions: list[float], name: str, task=task, folder=folder) -> dict:
            options = ["--seed", args.seed, "--target_reduction", *targets, "--reductions", *reductions]
            options += ["--num_targets", len(reductions)] if len(targets) > 1 else []
            return run_example(TASKS[task].script, folder / name, [*options, *args.options])

        together = fine_tune(sorted({min(args.reductions), max(args.reductions)}), args.reductions, "all")
        of_all = {row["reduction asked"]: row for row in together["results"]}
        for reduction in args.reductions:
            alone = fine_tune([reduction], [reduction], str(reduction))
            found = of_all[reduction], alone["results"][-1]
            row = {"task": task, "reduction": reduction, "metric": metric}
            row |= {"one checkpoint": found[0][metric], "its own": found[1][metric]}
            row |= {"reached": [one["reached"] for one in found], "seconds": [together["seconds"], alone["seconds"]]}
            results.add(row)
            print(json.dumps(row), flush=True)
    columns = ["task", "reduction", "metric", "one checkpoint", "its own", "reached"]
    print_table(
        "one checkpoint, or one per budget",
        columns,
        [[row[name] for name in columns] for row in results.rows.values()],
    )


if __name__ == "__main__":
    main()
