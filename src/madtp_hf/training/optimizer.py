"""The optimizer that fine-tuning under pruning wants."""

import torch


def create_optimizer(model, learning_rate: float, alignment_rate: float = 0.01, **options) -> torch.optim.AdamW:
    """Create AdamW with a lower learning rate for the alignment parameters: `alignment_rate` times the
    `learning_rate` of the others.

    The graded norms that alignment tokens start with are what lets small reductions be reached; they must not be
    learned away. `options` are AdamW's. For `Trainer(optimizers=(create_optimizer(model, lr), None))`, which makes the
    schedule. What is frozen stays out: of a peft model, the adapter alone is learned.
    """
    slow, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # In a peft model the name goes on on both sides:
            # base_model.model.alignment.modules_to_save.default.tokens.
            (slow if "alignment" in name.split(".") else others).append(parameter)
    groups = [{"params": others}, {"params": slow, "lr": learning_rate * alignment_rate}]
    return torch.optim.AdamW(groups, learning_rate, **options)
