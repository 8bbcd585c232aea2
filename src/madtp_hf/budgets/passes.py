"""Forward passes that measure: complete a batch, run the encoders, count what was saved, restore the model."""

import inspect
from contextlib import contextmanager

import torch

from ..tasks import TASKS
from .flops import reduction_of_flops


def decoder_tokens(batch, task: str, config) -> torch.Tensor | int:
    """Return how many tokens (B,) the decoder of an answer or a caption reads for each sample, without padding.

    It is 0 for a task without such a decoder, and for a batch without its inputs.
    """
    name = TASKS[task].decoder_inputs
    if name is None:
        return 0
    read = batch.get(name)
    mask = batch.get(name.replace("input_ids", "attention_mask"))
    if read is not None and mask is not None:
        return mask.sum(dim=1)
    read = batch.get("labels") if read is None else read
    if read is None:
        return 0
    return ((read != -100) & (read != config.text_config.pad_token_id)).sum(dim=1)


def measure(model, batch, output) -> torch.Tensor:
    """Return the FLOPs reduction (B,) of each sample of a batch, computed from the model's output."""
    tokens = decoder_tokens(batch, model.task, model.config)
    counts = (output.vision_tokens, output.text_tokens, tokens)
    return reduction_of_flops(model.config, model.task, *counts, pruning=model.start_pass())


def complete(model, batch) -> dict[str, torch.Tensor]:
    """Return a batch's tensors on the model's device; add the start token where the decoder has no input."""
    batch = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    name = TASKS[model.task].decoder_inputs
    if name is None or name in batch or "labels" in batch:
        return batch
    return {**batch, name: _start_tokens(model, batch)}


def _start_tokens(model, batch) -> torch.Tensor:
    start = model.config.text_config.bos_token_id
    return torch.full((len(batch["pixel_values"]), 1), start, device=model.device)


def encode(model, batch):
    """Run a forward pass of which only the encoders matter, and return its output.

    Labels and columns that `forward` doesn't take are left out; a decoder reads only its start token.
    """
    name = TASKS[model.task].decoder_inputs
    left_out = {"labels"}
    if name is not None:
        left_out |= {name, name.replace("input_ids", "attention_mask")}
    known = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
    inputs = {key: value for key, value in batch.items() if key in known and key not in left_out}
    if name is not None:
        inputs[name] = _start_tokens(model, batch)
    return model(**inputs)


@contextmanager
def restored(model):
    """Put a model into evaluation mode; on exit restore mode, setting, granularity and frozen counts."""
    config = model.config
    names = ("pruning_setting", "pruning_granularity", "pruning_token_counts")
    training, before = model.training, {name: getattr(config, name) for name in names}
    try:
        yield model.eval()
    finally:
        model.train(training)
        for name, value in before.items():
            setattr(config, name, value)
