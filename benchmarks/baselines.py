"""Two other ways to make an image's tokens fewer, on the same BLIP weights, to hold the pruned models' speed against.

- ToMe (Token Merging, arXiv 2210.09461): in every layer, some tokens merge into those that they are most like.
- EViT (arXiv 2202.07800): in three layers, the tokens that the class token looks at least become one.

Both know nothing of the text and leave a number of tokens that is fixed beforehand, for all images the same: the *schedule*, a list of layers + 1 numbers,
the tokens that enter the encoder and those that each layer leaves (that enter its feed-forward), class token included. The text side stays dense.

    schedule, reached = find_schedule("tome", model.config, model.task, 0.5, text_tokens)
    model.vision_model = BaselineVisionModel(model.vision_model, "tome", schedule)
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from madtp_hf.flops import reduction_of_flops
from madtp_hf.modeling.encoders import BranchOutput
from madtp_hf.modeling.packing import Layout
from madtp_hf.tasks import TASKS


SEARCH_STEPS = 40  # halvings of the interval; the numbers of tokens are whole, so fewer would do


# How many tokens each layer leaves


def tome_schedule(length: int, num_layers: int, r: float) -> list[int]:
    """`r` tokens merge a layer; of a fractional `r`, some layers merge one more than others. No layer can merge more than half of its tokens."""
    tokens = [length]
    for layer in range(num_layers):
        wanted = math.floor((layer + 1) * r) - math.floor(layer * r)
        tokens.append(tokens[-1] - min(wanted, (tokens[-1] - 1) // 2))
    return tokens


def evit_schedule(length: int, num_layers: int, keep_rate: float) -> list[int]:
    """A quarter, a half and three quarters of the way up (of 12 layers, in the 4th, 7th and 10th), the share `keep_rate` stays."""
    tokens = [length]
    for layer in range(num_layers):
        others = tokens[-1] - 1
        kept = math.ceil(keep_rate * others)
        reduces = layer in (num_layers // 4, num_layers // 2, 3 * num_layers // 4) and kept < others - 1
        tokens.append(kept + 2 if reduces else tokens[-1])  # the class token before, the fused one behind
    return tokens


def _schedule(method: str, length: int, num_layers: int, strength: float) -> list[int]:
    """`strength` in [0, 1]: from leaving all tokens to leaving as few as the method can."""
    if method == "tome":
        return tome_schedule(length, num_layers, strength * (length - 1) / 2)
    if method == "evit":
        return evit_schedule(length, num_layers, 1 - strength)
    raise ValueError(f"method={method!r}: expected 'tome' or 'evit'.")


def schedule_reduction(config, task: str, schedule: list[int], text_tokens=None, answer_tokens=0) -> float:
    """The reduction of FLOPs of the whole forward pass, text side included, averaged over the texts of lengths `text_tokens` (B,)."""
    config = copy.copy(config)
    config.pruning_temperature = 0.0  # no alignment scores
    num_samples = 1 if text_tokens is None else len(text_tokens)
    vision = torch.tensor(schedule)[:, None].repeat(1, num_samples)
    if TASKS[task].num_images > 1:
        vision = torch.stack([vision] * TASKS[task].num_images, dim=1)
    text = None
    if TASKS[task].text_encoder:
        text = torch.as_tensor(text_tokens).cpu().repeat(config.text_config.num_hidden_layers + 1, 1)
    return reduction_of_flops(config, task, vision, text, answer_tokens).mean().item()


def find_schedule(
    method: str, config, task: str, reduction: float, text_tokens=None, answer_tokens=0
) -> tuple[list[int], float]:
    """The schedule of "tome" or "evit" whose reduction of FLOPs is nearest to the one asked for, and what it is.

    Args:
        method (`str`): `"tome"` or `"evit"`.
        config (`MadtpBlipConfig`), task (`str`): as in `madtp_hf.count_flops`; the temperature doesn't matter.
        reduction (`float`): of the whole forward pass.
        text_tokens (`torch.LongTensor` of shape `(batch_size,)`, *optional*): the lengths of the texts; captioning's encoder has none.
        answer_tokens (`int` or `torch.LongTensor` of shape `(batch_size,)`, *optional*): what a decoder reads.

    Returns:
        `tuple[list[int], float]`: what a method can't reach, it comes as near to as it can.
    """
    vision = config.vision_config
    length = (vision.image_size // vision.patch_size) ** 2 + 1

    def at(strength):
        schedule = _schedule(method, length, vision.num_hidden_layers, strength)
        return schedule, schedule_reduction(config, task, schedule, text_tokens, answer_tokens)

    low, high = 0.0, 1.0
    candidates = [at(low), at(high)]
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        candidates.append(at(middle))
        if candidates[-1][1] < reduction:
            low = middle
        else:
            high = middle
    return min(candidates, key=lambda candidate: abs(candidate[1] - reduction))


# What a layer does


def merge_similar_tokens(
    states: torch.Tensor, key: torch.Tensor, sizes: torch.Tensor, r: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """ToMe's step: every other token may merge into one of those between; the `r` pairs that are most alike do. The class token stays.

    states (B, L, D), the layer's keys (B, H, L, d) and sizes (B, L), how many patches each token stands for -> the same with L - r tokens.
    """
    metric = F.normalize(key.mean(dim=1), dim=-1)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    nearest, partner = similarity[:, 1:].max(dim=-1)  # the class token is the first of the even ones
    order = nearest.argsort(dim=-1, descending=True) + 1
    leaving, staying = order[:, :r], order[:, r:].sort(dim=-1).values
    staying = F.pad(staying, (1, 0))
    partner = partner.gather(1, leaving - 1)

    batch_size, num_odd = len(states), similarity.shape[2]
    # A sum weighted by size, then divided by the size of the whole.
    weighted = states * sizes.unsqueeze(-1).to(states.dtype)

    def chosen(tensor, index):
        index = index if tensor.ndim == 2 else index.unsqueeze(-1).expand(-1, -1, tensor.shape[-1])
        return tensor[:, ::2].gather(1, index)

    def added(tensor):
        rows = partner + num_odd * torch.arange(batch_size, device=states.device).unsqueeze(1)
        total = tensor[:, 1::2].flatten(0, 1).index_add(0, rows.flatten(), chosen(tensor, leaving).flatten(0, 1))
        return total.unflatten(0, (batch_size, num_odd))

    odd_sizes = added(sizes)
    odd = added(weighted) / odd_sizes.unsqueeze(-1).to(states.dtype)
    return torch.cat([chosen(states, staying), odd], dim=1), torch.cat([chosen(sizes, staying), odd_sizes], dim=1)


def fuse_inattentive_tokens(states: torch.Tensor, class_attention: torch.Tensor, num_kept: int) -> torch.Tensor:
    """EViT's step: the class token, the `num_kept` others that it looks at most, and one for the rest, their sum weighted by its attention.

    states (B, L, D), class_attention (B, L - 1) -> (B, num_kept + 2, D).
    """
    order = class_attention.argsort(dim=-1, descending=True)
    kept, rest = order[:, :num_kept].sort(dim=-1).values, order[:, num_kept:]
    weights = class_attention.gather(1, rest).unsqueeze(1).to(states.dtype)

    def chosen(index):
        return states[:, 1:].gather(1, index.unsqueeze(-1).expand(-1, -1, states.shape[-1]))

    return torch.cat([states[:, :1], chosen(kept), weights @ chosen(rest)], dim=1)


def branch_output(states: torch.Tensor, schedule: list[int]) -> BranchOutput:
    """states (B, L, D) as what the models' vision encoder gives."""
    batch_size, length = states.shape[:2]
    num_tokens = torch.tensor(schedule, device=states.device).unsqueeze(1).expand(-1, batch_size)
    layout = Layout.rectangle(batch_size, length, states.device)
    return BranchOutput(states.flatten(0, 1), layout, None, num_tokens, None, None)


