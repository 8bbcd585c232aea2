"""Triton kernels for varlen batches on CUDA: attention, attention with scores, the gate, and the merge. No gradients.

Layout: varlen, that is, the rows of all samples are contiguous and without padding. R rows, B samples, H heads, d head
width, T alignment tokens, D width. `cu_seqlens` (B + 1,) int32, on the device: 0, then the cumulative sums of the
lengths, each at least 1. The first row of a sample is protected (BLIP's class token); with `protects_last` so is the
last (CLIP's end of text). All other rows are removable tokens. The *pooling* row is the first, or with `protects_last`
the last.

Arithmetic is in float32. Attention uses exponentials and logarithms of base 2, because the hardware computes these.
There are no atomic additions, and block sizes depend on dtypes and head width alone. So results are bitwise
reproducible, and a sample's results do not depend on its batch.

The module can be imported without triton; `is_available` then returns False. Callers catch `KERNEL_ERRORS`, call
`disable`, and fall back to torch.
"""

import math
import subprocess
import warnings

import torch


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_WIDTHS = (16, 32, 64, 128)
COMPUTE_CAPABILITY = (8, 0)  # the GPU's, at least
GATE_BLOCKS = {"ROWS": 128, "COLUMNS": 128, "num_warps": 16}
MERGE_BLOCKS = {"ROWS": 64, "COLUMNS": 64, "num_warps": 4}


class KernelError(RuntimeError):
    """Raised if Triton can't build, load or launch a kernel: no C compiler, no driver, a driver that refuses it."""


# Kernels can't be compiled, or don't fit the GPU; () without triton. `PTXASError` was added to triton later.
KERNEL_ERRORS: tuple[type[Exception], ...] = ()
if triton is not None:
    _errors = getattr(triton.runtime, "errors", None)
    _found = [getattr(triton, name, None) for name in ("CompilationError", "OutOfResources")]
    KERNEL_ERRORS = (KernelError, *filter(None, [*_found, getattr(_errors, "PTXASError", None)]))
_enabled = triton is not None


def disable(error: Exception) -> None:
    """Switch the kernels off for the rest of the process; the first call warns and names the `error`."""
    global _enabled
    if _enabled:
        _enabled = False
        warnings.warn(f"Triton kernels are disabled, torch operations replace them: {error!r}", stacklevel=2)


def is_available(query: torch.Tensor) -> bool:
    """Return whether the kernels support queries (R, H, d) like these, and so their keys, values and scores."""
    return (
        _enabled
        and query.is_cuda
        and torch.version.hip is None
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and query.requires_grad)
        and query.dtype in DTYPES
        and query.shape[-1] in HEAD_WIDTHS
        and torch.cuda.get_device_capability(query.device) >= COMPUTE_CAPABILITY
    )


