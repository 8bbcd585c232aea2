"""The optimizer for fine-tuning under pruning."""

from typing import Any

import torch


def create_optimizer(
    model: torch.nn.Module, learning_rate: float, alignment_rate: float = 0.01, **options
) -> torch.optim.AdamW:
    """Return AdamW whose alignment parameters learn at `alignment_rate` times the `learning_rate` of the others.

    Alignment tokens start with graded norms, which make small reductions reachable; fast learning would undo them.
    `options` are AdamW's. Pass it as `Trainer(optimizers=(create_optimizer(model, lr), None))`; `Trainer` creates the
    schedule. Frozen parameters are left out: of a peft model, only the adapter is trained.
    """
    slow: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # In a peft model the name has more parts on both sides:
            # base_model.model.alignment.modules_to_save.default.tokens.
            (slow if "alignment" in name.split(".") else others).append(parameter)
    groups: list[dict[str, Any]] = [{"params": others}, {"params": slow, "lr": learning_rate * alignment_rate}]
    return torch.optim.AdamW(groups, learning_rate, **options)
