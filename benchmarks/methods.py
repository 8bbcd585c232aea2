"""Other token reduction methods on the same BLIP weights, to compare MADTP with.

Three keep a fixed number of image tokens, the same for all images, and leave the text dense. The *schedule* gives the
counts: a list of layers + 1 numbers, the tokens that enter the encoder and those that each layer leaves, class token
included.

- `tome`: Token Merging (arXiv 2210.09461). In every layer, some tokens merge into the most similar others.
- `evit`: EViT (arXiv 2202.07800). In three layers, the tokens with the least class token attention merge into one.
- `random`: in every layer, a random share of the tokens merges into one, their mean.

The others are MADTP with another importance s of a token; they reduce both branches by MADTP's temperature:

- `class_attention`: the class token's attention alone, s = s_cls;
- `without_self`, `without_class`, `without_alignment`: the mean of two of MADTP's three terms.

    schedule, reached = find_schedule("tome", model.config, model.task, 0.5, text_tokens)
    model.set_pruning(None)
    model.set_pruning_method(make_method("tome", schedule))
    ...
    model.set_pruning_method(make_method("class_attention"))
    model.set_pruning(temperature=3.0)
    ...
    model.set_pruning_method(None)  # MADTP again
"""

import copy
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from madtp_hf.budgets.flops import reduction_of_flops
from madtp_hf.modeling.encoder import MadtpMethod, PruningMethod
from madtp_hf.modeling.repack import Decision
from madtp_hf.modeling.token_pruning import pooling_importance, strongest_alignment, sum_over_tokens
from madtp_hf.tasks import TASKS


SEARCH_STEPS = 40  # bisections; enough, since token counts are integers


# Schedules


