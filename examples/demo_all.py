"""Report in one table what pruning saves and costs for BLIP's four tasks and CLIP, on digit scenes.

Runs `run_vqa.py`, `run_nlvr2.py`, `run_captioning.py`, `run_retrieval.py` and `run_clip_retrieval.py` with their
defaults, one after the other; arguments that this script doesn't know are passed to each of them.

    python examples/demo_all.py --output_dir outputs/demo-all
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from madtp_hf.tasks import TASKS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo-all"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    args, others = parser.parse_known_args()
    started = time.time()
    summary = {}
    for task in args.tasks:
        folder = args.output_dir / task
        script = Path(__file__).parent / TASKS[task].script
        subprocess.run([sys.executable, str(script), "--output_dir", str(folder), *others], check=True)
        summary[task] = json.loads((folder / "results.json").read_text())

    table = Table(title="Digit scenes: the metric, and GFLOPs of a sample")
    budgets = [row["reduction asked"] for row in summary[args.tasks[0]]["results"]]
    for name in ("task", "metric", "baseline", "dense checkpoint", "pruning off", *budgets[1:]):
        table.add_column(str(name), justify="left" if name in ("task", "metric") else "right")
    for name, outcome in summary.items():
        task = TASKS[name]
        column = task.headline
        baseline = outcome["baseline"][column] if isinstance(outcome["baseline"], dict) else outcome["baseline"]
        table.add_row(
            task.title,
            task.headline_title,
            f"{baseline:.1%}",
            f"{outcome['dense_before_training'][column]:.1%}",
            *(f"{row[column]:.1%}\n{row['GFLOPs']:.4f}" for row in outcome["results"]),
        )
    Console(width=120).print(table)
    seconds = round(time.time() - started)
    (args.output_dir / "results.json").write_text(json.dumps({"tasks": summary, "seconds": seconds}, indent=2))
    print(f"One checkpoint per task serves all budgets. Wrote {args.output_dir / 'results.json'} in {seconds} s.")


if __name__ == "__main__":
    main()
