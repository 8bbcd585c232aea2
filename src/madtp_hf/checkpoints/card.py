"""Create model cards: what a checkpoint is, how to load it and what was measured, for people and for the Hub."""

import json
import math
import os
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig

from ..budgets.evaluation import bare_name, public_name, show_number
from ..tasks import Task, task_of


PICTURE = "budgets.png"
_TEMPLATE = Path(__file__).with_name("card_template.md")

# Columns of a results table that aren't metrics.
_BUDGET = "reduction asked"
_NO_METRICS = (_BUDGET, "reached", "GFLOPs", "time / dense")  # the last one is version 0.1.0's
_FASTER = "times faster"  # the beginning of columns of speed, for which a table may name the model's size
# What a card says of a pruning method; of one's own, its name.
_METHODS = {
    "madtp": "[MADTP](https://arxiv.org/abs/2403.02991): each layer drops the image and text tokens that matter to"
    " neither modality",
    "madtp_merge": "[MADTP](https://arxiv.org/abs/2403.02991) with merging: each layer merges the image and text"
    " tokens that matter to neither modality, or are similar to one that matters more, into the most similar ones that"
    " stay",
    "class_attention": "class attention under [MADTP](https://arxiv.org/abs/2403.02991)'s threshold",
    "evit": "[EViT](https://arxiv.org/abs/2202.07800): three layers drop the tokens that the class token attends to"
    " least",
    "tome": "[ToMe](https://arxiv.org/abs/2210.09461): each layer merges tokens that are alike",
    "random": "random choice, a baseline for other methods",
}


def _hub_ids(sources) -> list[str] | None:
    """Return the sources that are Hub ids; folders mean nothing in metadata."""
    sources = [sources] if isinstance(sources, (str, Path)) else sources or []
    return [str(source) for source in sources if not os.path.exists(source)] or None


def _is_metric(column: str) -> bool:
    return column not in _NO_METRICS and not column.startswith(_FASTER)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_row(row) -> bool:
    # A budget isn't the name of a metric: such a dictionary has another form.
    return (
        isinstance(row, dict)
        and any(map(_is_metric, row))
        and not any(name == "reduction" or _as_budget(name) is not None for name in row)
        and all(map(_is_number, row.values()))
    )


def _as_budget(name) -> float | None:
    """Return the reduction that a key stands for, 0.5 or "0.5"; None for any other key."""
    try:
        return float(name) if 0 <= float(name) < 1 else None
    except (TypeError, ValueError):
        return None


def _as_results(content):
    """Convert any form that metrics may have to the dictionary of a results.json, without checking the numbers."""
    if isinstance(content, list):
        content = {"results": content}
    elif isinstance(content, dict) and "results" not in content:
        # Facts, such as the data set's name, may accompany a row, or rows by budget.
        facts = {k: v for k, v in content.items() if isinstance(v, (str, dict)) and _as_budget(k) is None}
        row = {k: v for k, v in content.items() if k not in facts}
        by_budget = row and all(_as_budget(name) is not None and isinstance(v, dict) for name, v in row.items())
        rows = [{_BUDGET: _as_budget(name), **value} for name, value in row.items()] if by_budget else [row]
        content = {"results": rows, **facts}
    if isinstance(content, dict) and isinstance(content.get("results"), list):
        content = {**content, "results": [_name_budget(row) for row in content["results"]]}
    return content


def _name_budget(row):
    """Rename a row's "reduction" to the card's name for the budget.

    A row with both names stays unchanged, and is refused later.
    """
    if not isinstance(row, dict) or "reduction" not in row or _BUDGET in row:
        return row
    return {_BUDGET if name == "reduction" else name: value for name, value in row.items()}


def _read_metrics(metrics) -> dict:
    """Read metrics of any accepted form as the dictionary of a results.json; None and empty metrics give an empty one.

    Raises:
        ValueError: for a form that `create_model_card` doesn't accept.
    """
    if metrics is None or (isinstance(metrics, (dict, list)) and not metrics):
        return {}
    if isinstance(metrics, (str, os.PathLike)):
        try:
            content = json.loads(Path(metrics).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"metrics={str(metrics)!r} can't be read ({error}): expected a results.json.") from error
    else:
        try:  # numbers of numpy and torch become Python's
            content = json.loads(json.dumps(metrics, default=lambda value: value.item()))
        except (TypeError, ValueError, AttributeError, RuntimeError):
            content = None
    content = _as_results(content)
    rows = content.get("results") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows or not all(map(_is_row, rows)):
        raise ValueError(
            f"metrics={repr(metrics)[:200]}: expected the path of a results.json, its dictionary, a list of rows, one"
            " row per budget such as {0.5: {'accuracy': 0.93}}, a single row {'accuracy': 0.93}, or None; a row maps"
            " names to finite numbers, at least one of them a metric."
        )
    if len(rows) > 1 and len({row.get(_BUDGET) for row in rows}) < len(rows):
        raise ValueError(f"metrics={repr(metrics)[:200]}: expected a different {_BUDGET!r} in each of several rows.")
    return content


