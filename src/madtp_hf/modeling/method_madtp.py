"""MADTP (arXiv 2403.02991): alignment tokens, shared by both branches, and a threshold from each sample itself.

The equations are in `token_pruning.py`.
"""

import copy
import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .attention import BranchSpec
from .chunks import divide, whole
from .prepared_linear import Source
from .pruning_method import Attended, Decision, Field, Path, PruningMethod
from .sequences import Sequences
from .token_pruning import (
    alignment_feature,
    alignment_scores,
    importance_threshold,
    merge_weights,
    most_important,
    select_tokens,
    token_importance,
)
from .triton_kernels import gate, scored_varlen_attention


class AlignmentProjection(nn.Module):
    """The linear map from a branch's width D to the alignment tokens' E, folded into them for inference.

    It is no `nn.Linear`, so that adapters and quantization, which look for those, leave the choice of tokens alone.

    of_layer: whether it belongs to a single layer. Its initialisation then preserves the scale of the tokens; else it
        is the family's own of linear maps.
    keeps_folded: whether the folded weight is kept until a parameter changes, as a prepared weight is.
    """

    keeps_folded = False
    _folded = None

    def __init__(self, in_features: int, out_features: int, of_layer: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.of_layer = in_features, out_features, of_layer
        self.weight, self.bias = nn.Linear(in_features, out_features).parameters()

    def forward(self, states: torch.Tensor | None = None, alignment_tokens: torch.Tensor | None = None):
        """Project states (..., D) -> (..., E), or fold the projection into alignment tokens (T, E).

        Folding returns the weight (T, D) and bias (T,) of the map that gives the alignment scores directly:
        (x W^T + b) S^T = x (S W)^T + b S^T.
        """
        if alignment_tokens is None:
            return F.linear(states, self.weight, self.bias)
        parts = alignment_tokens, self.weight, self.bias
        keeps = self.keeps_folded and not self.training and self.weight.device.type == "cpu"
        if not keeps or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._folded = None if not keeps else self._folded
            return alignment_tokens @ self.weight, alignment_tokens @ self.bias
        if self._folded is None or not self._folded[0].is_current(*parts):
            self._folded = Source(*parts), (alignment_tokens @ self.weight, alignment_tokens @ self.bias)
        return self._folded[1]

    def keep_folded(self, keeps: bool) -> None:
        self.keeps_folded, self._folded = keeps, None

    def __getstate__(self):
        return {**self.__dict__, "_folded": None}


class LayerProjections(nn.ModuleList):
    """One projection per layer."""

    def named_modules(self, memo=None, prefix: str = "", remove_duplicate: bool = True):
        """List the projections alone: peft would take a list named `text_projection` for CLIP's own projection."""
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if module is not self:
                yield name, module


class AlignmentTokens(NamedTuple):
    """The alignment tokens that a layer scores its tokens with.

    tokens (T, E): the alignment tokens S.
    projection: the linear map from the branch's width D to E, if there is one.
    weight (T, D), bias (T,): the projection folded into the alignment tokens, for inference. They give the scores of
        unprojected tokens: (x W^T + b) S^T = x (S W)^T + b S^T.
    """

    tokens: torch.Tensor
    projection: nn.Module | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class MadtpAlignment(nn.Module):
    """The alignment tokens (T, E) that both branches share, and projections for branches of another width.

    per_layer: whether every layer of both branches has a projection of its own; `forward` then returns a list with one
    entry per layer.
    schedule: in an adapter's copy, the configuration's calibrated schedule as the bytes of its JSON, since adapters
        are saved without a configuration. It goes with the tokens that it was calibrated for.
    """

    schedule: torch.Tensor | None = None

    def __init__(self, config, per_layer: bool = False):
        super().__init__()
        width = config.alignment_dim or config.text_config.hidden_size
        self.tokens = nn.Parameter(torch.empty(config.num_alignment_tokens, width))

        def projection(branch):
            if per_layer:
                layers = range(branch.num_hidden_layers)
                return LayerProjections(
                    [AlignmentProjection(branch.hidden_size, width, of_layer=True) for _ in layers]
                )
            return None if branch.hidden_size == width else AlignmentProjection(branch.hidden_size, width)

        self.vision_projection = projection(config.vision_config)
        self.text_projection = projection(config.text_config)

    def forward(
        self, modality: str | None, folded: bool = False
    ) -> AlignmentTokens | list[AlignmentTokens] | torch.Tensor:
        """Return the alignment tokens and projections for the layers of a branch, `"vision"` or `"text"`.

        Without a modality, returns a zero that depends on every parameter, so that each gets a gradient. Parameters
        are read by calling their modules, because hooks on these load offloaded parameters.
        """
        projections = {"vision": self.vision_projection, "text": self.text_projection}
        if modality is None:
            nothing = 0.0 * self.tokens.sum()
            for branch in projections.values():
                for projection in branch if isinstance(branch, nn.ModuleList) else [branch]:
                    if projection is not None:
                        zeros = self.tokens.new_zeros(1, projection.in_features)
                        nothing = nothing + 0.0 * projection(zeros).sum()
            return nothing
        branch = projections[modality]
        if isinstance(branch, nn.ModuleList):
            return [self._for_layer(projection, folded) for projection in branch]
        return self._for_layer(branch, folded)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.schedule is not None:
            destination[prefix + "schedule"] = self.schedule
            if not prefix:  # peft, which asks what to save, after the whole model; when loading, it must not be listed
                self.schedule = None

    def _for_layer(self, projection: nn.Module | None, folded: bool) -> AlignmentTokens:
        if not folded:
            return AlignmentTokens(self.tokens, projection)
        if projection is None:
            return AlignmentTokens(self.tokens, weight=self.tokens)
        return AlignmentTokens(self.tokens, projection, *projection(alignment_tokens=self.tokens))


@torch.no_grad()
def init_alignment(module: nn.Module, initializer_range: float) -> None:
    """Initialise a `MadtpAlignment` or an `AlignmentProjection`; other modules are left alone.

    Alignment tokens are drawn at random, with norms that fall geometrically to a hundredth of the first. At a given
    temperature, an alignment token of small norm attends to all tokens equally, and one of large norm only to its best
    match. The threshold is the smallest importance that they average. With graded norms it moves smoothly from the
    lowest importance to the mean, so that an untrained model reaches both small and large reductions.
    """
    if isinstance(module, MadtpAlignment):
        scale = torch.logspace(0, -2, module.tokens.shape[0], device=module.tokens.device)
        init.copy_(module.tokens, torch.randn_like(module.tokens) * scale.unsqueeze(1))
    elif isinstance(module, AlignmentProjection):
        init.normal_(module.weight, std=module.in_features**-0.5 if module.of_layer else initializer_range)
        init.zeros_(module.bias)


SCAN = [10.0**exponent for exponent in range(-12, 7)]  # temperatures of the first scan
FACTORS = (1e-3, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)  # of the threshold, at the path's first temperature
ABOVE = (1.05, 1.1, 1.15, 1.2, 1.25)  # factors at the path's last temperature, if only some layers prune
ALMOST_1 = 1 - 1e-5
STEADY = 0.003  # a smaller difference of two reductions counts as none


class MadtpMethod(PruningMethod):
    """MADTP: keep the tokens whose importance is above a threshold, and merge the others into one.

    Its setting is the threshold's temperature (0 is off, larger values prune more) and a factor of the threshold: 1 in
    the paper; smaller values prune less, and larger ones, if only the first layers prune, more than any temperature.

    Args:
        spec (`BranchSpec`):
            Which tokens are protected, and which query pools the sequence.
        setting (`dict`):
            `temperature` and `factor`. Temperature 0 removes no token, but still computes the alignment feature.
        alignment (`AlignmentTokens` or `list[AlignmentTokens]`):
            What tokens are scored with; a list has one entry per layer.
        granularity (`str`, *optional*, defaults to `"instance"`):
            `"instance"`: each sample keeps the tokens above its own threshold. `"batch"`: all samples keep as many as
            the largest of these counts in the batch. `"frozen"`: each layer leaves its number in `token_counts`.
        token_counts (`list[int]`, *optional*):
            How many tokens each layer leaves, protected and merged tokens included.
        num_layers (`int`, *optional*):
            How many of the first layers prune. All do by default.
        min_kept (`int`, *optional*, defaults to 1):
            A layer prunes a sample only if at least this many of its removable tokens stay.
        with_feature (`bool`, *optional*, defaults to `False`):
            Whether the loss needs the alignment feature.
    """

    name = "madtp"
    fields = {"temperature": Field(0, math.inf), "factor": Field(1e-12, ABOVE[-1], default=1.0)}
    off = 0.0
    importance_is_aligned = True
    adds_token: ClassVar[bool] = True  # whether the removed tokens become a new one

    def __init__(
        self,
        spec: BranchSpec,
        setting: dict[str, float],
        alignment: AlignmentTokens | list[AlignmentTokens],
        granularity: str = "instance",
        token_counts: list[int] | None = None,
        num_layers: int | None = None,
        min_kept: int = 1,
        with_feature: bool = False,
    ):
        self.spec, self.alignment, self.granularity = spec, alignment, granularity
        self.temperature, self.factor = float(setting["temperature"]), float(setting.get("factor", 1.0))
        self.token_counts, self.num_layers = token_counts, num_layers
        self.min_kept, self.with_feature = min_kept, with_feature

    @classmethod
    def for_branch(cls, model, pruning, modality, with_feature):
        prunes = pruning.prunes(modality)
        if not pruning.is_on or not (prunes or with_feature):
            return None
        counts = pruning.token_counts
        return cls(
            model.branch_specs[modality],
            pruning.setting if prunes else {"temperature": 0.0},
            model.alignment(modality, folded=not with_feature),
            pruning.granularity,
            token_counts=None if counts is None or not prunes else counts[modality],
            num_layers=model.config.pruning_layers,
            min_kept=model.min_kept,
            with_feature=with_feature,
        )

    # The path

    @classmethod
    def path(cls, config, settings=(), start=None):
        """Return the path from no pruning to most; a point is the logarithm of temperature times factor.

        The factor first rises to 1 at the temperature `start`, then the temperature rises with factor 1. The first
        part covers reductions that no temperature reaches, because all tokens that the alignment tokens attend to may
        have a high importance. The reduction starts at 0 and changes along the path without a jump. If only some
        layers prune, the path ends with factors above 1, at a temperature at which the threshold hardly changes.
        """
        moderate = config.text_config.hidden_size**0.5 / 4
        if start is None:
            with_factor = [setting["temperature"] for setting in settings if setting["factor"] < 1]
            start = min(with_factor or (moderate / 100, *(setting["temperature"] for setting in settings)))
        goes_above = config.pruning_layers is not None
        last = max(start, 64 * moderate) if goes_above else SCAN[-1]

        def setting(point):
            product = math.exp(point)
            temperature = min(max(product, start), last)
            return {"temperature": temperature, "factor": min(product / temperature, ABOVE[-1] if goes_above else 1.0)}

        products = [*(start * factor for factor in FACTORS), start, *(t for t in SCAN if start < t < last), last]
        products += [last * factor for factor in ABOVE] if goes_above else []
        return Path(
            tuple(map(math.log, products)),
            setting,
            lambda setting: math.log(setting["temperature"] * setting["factor"]),
            math.log(moderate),
            start,
        )

    @classmethod
    def scan(cls, config, settings, measure, start=None):
        """Measure along the path; without a setting of a factor below 1 to go through, find where it begins.

        It is, from the temperature of the smallest reduction on, the first one at which a factor a little below 1
        hardly changes the reduction. At lower temperatures an alignment token attends to a single token, and the
        threshold equals that token's importance to the last bit: factor 1 drops the token and any smaller factor keeps
        it, in all layers and samples at once.
        """
        if start is None:
            start = next((setting["temperature"] for setting in settings if setting["factor"] < 1), None)
        measured = {}

        def at(temperature, factor=1.0):
            key = f"{temperature:.9g} {factor:.9g}"  # points are logarithms: they come back rounded
            if key not in measured:
                measured[key] = measure({"temperature": temperature, "factor": factor})
            return measured[key]

        if start is None:
            reductions = [at(temperature) for temperature in SCAN]
            top = max(range(len(SCAN)), key=reductions.__getitem__)
            bottom = min(range(top + 1), key=reductions.__getitem__)
            while bottom < top and reductions[bottom] - at(SCAN[bottom], ALMOST_1) > STEADY:
                bottom += 1
            start = SCAN[bottom]
        path = cls.path(config, start=start)
        return path, [(point, at(*path.setting(point).values())) for point in path.points]

    @classmethod
    def between(cls, low, high, share):
        return {name: low[name] ** (1 - share) * high[name] ** share for name in low}

    @classmethod
    def layer_flops(cls, config, branch, layer, tokens):
        """Count the alignment scores of all tokens, protected ones included, in the layers that prune.

        If the branch's width differs from the alignment tokens', inference folds the projection into the alignment
        tokens, once per pass (not counted). Each token is then multiplied with T columns of the branch's width.
        """
        prunes = config.pruning_layers is None or layer < config.pruning_layers
        return tokens * config.num_alignment_tokens * branch.hidden_size if prunes else 0.0

    # A layer

    def prunes(self, layer: int, sequences: Sequences) -> bool:
        """Return whether the layer prunes and, of the removable tokens, `min_kept` can stay and two more can go."""
        if self.num_layers is not None and layer >= self.num_layers:
            return False
        return self.temperature > 0 and self.spec.num_removable(sequences) >= self.min_kept + 2

    def divide(self, sequences, width):
        """Divide the batch, but keep it whole where the samples' token counts depend on one another."""
        return divide(sequences, width) if self.granularity == "instance" else whole(sequences)

    def read_input(self, layer, states, sequences):
        """Compute a layer's alignment scores (R, T) and alignment feature (B, T, E) from its input (R, D).

        The feature is None if the loss does not need it.
        """
        alignment = self.alignment[layer] if isinstance(self.alignment, list) else self.alignment
        if alignment.weight is not None:
            return F.linear(states, alignment.weight, alignment.bias), None
        # A projection on another device returns its result there.
        tokens = states if alignment.projection is None else alignment.projection(states).to(states.device)
        scores = alignment_scores(tokens, alignment.tokens)
        if not self.with_feature:
            return scores, None
        chunking, features = self.divide(sequences, states.shape[1]), []
        for chunk in chunking.chunks(sequences):
            removable = self.spec.removable(chunk)
            chunk_scores, chunk_tokens = chunk.pad(scores)[:, removable], chunk.pad(tokens)[:, removable]
            features.append(alignment_feature(chunk_scores, chunk_tokens, self.spec.mask(chunk)))
        return scores, chunking.join_samples(features)

    def fits_kernels(self, scores: torch.Tensor) -> bool:
        """Return whether Triton's kernels can decide from these scores (R, T), for this branch.

        It must have one protected token at the front and at most one at the end, and the last protected one pools.
        """
        spec = self.spec
        known = spec.num_prefix_tokens == 1 and spec.num_suffix_tokens in (0, 1)
        pools = spec.pooling == "last" if spec.num_suffix_tokens else spec.pooling == "first"
        needs_gradient = scores.requires_grad and torch.is_grad_enabled()
        return self.granularity == "instance" and known and pools and not needs_gradient

    def attend_in_kernels(self, query_key_value, scores, sequences: Sequences) -> Attended | None:
        """Compute self-attention, importance and the decision in Triton's kernels; None if they do not fit."""
        spec = self.spec
        if not self.fits_kernels(scores):
            return None
        protects_last = spec.num_suffix_tokens == 1
        output, *statistics = scored_varlen_attention(
            *query_key_value.unbind(1), sequences.cu_seqlens, sequences.max_seqlen, spec.is_causal, protects_last
        )
        importance, destination, cu_seqlens = gate(
            scores, *statistics, sequences.cu_seqlens, self.temperature, self.min_kept, protects_last, self.factor
        )
        decision = Decision(importance, destination=destination, cu_seqlens=cu_seqlens)
        return Attended(output.flatten(1), whole(sequences), [decision])

    def importance(self, statistics, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Compute the importance (n, N) from attention's statistics and scores (n, N, T); mask (n, N) is float."""
        return token_importance(statistics, scores, mask)

    def decide(self, layer, statistics, scores, chunk) -> Decision:
        """Decide which tokens of a chunk stay, from its statistics and the batch's alignment scores (R, T)."""
        scores = chunk.pad(scores)[:, self.spec.removable(chunk)]
        importance = self.importance(statistics, scores, self.spec.float_mask(chunk))
        stays, merges, length = self.select(layer, importance, scores, chunk)
        return Decision(merge_weights(importance, stays, merges), stays, merges, length=length)

    def select(self, layer: int, importance: torch.Tensor, scores: torch.Tensor, chunk: Sequences):
        """Select the tokens of a chunk whose importance (n, N) is above the threshold of the scores (n, N, T).

        Returns `Decision`'s stays, merges and length.
        """
        spec = self.spec
        mask, float_mask, counts = spec.mask(chunk), spec.float_mask(chunk), spec.counts(chunk)
        length = None
        if self.token_counts is not None:
            length = min(self.token_counts[layer], chunk.max_seqlen)
            number = length - spec.num_protected - self.adds_token
            goes = ~most_important(importance, min(max(number, 1), spec.num_removable(chunk)), mask)
        else:
            if mask is not None and (spec.num_suffix_tokens or not chunk.is_varlen):
                scores = scores.where(mask.unsqueeze(-1), scores[:, :1])  # padding may have scores of any size
            goes = importance <= importance_threshold(scores, importance, self.temperature, float_mask, self.factor)
            if self.granularity == "batch":
                number = (~goes if mask is None else mask & ~goes).sum(dim=1).amax()
                goes = ~most_important(importance, number, mask)
        min_gone = 2 if length is None or self.adds_token else 1
        return *select_tokens(goes, mask, counts, self.min_kept, min_gone), length

    def to(self, device, non_blocking: bool = False) -> "MadtpMethod":
        def moved(alignment: AlignmentTokens) -> AlignmentTokens:
            tensors = (alignment.tokens, alignment.weight, alignment.bias)
            tokens, weight, bias = (x if x is None else x.to(device, non_blocking=non_blocking) for x in tensors)
            return AlignmentTokens(tokens, alignment.projection, weight, bias)

        other = copy.copy(self)
        is_list = isinstance(self.alignment, list)
        other.alignment = [moved(layer) for layer in self.alignment] if is_list else moved(self.alignment)
        return other
