"""Other ways to make tokens fewer, on the same BLIP weights, to compare MADTP with.

Three leave a fixed number of image tokens, the same for all images, and the text dense. The *schedule* says how many:
a list of layers + 1 numbers, the tokens that enter the encoder and those that each layer leaves, class token included.

- `tome`: Token Merging (arXiv 2210.09461). In every layer, some tokens merge into those that they are most like.
- `evit`: EViT (arXiv 2202.07800). In three layers, the tokens that the class token attends to least become one.
- `random`: in every layer, a random share of the tokens becomes one, their mean.

The others are MADTP with another importance s of a token, and reduce both branches by MADTP's temperature:

- `class_attention`: the class token's attention alone, s = s_cls;
- `without_self`, `without_class`, `without_alignment`: the mean of two of MADTP's three terms.

    schedule, reached = find_schedule("tome", model.config, model.task, 0.5, text_tokens)
    model.set_pruning(None)
    model.set_reduction_method(make_method("tome", schedule))
    ...
    model.set_reduction_method(make_method("class_attention"))
    model.set_pruning(temperature=3.0)
    ...
    model.set_reduction_method(None)  # MADTP again
"""

import copy
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from madtp_hf.flops import reduction_of_flops
from madtp_hf.modeling.encoder import MadtpReduction, TokenReduction
from madtp_hf.modeling.token_pruning import reader_importance, strongest_alignment, sum_over_tokens
from madtp_hf.modeling.token_reduction import Reduction
from madtp_hf.tasks import TASKS


SEARCH_STEPS = 40  # bisections; the numbers of tokens are whole, so fewer would do


# How many tokens each layer leaves


