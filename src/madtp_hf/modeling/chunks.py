"""How a CPU divides a batch for attention: into chunks of sequences of similar length, one chunk at a time.

On a CPU, a call costs little compared with its work, and padding costs arithmetic. Other devices take the whole batch
at once.
"""

import itertools
from typing import NamedTuple

import torch

from .sequences import Sequences, join


CHUNK_SIZE = 2**18  # elements in the states of a chunk of several sequences, at most
CHUNK_PADDING_SHARE = 1 / 8  # padding up to this share of a chunk's rows is always accepted
CHUNK_PADDING = 2**16  # more padding is accepted up to this many elements of the states
CHUNK_AREA = 2**15  # and, at the same time, up to this many elements of an attention map


# If False, a CPU takes the path of other devices.
CPU_TAKES_CHUNKS = True


def takes_chunks(device: torch.device) -> bool:
    """Return whether attention takes a batch chunk by chunk, as on a CPU, where reading values costs nothing.

    Other devices take the whole batch at once and avoid waiting for values.
    """
    return CPU_TAKES_CHUNKS and device.type == "cpu" and not torch.compiler.is_compiling()


class Chunking(NamedTuple):
    """A division of a batch into chunks.

    bounds: the place in `order` at which each chunk begins, then the number of sequences.
    order: the sequences in the order in which the chunks take them; None for the batch's own order.
    """

    bounds: tuple[int, ...]
    order: tuple[int, ...] | None = None

    def chunks(self, sequences: Sequences) -> list[Sequences]:
        """Return each chunk of a batch as a `Sequences`, which selects its rows from those of the batch."""
        if len(self.bounds) == 2:
            return [sequences]
        if self not in sequences.chunks:
            order = self.order or range(sequences.batch_size)
            bounds = itertools.pairwise(self.bounds)
            sequences.chunks[self] = [_chunk(sequences, list(order[start:stop])) for start, stop in bounds]
        return sequences.chunks[self]

    def join_rows(self, outputs: list[torch.Tensor], sequences: Sequences, row_counts: list[int] | None = None):
        """Join the rows that were computed for each chunk into rows of the batch.

        row_counts: the number of rows of each sequence, if it is no longer the layout's.
        """
        rows = join(outputs)
        if self.order is None:
            return rows
        counts = torch.tensor(sequences.row_counts if row_counts is None else row_counts, device="cpu")
        order = torch.tensor(self.order, device="cpu")
        in_chunks = torch.empty_like(counts)
        in_chunks[order] = counts[order].cumsum(0) - counts[order]
        shift = (in_chunks - (counts.cumsum(0) - counts)).repeat_interleave(counts)
        return rows.index_select(0, (shift + torch.arange(len(shift), device="cpu")).to(rows.device))

    def join_samples(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """Join what was computed for the sequences of each chunk, (n, ...), into that of the batch, (B, ...)."""
        samples = join(outputs)
        if self.order is None:
            return samples
        return samples.index_select(0, torch.tensor(self.order, device="cpu").argsort().to(samples.device))


def whole(sequences: Sequences) -> Chunking:
    """Return the chunking that takes the whole batch as one chunk."""
    return Chunking((0, sequences.batch_size))


def divide(sequences: Sequences, width: int) -> Chunking:
    """Divide a batch for attention over states of `width`: sequences of similar length form a chunk."""
    if not takes_chunks(sequences.device) or sequences.batch_size == 1:
        return whole(sequences)
    counts = sequences.row_counts
    order = sorted(range(sequences.batch_size), key=counts.__getitem__, reverse=True)
    bounds, rows, area = [0], 0, 0
    for index, sequence in enumerate(order):
        length, longest = counts[sequence], counts[order[bounds[-1]]]
        rows, area, number = rows + length, area + length**2, index + 1 - bounds[-1]
        padding, padded_rows = longest * number - rows, longest * number
        too_much_padding = padding > CHUNK_PADDING_SHARE * padded_rows and (
            padding > CHUNK_PADDING / width or longest**2 * number - area > CHUNK_AREA
        )
        if number > 1 and (padded_rows * width > CHUNK_SIZE or too_much_padding):
            bounds.append(index)
            rows, area = length, length**2
    if len(bounds) == 1:
        return whole(sequences)
    if len(bounds) == sequences.batch_size:  # one sequence a chunk, in the batch's order
        return Chunking(tuple(range(sequences.batch_size + 1)))
    ordered = order == sorted(order)
    return Chunking((*bounds, sequences.batch_size), None if ordered else tuple(order))


def _chunk(sequences: Sequences, samples: list[int]) -> Sequences:
    first, number = samples[0], len(samples)
    contiguous = samples == list(range(first, first + number))
    chosen = slice(first, first + number)
    if not contiguous:
        chosen = torch.tensor(samples, device="cpu").to(sequences.device)
    if sequences.is_varlen:
        counts = [sequences.row_counts[sample] for sample in samples]
        chunk = Sequences.varlen(counts, sequences.device, sequences.lengths[chosen], sequences.offsets[first])
    else:
        mask = None if sequences.mask is None else sequences.mask[chosen]
        chunk = Sequences.padded(number, sequences.max_seqlen, sequences.device, mask)
        chunk.first_row = first * sequences.max_seqlen
    chunk.sizes = sequences.sizes
    if not contiguous:
        chunk.batch_rows = _rows_of(sequences, samples, chunk.max_seqlen)
    return chunk


def _rows_of(sequences: Sequences, samples: list[int], length: int) -> torch.Tensor:
    """Return the row numbers (samples * length,) of these samples, each padded to `length` with its last row."""
    counts = torch.tensor(sequences.row_counts, device="cpu")
    starts = (counts.cumsum(0) - counts)[samples].to(sequences.device)
    last = counts[samples].to(sequences.device) - 1
    indices = torch.arange(length, device=sequences.device)
    return (starts.unsqueeze(1) + torch.minimum(indices, last.unsqueeze(1))).flatten()
