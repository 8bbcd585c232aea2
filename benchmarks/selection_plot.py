"""Draw accuracy against the reduction of FLOPs: a panel for each task and dense model, a curve for each method.

    python benchmarks/selection_plot.py     # selection.png and selection_finetuned.png in benchmarks/results/

A band is the standard deviation over seeds, at the mean reduction that they reach; the dotted line is the dense model.
"""

import argparse
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from selection_tables import LABELS, by_model, load, summarise
from selection_tasks import ROOT

from madtp_hf.tasks import TASKS


STYLES = {
    "madtp_data": ("tab:blue", "o", "-"),
    "madtp": ("tab:cyan", "o", "-"),
    "without_self": ("tab:gray", "1", ":"),
    "without_class": ("tab:gray", "2", ":"),
    "without_alignment": ("tab:gray", "3", ":"),
    "class_attention": ("tab:purple", "s", "-"),
    "evit": ("tab:green", "v", "-"),
    "tome": ("tab:orange", "^", "-"),
    "random": ("tab:red", "x", "-"),
    "smaller_image": ("tab:brown", "d", "--"),
}


def draw_panel(axes, task: str, model: str, rows: list[dict]) -> None:
    summaries = summarise(rows)
    for method, (color, marker, line) in STYLES.items():
        of = [summary for asked, summary in sorted(summaries.get(method, {}).items())]
        if not of:
            continue
        reached, means = [s["reached"] for s in of], [100 * s["mean"] for s in of]
        spread = [100 * (s["deviation"] or 0.0) for s in of]
        label = LABELS[method]
        axes.plot(reached, means, color=color, marker=marker, linestyle=line, markersize=4, linewidth=1.2, label=label)
        low, high = ([mean + sign * by for mean, by in zip(means, spread)] for sign in (-1, 1))
        if line != ":":  # bands of MADTP's variants would hide the rest
            axes.fill_between(reached, low, high, color=color, alpha=0.18, linewidth=0)
    for method, line in (("dense", ":"), ("dense_finetuned", "--")):
        if method in summaries:
            level = 100 * summaries[method][0.0]["mean"]
            axes.axhline(level, color="black", linestyle=line, linewidth=1, label=LABELS[method])
    axes.set(
        title=f"{TASKS[task].title}\n{model}", xlabel="reduction of FLOPs", ylabel=f"{TASKS[task].headline_title} %"
    )
    axes.grid(alpha=0.25)


def draw(content: dict, output: Path) -> bool:
    """One figure, three panels in a row; whether there was a comparison to draw."""
    rivals = {"evit", "tome", "random"}
    panels = [(key, rows) for key, rows in by_model(content).items() if rivals & {row["method"] for row in rows}]
    if not panels:
        return False
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(4.2 * columns, 3.6 * lines + 0.8), squeeze=False, layout="constrained"
    )
    handles = {}
    for axes, ((task, model), rows) in zip(grid.flat, panels):
        draw_panel(axes, task, model, rows)
        handles.update(dict(zip(*reversed(axes.get_legend_handles_labels()))))
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, columns + 1), fontsize=8)
    figure.savefig(output, dpi=130)
    pyplot.close(figure)
    return True


def draw_all(path: Path) -> None:
    """The pictures beside the results of the training-free study and, where it is there, the fine-tuned one."""
    matplotlib.use("Agg")
    for results in (path, path.with_name(f"{path.stem}_finetuned.json")):
        content = load(results)
        if content and draw(content, results.with_suffix(".png")):
            print(f"Wrote {results.with_suffix('.png')}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=ROOT / "benchmarks" / "results" / "selection.json")
    draw_all(parser.parse_args().results)


if __name__ == "__main__":
    main()
