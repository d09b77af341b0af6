"""Hopper: the gradients of one tile, for blocks that the copy engine can fetch.

As triton_backward: two kernels, so that every sum has one owner and no atomics, and the same formulas. Here too, -lse
and -delta are added last.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ringspan.kernels.hopper_blocks import (
    GROUP_ROWS,
    add_to,
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
    row_blocks,
    seen_keys,
    start_scores,
    wait_for,
)

_LOG2E = gl.constexpr(1.4426950408889634)
_GROUPS = gl.constexpr(2)

_NOT_SPECIALIZED = [
    "num_heads",
    "num_kv_heads",
    "group",
    "num_rows",
    "num_keys",
    "lower",
    "upper",
    "hides",
    "scale",
    "factor",
]


@gluon.jit(do_not_specialize=[name for name in _NOT_SPECIALIZED if name != "num_kv_heads"])
def absorb_dq_kernel(
    dq,
    q_descriptor,
    k_descriptor,
    v_descriptor,
    do_descriptor,
    lse,
    delta,
    lo,
    hi,
    flags,
    dq_strides,
    lse_strides,
    delta_strides,
    bound_strides,
    num_heads,
    group,
    num_rows,
    num_keys,
    lower,
    upper,
    hides,
    scale,
    factor,
    HEAD_DIM: gl.constexpr,
    BAND: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """dq [B, H, T, D] float32 in place; descriptors of q, do in blocks of 64 rows, of k, v in blocks of keys.

    factor: scale * log2(e), of any sign. flags [B, H, row blocks of 64] as hopper_forward has them.
    """
    KEYS: gl.constexpr = k_descriptor.block_type.shape[2]
    ROWS: gl.constexpr = _GROUPS * GROUP_ROWS
    batch, head, start, stop = program_of_rows(num_rows, num_heads, ROWS)
    lo, hi = of_head(lo, batch, head, bound_strides), of_head(hi, batch, head, bound_strides)
    rule = (num_rows, num_keys, lower, upper, hides, lo, hi, bound_strides[2])
    blocks = key_blocks(start, stop, rule, ROWS, KEYS, BAND)
    flags = flags_of(flags, batch, head, num_heads, start, num_rows)
    if blocks[0] >= blocks[3]:
        clear_flags(flags, start, num_rows, _GROUPS)
        return
    qs = gl.allocate_shared_memory(q_descriptor.dtype, [_GROUPS] + q_descriptor.block_type.shape, q_descriptor.layout)
    dos = gl.allocate_shared_memory(q_descriptor.dtype, [_GROUPS] + q_descriptor.block_type.shape, q_descriptor.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    k_ring = make_ring(k_descriptor, STAGES, 1, _GROUPS)
    v_ring = make_ring(v_descriptor, STAGES, 1, _GROUPS)

    dq = of_head(dq, batch, head, dq_strides)
    lse = of_head(lse, batch, head, lse_strides)
    delta = of_head(delta, batch, head, delta_strides)
    constants = (lse, lse_strides[2], delta, delta_strides[2])
    inputs = (qs, dos, q_ready, k_ring, v_ring)
    descriptors = (q_descriptor, k_descriptor, v_descriptor, do_descriptor)
    gl.warp_specialize(
        [
            (
                _pull_of_keys,
                (0, start, blocks, rule, constants, inputs, dq, dq_strides, flags, scale, factor, HEAD_DIM, BAND),
            ),
            (
                _pull_of_keys,
                (1, start, blocks, rule, constants, inputs, dq, dq_strides, flags, scale, factor, HEAD_DIM, BAND),
            ),
            (_fetch_keys, (start, blocks, batch, head, head // group, descriptors, inputs)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


@gluon.jit
def _fetch_keys(start, blocks, batch, head, kv_head, descriptors, inputs):
    q_descriptor, k_descriptor, v_descriptor, do_descriptor = descriptors
    qs, dos, q_ready, k_ring, v_ring = inputs
    begin, full_begin, full_end, end = blocks
    KEYS: gl.constexpr = k_ring[0].shape[3]
    mbarrier.expect(q_ready, 2 * _GROUPS * GROUP_ROWS * qs.shape[4] * 2)
    for member in gl.static_range(_GROUPS):
        copy_block(q_descriptor, [batch, head, start + member * GROUP_ROWS, 0], q_ready, qs.index(member))
        copy_block(do_descriptor, [batch, head, start + member * GROUP_ROWS, 0], q_ready, dos.index(member))
    for index in range(end - begin):
        key = block_at(index, begin, full_begin, full_end) * KEYS
        fetch(k_ring, index, k_descriptor, batch, kv_head, key)
        fetch(v_ring, index, v_descriptor, batch, kv_head, key)


@gluon.jit
def _pull_of_keys(
    member, start, blocks, rule, constants, inputs, dq, dq_strides, flags, scale, factor,
    HEAD_DIM: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """One group's 64 rows: sum_j ds_ij k_j over all blocks of keys. A block's sum runs while the next ds is made."""
    qs, dos, q_ready, k_ring, v_ring = inputs
    DIMS: gl.constexpr = qs.shape[4]
    KEYS: gl.constexpr = k_ring[0].shape[3]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIMS, 16])
    PULLS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    begin, full_begin, full_end, end = blocks
    num_rows, num_keys, lower, upper, hides, lo, hi, stride = rule
    lse, stride_lse, delta, stride_delta = constants
    num_blocks, num_whole = end - begin, full_end - full_begin
    start += member * GROUP_ROWS
    row = start + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, SCORES))
    first, last = seen_keys(row, rule, BAND)
    total = gl.load(lse + row.to(gl.int64) * stride_lse, mask=row < num_rows, other=float("-inf"))
    total = gl.where(total == float("-inf"), float("inf"), total * _LOG2E)  # gives weight 0
    drop = gl.load(delta + row.to(gl.int64) * stride_delta, mask=row < num_rows, other=0.0)

    q, do = qs.index(member).reshape([GROUP_ROWS, DIMS]), dos.index(member).reshape([GROUP_ROWS, DIMS])
    mbarrier.wait(q_ready, 0)
    wait_for(k_ring, 0)
    scores = start_scores(q, matrix_of(k_ring, 0), SCORES)
    wait_for(v_ring, 0)
    pulls = start_scores(do, matrix_of(v_ring, 0), SCORES)
    scores, pulls = warpgroup_mma_wait(0, deps=(scores, pulls))
    release(v_ring, 0)
    key = block_at(0, begin, full_begin, full_end) * KEYS
    d_scores = gl.exp2(gl.fma(scores, factor, -total[:, None])) * (pulls - drop[:, None])
    d_scores = _seen_only(d_scores, first, last, key, num_whole == 0, KEYS, SCORES)
    pull = gl.convert_layout(d_scores.to(qs.dtype), PULLS)
    gradient = gl.zeros([GROUP_ROWS, DIMS], gl.float32, SUMS)
    for index in range(1, num_blocks):
        wait_for(k_ring, index)
        scores = start_scores(q, matrix_of(k_ring, index), SCORES)
        wait_for(v_ring, index)
        pulls = start_scores(do, matrix_of(v_ring, index), SCORES)
        gradient = warpgroup_mma(pull, matrix_of(k_ring, index - 1), gradient, is_async=True)
        scores = warpgroup_mma_wait(2, deps=(scores,))
        weights = gl.exp2(gl.fma(scores, factor, -total[:, None]))
        pulls = warpgroup_mma_wait(1, deps=(pulls,))
        release(v_ring, index)
        key, masked = block_at(index, begin, full_begin, full_end) * KEYS, index >= num_whole
        d_scores = _seen_only(weights * (pulls - drop[:, None]), first, last, key, masked, KEYS, SCORES)
        gradient, pull = warpgroup_mma_wait(0, deps=(gradient, pull))
        release(k_ring, index - 1)
        pull = gl.convert_layout(d_scores.to(qs.dtype), PULLS)
    gradient = warpgroup_mma(pull, matrix_of(k_ring, num_blocks - 1), gradient, is_async=True)
    gradient, pull = warpgroup_mma_wait(0, deps=(gradient, pull))

    # 0 * NaN: only a block with hidden pairs can have let a value through to a row that does not see it.
    leaked = 0
    if hides > 0:
        leaked = has_nan(gradient)
    gl.store(flags + member, leaked, mask=start < num_rows)
    if leaked == 0:
        add_to(dq, dq_strides, gradient * scale, start, num_rows, HEAD_DIM, SUMS)


@gluon.jit
def _seen_only(x, first, last, key, masked, KEYS: gl.constexpr, SCORES: gl.constexpr):
    """x [rows, keys], 0 where the mask hides a pair."""
    if masked:
        column = key + gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
        x = gl.where((first[:, None] <= column[None, :]) & (column[None, :] < last[:, None]), x, 0.0)
    return x


@gluon.jit(do_not_specialize=[name for name in _NOT_SPECIALIZED if name != "num_heads"])
def absorb_dkdv_kernel(
    dk,
    dv,
    q_descriptor,
    k_descriptor,
    v_descriptor,
    do_descriptor,
    lse,
    delta,
    lo,
    hi,
    ranges,
    flags,
    dk_strides,
    dv_strides,
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
    hides,
    scale,
    factor,
    HEAD_DIM: gl.constexpr,
    BAND: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """dk, dv [B, K, S, D] float32 in place; descriptors of k, v in blocks of 64 keys, of q, do in blocks of rows.

    flags [B, K, key blocks of 64].
    """
    ROWS: gl.constexpr = q_descriptor.block_type.shape[2]
    KEYS: gl.constexpr = _GROUPS * GROUP_ROWS
    num_blocks = gl.cdiv(num_keys, KEYS)
    start = gl.program_id(0) % num_blocks * KEYS
    batch, kv_head = gl.program_id(0) // num_blocks // num_kv_heads, gl.program_id(0) // num_blocks % num_kv_heads
    stop = gl.minimum(start + KEYS, num_keys)
    flags = flags_of(flags, batch, kv_head, num_kv_heads, start, num_keys)
    lo += batch.to(gl.int64) * bound_strides[0]
    hi += batch.to(gl.int64) * bound_strides[0]
    ranges = of_head(ranges, batch, kv_head, range_strides) + start // KEYS * range_strides[2]
    rule = (num_rows, num_keys, lower, upper, hides, lo, hi, bound_strides[2])
    blocks = row_blocks(start, stop, rule, ranges, ROWS, BAND)
    if blocks[0] >= blocks[3]:
        clear_flags(flags, start, num_keys, _GROUPS)
        return
    heads = (kv_head * group, group, bound_strides[1])
    ks = gl.allocate_shared_memory(k_descriptor.dtype, [_GROUPS] + k_descriptor.block_type.shape, k_descriptor.layout)
    vs = gl.allocate_shared_memory(k_descriptor.dtype, [_GROUPS] + k_descriptor.block_type.shape, k_descriptor.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(k_ready, count=1)
    # A buffer of q comes with its rows' lse and intervals, one of do with their delta: another arrival each.
    q_ring = make_ring(q_descriptor, STAGES, 2, _GROUPS)
    do_ring = make_ring(do_descriptor, STAGES, 2, _GROUPS)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    totals = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], FLAT)
    drops = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], FLAT)
    firsts = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], FLAT)
    lasts = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], FLAT)

    dk = of_head(dk, batch, kv_head, dk_strides)
    dv = of_head(dv, batch, kv_head, dv_strides)
    lse += batch.to(gl.int64) * lse_strides[0]
    delta += batch.to(gl.int64) * delta_strides[0]
    constants = (lse, lse_strides[1], lse_strides[2], delta, delta_strides[1], delta_strides[2])
    inputs = (ks, vs, k_ready, q_ring, do_ring, totals, drops, firsts, lasts)
    targets = (dk, dk_strides, dv, dv_strides)
    descriptors = (q_descriptor, k_descriptor, v_descriptor, do_descriptor)
    gl.warp_specialize(
        [
            (_pull_of_rows, (0, start, heads, blocks, rule, inputs, targets, flags, scale, factor, HEAD_DIM, BAND)),
            (_pull_of_rows, (1, start, heads, blocks, rule, inputs, targets, flags, scale, factor, HEAD_DIM, BAND)),
            (_fetch_rows, (start, heads, blocks, rule, batch, kv_head, descriptors, constants, inputs, BAND)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


@gluon.jit
def _fetch_rows(start, heads, blocks, rule, batch, kv_head, descriptors, constants, inputs, BAND: gl.constexpr):
    q_descriptor, k_descriptor, v_descriptor, do_descriptor = descriptors
    lse, lse_head, lse_row, delta, delta_head, delta_row = constants
    ks, vs, k_ready, q_ring, do_ring, totals, drops, firsts, lasts = inputs
    num_rows, num_keys, lower, upper, hides, lo, hi, stride = rule
    STAGES: gl.constexpr = q_ring[0].shape[0]
    ROWS: gl.constexpr = q_ring[0].shape[3]
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.expect(k_ready, 2 * _GROUPS * GROUP_ROWS * ks.shape[4] * 2)
    for member in gl.static_range(_GROUPS):
        copy_block(k_descriptor, [batch, kv_head, start + member * GROUP_ROWS, 0], k_ready, ks.index(member))
        copy_block(v_descriptor, [batch, kv_head, start + member * GROUP_ROWS, 0], k_ready, vs.index(member))
    first_head, group, stride_head = heads
    num_whole, num_partial = blocks[2] - blocks[1], blocks[3] - blocks[0] - blocks[2] + blocks[1]
    for index in range((num_whole + num_partial) * group):
        of_group, block = _step_at(index, group, blocks)
        head, first_row = first_head + of_group, block * ROWS
        row = first_row + gl.arange(0, ROWS, layout=FLAT)
        my_lse, my_delta = lse + head.to(gl.int64) * lse_head, delta + head.to(gl.int64) * delta_head
        total = gl.load(my_lse + row.to(gl.int64) * lse_row, mask=row < num_rows, other=float("-inf"))
        drop = gl.load(my_delta + row.to(gl.int64) * delta_row, mask=row < num_rows, other=0.0)
        fetch(q_ring, index, q_descriptor, batch, head, first_row)
        totals.index(index % STAGES).store(gl.where(total == float("-inf"), float("inf"), total * _LOG2E))
        if not BAND:
            bounds = head.to(gl.int64) * stride_head
            my_rule = (num_rows, num_keys, lower, upper, hides, lo + bounds, hi + bounds, stride)
            first, last = seen_keys(row, my_rule, False)
            firsts.index(index % STAGES).store(first)
            lasts.index(index % STAGES).store(last)
        mbarrier.arrive(q_ring[1].index(index % STAGES), count=1)
        fetch(do_ring, index, do_descriptor, batch, head, first_row)
        drops.index(index % STAGES).store(drop)
        mbarrier.arrive(do_ring[1].index(index % STAGES), count=1)


@gluon.jit
def _step_at(index, group, blocks):
    """(query head of the group, block of rows) of a step: the whole blocks of all heads come first."""
    begin, full_begin, full_end, end = blocks
    num_whole, num_partial = full_end - full_begin, end - begin - full_end + full_begin
    rest = index - num_whole * group
    member = gl.where(rest < 0, index // gl.maximum(num_whole, 1), rest // gl.maximum(num_partial, 1))
    place = gl.where(rest < 0, index % gl.maximum(num_whole, 1), num_whole + rest % gl.maximum(num_partial, 1))
    return member, block_at(place, begin, full_begin, full_end)


@gluon.jit
def _pull_of_rows(
    group_member, start, heads, blocks, rule, inputs, targets, flags, scale, factor,
    HEAD_DIM: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """One group's 64 keys: sum_i ds_ij q_i and sum_i p_ij do_i over all blocks of rows of all heads that read them.

    Everything is [keys, rows] here.
    """
    ks, vs, k_ready, q_ring, do_ring, totals, drops, firsts, lasts = inputs
    ROWS: gl.constexpr = q_ring[0].shape[3]
    DIMS: gl.constexpr = ks.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIMS, 16])
    PULLS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    num_rows, num_keys, lower, upper, hides, lo, hi, stride = rule
    k = ks.index(group_member).reshape([GROUP_ROWS, DIMS])
    v = vs.index(group_member).reshape([GROUP_ROWS, DIMS])
    first_key = start + group_member * GROUP_ROWS
    gradient_k = gl.zeros([GROUP_ROWS, DIMS], gl.float32, SUMS)
    gradient_v = gl.zeros([GROUP_ROWS, DIMS], gl.float32, SUMS)
    mbarrier.wait(k_ready, 0)
    num_whole, num_partial = blocks[2] - blocks[1], blocks[3] - blocks[0] - blocks[2] + blocks[1]
    for index in range(num_whole * heads[1]):
        gradient_k, gradient_v = _pull_of_block(
            gradient_k, gradient_v, index, k, v, first_key, 0, rule, inputs, factor, False, BAND, SCORES, PULLS
        )
    for index in range(num_whole * heads[1], (num_whole + num_partial) * heads[1]):
        of_group, block = _step_at(index, heads[1], blocks)
        gradient_k, gradient_v = _pull_of_block(
            gradient_k, gradient_v, index, k, v, first_key, block * ROWS,
            rule, inputs, factor, True, BAND, SCORES, PULLS,
        )  # fmt: skip

    leaked = 0
    if hides > 0:
        leaked = gl.maximum(has_nan(gradient_k), has_nan(gradient_v))
    gl.store(flags + group_member, leaked, mask=first_key < num_keys)
    if leaked == 0:
        dk, dk_strides, dv, dv_strides = targets
        add_to(dk, dk_strides, gradient_k * scale, first_key, num_keys, HEAD_DIM, SUMS)
        add_to(dv, dv_strides, gradient_v, first_key, num_keys, HEAD_DIM, SUMS)


@gluon.jit
def _pull_of_block(
    gradient_k, gradient_v, index, k, v, key, row, rule, inputs, factor,
    MASKED: gl.constexpr, BAND: gl.constexpr, SCORES: gl.constexpr, PULLS: gl.constexpr,
):  # fmt: skip
    """What one block of rows adds."""
    ks, vs, k_ready, q_ring, do_ring, totals, drops, firsts, lasts = inputs
    STAGES: gl.constexpr = q_ring[0].shape[0]
    ROWS: gl.constexpr = q_ring[0].shape[3]
    slot = index % STAGES
    q, do = matrix_of(q_ring, index), matrix_of(do_ring, index)
    wait_for(q_ring, index)
    scores = start_scores(k, q, SCORES)
    wait_for(do_ring, index)
    pulls = start_scores(v, do, SCORES)
    total = totals.index(slot).load(gl.SliceLayout(0, SCORES))
    scores = warpgroup_mma_wait(1, deps=(scores,))
    weights = gl.exp2(gl.fma(scores, factor, -total[None, :]))
    if MASKED:
        weights = _seen_only_of_rows(weights, key, row, rule, firsts.index(slot), lasts.index(slot), ROWS, BAND, SCORES)
    weight = gl.convert_layout(weights.to(ks.dtype), PULLS)
    # Either way the weights are rounded before pulls are waited for, or the compiler takes half of their exponentials
    # late (docs/decisions/0014-hopper.md).
    if ROWS > GROUP_ROWS:
        pulls, weight = warpgroup_mma_wait(0, deps=(pulls, weight))
    gradient_v = warpgroup_mma(weight, do, gradient_v, is_async=True)
    drop = drops.index(slot).load(gl.SliceLayout(0, SCORES))
    if ROWS <= GROUP_ROWS:
        pulls = warpgroup_mma_wait(1, deps=(pulls,))
    d_scores = weights * (pulls - drop[None, :])
    if MASKED:
        d_scores = _seen_only_of_rows(
            d_scores, key, row, rule, firsts.index(slot), lasts.index(slot), ROWS, BAND, SCORES
        )
    pull = gl.convert_layout(d_scores.to(ks.dtype), PULLS)
    gradient_k = warpgroup_mma(pull, q, gradient_k, is_async=True)
    gradient_v, weight = warpgroup_mma_wait(1, deps=(gradient_v, weight))
    release(do_ring, index)
    gradient_k, pull = warpgroup_mma_wait(0, deps=(gradient_k, pull))
    release(q_ring, index)
    return gradient_k, gradient_v


@gluon.jit
def _seen_only_of_rows(x, key, row, rule, firsts, lasts, ROWS: gl.constexpr, BAND: gl.constexpr, SCORES: gl.constexpr):
    """x [keys, rows], 0 where the mask hides a pair. firsts, lasts: the rows' intervals, unless they are a band's."""
    keys = key + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, SCORES))
    if BAND:
        first, last = seen_keys(row + gl.arange(0, ROWS, layout=gl.SliceLayout(0, SCORES)), rule, True)
    else:
        first, last = firsts.load(gl.SliceLayout(0, SCORES)), lasts.load(gl.SliceLayout(0, SCORES))
    return gl.where((first[None, :] <= keys[:, None]) & (keys[:, None] < last[None, :]), x, 0.0)
