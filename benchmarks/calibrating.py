"""Calibrate models of which not every reduction is in reach."""

import warnings

from madtp_hf import calibrate
from madtp_hf.budgets.calibration import measure_reduction


def nearest_setting(model, batch: dict, target: float) -> dict[str, float]:
    """Return the setting on the method's path whose reduction of a batch comes nearest to a target out of reach."""
    method, present = model.pruning_method, model.config.pruning_setting
    path = method.path(model.config, [] if present is None else [method.read_setting(present)])
    settings = [path.setting(point) for point in path.points[1:]]
    return min(settings, key=lambda setting: abs(measure_reduction(model, [batch], **setting) - target))


def calibrate_all(model, batches: list[dict], reductions: list[float], freeze: bool = False) -> list[float]:
    """Calibrate a model for all reductions, so that a long benchmark doesn't fail because one is out of reach.

    Such a reduction gets the nearest setting that there is; with `freeze`, which records token counts, it is left out.
    Returns the reductions in the schedule.
    """
    if not reductions:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about reductions out of reach and few samples
        try:
            schedule = calibrate(model, batches, reductions, freeze)
        except ValueError:  # none of them is in reach
            schedule = []
    missing = sorted(set(reductions) - {entry["reduction"] for entry in schedule})
    if missing:
        what = "left out" if freeze else "the nearest setting stands in"
        print(f"{model.task}, {model.config.pruning_method}: {missing} out of reach, {what}.", flush=True)
    if missing and not freeze:
        schedule += [{"reduction": target, **nearest_setting(model, batches[0], target)} for target in missing]
        model.config.pruning_schedule = sorted(schedule, key=lambda entry: entry["reduction"])
    return model.config.calibrated_reductions
