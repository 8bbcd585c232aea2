"""The pruned layer that hosts share, and the loop that runs the layers while tokens get fewer from layer to layer.

Shapes: R rows of all sequences; T alignment tokens, D width of the branch, E width of the alignment tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .attention import CLASS_TOKEN_FIRST, BranchSpec, attend, attend_and_keep_maps, attend_by_size
from .pruning_method import Attended, PruningMethod
from .repack import repack
from .sequences import Sequences, count_tokens


class LayerPlan(NamedTuple):
    """The options of a layer in one forward pass, resolved outside the layers so that none reads a configuration.

    attention: the implementation of attention that collects nothing for a method.
    index: the layer's number.
    spec: which tokens of the branch are protected, which query pools, and what tokens attend to.
    method: the pruning method, or None for a dense branch.
    with_maps: whether to return the maps of self-attention.
    """

    attention: str
    index: int
    spec: BranchSpec
    method: PruningMethod | None = None
    with_maps: bool = False


# A plain tuple, because gradient checkpointing passes tuples through: states (R', D), their layout, the alignment
# feature (B, T, E) or None, `Repacked.moved`, and the self-attention maps (B, H, L, L) or None.
LayerOutput = tuple[torch.Tensor, Sequences, torch.Tensor | None, Callable | None, torch.Tensor | None]


class PrunedLayer:
    """A transformer layer that prunes its tokens between self-attention and the rest of the layer.

    A host provides:

    project(states) -> query_key_value (R, 3, H, d), whose dtype attention computes in
    add_attention(output (R, H * d), states) -> states
    feed_forward(states, sequences, plan, *context) -> states, cross-attention included
    attention_dropout, a probability
    """

    def forward(self, states: torch.Tensor, sequences: Sequences, plan: LayerPlan, *context) -> LayerOutput:
        """Run the layer on states (R, D), laid out as `sequences`; `context` holds more inputs of `feed_forward`."""
        attended, feature, maps = self.attend(self.project(states), states, sequences, plan)
        states = self.add_attention(attended.output.to(states.dtype), states)
        repacked = repack(states, sequences, attended, plan.spec)
        states = self.feed_forward(repacked.states, repacked.sequences, plan, *context)
        return states, repacked.sequences, feature, repacked.moved, maps

    def attend(self, query_key_value: torch.Tensor, states, sequences: Sequences, plan: LayerPlan):
        """Compute self-attention, and decide which tokens stay; return an `Attended`, the feature and the maps.

        The last two are None where they are not needed.
        """
        method, dropout = plan.method, self.attention_dropout if self.training else 0.0
        prunes = method is not None and method.prunes(plan.index, sequences)
        scores = feature = maps = None
        if prunes or (method is not None and method.with_feature):
            scores, feature = method.read_input(plan.index, states, sequences)
        if prunes:
            maps = [] if plan.with_maps else None
            attended = method.attend(plan.index, query_key_value, scores, sequences, dropout, maps)
            maps = join_maps(maps, sequences, attended.chunking) if plan.with_maps else None
        elif plan.with_maps:
            output, maps = attend_and_keep_maps(query_key_value, sequences, plan.spec.is_causal, dropout)
            attended = Attended(output)
        elif sequences.sizes is not None:
            attended = Attended(attend_by_size(query_key_value, sequences, plan.spec, dropout))
        else:
            projected, is_causal = query_key_value.unbind(1), plan.spec.is_causal
            attended = Attended(
                attend(self, plan.attention, *projected, sequences, dropout=dropout, is_causal=is_causal)
            )
        return attended, feature, maps


def join_maps(maps: list[torch.Tensor], sequences: Sequences, chunking) -> torch.Tensor:
    """Join the chunks' maps (n, H, L, L), padded with zeros, into (B, H, max_seqlen, max_seqlen)."""
    missing = [sequences.max_seqlen - of_chunk.shape[-1] for of_chunk in maps]
    maps = [F.pad(of_chunk, (0, more, 0, more)) if more else of_chunk for of_chunk, more in zip(maps, missing)]
    return chunking.join_samples(maps)


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
    def first_states(self) -> torch.Tensor:
        """(B, D): the state of each sequence's first token, such as a class token."""
        return self.sequences.first(self.states)


def real_tokens(branch: BranchOutput) -> torch.Tensor:
    """Return a (B, L) bool mask of the real tokens of a branch's hidden states, all True if nothing is padded."""
    if branch.mask is not None:
        return branch.mask
    shape = (branch.sequences.batch_size, branch.sequences.max_seqlen)
    return torch.ones(shape, dtype=torch.bool, device=branch.states.device)


@dataclass
class EncoderOutput(BaseModelOutputWithPooling):
    """What transformers' encoders return and, with pruning on, a mask.

    last_hidden_state (B, L, D): the surviving tokens of each sequence, then padding.
    attention_mask (B, L) bool: with pruning on, True at the real tokens of `last_hidden_state`.
    """

    attention_mask: torch.Tensor | None = None


def as_model_output(branch: BranchOutput, pooled: torch.Tensor | None, with_mask: bool) -> EncoderOutput:
    """Convert a branch's output to what transformers' encoders return; `with_mask` if tokens may be missing."""
    return EncoderOutput(
        last_hidden_state=branch.hidden_states,
        pooler_output=pooled,
        hidden_states=branch.all_hidden_states,
        attentions=branch.attentions,
        attention_mask=real_tokens(branch) if with_mask else None,
    )


class Tower(nn.Module):
    """One branch's encoder, which its model calls with `as_branch=True`, and others as they call transformers'.

    A subclass implements `encode`, which returns a `BranchOutput`, and `encode_alone`, which returns one for a pass of
    the model, and the pooled states that transformers' encoder returns.
    """

    _owner = ()  # the model; in a tuple, since a module would be registered as a submodule

    def belong_to(self, model: nn.Module) -> None:
        self._owner = (model,)

    def call_alone(self, *inputs, output_hidden_states=None, output_attentions=None, **kwargs) -> EncoderOutput:
        model = self._owner[0]
        model._check_arguments(kwargs)
        outputs, pruning = model._outputs(output_hidden_states, output_attentions), model.start_pass()
        branch, pooled = self.encode_alone(model, pruning, *inputs, **outputs)
        return as_model_output(branch, pooled, pruning.is_on)


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
        spec (`BranchSpec`, *optional*):
            Which tokens are protected, and what they attend to. Defaults to a class token at the front.
        output_hidden_states (`bool`, `int` or `list[int]`, *optional*, defaults to `False`):
            Which hidden states to return: all, none, or those of these indices.
        context (`tuple`, *optional*):
            More inputs of each layer, such as the states for cross-attention.
    """
    history, feature = [sequences], None
    wanted = _wanted_hidden_states(output_hidden_states, len(layers) + 1)
    all_hidden_states = []

    def record(states, sequences):
        """Record padded states on request; layers continue from the recorded tensor, which so gets a gradient."""
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
