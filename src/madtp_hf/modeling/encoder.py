"""The encoder layer that hosts share, and the loop that runs the layers while tokens are reduced from layer to layer.

Shapes: R rows of all sequences; in a chunk of the batch, n sequences; N removable tokens, T alignment tokens, D width
of the branch, E width of the alignment tokens.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .attention import (
    CLASS_TOKEN_FIRST,
    BranchSpec,
    attend,
    attend_and_keep_maps,
    attend_with_statistics,
    has_only_real_rows,
)
from .sequences import Chunking, Sequences, count_tokens
from .token_pruning import (
    alignment_feature,
    alignment_scores,
    importance_threshold,
    keep_all_or_enough,
    merge_weights,
    most_important,
    select_tokens,
    token_importance,
)
from .repack import Decision, KernelDecision, Move, repack
from .triton_kernels import KERNEL_ERRORS, disable, gate, is_available, scored_varlen_attention


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


class PruningMethod:
    """The base class of pruning methods: prunes the tokens of one branch in one forward pass.

    A method implements `decide`. It collects what `decide` needs in `attend_chunk`, or from a layer's input in
    `read_input`. An object serves a single forward pass, so it may carry state from layer to layer. It must store that
    state by layer number, because gradient checkpointing runs a layer twice. `PrunedModelMixin.set_pruning_method`
    sets the method of a model.
    """

    spec = CLASS_TOKEN_FIRST
    with_feature = False  # whether the loss needs each layer's alignment feature

    def prunes(self, layer: int, sequences: Sequences) -> bool:
        """Return whether this layer may remove tokens or uses the method's attention; if not, attention is plain."""
        return True

    def divide(self, sequences: Sequences, width: int) -> Chunking:
        """Divide the batch into the chunks that attention takes one at a time, for states of this width."""
        return sequences.divide(width)

    def read_input(self, layer: int, states: torch.Tensor, sequences: Sequences):
        """Compute the tokens' scores (R, T) and the alignment feature (B, T, E) from a layer's input (R, D).

        Each is None if the method does not use it.
        """
        return None, None

    def attend_chunk(self, layer: int, query_key_value: torch.Tensor, chunk: Sequences, dropout: float, all_maps=None):
        """Compute self-attention of (R, 3, H, d) within a chunk of the batch.

        Returns the output (rows of the chunk, H * d) and the statistics for `decide`. all_maps: an optional list that the
        chunk's attention maps (n, H, L, L) are appended to.
        """
        return attend_with_statistics(query_key_value, chunk, self.spec, dropout, all_maps)

    def decide(self, layer: int, statistics, scores: torch.Tensor | None, chunk: Sequences) -> Decision:
        """Choose the tokens of a chunk that stay, from its statistics and the batch's scores (R, T)."""
        raise NotImplementedError

    def attend(
        self, layer: int, query_key_value: torch.Tensor, scores, sequences: Sequences, dropout: float, all_maps=None
    ):
        """Compute self-attention of (R, 3, H, d), and decide the method of each chunk of the batch.

        Returns the output (R, H * d), and the chunking of the batch together with the decisions of its chunks.
        """
        chunking = self.divide(sequences, query_key_value.shape[2] * query_key_value.shape[3])
        chunks = sequences.chunks(chunking)
        outputs, decisions = [], []
        for chunk in chunks:
            output, statistics = self.attend_chunk(layer, query_key_value, chunk, dropout, all_maps)
            outputs.append(output)
            decisions.append(self.decide(layer, statistics, scores, chunk))
        return sequences.join_rows(outputs, chunking), (chunking, decisions)

    def to(self, device, non_blocking: bool = False) -> "PruningMethod":
        """Move to a device, for models whose layers are on several devices; here, there is nothing to move."""
        return self


