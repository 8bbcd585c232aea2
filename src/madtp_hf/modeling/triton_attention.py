"""Self-attention and what the scores of its tokens need of it, on CUDA without ever holding the attention probabilities.

Shapes as in `token_pruning.py`. Two kernels. The first is attention in blocks with a running softmax, which also writes the logarithm of
each row's sum. With it the second makes any block of the probabilities again, all heads' one after the other, keeps their maximum and sums
it over the block's queries. Exponentials and logarithms are of base 2, which is what the hardware has; arithmetic is in float32; nothing is
added atomically, so that results repeat to the last bit. No gradients. Without triton the module imports, and `is_available` is False.
"""

import math
import warnings

import torch


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_WIDTHS = (16, 32, 64, 128)
COMPUTE_CAPABILITY = (8, 0)  # of the GPU, at least


def disable(error: Exception) -> None:
    """Go on without the kernels, in this process, and say so."""
    global triton
    triton = None
    warnings.warn(f"Triton's kernels can't run here, attention is computed without them: {error!r}", stacklevel=2)


def is_available(query: torch.Tensor) -> bool:
    """Whether `triton_scored_attention` can take queries (B, H, L, d) like these."""
    return (
        triton is not None
        and query.is_cuda
        and torch.version.hip is None
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and query.requires_grad)
        and query.dtype in DTYPES
        and query.shape[-1] in HEAD_WIDTHS
        and torch.cuda.get_device_capability(query.device) >= COMPUTE_CAPABILITY
    )


def triton_scored_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Self-attention A of (B, H, L, d) queries, keys and values: its output, and `received` and `from_class` of `AttentionScores`.

    lengths (B,), integers: each sample's number of real tokens, 1 or more; padding lies behind them. None: there is none.

    Returns output (B, H, L, d), in memory (B, L, H, d); received (B, N) and from_class (B, H, N) in float32, 0 at padding.
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    batch_size, num_heads, length, width = query.shape
    attend_blocks, received_blocks = block_sizes(query.dtype, width)
    scale = width**-0.5 * math.log2(math.e)

    output = query.new_empty(batch_size, length, num_heads, width).transpose(1, 2)
    sizes = query.new_empty(batch_size, num_heads, length, dtype=torch.float32)
    from_class = torch.zeros_like(sizes)
    query_blocks, key_blocks = (triton.cdiv(length, received_blocks[name]) for name in ("QUERIES", "KEYS"))
    received = sizes.new_zeros(batch_size, query_blocks, length)

    with torch.cuda.device_of(query):
        _attend[(triton.cdiv(length, attend_blocks["QUERIES"]), num_heads, batch_size)](
            query, *query.stride()[:3], key, *key.stride()[:3], value, *value.stride()[:3], lengths,
            output, *output.stride()[:3], sizes, length, scale, WIDTH=width, **attend_blocks,
        )  # fmt: skip
        _sum_received[(key_blocks, query_blocks, batch_size)](
            query, *query.stride()[:3], key, *key.stride()[:3], lengths,
            sizes, received, from_class, length, scale, HEADS=num_heads, WIDTH=width, **received_blocks,
        )  # fmt: skip
    return output, received.sum(dim=1)[:, 1:], from_class[:, :, 1:]


def block_sizes(dtype: torch.dtype, width: int) -> tuple[dict[str, int], dict[str, int]]:
    """Queries and keys of a block and how its loop is run, for both kernels: what fits into registers and shared memory."""
    narrow = width <= 64
    if dtype == torch.float32:  # no tensor cores
        blocks = {"QUERIES": 64 if narrow else 32, "KEYS": 32, "num_warps": 8, "num_stages": 1}
        return blocks, blocks
    queries, stages = (128, 3) if narrow else (64, 2)
    return (
        {"QUERIES": queries, "KEYS": 64, "num_warps": 4, "num_stages": stages},
        {"QUERIES": queries, "KEYS": 128, "num_warps": 8, "num_stages": stages},
    )


