"""FLOPs of a forward pass in closed form, from the number of tokens in each layer (see `flop_formulas`).

No model is run or traced.
"""

import functools

import torch

from ..modeling.configuration_madtp_blip import MadtpBlipConfig
from ..modeling.configuration_madtp_clip import MadtpClipConfig
from ..modeling.pruned_model import PruningPass
from ..modeling.pruning_method import get_method
from ..tasks import get_task


def _count(config, task: str, vision_tokens, text_tokens, answer_tokens, method) -> torch.Tensor:
    of_task = get_task(task)
    vision_tokens = torch.as_tensor(vision_tokens).float()
    answer_tokens = torch.as_tensor(answer_tokens).to(vision_tokens)
    branches = [("vision_tokens", vision_tokens, config.vision_config)]
    if of_task.text_encoder:
        if text_tokens is None:
            raise ValueError(f"text_tokens is missing: task {task!r} has a text encoder.")
        text_tokens = torch.as_tensor(text_tokens).to(vision_tokens)
        branches.append(("text_tokens", text_tokens, config.text_config))
    for name, tokens, branch in branches:
        if len(tokens) != branch.num_hidden_layers + 1:
            raise ValueError(
                f"{name} has {len(tokens)} rows: expected one more than layers, {branch.num_hidden_layers + 1}."
            )
    if of_task.num_images > 1 and (vision_tokens.ndim != 3 or vision_tokens.shape[1] != of_task.num_images):
        raise ValueError(
            f"vision_tokens has shape {tuple(vision_tokens.shape)}: expected (layers + 1, {of_task.num_images},"
            f" batch_size) for task {task!r}."
        )
    added = {}
    for name, _, branch in branches:
        modality = name.removesuffix("_tokens")
        if method is not None and modality in config.pruning_modalities and modality in method.modalities:
            added[modality] = functools.partial(method.layer_flops, config, branch)
    return of_task.flops(config, vision_tokens, text_tokens, answer_tokens, added)


def count_flops(
    config: MadtpBlipConfig | MadtpClipConfig,
    task: str,
    vision_tokens: torch.Tensor,
    text_tokens: torch.Tensor | None = None,
    answer_tokens: int | torch.Tensor = 0,
    *,
    pruning: PruningPass | None = None,
) -> torch.Tensor:
    """Compute the multiply-accumulates of each sample's inference forward pass.

    Args:
        config (`MadtpBlipConfig` or `MadtpClipConfig`):
            The model's configuration; what its pruning method adds is counted if pruning is on.
        task (`str`):
            `"vqa"`, `"captioning"`, `"nlvr2"`, `"retrieval"` (the pass that matches an image and a text) or `"clip"`
            (the features of one image and one text).
        vision_tokens (`torch.LongTensor` of shape `(layers + 1, batch_size)`, for NLVR2 `(layers + 1, 2,
            batch_size)`):
            The token counts from the model's outputs: those that enter the encoder, then those that each layer leaves.
        text_tokens (`torch.LongTensor` of shape `(layers + 1, batch_size)`, *optional*):
            Likewise for the text encoder; captioning has none.
        answer_tokens (`int` or `torch.LongTensor` of shape `(batch_size,)`, *optional*, defaults to 0):
            The number of answer or caption tokens that the decoder reads in one pass; 0 leaves the decoder out.
        pruning (`PruningPass`, *optional*):
            The pruning that the tokens were counted with, from `model.start_pass()`. Defaults to the configuration's.

    Returns:
        `torch.FloatTensor` of shape `(batch_size,)`.

    Raises:
        ValueError: if the task is unknown, text tokens are missing, or tokens have the wrong shape.
    """
    if pruning is not None:
        method = pruning.method if pruning.is_on else None
    else:
        method = None if config.pruning_setting is None else get_method(config.pruning_method)
    return _count(config, task, vision_tokens, text_tokens, answer_tokens, method)


def dense_flops(config, task: str, vision_tokens, text_tokens=None, answer_tokens=0) -> torch.Tensor:
    """Compute [`count_flops`] with pruning off, as if every token that enters the encoders stayed to the end."""
    vision_tokens = vision_tokens[:1].expand_as(vision_tokens)
    text_tokens = None if text_tokens is None else text_tokens[:1].expand_as(text_tokens)
    return _count(config, task, vision_tokens, text_tokens, answer_tokens, method=None)


def reduction_of_flops(
    config, task: str, vision_tokens, text_tokens=None, answer_tokens=0, *, pruning=None
) -> torch.Tensor:
    """Compute each sample's reduction (batch_size,), 1 - FLOPs(pruned) / FLOPs(dense)."""
    tokens = (vision_tokens, text_tokens, answer_tokens)
    return 1 - count_flops(config, task, *tokens, pruning=pruning) / dense_flops(config, task, *tokens)
