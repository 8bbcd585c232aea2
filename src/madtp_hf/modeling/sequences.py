"""How the sequences of a batch lie in memory.

States are (R, ...): R rows, the tokens of one sequence after those of the other. Linear maps, norms and feed-forward
need to know no more. What needs to know which rows are whose, attention above all, asks the batch's `Sequences`.
"""

import itertools
from typing import NamedTuple

import torch


# On a CPU, where a call costs little beside the work, attention takes some consecutive sequences of a batch at a time.
# Beyond so many numbers in their states they are taken one by one; of their rows, this share or so many numbers may be
# padding.
PART_SIZE = 2**18
PART_PADDING_SHARE = 1 / 8
PART_PADDING = 2**16
PART_AREA = 2**15  # or so many numbers of an attention map


# Set to False, a CPU takes the path of other devices.
CPU_TAKES_PARTS = True


def takes_parts(device: torch.device) -> bool:
    """Return whether attention processes a batch part by part, as on a CPU, where reading values costs no
    synchronisation; on other devices it takes the batch at once."""
    return CPU_TAKES_PARTS and device.type == "cpu" and not torch.compiler.is_compiling()


class cached_property:
    """`functools.cached_property` without a lock, which torch.compile can't trace (Python 3.12 dropped it)."""

    def __init__(self, function):
        self.function = function

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, instance, owner=None):
        value = self.function(instance)
        setattr(instance, self.name, value)
        return value


class Division(NamedTuple):
    """A division of a batch into parts: the order of the sequences, and where in it each part begins, followed by
    the number of sequences; None keeps the order."""

    bounds: tuple[int, ...]
    order: tuple[int, ...] | None = None


