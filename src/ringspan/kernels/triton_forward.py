"""Triton: one tile into the softmax state.

One program takes a block of rows of one head through all blocks of keys that some of its rows see. The state is loaded
before and stored after: moving it to a new row_max costs no pass of its own. Scores are in units of log2, as the GPU's
exponential is, and so is row_max inside: 2^(qk * factor - peak).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ringspan.kernels.triton_blocks import (
    dot,
    dot_seen,
    has_nan,
    inside,
    key_blocks,
    load_block,
    matrix_block,
    of_head,
    partial_block,
    rounded,
    seen_keys,
)

# log2(e) and what float32 makes of it; their difference matters where row_max is in the hundreds.
_LOG2E = tl.constexpr(1.4426950408889634)
_LOG2E_HIGH = tl.constexpr(1.44269502162933349609375)
_LOG2E_LOW = tl.constexpr(1.925963033500011e-08)
_LN2 = tl.constexpr(0.6931471805599453)

_NOT_SPECIALIZED = ["num_heads", "group", "num_rows", "num_keys", "lower", "upper", "factor"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def absorb_kernel(
    acc,
    row_max,
    row_sum,
    q,
    k,
    v,
    lo,
    hi,
    flags,
    acc_strides,
    max_strides,
    sum_strides,
    q_strides,
    k_strides,
    v_strides,
    bound_strides,
    num_heads,
    group,
    num_rows,
    num_keys,
    lower,
    upper,
    factor,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BAND: tl.constexpr,
    FLIPPED: tl.constexpr,
    FLAGGED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """acc [B, H, T, E], row_max, row_sum [B, H, T] float32, in place; q [B, H, T, D], k [B, K, S, D], v [B, K, S, E] of
    one dtype. D is HEAD_DIM, E VALUE_DIM; blocks have DIMS and VALUE_DIMS.

    BAND: row i sees i + lower <= key < i + upper; else lo, hi (int32) by bound_strides (B, H, T).
    factor: |scale| * log2(e), never 0; FLIPPED: scale < 0. Grid: row blocks times heads times batch entries.
    FLAGGED: only what flags [B, H, row blocks] says, and carefully, as hopper_forward leaves it.
    """
    num_blocks = tl.cdiv(num_rows, ROWS)
    # Under a causal mask the last rows have most to do: they come first, so that none of them ends alone.
    start = (num_blocks - 1 - tl.program_id(0) % num_blocks) * ROWS
    batch, head = tl.program_id(0) // num_blocks // num_heads, tl.program_id(0) // num_blocks % num_heads
    if FLAGGED:
        if tl.load(flags + tl.program_id(0) // num_blocks * num_blocks + start // ROWS) == 0:
            return
    row = start + tl.arange(0, ROWS)
    bounds = batch.to(tl.int64) * bound_strides[0] + head.to(tl.int64) * bound_strides[1]
    first, last = seen_keys(lo + bounds, hi + bounds, bound_strides[2], row, num_rows, num_keys, lower, upper, BAND)
    begin, full_begin, full_end, end = key_blocks(first, last, row < num_rows, num_keys, KEYS)
    if begin >= end:
        return
    k, v = of_head(k, batch, head // group, k_strides), of_head(v, batch, head // group, v_strides)
    q = of_head(q, batch, head, q_strides)
    block_q = load_block(q, start, num_rows, q_strides, ROWS, DIMS, HEAD_DIM, WHOLE=False)
    if FLIPPED:
        # In float32: Triton 3.9's interpreter would negate the bit patterns of bfloat16.
        block_q = (-block_q.to(tl.float32)).to(block_q.dtype)
    acc = of_head(acc, batch, head, acc_strides)
    acc_block = matrix_block(acc, start, acc_strides[2], acc_strides[3], ROWS, VALUE_DIMS)
    exists = inside(start, num_rows, ROWS, VALUE_DIMS, VALUE_DIM)
    row_max = of_head(row_max, batch, head, max_strides) + row.to(tl.int64) * max_strides[2]
    row_sum = of_head(row_sum, batch, head, sum_strides) + row.to(tl.int64) * sum_strides[2]

    numerator, total, peak = _sweep(
        acc_block, exists, row_sum, row_max, block_q, k, v, first, last, begin, full_begin, full_end, end,
        row < num_rows, num_keys, k_strides, v_strides, factor,
        HEAD_DIM, DIMS, VALUE_DIM, VALUE_DIMS, KEYS, STAGES, CAREFUL=FLAGGED,
    )  # fmt: skip
    # 0 * NaN: only a block with hidden pairs can have let a value through to a row that does not see it.
    if not FLAGGED:
        if has_nan(numerator) & (full_begin - begin + end - full_end > 0):
            numerator, total, peak = _sweep(
                acc_block, exists, row_sum, row_max, block_q, k, v, first, last, begin, full_begin, full_end, end,
                row < num_rows, num_keys, k_strides, v_strides, factor,
                HEAD_DIM, DIMS, VALUE_DIM, VALUE_DIMS, KEYS, STAGES, CAREFUL=True,
            )  # fmt: skip

    peak, loss = _in_nats(peak)
    # Rows that see nothing keep every bit.
    sees = first < last
    tl.store(row_max, peak, mask=sees)
    tl.store(row_sum, total * loss, mask=sees)
    tl.store(acc_block, numerator * loss[:, None], mask=exists & sees[:, None])


@triton.jit
def _sweep(
    acc_block, exists, row_sum, row_max, q, k, v, first, last, begin, full_begin, full_end, end, is_row,
    num_keys, k_strides, v_strides, factor,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_DIMS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The state as it is in memory, and all blocks of keys taken in. CAREFUL: all of them as if pairs were hidden."""
    numerator = tl.load(acc_block, mask=exists, other=0.0)
    total = tl.load(row_sum, mask=is_row, other=0.0)
    peak, loss = _in_log2(tl.load(row_max, mask=is_row, other=0.0))
    numerator, total = numerator * loss[:, None], total * loss
    if CAREFUL:
        full_begin, full_end = end, end
    else:
        for index in tl.range(full_begin, full_end, num_stages=STAGES):
            numerator, total, peak = _take_in(
                numerator, total, peak, q, k, v, first, last, index * KEYS, num_keys, k_strides, v_strides, factor,
                HEAD_DIM, DIMS, VALUE_DIM, VALUE_DIMS, KEYS, MASKED=False, CAREFUL=False,
            )  # fmt: skip
    for index in tl.range(0, full_begin - begin + end - full_end, num_stages=1 if CAREFUL else STAGES):
        key = partial_block(index, begin, full_begin, full_end) * KEYS
        numerator, total, peak = _take_in(
            numerator, total, peak, q, k, v, first, last, key, num_keys, k_strides, v_strides, factor,
            HEAD_DIM, DIMS, VALUE_DIM, VALUE_DIMS, KEYS, MASKED=True, CAREFUL=CAREFUL,
        )  # fmt: skip
    return numerator, total, peak


