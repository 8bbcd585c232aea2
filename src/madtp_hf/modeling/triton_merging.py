"""Triton kernels for merging similar tokens in varlen batches on CUDA. No gradients.

Layout, arithmetic, reproducibility and errors are those of `triton_kernels.py`, but that rows in bfloat16 are averaged
in TF32. A row's *size* is the number of tokens that it counts as. The similarity of two rows is the cosine of their
keys, each the mean over heads. The equations are those of `token_pruning.distinctness` and
`token_pruning.merge_into_similar`.
"""

import torch

from .triton_kernels import GATE_BLOCKS, last_stride_1, launch, triton


SIMILARITY_BLOCKS = {"ROWS": 64, "COLUMNS": 64, "num_warps": 4}
MERGE_SIMILAR_BLOCKS = {"NEW_ROWS": 64, "ROWS": 32, "COLUMNS": 64, "num_warps": 4}


def gate_and_assign(
    scores: torch.Tensor,
    received: torch.Tensor,
    pooling_attention: torch.Tensor,
    output_norm: torch.Tensor,
    key: torch.Tensor,
    sizes: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    temperature: float,
    min_kept: int,
    protects_last: bool = False,
    factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Select the rows that stay by importance times distinctness, and assign each other row to a similar one.

    Five launches and one cumulative sum; the host does not wait for the device. scores, received, pooling_attention,
    output_norm, temperature, min_kept, factor: as in `triton_kernels.gate`. key (R, H, d): with any strides. sizes
    (R,) float32: None if all are 1. Returns

    importance (R,) float32: s of the removable tokens, without distinctness; 0 at protected rows
    destination (R,) int32: for a row that stays, its position among its sample's new rows; for a row that goes,
        -1 - the position of the row that it is merged into
    counts (R,) float32: a row's size if it stays; else as how many tokens it counts in the row that it is merged into
    new_cu_seqlens (B + 1,) int32
    """
    scores, key = last_stride_1(scores), last_stride_1(key)
    num_rows, num_heads, width = key.shape
    batch_size = cu_seqlens.shape[0] - 1
    parts, mean_key = received.new_empty(3, num_rows), received.new_empty(num_rows, width)
    importance, ranked, counts = (received.new_empty(num_rows) for _ in range(3))
    destination = cu_seqlens.new_empty(num_rows, dtype=torch.int32)
    lengths = cu_seqlens.new_empty(batch_size + 1, dtype=torch.int32)
    columns, similar = {"NUM_COLUMNS": scores.shape[1]}, {"WIDTH": width, **SIMILARITY_BLOCKS}
    role = {"PROTECTS_LAST": protects_last}
    blocks = triton.cdiv(max_seqlen, SIMILARITY_BLOCKS["ROWS"]), batch_size
    launch(
        _mean_key, (triton.cdiv(num_rows, SIMILARITY_BLOCKS["ROWS"]),),
        key, *key.stride()[:2], mean_key, num_rows,
        HEADS=num_heads, WIDTH=width, ROWS=SIMILARITY_BLOCKS["ROWS"],
    )  # fmt: skip
    launch(
        _importance, (batch_size,),
        scores, scores.stride(0), received, pooling_attention, output_norm, cu_seqlens, parts, importance,
        num_rows, received.shape[0],
        HEADS=num_heads, HEADS_BLOCK=triton.next_power_of_2(num_heads), **columns, **role, **GATE_BLOCKS,
    )  # fmt: skip
    launch(_rank, blocks, mean_key, importance, cu_seqlens, ranked, **similar, **role)
    launch(
        _select, (batch_size,),
        scores, scores.stride(0), ranked, cu_seqlens, destination, lengths, temperature, min_kept, factor,
        **columns, **role, **GATE_BLOCKS,
    )  # fmt: skip
    launch(
        _assign, blocks, mean_key, importance, sizes, cu_seqlens, destination, counts,
        SIZED=sizes is not None, **similar, **role,
    )  # fmt: skip
    return importance, destination, counts, lengths.cumsum(0, dtype=torch.int32)


def merge_similar(
    states: torch.Tensor,
    destination: torch.Tensor,
    counts: torch.Tensor,
    cu_seqlens: torch.Tensor,
    new_cu_seqlens: torch.Tensor,
    num_rows: int,
    max_seqlen: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Repack the rows that stay, each as the mean of itself and of the rows merged into it, weighted by their counts.

    One launch. states (R, D); destination, counts, new_cu_seqlens: from `gate_and_assign`; num_rows: the last entry of
    `new_cu_seqlens`; max_seqlen: the largest number of new rows in a sample, or more. Returns the new rows
    (num_rows, D), in the dtype of `states`, and their sizes (num_rows,) float32.
    """
    states = last_stride_1(states)
    width = states.shape[1]
    output, sizes = states.new_empty(num_rows, width), counts.new_empty(num_rows)
    grid = (
        triton.cdiv(width, MERGE_SIMILAR_BLOCKS["COLUMNS"]),
        triton.cdiv(max_seqlen, MERGE_SIMILAR_BLOCKS["NEW_ROWS"]),
        cu_seqlens.shape[0] - 1,
    )
    # Tensor cores take TF32, whose mantissa of 10 bits is precise enough for a mean that is stored with 7 bits.
    precision = "tf32" if states.dtype == torch.bfloat16 else "ieee"
    launch(
        _merge_similar, grid,
        states, states.stride(0), destination, counts, cu_seqlens, new_cu_seqlens, output, sizes,
        WIDTH=width, PRECISION=precision, **MERGE_SIMILAR_BLOCKS,
    )  # fmt: skip
    return output, sizes


if triton is not None:
    # `tl` as well: transformers takes an `import` outside of `try` for a package that loading requires.
    from .triton_kernels import _sample_rows, _sample_tokens, _store_destination, _store_importance, tl

    @triton.jit(do_not_specialize=["num_rows"])
    def _mean_key(
        key, key_row, key_head, mean_key, num_rows,
        HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Store a block of rows' keys (rows, d), averaged over heads and normalised."""
        rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        columns, inside = tl.arange(0, WIDTH)[None, :], rows < num_rows
        total = tl.zeros([ROWS, WIDTH], tl.float32)
        for head in range(HEADS):
            total += tl.load(key + rows * key_row + head * key_head + columns, inside, 0.0).to(tl.float32)
        mean = total / HEADS
        norm = tl.sqrt(tl.sum(mean * mean, 1))
        tl.store(mean_key + rows * WIDTH + columns, tl.div_rn(mean, tl.maximum(norm, 1e-12)[:, None]), inside)

    @triton.jit(do_not_specialize=["num_rows", "query_blocks"])
    def _importance(
        scores, scores_row, received, pooled, output_norm, cu_seqlens, parts, importance, num_rows, query_blocks,
        NUM_COLUMNS: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, PROTECTS_LAST: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Store the importance of one sample's rows."""
        start, length, num_tokens = _sample_tokens(cu_seqlens, tl.program_id(0), PROTECTS_LAST)
        _store_importance(
            scores + start * scores_row, scores_row, received, pooled, output_norm, parts, importance, num_rows,
            query_blocks, start, length, num_tokens, NUM_COLUMNS, HEADS, HEADS_BLOCK, ROWS, COLUMNS,
        )  # fmt: skip

    @triton.jit
    def _similarity(mean_key, start, rows, others, length, WIDTH: tl.constexpr):
        """Compute the similarity of some rows of a sample to others: (rows, others)."""
        columns = tl.arange(0, WIDTH)[None, :]
        one = tl.load(mean_key + (start + rows)[:, None] * WIDTH + columns, rows[:, None] < length, 0.0)
        other = tl.load(mean_key + (start + others)[:, None] * WIDTH + columns, others[:, None] < length, 0.0)
        return tl.dot(one, tl.trans(other), input_precision="ieee")

    @triton.jit
    def _rank(
        mean_key, importance, cu_seqlens, ranked,
        WIDTH: tl.constexpr, PROTECTS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Store a block of rows' importance, at least 0, times their distinctness; 0 at protected rows."""
        start, length, num_tokens = _sample_tokens(cu_seqlens, tl.program_id(1), PROTECTS_LAST)
        first_row = tl.program_id(0) * ROWS
        if first_row >= length:
            return
        rows = first_row + tl.arange(0, ROWS)
        s = tl.load(importance + start + rows, rows < length, 0.0)
        nearest = tl.full([ROWS], -1.0, tl.float32)
        for first in range(1, num_tokens + 1, COLUMNS):
            others = first + tl.arange(0, COLUMNS)
            s_other = tl.load(importance + start + others, others <= num_tokens, 0.0)
            is_more_important = (others <= num_tokens)[None, :] & (s_other[None, :] > s[:, None])
            similarity = _similarity(mean_key, start, rows, others, length, WIDTH)
            nearest = tl.maximum(nearest, tl.max(tl.where(is_more_important, similarity, -1.0), 1))
        is_token = (rows >= 1) & (rows <= num_tokens)
        s = tl.where(s < 0, 0.0, s)  # NaN stays NaN: then the threshold is NaN and all tokens stay, as in torch
        tl.store(ranked + start + rows, tl.where(is_token, s * (1 - nearest), 0.0), rows < length)

    @triton.jit(do_not_specialize=["min_kept", "factor"])
    def _select(
        scores, scores_row, ranked, cu_seqlens, destination, lengths, temperature, min_kept, factor,
        NUM_COLUMNS: tl.constexpr, PROTECTS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Select one sample's rows: store their destination, negative at those that go, and its new length."""
        sample = tl.program_id(0)
        start, length, num_tokens = _sample_tokens(cu_seqlens, sample, PROTECTS_LAST)
        _store_destination(
            scores + start * scores_row, scores_row, ranked, destination, lengths, sample, start, length, num_tokens,
            temperature, min_kept, factor, NUM_COLUMNS, 0, ROWS, COLUMNS,
        )  # fmt: skip

    @triton.jit
    def _assign(
        mean_key, importance, sizes, cu_seqlens, destination, counts,
        WIDTH: tl.constexpr, PROTECTS_LAST: tl.constexpr, SIZED: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Assign a block of rows, those that go, to the most similar tokens that stay: store destination and counts.

        Of rows that stay, destinations are only read: they are the same before and after. So blocks may run in any
        order.
        """
        start, length, num_tokens = _sample_tokens(cu_seqlens, tl.program_id(1), PROTECTS_LAST)
        first_row = tl.program_id(0) * ROWS
        if first_row >= length:
            return
        rows = first_row + tl.arange(0, ROWS)
        count = tl.full([ROWS], 1.0, tl.float32)
        if SIZED:
            count = tl.load(sizes + start + rows, rows < length, 1.0)
        goes = tl.load(destination + start + rows, rows < length, 0) < 0
        highest = tl.full([ROWS], -2.0, tl.float32)
        into = tl.zeros([ROWS], tl.int32) + 1
        for first in range(1, num_tokens + 1, COLUMNS):
            others = first + tl.arange(0, COLUMNS)
            stays = (others <= num_tokens) & (tl.load(destination + start + others, others <= num_tokens, -1) >= 0)
            similarity = _similarity(mean_key, start, rows, others, length, WIDTH)
            similarity = tl.where(stays[None, :], similarity, -2.0)
            found, place = tl.max(similarity, 1), tl.argmax(similarity, 1)
            into = tl.where(found > highest, first + place, into)
            highest = tl.maximum(highest, found)
        s = tl.load(importance + start + rows, goes, 0.0)
        s_into = tl.load(importance + start + into, goes, 1.0)
        share = tl.div_rn(s, tl.maximum(s_into, 1e-8))
        count = tl.where(goes, count * tl.minimum(tl.maximum(share, 0.0), 1.0), count)
        tl.store(counts + start + rows, count, rows < length)
        tl.store(destination + start + rows, -1 - tl.load(destination + start + into, goes, 0), goes)

    @triton.jit
    def _counts_there(destination, counts, start, first, length, new_rows, ROWS: tl.constexpr):
        """Load as how many tokens a block of a sample's rows count in each of some new rows: (new rows, rows)."""
        rows = first + tl.arange(0, ROWS)
        to = tl.load(destination + start + rows, rows < length, 0)
        to = tl.where(to < 0, -1 - to, to)
        count = tl.load(counts + start + rows, rows < length, 0.0)
        return tl.where(to[None, :] == new_rows[:, None], count[None, :], 0.0)

    @triton.jit
    def _merge_similar(
        states, states_row, destination, counts, cu_seqlens, new_cu_seqlens, output, sizes,
        WIDTH: tl.constexpr, PRECISION: tl.constexpr,
        NEW_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Store a block of a sample's new rows and columns in output (R', D), and the new rows' sizes (R',)."""
        sample = tl.program_id(2)
        start, length = _sample_rows(cu_seqlens, sample)
        new_start, new_length = _sample_rows(new_cu_seqlens, sample)
        new_rows = tl.program_id(1) * NEW_ROWS + tl.arange(0, NEW_ROWS)
        if tl.program_id(1) * NEW_ROWS >= new_length:
            return
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        is_row = new_rows < new_length
        total = tl.zeros([NEW_ROWS], tl.float32)
        for first in range(0, length, ROWS):
            total += tl.sum(_counts_there(destination, counts, start, first, length, new_rows, ROWS), 1)
        total = tl.where(is_row, total, 1.0)
        mixed = tl.zeros([NEW_ROWS, COLUMNS], tl.float32)
        broken = tl.zeros([NEW_ROWS, COLUMNS], tl.float32)
        for first in range(0, length, ROWS):
            rows = first + tl.arange(0, ROWS)
            there = _counts_there(destination, counts, start, first, length, new_rows, ROWS)
            # Divided first: the weight of a row that none is merged into is 1, so that it is copied exactly.
            weight = tl.div_rn(there, total[:, None])
            inside = (rows[:, None] < length) & (columns[None, :] < WIDTH)
            x = tl.load(states + (start + rows)[:, None] * states_row + columns[None, :], inside, 0.0).to(tl.float32)
            # 0 times infinity is NaN, in rows that it does not belong to: only those that it does are made NaN.
            is_finite = tl.abs(x) < float("inf")
            mixed = tl.dot(weight, tl.where(is_finite, x, 0.0), mixed, input_precision=PRECISION)
            lost = tl.where(is_finite, 0.0, 1.0)
            if tl.max(tl.max(lost, 1), 0) > 0:
                broken = tl.dot(tl.where(weight > 0, 1.0, 0.0), lost, broken, input_precision="ieee")
        mixed = tl.where(broken > 0, float("nan"), mixed)
        place = (new_start + new_rows)[:, None] * WIDTH + columns[None, :]
        tl.store(output + place, mixed.to(output.dtype.element_ty), is_row[:, None] & (columns[None, :] < WIDTH))
        tl.store(sizes + new_start + new_rows, total, is_row & (tl.program_id(0) == 0))
