"""Triton: the gradients of one tile.

Two kernels, so that every sum has one owner and no atomics: the same bits in every run. One walks along the rows for a
block of keys (dk, dv; a key head's query heads one after the other), one along the keys for a block of rows (dq).
Scores and dO V^T are computed in both: 7 products where a kernel with atomics does 5.

    p_ij = 2^(qk_ij * factor - lse_i * log2(e))     ds_ij = p_ij * (do_i . v_j - delta_i)

-lse and -delta are added last: as start values of the sums they would make all rounding on the way as large as theirs.
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

_LOG2E = tl.constexpr(1.4426950408889634)

_NOT_SPECIALIZED = ["num_heads", "num_kv_heads", "group", "num_rows", "num_keys", "lower", "upper", "scale", "factor"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def absorb_dq_kernel(
    dq,
    q,
    k,
    v,
    do,
    lse,
    delta,
    lo,
    hi,
    flags,
    dq_strides,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    lse_strides,
    delta_strides,
    bound_strides,
    num_heads,
    group,
    num_rows,
    num_keys,
    lower,
    upper,
    scale,
    factor,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BAND: tl.constexpr,
    FLAGGED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dq [B, H, T, D] float32 in place. The rest as absorb_kernel has it; factor: scale * log2(e), of any sign."""
    num_blocks = tl.cdiv(num_rows, ROWS)
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
    q, do = of_head(q, batch, head, q_strides), of_head(do, batch, head, do_strides)
    block_q = load_block(q, start, num_rows, q_strides, ROWS, DIMS, HEAD_DIM, WHOLE=False)
    block_do = load_block(do, start, num_rows, do_strides, ROWS, VALUE_DIMS, VALUE_DIM, WHOLE=False)
    lse = of_head(lse, batch, head, lse_strides)
    delta = of_head(delta, batch, head, delta_strides)
    log2_total, drop = _row_constants(lse, delta, lse_strides, delta_strides, row, num_rows)
    gradient = _sweep_keys(
        block_q, k, v, block_do, log2_total, drop, first, last, begin, full_begin, full_end, end, num_keys,
        k_strides, v_strides, factor, HEAD_DIM, DIMS, VALUE_DIM, VALUE_DIMS, KEYS, STAGES, CAREFUL=FLAGGED,
    )  # fmt: skip
    # 0 * NaN: only a block with hidden pairs can have let a value through to a row that does not see it.
    if not FLAGGED:
        if has_nan(gradient) & (full_begin - begin + end - full_end > 0):
            gradient = _sweep_keys(
                block_q, k, v, block_do, log2_total, drop, first, last, begin, full_begin, full_end, end, num_keys,
                k_strides, v_strides, factor, HEAD_DIM, DIMS, VALUE_DIM, VALUE_DIMS, KEYS, STAGES, CAREFUL=True,
            )  # fmt: skip
    _add_to(dq, gradient * scale, batch, head, start, num_rows, dq_strides, ROWS, DIMS, HEAD_DIM)


