"""Calibration: find the settings of a model's pruning method that save given shares of its FLOPs."""

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping

import torch
from tqdm.auto import tqdm

from ..modeling.configuration_pruning import MODALITIES
from ..modeling.pruning_method import Path
from .flops import reduction_of_flops
from .passes import complete, decoder_tokens, encode, restored


TOLERANCE = 0.003  # of the reduction: a search stops when it is this close to its target
ACCEPTED = 0.01  # a search that ends this close has succeeded; a larger standard error of the mean gives a warning
MAX_PASSES = 14  # over the data, for each reduction
SCAN_SAMPLES = 4


@torch.no_grad()
def measure_reduction(model, batches, **setting: float) -> float:
    """Return the mean FLOPs reduction over the samples of `batches` at a setting of the model's method.

    batches: dicts of what `forward` takes.
    """
    return _run(model, batches, setting)[0].mean().item()


@torch.no_grad()
def _run(model, batches, setting: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Run one pass over the data.

    Returns each sample's reduction, and each branch's token counts of all samples in the layout of the model's
    outputs, on the CPU.
    """
    vision, text, answers = [], [], []
    with model.pruning(**setting):
        for batch in batches:
            batch = complete(model, batch)
            output = encode(model, batch)
            vision.append(output.vision_tokens)
            text.append(output.text_tokens)
            tokens = torch.as_tensor(decoder_tokens(batch, model.task, model.config))
            answers.append(tokens.expand(vision[-1].shape[-1]))
        pruning = model.start_pass()
    counts = [None if parts[0] is None else torch.cat(parts, dim=-1).cpu() for parts in (vision, text, answers)]
    reductions = reduction_of_flops(model.config, model.task, *counts, pruning=pruning)
    return reductions, dict(zip(MODALITIES, counts))


class _Curve:
    """The reduction as a function of the point on the path, measured on all of the data and cached."""

    def __init__(self, model, batches, path, progress):
        self.model, self.batches, self.path, self.progress = model, batches, path, progress
        self.reductions: dict[float, float] = {}
        self.spreads: dict[float, float] = {}  # the standard deviation over samples
        self.num_samples = 0
        self.tokens: dict[float, dict[str, torch.Tensor | None]] = {}

    def at(self, point: float) -> float:
        if point not in self.reductions:
            of_samples, self.tokens[point] = _run(self.model, self.batches, self.path.setting(point))
            self.reductions[point], self.num_samples = of_samples.mean().item(), len(of_samples)
            self.spreads[point] = of_samples.std().item() if len(of_samples) > 1 else math.nan
            self.progress.update()
        return self.reductions[point]

    def nearest(self, target: float) -> float:
        return min(self.reductions, key=lambda point: abs(self.reductions[point] - target))


def _scan(model, batch, progress) -> tuple[list[tuple[float, float]], Path]:
    """Measure the reduction along the method's path on a few samples.

    Returns (point, reduction) pairs up to the largest reduction, and the path.
    """
    few = {name: value[:SCAN_SAMPLES] for name, value in batch.items() if isinstance(value, torch.Tensor)}

    def measure(setting):
        progress.update()
        return measure_reduction(model, [few], **setting)

    present = model.config.pruning_setting
    settings = [] if present is None else [model.pruning_method.read_setting(present)]
    path, scan = model.pruning_method.scan(model.config, settings, measure)
    top = max(range(len(scan)), key=lambda i: scan[i][1])
    return scan[: top + 1], path


def _search(curve: _Curve, scan: list[tuple[float, float]], target: float) -> None:
    """Measure the curve at points closer and closer to where it reaches a target."""

    def reached():
        return abs(curve.reductions[curve.nearest(target)] - target) <= TOLERANCE

    def last_crossing(curve_points):
        """Return the last two neighbouring points between which the curve rises past the target, or None."""
        pairs = [(a, b) for (a, below), (b, above) in itertools.pairwise(curve_points) if below <= target <= above]
        return pairs[-1] if pairs else None

    # Start from what searches for other targets measured on all of the data, else from the scan of a few samples.
    # The bracket is widened until it contains the target on all of the data, or the curve ends.
    points = [point for point, _ in scan]
    bracket = last_crossing(sorted(curve.reductions.items())) or last_crossing(scan)
    low, high = bracket or ((points[0], points[0]) if target < scan[0][1] else (points[-1], points[-1]))
    while curve.at(low) > target and low > points[0]:
        low, high = max(point for point in points if point < low), low
    while curve.at(high) < target and high < points[-1]:
        low, high = high, min(point for point in points if point > high)
    for number in range(MAX_PASSES):
        if reached() or not curve.at(low) < target < curve.at(high):
            return
        share = (target - curve.at(low)) / (curve.at(high) - curve.at(low))
        # Every third step bisects: where the curve is steep, linear interpolation moves only one end.
        point = low + (high - low) * (0.5 if number % 3 == 2 else min(max(share, 0.1), 0.9))
        if curve.at(point) < target:
            low = point
        else:
            high = point


def _fixed_counts(tokens: torch.Tensor, scale: float, least: int) -> list[int]:
    """Return how many tokens each layer should leave, from measured token counts (layers + 1, samples) of a branch.

    Row 0 counts the tokens that enter the branch, row l those that layer l leaves. A layer's number is the one whose
    mean over the samples, capped by each sample's length, equals the measured mean: a short text can't leave more
    tokens than it has. `scale` below 1 leaves fewer, but at least `least`, the smallest number that a pruning layer
    leaves.
    """
    enter = tokens[0].float()
    longest = max(int(enter.amax()), least)
    capped = torch.minimum(enter, torch.arange(longest + 1).unsqueeze(1)).mean(dim=1)
    counts = torch.searchsorted(capped, tokens[1:].float().mean(dim=1) * scale - 1e-4).clamp(least, longest)
    return counts.cummin(0).values.tolist()


def _freeze(model, batches, entry: dict, tokens: dict[str, torch.Tensor | None], progress) -> dict:
    """Return the entry of `pruning_token_counts` that saves an entry of the schedule's reduction.

    It holds the counts of the entry's setting, scaled until they save it.
    """
    config = model.config
    setting = {name: value for name, value in entry.items() if name != "reduction"}
    few, many, scale, found = 0.5, 1.5, 1.0, []
    for _ in range(MAX_PASSES):
        vision, text = (
            None if branch is None else _fixed_counts(branch.flatten(1), scale, least)
            for branch, least in zip(tokens.values(), config._least_token_counts)
        )
        counts = {**setting, "vision": vision, "text": text or [3] * config.text_config.num_hidden_layers}
        config.pruning_granularity, config.pruning_token_counts = "frozen", [counts]
        reduction = measure_reduction(model, batches, **setting)
        progress.update()
        found.append((abs(reduction - entry["reduction"]), counts))
        if found[-1][0] <= TOLERANCE or many - few < 1e-3:
            break
        if reduction > entry["reduction"]:
            few = scale
        else:
            many = scale
        scale = (few + many) / 2
    return min(found, key=lambda pair: pair[0])[1]


def read_reductions(reductions) -> list[float]:
    """Return the reductions to calibrate, sorted and without 0.

    Raises:
        TypeError: if `reductions` isn't a list of numbers.
        ValueError: if a reduction is outside [0, 1), or none but 0 is given.
    """
    try:
        given = list(reductions)
        if not all(hasattr(one, "__float__") for one in given):
            raise TypeError
    except TypeError:  # also of `list`, for a single number
        expected = "a list of numbers between 0 and 1, such as [0.3]"
        raise TypeError(f"reductions={reductions!r}: expected {expected}.") from None
    targets = sorted({float(reduction) for reduction in given} - {0.0})
    if not targets or not all(0 < target < 1 for target in targets):
        raise ValueError(f"reductions={given!r}: expected numbers between 0 and 1, shares of FLOPs to save.")
    return targets


def _check_batch(model, batch) -> None:
    """Raise a `TypeError` unless a batch has images as `forward` takes them: a data set's rows have none, or one."""
    dims = 5 if model.task == "nlvr2" else 4
    pixels = batch.get("pixel_values") if isinstance(batch, Mapping) else None
    if not isinstance(pixels, torch.Tensor) or pixels.ndim != dims:
        held = f"a {type(batch).__name__}"
        if isinstance(pixels, torch.Tensor):
            held = f"pixel_values of shape {tuple(pixels.shape)}"
        elif isinstance(batch, Mapping):
            held = f"dicts of {', '.join(batch)}"
        raise TypeError(
            f"dataloader yields {held}, not batches as `forward` takes them: for a data set of rows, pass"
            " DataLoader(rows, batch_size=32, collate_fn=collator) with the task's collator in madtp_hf.data."
        )


def _report_unreached(unreached: list[float], curve: _Curve, scan, nothing_reached: bool) -> None:
    """Warn about reductions that the model can't reach; raise a `ValueError` if it reaches none."""
    named = ", ".join(f"{target} (nearest {curve.reductions[curve.nearest(target)]:.3f})" for target in unreached)
    # What was measured on all of the data goes before the few samples of the scan.
    known = {**dict((scan[0], scan[-1])), **curve.reductions}.values()
    finding = (
        f"this model can't reach {named} on this data to within {ACCEPTED}; the largest reduction that it reaches is"
        f" about {max(known):.3f}, the smallest about {min(known):.3f}. Ask for one between these two. To reach a"
        f" larger one, first fine-tune with `madtp_hf.ReductionCallback({unreached[-1]})`. If one between them was"
        " left out, pass more samples."
    )
    if nothing_reached:
        raise ValueError(f"reductions={unreached}: {finding}")
    warnings.warn(f"Left out of the schedule: {finding}", stacklevel=3)


def _report_spread(curve: _Curve, found: list[float]) -> None:
    """Warn if the samples' reductions at the points found vary too much for so few samples to estimate the mean."""
    number = curve.num_samples
    spread = max((curve.spreads[point] for point in found), default=0.0)
    finding = "1 sample, which doesn't show how much samples differ: pass a few hundred."
    if number > 1:
        error = spread / math.sqrt(number)
        finding = (
            f"{number} samples, too few to trust: their reductions have a standard deviation of {spread:.3f}, and the"
            f" mean's standard error is {error:.3f}. Pass at least {math.ceil((spread / ACCEPTED) ** 2)} samples for"
            f" {ACCEPTED}."
        )
    if found and (number < 2 or error > ACCEPTED):
        warnings.warn(f"The schedule rests on {finding}", stacklevel=3)


def calibrate(
    model, dataloader: Iterable[Mapping], reductions: Iterable[float], freeze: bool = False
) -> list[dict[str, float]]:
    """Find the settings that save given shares of a model's FLOPs, and write them into its configuration.

    This needs no training, no gradients and no labels. The reduction is measured at a few points of the pruning
    method's path, from no pruning to most, and each target is bracketed. For MADTP, a factor on the threshold rises to
    1 at a low temperature, then the temperature rises. The reduction need not increase everywhere along the path; if
    several points reach a target, the search takes one where the reduction increases. A model trained with
    `ReductionCallback` is calibrated on the path that it was trained on.

    It takes about three forward passes over the data for each reduction, up to 14 more with `freeze`, and about 30
    passes over 4 samples. Five reductions on 512 samples take about as long as 15 x 512 samples, including reading
    them.

    Args:
        model (`MadtpBlipPreTrainedModel`): The model. Afterwards it has a schedule and
            `model.set_pruning(reduction=...)` works; its setting is unchanged.
        dataloader (`Iterable`): Batches as `forward` takes them, dicts of tensors. Labels aren't needed: without them,
            FLOPs count only the decoder's start token. It is read once per pass; a few hundred samples are enough. If
            the standard error of the mean reduction is above 0.01, a warning says how many samples are needed.
        reductions (`list[float]`): The shares of FLOPs to save, each in [0, 1); 0 is off and needs no setting. A
            reduction that this model can't reach on this data is left out, with a warning that names the largest
            reachable one; the others are kept.
        freeze (`bool`, *optional*, defaults to `False`): Whether to fix how many tokens each layer leaves as well, to
            the mean over the samples. Shapes then depend on the input's shape alone, as CUDA graphs, `torch.export`
            and ONNX need. The model's granularity becomes `"frozen"` (a frozen model stays frozen), and pruning is off
            until a reduction is set. Set the granularity to `"instance"` to give every sample its own number of tokens
            again.

    Returns:
        `list[dict]`: the schedule, `{"reduction": ..., "temperature": ..., "factor": ...}`, or the setting of the
        model's other method.

    Raises:
        TypeError: if `reductions` isn't a list of numbers.
        ValueError: if a reduction is out of bounds, none of them can be reached on this data, or `dataloader` is an
            iterator or empty; the old schedule stays.
    """
    targets = read_reductions(reductions)
    if iter(dataloader) is dataloader:
        raise ValueError(
            "dataloader is an iterator, which can be read only once: expected a DataLoader or a list of batches."
        )
    first = next(iter(dataloader), None)
    if first is None:
        raise ValueError("dataloader yields no batch: expected at least one.")
    _check_batch(model, first)

    freeze = freeze or model.config.pruning_granularity == "frozen"
    schedule, unreached, counts, found = [], [], [], []
    with restored(model), tqdm(desc="calibrating", unit=" passes", leave=False) as progress:
        if model.config.pruning_granularity == "frozen":
            model.config.pruning_granularity = "instance"
        scan, path = _scan(model, first, progress)
        curve = _Curve(model, dataloader, path, progress)
        for target in targets:
            _search(curve, scan, target)
            best = curve.nearest(target)
            if abs(curve.reductions[best] - target) <= ACCEPTED:
                schedule.append({"reduction": target, **path.setting(best)})
                found.append(best)
            else:
                unreached.append(target)
        if unreached:
            _report_unreached(unreached, curve, scan, nothing_reached=not schedule)
        _report_spread(curve, found)
        if freeze and not model.pruning_method.has_fixed_counts:
            for entry, point in zip(schedule, found):
                counts.append(_freeze(model, dataloader, entry, curve.tokens[point], progress))

    model.config.pruning_schedule = schedule
    model.config.pruning_token_counts = counts or None
    if freeze:
        model.config.pruning_granularity = "frozen"
        model.set_pruning(None)
    return schedule
