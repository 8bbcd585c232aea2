"""Repacking: the one place that applies a method's decision, and lays out the rows that stay contiguously.

Shapes: in a chunk of the batch, n sequences of up to L tokens, N of which are removable.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .attention import BranchSpec, in_kernels
from .padding import LONGER_THAN_ANY
from .pruning_method import Attended, Decision
from .sequences import Sequences, scatter_rows, take_tokens
from .token_pruning import without_autocast
from .triton_kernels import merge
from .triton_merging import merge_similar


class ChunkRepacking(NamedTuple):
    """The new rows of a chunk of the batch.

    There are C columns: the protected tokens at the front, the removable tokens, the merged token, and the protected
    tokens at the end.

    num_rows: the number of new rows.
    numbers (n, C): the new row of each column, counted from 1; 0 if the column gets none.
    order (n, length), instead of `numbers` for a fixed length: the columns that become the new rows.
    """

    chunk: Sequences
    num_rows: int
    spec: BranchSpec
    numbers: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def __call__(self, padded: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        """Repack padded states (n, L, D) and merged tokens (n, D) into the new rows (num_rows, D)."""
        columns = [padded[:, : self.spec.removable(self.chunk).stop], merged.unsqueeze(1)]
        if self.spec.num_suffix_tokens:
            columns.append(self._suffix(padded))
        if self.order is not None:
            return take_tokens(torch.cat(columns, dim=1), self.order).flatten(0, 1)
        rows = padded.new_empty(self.num_rows + 1, *padded.shape[2:])
        for states, numbers in zip(columns, self.numbers.split([states.shape[1] for states in columns], dim=1)):
            rows.index_put_((numbers,), states)
        return rows[1:]

    def sizes(self, decision: Decision) -> torch.Tensor | None:
        """Return the sizes of the new rows (num_rows,); protected tokens keep 1."""
        if decision.sizes is None:
            return None
        front = self.spec.num_prefix_tokens
        behind = self.chunk.max_seqlen - front - decision.sizes.shape[1]
        padded = F.pad(decision.sizes, (front, behind), value=1.0).unsqueeze(-1)
        return self(padded, torch.ones_like(padded[:, 0])).squeeze(-1)

    def _suffix(self, padded: torch.Tensor) -> torch.Tensor:
        number = self.spec.num_suffix_tokens
        if self.chunk.mask is None:
            return padded[:, -number:]
        last = (self.chunk.lengths - 1).unsqueeze(1)
        if number > 1:
            last = (last + torch.arange(1 - number, 1, device=last.device)).clamp(min=0)
        return take_tokens(padded, last)


def columns_that_stay(decision: Decision, chunk: Sequences, spec: BranchSpec) -> torch.Tensor:
    """Return an (n, C) bool table of the columns that become new rows."""
    front, end = spec.num_prefix_tokens, spec.num_suffix_tokens
    none_merge = decision.into is not None
    if chunk.mask is None:
        always = torch.ones_like(decision.merges)
        merges = ~always if none_merge else decision.merges
        return torch.cat([*[always] * front, decision.stays, merges, *[always] * end], dim=1)
    merges = torch.zeros_like(decision.merges) if none_merge else decision.merges
    # The suffix's tokens are real if the sequence is longer than the prefix and the tokens of the suffix behind them.
    suffix = [chunk.mask[:, front + place : front + place + 1] for place in reversed(range(end))]
    return torch.cat([chunk.mask[:, :front], decision.stays, merges, *suffix], dim=1)


def merge_tokens(padded: torch.Tensor, decision: Decision, spec: BranchSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the removed tokens; return the padded states (n, L, D) and the merged tokens (n, D).

    With `into`, tokens are merged into padded states, and the merged tokens are placeholders.
    """
    removable = slice(spec.num_prefix_tokens, spec.num_prefix_tokens + decision.stays.shape[1])
    tokens = padded[:, removable]
    if decision.into is None:
        with without_autocast(padded.device.type):
            return padded, (decision.weight.unsqueeze(1).to(padded.dtype) @ tokens).squeeze(1)
    entering = torch.zeros_like(decision.weight).scatter_add(1, decision.into, decision.weight)
    own = tokens.float() * (1 - entering).unsqueeze(-1)
    others = tokens.float() * decision.weight.unsqueeze(-1)
    tokens = own.scatter_add(1, decision.into.unsqueeze(-1).expand_as(others), others).to(padded.dtype)
    return torch.cat([padded[:, : removable.start], tokens, padded[:, removable.stop :]], dim=1), padded[:, 0]


class Repacked(NamedTuple):
    """The rows that a layer leaves.

    states (R', D), laid out as `sequences`.
    moved: maps the positions (R,) of the layer's rows to those of the rows that it leaves, -1 for merged tokens; None
        if no row was removed.
    """

    states: torch.Tensor
    sequences: Sequences
    moved: Callable[[torch.Tensor], torch.Tensor] | None = None


