"""Tables and pictures of what selection.py and selection_finetuned.py have measured.

python benchmarks/selection.py --table          # docs/accuracy.md's tables, in Markdown
python benchmarks/selection.py --table docs     # writes them into docs/accuracy.md, and draws the pictures
python benchmarks/selection.py --table readme   # the short one
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from digit_tasks import MISSED
from reporting import ROOT, draw_panels, markdown, mean_and_deviation

from madtp_hf.tasks import TASKS


# In the order of the tables: the name that is shown.
LABELS = {
    "dense": "dense",
    "dense_finetuned": "dense, fine-tuned",
    "madtp_data": "MADTP, alignment tokens from data",
    "first_layer": "MADTP from data, first layer alone",
    "first_2_layers": "MADTP from data, first two layers",
    "madtp_merge": "MADTP with merging",
    "merge_first_2_layers": "MADTP with merging, first two layers",
    "merge_without_distinctness": "the same without distinctness",
    "merge_without_sizes": "the same without sizes",
    "merge_into_one": "the same, merging into one token",
    "madtp": "MADTP, random alignment tokens",
    "without_self": "MADTP without patches' attention",
    "without_class": "MADTP without class attention",
    "without_alignment": "MADTP without alignment",
    "class_attention": "class attention, MADTP's threshold",
    "evit": "EViT",
    "tome": "ToMe",
    "random": "random tokens",
    "smaller_image": "smaller image",
}
# README's rows: what it calls them, the results beside selection.json, the dense model and the method.
README_ROWS = (
    ("prepared model, pruned without training", "", "blip-vqa-digits", "madtp_data"),
    ("prepared model, fine-tuned", "_finetuned_dense_pass", "blip-vqa-digits", "madtp_data"),
    ("plain model, pruned without training", "", "blip-vqa-digits-plain", "madtp_data"),
    ("plain model, fine-tuned", "_finetuned_plain", "blip-vqa-digits-plain", "first_2_layers"),
)
README_BUDGETS = (0.5, 0.8)
BEGIN, END = "<!-- tables: python benchmarks/selection.py --table docs -->", "<!-- end of tables -->"


# By method: color, marker and line of its curve.
STYLES = {
    "madtp_data": ("tab:blue", "o", "-"),
    "first_layer": ("tab:blue", "1", "--"),
    "first_2_layers": ("tab:blue", "2", ":"),
    "madtp_merge": ("tab:pink", "*", "-"),
    "merge_first_2_layers": ("tab:pink", "1", ":"),
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


def load(path: Path) -> dict | None:
    return json.loads(Path(path).read_text()) if Path(path).exists() else None


def summarise(rows: list[dict]) -> dict[str, dict[float, dict]]:
    """By method and asked reduction, over seeds: mean score, its standard deviation, mean reduction reached."""
    points = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for point in row["points"]:
            points[row["method"]][point["asked"]].append(point)

    def summary(of_seeds):
        mean, deviation = mean_and_deviation([point["score"] for point in of_seeds])
        reached = statistics.fmean(point["reached"] for point in of_seeds)
        return {"mean": mean, "deviation": deviation, "reached": reached, "seeds": len(of_seeds)}

    return {method: {asked: summary(found) for asked, found in of.items()} for method, of in points.items()}


def by_model(content: dict | None) -> dict[tuple[str, str], list[dict]]:
    """(task, model): its rows, in the order of `TASKS`."""
    found = defaultdict(list)
    for row in content["rows"] if content else ():
        found[row["task"], row["model"]].append(row)
    return dict(sorted(found.items(), key=lambda item: (list(TASKS).index(item[0][0]), item[0][1])))


def cell(summary: dict | None, asked: float) -> str:
    """Mean and standard deviation in percent; in brackets, with what was reached, where that isn't what was asked."""
    if summary is None:
        return ""
    text = f"{100 * summary['mean']:.1f}"
    if summary["deviation"] is not None:
        text += f" ± {100 * summary['deviation']:.1f}"
    return f"({text} at {summary['reached']:.2f})" if abs(summary["reached"] - asked) > MISSED else text


def _counted(summary: dict | None, asked: float, seeds: int) -> str:
    """Return a `cell`, with its number of seeds in square brackets if it has fewer than `seeds`."""
    few = summary is not None and summary["seeds"] < seeds
    return cell(summary, asked) + (f" [{summary['seeds']}]" if few else "")


def budget_table(summaries: dict, methods) -> list[str]:
    """A line a method, a column a budget."""
    pruned = [of for method, of in summaries.items() if not method.startswith("dense")]
    budgets = sorted({asked for of in pruned for asked in of})
    lines = []
    for method in methods:
        if method in summaries and not method.startswith("dense"):
            of = summaries[method]
            seeds = max(summary["seeds"] for summary in of.values())
            lines.append([LABELS[method], seeds, *(_counted(of.get(budget), budget, seeds) for budget in budgets)])
    return markdown(["method", "seeds", *(f"{budget:g}" if budget else "off" for budget in budgets)], lines)


def heading(task: str, model: str, summaries: dict, metric: str | None = None) -> str:
    """What is measured, and what the dense model has of it."""
    dense = [
        f"{LABELS[name]} {cell(summaries[name][0.0], 0.0)}"
        for name in ("dense", "dense_finetuned")
        if name in summaries
    ]
    metric = f"{metric or TASKS[task].headline_title} in percent"
    return f"**{TASKS[task].title}, `{model}`**: {metric}; {', '.join(dense) or 'dense not yet measured'}."


