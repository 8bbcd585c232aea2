"""How a batch's tokens become fewer: what a method answers for a layer, and the one place that turns it into new rows.

Shapes: in a part of the batch n sequences of up to L tokens; N tokens of each can go (its first token, and where the
host says so its last, are protected).
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from .attention import TokenRoles
from .padding import LONGER_THAN_ANY
from .sequences import Division, Sequences, scatter_rows, take_slots
from .triton_kernels import merge


class Reduction(NamedTuple):
    """The decision of a method for one layer: which tokens stay, and how the others merge.

    stays (n, N) bool: the tokens that stay, False at padding.
    merges (n, 1) bool: the sequences that get a new token, behind those that stay, for those that go.
    weight (n, N): the weight of each token that goes in the token that it enters; 0 at those that stay and at padding.
    into (n, N) int64, optional: instead of a new token, the slot of the staying token that each enters, whose own
        weight is then 1 less what enters it.
    length: how many rows each sequence gets, if that is fixed: those that need fewer are padded.
    """

    stays: torch.Tensor
    merges: torch.Tensor
    weight: torch.Tensor
    into: torch.Tensor | None = None
    length: int | None = None


class Repacking(NamedTuple):
    """Where the tokens of a part of the batch go when surviving tokens are repacked.

    numbers (n, C): of each column's new row, counted from 1, or 0 for none, among `num_rows`; columns are the first
        token, those that can go, the merged one and, where it is protected, the last. For a fixed length instead
        `order` (n, length): the columns that are taken.
    """

    part: Sequences
    num_rows: int
    roles: TokenRoles
    numbers: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def __call__(self, padded: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        """Repack padded states (n, L, D) and merged tokens (n, D) into new rows (num_rows, D)."""
        columns = [padded[:, : 1 + self.roles.num_removable(self.part)], merged.unsqueeze(1)]
        if self.roles.protects_last:
            columns.append(self._last(padded))
        if self.order is not None:
            return take_slots(torch.cat(columns, dim=1), self.order).flatten(0, 1)
        rows = padded.new_empty(self.num_rows + 1, *padded.shape[2:])
        for states, numbers in zip(columns, self.numbers.split([states.shape[1] for states in columns], dim=1)):
            rows.index_put_((numbers,), states)
        return rows[1:]

    def _last(self, padded: torch.Tensor) -> torch.Tensor:
        if self.part.mask is None:
            return padded[:, -1:]
        return take_slots(padded, (self.part.lengths - 1).unsqueeze(1))


def stay_table(reduction: Reduction, part: Sequences, roles: TokenRoles) -> torch.Tensor:
    """Return a mask (n, C) of the columns that become new rows."""
    always = torch.ones_like(reduction.merges) if part.mask is None else part.mask[:, :1]
    merges = reduction.merges if reduction.into is None else ~always
    return torch.cat([always, reduction.stays, merges, *[always] * roles.protects_last], dim=1)


def enter_tokens(padded: torch.Tensor, reduction: Reduction) -> tuple[torch.Tensor, torch.Tensor]:
    """Add dropped tokens to the tokens that absorb them: padded states (n, L, D) -> the same, and the merged tokens
    (n, D)."""
    num_removable = reduction.stays.shape[1]
    tokens = padded[:, 1 : 1 + num_removable]
    if reduction.into is None:
        with torch.autocast(padded.device.type, enabled=False):
            return padded, (reduction.weight.unsqueeze(1).to(padded.dtype) @ tokens).squeeze(1)
    entering = torch.zeros_like(reduction.weight).scatter_add(1, reduction.into, reduction.weight)
    own = tokens.float() * (1 - entering).unsqueeze(-1)
    others = tokens.float() * reduction.weight.unsqueeze(-1)
    tokens = own.scatter_add(1, reduction.into.unsqueeze(-1).expand_as(others), others).to(padded.dtype)
    return torch.cat([padded[:, :1], tokens, padded[:, 1 + num_removable :]], dim=1), padded[:, 0]


class KernelReduction(NamedTuple):
    """The decision of Triton's gate for one layer (see `triton_kernels.gate`): importance (R,), destination (R,),
    new_cu_seqlens (B + 1,)."""

    importance: torch.Tensor
    destination: torch.Tensor
    new_cu_seqlens: torch.Tensor


# What follows the positions (R,) of a layer's rows to those that it leaves (R',), -1 for merged tokens.
Move = Callable[[torch.Tensor], torch.Tensor]


def reduce(
    states: torch.Tensor, sequences: Sequences, division: Division, reductions: list[Reduction], roles: TokenRoles
) -> tuple[torch.Tensor, Sequences, Move | None]:
    """Repack the surviving tokens, as a method decided for each part of the batch: states (R, D) -> (R', D), their
    layout, and where the rows went.

    Waits for the device once, to learn how many rows there are; not where lengths are fixed. The last is None where
    nothing changed.
    """
    if isinstance(reductions[0], KernelReduction):
        return _reduce_by_kernel(states, sequences, reductions[0])
    if reductions[0].length is not None:
        return _reduce_to_length(states, sequences, reductions[0], roles)
    parts = sequences.parts(division)
    tables = [stay_table(reduction, part, roles) for part, reduction in zip(parts, reductions)]
    lengths = sequences.join_samples([table.sum(dim=1) for table in tables], division)
    row_counts = lengths.tolist()
    if sum(row_counts) == sequences.num_rows:  # one that merges has fewer
        return states, sequences, None
    ordered = row_counts if division.order is None else [row_counts[sample] for sample in division.order]
    outputs, repackings = [], []
    for part, start, reduction, table in zip(parts, division.bounds, reductions, tables):
        numbers = table.flatten().cumsum(0).view_as(table).mul_(table)
        repacking = Repacking(part, sum(ordered[start : start + part.batch_size]), roles, numbers=numbers)
        outputs.append(repacking(*enter_tokens(part.pad(states), reduction)))
        repackings.append(repacking)

    def move(positions: torch.Tensor) -> torch.Tensor:
        moved = [move_along(repacking, positions) for repacking in repackings]
        return sequences.join_rows(moved, division, row_counts)

    states = sequences.join_rows(outputs, division, row_counts)
    return states, Sequences.varlen(row_counts, states.device, lengths, before=sequences), move


def _reduce_to_length(states, sequences: Sequences, reduction: Reduction, roles: TokenRoles):
    length = reduction.length
    if length == sequences.max_seqlen:
        return states, sequences, None
    table = stay_table(reduction, sequences, roles)
    num_columns = table.shape[1]
    # The columns that are rows come first, in their order; by an operation that ONNX knows.
    order = (table * LONGER_THAN_ANY - torch.arange(num_columns, device=table.device)).topk(length).indices
    repacking = Repacking(sequences, sequences.batch_size * length, roles, order=order)
    mask = lengths = None
    if sequences.mask is not None:
        lengths = table.sum(dim=1)
        mask = torch.arange(length, device=table.device) < lengths.unsqueeze(1)
    states = repacking(*enter_tokens(sequences.pad(states), reduction))
    sequences = Sequences.padded(sequences.batch_size, length, states.device, mask, lengths)
    return states, sequences, lambda positions: move_along(repacking, positions)


def move_along(repacking: Repacking, positions: torch.Tensor) -> torch.Tensor:
    """Map positions (R,) of a batch's rows to those of a part's new rows; -1 for merged tokens."""
    nowhere = positions.new_full((repacking.part.batch_size, 1), -1)
    return repacking(repacking.part.pad(positions).unsqueeze(-1), nowhere).squeeze(1)


def _reduce_by_kernel(states: torch.Tensor, sequences: Sequences, reduction: KernelReduction):
    importance, destination, new_cu_seqlens = reduction
    offsets = new_cu_seqlens.tolist()
    if offsets[-1] == sequences.num_rows:
        return states, sequences, None
    states = merge(states, importance, destination, sequences.cu_seqlens, new_cu_seqlens, offsets[-1])

    def move(positions: torch.Tensor) -> torch.Tensor:
        starts = new_cu_seqlens[:-1].repeat_interleave(sequences.lengths, output_size=sequences.num_rows)
        numbers = torch.where(destination >= 0, starts + destination + 1, 0).long()
        return scatter_rows(positions, numbers, offsets[-1], fill=-1)

    row_counts = [end - start for start, end in itertools.pairwise(offsets)]
    reduced = Sequences.varlen(row_counts, states.device, before=sequences)
    if reduced.is_varlen:
        reduced.cu_seqlens = new_cu_seqlens
    return states, reduced, move