if triton is not None:

    @triton.jit
    def _rows(states, sample_stride, head_stride, row_stride, sample, head, rows, WIDTH: tl.constexpr):
        """Pointers to some rows of a head's (L, d): (rows, d)."""
        first = states + sample.to(tl.int64) * sample_stride + head * head_stride
        return first + rows[:, None] * row_stride + tl.arange(0, WIDTH)[None, :]

    @triton.jit
    def _num_real(lengths, sample, length):
        if lengths is None:
            return length
        else:
            return tl.load(lengths + sample).to(tl.int32)

    @triton.jit(do_not_specialize=["length"])
    def _attend(
        query, query_sample, query_head, query_row,
        key, key_sample, key_head, key_row,
        value, value_sample, value_head, value_row,
        lengths,
        output, output_sample, output_head, output_row,
        sizes, length, scale,
        WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """Some queries of a head: their rows of O into output (B, H, L, d), and log2 of their softmax's sum into sizes (B, H, L)."""
        head, sample = tl.program_id(1), tl.program_id(2)
        num_real = _num_real(lengths, sample, length)
        rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
        inside = rows[:, None] < length
        q = tl.load(_rows(query, query_sample, query_head, query_row, sample, head, rows, WIDTH), inside, 0.0)
        highest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
        for start in range(0, num_real, KEYS):
            keys = start + tl.arange(0, KEYS)
            real = keys[:, None] < num_real
            k = tl.load(_rows(key, key_sample, key_head, key_row, sample, head, keys, WIDTH), real, 0.0)
            v = tl.load(_rows(value, value_sample, value_head, value_row, sample, head, keys, WIDTH), real, 0.0)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            logits = tl.where(keys[None, :] < num_real, logits, float("-inf"))
            now_highest = tl.maximum(highest, tl.max(logits, 1))
            p = tl.exp2(logits - now_highest[:, None])
            shrink = tl.exp2(highest - now_highest)
            total = total * shrink + tl.sum(p, 1)
            mixed = tl.dot(p.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
            highest = now_highest
        mixed = (mixed / total[:, None]).to(output.dtype.element_ty)
        tl.store(_rows(output, output_sample, output_head, output_row, sample, head, rows, WIDTH), mixed, inside)
        row = (sample.to(tl.int64) * tl.num_programs(1) + head) * length + rows
        tl.store(sizes + row, highest + tl.log2(total), rows < length)

    @triton.jit(do_not_specialize=["length"])
    def _sum_received(
        query, query_sample, query_head, query_row,
        key, key_sample, key_head, key_row,
        lengths,
        sizes, received, from_class, length, scale,
        HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """Some queries of some keys: what the keys receive of them into received (B, blocks of queries, L), and from_class (B, H, L)."""
        block, sample = tl.program_id(1), tl.program_id(2)
        num_real = _num_real(lengths, sample, length)
        first_row, first_key = block * QUERIES, tl.program_id(0) * KEYS
        if (first_row >= num_real) | (first_key >= num_real):
            return  # padding alone: both are 0 from the beginning
        rows = first_row + tl.arange(0, QUERIES)
        keys = first_key + tl.arange(0, KEYS)
        # The exponential grows with its argument: the maximum over the heads can be taken first.
        strongest = tl.full([QUERIES, KEYS], float("-inf"), tl.float32)
        for head in range(HEADS):
            inside, real = rows[:, None] < num_real, keys[:, None] < num_real
            q = tl.load(_rows(query, query_sample, query_head, query_row, sample, head, rows, WIDTH), inside, 0.0)
            k = tl.load(_rows(key, key_sample, key_head, key_row, sample, head, keys, WIDTH), real, 0.0)
            row = (sample.to(tl.int64) * HEADS + head) * length
            size = tl.load(sizes + row + rows, rows < num_real, 0.0)
            log = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - size[:, None]
            strongest = tl.maximum(strongest, log)
            if block == 0:
                of_class = tl.exp2(tl.sum(tl.where(rows[:, None] == 0, log, 0.0), 0))
                tl.store(from_class + row + keys, of_class, keys < num_real)
        asking = (rows[:, None] > 0) & (rows[:, None] < num_real)
        sums = tl.sum(tl.where(asking, tl.exp2(strongest), 0.0), 0)
        place = (sample.to(tl.int64) * tl.num_programs(1) + block) * length + keys
        tl.store(received + place, sums, keys < num_real)
