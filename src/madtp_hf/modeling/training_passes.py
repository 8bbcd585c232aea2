"""Training of several budgets at once: the forward passes of a training step, dense and pruned, learn together.

As in slimmable networks (arXiv 1903.05134), a step runs the dense model and pruned ones on the same batch. The pruned
passes also learn from the outputs of the dense pass of that step (in-place distillation), or of a frozen teacher.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class TrainingPasses:
    """The forward passes of a training step.

    settings: the pruning method's setting of each pass, None for a dense one, which comes first.
    observe: called as (index of the pass, batch, output) within each pruned pass.
    teacher: a frozen dense model that all passes learn from, instead of the pruned ones from this model's dense pass.
    """

    settings: list[dict[str, float] | None]
    observe: Callable | None = None
    teacher: torch.nn.Module | None = None

    def run(self, model, forward, batch: dict):
        """Run all passes on a batch; return the last one's output, with the mean of all passes' losses."""
        weight, dense, losses = model.config.distillation_weight, None, []
        if self.teacher is not None:
            with torch.no_grad():
                dense = self.teacher(**batch)
        for index, setting in enumerate(self.settings):
            with model.pruning(None) if setting is None else model.pruning(**setting):
                output = forward(model, **batch)
                if setting is not None and self.observe is not None:
                    self.observe(index, batch, output)
            if output.loss is not None:
                learns = dense is not None and weight > 0
                distilled = weight * distillation_loss(output, dense, model.distilled, batch) if learns else 0.0
                losses.append(output.loss + distilled)
            if setting is None and dense is None:
                dense = output
        if losses:
            output.loss = torch.stack(losses).mean()
        return output


def distillation_loss(output, dense, distilled: dict[str, str], batch: dict) -> torch.Tensor:
    """Compute how far a pass's outputs are from a dense pass's, which gets no gradient.

    Args:
        distilled (`dict[str, str]`):
            The kind of each field: `"classes"`, logits (B, C), and `"tokens"`, logits (B, L, V) of a decoder, are
            compared by the KL divergence from the dense pass's distribution, where there are labels; `"features"`
            (B, D) by 1 - cos.
    """
    losses = []
    for name, kind in distilled.items():
        ours, theirs = getattr(output, name), getattr(dense, name)
        if ours is None or theirs is None:
            continue
        ours, theirs = ours.float(), theirs.detach().float()
        if kind == "features":
            losses.append(1 - F.cosine_similarity(ours, theirs, dim=-1).mean())
            continue
        divergence = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        if kind == "tokens":
            counts = (batch["labels"][:, 1:] != -100).to(divergence)
            losses.append((divergence[:, :-1] * counts).sum() / counts.sum().clamp(min=1))
        else:
            losses.append(divergence.mean())
    return sum(losses)


def runs_training_passes(forward):
    """Decorate a model's `forward`: in training, it runs the passes that `set_training_passes` has set."""
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def run(self, *args, **kwargs):
        passes = self._training_passes
        if passes is None or not (self.training and torch.is_grad_enabled()):
            return forward(self, *args, **kwargs)
        named = signature.bind(self, *args, **kwargs).arguments
        named.pop("self")
        return passes.run(self, forward, {**named, **named.pop("kwargs", {})})

    return run