def tome_schedule(length: int, num_layers: int, r: float) -> list[int]:
    """Merge `r` tokens in each layer; if `r` is fractional, some layers merge one more.

    No layer merges more than half of its tokens.
    """
    tokens = [length]
    for layer in range(num_layers):
        wanted = math.floor((layer + 1) * r) - math.floor(layer * r)
        tokens.append(tokens[-1] - min(wanted, (tokens[-1] - 1) // 2))
    return tokens


def _keep_share(tokens: int, keep_rate: float) -> int:
    """Return the token count if the share `keep_rate` stays, the others merge into one, and the class token stays.

    All tokens stay if merging would save none.
    """
    kept = math.ceil(keep_rate * (tokens - 1))
    return kept + 2 if kept < tokens - 2 else tokens


def evit_schedule(length: int, num_layers: int, keep_rate: float) -> list[int]:
    """Keep the share `keep_rate` in three layers, at a quarter, a half and three quarters of the depth.

    With 12 layers these are the 4th, 7th and 10th.
    """
    tokens = [length]
    for layer in range(num_layers):
        reduces = layer in (num_layers // 4, num_layers // 2, 3 * num_layers // 4)
        tokens.append(_keep_share(tokens[-1], keep_rate) if reduces else tokens[-1])
    return tokens


def random_schedule(length: int, num_layers: int, keep_rate: float) -> list[int]:
    """Keep the share `keep_rate` in every layer."""
    tokens = [length]
    for _ in range(num_layers):
        tokens.append(_keep_share(tokens[-1], keep_rate))
    return tokens


def _schedule(method: str, length: int, num_layers: int, strength: float) -> list[int]:
    """Return the schedule for a `strength` in [0, 1]: from all tokens to as few as the method can keep."""
    if method == "tome":
        return tome_schedule(length, num_layers, strength * (length - 1) / 2)
    return {"evit": evit_schedule, "random": random_schedule}[method](length, num_layers, 1 - strength)


def schedule_reduction(config, task: str, schedule: list[int], text_tokens=None, answer_tokens=0) -> float:
    """Return the reduction of FLOPs of the whole forward pass, text side included.

    It is the mean over texts of lengths `text_tokens` (B,).
    """
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
    """Find the schedule of "tome", "evit" or "random" whose reduction of FLOPs is nearest to the requested one.

    Args:
        config (`MadtpBlipConfig`), task (`str`): as in `madtp_hf.count_flops`; the temperature doesn't matter.
        reduction (`float`): the reduction of the whole forward pass.
        text_tokens (`torch.LongTensor` of shape `(batch_size,)`, *optional*): the lengths of the texts; not for
            captioning, which has no text encoder.
        answer_tokens (`int` or `torch.LongTensor` of shape `(batch_size,)`, *optional*): the number of tokens that the
            decoder reads.

    Returns: the schedule, and the reduction that it reaches.
    """
    _check_name(method, FIXED)
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


# Methods with a fixed number of tokens


class FixedMethod(PruningMethod):
    """Keep a number of image tokens that `schedule` fixes for each layer; sequences have equal lengths, no padding."""

    def __init__(self, schedule: list[int]):
        self.schedule = schedule

    def prunes(self, layer, sequences):
        if sequences.max_seqlen != self.schedule[layer] or sequences.mask is not None:
            raise ValueError(
                f"Layer {layer} gets sequences of up to {sequences.max_seqlen} tokens: the schedule expects"
                f" {self.schedule[layer]} each,"
                " without padding. Make it with this model's number of image tokens."
            )
        return self.schedule[layer + 1] < self.schedule[layer]

    def divide(self, sequences, width):
        """Keep the batch in one chunk: fused attention stores no attention maps that would have to fit a cache."""
        return sequences.whole

    def attend_chunk(self, layer, query_key_value, chunk, dropout, all_maps=None):
        query, key, value = chunk.pad(query_key_value).permute(2, 0, 3, 1, 4)  # (B, H, L, d) each
        bias = self.attention_bias(layer)
        output = F.scaled_dot_product_attention(
            query, key, value, None if bias is None else bias.to(query.dtype)[:, None, None, :], dropout
        )
        return chunk.unpad(output.transpose(1, 2).flatten(2)), self.statistics(query, key)

    def attention_bias(self, layer) -> torch.Tensor | None:
        """Return the bias (B, L) that is added to the logits of each key, or None."""

    def statistics(self, query, key):
        """Return what `decide` needs of queries and keys (B, H, L, d)."""

    def keep(self, layer: int, priority: torch.Tensor, weight: torch.Tensor) -> Decision:
        """Keep the tokens of highest `priority` (B, N); the others merge into one, weighted by `weight` (B, N)."""
        length = self.schedule[layer + 1]
        kept = priority.topk(length - 2).indices  # besides the class token and the merged one
        stays = torch.zeros_like(priority, dtype=torch.bool).scatter(1, kept, True)
        return Decision(stays, torch.ones_like(stays[:, :1]), weight.masked_fill(stays, 0), length=length)


class ToMeMethod(FixedMethod):
    """Token Merging: every other token may merge into one of the tokens between; the most similar pairs merge.

    The class token stays. Similarity is the cosine of the keys' means over heads. A merged token is the mean of all
    its patches, and its attention logits are biased by the log of their number. As in ToMe, the next layer pairs the
    tokens in this order: first the unmerged candidates, then the tokens between. Their rows in memory keep the
    original order.
    """

    def __init__(self, schedule: list[int]):
        super().__init__(schedule)
        # By layer, (B, L): the number of patches in each token that enters the layer.
        self.sizes: dict[int, torch.Tensor] = {}
        # By layer, (B, L): the tokens that enter the layer, in the order in which they are paired.
        self.orders: dict[int, torch.Tensor] = {}

    def prunes(self, layer, sequences):
        return super().prunes(layer, sequences) or layer in self.sizes  # attention is biased from there on

    def attention_bias(self, layer):
        return self.sizes[layer].log() if layer in self.sizes else None

    def statistics(self, query, key):
        return key.mean(dim=1)

    def decide(self, layer, statistics, scores, chunk):
        device, shape = statistics.device, statistics.shape[:2]
        number, length = shape[1] - self.schedule[layer + 1], self.schedule[layer + 1]
        sizes = self.sizes.get(layer, torch.ones(shape, device=device))
        order = self.orders.get(layer, torch.arange(shape[1], device=device).expand(shape))
        stays = torch.ones(shape, dtype=torch.bool, device=device)
        into, weight = torch.zeros(shape, dtype=torch.long, device=device), torch.zeros_like(sizes)
        if number:
            leaving, entered, staying = self._pairs(statistics, order, number)
            of_leaving = sizes.gather(1, leaving)
            sizes = sizes.scatter_add(1, entered, of_leaving)
            weight = weight.scatter(1, leaving, of_leaving / sizes.gather(1, entered))
            # `into` counts from the first token after the class token.
            stays, into = stays.scatter(1, leaving, False), into.scatter(1, leaving, entered - 1)
            sizes = sizes.gather(1, staying.sort(dim=1).values)
            order = (stays.cumsum(dim=1) - 1).gather(1, staying)
        self.sizes[layer + 1], self.orders[layer + 1] = sizes, order
        return Decision(stays[:, 1:], torch.ones_like(stays[:, :1]), weight[:, 1:], into[:, 1:], length)

    @staticmethod
    def _pairs(keys: torch.Tensor, order: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
        """From keys (B, L, d), choose the `number` tokens that leave; also return their targets and all that stay.

        All three are slots; those that stay are in ToMe's order.
        """
        metric = F.normalize(keys.gather(1, order.unsqueeze(-1).expand_as(keys)), dim=-1)
        even, odd = order[:, ::2], order[:, 1::2]
        # The class token is the first of the even tokens, and never merges.
        likeness, partner = (metric[:, 2::2] @ metric[:, 1::2].transpose(1, 2)).max(dim=-1)
        ranked = likeness.argsort(dim=-1, descending=True)
        leaving, remaining = ranked[:, :number], ranked[:, number:].sort(dim=-1).values
        entered = odd.gather(1, partner.gather(1, leaving))
        staying = torch.cat([even[:, :1], even.gather(1, remaining + 1), odd], dim=1)
        return even.gather(1, leaving + 1), entered, staying


class EViTMethod(FixedMethod):
    """EViT: keep the tokens that the class token attends to most; the others become their attention-weighted sum."""

    def statistics(self, query, key):
        # Fused attention keeps no probabilities: compute the class token's again, for this one query.
        logits = query[:, :, :1] @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return logits.softmax(dim=-1, dtype=torch.float32)[:, :, 0, 1:].mean(dim=1)

    def decide(self, layer, statistics, scores, chunk):
        return self.keep(layer, statistics, statistics)


class RandomMethod(FixedMethod):
    """Keep random tokens, drawn by `generator` (on the CPU); the others merge into their mean."""

    def __init__(self, schedule: list[int], generator: torch.Generator):
        super().__init__(schedule)
        self.generator, self.drawn = generator, {}

    def decide(self, layer, statistics, scores, chunk):
        if layer not in self.drawn:
            self.drawn[layer] = torch.rand(chunk.batch_size, chunk.max_seqlen - 1, generator=self.generator)
        priority = self.drawn[layer].to(chunk.device)
        number_that_goes = self.schedule[layer] - self.schedule[layer + 1] + 1
        return self.keep(layer, priority, torch.full_like(priority, 1 / number_that_goes))


# MADTP with another importance


class TermsMethod(MadtpMethod):
    """MADTP whose importance is the mean of a subset of its `terms`."""

    has_kernels = False
    terms = ("self", "class", "alignment")

    def importance(self, statistics, scores, mask):
        terms = []
        if "self" in self.terms:
            terms.append(statistics.received / sum_over_tokens(statistics.received))
        if "class" in self.terms:
            terms.append(pooling_importance(statistics))
        if "alignment" in self.terms:
            aligned = strongest_alignment(scores, mask)
            terms.append(aligned / sum_over_tokens(aligned))
        return sum(terms) / len(terms)


class ClassAttentionMethod(TermsMethod):
    terms = ("class",)


class WithoutSelfMethod(TermsMethod):
    terms = ("class", "alignment")


class WithoutClassMethod(TermsMethod):
    terms = ("self", "alignment")


class WithoutAlignmentMethod(TermsMethod):
    terms = ("self", "class")


# Lookup by name

FIXED = {"tome": ToMeMethod, "evit": EViTMethod, "random": RandomMethod}
VARIANTS = {
    "class_attention": ClassAttentionMethod,
    "without_self": WithoutSelfMethod,
    "without_class": WithoutClassMethod,
    "without_alignment": WithoutAlignmentMethod,
}


def make_method(name: str, schedule: list[int] | None = None, seed: int = 0) -> Callable[..., PruningMethod | None]:
    """Return the argument for `model.set_pruning_method`.

    Args:
        name (`str`): one of FIXED, for images only, or of VARIANTS.
        schedule (`list[int]`): for FIXED: how many tokens enter and how many each layer leaves, as returned by
            `find_schedule`.
        seed (`int`, *optional*): for "random", whose draws continue from pass to pass.
    """
    _check_name(name, (*FIXED, *VARIANTS))
    if (schedule is not None) != (name in FIXED):
        raise ValueError(
            f"{schedule=} with {name!r}: expected a schedule for {', '.join(FIXED)}, and None for the others."
        )
    if name in VARIANTS:
        return lambda model, modality, with_feature: model.madtp_method(modality, with_feature, VARIANTS[name])
    make = functools.partial(FIXED[name], schedule)
    if name == "random":
        make = functools.partial(make, torch.Generator().manual_seed(seed))
    return lambda model, modality, with_feature: make() if modality == "vision" else None


def _check_name(name: str, known) -> None:
    if name not in known:
        raise ValueError(f"Method {name!r}: expected one of {', '.join(known)}.")
