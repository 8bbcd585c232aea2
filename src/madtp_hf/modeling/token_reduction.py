"""Token reduction: what a method returns for a layer, and the one place that repacks the rows accordingly.

Shapes: in a part of the batch, n sequences of up to L tokens; N tokens of each are removable (the first token and, if
the host says so, the last are protected).
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from .attention import TokenRoles
from .padding import LONGER_THAN_ANY
from .sequences import Division, Sequences, scatter_rows, take_slots
from .token_pruning import without_autocast
from .triton_kernels import merge


class Reduction(NamedTuple):
    """What a method returns for a layer: which tokens stay, and how the others are merged.

    stays (n, N) bool: True at the tokens that stay, False at padding.
    merges (n, 1) bool: the sequences that get a merged token, placed after the removable tokens that stay.
    weight (n, N): the weight of each removed token in the token that it is merged into; 0 at tokens that stay and at
        padding.
    into (n, N) int64, optional: the slot of the staying token that each removed token is merged into, instead of a new
        token. The staying token's own weight is 1 minus the weights that are merged into it.
    length: the number of rows of each sequence, if it is fixed; sequences that need fewer rows are padded.
    """

    stays: torch.Tensor
    merges: torch.Tensor
    weight: torch.Tensor
    into: torch.Tensor | None = None
    length: int | None = None


class Repacking(NamedTuple):
    """The new rows of a part of the batch.

    There are C columns: the first token, the removable tokens, the merged token and, if it is protected, the last
    token.

    num_rows: the number of new rows.
    numbers (n, C): the new row of each column, counted from 1; 0 if the column gets none.
    order (n, length), instead of `numbers` for a fixed length: the columns that become the new rows.
    """

    part: Sequences
    num_rows: int
    roles: TokenRoles
    numbers: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def __call__(self, padded: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        """Repack padded states (n, L, D) and merged tokens (n, D) into the new rows (num_rows, D)."""
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
    """Return an (n, C) bool table of the columns that become new rows."""
    always = torch.ones_like(reduction.merges) if part.mask is None else part.mask[:, :1]
    merges = reduction.merges if reduction.into is None else ~always
    return torch.cat([always, reduction.stays, merges, *[always] * roles.protects_last], dim=1)


def enter_tokens(padded: torch.Tensor, reduction: Reduction) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the removed tokens; return the padded states (n, L, D) and the merged tokens (n, D).

    With `into`, tokens are merged into padded states, and the merged tokens are placeholders.
    """
    num_removable = reduction.stays.shape[1]
    tokens = padded[:, 1 : 1 + num_removable]
    if reduction.into is None:
        with without_autocast(padded.device.type):
            return padded, (reduction.weight.unsqueeze(1).to(padded.dtype) @ tokens).squeeze(1)
    entering = torch.zeros_like(reduction.weight).scatter_add(1, reduction.into, reduction.weight)
    own = tokens.float() * (1 - entering).unsqueeze(-1)
    others = tokens.float() * reduction.weight.unsqueeze(-1)
    tokens = own.scatter_add(1, reduction.into.unsqueeze(-1).expand_as(others), others).to(padded.dtype)
    return torch.cat([padded[:, :1], tokens, padded[:, 1 + num_removable :]], dim=1), padded[:, 0]


class KernelReduction(NamedTuple):
    """What `triton_kernels.gate` returns for a layer: importance (R,), destination (R,), new_cu_seqlens (B + 1,)."""

    importance: torch.Tensor
    destination: torch.Tensor
    new_cu_seqlens: torch.Tensor


# Maps the positions (R,) of a layer's rows to those of the rows that it leaves (R',), -1 for merged tokens.
Move = Callable[[torch.Tensor], torch.Tensor]


def reduce(
    states: torch.Tensor, sequences: Sequences, division: Division, reductions: list[Reduction], roles: TokenRoles
) -> tuple[torch.Tensor, Sequences, Move | None]:
    """Apply the reductions of a batch's parts to its states (R, D).

    The host waits for the device once, to learn the number of rows, unless lengths are fixed.

    Returns:
        The new states (R', D), their layout, and the `Move` of the rows, which is None if no row was removed.
    """
    if isinstance(reductions[0], KernelReduction):
        return _reduce_by_kernel(states, sequences, reductions[0])
    if reductions[0].length is not None:
        return _reduce_to_length(states, sequences, reductions[0], roles)
    parts = sequences.parts(division)
    tables = [stay_table(reduction, part, roles) for part, reduction in zip(parts, reductions)]
    lengths = sequences.join_samples([table.sum(dim=1) for table in tables], division)
    row_counts = lengths.tolist()
    if sum(row_counts) == sequences.num_rows:  # a sequence that merges loses rows
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
    # The columns that become rows come first, in their order. `topk` can be exported to ONNX, unlike a stable sort.
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
    """Map the positions (R,) of a batch's rows to those of a part's new rows, -1 for merged tokens."""
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