def repack(states: torch.Tensor, sequences: Sequences, attended: Attended, spec: BranchSpec) -> Repacked:
    """Apply a layer's decision to its states (R, D), if it made one.

    The host waits for the device once, to learn the number of rows, unless lengths are fixed.
    """
    if attended.decisions is None:
        return Repacked(states, sequences)
    first, chunking = attended.decisions[0], attended.chunking
    if first.destination is not None:
        return _repack_in_kernel(states, sequences, first)
    if first.length is not None:
        return _repack_to_length(states, sequences, first, spec)
    chunks = chunking.chunks(sequences)
    tables = [columns_that_stay(decision, chunk, spec) for chunk, decision in zip(chunks, attended.decisions)]
    lengths = chunking.join_samples([table.sum(dim=1) for table in tables])
    row_counts = lengths.tolist()
    if sum(row_counts) == sequences.num_rows:  # a sequence that merges loses rows
        return Repacked(states, sequences)
    ordered = row_counts if chunking.order is None else [row_counts[sample] for sample in chunking.order]
    outputs, sizes, repackings = [], [], []
    for chunk, start, decision, table in zip(chunks, chunking.bounds, attended.decisions, tables):
        numbers = table.flatten().cumsum(0).view_as(table).mul_(table)
        num_rows = sum(ordered[start : start + chunk.batch_size])
        repacking = ChunkRepacking(chunk, num_rows, spec, numbers=numbers)
        outputs.append(repacking(*merge_tokens(chunk.pad(states), decision, spec)))
        sizes.append(repacking.sizes(decision))
        repackings.append(repacking)

    def moved(positions: torch.Tensor) -> torch.Tensor:
        return chunking.join_rows([_move(repacking, positions) for repacking in repackings], sequences, row_counts)

    states = chunking.join_rows(outputs, sequences, row_counts)
    layout = Sequences.varlen(row_counts, states.device, lengths, before=sequences)
    layout.sizes = None if first.sizes is None else chunking.join_rows(sizes, sequences, row_counts)
    return Repacked(states, layout, moved)


def _repack_to_length(states, sequences: Sequences, decision: Decision, spec: BranchSpec) -> Repacked:
    length = decision.length
    if length == sequences.max_seqlen:
        return Repacked(states, sequences)
    table = columns_that_stay(decision, sequences, spec)
    num_columns = table.shape[1]
    # The columns that become rows come first, in their order. `topk` can be exported to ONNX, unlike a stable sort.
    order = (table * LONGER_THAN_ANY - torch.arange(num_columns, device=table.device)).topk(length).indices
    repacking = ChunkRepacking(sequences, sequences.batch_size * length, spec, order=order)
    mask = lengths = None
    if sequences.mask is not None:
        lengths = table.sum(dim=1)
        mask = torch.arange(length, device=table.device) < lengths.unsqueeze(1)
    states = repacking(*merge_tokens(sequences.pad(states), decision, spec))
    layout = Sequences.padded(sequences.batch_size, length, states.device, mask, lengths)
    layout.sizes = repacking.sizes(decision)
    return Repacked(states, layout, lambda positions: _move(repacking, positions))


def _move(repacking: ChunkRepacking, positions: torch.Tensor) -> torch.Tensor:
    """Map the positions (R,) of a batch's rows to those of a chunk's new rows, -1 for merged tokens."""
    merged = positions.new_full((repacking.chunk.batch_size, 1), -1)
    return repacking(repacking.chunk.pad(positions).unsqueeze(-1), merged).squeeze(1)


def _repack_in_kernel(states: torch.Tensor, sequences: Sequences, decision: Decision) -> Repacked:
    offsets = decision.cu_seqlens.tolist()
    if offsets[-1] == sequences.num_rows:
        return Repacked(states, sequences)
    row_counts = [end - start for start, end in itertools.pairwise(offsets)]
    layouts = sequences.cu_seqlens, decision.cu_seqlens, offsets[-1]
    if decision.sizes is None:
        output = in_kernels(merge, states, decision.weight, decision.destination, *layouts)
        merged = None if output is None else (output, None)
    else:
        merged = in_kernels(merge_similar, states, decision.destination, decision.sizes, *layouts, max(row_counts))
    states, sizes = _merge_rows(states, sequences, decision, offsets[-1]) if merged is None else merged

    def moved(positions: torch.Tensor) -> torch.Tensor:
        starts = decision.cu_seqlens[:-1].repeat_interleave(sequences.lengths, output_size=sequences.num_rows)
        numbers = torch.where(decision.destination >= 0, starts + decision.destination + 1, 0).long()
        return scatter_rows(positions, numbers, offsets[-1], fill=-1)

    layout = Sequences.varlen(row_counts, states.device, before=sequences)
    layout.sizes = sizes
    if layout.is_varlen:
        layout.cu_seqlens = decision.cu_seqlens
    return Repacked(states, layout, moved)


def _merge_rows(states: torch.Tensor, sequences: Sequences, decision: Decision, num_rows: int):
    """Merge as the kernels `merge` and `merge_similar` do, in torch.

    Returns the new rows (num_rows, D), and their sizes, None if the decision has none.
    """
    destination, counts = decision.destination, decision.sizes
    starts = decision.cu_seqlens[:-1].repeat_interleave(sequences.lengths, output_size=sequences.num_rows)
    into = (starts + torch.where(destination < 0, -1 - destination, destination)).long()
    if counts is None:
        counts = torch.where(destination < 0, decision.weight, 1.0)
    total = counts.new_zeros(num_rows).index_add(0, into, counts)
    weighted = states.float() * (counts / total[into]).unsqueeze(1)
    merged = weighted.new_zeros(num_rows, states.shape[1]).index_add(0, into, weighted).to(states.dtype)
    return merged, None if decision.sizes is None else total