def tome_schedule(length: int, num_layers: int, r: float) -> list[int]:
    """`r` tokens merge in each layer; of a fractional `r`, some layers merge one more. No layer merges more than half
    of its tokens."""
    tokens = [length]
    for layer in range(num_layers):
        wanted = math.floor((layer + 1) * r) - math.floor(layer * r)
        tokens.append(tokens[-1] - min(wanted, (tokens[-1] - 1) // 2))
    return tokens


def _keep_share(tokens: int, keep_rate: float) -> int:
    """Of the tokens without the class token, the share `keep_rate` stays and the others become one; all stay if that
    saves none."""
    kept = math.ceil(keep_rate * (tokens - 1))
    return kept + 2 if kept < tokens - 2 else tokens


def evit_schedule(length: int, num_layers: int, keep_rate: float) -> list[int]:
    """The share `keep_rate` stays in three layers: a quarter, a half and three quarters of the way up (of 12, in the
    4th, 7th and 10th)."""
    tokens = [length]
    for layer in range(num_layers):
        reduces = layer in (num_layers // 4, num_layers // 2, 3 * num_layers // 4)
        tokens.append(_keep_share(tokens[-1], keep_rate) if reduces else tokens[-1])
    return tokens


def random_schedule(length: int, num_layers: int, keep_rate: float) -> list[int]:
    """The share `keep_rate` stays in every layer."""
    tokens = [length]
    for _ in range(num_layers):
        tokens.append(_keep_share(tokens[-1], keep_rate))
    return tokens


def _schedule(method: str, length: int, num_layers: int, strength: float) -> list[int]:
    """`strength` in [0, 1]: from all tokens to as few as the method can leave."""
    if method == "tome":
        return tome_schedule(length, num_layers, strength * (length - 1) / 2)
    return {"evit": evit_schedule, "random": random_schedule}[method](length, num_layers, 1 - strength)


def schedule_reduction(config, task: str, schedule: list[int], text_tokens=None, answer_tokens=0) -> float:
    """The reduction of FLOPs of the whole forward pass, text side included, averaged over texts of lengths
    `text_tokens` (B,)."""
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
    """The schedule of "tome", "evit" or "random" whose reduction of FLOPs is nearest to the one asked for, and its
    reduction.

    Args:
        config (`MadtpBlipConfig`), task (`str`): as in `madtp_hf.count_flops`; the temperature doesn't matter.
        reduction (`float`): of the whole forward pass; the nearest that the method reaches.
        text_tokens (`torch.LongTensor` of shape `(batch_size,)`, *optional*): the lengths of the texts; captioning's
        encoder has none.
        answer_tokens (`int` or `torch.LongTensor` of shape `(batch_size,)`, *optional*): what a decoder reads.
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


# A fixed number of tokens


class FixedReduction(TokenReduction):
    """A number of image tokens that is fixed for each layer, by `schedule`. All sequences have one length and no
    padding."""

    def __init__(self, schedule: list[int]):
        self.schedule = schedule

    def reduces(self, layer, sequences):
        if sequences.max_seqlen != self.schedule[layer] or sequences.mask is not None:
            raise ValueError(
                f"Layer {layer} gets sequences of up to {sequences.max_seqlen} tokens: the schedule expects"
                f" {self.schedule[layer]} each,"
                " without padding. Make it with this model's number of image tokens."
            )
        return self.schedule[layer + 1] < self.schedule[layer]

    def divide(self, sequences, width):
        """The batch in one part: fused attention keeps no maps that would have to fit a cache."""
        return sequences.whole

    def attend_part(self, layer, query_key_value, part, dropout, all_maps=None):
        query, key, value = part.pad(query_key_value).permute(2, 0, 3, 1, 4)  # (B, H, L, d) each
        bias = self.attention_bias(layer)
        output = F.scaled_dot_product_attention(
            query, key, value, None if bias is None else bias.to(query.dtype)[:, None, None, :], dropout
        )
        return part.unpad(output.transpose(1, 2).flatten(2)), self.evidence(query, key)

    def attention_bias(self, layer) -> torch.Tensor | None:
        """(B, L): what is added to the logits of each key."""

    def evidence(self, query, key):
        """What `choose` is to know of queries and keys (B, H, L, d)."""

    def keep(self, layer: int, priority: torch.Tensor, weight: torch.Tensor) -> Reduction:
        """Keep the tokens of highest `priority` (B, N); the others become one, with `weight` (B, N)."""
        length = self.schedule[layer + 1]
        kept = priority.topk(length - 2).indices  # beside the class token and the new one
        stays = torch.zeros_like(priority, dtype=torch.bool).scatter(1, kept, True)
        return Reduction(stays, torch.ones_like(stays[:, :1]), weight.masked_fill(stays, 0), length=length)


class ToMeReduction(FixedReduction):
    """Every other token may merge into one of those between; the pairs that are most alike do. The class token stays.

    Alike: the cosine of the keys' mean over heads. A merged token is the mean of all patches in it, and draws the
    attention of all. As in ToMe, the tokens that are paired next lie in the order: those that could have merged, then
    those between. Rows keep theirs.
    """

    def __init__(self, schedule: list[int]):
        super().__init__(schedule)
        self.sizes: dict[
            int, torch.Tensor
        ] = {}  # by layer, (B, L): the number of patches in each token that enters it
        self.orders: dict[
            int, torch.Tensor
        ] = {}  # by layer, (B, L): the tokens that enter it in the order of their pairing

    def reduces(self, layer, sequences):
        return super().reduces(layer, sequences) or layer in self.sizes  # whose attention is biased from there on

    def attention_bias(self, layer):
        return self.sizes[layer].log() if layer in self.sizes else None

    def evidence(self, query, key):
        return key.mean(dim=1)

    def choose(self, layer, evidence, scores, part):
        device, shape = evidence.device, evidence.shape[:2]
        number, length = shape[1] - self.schedule[layer + 1], self.schedule[layer + 1]
        sizes = self.sizes.get(layer, torch.ones(shape, device=device))
        order = self.orders.get(layer, torch.arange(shape[1], device=device).expand(shape))
        stays = torch.ones(shape, dtype=torch.bool, device=device)
        into, weight = torch.zeros(shape, dtype=torch.long, device=device), torch.zeros_like(sizes)
        if number:
            leaving, entered, staying = self._pairs(evidence, order, number)
            of_leaving = sizes.gather(1, leaving)
            sizes = sizes.scatter_add(1, entered, of_leaving)
            weight = weight.scatter(1, leaving, of_leaving / sizes.gather(1, entered))
            # Slots of `into` count from the first token that can go, behind the class token.
            stays, into = stays.scatter(1, leaving, False), into.scatter(1, leaving, entered - 1)
            sizes = sizes.gather(1, staying.sort(dim=1).values)
            order = (stays.cumsum(dim=1) - 1).gather(1, staying)
        self.sizes[layer + 1], self.orders[layer + 1] = sizes, order
        return Reduction(stays[:, 1:], torch.ones_like(stays[:, :1]), weight[:, 1:], into[:, 1:], length)

    @staticmethod
    def _pairs(keys: torch.Tensor, order: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
        """Keys (B, L, d) -> the slots of `number` tokens that leave, of those that they enter, and of all that stay,
        in ToMe's order."""
        metric = F.normalize(keys.gather(1, order.unsqueeze(-1).expand_as(keys)), dim=-1)
        even, odd = order[:, ::2], order[:, 1::2]
        # The class token is the first of the even ones.
        likeness, partner = (metric[:, 2::2] @ metric[:, 1::2].transpose(1, 2)).max(dim=-1)
        ranked = likeness.argsort(dim=-1, descending=True)
        leaving, remaining = ranked[:, :number], ranked[:, number:].sort(dim=-1).values
        entered = odd.gather(1, partner.gather(1, leaving))
        staying = torch.cat([even[:, :1], even.gather(1, remaining + 1), odd], dim=1)
        return even.gather(1, leaving + 1), entered, staying


class EViTReduction(FixedReduction):
    """The tokens that the class token attends to most stay; the others become their sum weighted by its attention, as
    in EViT."""

    def evidence(self, query, key):
        # Fused attention keeps no probabilities: the class token's are computed once more, one query of all.
        logits = query[:, :, :1] @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return logits.softmax(dim=-1, dtype=torch.float32)[:, :, 0, 1:].mean(dim=1)

    def choose(self, layer, evidence, scores, part):
        return self.keep(layer, evidence, evidence)


class RandomReduction(FixedReduction):
    """Random tokens stay, drawn by `generator` (on the CPU); the others become their mean."""

    def __init__(self, schedule: list[int], generator: torch.Generator):
        super().__init__(schedule)
        self.generator, self.drawn = generator, {}

    def choose(self, layer, evidence, scores, part):
        if layer not in self.drawn:
            self.drawn[layer] = torch.rand(part.batch_size, part.max_seqlen - 1, generator=self.generator)
        priority = self.drawn[layer].to(part.device)
        number_that_goes = self.schedule[layer] - self.schedule[layer + 1] + 1
        return self.keep(layer, priority, torch.full_like(priority, 1 / number_that_goes))


# MADTP with another importance


class TermsReduction(MadtpReduction):
    """MADTP whose importance is the mean of some of its `terms`."""

    has_kernels = False
    terms = ("self", "class", "alignment")

    def importance(self, evidence, scores, mask):
        terms = []
        if "self" in self.terms:
            terms.append(evidence.received / sum_over_tokens(evidence.received))
        if "class" in self.terms:
            terms.append(reader_importance(evidence))
        if "alignment" in self.terms:
            aligned = strongest_alignment(scores, mask)
            terms.append(aligned / sum_over_tokens(aligned))
        return sum(terms) / len(terms)


class ClassAttentionReduction(TermsReduction):
    terms = ("class",)


class WithoutSelfReduction(TermsReduction):
    terms = ("class", "alignment")


class WithoutClassReduction(TermsReduction):
    terms = ("self", "alignment")


class WithoutAlignmentReduction(TermsReduction):
    terms = ("self", "class")


# By name

FIXED = {"tome": ToMeReduction, "evit": EViTReduction, "random": RandomReduction}
VARIANTS = {
    "class_attention": ClassAttentionReduction,
    "without_self": WithoutSelfReduction,
    "without_class": WithoutClassReduction,
    "without_alignment": WithoutAlignmentReduction,
}


def make_method(name: str, schedule: list[int] | None = None, seed: int = 0) -> Callable[..., TokenReduction | None]:
    """What `model.set_reduction_method` takes.

    Args:
        name (`str`): one of FIXED, for images only, or of VARIANTS.
        schedule (`list[int]`): of FIXED: how many tokens enter and how many each layer leaves, as from
        `find_schedule`.
        seed (`int`, *optional*): of "random", whose draws go on from pass to pass.
    """
    _check_name(name, (*FIXED, *VARIANTS))
    if (schedule is not None) != (name in FIXED):
        raise ValueError(
            f"{schedule=} with {name!r}: expected a schedule for {', '.join(FIXED)}, and None for the others."
        )
    if name in VARIANTS:
        return lambda model, modality, with_feature: model.madtp_reduction(modality, with_feature, VARIANTS[name])
    make = functools.partial(FIXED[name], schedule)
    if name == "random":
        make = functools.partial(make, torch.Generator().manual_seed(seed))
    return lambda model, modality, with_feature: make() if modality == "vision" else None


def _check_name(name: str, known) -> None:
    if name not in known:
        raise ValueError(f"Method {name!r}: expected one of {', '.join(known)}.")
