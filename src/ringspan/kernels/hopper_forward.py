"""Hopper: one tile into the softmax state, for blocks that the copy engine can fetch.

As triton_forward.absorb_kernel, with which it shares the contract: scores in units of log2, the state loaded before and
stored after. Each group of warps starts a block's scores, then the block before's weights times its values, and takes
exponentials while that product runs (FlashAttention-3, arXiv:2407.08608, section 3.2).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ringspan.kernels.hopper_blocks import (
    GROUP_ROWS,
    block_at,
    clear_flags,
    copy_block,
    fetch,
    flags_of,
    has_nan,
    key_blocks,
    make_ring,
    matrix_of,
    of_head,
    program_of_rows,
    release,
    seen_keys,
    start_scores,
    wait_for,
)

# What float32 makes of log2(e), and the rest of it (see triton_forward).
_LOG2E_HIGH = gl.constexpr(1.44269502162933349609375)
_LOG2E_LOW = gl.constexpr(1.925963033500011e-08)
_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit(do_not_specialize=["num_heads", "group", "num_rows", "num_keys", "lower", "upper", "hides", "factor"])
def absorb_kernel(
    acc,
    row_max,
    row_sum,
    q_descriptor,
    k_descriptor,
    v_descriptor,
    lo,
    hi,
    flags,
    acc_strides,
    max_strides,
    sum_strides,
    bound_strides,
    num_heads,
    group,
    num_rows,
    num_keys,
    lower,
    upper,
    hides,
    factor,
    HEAD_DIM: gl.constexpr,
    BAND: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """acc [B, H, T, D], row_max, row_sum [B, H, T] float32, in place; descriptors of q [B, H, T, D] in blocks of 64
    rows and of k, v [B, K, S, D] in blocks of keys. factor > 0.

    BAND: row i sees i + lower <= key < i + upper; else lo, hi (int32) by bound_strides (B, H, T).

    hides: 1 if any row does not see all keys. flags [B, H, row blocks of 64] int32: 1 where a NaN may have come from a
    pair that the mask hides. Such a block's state is as it was: triton_forward takes it in anew, carefully.
    """
    ROWS: gl.constexpr = GROUPS * GROUP_ROWS
    KEYS: gl.constexpr = k_descriptor.block_type.shape[2]
    batch, head, start, stop = program_of_rows(num_rows, num_heads, ROWS)
    lo, hi = of_head(lo, batch, head, bound_strides), of_head(hi, batch, head, bound_strides)
    rule = (num_rows, num_keys, lower, upper, hides, lo, hi, bound_strides[2])
    blocks = key_blocks(start, stop, rule, 4 * GROUP_ROWS, KEYS, BAND)
    flags = flags_of(flags, batch, head, num_heads, start, num_rows)
    if blocks[0] >= blocks[3]:
        clear_flags(flags, start, num_rows, GROUPS)
        return
    qs = gl.allocate_shared_memory(q_descriptor.dtype, [GROUPS] + q_descriptor.block_type.shape, q_descriptor.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    k_ring = make_ring(k_descriptor, STAGES, 1, GROUPS)
    v_ring = make_ring(v_descriptor, STAGES, 1, GROUPS)

    acc = of_head(acc, batch, head, acc_strides)
    row_max = of_head(row_max, batch, head, max_strides)
    row_sum = of_head(row_sum, batch, head, sum_strides)
    state = (acc, acc_strides[2], acc_strides[3], row_max, max_strides[2], row_sum, sum_strides[2])
    inputs = (qs, q_ready, k_ring, v_ring)
    descriptors = (q_descriptor, k_descriptor, v_descriptor)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_take_in, (0, start, blocks, rule, state, inputs, flags, factor, HEAD_DIM, BAND)),
                (_take_in, (1, start, blocks, rule, state, inputs, flags, factor, HEAD_DIM, BAND)),
                (_fetch, (start, blocks, batch, head, head // group, descriptors, inputs)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_take_in, (0, start, blocks, rule, state, inputs, flags, factor, HEAD_DIM, BAND)),
                (_take_in, (1, start, blocks, rule, state, inputs, flags, factor, HEAD_DIM, BAND)),
                (_take_in, (2, start, blocks, rule, state, inputs, flags, factor, HEAD_DIM, BAND)),
                (_fetch, (start, blocks, batch, head, head // group, descriptors, inputs)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )


@gluon.jit
def _fetch(start, blocks, batch, head, kv_head, descriptors, inputs):
    q_descriptor, k_descriptor, v_descriptor = descriptors
    qs, q_ready, k_ring, v_ring = inputs
    begin, full_begin, full_end, end = blocks
    GROUPS: gl.constexpr = qs.shape[0]
    KEYS: gl.constexpr = k_ring[0].shape[3]
    mbarrier.expect(q_ready, GROUPS * GROUP_ROWS * qs.shape[4] * 2)
    for member in gl.static_range(GROUPS):
        copy_block(q_descriptor, [batch, head, start + member * GROUP_ROWS, 0], q_ready, qs.index(member))
    for index in range(end - begin):
        key = block_at(index, begin, full_begin, full_end) * KEYS
        fetch(k_ring, index, k_descriptor, batch, kv_head, key)
        fetch(v_ring, index, v_descriptor, batch, kv_head, key)


@gluon.jit
def _take_in(member, start, blocks, rule, state, inputs, flags, factor, HEAD_DIM: gl.constexpr, BAND: gl.constexpr):
    """One group's 64 rows through all blocks of keys."""
    qs, q_ready, k_ring, v_ring = inputs
    DIMS: gl.constexpr = qs.shape[4]
    KEYS: gl.constexpr = k_ring[0].shape[3]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIMS, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    begin, full_begin, full_end, end = blocks
    num_rows, num_keys, lower, upper, hides, lo, hi, stride = rule
    acc, stride_row, stride_dim, row_max, stride_max, row_sum, stride_sum = state
    num_blocks, num_whole = end - begin, full_end - full_begin
    start += member * GROUP_ROWS
    row = start + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, SCORES))
    first, last = seen_keys(row, rule, BAND)
    peak = gl.load(row_max + row.to(gl.int64) * stride_max, mask=row < num_rows, other=0.0)
    total = gl.load(row_sum + row.to(gl.int64) * stride_sum, mask=row < num_rows, other=0.0)
    peak, loss = _in_log2(peak)
    total *= loss
    pointers, exists = _acc_block(acc, start, num_rows, stride_row, stride_dim, HEAD_DIM, DIMS, SUMS)
    numerator = gl.load(pointers, mask=exists, other=0.0)

    q = qs.index(member).reshape([GROUP_ROWS, DIMS])
    mbarrier.wait(q_ready, 0)
    wait_for(k_ring, 0)
    scores = warpgroup_mma_wait(0, deps=(start_scores(q, matrix_of(k_ring, 0), SCORES),))
    release(k_ring, 0)
    key = block_at(0, begin, full_begin, full_end) * KEYS
    new, decay, total, peak = _weights(scores, total, peak, factor, first, last, key, num_whole == 0, KEYS, SCORES)
    numerator *= gl.convert_layout(loss * decay, gl.SliceLayout(1, SUMS))[:, None]
    weights = gl.convert_layout(new.to(qs.dtype), WEIGHTS)
    for index in range(1, num_blocks):
        wait_for(k_ring, index)
        scores = start_scores(q, matrix_of(k_ring, index), SCORES)
        wait_for(v_ring, index - 1)
        numerator = warpgroup_mma(weights, matrix_of(v_ring, index - 1), numerator, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        release(k_ring, index)
        key, masked = block_at(index, begin, full_begin, full_end) * KEYS, index >= num_whole
        new, decay, total, peak = _weights(scores, total, peak, factor, first, last, key, masked, KEYS, SCORES)
        numerator, weights = warpgroup_mma_wait(0, deps=(numerator, weights))
        release(v_ring, index - 1)
        numerator *= gl.convert_layout(decay, gl.SliceLayout(1, SUMS))[:, None]
        weights = gl.convert_layout(new.to(qs.dtype), WEIGHTS)
    wait_for(v_ring, num_blocks - 1)
    numerator = warpgroup_mma(weights, matrix_of(v_ring, num_blocks - 1), numerator, is_async=True)
    numerator, weights = warpgroup_mma_wait(0, deps=(numerator, weights))

    # 0 * NaN: only a block with hidden pairs can have let a value through to a row that does not see it.
    leaked = 0
    if hides > 0:
        leaked = has_nan(numerator)
    gl.store(flags + member, leaked, mask=start < num_rows)
    if leaked == 0:
        _store(state, rule, start, numerator, total, peak, HEAD_DIM, BAND, SCORES, SUMS)


@gluon.jit
def _store(
    state, rule, start, numerator, total, peak,
    HEAD_DIM: gl.constexpr, BAND: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Rows that see nothing keep every bit."""
    acc, stride_row, stride_dim, row_max, stride_max, row_sum, stride_sum = state
    num_rows, num_keys, lower, upper, hides, lo, hi, stride = rule
    peak, loss = _in_nats(peak)
    # Through the compiler's eyes another start: the pointers of the loads would take registers that the loop needs.
    start = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [start], dtype=gl.int32, is_pure=False, pack=1)
    row = start + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, SCORES))
    first, last = seen_keys(row, rule, BAND)
    sees = first < last
    gl.store(row_max + row.to(gl.int64) * stride_max, peak, mask=sees)
    gl.store(row_sum + row.to(gl.int64) * stride_sum, total * loss, mask=sees)
    of_sum: gl.constexpr = gl.SliceLayout(1, SUMS)
    pointers, exists = _acc_block(acc, start, num_rows, stride_row, stride_dim, HEAD_DIM, numerator.shape[1], SUMS)
    sees = gl.convert_layout(sees.to(gl.int32), of_sum) == 1
    gl.store(pointers, numerator * gl.convert_layout(loss, of_sum)[:, None], mask=exists & sees[:, None])


@gluon.jit
def _weights(scores, total, peak, factor, first, last, key, masked, KEYS: gl.constexpr, SCORES: gl.constexpr):
    """(weights, what the sums so far have to be multiplied by, row_sum, row_max) with one block of scores."""
    if masked:
        column = key + gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
        seen = (first[:, None] <= column[None, :]) & (column[None, :] < last[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1) * factor)
    # A row that has seen nothing so far keeps m = -inf; its factors must be 2^-inf = 0, not 2^nan.
    base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = gl.exp2(gl.fma(scores, factor, -base[:, None]))
    decay = gl.exp2(peak - base)
    return weights, decay, total * decay + gl.sum(weights, 1), new_peak


@gluon.jit
def _acc_block(acc, start, num_rows, stride_row, stride_dim, HEAD_DIM: gl.constexpr, DIMS: gl.constexpr,
               SUMS: gl.constexpr):  # fmt: skip
    """(pointers [64, DIMS], which of them are part of the matrix)."""
    row = start + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, SUMS))
    dim = gl.arange(0, DIMS, layout=gl.SliceLayout(0, SUMS))
    pointers = (acc + row.to(gl.int64) * stride_row)[:, None] + dim[None, :] * stride_dim
    return pointers, (row < num_rows)[:, None] & (dim < HEAD_DIM)[None, :]


@gluon.jit
def _in_log2(nats):
    """(log2, loss): e^nats = 2^log2 * loss, which is 1 but for what the product's rounding lost."""
    # An explicit fma, since compilers join a product with the sum that it is part of, and then it is another number.
    log2 = gl.fma(nats, _LOG2E_HIGH, 0.0)
    return log2, _power_of(gl.fma(nats, _LOG2E_LOW, gl.fma(nats, _LOG2E_HIGH, -log2)))


@gluon.jit
def _in_nats(log2):
    """(nats, loss): 2^log2 = e^nats * loss."""
    nats = gl.fma(log2, _LN2, 0.0)
    return nats, _power_of(gl.fma(-nats, _LOG2E_LOW, gl.fma(-nats, _LOG2E_HIGH, log2)))


@gluon.jit
def _power_of(small):
    """2^small for |small| << 1; 1 where infinities of both signs met (an empty row's -inf less -inf)."""
    return gl.where(small == small, 1.0 + small * _LN2, 1.0)
