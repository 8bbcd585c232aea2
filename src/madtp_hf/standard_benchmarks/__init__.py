"""Adapters for standard benchmarks, one file for each: MTEB and MIEB, CLIP_benchmark, lmms-eval.

None of the three packages is needed to import this one.
"""

import os
from collections.abc import Sequence

import torch

from ..checkpoints.load import Loaded, load


def load_to_evaluate(
    source: str,
    tasks: Sequence[str],
    reduction: float | None = None,
    *,
    device: str | torch.device | None = None,
    precision: str = "float32",
    revision: str | None = None,
) -> Loaded:
    """Load a checkpoint for a benchmark, pruned as asked.

    Args:
        source (`str`): A folder or a Hub id, of this package's BLIP or CLIP or of transformers'.
        tasks (`Sequence[str]`): The tasks whose models the benchmark can evaluate.
        reduction (`float`, *optional*): The calibrated share of FLOPs to save, 0 for none; by default the model prunes
            as it was saved.
        device (`str` or `torch.device`, *optional*): By default a GPU if there is one, and each process its own.
        precision (`str`, *optional*, defaults to `"float32"`): As in `model.prepare_for_inference`.
        revision (`str`, *optional*): The branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is of another task, or not calibrated for the reduction.
    """
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    loaded = load(source, tasks, device=device, precision=precision, revision=revision).require_trained()
    if reduction is not None:
        loaded.model.set_pruning(reduction=reduction)
    return loaded
