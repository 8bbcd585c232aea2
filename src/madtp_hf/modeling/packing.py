"""How the tokens of a batch lie in memory: end to end, sample after sample, so that nothing is computed on padding.

States are (R, D): R rows, the tokens of all samples. Linear maps, norms and feed-forward need to know no more. What needs to know which rows are whose,
attention above all, asks the batch's `Layout`, and takes the samples in padded groups: on a CPU, where one more call costs little, those of
similar length together; elsewhere all at once.
"""

from typing import NamedTuple

import torch


GROUP_SIZE = (
    2**18
)  # numbers in a group's states: beyond, a call costs little beside the work, and samples are best taken one by one
GROUP_SHARE = 1 / 8  # of a group's rows may be padding,
GROUP_PADDING = 2**16  # or this many numbers, which cost less than the calls for another group


class Group(NamedTuple):
    """Samples of a batch that attention takes together, padded to the longest of them.

    shape: their number n and the length L of the longest; samples (n,): which they are, None for all; rows (n * L,): their rows, with
    copies of a real one for padding, None if they are consecutive rows from `first` on; mask (n, L): True at real tokens, None without padding.
    """

    shape: tuple[int, int]
    samples: torch.Tensor | None
    rows: torch.Tensor | None
    first: int
    mask: torch.Tensor | None

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """(R, ...) -> (n, L, ...)."""
        if self.rows is None:
            states = states.narrow(0, self.first, self.shape[0] * self.shape[1])
        else:
            states = states.index_select(0, self.rows)
        return states.unflatten(0, self.shape)


