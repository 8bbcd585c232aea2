"""Plot the results of speed.py, time against FLOPs as ratios to transformers' BLIP, and print them as a table.

    python benchmarks/plot.py benchmarks/results/speed_cpu.json   # writes speed_cpu.png beside it

On the line, the speed-up equals the FLOPs reduction; bars are the quartiles over the rounds. In the Markdown table,
`of ours` is the efficiency against our own model with pruning off.
"""

import argparse
import json
from pathlib import Path

from reporting import draw_panels, markdown


SERIES = {
    "off": ("pruning off", "black", "x"),
    "instance": ("pruned, instance", "tab:blue", "o"),
    "batch": ("pruned, batch", "tab:cyan", "s"),
    "tome": ("ToMe", "tab:orange", "^"),
    "evit": ("EViT", "tab:green", "v"),
}

TASKS = {
    "vqa": "question answering",
    "nlvr2": "NLVR2",
    "captioning": "captioning, teacher-forced",
    "captioning-generate": "captioning, generation",
    "retrieval": "retrieval",
    "clip": "CLIP ViT-B/16",
    "clip-text": "CLIP ViT-B/16, texts alone",
    "clip-large": "CLIP ViT-L/14",
    "clip-large-text": "CLIP ViT-L/14, texts alone",
    "vqa-training": "question answering, a training step",
}


def table(rows: list[dict]) -> list[str]:
    off = {(row["task"], row["batch_size"]): row["time_ratio"] for row in rows if row["run"] == "off"}
    lines = []
    for row in rows:
        if row["run"] == "transformers":
            continue
        run = f"{row['run']} {row['asked']}" if "asked" in row else row["run"]
        of_ours = row["efficiency"] / off[row["task"], row["batch_size"]]
        quartiles = "{:.2f}-{:.2f}".format(*row["time_quartiles"]) if row["rounds"] > 1 else ""
        numbers = [row["flops_ratio"], row["efficiency"], of_ours, row["memory_ratio"]]
        cells = [TASKS[row["task"]], row["batch_size"], run, f"{row['time_ratio']:.2f}", quartiles]
        lines.append([*cells, *(f"{number:.2f}" for number in numbers)])
    columns = "task, batch, run, times faster, quartiles, FLOPs saved, efficiency, of ours, memory"
    return markdown(columns.split(", "), lines)


def draw_panel(axes, panel: tuple[str, list[dict]]) -> None:
    """Draw one task and batch size."""
    title, rows = panel
    for run, (label, color, marker) in SERIES.items():
        points = sorted((row for row in rows if row["run"] == run), key=lambda row: row["flops_ratio"])
        if not points:
            continue
        flops, times = [row["flops_ratio"] for row in points], [row["time_ratio"] for row in points]
        bars = [[abs(row["time_quartiles"][side] - row["time_ratio"]) for row in points] for side in (0, 1)]
        axes.errorbar(flops, times, yerr=bars, label=label, color=color, marker=marker, markersize=4, linewidth=1)
    highest = max([1.05, *(1.05 * row["time_ratio"] for row in rows)])
    # A run that prunes almost nothing has more FLOPs than the dense model, because of its scores.
    widest = max([1.05, *(1.05 * row["flops_ratio"] for row in rows)])
    axes.plot([0, widest], [0, widest], color="gray", linestyle=":", label="time as FLOPs")
    axes.set(title=title, xlim=(0, widest), ylim=(0, highest), xlabel="FLOPs ratio", ylabel="times faster")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="The JSON file that speed.py wrote.")
    parser.add_argument("--output", type=Path, help="Default: the same name with .png.")
    args = parser.parse_args(arguments)
    rows = [row for row in json.loads(args.results.read_text())["rows"] if "time_ratio" in row]
    print("\n".join(table(rows)))
    lines: dict[str, dict[int, list]] = {}
    for row in rows:
        lines.setdefault(row["task"], {}).setdefault(row["batch_size"], []).append(row)
    panels = [[(f"{task}, batch size {size}", sizes[size]) for size in sorted(sizes)] for task, sizes in lines.items()]
    draw_panels(panels, draw_panel, (3.4, 3.1), args.output or args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
