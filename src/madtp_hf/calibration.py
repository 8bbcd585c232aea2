"""Calibration: which pruning temperature saves which share of a model's FLOPs."""

import math
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm

from .flops import reduction_of_flops


TOLERANCE = 0.002  # of the reduction; a search that comes this close stops
ACCEPTED = 0.02  # and one that ends this close has found it
MAX_PASSES = 14  # over the data, for one reduction
SCAN = [10.0**exponent for exponent in range(-12, 7)]  # temperatures that the search starts from
SCAN_SAMPLES = 8
STARTS = {
    "vqa": "decoder_input_ids",
    "captioning": "input_ids",
}  # where a decoder's start token goes, if a batch has no answers


def decoder_tokens(batch, task: str, config) -> torch.Tensor | int:
    """How many tokens the decoder of an answer or a caption reads for each sample of a batch (B,), padding not counted; 0 without one."""
    names = {"vqa": ("decoder_input_ids", "labels"), "captioning": ("input_ids", "labels")}.get(task, ())
    read = next((batch[name] for name in names if batch.get(name) is not None), None)
    if read is None:
        return 0
    if task == "captioning" and batch.get("attention_mask") is not None and read is batch.get("input_ids"):
        return batch["attention_mask"].sum(dim=1)
    return ((read != -100) & (read != config.text_config.pad_token_id)).sum(dim=1)


def measure(model, batch, output) -> torch.Tensor:
    """The reduction of FLOPs of each sample (B,) of a batch, from what the model has put out."""
    tokens = decoder_tokens(batch, model.task, model.config)
    return reduction_of_flops(model.config, model.task, output.vision_tokens, output.text_tokens, tokens)


def complete(model, batch) -> dict[str, torch.Tensor]:
    """A batch's tensors, on the model's device; where a decoder has nothing to read, its start token."""
    batch = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    if model.task in STARTS and not any(name in batch for name in (STARTS[model.task], "labels")):
        start = model.config.text_config.bos_token_id
        batch[STARTS[model.task]] = torch.full((len(batch["pixel_values"]), 1), start, device=model.device)
    return batch


@contextmanager
def restored(model):
    """Leave a model in the mode and at the temperature that it had."""
    training, temperature = model.training, model.config.pruning_temperature
    try:
        yield model.eval()
    finally:
        model.train(training)
        model.config.pruning_temperature = temperature


@torch.no_grad()
def measure_reduction(model, batches, temperature: float) -> float:
    """The mean reduction of FLOPs over the samples of `batches` (dicts of what `forward` takes) at a temperature."""
    model.set_pruning(temperature=temperature)
    reductions = []
    for batch in batches:
        batch = complete(model, batch)
        reductions.append(measure(model, batch, model(**batch)))
    return torch.cat(reductions).mean().item()


def calibrate(model, dataloader, reductions) -> list[list[float]]:
    """Find the pruning temperatures at which a model saves given shares of its FLOPs, and write them into its configuration.

    No training, no gradients: the reduction is measured at a few temperatures and bracketed. It need not grow with the temperature
    everywhere; of the temperatures that reach a reduction, the search takes those where it grows.

    Args:
        model (`MadtpBlipPreTrainedModel`):
            The model; afterwards it has a schedule, `model.set_pruning(reduction=...)` works, and its temperature is what it was.
        dataloader (`Iterable`):
            Batches as `forward` takes them, dicts of tensors. It is read several times; a few hundred samples are enough.
        reductions (`list[float]`):
            The shares of FLOPs to save, each in [0, 1); 0 is off and needs no temperature.

    Returns:
        `list[list[float]]`: the schedule, pairs of a reduction and its temperature.

    Raises:
        ValueError: if a reduction is out of bounds or the model can't reach it on this data; its old schedule is kept.
    """
    targets = sorted({float(reduction) for reduction in reductions} - {0.0})
    if not targets or not all(0 < target < 1 for target in targets):
        raise ValueError(
            f"reductions={list(reductions)!r}: expected numbers between 0 and 1, shares of FLOPs to save."
        )
    if iter(dataloader) is dataloader:
        raise ValueError(
            "dataloader can be read only once, it is an iterator: expected a DataLoader or a list of batches."
        )
    first = next(iter(dataloader), None)
    if first is None:
        raise ValueError("dataloader gave no batch: expected at least one.")

    with restored(model), tqdm(desc="calibrating", unit=" passes", leave=False) as progress:
        measured: dict[float, float] = {}  # log temperature -> reduction, on all of the data

        def reduction_at(log_temperature):
            if log_temperature not in measured:
                measured[log_temperature] = measure_reduction(model, dataloader, math.exp(log_temperature))
                progress.update()
            return measured[log_temperature]

        # Where it grows: from its lowest point to its highest, as a few samples show them.
        few = {name: value[:SCAN_SAMPLES] for name, value in first.items() if isinstance(value, torch.Tensor)}
        scan = []
        for temperature in SCAN:
            scan.append((math.log(temperature), measure_reduction(model, [few], temperature)))
        top = max(range(len(scan)), key=lambda i: scan[i][1])
        bottom = min(range(top + 1), key=lambda i: scan[i][1])
        curve = scan[bottom : top + 1]

        schedule = []
        for target in targets:
            crossing = [i for i in range(1, len(curve)) if curve[i - 1][1] <= target <= curve[i][1]]
            middle = crossing[-1] if crossing else (1 if target < curve[0][1] else len(curve) - 1)
            low, high = curve[max(middle - 1, 0)][0], curve[min(middle, len(curve) - 1)][0]
            # One batch differs from all of the data: widen until they bracket the target, or the curve ends.
            while reduction_at(low) > target and low > curve[0][0]:
                low = max(point for point, _ in curve if point < low)
            while reduction_at(high) < target and high < curve[-1][0]:
                high = min(point for point, _ in curve if point > high)
            for _ in range(MAX_PASSES):
                best = min((low, high), key=lambda point: abs(reduction_at(point) - target))
                if abs(reduction_at(best) - target) <= TOLERANCE or not reduction_at(low) < target < reduction_at(
                    high
                ):
                    break
                share = (target - reduction_at(low)) / (reduction_at(high) - reduction_at(low))
                point = low + (high - low) * min(max(share, 0.1), 0.9)
                if reduction_at(point) < target:
                    low = point
                else:
                    high = point
            best = min(measured, key=lambda point: abs(measured[point] - target))
            if abs(measured[best] - target) > ACCEPTED:
                raise ValueError(
                    f"reduction={target} is out of this model's reach on this data: the nearest that a temperature gives is"
                    f" {measured[best]:.3f}, and all of them lie between about {curve[0][1]:.2f} and {curve[-1][1]:.2f}."
                    " Ask for one in there, give more samples if it is in there, or fine-tune with"
                    f" `madtp_hf.ReductionCallback({target})` first."
                )
            schedule.append([target, math.exp(best)])

    model.config.pruning_schedule = schedule
    return schedule