@triton.jit
def _sweep_keys(
    q, k, v, do, log2_total, drop, first, last, begin, full_begin, full_end, end, num_keys,
    k_strides, v_strides, factor,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_DIMS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The rows' sum_j ds_ij k_j. CAREFUL: over all blocks as if they had hidden pairs."""
    gradient = tl.zeros([q.shape[0], DIMS], tl.float32)
    if CAREFUL:
        full_begin, full_end = end, end
    else:
        for index in tl.range(full_begin, full_end, num_stages=STAGES):
            gradient = _pull_of_keys(
                gradient, q, k, v, do, log2_total, drop, first, last, index * KEYS, num_keys, k_strides, v_strides,
                factor, HEAD_DIM, DIMS, VALUE_DIM, VALUE_DIMS, KEYS, MASKED=False, CAREFUL=False,
            )  # fmt: skip
    for index in tl.range(0, full_begin - begin + end - full_end, num_stages=1 if CAREFUL else STAGES):
        key = partial_block(index, begin, full_begin, full_end) * KEYS
        gradient = _pull_of_keys(
            gradient, q, k, v, do, log2_total, drop, first, last, key, num_keys, k_strides, v_strides,
            factor, HEAD_DIM, DIMS, VALUE_DIM, VALUE_DIMS, KEYS, MASKED=True, CAREFUL=CAREFUL,
        )  # fmt: skip
    return gradient


@triton.jit
def _pull_of_keys(
    gradient, q, k, v, do, log2_total, drop, first, last, start, num_keys, k_strides, v_strides, factor,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_DIMS: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to the rows' sum_j ds_ij k_j."""
    block_k = load_block(k, start, num_keys, k_strides, KEYS, DIMS, HEAD_DIM, WHOLE=not MASKED)
    block_v = load_block(v, start, num_keys, v_strides, KEYS, VALUE_DIMS, VALUE_DIM, WHOLE=not MASKED)
    nothing = tl.zeros([q.shape[0], KEYS], tl.float32)
    weights = tl.exp2(tl.fma(dot(q, tl.trans(block_k), nothing), factor, -log2_total[:, None]))
    d_scores = weights * (dot(do, tl.trans(block_v), nothing) - drop[:, None])
    if MASKED:
        key = start + tl.arange(0, KEYS)
        seen = (first[:, None] <= key[None, :]) & (key[None, :] < last[:, None])
        d_scores = tl.where(seen, d_scores, 0.0)
    if CAREFUL:
        gradient = dot_seen(d_scores, block_k, seen, gradient)
    else:
        gradient = dot(rounded(d_scores, block_k.dtype), block_k, gradient)
    return gradient


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def absorb_dkdv_kernel(
    dk,
    dv,
    q,
    k,
    v,
    do,
    lse,
    delta,
    lo,
    hi,
    ranges,
    flags,
    dk_strides,
    dv_strides,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    lse_strides,
    delta_strides,
    bound_strides,
    range_strides,
    num_kv_heads,
    group,
    num_rows,
    num_keys,
    lower,
    upper,
    scale,
    factor,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BAND: tl.constexpr,
    FLAGGED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dk [B, K, S, D], dv [B, K, S, E] float32 in place. Grid: key blocks times key heads times batch entries."""
    num_blocks = tl.cdiv(num_keys, KEYS)
    start = tl.program_id(0) % num_blocks * KEYS
    stop = tl.minimum(start + KEYS, num_keys)
    batch, kv_head = tl.program_id(0) // num_blocks // num_kv_heads, tl.program_id(0) // num_blocks % num_kv_heads
    if FLAGGED:
        if tl.load(flags + tl.program_id(0)) == 0:
            return
    k, v = of_head(k, batch, kv_head, k_strides), of_head(v, batch, kv_head, v_strides)
    block_k = load_block(k, start, num_keys, k_strides, KEYS, DIMS, HEAD_DIM, WHOLE=False)
    block_v = load_block(v, start, num_keys, v_strides, KEYS, VALUE_DIMS, VALUE_DIM, WHOLE=False)
    gradient_k, gradient_v, touched, partial = _sweep_rows(
        q, block_k, block_v, do, lse, delta, lo, hi, ranges, batch, kv_head, start, stop, group, num_rows, num_keys,
        q_strides, do_strides, lse_strides, delta_strides, bound_strides, range_strides, lower, upper, factor,
        HEAD_DIM, DIMS, VALUE_DIM, VALUE_DIMS, ROWS, KEYS, BAND, STAGES, CAREFUL=FLAGGED,
    )  # fmt: skip
    if not FLAGGED:
        if (has_nan(gradient_k) | has_nan(gradient_v)) & (partial > 0):
            gradient_k, gradient_v, touched, partial = _sweep_rows(
                q, block_k, block_v, do, lse, delta, lo, hi, ranges, batch, kv_head, start, stop, group, num_rows,
                num_keys, q_strides, do_strides, lse_strides, delta_strides, bound_strides, range_strides, lower, upper,
                factor, HEAD_DIM, DIMS, VALUE_DIM, VALUE_DIMS, ROWS, KEYS, BAND, STAGES, CAREFUL=True,
            )  # fmt: skip
    if touched > 0:
        _add_to(dk, gradient_k * scale, batch, kv_head, start, num_keys, dk_strides, KEYS, DIMS, HEAD_DIM)
        _add_to(dv, gradient_v, batch, kv_head, start, num_keys, dv_strides, KEYS, VALUE_DIMS, VALUE_DIM)


@triton.jit
def _sweep_rows(
    q, block_k, block_v, do, lse, delta, lo, hi, ranges, batch, kv_head, start, stop, group, num_rows, num_keys,
    q_strides, do_strides, lse_strides, delta_strides, bound_strides, range_strides, lower, upper, factor,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_DIMS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BAND: tl.constexpr,
    STAGES: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """(sum_i ds_ij q_i, sum_i p_ij do_i, blocks of rows that see the keys, those that may have hidden pairs).

    Over the rows of all query heads that read the key head. CAREFUL: over all blocks as if they had hidden pairs.
    """
    gradient_k, gradient_v = tl.zeros([KEYS, DIMS], tl.float32), tl.zeros([KEYS, VALUE_DIMS], tl.float32)
    touched, partial = 0, 0
    for member in range(group):
        head = kv_head * group + member
        bounds = batch.to(tl.int64) * bound_strides[0] + head.to(tl.int64) * bound_strides[1]
        my_lo, my_hi = lo + bounds, hi + bounds
        if BAND:
            begin, full_begin, full_end, end = _row_blocks_of_band(lower, upper, start, stop, num_rows, ROWS)
        else:
            mine = ranges + batch.to(tl.int64) * range_strides[0] + kv_head.to(tl.int64) * range_strides[1]
            mine += start // KEYS * range_strides[2]
            begin, full_begin, full_end, end = tl.load(mine), tl.load(mine + 1), tl.load(mine + 2), tl.load(mine + 3)
        my_q, my_do = of_head(q, batch, head, q_strides), of_head(do, batch, head, do_strides)
        my_lse, my_delta = of_head(lse, batch, head, lse_strides), of_head(delta, batch, head, delta_strides)
        if CAREFUL:
            full_begin, full_end = end, end
        else:
            for index in tl.range(full_begin, full_end, num_stages=STAGES):
                gradient_k, gradient_v = _pull_of_rows(
                    gradient_k, gradient_v, my_q, block_k, block_v, my_do, my_lse, my_delta, my_lo, my_hi,
                    index * ROWS, start, num_rows, num_keys, q_strides, do_strides, lse_strides, delta_strides,
                    bound_strides, lower, upper, factor,
                    HEAD_DIM, DIMS, VALUE_DIM, VALUE_DIMS, ROWS, KEYS, BAND, MASKED=False, CAREFUL=False,
                )  # fmt: skip
        num_partial = full_begin - begin + end - full_end
        for index in tl.range(0, num_partial, num_stages=1 if CAREFUL else STAGES):
            row = partial_block(index, begin, full_begin, full_end) * ROWS
            gradient_k, gradient_v = _pull_of_rows(
                gradient_k, gradient_v, my_q, block_k, block_v, my_do, my_lse, my_delta, my_lo, my_hi,
                row, start, num_rows, num_keys, q_strides, do_strides, lse_strides, delta_strides,
                bound_strides, lower, upper, factor,
                HEAD_DIM, DIMS, VALUE_DIM, VALUE_DIMS, ROWS, KEYS, BAND, MASKED=True, CAREFUL=CAREFUL,
            )  # fmt: skip
        touched, partial = tl.maximum(touched, end - begin), tl.maximum(partial, num_partial)
    return gradient_k, gradient_v, touched, partial


@triton.jit
def _pull_of_rows(
    gradient_k, gradient_v, q, k, v, do, lse, delta, lo, hi, start, first_key,
    num_rows, num_keys, q_strides, do_strides, lse_strides, delta_strides, bound_strides, lower, upper, factor,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_DIMS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BAND: tl.constexpr,
    MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """What one block of rows adds to the keys' sum_i ds_ij q_i and sum_i p_ij do_i. Everything is [keys, rows] here."""
    row = start + tl.arange(0, ROWS)
    block_q = load_block(q, start, num_rows, q_strides, ROWS, DIMS, HEAD_DIM, WHOLE=not MASKED)
    block_do = load_block(do, start, num_rows, do_strides, ROWS, VALUE_DIMS, VALUE_DIM, WHOLE=not MASKED)
    log2_total, drop = _row_constants(lse, delta, lse_strides, delta_strides, row, num_rows)
    nothing = tl.zeros([KEYS, ROWS], tl.float32)
    weights = tl.exp2(tl.fma(dot(k, tl.trans(block_q), nothing), factor, -log2_total[None, :]))
    d_scores = weights * (dot(v, tl.trans(block_do), nothing) - drop[None, :])
    if MASKED:
        key = first_key + tl.arange(0, KEYS)
        first, last = seen_keys(lo, hi, bound_strides[2], row, num_rows, num_keys, lower, upper, BAND)
        seen = (first[None, :] <= key[:, None]) & (key[:, None] < last[None, :])
        weights = tl.where(seen, weights, 0.0)
        d_scores = tl.where(seen, d_scores, 0.0)
    if CAREFUL:
        gradient_v = dot_seen(weights, block_do, seen, gradient_v)
        gradient_k = dot_seen(d_scores, block_q, seen, gradient_k)
    else:
        gradient_v = dot(rounded(weights, block_do.dtype), block_do, gradient_v)
        gradient_k = dot(rounded(d_scores, block_q.dtype), block_q, gradient_k)
    return gradient_k, gradient_v


@triton.jit
def _row_constants(lse, delta, lse_strides, delta_strides, row, num_rows):
    """(lse in log2, delta); +inf, which gives weight 0, for a row that saw nothing (-inf) or is beyond the edge."""
    total = tl.load(lse + row.to(tl.int64) * lse_strides[2], mask=row < num_rows, other=float("-inf"))
    drop = tl.load(delta + row.to(tl.int64) * delta_strides[2], mask=row < num_rows, other=0.0)
    return tl.where(total == float("-inf"), float("inf"), total * _LOG2E), drop


@triton.jit
def _row_blocks_of_band(lower, upper, start, stop, num_rows, ROWS: tl.constexpr):
    """(begin, full_begin, full_end, end): row blocks that see some of the keys start..stop, and those that see all."""
    begin = tl.maximum(start - upper + 1, 0) // ROWS
    end = tl.cdiv(tl.minimum(tl.maximum(stop - lower, 0), num_rows), ROWS)
    full_begin = tl.cdiv(tl.maximum(stop - upper, 0), ROWS)
    full_end = tl.minimum(tl.maximum(start - lower + 1, 0), num_rows) // ROWS
    none = full_begin >= full_end
    return begin, tl.where(none, end, full_begin), tl.where(none, end, full_end), end


@triton.jit
def _add_to(
    target, part, batch, head, start, num_rows, strides, ROWS: tl.constexpr, DIMS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    pointers = matrix_block(of_head(target, batch, head, strides), start, strides[2], strides[3], ROWS, DIMS)
    exists = inside(start, num_rows, ROWS, DIMS, HEAD_DIM)
    tl.store(pointers, tl.load(pointers, mask=exists, other=0.0) + part, mask=exists)