def tables_of(content: dict, needed: str) -> list[str]:
    """The tables of the models that have rows of the method `needed`."""
    lines = []
    for (task, model), rows in by_model(content).items():
        summaries = summarise(rows)
        if needed in summaries:
            lines += [heading(task, model, summaries, content.get("metric")), "", *budget_table(summaries, LABELS), ""]
    return lines


def own_table(content: dict) -> list[str]:
    """One checkpoint for all budgets beside one per budget, over the seeds that both have."""
    lines = []
    for (task, _), rows in by_model(content).items():
        for budget in (0.5, 0.8):
            own = {row["seed"]: row for row in rows if row["method"] == f"own_{budget}"}
            shared = {row["seed"]: row for row in rows if row["method"] == "madtp_data"}
            seeds = sorted(own.keys() & shared.keys())
            if not seeds:
                continue
            cells = []
            for of in (shared, own):
                points = [{**of[seed], "method": "of"} for seed in seeds]
                cells.append(cell(summarise(points)["of"][budget], budget))
            dense = cell(summarise(rows).get("dense", {}).get(0.0), 0.0)
            titles = TASKS[task].title, TASKS[task].headline_title
            lines.append([*titles, dense, f"{budget:g}", len(seeds), *cells])
    columns = ["task", "metric", "dense", "reduction", "seeds", "one checkpoint", "its own"]
    return markdown(columns, lines, left=2) if lines else []


def settings_line(content: dict) -> str:
    settings = content["settings"]
    text = (
        f"{settings['test_samples']} test samples, {settings['validation_samples']} validation samples to calibrate on"
    )
    return text + (f", {settings['steps']} steps of {settings['batch_size']}" if "steps" in settings else "")


# Further files of the studies, beside selection.json: what its table is headed, and a method that it has.
MORE = {
    "selection_finetuned_plain": "After fine-tuning, a model that nobody prepared",
    "selection_finetuned_dense_pass": "After fine-tuning with a dense pass in each step, a prepared model",
    "selection_finetuned_plain_150": "After fine-tuning for a quarter of the steps, a model that nobody prepared",
    "selection_photographs": "Photographs, without training",
    "selection_photographs_clip": "Photographs, CLIP without training",
    "selection_finetuned_photographs": "Photographs, after fine-tuning",
    "selection_finetuned_photographs_clip": "Photographs, CLIP after fine-tuning",
}


def all_tables(path: Path) -> list[str]:
    content, tuned = load(path), load(path.with_name(f"{path.stem}_finetuned.json"))
    more = {title: load(path.with_name(f"{name}.json")) for name, title in MORE.items()}
    parts = [(title, found, tables_of(found, "dense")) for title, found in more.items() if found]
    if content:
        parts.append(("Without training", content, tables_of(content, "dense")))
    if tuned:
        parts.append(("After fine-tuning, prepared models", tuned, tables_of(tuned, "tome")))
        parts.append(("One checkpoint for all budgets, or one per budget", tuned, [*own_table(tuned), ""]))
    return [
        line
        for title, of, lines in parts
        if len(lines) > 1 or title.startswith("After")
        for line in (f"### {title}", "", f"{settings_line(of)}.", "", *lines)
    ]


def readme_table(path: Path) -> list[str]:
    """Two dense models, pruned without training and fine-tuned."""
    lines = []
    for label, suffix, model, method in README_ROWS:
        of = summarise(by_model(load(path.with_name(f"{path.stem}{suffix}.json"))).get(("vqa", model), []))
        dense = cell(of.get("dense", {}).get(0.0), 0.0)
        lines.append([label, dense, *(cell(of.get(method, {}).get(budget), budget) for budget in README_BUDGETS)])
    return markdown(["MADTP", "dense", *(f"at {budget:g}" for budget in README_BUDGETS)], lines)


# Pictures

# By name, the studies whose panels they have.
PICTURES = {
    "selection": ["selection"],
    "selection_finetuned": ["selection_finetuned", "selection_finetuned_plain_150"],
    "selection_photographs": [
        "selection_photographs",
        "selection_finetuned_photographs",
        "selection_photographs_clip",
        "selection_finetuned_photographs_clip",
    ],
}


def draw_panel(axes, panel: tuple) -> None:
    """Draw a task and dense model; a band is the standard deviation over seeds, lines are the dense model."""
    (task, model), rows, content = panel
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
        title=f"{TASKS[task].title}, {content['study']}\n{model}",
        xlabel="reduction of FLOPs",
        ylabel=f"{content.get('metric') or TASKS[task].headline_title} %",
    )
    axes.grid(alpha=0.25)


def draw_all(path: Path) -> None:
    """Draw each picture of `PICTURES` whose results are there, beside them."""
    for picture, names in PICTURES.items():
        panels = [
            (key, rows, content)
            for name in names
            if (content := load(path.with_name(f"{name}.json")))
            for key, rows in by_model(content).items()
            if {"evit", "tome", "random"} & {row["method"] for row in rows}  # there is something to compare
        ]
        columns = 2 if len(panels) == 4 else 3
        lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
        if lines:
            draw_panels(lines, draw_panel, (4.2, 3.6), path.with_name(f"{picture}.png"))


def write_docs(path: Path, page: Path = ROOT / "docs" / "accuracy.md") -> None:
    """Put the tables between the page's marks, and draw the pictures beside the results."""
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(before + "\n".join([BEGIN, "", *all_tables(path), END]) + after)
    draw_all(path)


def print_tables(path: Path, which: str) -> None:
    if not path.exists():
        raise SystemExit(f"There is no {path}: run benchmarks/selection.py first, or pass its --output.")
    if which == "docs":
        write_docs(path)
    else:
        print("\n".join(readme_table(path) if which == "readme" else all_tables(path)))
