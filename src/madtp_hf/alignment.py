"""Alignment tokens from data: a start, without training, that loses less than random ones."""

import torch

from .calibration import complete, encode, restored
from .tasks import TASKS


MAX_STATES = 20_000  # of text tokens, in all layers; what there is beyond doesn't move the centres
ITERATIONS = 15


def _centres(states: torch.Tensor, number: int) -> torch.Tensor:
    """The centres (number, D) of clusters of states (n, D), by k-means from the states that are farthest from one another."""
    first = (states - states.mean(dim=0)).norm(dim=1).argmax()
    centres = [states[first]]
    distance = (states - centres[0]).pow(2).sum(dim=1)
    for _ in range(number - 1):
        centres.append(states[distance.argmax()])
        distance = torch.minimum(distance, (states - centres[-1]).pow(2).sum(dim=1))
    centres = torch.stack(centres)
    for _ in range(ITERATIONS):
        nearest = torch.cdist(states, centres).argmin(dim=1)
        sizes = torch.bincount(nearest, minlength=number).to(states).unsqueeze(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, states)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres


def _word_states(model, dataloader) -> torch.Tensor:
    """What enters each layer of the text encoder (n, D), protected tokens and padding left out, with pruning off.

    Where layers have maps of their own to the alignment tokens' width, as CLIP's, mapped by them.
    """
    collected, number = [], 0
    roles, maps = model._roles["text"], model.alignment.text_projection
    encoder = getattr(model, TASKS[model.task].text_encoder).encoder
    layers = list(encoder.layers if hasattr(encoder, "layers") else encoder.layer)

    def collect(layer, inputs):
        states, sequences = inputs[:2]
        words = sequences.pad(states)[:, 1 : 1 + roles.num_removable(sequences)]
        mask = roles.removable(sequences)
        words = words.flatten(0, 1) if mask is None else words[mask]
        collected.append(maps[layers.index(layer)](words) if isinstance(maps, torch.nn.ModuleList) else words)

    hooks = [layer.register_forward_pre_hook(collect) for layer in layers]
    try:
        for batch in dataloader:
            encode(model, complete(model, batch))
            number = sum(map(len, collected))
            if number >= MAX_STATES:
                break
    finally:
        for hook in hooks:
            hook.remove()
    if not number:
        raise ValueError("dataloader gave no text of more than its first token: expected batches with some words.")
    states = torch.cat(collected).float()
    return states[:: -(-len(states) // MAX_STATES)]


@torch.no_grad()
def init_alignment_from(model, dataloader) -> None:
    """Replace a model's alignment tokens by what its texts are made of, the same for the same data, in seconds.

    The tokens become the centres of clusters of the words' states in all layers of the text encoder. Layers then look sharply at words,
    of which they keep nearly all, and more evenly at patches. Nothing is trained, and no labels are needed. Calibrate afterwards: a
    schedule that the model had is dropped, as it belongs to other tokens, and pruning is off.

    Args:
        model (`MadtpBlipPreTrainedModel` or `MadtpClipModel`):
            A model with a text encoder, so not for captioning, where random tokens stay the start. A model that has been trained under
            pruning loses the tokens that it has learned.
        dataloader (`Iterable`):
            Batches as `forward` takes them, dicts of tensors. A few hundred samples are enough; it is read until about 20,000 states of
            words have been seen.

    Raises:
        ValueError: for a model without a text encoder, or without a word in the data.
    """
    if TASKS[model.task].text_encoder is None:
        raise ValueError(
            f"{type(model).__name__} has no text encoder: expected a model for another task; here random alignment tokens are the start."
        )
    with restored(model):
        model.set_pruning(None)
        states = _word_states(model, dataloader)
    projection = model.alignment.text_projection
    if projection is not None and not isinstance(projection, torch.nn.ModuleList):
        states = projection(states.to(projection.weight.dtype)).float()
    model.alignment.tokens.copy_(_centres(states, len(model.alignment.tokens)))
    model.config.pruning_schedule = model.config.pruning_token_counts = None
    model.set_pruning(None)