class BaselineVisionModel(nn.Module):
    """A vision encoder that reduces its tokens by ToMe or EViT: pixel_values (B, 3, H, W) -> `BranchOutput`.

    Args:
        vision_model (`MadtpBlipVisionModel`): whose weights it runs on; they are shared.
        method (`str`): `"tome"` or `"evit"`.
        schedule (`list[int]`): how many tokens enter and how many each layer leaves, from `find_schedule`, `tome_schedule` or `evit_schedule`.
    """

    def __init__(self, vision_model: nn.Module, method: str, schedule: list[int]):
        super().__init__()
        if method not in ("tome", "evit"):
            raise ValueError(f"method={method!r}: expected 'tome' or 'evit'.")
        self.embeddings = vision_model.embeddings
        self.encoder = vision_model.encoder
        self.post_layernorm = vision_model.post_layernorm
        self.method, self.schedule = method, schedule

    def forward(self, pixel_values, pruning=None, interpolate_pos_encoding=False, **outputs) -> BranchOutput:
        """`pruning` and `outputs` are what the models ask of their own vision encoder, and are not for this one."""
        states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        if states.shape[1] != self.schedule[0]:
            raise ValueError(f"Images of {states.shape[1]} tokens: the schedule expects {self.schedule[0]}.")
        sizes = None
        for layer, num_left in zip(self.encoder.layers, self.schedule[1:], strict=True):
            states, sizes = self._run_layer(layer, states, sizes, num_left)
        return branch_output(self.post_layernorm(states), self.schedule)

    def _run_layer(self, layer, states, sizes, num_left):
        attention, length = layer.self_attn, states.shape[1]
        qkv = attention.qkv(layer.layer_norm1(states))
        query, key, value = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # ToMe's proportional attention: a token draws as much attention as all that it stands for.
        bias = None if sizes is None else sizes.log().to(query.dtype)[:, None, None, :]
        context = F.scaled_dot_product_attention(query, key, value, bias)
        states = states + attention.projection(context.transpose(1, 2).flatten(2))

        if num_left < length and self.method == "tome":
            sizes = torch.ones(states.shape[:2], device=states.device) if sizes is None else sizes
            states, sizes = merge_similar_tokens(states, key, sizes, length - num_left)
        elif num_left < length:
            # Fused attention keeps no probabilities: the class token's are computed once more, one query of all.
            logits = query[:, :, :1] @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            class_attention = logits.softmax(dim=-1, dtype=torch.float32)[:, :, 0, 1:].mean(dim=1)
            states = fuse_inattentive_tokens(states, class_attention, num_left - 2)
        return states + layer.mlp(layer.layer_norm2(states)), sizes
