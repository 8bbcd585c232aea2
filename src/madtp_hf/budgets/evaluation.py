"""Evaluate a model at several budgets: its predictions, their FLOPs and their time."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm

from ..modeling.versions import VERSION as __version__
from ..tasks import TASKS, make_batches
from .flops import count_flops, dense_flops
from .passes import complete, decoder_tokens, encode, restored


@dataclass
class BudgetResult:
    """A model's predictions and their cost at one FLOPs reduction.

    reduction_asked, reduction_reached: shares of the FLOPs, the latter averaged over samples; gflops: per sample,
    averaged; seconds: time to predict; predictions: one per sample, in order.
    """

    reduction_asked: float
    reduction_reached: float
    gflops: float
    seconds: float
    predictions: list


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work; on a CPU, return at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()


@contextmanager
def record_branches(model, positions: bool = False):
    """Record the outputs of a model's encoders, whichever method runs them: `forward`, `generate` or another.

    Yields a dictionary that every run of an encoder updates: `"vision"` and, for a task with a text encoder, `"text"`,
    each a `BranchOutput`, with its `positions` if asked for.
    """
    task, outputs = TASKS[model.task], {}
    encoders = {"vision": model.vision_model}
    if task.text_encoder:
        encoders["text"] = getattr(model, task.text_encoder)

    def ask_for_positions(encoder, args, kwargs):
        return args, {**kwargs, "output_positions": True}

    hooks = []
    for name, encoder in encoders.items():

        def record(encoder, args, output, name=name):
            outputs[name] = output

        hooks.append(encoder.register_forward_hook(record))
        if positions:
            hooks.append(encoder.register_forward_pre_hook(ask_for_positions, with_kwargs=True))
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _token_counts(model, outputs: dict) -> dict[str, torch.Tensor]:
    """Return the token counts of recorded branches, as in the outputs of `forward`."""
    tokens = {f"{name}_tokens": output.num_tokens for name, output in outputs.items()}
    number = TASKS[model.task].num_images
    if "vision_tokens" in tokens and number > 1:  # the images of a sample are adjacent in the batch
        tokens["vision_tokens"] = tokens["vision_tokens"].unflatten(1, (-1, number)).mT
    return tokens


@contextmanager
def prepared(model, precision: str | None = None):
    """On a CPU, prepare a model for inference, unless it is; with a precision, in that one. Undo it on exit.

    Raises a `ValueError` for a precision on another device, whose weights would have to be cast for good.
    """
    model = getattr(model, "get_base_model", lambda: model)()
    before = model.inference_precision
    if model.device.type == "cpu":
        if precision is not None or before is None:
            model.prepare_for_inference(precision or "auto")
    elif precision not in (None, "auto"):
        raise ValueError(f"{precision=} on {model.device}: expected a model loaded with the dtype to evaluate.")
    try:
        yield
    finally:
        if model.device.type == "cpu":
            model.prepare_for_inference(before)


@torch.no_grad()
def evaluate_budgets(
    model,
    loader: Iterable[Mapping],
    reductions: Iterable[float],
    predict: Callable[[dict[str, torch.Tensor]], list] | None = None,
    accelerator=None,
    precision: str | None = None,
) -> list[BudgetResult]:
    """Run a model over a data set at several reductions, which take turns on each batch so that their times compare.

    Args:
        model (`MadtpBlipPreTrainedModel`): The calibrated model; its mode and temperature are restored afterwards.
        loader (`Iterable`): Batches as `forward` takes them; with `accelerator`, prepared by it.
        reductions (`list[float]`): The shares of FLOPs to save; 0 is off.
        predict (`Callable`, *optional*): `predict(batch)` returns a list of predictions, one per sample. Tokens are
            counted while it runs the encoders. If it doesn't run them on the whole batch at once, an extra, untimed
            pass counts them. By default nothing is predicted or timed, and the encoders alone run.
        accelerator (`accelerate.Accelerator`, *optional*): If given, results are gathered from all processes, and
            every process gets all of them.
        precision (`str`, *optional*): On a CPU, the precision of inference, see `prepare_for_inference`; by default,
        as
            the model is prepared, or `"auto"`.

    Returns:
        `list[BudgetResult]`, one per reduction.
    """

    def gather(values):
        return values if accelerator is None else accelerator.gather_for_metrics(values, use_gather_object=True)

    columns = ("predictions", "flops", "saved", "seconds")
    rows: dict[float, dict[str, list]] = {reduction: {name: [] for name in columns} for reduction in reductions}
    names = ["vision_tokens", "text_tokens"] if TASKS[model.task].text_encoder else ["vision_tokens"]
    with restored(model), prepared(model, precision), record_branches(model) as outputs:
        for batch in tqdm(loader, desc="evaluating", leave=False):
            batch = complete(model, batch)
            answer_tokens, batch_size = decoder_tokens(batch, model.task, model.config), len(batch["pixel_values"])
            for reduction, row in rows.items():
                model.set_pruning(reduction=reduction)
                outputs.clear()
                synchronize(model.device)
                started = time.perf_counter()
                predictions = predict(batch) if predict else []
                synchronize(model.device)
                row["seconds"].append(time.perf_counter() - started)
                tokens = _token_counts(model, outputs)
                if not all(name in tokens and tokens[name].shape[-1] == batch_size for name in names):
                    encode(model, batch)
                    tokens = _token_counts(model, outputs)
                counts = (tokens["vision_tokens"], tokens.get("text_tokens"), answer_tokens)
                flops = count_flops(model.config, model.task, *counts)
                dense = dense_flops(model.config, model.task, *counts)
                row["predictions"] += gather(predictions)
                row["flops"] += gather(flops.tolist())
                row["saved"] += gather((1 - flops / dense).tolist())
    return [
        BudgetResult(
            reduction,
            sum(row["saved"]) / len(row["saved"]),
            sum(row["flops"]) / len(row["flops"]) / 1e9,
            sum(row["seconds"]),
            row["predictions"],
        )
        for reduction, row in rows.items()
    ]


def evaluate_task(
    model, processor, rows: list[dict], reductions=None, batch_size: int = 16, precision: str | None = None
) -> list[dict]:
    """Evaluate a model with its task's metric at several FLOPs reductions.

    Args:
        model: One of this package's models, calibrated unless `reductions` is `[0]`.
        processor: Its processor.
        rows (`list[dict]`): As `madtp_hf.data.rows.load_rows` returns them, with the targets that the metric needs.
        reductions (`list[float]`, *optional*): By default 0 and those of the model's schedule.
        batch_size (`int`, *optional*, defaults to 16): Samples per batch.
        precision (`str`, *optional*): As in [`evaluate_budgets`].

    Returns:
        `list[dict]`: one row per budget: `precision` if one was given, `reduction asked`, `reached`, the metric's
        scores (shares where the name ends in "%"), `GFLOPs` of a sample and `times faster`.

    Raises:
        ValueError: if a row has no target, or a reduction is not in the schedule.
    """
    task = TASKS[model.task]
    for row in rows:
        if not any(row.get(name) not in (None, "", []) for name in task.target_columns):
            raise ValueError(
                f"{row[task.image_columns[0]]} has no {' or '.join(task.target_columns)}: expected them in each row,"
                f" for the metric {task.metric} compares predictions with them."
            )
    if reductions is None:
        reductions = [0.0, *model.config.calibrated_reductions]
    for reduction in reductions:  # fail before minutes of prediction
        model.setting_for(reduction)
    predict = task.predict and partial(task.predict, model, processor)
    batches = make_batches(model, processor, rows, batch_size)
    results = evaluate_budgets(model, batches, list(reductions), predict, precision=precision)
    if task.predict_all is not None:  # a sample's cost is that of one pass, the time that of comparing all
        with restored(model), prepared(model, precision):
            for result in results:
                model.set_pruning(reduction=result.reduction_asked)
                started = time.perf_counter()
                result.predictions = task.predict_all(model, processor, rows, batch_size)
                result.seconds = time.perf_counter() - started
    table = budget_rows(results, [task.score(result.predictions, rows) for result in results])
    return [{"precision": precision, **row} for row in table] if precision else table


def budget_rows(results: list[BudgetResult], scores: list[dict], seconds: list[float] | None = None) -> list[dict]:
    """Build the rows of a results table, one per budget.

    Args:
        results (`list[BudgetResult]`): What [`evaluate_budgets`] returned; `times faster` is than the first.
        scores (`list[dict]`): The metric's values by name, one dictionary per result.
        seconds (`list[float]`, *optional*): Times to show instead of the results' own.

    Returns:
        `list[dict]`: `reduction asked`, `reached`, the scores, `GFLOPs` of a sample and `times faster`.
    """
    seconds = seconds or [result.seconds for result in results]
    return [
        {
            "reduction asked": result.reduction_asked,
            "reached": result.reduction_reached,
            **score,
            "GFLOPs": result.gflops,
            "times faster": seconds[0] / time,
        }
        for result, score, time in zip(results, scores, seconds)
    ]


def conservative_budget(scores: dict[float, float], loss: float = 0.01) -> float:
    """Return the largest reduction that costs little on validation data: the budget to save a checkpoint at.

    Args:
        scores (`dict[float, float]`): A metric by reduction, where larger is better, on data that no result is
            reported on; 0 is pruning off.
        loss (`float`, *optional*, defaults to 0.01): How far the metric may be below its value with pruning off; 0.01
            is one point of a metric that is a share.

    Returns:
        `float`: one of the reductions; 0 if no other is good enough.

    Raises:
        ValueError: if `scores` has no 0.

    Example:

    ```python
    >>> conservative_budget({0.0: 0.934, 0.5: 0.931, 0.7: 0.926, 0.8: 0.908})
    0.7

    ```
    """
    if 0.0 not in scores:
        raise ValueError(f"scores at reductions {sorted(scores)}: expected one at 0, pruning off, to compare with.")
    return max(reduction for reduction, score in scores.items() if score >= scores[0.0] - loss - 1e-9)


def public_name(source) -> str:
    """Return the name of a model or data set: the last part of a folder's path, or a Hub id unchanged."""
    return Path(source).resolve().name if os.path.exists(source) else str(source)


