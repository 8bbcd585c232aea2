"""The memory layout of a batch of sequences: padded or varlen.

States are (R, ...): R rows, the tokens of one sequence after those of another. Linear maps, norms and feed-forward
layers work on rows alone. Operations that need to know which rows belong to which sequence, attention above all, ask
the batch's `Sequences`.
"""

import itertools

import torch


class cached_property:
    """`functools.cached_property` without its lock, which torch.compile can't trace (Python 3.12 removed it)."""

    def __init__(self, function):
        self.function = function

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, instance, owner=None):
        value = self.function(instance)
        setattr(instance, self.name, value)
        return value


class Sequences:
    """The layout of a batch: which rows belong to which sequence.

    *padded*: each of the `batch_size` sequences has `max_seqlen` rows. `mask` (batch_size, max_seqlen) is True at real
    tokens; None means that all are real.
    *varlen*: the rows are the real tokens only. Those of sequence i go from `offsets[i]` to `offsets[i + 1]`.

    num_rows: the number of rows.
    first_row: in a chunk of a batch, the chunk's first row in the batch.
    batch_rows: in a chunk whose rows are not contiguous, their numbers in the batch, padded; else None.
    sizes (R,): if tokens were merged into others, how many tokens each row counts as; attention weights each key by
        it. A chunk has those of the whole batch.
    """

    def __init__(self, batch_size, max_seqlen, device, mask=None, offsets=None, lengths=None, first_row=0):
        self.batch_size, self.max_seqlen, self.device = batch_size, max_seqlen, torch.device(device)
        self.offsets, self.first_row = offsets, first_row
        self.num_rows = batch_size * max_seqlen if offsets is None else offsets[-1]
        if mask is not None:
            self.mask = mask  # replaces the cached property's value
        if lengths is not None:
            self.lengths = lengths
        self.batch_rows: torch.Tensor | None = None
        self.sizes: torch.Tensor | None = None
        self.chunks: dict = {}  # by `Chunking`, which makes them

    @classmethod
    def padded(cls, batch_size: int, max_seqlen: int, device, mask: torch.Tensor | None = None, lengths=None):
        """Return the layout of padded states (batch_size, max_seqlen, ...)."""
        sequences = cls(batch_size, max_seqlen, device, mask, lengths=lengths)
        if mask is None:
            sequences.mask = None
        return sequences

    @classmethod
    def varlen(cls, lengths: list[int], device, device_lengths=None, first_row: int = 0, before=None):
        """Return the varlen layout of sequences of these lengths, or a padded one without a mask if all are equal.

        Args:
            device_lengths (`torch.Tensor` of shape `(B,)`, *optional*):
                The same lengths on the device, if they are already there.
            first_row (`int`, *optional*, defaults to 0):
                For a chunk of a batch, its first row in the batch.
            before (`Sequences`, *optional*):
                The layout that the tokens were pruned from, whose `indices` are reused.
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
            sequences.indices = before.indices[:longest]
        return sequences

    @property
    def is_varlen(self) -> bool:
        return self.offsets is not None

    @property
    def has_only_real_rows(self) -> bool:
        """Whether no row is padding."""
        return self.is_varlen or self.mask is None

    @property
    def row_counts(self) -> list[int]:
        """The number of rows of each sequence."""
        if self.is_varlen:
            return [end - start for start, end in itertools.pairwise(self.offsets)]
        return [self.max_seqlen] * self.batch_size

    # Derived from the lengths and cached

    @cached_property
    def lengths(self) -> torch.Tensor:
        """(B,) int64: the number of real tokens of each sequence."""
        if self.is_varlen:
            return torch.tensor(self.row_counts, device="cpu").to(self.device, non_blocking=True)
        if self.mask is not None:
            return self.mask.sum(dim=1)
        return torch.full((self.batch_size,), self.max_seqlen, device=self.device)

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """(B + 1,) int32: where each sequence's rows begin and end, as varlen attention kernels expect it."""
        if self.is_varlen:
            return torch.nn.functional.pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0))
        step = max(self.max_seqlen, 1)
        return torch.arange(0, self.batch_size * step + 1, step, dtype=torch.int32, device=self.device)

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """(B, max_seqlen) bool: True at the real tokens of padded states; None without padding."""
        return self.indices < self.lengths.unsqueeze(1)

    @cached_property
    def indices(self) -> torch.Tensor:
        """The indices (max_seqlen,): 0, 1, 2, ..."""
        return torch.arange(self.max_seqlen, device=self.device)

    @cached_property
    def float_mask(self) -> torch.Tensor | None:
        """`mask` as floats: 1.0 at real tokens, 0.0 at padding."""
        return None if self.mask is None else self.mask.float()

    @cached_property
    def _row_number(self) -> torch.Tensor:
        """(B * max_seqlen,): the row of each token of padded states, counted from 1; at padding, the row before."""
        return self.mask.flatten().cumsum(0)

    @cached_property
    def _gathered_rows(self) -> torch.Tensor:
        return self._row_number - 1

    @cached_property
    def _scattered_rows(self) -> torch.Tensor:
        """(B * max_seqlen,): `_row_number`, but 0 at padding."""
        return self._row_number * self.mask.flatten()

    @cached_property
    def positions(self) -> torch.Tensor:
        """(R,): each row's position in its sequence."""
        return self.unpad(self.indices.expand(self.batch_size, -1))

    # Rows to padded states and back

    def pad(self, states: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Gather rows (R, ...) into padded states (B, max_seqlen, ...).

        If this is a chunk of a batch, the rows are those of the whole batch. Varlen sequences are padded with copies
        of their last row. dim: the dimension of the rows.
        """
        if self.batch_rows is not None:
            states = states.index_select(dim, self.batch_rows)
        else:
            if states.shape[dim] != self.num_rows:
                states = states.narrow(dim, self.first_row, self.num_rows)
            if self.is_varlen:
                states = states.index_select(dim, self._gathered_rows)
        return states.unflatten(dim, (self.batch_size, self.max_seqlen))

    def pad_zeros(self, states: torch.Tensor) -> torch.Tensor:
        """Gather rows (R, ...) into padded states (B, max_seqlen, ...); varlen sequences are padded with zeros."""
        padded = self.pad(states)
        if not self.is_varlen:
            return padded
        return padded.masked_fill(~self.mask.view(self.mask.shape + (1,) * (padded.ndim - 2)), 0)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """Turn padded states (B, max_seqlen, ...) into rows (R, ...)."""
        return self.unpad_rows(padded.flatten(0, 1))

    def unpad_rows(self, padded: torch.Tensor) -> torch.Tensor:
        """Turn flattened padded states (B * max_seqlen, ...) into rows (R, ...)."""
        return scatter_rows(padded, self._scattered_rows, self.num_rows) if self.is_varlen else padded

    def first(self, states: torch.Tensor) -> torch.Tensor:
        """Gather each sequence's first row, such as a class token: (R, D) -> (B, D)."""
        if not self.is_varlen:
            return states.unflatten(0, (self.batch_size, self.max_seqlen))[:, 0]
        return states.index_select(0, self.cu_seqlens[:-1])

    def last(self, states: torch.Tensor) -> torch.Tensor:
        """Gather each sequence's last real row, such as an end of text: (R, D) -> (B, D)."""
        if self.is_varlen:
            return states.index_select(0, self.cu_seqlens[1:] - 1)
        padded = states.unflatten(0, (self.batch_size, self.max_seqlen))
        return padded[:, -1] if self.mask is None else take_tokens(padded, (self.lengths - 1).unsqueeze(1)).squeeze(1)

    def every_other(self, states: torch.Tensor, first: int) -> tuple[torch.Tensor, "Sequences"]:
        """Select every other sequence from `first` on; return their rows and their layout.

        For a batch of image pairs, `first` is 0 for the left images and 1 for the right ones.
        """
        if not self.is_varlen:
            padded = states.unflatten(0, (-1, 2, self.max_seqlen))[:, first]
            mask = None if self.mask is None else self.mask[first::2]
            return padded.flatten(0, 1), Sequences.padded(padded.shape[0], self.max_seqlen, self.device, mask)
        chosen = Sequences.varlen(self.row_counts[first::2], self.device, self.lengths[first::2])
        return torch.cat(states.split(self.row_counts)[first::2]), chosen

    def to(self, device, non_blocking: bool = False) -> "Sequences":
        """Move the layout to a device.

        In models whose layers are on several devices, the code that moves a layer's inputs calls this as for tensors.
        """
        if torch.device(device) == self.device:
            return self
        moved = Sequences(self.batch_size, self.max_seqlen, device, offsets=self.offsets, first_row=self.first_row)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(moved, name, value.to(device, non_blocking=non_blocking))
        if not self.is_varlen and self.mask is None:
            moved.mask = None
        return moved


def take_tokens(padded: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Gather indices (n, M) of padded states (n, L, D) -> (n, M, D).

    Uses `gather`, because `take_along_dim` fixes the batch size of exported models.
    """
    return padded.gather(1, indices.unsqueeze(-1).expand(-1, -1, padded.shape[2]))


def scatter_rows(states: torch.Tensor, numbers: torch.Tensor, num_rows: int, fill: int | None = None) -> torch.Tensor:
    """Scatter states (S, ...) into rows (num_rows, ...).

    numbers (S,): the row of each state, counted from 1; states with 0 are dropped.
    fill: the value of rows that no state goes to; None only if there are no such rows.
    """
    shape = (num_rows + 1, *states.shape[1:])
    rows = states.new_empty(shape) if fill is None else states.new_full(shape, fill)
    return rows.index_copy_(0, numbers, states)[1:]


def count_tokens(layers: list[Sequences]) -> torch.Tensor:
    """Count the real tokens of each sequence in each layer: (layers, B) int64."""
    if torch.compiler.is_compiling() or not any(sequences.is_varlen for sequences in layers):
        return torch.stack([sequences.lengths for sequences in layers])
    device = layers[-1].device
    if all(sequences.has_only_real_rows for sequences in layers):  # the host knows the counts
        counts = torch.tensor([sequences.row_counts for sequences in layers], device="cpu")
        return counts.to(device, non_blocking=True)
    return torch.stack([sequences.lengths.to(device) for sequences in layers])


def join(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate what was computed for the chunks of a batch."""
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def unpad(padded: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, Sequences]:
    """Return the rows (R, ...) of the real tokens of padded states (B, L, ...), and their layout.

    mask (B, L): the real tokens, which come first in each sequence; None means that all are real. With a mask, the
    host waits for the device once.
    """
    batch_size, length = padded.shape[:2]
    if mask is None:
        return padded.flatten(0, 1), Sequences.padded(batch_size, length, padded.device)
    lengths = mask.sum(dim=1)
    sequences = Sequences.varlen(lengths.tolist(), padded.device, lengths)
    return sequences.unpad(padded[:, : sequences.max_seqlen]), sequences


# How a text is laid out: "dense", padding is computed like text, as in transformers; "varlen", padding is dropped;
# "padded", padding is masked, so that shapes depend on shapes alone.
TEXT_LAYOUTS = ("dense", "varlen", "padded")


def lay_out(padded: torch.Tensor, mask: torch.Tensor | None, layout: str) -> tuple[torch.Tensor, Sequences]:
    """Return the rows (R, ...) of padded texts (B, L, ...) and their layout, one of `TEXT_LAYOUTS`.

    mask (B, L) bool: the real tokens, which come first in each text; None means that all are real.
    """
    if layout == "varlen":
        return unpad(padded, mask)
    return padded.flatten(0, 1), Sequences.padded(*padded.shape[:2], padded.device, mask)