class Partition(NamedTuple):
    """All samples of a batch, in groups; position (R,): which row of all groups' rows each of the batch's is, None if they are the same."""

    groups: list[Group]
    position: torch.Tensor | None

    @property
    def samples(self) -> list[torch.Tensor] | None:
        """The samples of each group (n,); None if there is one group of all."""
        return None if self.groups[0].samples is None else [group.samples for group in self.groups]

    def join(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """What was computed for the tokens of each group, (n, L, ...) -> (R, ...)."""
        rows = [output.flatten(0, 1) for output in outputs]
        rows = torch.cat(rows) if len(rows) > 1 else rows[0]
        return rows if self.position is None else rows.index_select(0, self.position)

    def join_samples(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """What was computed for the samples of each group, (n, ...) -> (B, ...)."""
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat(outputs)[torch.cat([group.samples for group in self.groups]).argsort()]


class Layout:
    """Which rows are whose: B = `batch_size` samples, `longest` rows in the longest, `total` rows in all.

    lengths (B,): the samples' numbers of rows; None if all have `longest`. Only then may some be padding after all, for a fixed shape's sake: mask
    (B, longest) is False there.
    """

    def __init__(
        self,
        batch_size: int,
        longest: int,
        device: torch.device,
        mask: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        total: int | None = None,
    ):
        self.batch_size, self.longest, self.device, self.mask = batch_size, longest, device, mask
        if lengths is not None and total == batch_size * longest:
            lengths = None
        self.lengths = lengths
        self.total = batch_size * longest if lengths is None else total
        self._groups = None

    @classmethod
    def rectangle(cls, batch_size: int, length: int, device, mask: torch.Tensor | None = None) -> "Layout":
        """All samples have `length` rows, of which those are padding where mask (B, length) is False."""
        return cls(batch_size, length, device, mask)

    @property
    def row_counts(self) -> torch.Tensor:
        """(B,) int64: the samples' numbers of rows."""
        if self.lengths is not None:
            return self.lengths
        return torch.full((self.batch_size,), self.longest, device=self.device)

    @property
    def num_tokens(self) -> torch.Tensor:
        """(B,) int64: the samples' numbers of real tokens."""
        return self.row_counts if self.mask is None else self.mask.sum(dim=1)

    @property
    def starts(self) -> torch.Tensor:
        """(B,): each sample's first row."""
        if self.lengths is None:
            return torch.arange(self.batch_size, device=self.device) * self.longest
        return self.lengths.cumsum(0) - self.lengths

    @property
    def samples(self) -> torch.Tensor:
        """(R,): which sample each row is of."""
        samples = torch.arange(self.batch_size, device=self.device)
        if self.lengths is None:
            return samples.unsqueeze(1).expand(-1, self.longest).flatten()
        return samples.repeat_interleave(self.lengths, output_size=self.total)

    @property
    def boundaries(self) -> torch.Tensor:
        """(B + 1,) int32: where samples begin and end, as variable-length attention kernels ask for."""
        return torch.nn.functional.pad(self.row_counts.cumsum(0), (1, 0)).to(torch.int32)

    @property
    def padded_mask(self) -> torch.Tensor | None:
        """(B, longest) bool: the real tokens of padded states, None without padding."""
        if self.lengths is None:
            return self.mask
        return torch.arange(self.longest, device=self.device) < self.lengths.unsqueeze(1)

    @property
    def token_mask(self) -> torch.Tensor | None:
        """(B, longest - 1) bool: `padded_mask` without the class token."""
        mask = self.padded_mask
        return None if mask is None else mask[:, 1:]

    def to(self, device, non_blocking: bool = False) -> "Layout":
        """For models whose layers lie on several devices."""
        if torch.device(device) == self.device:
            return self
        mask, lengths = (
            None if tensor is None else tensor.to(device, non_blocking=non_blocking)
            for tensor in (self.mask, self.lengths)
        )
        return Layout(self.batch_size, self.longest, torch.device(device), mask, lengths, self.total)

    def pad(self, states: torch.Tensor) -> torch.Tensor:
        """(R, ...) -> (B, longest, ...), 0 behind a sample's rows where their numbers differ."""
        if self.lengths is None:
            return states.unflatten(0, (self.batch_size, self.longest))
        group = self._group(None)
        padding = ~group.mask.view(*group.shape, *[1] * (states.ndim - 1))
        return group.take(states).masked_fill(padding, 0)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """(B, longest, ...) -> (R, ...)."""
        return Partition([], self._position(None)).join([padded])

    def select(self, states: torch.Tensor, samples: slice) -> tuple[torch.Tensor, "Layout"]:
        """Some samples of the batch: their states and their layout. Waits for the device once where lengths differ."""
        if self.lengths is None:
            chosen = self.pad(states)[samples]
            mask = None if self.mask is None else self.mask[samples]
            return chosen.flatten(0, 1), Layout.rectangle(chosen.shape[0], self.longest, self.device, mask)
        lengths = self.lengths[samples]
        total, longest = torch.stack([lengths.sum(), lengths.amax()]).tolist()
        layout = Layout(lengths.shape[0], longest, self.device, lengths=lengths, total=total)
        # Where a row is in its sample, and where that sample begins here.
        shift = (self.starts[samples] - layout.starts)[layout.samples]
        return states.index_select(0, torch.arange(total, device=self.device) + shift), layout

    def groups(self, width: int) -> Partition:
        """The batch in groups of similar length, for states of `width`."""
        if self._groups is None:
            self._groups = self.partition(self._similar_lengths(width))
        return self._groups

    def _similar_lengths(self, width: int) -> list[torch.Tensor] | None:
        if self.lengths is None or self.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        lengths, order = self.lengths.sort(descending=True)
        lengths = lengths.tolist()
        groups, start, padding = [], 0, 0
        for index, length in enumerate(lengths):
            padding += lengths[start] - length
            rows = lengths[start] * (index - start + 1)
            too_large = rows * width > GROUP_SIZE and index > start
            if too_large or padding > max(GROUP_SHARE * rows, GROUP_PADDING / width):
                groups.append(order[start:index])
                start, padding = index, 0
        groups.append(order[start:])
        if len(groups) == self.batch_size:
            return list(torch.arange(self.batch_size).split(1))
        return groups if len(groups) > 1 else None

    def partition(self, samples: list[torch.Tensor] | None) -> Partition:
        """The batch in groups of the `samples` that are given, (n,) each; None for one group of all."""
        if samples is None:
            return Partition([self._group(None)], self._position(None))
        groups = [self._group(group) for group in samples]
        firsts = [group.first for group in groups]
        if all(group.rows is None for group in groups) and firsts == sorted(firsts):  # one by one, as they lie
            return Partition(groups, None)
        starts, behind = [], 0
        for (number, longest), *_ in groups:
            starts.append(behind + torch.arange(number) * longest)
            behind += number * longest
        in_groups = torch.empty_like(self.starts)
        in_groups[torch.cat(samples)] = torch.cat(starts)
        return Partition(groups, self._position(in_groups))

    def _position(self, starts: torch.Tensor | None) -> torch.Tensor | None:
        """(R,): each row's place where the samples start at `starts` (B,) instead; None: where all are as long as the longest."""
        if starts is None:
            if self.lengths is None:
                return None
            starts = torch.arange(self.batch_size, device=self.device) * self.longest
        return torch.arange(self.total, device=self.device) + (starts - self.starts)[self.samples]

    def _group(self, samples: torch.Tensor | None) -> Group:
        if samples is None and self.lengths is None:
            return Group((self.batch_size, self.longest), None, None, 0, self.mask)
        starts, lengths, longest = self.starts, self.row_counts, self.longest
        if samples is not None:
            starts, lengths = starts[samples], lengths[samples]
            longest = int(lengths.amax())
        slots = torch.arange(longest, device=self.device)
        rows = starts.unsqueeze(1) + torch.minimum(slots, lengths.unsqueeze(1) - 1)
        mask = slots < lengths.unsqueeze(1)
        if samples is not None and int(lengths.amin()) == longest:
            mask = None if self.mask is None else self.mask[samples]
        if len(lengths) == 1:
            return Group((1, longest), samples, None, int(starts), mask)
        return Group((len(lengths), longest), samples, rows.flatten(), 0, mask)


def pack(padded: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, Layout]:
    """Padded states (B, L, ...) with mask (B, L), True at the real ones, which come first, -> states (R, ...) and their layout.

    Waits for the device once.
    """
    batch_size, length = padded.shape[:2]
    if mask is None:
        return padded.flatten(0, 1), Layout.rectangle(batch_size, length, padded.device)
    lengths = mask.sum(dim=1)
    total, longest = torch.stack([lengths.sum(), lengths.amax()]).tolist()
    layout = Layout(batch_size, longest, padded.device, lengths=lengths, total=total)
    return layout.unpad(padded[:, :longest]), layout