class Sequences:
    """The layout of a batch's rows: which rows belong to which sequence. There are two cases.

    *padded*: each of the `batch_size` sequences has `max_seqlen` rows. `mask` (batch_size, max_seqlen) is True at real
    tokens;
    None: all are.
    *varlen*: the sequences have rows of their real tokens alone, from `offsets[i]` to `offsets[i + 1]`.

    `num_rows`: all rows; `first_row`: where they begin, if this is a part of a batch, or `batch_rows`, which they are,
    padded.
    """

    def __init__(self, batch_size, max_seqlen, device, mask=None, offsets=None, lengths=None, first_row=0):
        self.batch_size, self.max_seqlen, self.device = batch_size, max_seqlen, torch.device(device)
        self.offsets, self.first_row = offsets, first_row
        self.num_rows = batch_size * max_seqlen if offsets is None else offsets[-1]
        if mask is not None:
            self.mask = mask  # instead of the property's
        if lengths is not None:
            self.lengths = lengths
        self.batch_rows: torch.Tensor | None = None
        self._parts = {}

    @classmethod
    def padded(cls, batch_size: int, max_seqlen: int, device, mask: torch.Tensor | None = None, lengths=None):
        """Make the layout of padded states (batch_size, max_seqlen, ...)."""
        sequences = cls(batch_size, max_seqlen, device, mask, lengths=lengths)
        if mask is None:
            sequences.mask = None
        return sequences

    @classmethod
    def varlen(cls, lengths: list[int], device, device_lengths=None, first_row: int = 0, before=None):
        """Make the layout of contiguous (varlen) rows of sequences of these lengths; if all are equal, that of
        padded states without padding.

        device_lengths: the same lengths (B,) on the device, if they are there already; before: the `Sequences` that
        these come from.
        """
        longest = max(lengths, default=0)
        if min(lengths, default=0) == longest:
            sequences = cls(len(lengths), longest, device, lengths=device_lengths, first_row=first_row)
            sequences.mask = None
            return sequences
        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        sequences = cls(len(lengths), longest, device, offsets=offsets, lengths=device_lengths, first_row=first_row)
        if before is not None and not torch.compiler.is_compiling():
            sequences.slots = before.slots[:longest]
        return sequences

    @property
    def is_varlen(self) -> bool:
        return self.offsets is not None

    @property
    def row_counts(self) -> list[int]:
        """The number of rows of each sequence."""
        if self.is_varlen:
            return [end - start for start, end in itertools.pairwise(self.offsets)]
        return [self.max_seqlen] * self.batch_size

    # What is derived from the lengths, each made once.

    @cached_property
    def lengths(self) -> torch.Tensor:
        """The number of real tokens of each sequence, (B,) int64."""
        if self.is_varlen:
            return torch.tensor(self.row_counts, device="cpu").to(self.device, non_blocking=True)
        if self.mask is not None:
            return self.mask.sum(dim=1)
        return torch.full((self.batch_size,), self.max_seqlen, device=self.device)

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """The cumulative sequence lengths (B + 1,) int32 that varlen attention kernels take."""
        if self.is_varlen:
            return torch.nn.functional.pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0))
        step = max(self.max_seqlen, 1)
        return torch.arange(0, self.batch_size * step + 1, step, dtype=torch.int32, device=self.device)

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """A mask (B, max_seqlen) that is True at the real tokens of padded states, or None without padding."""
        return self.slots < self.lengths.unsqueeze(1)

    @cached_property
    def slots(self) -> torch.Tensor:
        """The indices (max_seqlen,): 0, 1, 2, ..."""
        return torch.arange(self.max_seqlen, device=self.device)

    @cached_property
    def real(self) -> torch.Tensor | None:
        """`mask` as floats, 1.0 at real tokens."""
        return None if self.mask is None else self.mask.float()

    @cached_property
    def _row_number(self) -> torch.Tensor:
        """The number of the row, counted from 1, at each slot of padded states, (B * max_seqlen,); at padding, that
        of the last row before it."""
        return self.mask.flatten().cumsum(0)

    @cached_property
    def _row_of_slot(self) -> torch.Tensor:
        return self._row_number - 1

    @cached_property
    def _slot_to_row(self) -> torch.Tensor:
        """`_row_number` with 0 at padding."""
        return self._row_number * self.mask.flatten()

    @cached_property
    def positions(self) -> torch.Tensor:
        """The position (R,) of each row in its sequence."""
        return self.unpad(self.slots.expand(self.batch_size, -1))

    # Rows to padded states and back

    def pad(self, states: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Pad rows (R, ...) of this batch, or of the batch that this is a part of, -> (B, max_seqlen, ...), with
        copies of a sequence's last row at padding. dim: the dimension of the rows."""
        if self.batch_rows is not None:
            states = states.index_select(dim, self.batch_rows)
        else:
            if states.shape[dim] != self.num_rows:
                states = states.narrow(dim, self.first_row, self.num_rows)
            if self.is_varlen:
                states = states.index_select(dim, self._row_of_slot)
        return states.unflatten(dim, (self.batch_size, self.max_seqlen))

    def pad_zeros(self, states: torch.Tensor) -> torch.Tensor:
        """Pad rows (R, ...) -> (B, max_seqlen, ...), with 0 at padding of varlen states."""
        padded = self.pad(states)
        if not self.is_varlen:
            return padded
        return padded.masked_fill(~self.mask.view(self.mask.shape + (1,) * (padded.ndim - 2)), 0)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """Remove padding: (B, max_seqlen, ...) -> (R, ...)."""
        return self.unpad_rows(padded.flatten(0, 1))

    def unpad_rows(self, padded: torch.Tensor) -> torch.Tensor:
        """Remove padding: (B * max_seqlen, ...) -> (R, ...)."""
        return scatter_rows(padded, self._slot_to_row, self.num_rows) if self.is_varlen else padded

    def first(self, states: torch.Tensor) -> torch.Tensor:
        """Take each sequence's first row, the class token: (R, D) -> (B, D)."""
        if not self.is_varlen:
            return states.unflatten(0, (self.batch_size, self.max_seqlen))[:, 0]
        return states.index_select(0, self.cu_seqlens[:-1])

    def last(self, states: torch.Tensor) -> torch.Tensor:
        """Take each sequence's last real row, which is CLIP's end of text: (R, D) -> (B, D)."""
        if self.is_varlen:
            return states.index_select(0, self.cu_seqlens[1:] - 1)
        padded = states.unflatten(0, (self.batch_size, self.max_seqlen))
        return padded[:, -1] if self.mask is None else take_slots(padded, (self.lengths - 1).unsqueeze(1)).squeeze(1)

    # Parts of the batch

    @property
    def whole(self) -> Division:
        """Make a division of one part: the whole batch."""
        return Division((0, self.batch_size))

    def divide(self, width: int) -> Division:
        """Divide the batch into the parts that attention over states of `width` processes one by one; sequences of
        similar length share a part."""
        if not takes_parts(self.device) or self.batch_size == 1:
            return self.whole
        counts = self.row_counts
        order = sorted(range(self.batch_size), key=counts.__getitem__, reverse=True)
        bounds, rows, area = [0], 0, 0
        for index, sequence in enumerate(order):
            length, longest = counts[sequence], counts[order[bounds[-1]]]
            rows, area, number = rows + length, area + length**2, index + 1 - bounds[-1]
            padding, slots = longest * number - rows, longest * number
            too_much_padding = padding > PART_PADDING_SHARE * slots and (
                padding > PART_PADDING / width or longest**2 * number - area > PART_AREA
            )
            if number > 1 and (slots * width > PART_SIZE or too_much_padding):
                bounds.append(index)
                rows, area = length, length**2
        if len(bounds) == 1:
            return self.whole
        if len(bounds) == self.batch_size:  # one by one, as they lie
            return Division(tuple(range(self.batch_size + 1)))
        ordered = order == sorted(order)
        return Division((*bounds, self.batch_size), None if ordered else tuple(order))

    def parts(self, division: Division) -> list["Sequences"]:
        """Make a `Sequences` for each part, which takes its rows from those of the batch."""
        if len(division.bounds) == 2:
            return [self]
        if division not in self._parts:
            order = division.order or range(self.batch_size)
            bounds = itertools.pairwise(division.bounds)
            self._parts[division] = [self._part(list(order[start:stop])) for start, stop in bounds]
        return self._parts[division]

    def _part(self, samples: list[int]) -> "Sequences":
        first, number = samples[0], len(samples)
        together = samples == list(range(first, first + number))
        chosen = slice(first, first + number) if together else torch.tensor(samples, device="cpu").to(self.device)
        if self.is_varlen:
            counts = [self.row_counts[sample] for sample in samples]
            part = Sequences.varlen(counts, self.device, self.lengths[chosen], self.offsets[first])
        else:
            mask = None if self.mask is None else self.mask[chosen]
            part = Sequences.padded(number, self.max_seqlen, self.device, mask)
            part.first_row = first * self.max_seqlen
        if not together:
            part.batch_rows = self._rows_of(samples, part.max_seqlen)
        return part

    def _rows_of(self, samples: list[int], length: int) -> torch.Tensor:
        """Index the rows of these samples, (samples * length,), each padded up to `length` with its last row."""
        counts = torch.tensor(self.row_counts, device="cpu")
        starts = (counts.cumsum(0) - counts)[samples].to(self.device)
        last = counts[samples].to(self.device) - 1
        slots = torch.arange(length, device=self.device)
        return (starts.unsqueeze(1) + torch.minimum(slots, last.unsqueeze(1))).flatten()

    def join_rows(self, outputs: list[torch.Tensor], division: Division, row_counts: list[int] | None = None):
        """Join what was computed for the rows of each part into rows of the batch; row_counts: rows of each
        sequence, if they have changed."""
        rows = join(outputs)
        if division.order is None:
            return rows
        counts = torch.tensor(self.row_counts if row_counts is None else row_counts, device="cpu")
        order = torch.tensor(division.order, device="cpu")
        in_parts = torch.empty_like(counts)
        in_parts[order] = counts[order].cumsum(0) - counts[order]
        shift = (in_parts - (counts.cumsum(0) - counts)).repeat_interleave(counts)
        return rows.index_select(0, (shift + torch.arange(len(shift), device="cpu")).to(rows.device))

    def join_samples(self, outputs: list[torch.Tensor], division: Division) -> torch.Tensor:
        """Join what was computed for the sequences of each part, (n, ...), into that of the batch."""
        samples = join(outputs)
        if division.order is None:
            return samples
        return samples.index_select(0, torch.tensor(division.order, device="cpu").argsort().to(samples.device))

    def every_other(self, states: torch.Tensor, first: int) -> tuple[torch.Tensor, "Sequences"]:
        """Select the sequences first, first + 2, ...: their rows and layout. 0 gives the left, 1 the right image of
        each pair."""
        if not self.is_varlen:
            padded = states.unflatten(0, (-1, 2, self.max_seqlen))[:, first]
            mask = None if self.mask is None else self.mask[first::2]
            return padded.flatten(0, 1), Sequences.padded(padded.shape[0], self.max_seqlen, self.device, mask)
        chosen = Sequences.varlen(self.row_counts[first::2], self.device, self.lengths[first::2])
        return torch.cat(states.split(self.row_counts)[first::2]), chosen

    def to(self, device, non_blocking: bool = False) -> "Sequences":
        """Move the layout to a device. Models on several devices move it along with the states."""
        if torch.device(device) == self.device:
            return self
        moved = Sequences(self.batch_size, self.max_seqlen, device, offsets=self.offsets, first_row=self.first_row)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(moved, name, value.to(device, non_blocking=non_blocking))
        if not self.is_varlen and self.mask is None:
            moved.mask = None
        return moved


def take_slots(padded: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Gather slots (n, M) of padded states (n, L, D) -> (n, M, D). `take_along_dim` would fix the batch size of
    exported models."""
    return padded.gather(1, slots.unsqueeze(-1).expand(-1, -1, padded.shape[2]))


def scatter_rows(states: torch.Tensor, numbers: torch.Tensor, num_rows: int, fill: int | None = None) -> torch.Tensor:
    """Scatter states (S, ...) to the rows that their numbers (S,), counted from 1, give -> (num_rows, ...); 0 drops
    a state.

    fill: what rows hold that none goes to, if there are any.
    """
    shape = (num_rows + 1, *states.shape[1:])
    rows = states.new_empty(shape) if fill is None else states.new_full(shape, fill)
    return rows.index_copy_(0, numbers, states)[1:]


def count_tokens(layers: list[Sequences]) -> torch.Tensor:
    """Count the real tokens in each layout: (layers, B) int64."""
    if torch.compiler.is_compiling() or not any(sequences.is_varlen for sequences in layers):
        return torch.stack([sequences.lengths for sequences in layers])
    device = layers[-1].device
    if all(sequences.is_varlen or sequences.mask is None for sequences in layers):  # as the host knows them
        counts = torch.tensor([sequences.row_counts for sequences in layers], device="cpu")
        return counts.to(device, non_blocking=True)
    return torch.stack([sequences.lengths.to(device) for sequences in layers])


def join(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Join what was computed for the parts of a batch."""
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def unpad(padded: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, Sequences]:
    """Unpad states (B, L, ...) with mask (B, L), real tokens first -> rows (R, ...) and their layout.

    Waits for the device once, if there is a mask.
    """
    batch_size, length = padded.shape[:2]
    if mask is None:
        return padded.flatten(0, 1), Sequences.padded(batch_size, length, padded.device)
    lengths = mask.sum(dim=1)
    sequences = Sequences.varlen(lengths.tolist(), padded.device, lengths)
    return sequences.unpad(padded[:, : sequences.max_seqlen]), sequences
