"""Write a training script's outputs: results, and a checkpoint that is ready to publish."""

import torch

from ..budgets.evaluation import conservative_budget, report
from ..checkpoints.card import write_model_card


MAX_LOSS = 0.01  # largest loss of the metric on validation data at the budget that a checkpoint is saved with


def save_run(
    model, processor, folder, title: str, rows: list[dict], metric: str, validation: tuple[int, dict], **facts
) -> None:
    """Write results.json, the checkpoint at a conservative budget, and its model card to a folder, and print where.

    Args:
        model, processor: The trained model and its processor.
        folder (`str` or `Path`): The output folder.
        title (`str`): What was evaluated; the heading of the table.
        rows (`list[dict]`): One row per budget, as returned by [`~madtp_hf.budgets.evaluation.budget_rows`].
        metric (`str`): The column of the main metric.
        validation (`tuple[int, dict]`): The number of validation samples, and the metric on them by reduction. The
            checkpoint is saved at their [`~madtp_hf.budgets.evaluation.conservative_budget`].
        facts: Further entries of results.json; `base_model` and `datasets` go into the model card only.
    """
    base_model, datasets = facts.pop("base_model"), facts.pop("datasets", None)
    samples, scores = validation
    reduction = conservative_budget(scores, MAX_LOSS)
    default = {"reduction": reduction, "metric": metric, "samples": samples, "loss": MAX_LOSS}
    default["scores"] = {f"{budget:g}": score for budget, score in scores.items()}
    if len(scores) > 1:  # else there was no budget to choose from
        facts["default_budget"] = default
    report(title, rows, folder, metric=metric, **facts)
    model.set_pruning(reduction=reduction)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_model_card(folder, base_model=base_model, datasets=datasets)
    name, points = metric.removesuffix("%").strip(), f"{100 * MAX_LOSS:g} point below that of pruning off"
    if len(scores) == 1:
        loads = "with pruning off"
    elif reduction:
        loads = f"at reduction {reduction:g}, the largest whose validation {name} is at most {points}"
    else:
        loads = f"with pruning off: at every budget, the validation {name} is more than {points}"
    print(f"Wrote the checkpoint, its card and results.json to {folder}. It loads {loads}.")


def end_process_group() -> None:
    """Destroy the process group of `accelerate launch`, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