@triton.jit
def _take_in(
    numerator, total, peak, q, k, v, first, last, start, num_keys, k_strides, v_strides, factor,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_DIMS: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One block of keys into the rows' state."""
    block_k = load_block(k, start, num_keys, k_strides, KEYS, DIMS, HEAD_DIM, WHOLE=not MASKED)
    scores = dot(q, tl.trans(block_k), tl.zeros([q.shape[0], KEYS], tl.float32))
    if MASKED:
        key = start + tl.arange(0, KEYS)
        seen = (first[:, None] <= key[None, :]) & (key[None, :] < last[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
    # A row that has seen nothing so far keeps m = -inf; its factors must be 2^-inf = 0, not 2^nan.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(tl.fma(scores, factor, -base[:, None]))
    decay = tl.exp2(peak - base)
    total = total * decay + tl.sum(weights, 1)
    numerator = numerator * decay[:, None]
    block_v = load_block(v, start, num_keys, v_strides, KEYS, VALUE_DIMS, VALUE_DIM, WHOLE=not MASKED)
    if CAREFUL:
        numerator = dot_seen(weights, block_v, seen, numerator)
    else:
        numerator = dot(rounded(weights, block_v.dtype), block_v, numerator)
    return numerator, total, new_peak


@triton.jit
def _in_log2(nats):
    """(log2, loss): e^nats = 2^log2 * loss, which is 1 but for what the product's rounding lost."""
    # An explicit fma, since compilers join a product with the sum that it is part of, and then it is another number.
    log2 = tl.fma(nats, _LOG2E_HIGH, 0.0)
    return log2, _power_of(tl.fma(nats, _LOG2E_LOW, tl.fma(nats, _LOG2E_HIGH, -log2)))


@triton.jit
def _in_nats(log2):
    """(nats, loss): 2^log2 = e^nats * loss."""
    nats = tl.fma(log2, _LN2, 0.0)
    return nats, _power_of(tl.fma(-nats, _LOG2E_LOW, tl.fma(-nats, _LOG2E_HIGH, log2)))


@triton.jit
def _power_of(small):
    """2^small for |small| << 1; 1 where infinities of both signs met (an empty row's -inf less -inf)."""
    return tl.where(small == small, 1.0 + small * _LN2, 1.0)