def _columns(rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _main_metric(results: dict) -> str:
    """Return the column of the main metric: the one that the results name, or their first metric."""
    metrics = list(filter(_is_metric, _columns(results["results"])))
    named = results.get("metric")
    return named if named in metrics else metrics[0]


def _table(rows: list[dict]) -> str:
    columns = _columns(rows)
    lines = ["| " + " | ".join(map(bare_name, columns)) + " |", "|" + "---:|" * len(columns)]
    lines += [
        "| " + " | ".join(show_number(name, row[name]) if name in row else "" for name in columns) + " |"
        for row in rows
    ]
    return "\n".join(lines)


def _sentence(metrics: dict) -> str:
    return ", ".join(
        f"{bare_name(name)} {show_number(name, value)}" for name, value in metrics.items() if _is_metric(name)
    )


def _at(row: dict) -> str:
    budget = row.get(_BUDGET)
    if budget is None:
        return ""
    return f" at {budget:g} reduction" if budget else ", pruning off"


def _remarks(results: dict, task: Task) -> list[str]:
    """Return sentences on the other results: before fine-tuning, the saved budget, the baseline, the time, ..."""
    remarks, trained = [], (results.get("settings") or {}).get("steps") != 0
    if results.get("dense_before_training") and trained:
        remarks.append(f"Before fine-tuning, pruning off: {_sentence(results['dense_before_training'])}.")
    if results.get("before_fine_tuning"):
        before = "; ".join(f"{_sentence(row)}{_at(row)}" for row in results["before_fine_tuning"])
        remarks.append(f"Before fine-tuning: {before}.")
    default = results.get("default_budget")
    if default:
        on = f"{bare_name(default['metric'])} on {default['samples']} validation samples is"
        points = f"{100 * default['loss']:g} point below that of pruning off"
        if default["reduction"]:
            remarks.append(f"Saved at {default['reduction']:g}, the largest reduction whose {on} at most {points}.")
        else:
            remarks.append(f"Saved with pruning off: at every reduction, {on} more than {points}.")
    baseline = results.get("baseline")
    if baseline is not None:
        baseline = baseline if isinstance(baseline, dict) else {_main_metric(results): baseline}
        remarks.append(f"{task.baseline}: {_sentence(baseline)}.")
    if _is_number(results.get("seconds")):
        machine = f" ({results['machine']})" if results.get("machine") else ""
        what = "Training and evaluation" if trained else "Evaluation"
        remarks.append(f"{what} took {results['seconds']:.0f} s{machine}.")
    if results.get("source"):
        remarks.append(f"Source: {results['source']}.")
    return remarks


def _dataset(results: dict) -> dict:
    dataset = results.get("dataset") or {}
    return {"name": dataset} if isinstance(dataset, str) else dataset


def _eval_results(results: dict, task: Task) -> list[EvalResult]:
    """Return each metric at each budget, for the card's model-index."""
    dataset = _dataset(results)
    name = dataset.get("name") or "not recorded"
    return [
        EvalResult(
            task_type=task.pipeline_tag or task.tags[0],
            dataset_type=dataset.get("type") or re.sub(r"[^\w/.]+", "-", name.lower()),
            dataset_name=name,
            dataset_split=dataset.get("split"),
            metric_type=bare_name(column),
            metric_value=value,
            metric_name=f"{bare_name(column)}{_at(row)}",
            metric_args={"reduction": row[_BUDGET]} if _BUDGET in row else None,
        )
        for row in results["results"]
        for column, value in row.items()
        if _is_metric(column)
    ]


def _loading(config, task, model_class: str, name: str) -> dict:
    """Return the template's values that say how to load a checkpoint."""
    is_ours = model_class.startswith("Madtp")
    with_code = is_ours and bool(getattr(config, "auto_map", None))
    on_hub = with_code and name.count("/") == 1 and not name.startswith(".")
    pin = ', revision="..."' if on_hub else ""
    # Weights stored in half precision would load in half precision, but images are preprocessed in float32.
    half = ', dtype="float32"' if str(getattr(config, "dtype", None)) in ("float16", "torch.float16") else ""
    if with_code:
        loader = task.auto_class
        imports = f"from transformers import {', '.join(sorted([loader, 'AutoProcessor']))}"
    elif is_ours:
        loader, imports = model_class, f"from transformers import AutoProcessor\n\nfrom madtp_hf import {model_class}"
    else:
        loader, imports = model_class, f"from transformers import AutoProcessor, {model_class}"
    return {
        "with_code": with_code,
        "on_hub": on_hub,
        "half": bool(half),
        "loader": loader,
        "imports": imports,
        "options": f"{pin}, trust_remote_code=True{half}" if with_code else half,
        # The tokenizer loads the configuration, which is code: without trust, the loader stops and asks the user.
        "processor_options": f"{pin}, trust_remote_code=True" if with_code else "",
    }


def _pruning(config) -> dict:
    """Return the template's values that say which budgets a checkpoint has, and at which one it loads."""
    schedule, reductions = (
        getattr(config, "pruning_schedule", None) or [],
        getattr(config, "calibrated_reductions", []),
    )
    setting = getattr(config, "pruning_setting", None) or {}
    original = getattr(config, "original_temperature", None)
    budget = "temperature=1.0" if original is None else f"temperature={original:g}"
    if schedule:
        budget = f"reduction={min(reductions, key=lambda r: abs(r - 0.5)):g}"
    reached = [
        f"reduction {entry['reduction']:g}"
        for entry in schedule
        if all(math.isclose(entry.get(name, value), value) for name, value in setting.items())
    ]
    numbers = [f"{name} {value:g}" for name, value in setting.items() if (name, value) != ("factor", 1)]
    return {
        "budget": budget,
        "reductions": ", ".join(f"{reduction:g}" for reduction in reductions),
        "several": len(schedule) > 1,
        "frozen": getattr(config, "pruning_granularity", None) == "frozen",
        "as_loaded": f"it prunes at {(reached or [' and '.join(numbers)])[0]}" if setting else "pruning is off",
    }


def _made(results: dict, base_model) -> str | None:
    """Return the sentence that says how a checkpoint was made: what it was trained on, and from which model."""
    settings = results.get("settings") or {}
    source = base_model or settings.get("from") or settings.get("model")
    source = f" from `{public_name(source)}`" if source else ""
    if settings.get("steps"):
        data = f" on {settings['training data']}" if settings.get("training data") else ""
        return f"Fine-tuned{source}{data}, {settings['steps']} steps."
    return f"Made{source}." if source else None


def _measured(results: dict, task) -> dict:
    """Return the template's values that say what was measured, on which data and with which settings."""
    dataset, settings = _dataset(results), results.get("settings") or {}
    name, title = dataset.get("name"), results.get("title")
    if name and title and name in title:
        where, title = f"On {title}", None
    else:
        where = f"On {name}" if name else "On data that is not recorded"
    where += f", {dataset['split']} split" if dataset.get("split") else ""
    shown = {k: ", ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for k, v in settings.items()}
    rows = ["| setting | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in shown.items())]
    return {
        "has_times": bool(results) and any(name.startswith(_FASTER) for name in _columns(results["results"])),
        "has_flops": bool(results) and "GFLOPs" in _columns(results["results"]),
        "table": _table(results["results"]) if results else None,
        "measured": where + (f": {title}." if title else "."),
        "metric": bare_name(_main_metric(results)) if results else None,
        "remarks": _remarks(results, task) if results else [],
        "settings": "\n".join(rows) if settings else None,
        "is_trained": settings.get("steps", 1) != 0,
        "versions": ", ".join(f"{package} {version}" for package, version in (results.get("versions") or {}).items()),
    }


def create_model_card(
    config, name, *, metrics=None, base_model=None, license=None, datasets=None, notes=None, plot=None
) -> ModelCard:
    """Create the model card of a checkpoint, pruned or dense.

    Args:
        config (`MadtpBlipConfig`, `MadtpClipConfig`, `BlipConfig` or `CLIPConfig`): The checkpoint's configuration.
            One of transformers' is dense. One of ours without `auto_map` is for a checkpoint without code, which this
            package loads; it is dense unless it has a schedule or a temperature.
        name (`str`): The title, and the name in the loading code: a Hub id `user/model`, whose revision the code pins,
            or the name of a folder.
        metrics (*optional*): What was measured: the path of a results.json as [`~madtp_hf.budgets.evaluation.report`]
            writes it, its dictionary, a list of its rows, or one row, such as `{"accuracy": 0.93}`. A column whose
            name ends in "%" holds shares. From the dictionary's facts, the card takes `metric` (the main column),
            `dataset` (a name, or a dictionary of `name`, `type`, `split` and an `example` of a text), `settings`,
            `versions`, `before_fine_tuning`, `dense_before_training`, `default_budget`, `baseline`, `seconds`,
            `machine` and `source`.
        base_model (`str`, *optional*): What the checkpoint was made from: a Hub id, or a folder, which the text names
            but the metadata does not.
        license (`str`, *optional*): As the Hub names it, such as `apache-2.0`.
        datasets (`str` or `list[str]`, *optional*): Hub ids of data sets; folders are left out.
        notes (`str`, *optional*): Markdown to put at the beginning.
        plot (`str`, *optional*): The file name of a picture by [`draw_budgets`] beside the card.

    Returns:
        `huggingface_hub.ModelCard`. All measurements in it come from `metrics`.

    Raises:
        ValueError: for a configuration of another model or task, or metrics of another form.
    """
    task, model_class = task_of(config)
    results = _read_metrics(metrics)
    loading = _loading(config, task, model_class, name)
    dense = (
        not loading["with_code"]
        and not getattr(config, "pruning_schedule", None)
        and not getattr(config, "pruning_setting", None)
    )
    method = getattr(config, "pruning_method", "madtp")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task.pipeline_tag,
        tags=[task.family.name.lower(), *([] if dense else [method, "token-pruning"]), *task.tags],
        base_model=next(iter(_hub_ids(base_model) or ()), None),
        datasets=_hub_ids(datasets),
        license=license,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=_eval_results(results, task) if results else None,
    )
    text = json.dumps(_dataset(results).get("example") or task.text)
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        title=name.rpartition("/")[2],
        what=task.what,
        dense=dense,
        pipeline=task.pipeline if loading["with_code"] else None,
        pipeline_call=(task.pipeline_call or "").format(text=text),
        quoted_name=json.dumps(name),
        usage=task.usage.format(text=text),
        family=task.family.name,
        pruned_class=task.model_class.__name__,
        image_size=config.vision_config.image_size,
        made=_made(results, base_model),
        method=_METHODS.get(method, f"the method `{method}`, whose code the checkpoint carries"),
        notes=notes.strip() if notes else None,
        plot=plot,
        license=license,
        **loading,
        **_pruning(config),
        **_measured(results, task),
    )


def draw_budgets(metrics, path) -> bool:
    """Plot the metric against GFLOPs, one point per budget, to a PNG file.

    Args:
        metrics: as [`create_model_card`] takes them.
        path (`str` or `Path`): the file to write.

    Returns:
        `bool`: False if nothing was drawn, because fewer than two budgets have their GFLOPs or matplotlib is not
        installed.

    Raises:
        ValueError: for metrics of another form.
    """
    results = _read_metrics(metrics)
    column = _main_metric(results) if results else None
    rows = [row for row in results.get("results", []) if {_BUDGET, "GFLOPs", column} <= set(row)]
    if column is None or len(rows) < 2:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    # Without pyplot: no window, and no effect on the caller's own figures.
    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = sorted(rows, key=lambda row: row["GFLOPs"])
    scale = 100 if column.endswith("%") else 1
    axes.plot([row["GFLOPs"] for row in rows], [scale * row[column] for row in rows], marker="o")
    for row in rows:
        label = f"{row[_BUDGET]:g}" if row[_BUDGET] else "off"
        point = row["GFLOPs"], scale * row[column]
        axes.annotate(label, point, xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set(xlabel="GFLOPs of a sample (labels: reduction asked for)", ylabel=column)
    axes.margins(y=0.2)
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png")
    return True


def make_card(folder: Path, name: str, metrics, picture: Path, **facts) -> ModelCard:
    """Create the card of the checkpoint in a folder, and draw its plot to `picture`.

    If `metrics` is None, the folder's results.json is used, if there is one.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not (folder / f"modeling_{config.model_type}.py").exists():
        config.auto_map = None
    if metrics is None and (folder / "results.json").exists():
        metrics = folder / "results.json"
    plot = picture.name if draw_budgets(metrics, picture) else None
    return create_model_card(config, name, metrics=metrics, plot=plot, **facts)


def write_model_card(folder, name=None, metrics=None, **facts) -> ModelCard:
    """Write a saved checkpoint's README.md, and its budgets.png if there are budgets to plot.

    Args:
        folder (`str` or `Path`): the checkpoint's, with its config.json.
        name (`str`, *optional*): as [`create_model_card`] takes it; by default the folder's name.
        metrics (*optional*): as [`create_model_card`] takes them; by default the folder's results.json, if there is
            one.
        **facts: the other arguments of [`create_model_card`].

    Returns:
        `huggingface_hub.ModelCard`: the card that was written.

    Raises:
        ValueError: as [`create_model_card`].
        OSError: if there is no configuration in the folder.
    """
    folder = Path(folder)
    card = make_card(folder, name or folder.resolve().name, metrics, folder / PICTURE, **facts)
    card.save(folder / "README.md")
    return card