class MadtpMethod(PruningMethod):
    """MADTP's method: keeps the tokens whose importance is above a threshold, and merges the others into one.

    Args:
        alignment (`AlignmentTokens` or `list[AlignmentTokens]`):
            What tokens are scored with; a list has one entry per layer.
        temperature (`float`):
            The threshold's temperature; 0 removes no token, but still computes the alignment feature.
        granularity (`str`):
            `"instance"`: each sample keeps the tokens above its own threshold. `"batch"`: all samples keep as many as
            the largest of these counts in the batch. `"frozen"`: each layer leaves its number in `token_counts`.
        with_feature (`bool`):
            Whether the loss needs the alignment feature.
        spec (`BranchSpec`):
            Which tokens are protected, and which is the pooling query.
        token_counts (`list[int]`, *optional*):
            How many tokens each layer leaves, protected and merged tokens included.
        min_kept (`int`, *optional*, defaults to 1):
            A layer prunes a sample only if at least this many of its removable tokens stay.
        factor (`float`, *optional*, defaults to 1.0):
            Multiplies the threshold.
    """

    has_kernels = True  # Triton's gate computes `importance`; a subclass with another importance sets False

    def __init__(
        self, alignment, temperature, granularity, with_feature, spec, token_counts=None, min_kept=1, factor=1.0
    ):
        self.alignment, self.temperature, self.granularity = alignment, temperature, granularity
        self.factor = factor
        self.with_feature, self.spec, self.token_counts, self.min_kept = with_feature, spec, token_counts, min_kept

    def prunes(self, layer: int, sequences: Sequences) -> bool:
        """Return whether pruning is on and, of the removable tokens, `min_kept` can stay and two more can go."""
        return self.temperature > 0 and self.spec.num_removable(sequences) >= self.min_kept + 2

    def divide(self, sequences: Sequences, width: int) -> Chunking:
        """Divide the batch, but keep it whole where the samples' token counts depend on one another."""
        return sequences.divide(width) if self.granularity == "instance" else sequences.whole

    def read_input(self, layer: int, states: torch.Tensor, sequences: Sequences):
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
        for chunk in sequences.chunks(chunking):
            removable = slice(1, 1 + self.spec.num_removable(chunk))
            seen = (chunk.pad(scores)[:, removable], chunk.pad(tokens)[:, removable])
            features.append(alignment_feature(*seen, self.spec.removable(chunk)))
        return scores, sequences.join_samples(features, chunking)

    def attend(self, layer, query_key_value, scores, sequences, dropout, all_maps=None):
        if all_maps is None and self._runs_in_kernels(query_key_value, scores, sequences, dropout):
            try:
                return self._attend_in_kernels(query_key_value, scores, sequences)
            except KERNEL_ERRORS as error:
                disable(error)
        return super().attend(layer, query_key_value, scores, sequences, dropout, all_maps)

    def _runs_in_kernels(self, query_key_value, scores, sequences: Sequences, dropout: float) -> bool:
        return (
            self.has_kernels
            and self.granularity == "instance"
            and not dropout
            and is_available(query_key_value)
            and not (scores.requires_grad and torch.is_grad_enabled())
            and has_only_real_rows(sequences)
        )

    def _attend_in_kernels(self, query_key_value, scores, sequences: Sequences):
        output, *statistics = scored_varlen_attention(
            *query_key_value.unbind(1), sequences.cu_seqlens, sequences.max_seqlen, *reversed(self.spec)
        )
        spec = self.spec
        decided = gate(
            scores, *statistics, sequences.cu_seqlens, self.temperature, self.min_kept, spec.protects_last, self.factor
        )
        return output.flatten(1), (sequences.whole, [KernelDecision(*decided)])

    def importance(self, statistics, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Compute the importance (n, N) from attention's statistics and scores (n, N, T); mask (n, N) is float."""
        return token_importance(statistics, scores, mask)

    def decide(self, layer: int, statistics, scores: torch.Tensor, chunk: Sequences) -> Decision:
        """Choose the tokens of a chunk that stay, from its statistics and the batch's alignment scores (R, T)."""
        spec, num_removable = self.spec, self.spec.num_removable(chunk)
        mask, weights, counts = spec.removable(chunk), spec.removable_weights(chunk), spec.removable_counts(chunk)
        scores = chunk.pad(scores)[:, 1 : 1 + num_removable]
        importance = self.importance(statistics, scores, weights)
        length = None
        if self.token_counts is not None:
            length = min(self.token_counts[layer], chunk.max_seqlen)
            # `length` includes the protected tokens and the merged one.
            number = length - 2 - spec.protects_last
            keep = most_important(importance, min(max(number, 1), num_removable), mask)
            stays, merges = keep_all_or_enough(keep, mask, counts, self.min_kept)
        else:
            if mask is not None and (spec.protects_last or not chunk.is_varlen):
                scores = scores.where(mask.unsqueeze(-1), scores[:, :1])  # padding may have scores of any size
            threshold = importance_threshold(scores, importance, self.temperature, weights, self.factor)
            if self.granularity == "batch":
                keep = importance > threshold
                number = (keep if mask is None else keep & mask).sum(dim=1).amax()
                keep = most_important(importance, number, mask)
                stays, merges = keep_all_or_enough(keep, mask, counts, self.min_kept)
            else:
                stays, merges = select_tokens(importance, threshold, mask, counts, self.min_kept)
        return Decision(stays, merges, merge_weights(importance, stays, merges), length=length)

    def to(self, device, non_blocking: bool = False) -> "MadtpMethod":
        def moved(alignment: AlignmentTokens) -> AlignmentTokens:
            tensors = (alignment.tokens, alignment.weight, alignment.bias)
            tokens, weight, bias = (x if x is None else x.to(device, non_blocking=non_blocking) for x in tensors)
            return AlignmentTokens(tokens, alignment.projection, weight, bias)

        other = copy.copy(self)
        is_list = isinstance(self.alignment, list)
        other.alignment = [moved(layer) for layer in self.alignment] if is_list else moved(self.alignment)
        return other


class LayerPlan(NamedTuple):
    """The options of a layer in one forward pass, resolved outside the layers so that none reads a configuration.

    attention: the implementation of attention that collects no statistics.
    index: the layer's number.
    spec: the spec of the branch's tokens.
    method: the pruning method, or None for a dense branch.
    with_maps: whether to return the maps of self-attention.
    """

    attention: str
    index: int
    spec: BranchSpec
    method: PruningMethod | None = None
    with_maps: bool = False


# A plain tuple, because gradient checkpointing passes tuples through: states (R, D), their layout, the alignment
# feature (B, T, E) or None, the `Move` of the layer's rows or None if no token was removed, and the self-attention
# maps (B, H, L, L) or None.
LayerOutput = tuple[torch.Tensor, Sequences, torch.Tensor | None, Move | None, torch.Tensor | None]


class PrunedLayer:
    """A transformer layer that prunes its tokens between self-attention and the rest of the layer.

    A host provides:

    project(states) -> query_key_value (R, 3, H, d)
    add_attention(output (R, H * d), states) -> states
    feed_forward(states, sequences, plan, *context) -> states, cross-attention included
    attention_dropout, a probability
    """

    def forward(self, states: torch.Tensor, sequences: Sequences, plan: LayerPlan, *context) -> LayerOutput:
        """Run the layer on states (R, D), laid out as `sequences`; `context` holds more inputs of `feed_forward`."""
        output, decided, feature, maps = self.attend(states, sequences, plan)
        states, sequences, moved = self.repack(self.add_attention(output, states), sequences, decided)
        return self.feed_forward(states, sequences, plan, *context), sequences, feature, moved, maps

    def attend(self, states, sequences: Sequences, plan: LayerPlan):
        """Compute self-attention's output (R, H * d), the decided method, the alignment feature and the maps.

        The last three are None where they are not needed.
        """
        method, query_key_value = plan.method, self.project(states)
        dropout = self.attention_dropout if self.training else 0.0
        prunes = method is not None and method.prunes(plan.index, sequences)
        scores = feature = decided = maps = None
        if prunes or (method is not None and method.with_feature):
            scores, feature = method.read_input(plan.index, states, sequences)
        if prunes:
            maps = [] if plan.with_maps else None
            output, decided = method.attend(plan.index, query_key_value, scores, sequences, dropout, maps)
            decided = (*decided, plan.spec)
            maps = join_maps(maps, sequences, decided[0]) if plan.with_maps else None
        elif plan.with_maps:
            output, maps = attend_and_keep_maps(query_key_value, sequences, plan.spec, dropout)
        else:
            projected, is_causal = query_key_value.unbind(1), plan.spec.is_causal
            output = attend(self, plan.attention, *projected, sequences, dropout=dropout, is_causal=is_causal)
        return output, decided, feature, maps

    def repack(self, states, sequences, decided):
        return (states, sequences, None) if decided is None else repack(states, sequences, *decided)


def join_maps(maps: list[torch.Tensor], sequences: Sequences, chunking: Chunking) -> torch.Tensor:
    """Join the chunks' maps (n, H, L, L), padded with zeros, into (B, H, max_seqlen, max_seqlen)."""
    missing = [sequences.max_seqlen - of_part.shape[-1] for of_part in maps]
    maps = [F.pad(of_part, (0, more, 0, more)) if more else of_part for of_part, more in zip(maps, missing)]
    return sequences.join_samples(maps, chunking)


class BranchOutput(NamedTuple):
    """The output of one branch's encoder.

    states (R, D): the last hidden states, laid out as `sequences`.
    feature (B, T, E): the alignment feature summed over layers, or None.
    num_tokens (layers + 1, B) int64: the number of tokens that enter the branch, then that each layer leaves.
    all_hidden_states: on request, the padded states that enter the branch and that each layer leaves; None in place of
        those that are not requested.
    positions: on request, layers + 1 tensors (B, L): each token's position in the branch's input, -1 for merged tokens
        and padding.
    attentions: on request, each layer's maps (B, H, L, L) over the tokens that enter it.
    pooled (B, D): the pooled states, if the host computes them.
    """

    states: torch.Tensor
    sequences: Sequences
    feature: torch.Tensor | None
    num_tokens: torch.Tensor
    all_hidden_states: tuple[torch.Tensor | None, ...] | None = None
    positions: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    pooled: torch.Tensor | None = None

    @property
    def hidden_states(self) -> torch.Tensor:
        """(B, L, D): the padded states, with padding after the real tokens."""
        return self.sequences.pad_zeros(self.states)

    @property
    def mask(self) -> torch.Tensor | None:
        """(B, L) bool: True at the real tokens of `hidden_states`; None without padding."""
        return self.sequences.mask

    @property
    def class_states(self) -> torch.Tensor:
        """(B, D): the state of each sequence's first token."""
        return self.sequences.first(self.states)


def real_tokens(branch: BranchOutput) -> torch.Tensor:
    """Return a (B, L) bool mask of the real tokens of a branch's hidden states, all True if nothing is padded."""
    if branch.mask is not None:
        return branch.mask
    shape = (branch.sequences.batch_size, branch.sequences.max_seqlen)
    return torch.ones(shape, dtype=torch.bool, device=branch.states.device)


def as_model_output(branch: BranchOutput) -> BaseModelOutputWithPooling:
    """Convert a branch's output to what transformers' encoders return."""
    return BaseModelOutputWithPooling(
        last_hidden_state=branch.hidden_states,
        pooler_output=branch.pooled,
        hidden_states=branch.all_hidden_states,
        attentions=branch.attentions,
    )


def run_layers(
    layers: nn.ModuleList,
    states: torch.Tensor,
    sequences: Sequences,
    attention: str,
    method: PruningMethod | None = None,
    spec: BranchSpec = CLASS_TOKEN_FIRST,
    output_hidden_states: bool | int | list[int] = False,
    output_positions: bool = False,
    output_attentions: bool = False,
    context: tuple = (),
) -> BranchOutput:
    """Run an encoder's layers, each on the tokens that the previous layer left.

    Args:
        states (`torch.Tensor` of shape `(R, D)`):
            The encoder's input, laid out as `sequences`.
        attention (`str`):
            The implementation of attention that collects no statistics, see `attend`.
        method (`PruningMethod`, *optional*):
            The pruning method of this pass; None for a dense encoder.
        output_hidden_states (`bool`, `int` or `list[int]`, *optional*, defaults to `False`):
            Which hidden states to return: all, none, or those of these indices.
        context (`tuple`, *optional*):
            More inputs of each layer, such as the states for cross-attention.
    """
    history, feature = [sequences], None
    wanted = _wanted_hidden_states(output_hidden_states, len(layers) + 1)
    all_hidden_states = []

    def record(states, sequences):
        """Record padded states on request; layers go on from the recorded tensor, so that its gradient can be read."""
        padded = sequences.pad_zeros(states) if len(all_hidden_states) in wanted else None
        all_hidden_states.append(padded)
        return states if padded is None else sequences.unpad(padded)

    states = record(states, sequences)
    positions = sequences.positions if output_positions else None
    all_positions = [_padded_positions(positions, sequences)] if output_positions else None
    attentions = [] if output_attentions else None
    for index, layer in enumerate(layers):
        plan = LayerPlan(attention, index, spec, method, output_attentions)
        states, sequences, layer_feature, moved, maps = layer(states, sequences, plan, *context)
        if layer_feature is not None:
            feature = layer_feature if feature is None else feature + layer_feature
        history.append(sequences)
        states = record(states, sequences)
        if output_attentions:
            attentions.append(maps)
        if output_positions:
            positions = positions if moved is None else moved(positions)
            all_positions.append(_padded_positions(positions, sequences))
    return BranchOutput(
        states,
        sequences,
        feature,
        count_tokens(history),
        tuple(all_hidden_states) if output_hidden_states is not False and output_hidden_states is not None else None,
        tuple(all_positions) if output_positions else None,
        tuple(attentions) if output_attentions else None,
    )


def _wanted_hidden_states(output_hidden_states, number: int) -> set[int]:
    """Return the indices of the requested hidden states among `number`: all, none or, as in transformers, some."""
    if isinstance(output_hidden_states, bool) or output_hidden_states is None:
        return set(range(number)) if output_hidden_states else set()
    indices = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    return {index % number for index in indices if -number <= index < number}


def _padded_positions(positions: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    padded = sequences.pad(positions)
    return padded if sequences.mask is None else padded.where(sequences.mask, -1)
