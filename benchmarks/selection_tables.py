"""Tables and pictures of what selection.py and selection_finetuned.py have measured.

python benchmarks/selection.py --table          # docs/accuracy.md's tables, in Markdown
python benchmarks/selection.py --table docs     # writes them into docs/accuracy.md, and draws the pictures
python benchmarks/selection.py --table readme   # the short one
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from selection_tasks import MISSED, ROOT

from madtp_hf.tasks import TASKS


# In the order of the tables: the name that is shown.
LABELS = {
    "dense": "dense",
    "dense_finetuned": "dense, fine-tuned",
    "madtp_data": "MADTP, alignment tokens from data",
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
README_LABELS = {
    "madtp_data": "MADTP, alignment from data",
    "madtp": "MADTP, random alignment",
    "class_attention": "class attention alone",
    "evit": "EViT",
    "tome": "ToMe",
    "random": "random tokens",
}
README_MODELS = {"prepared": "blip-vqa-digits", "plain": "blip-vqa-digits-plain"}
README_BUDGETS = (0.5, 0.7, 0.8)
BEGIN, END = "<!-- tables: python benchmarks/selection.py --table docs -->", "<!-- end of tables -->"


def load(path: Path) -> dict | None:
    return json.loads(Path(path).read_text()) if Path(path).exists() else None


def summarise(rows: list[dict]) -> dict[str, dict[float, dict]]:
    """By method and asked reduction, over seeds: mean score, its standard deviation, mean reduction reached."""
    points = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for point in row["points"]:
            points[row["method"]][point["asked"]].append(point)

    def summary(of_seeds):
        scores = [point["score"] for point in of_seeds]
        return {
            "mean": statistics.fmean(scores),
            "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
            "reached": statistics.fmean(point["reached"] for point in of_seeds),
            "seeds": len(scores),
        }

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


def budget_table(summaries: dict, methods) -> list[str]:
    """A line a method, a column a budget."""
    budgets = sorted({asked for of in summaries.values() for asked in of if asked > 0})
    lines = ["| method | seeds | " + " | ".join(f"{budget:g}" for budget in budgets) + " |"]
    lines.append("|---|---:|" + "---:|" * len(budgets))
    for method in methods:
        if method in summaries and not method.startswith("dense"):
            of = summaries[method]
            seeds = max(summary["seeds"] for summary in of.values())
            cells = [cell(of.get(budget), budget) for budget in budgets]
            lines.append(f"| {LABELS[method]} | {seeds} | " + " | ".join(cells) + " |")
    return lines


def heading(task: str, model: str, summaries: dict) -> str:
    """What is measured, and what the dense model has of it."""
    dense = [
        f"{LABELS[name]} {cell(summaries[name][0.0], 0.0)}"
        for name in ("dense", "dense_finetuned")
        if name in summaries
    ]
    metric = f"{TASKS[task].headline_title} in percent"
    return f"**{TASKS[task].title}, `{model}`**: {metric}; {', '.join(dense) or 'dense not yet measured'}."


def training_free_tables(content: dict) -> list[str]:
    lines = []
    for (task, model), rows in by_model(content).items():
        summaries = summarise(rows)
        lines += [heading(task, model, summaries), "", *budget_table(summaries, LABELS), ""]
    return lines


def fine_tuned_tables(content: dict) -> list[str]:
    lines = []
    for (task, model), rows in by_model(content).items():
        summaries = summarise(rows)
        if "tome" in summaries:
            lines += [heading(task, model, summaries), "", *budget_table(summaries, LABELS), ""]
    return lines


def own_table(content: dict) -> list[str]:
    """One checkpoint for all budgets beside one per budget, over the seeds that both have."""
    lines = [
        "| task | metric | dense | reduction | seeds | one checkpoint | its own |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
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
            title = f"{TASKS[task].title} | {TASKS[task].headline_title} | {dense}"
            lines.append(f"| {title} | {budget:g} | {len(seeds)} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def settings_line(content: dict) -> str:
    settings = content["settings"]
    text = (
        f"{settings['test_samples']} test samples, {settings['validation_samples']} validation samples to calibrate on"
    )
    return text + (f", {settings['steps']} steps of {settings['batch_size']}" if "steps" in settings else "")


def all_tables(path: Path) -> list[str]:
    content, tuned = load(path), load(path.with_name(f"{path.stem}_finetuned.json"))
    lines = []
    if content:
        lines += ["### Without training", "", f"{settings_line(content)}.", "", *training_free_tables(content)]
    if tuned:
        lines += ["### After fine-tuning", "", f"{settings_line(tuned)}.", "", *fine_tuned_tables(tuned)]
        own = own_table(tuned)
        if own:
            lines += [
                "### One checkpoint for all budgets, or one per budget",
                "",
                f"{settings_line(tuned)}.",
                "",
                *own,
                "",
            ]
    return lines


def readme_table(path: Path) -> list[str]:
    """Two dense models side by side."""
    models = by_model(load(path))
    summaries = {name: summarise(models.get(("vqa", model), [])) for name, model in README_MODELS.items()}
    columns = [(of, budget) for of in summaries.values() for budget in README_BUDGETS]
    heads = [f"{name}, {budget:g}" for name in summaries for budget in README_BUDGETS]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(columns)]
    lines.append("| dense | " + " | ".join(cell(of.get("dense", {}).get(0.0), 0.0) for of, _ in columns) + " |")
    for method, label in README_LABELS.items():
        if any(method in of for of in summaries.values()):
            cells = [cell(of.get(method, {}).get(budget), budget) for of, budget in columns]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def write_docs(path: Path, page: Path = ROOT / "docs" / "accuracy.md") -> None:
    """Put the tables between the page's marks, and draw the pictures beside the results."""
    from selection_plot import draw_all

    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(before + "\n".join([BEGIN, "", *all_tables(path), END]) + after)
    draw_all(path)


def print_tables(path: Path, which: str) -> None:
    path = Path(path)
    if not path.exists():
        raise SystemExit(f"There is no {path}: run benchmarks/selection.py first, or give its --output.")
    if which == "docs":
        write_docs(path)
    else:
        print("\n".join(readme_table(path) if which == "readme" else all_tables(path)))