def bare_name(column: str) -> str:
    """Return a column's name without the "%" that says that it holds shares: each of its cells has one."""
    return column.removesuffix("%").strip()


def show_number(name: str, value: float | str) -> str:
    """Format a number of a results table: as a percentage if its column's name says that it is a share."""
    if isinstance(value, str):
        return value
    return f"{value:.1%}" if name == "reached" or name.endswith("%") else f"{value:.4g}"


def report(title: str, rows: list[dict], folder, **facts) -> None:
    """Print rows as a table and write them to `folder`/results.json, with facts and library versions.

    rows: one per budget, by column name; a column whose name ends in "%" holds shares. facts: anything else to keep;
    `madtp_hf.checkpoints.card.create_model_card` says which of them a model card shows. Facts that are numbers or
    dictionaries of numbers are printed as well.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in rows[0]:
        table.add_column(bare_name(name), justify="right")
    for row in rows:
        table.add_row(*(show_number(name, value) for name, value in row.items()))
    Console(width=max(80, 16 * len(rows[0]))).print(table)
    for name, fact in facts.items():
        if isinstance(fact, dict) and all(isinstance(value, (int, float)) for value in fact.values()):
            shown = (f"{bare_name(key)} {show_number(key, value)}" for key, value in fact.items())
            print(f"{name.replace('_', ' ')}: " + ", ".join(shown))
        elif isinstance(fact, (int, float)):
            print(f"{name.replace('_', ' ')}: {fact:.4g}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    versions = {
        "madtp_hf": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    content = {"title": title, "results": rows, **facts, "versions": versions}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n")