def block_sizes(dtype: torch.dtype, width: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return block sizes and launch options of the two attention kernels that fit registers and shared memory."""
    narrow = width <= 64
    if dtype == torch.float32:  # no tensor cores
        blocks = {"QUERIES": 64 if narrow else 32, "KEYS": 32, "num_warps": 8, "num_stages": 1}
        return blocks, blocks
    queries, stages = (128, 3) if narrow else (64, 2)
    return (
        {"QUERIES": queries, "KEYS": 64, "num_warps": 4, "num_stages": stages},
        {"QUERIES": queries, "KEYS": 128, "num_warps": 8, "num_stages": stages},
    )


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    is_causal: bool = False,
    sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention of each sample's queries to the sample's own keys, in one launch.

    query (Rq, H, d), key, value (Rk, H, d): with any strides; copied if the last stride is not 1. max_seqlen_q: the
    largest number of queries in a sample, or more. is_causal: query i of a sample attends to keys 0 to i; both
    `cu_seqlens` must then be the same. sizes (Rk,) float32, above 0: weight the keys, as if each were there that many
    times. Returns (Rq, H, d), contiguous.
    """
    query, key, value = (last_stride_1(x) for x in (query, key, value))
    output = query.new_empty(query.shape)
    _launch_attend(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, is_causal, sizes, output, None, None)
    return output


def scored_varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    is_causal: bool = False,
    protects_last: bool = False,
    sizes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute self-attention, and the evidence for token importance from its probabilities A, in two launches.

    A is never materialised. query, key, value (R, H, d), sizes (R,): as in `varlen_attention`. Returns four tensors,
    in which all entries are valid, also those of protected rows:

    output (R, H, d), contiguous
    received (query blocks, R) float32: the maximum over heads of A, summed over a block of the sample's queries
        without its first row; to be summed over the blocks. 0 in blocks beyond the sample.
    pooling_attention (H, R) float32: the probability with which the pooling row attends to each row
    output_norm (H, R) float32: the L2 norm of each row of the output, after rounding to its dtype
    """
    query, key, value = (last_stride_1(x) for x in (query, key, value))
    num_rows, num_heads, width = query.shape
    output = query.new_empty(query.shape)
    # Separate tensors, because Triton's layouts, and so the order of sums, depend on the alignment of pointers.
    log_sums, pooling_attention, output_norm = (
        query.new_empty(num_heads, num_rows, dtype=torch.float32) for _ in range(3)
    )
    out = output, log_sums, output_norm
    _launch_attend(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, is_causal, sizes, *out)

    blocks = block_sizes(query.dtype, width)[1]
    query_blocks, key_blocks = (triton.cdiv(max_seqlen, blocks[name]) for name in ("QUERIES", "KEYS"))
    received = log_sums.new_empty(query_blocks, num_rows)
    launch(
        _sum_received, (key_blocks, query_blocks, cu_seqlens.shape[0] - 1),
        query, *query.stride()[:2], key, *key.stride()[:2], cu_seqlens, sizes, log_sums, received, pooling_attention,
        num_rows, _scale(width),
        HEADS=num_heads, WIDTH=width, CAUSAL=is_causal, PROTECTS_LAST=protects_last, SIZED=sizes is not None, **blocks,
    )  # fmt: skip
    return output, received, pooling_attention, output_norm


def gate(
    scores: torch.Tensor,
    received: torch.Tensor,
    pooling_attention: torch.Tensor,
    output_norm: torch.Tensor,
    cu_seqlens: torch.Tensor,
    temperature: float,
    min_kept: int,
    protects_last: bool = False,
    factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute importance and threshold, and select the rows that stay, in one launch and one cumulative sum.

    The host does not wait for the device. A sample merges if at least `min_kept` of its removable tokens stay and at
    least two go; otherwise all stay. scores (R, T): the alignment scores a, in any floating dtype; those of protected
    rows are not read. received, pooling_attention, output_norm: from `scored_varlen_attention`. temperature: above 0.
    factor: multiplies the threshold. Returns

    importance (R,) float32: s of the removable tokens, 0 at protected rows
    destination (R,) int32: for a row that stays, its position among its sample's new rows; for a row that goes,
        -1 - the position of the merged row, which is the sample's last, with `protects_last` the last but one
    new_cu_seqlens (B + 1,) int32
    """
    scores = last_stride_1(scores)
    num_rows, num_heads, batch_size = scores.shape[0], pooling_attention.shape[0], cu_seqlens.shape[0] - 1
    parts, importance = received.new_empty(3, num_rows), received.new_empty(num_rows)
    destination = cu_seqlens.new_empty(num_rows, dtype=torch.int32)
    lengths = cu_seqlens.new_empty(batch_size + 1, dtype=torch.int32)
    launch(
        _gate, (batch_size,),
        scores, scores.stride(0), received, pooling_attention, output_norm, cu_seqlens, parts, importance, destination,
        lengths, num_rows, received.shape[0], temperature, min_kept, factor,
        NUM_COLUMNS=scores.shape[1], HEADS=num_heads, HEADS_BLOCK=triton.next_power_of_2(num_heads),
        PROTECTS_LAST=protects_last, **GATE_BLOCKS,
    )  # fmt: skip
    return importance, destination, lengths.cumsum(0, dtype=torch.int32)


def merge(
    states: torch.Tensor,
    importance: torch.Tensor,
    destination: torch.Tensor,
    cu_seqlens: torch.Tensor,
    new_cu_seqlens: torch.Tensor,
    num_rows: int,
) -> torch.Tensor:
    """Repack the rows that stay, and merge each sample's others into their importance-weighted mean, in one launch.

    states (R, D): the rows before the reduction; importance, destination, new_cu_seqlens: from `gate`; num_rows: the
    last entry of `new_cu_seqlens`. Returns (num_rows, D), in the dtype of `states`.
    """
    states = last_stride_1(states)
    width = states.shape[1]
    output = states.new_empty(num_rows, width)
    launch(
        _merge, (triton.cdiv(width, MERGE_BLOCKS["COLUMNS"]), cu_seqlens.shape[0] - 1),
        states, states.stride(0), importance, destination, cu_seqlens, new_cu_seqlens, output,
        WIDTH=width, **MERGE_BLOCKS,
    )  # fmt: skip
    return output


def last_stride_1(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _scale(width: int) -> float:
    return width**-0.5 * math.log2(math.e)


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Launch a kernel on the device of its first argument; builtin exceptions of Triton become `KernelError`."""
    with torch.cuda.device_of(arguments[0]):
        try:
            kernel[grid](*arguments, **options)
        # Only Triton runs here: it looks for a C compiler and the driver, builds the kernel and loads it.
        except (RuntimeError, OSError, AssertionError, subprocess.CalledProcessError) as error:
            raise KernelError(f"{kernel.__name__} can't be built or launched: {error}") from error


def _launch_attend(
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, is_causal, sizes, output, log_sums, output_norm
):
    num_rows, num_heads, width = query.shape
    blocks = block_sizes(query.dtype, width)[0]
    launch(
        _attend, (triton.cdiv(max_seqlen_q, blocks["QUERIES"]), num_heads, cu_seqlens_q.shape[0] - 1),
        query, *query.stride()[:2], key, *key.stride()[:2], value, *value.stride()[:2], cu_seqlens_q, cu_seqlens_k,
        sizes, output, log_sums, output_norm, num_rows, _scale(width),
        WIDTH=width, CAUSAL=is_causal, SIZED=sizes is not None, SCORED=log_sums is not None, **blocks,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _sample_rows(cu_seqlens, sample):
        """Load a sample's first row, int64 because offsets are multiples of it, and its length."""
        start = tl.load(cu_seqlens + sample)
        return start.to(tl.int64), tl.load(cu_seqlens + sample + 1) - start

    @triton.jit
    def _sample_tokens(cu_seqlens, sample, PROTECTS_LAST: tl.constexpr):
        """Load a sample's first row, its length, and how many of its rows are removable: those from the second on."""
        start, length = _sample_rows(cu_seqlens, sample)
        num_tokens = length - 1
        if PROTECTS_LAST:
            num_tokens = tl.maximum(length - 2, 0)
        return start, length, num_tokens

    @triton.jit
    def _head_rows(states, row_stride, head_stride, start, head, rows, WIDTH: tl.constexpr):
        """Return pointers (rows, d) to a head's entries in some rows of a sample, in (R, H, d)."""
        first = states + start * row_stride + head.to(tl.int64) * head_stride
        return first + rows[:, None] * row_stride + tl.arange(0, WIDTH)[None, :]

    @triton.jit(do_not_specialize=["num_rows"])
    def _attend(
        query, query_row, query_head, key, key_row, key_head, value, value_row, value_head,
        cu_seqlens_q, cu_seqlens_k, sizes, output, log_sums, output_norm, num_rows, scale,
        WIDTH: tl.constexpr, CAUSAL: tl.constexpr, SIZED: tl.constexpr, SCORED: tl.constexpr,
        QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """Attend from a block of a head's queries: store output (R, H, d).

        If SCORED, also store the output's norms and the log2 of the softmax's sums, (H, R) each. If SIZED, weight the
        keys.
        """
        head, sample = tl.program_id(1), tl.program_id(2)
        start, num_queries = _sample_rows(cu_seqlens_q, sample)
        key_start, num_keys = _sample_rows(cu_seqlens_k, sample)
        first_row = tl.program_id(0) * QUERIES
        if first_row >= num_queries:
            return
        rows = first_row + tl.arange(0, QUERIES)
        inside = rows[:, None] < num_queries
        q = tl.load(_head_rows(query, query_row, query_head, start, head, rows, WIDTH), inside, 0.0)
        highest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
        end = num_keys
        if CAUSAL:
            end = tl.minimum(num_keys, first_row + QUERIES)
        for first_key in range(0, end, KEYS):
            keys = first_key + tl.arange(0, KEYS)
            real = keys[:, None] < num_keys
            k = tl.load(_head_rows(key, key_row, key_head, key_start, head, keys, WIDTH), real, 0.0)
            v = tl.load(_head_rows(value, value_row, value_head, key_start, head, keys, WIDTH), real, 0.0)
            seen = keys[None, :] < num_keys
            if CAUSAL:
                seen = seen & (keys[None, :] <= rows[:, None])
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if SIZED:
                logits += tl.log2(tl.load(sizes + key_start + keys, keys < num_keys, 1.0))[None, :]
            # Every query attends to the first key, so `highest` is finite from the first block on.
            logits = tl.where(seen, logits, float("-inf"))
            now_highest = tl.maximum(highest, tl.max(logits, 1))
            p = tl.exp2(logits - now_highest[:, None])
            shrink = tl.exp2(highest - now_highest)
            total = total * shrink + tl.sum(p, 1)
            mixed = tl.dot(p.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
            highest = now_highest
        mixed = (mixed / total[:, None]).to(output.dtype.element_ty)
        heads = tl.num_programs(1)
        tl.store(_head_rows(output, heads * WIDTH, WIDTH, start, head, rows, WIDTH), mixed, inside)
        if SCORED:
            place = head.to(tl.int64) * num_rows + start + rows
            tl.store(log_sums + place, highest + tl.log2(total), rows < num_queries)
            rounded = mixed.to(tl.float32)
            tl.store(output_norm + place, tl.sqrt(tl.sum(rounded * rounded, 1)), rows < num_queries)

    @triton.jit(do_not_specialize=["num_rows"])
    def _sum_received(
        query, query_row, query_head, key, key_row, key_head,
        cu_seqlens, sizes, log_sums, received, pooled, num_rows, scale,
        HEADS: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, PROTECTS_LAST: tl.constexpr,
        SIZED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """Recompute A for a block of queries and keys of a sample: store received (blocks, R), pooled (H, R)."""
        block, sample = tl.program_id(1), tl.program_id(2)
        start, length = _sample_rows(cu_seqlens, sample)
        first_row, first_key = block * QUERIES, tl.program_id(0) * KEYS
        if first_key >= length:
            return
        rows = first_row + tl.arange(0, QUERIES)
        keys = first_key + tl.arange(0, KEYS)
        place = block.to(tl.int64) * num_rows + start + keys
        pooling = 0
        if PROTECTS_LAST:
            pooling = length - 1
        holds_query = pooling // QUERIES == block
        nothing = first_row >= length
        if CAUSAL:
            nothing = nothing | ((first_key > first_row + QUERIES - 1) & (holds_query == 0))
        if nothing:  # no queries, or none that attends to these keys
            tl.store(received + place, tl.zeros([KEYS], tl.float32), keys < length)
            return
        if SIZED:
            bias = tl.log2(tl.load(sizes + start + keys, keys < length, 1.0))
        # The exponential is monotonic, so the maximum over heads can be taken before it.
        strongest = tl.full([QUERIES, KEYS], float("-inf"), tl.float32)
        for index in range(HEADS):
            head = index + 0 * block  # a tensor, for `_head_rows`
            q = tl.load(
                _head_rows(query, query_row, query_head, start, head, rows, WIDTH), rows[:, None] < length, 0.0
            )
            k = tl.load(_head_rows(key, key_row, key_head, start, head, keys, WIDTH), keys[:, None] < length, 0.0)
            of_head = head.to(tl.int64) * num_rows + start
            log_sum = tl.load(log_sums + of_head + rows, rows < length, 0.0)
            log = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - log_sum[:, None]
            if SIZED:
                log += bias[None, :]
            if CAUSAL:
                log = tl.where(keys[None, :] <= rows[:, None], log, float("-inf"))
            strongest = tl.maximum(strongest, log)
            if holds_query:
                of_query = tl.exp2(tl.sum(tl.where(rows[:, None] == pooling, log, 0.0), 0))
                tl.store(pooled + of_head + keys, of_query, keys < length)
        asks = (rows[:, None] > 0) & (rows[:, None] < length)
        tl.store(received + place, tl.sum(tl.where(asks, tl.exp2(strongest), 0.0), 0), keys < length)

    @triton.jit
    def _importance_parts(
        scores, scores_row, received, pooled, output_norm, num_rows, query_blocks, start, rows, is_token,
        NUM_COLUMNS: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Compute a block of rows' received, s_cls and largest alignment score: (rows,), 0 at protected rows."""
        place = start + rows
        from_all = tl.zeros([ROWS], tl.float32)
        # Always eight blocks at a time, so that the order of summation does not depend on the batch.
        for first in range(0, query_blocks, 8):
            blocks = first + tl.arange(0, 8)[:, None]
            of_block = received + blocks.to(tl.int64) * num_rows + place[None, :]
            from_all += tl.sum(tl.load(of_block, (blocks < query_blocks) & is_token[None, :], 0.0), 0)
        heads = tl.arange(0, HEADS_BLOCK)[:, None]
        inside = (heads < HEADS) & is_token[None, :]
        of_head = heads.to(tl.int64) * num_rows + place[None, :]
        norm = tl.load(output_norm + of_head, inside, 0.0)
        share = tl.div_rn(norm, tl.where(is_token, tl.sum(norm, 0), 1.0)[None, :])
        by_reader = tl.sum(tl.load(pooled + of_head, inside, 0.0) * share, 0)
        aligned = tl.full([ROWS], float("-inf"), tl.float32)
        for first in range(0, NUM_COLUMNS, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            a = _score_block(scores, scores_row, rows, columns, is_token, NUM_COLUMNS)
            aligned = tl.maximum(aligned, tl.max(a, 1))
        return from_all, by_reader, tl.where(is_token, aligned, 0.0)

    @triton.jit
    def _score_block(scores, scores_row, rows, columns, is_token, NUM_COLUMNS: tl.constexpr):
        """Load alignment scores as float32 (rows, columns); -inf at protected rows and beyond the last column."""
        inside = is_token[:, None] & (columns[None, :] < NUM_COLUMNS)
        a = tl.load(scores + rows[:, None] * scores_row + columns[None, :], inside, float("-inf"))
        return a.to(tl.float32)

    @triton.jit
    def _threshold(
        scores, scores_row, importance, start, length, num_tokens, temperature,
        NUM_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Compute a sample's threshold theta (without `factor`), see `token_pruning.importance_threshold`."""
        lowest = tl.full([COLUMNS], float("inf"), tl.float32)
        for first_column in range(0, NUM_COLUMNS, COLUMNS):
            columns = first_column + tl.arange(0, COLUMNS)
            highest = tl.full([COLUMNS], float("-inf"), tl.float32)
            for first in range(0, length, ROWS):
                rows = first + tl.arange(0, ROWS)
                is_token = (rows >= 1) & (rows <= num_tokens)
                a = _score_block(scores, scores_row, rows, columns, is_token, NUM_COLUMNS)
                highest = tl.maximum(highest, tl.max(a, 0))
            highest = tl.div_rn(highest, temperature)
            total = tl.zeros([COLUMNS], tl.float32)
            seen = tl.zeros([COLUMNS], tl.float32)
            for first in range(0, length, ROWS):
                rows = first + tl.arange(0, ROWS)
                is_token = (rows >= 1) & (rows <= num_tokens)
                a = _score_block(scores, scores_row, rows, columns, is_token, NUM_COLUMNS)
                a = tl.div_rn(a, temperature) - highest[None, :]
                inside = is_token[:, None] & (columns[None, :] < NUM_COLUMNS)
                weight = tl.where(inside, tl.exp(a), 0.0)
                s = tl.load(importance + start + rows, is_token, 0.0)
                total += tl.sum(weight, 0)
                seen += tl.sum(weight * s[:, None], 0)
            # The softmax's division comes last. At small temperatures an alignment token attends to a single token,
            # theta equals its importance to the last bit, and rounding decides: this order rounds as the published
            # code does.
            lowest = tl.minimum(lowest, tl.where(columns < NUM_COLUMNS, tl.div_rn(seen, total), float("inf")))
        return tl.min(lowest, 0)

    @triton.jit
    def _store_importance(
        scores, scores_row, received, pooled, output_norm, parts, importance, num_rows, query_blocks,
        start, length, num_tokens,
        NUM_COLUMNS: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Store the importance of a sample's rows. Row r of the sample is removable if 1 <= r <= num_tokens."""
        received_sums = tl.zeros([ROWS], tl.float32)
        aligned_sums = tl.zeros([ROWS], tl.float32)
        for first in range(0, length, ROWS):
            rows = first + tl.arange(0, ROWS)
            is_token = (rows >= 1) & (rows <= num_tokens)
            from_all, by_reader, aligned = _importance_parts(
                scores, scores_row, received, pooled, output_norm, num_rows, query_blocks, start, rows, is_token,
                NUM_COLUMNS, HEADS, HEADS_BLOCK, ROWS, COLUMNS,
            )  # fmt: skip
            received_sums += from_all
            aligned_sums += aligned
            tl.store(parts + start + rows, from_all, is_token)
            tl.store(parts + num_rows + start + rows, by_reader, is_token)
            tl.store(parts + 2 * num_rows + start + rows, aligned, is_token)
        received_sum, aligned_sum = tl.sum(received_sums, 0) + 1e-8, tl.sum(aligned_sums, 0) + 1e-8
        tl.debug_barrier()  # threads read what other threads have written
        for first in range(0, length, ROWS):
            rows = first + tl.arange(0, ROWS)
            is_token = (rows >= 1) & (rows <= num_tokens)
            from_all = tl.load(parts + start + rows, is_token, 0.0)
            by_reader = tl.load(parts + num_rows + start + rows, is_token, 0.0)
            aligned = tl.load(parts + 2 * num_rows + start + rows, is_token, 0.0)
            by_all = tl.div_rn(from_all, received_sum)
            by_alignment = tl.div_rn(aligned, aligned_sum)
            s = tl.div_rn(by_all + by_reader + by_alignment, 3.0)
            tl.store(importance + start + rows, tl.where(is_token, s, 0.0), rows < length)

    @triton.jit
    def _store_destination(
        scores, scores_row, importance, destination, lengths, sample, start, length, num_tokens,
        temperature, min_kept, factor,
        NUM_COLUMNS: tl.constexpr, ADDS_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Select a sample's rows by importance: store their destination, and the new length in lengths[sample + 1].

        ADDS_ROW: 1 if removed rows are merged into a new row, which they have as their destination, else 0.
        """
        theta = factor * _threshold(
            scores, scores_row, importance, start, length, num_tokens, temperature, NUM_COLUMNS, ROWS, COLUMNS
        )
        kept = tl.zeros([ROWS], tl.int32)
        for first in range(0, length, ROWS):
            rows = first + tl.arange(0, ROWS)
            is_token = (rows >= 1) & (rows <= num_tokens)
            kept += (is_token & (tl.load(importance + start + rows, is_token, 0.0) > theta)).to(tl.int32)
        num_kept = tl.sum(kept, 0)
        merges = (num_kept >= min_kept) & (num_tokens - num_kept > 1)
        new_length = tl.where(merges, length - num_tokens + num_kept + ADDS_ROW, length)
        tl.store(lengths + sample + 1, new_length)
        if sample == 0:
            tl.store(lengths, 0)

        before = 1  # the new rows so far: the first row, and the tokens that stay
        for first in range(0, length, ROWS):
            rows = first + tl.arange(0, ROWS)
            is_token = (rows >= 1) & (rows <= num_tokens)
            above = tl.load(importance + start + rows, is_token, 0.0) > theta
            stays = (is_token & (above | (merges == 0))).to(tl.int32)
            of_token = tl.where(stays == 1, before + tl.cumsum(stays, 0) - 1, -1 - (1 + num_kept))
            of_protected = tl.where(rows == 0, 0, new_length - 1)
            tl.store(destination + start + rows, tl.where(is_token, of_token, of_protected), rows < length)
            before += tl.sum(stays, 0)

    @triton.jit(do_not_specialize=["num_rows", "query_blocks", "min_kept", "factor"])
    def _gate(
        scores, scores_row, received, pooled, output_norm, cu_seqlens, parts, importance, destination, lengths,
        num_rows, query_blocks, temperature, min_kept, factor,
        NUM_COLUMNS: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, PROTECTS_LAST: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Gate one sample: store its rows' importance and destination, and its new length."""
        sample = tl.program_id(0)
        start, length, num_tokens = _sample_tokens(cu_seqlens, sample, PROTECTS_LAST)
        scores += start * scores_row  # offsets in the sample fit into int32, which saves registers
        _store_importance(
            scores, scores_row, received, pooled, output_norm, parts, importance, num_rows, query_blocks,
            start, length, num_tokens, NUM_COLUMNS, HEADS, HEADS_BLOCK, ROWS, COLUMNS,
        )  # fmt: skip
        tl.debug_barrier()
        _store_destination(
            scores, scores_row, importance, destination, lengths, sample, start, length, num_tokens,
            temperature, min_kept, factor, NUM_COLUMNS, 1, ROWS, COLUMNS,
        )  # fmt: skip

    @triton.jit
    def _merge(
        states, states_row, importance, destination, cu_seqlens, new_cu_seqlens, output,
        WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Repack and merge a block of a sample's columns: store its new rows in output (R', D)."""
        sample = tl.program_id(1)
        start, length = _sample_rows(cu_seqlens, sample)
        new_start = tl.load(new_cu_seqlens + sample).to(tl.int64)
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        mixed = tl.zeros([ROWS, COLUMNS], tl.float32)
        weights = tl.zeros([ROWS], tl.float32)
        merged_row = tl.full([ROWS], -1, tl.int32)
        for first in range(0, length, ROWS):
            rows = first + tl.arange(0, ROWS)
            place = start + rows
            to = tl.load(destination + place, rows < length, 0)
            goes = to < 0
            inside = (rows[:, None] < length) & (columns[None, :] < WIDTH)
            x = tl.load(states + place[:, None] * states_row + columns[None, :], inside, 0.0)
            new_place = output + (new_start + to)[:, None] * WIDTH + columns[None, :]
            tl.store(new_place, x, inside & (to[:, None] >= 0))
            weight = tl.load(importance + place, goes, 0.0)
            # `where`, because 0 times a row that stays is NaN if the row holds infinities.
            mixed += tl.where(goes[:, None], weight[:, None] * x.to(tl.float32), 0.0)
            weights += weight
            merged_row = tl.maximum(merged_row, -1 - to)
        merged_at = tl.max(merged_row, 0)
        if merged_at >= 0:
            total = tl.sum(mixed, 0)
            merged = tl.div_rn(total, tl.sum(weights, 0)).to(output.dtype.element_ty)
            tl.store(output + (new_start + merged_at) * WIDTH + columns, merged, columns < WIDTH)
