"""What the kernels for Hopper share on the device: rings of buffers in shared memory, and the order of blocks.

Written in Gluon, Triton's language without its scheduler. A program is three or four groups of warps: one fetches
blocks with the copy engine (TMA), the others multiply, each 64 rows (or keys) of its own, so that one's exponentials
overlap with another's products. Every buffer has two barriers: `ready` is passed when its bytes have arrived, `free`
when all groups have read it. A barrier alternates between two phases; who waits says which round of the ring it is in.

Imports triton.experimental: only to be imported where such a kernel is about to run.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

from ringspan.kernels import triton_configs

# Triton 3.9 has another name for it than 3.6.
copy_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

GROUP_ROWS = gl.constexpr(triton_configs.GROUP_ROWS)


@gluon.jit
def program_of_rows(num_rows, num_heads, ROWS: gl.constexpr):
    """(batch entry, head, start, stop) of a program that has a block of rows of one head."""
    num_blocks = gl.cdiv(num_rows, ROWS)
    # Under a causal mask the last rows have most to do: they come first, so that none of them ends alone.
    start = (num_blocks - 1 - gl.program_id(0) % num_blocks) * ROWS
    batch, head = gl.program_id(0) // num_blocks // num_heads, gl.program_id(0) // num_blocks % num_heads
    return batch, head, start, gl.minimum(start + ROWS, num_rows)


@gluon.jit
def of_head(base, batch, head, strides):
    """Where a head's matrix, or row of numbers, begins."""
    return base + (batch.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1])


@gluon.jit
def flags_of(flags, batch, head, num_heads, start, length):
    """Where a program's flags are: [B, H, groups of GROUP_ROWS of `length` rows], from row `start` on."""
    return flags + ((batch * num_heads + head) * gl.cdiv(length, GROUP_ROWS) + start // GROUP_ROWS)


@gluon.jit
def clear_flags(flags, start, length, GROUPS: gl.constexpr):
    for member in gl.static_range(GROUPS):
        gl.store(flags + member, 0, mask=start + member * GROUP_ROWS < length)


@gluon.jit
def block_at(index, begin, full_begin, full_end):
    """The index-th block to be taken: whole ones first, then the partial ones before them, then those behind."""
    rest = index - (full_end - full_begin)
    partial = gl.where(rest < full_begin - begin, begin + rest, full_end + rest - (full_begin - begin))
    return gl.where(rest < 0, full_begin + index, partial)


@gluon.jit
def seen_keys(row, rule, BAND: gl.constexpr):
    """(first, last) of each row: it sees first <= key < last; (num_keys, 0) if it sees none or is beyond the edge.

    From the rule of a band, or from arrays of int32.
    """
    num_rows, num_keys, lower, upper, hides, lo, hi, stride = rule
    if BAND:
        first, last = row + lower, row + upper
    else:
        first = gl.load(lo + row.to(gl.int64) * stride, mask=row < num_rows, other=0)
        last = gl.load(hi + row.to(gl.int64) * stride, mask=row < num_rows, other=0)
    first, last = gl.maximum(first, 0), gl.minimum(last, num_keys)
    sees = (row < num_rows) & (first < last)
    return gl.where(sees, first, num_keys), gl.where(sees, last, 0)


@gluon.jit
def key_blocks(start, stop, rule, ROWS: gl.constexpr, KEYS: gl.constexpr, BAND: gl.constexpr):
    """(begin, full_begin, full_end, end): key blocks that a row of start..stop sees, and those that all see whole.

    ROWS: a power of two, stop - start at most.
    """
    num_rows, num_keys, lower, upper, hides, lo, hi, stride = rule
    if BAND:
        lowest, highest = gl.maximum(start + lower, 0), gl.minimum(stop - 1 + upper, num_keys)
        last_to_begin, first_to_end = (
            gl.maximum(stop - 1 + lower, 0),
            gl.maximum(gl.minimum(start + upper, num_keys), 0),
        )
    else:
        row = start + gl.arange(0, ROWS, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        first, last = seen_keys(row, rule, False)
        lowest, highest = gl.min(gl.where(row < stop, first, num_keys), 0), gl.max(gl.where(row < stop, last, 0), 0)
        last_to_begin = gl.max(gl.where(row < stop, first, 0), 0)
        first_to_end = gl.min(gl.where(row < stop, last, num_keys), 0)
    begin = lowest // KEYS
    end = gl.maximum(gl.cdiv(highest, KEYS), begin)
    full_begin, full_end = gl.cdiv(last_to_begin, KEYS), first_to_end // KEYS
    none = full_begin >= full_end
    return begin, gl.where(none, end, full_begin), gl.where(none, end, full_end), end


@gluon.jit
def row_blocks(start, stop, rule, ranges, ROWS: gl.constexpr, BAND: gl.constexpr):
    """(begin, full_begin, full_end, end): row blocks that see some of the keys start..stop, and those that see all.

    ranges: where these four are, unless they follow from a band (triton_ranges has made them).
    """
    num_rows, num_keys, lower, upper, hides, lo, hi, stride = rule
    if BAND:
        begin = gl.maximum(start - upper + 1, 0) // ROWS
        end = gl.maximum(gl.cdiv(gl.minimum(stop - lower, num_rows), ROWS), begin)
        full_begin = gl.cdiv(gl.maximum(stop - upper, 0), ROWS)
        full_end = gl.maximum(gl.minimum(start - lower + 1, num_rows), 0) // ROWS
        none = full_begin >= full_end
        full_begin, full_end = gl.where(none, end, full_begin), gl.where(none, end, full_end)
    else:
        begin, full_begin = gl.load(ranges), gl.load(ranges + 1)
        full_end, end = gl.load(ranges + 2), gl.load(ranges + 3)
    return begin, full_begin, full_end, end


@gluon.jit
def make_ring(descriptor, STAGES: gl.constexpr, ARRIVALS: gl.constexpr, READERS: gl.constexpr):
    """(buffers [STAGES, *block], ready, free). ARRIVALS: that make a buffer ready; READERS: groups that free it."""
    SHAPE: gl.constexpr = [STAGES] + descriptor.block_type.shape
    buffers = gl.allocate_shared_memory(descriptor.dtype, SHAPE, descriptor.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=ARRIVALS)
        mbarrier.init(free.index(stage), count=READERS)
    return buffers, ready, free


@gluon.jit
def fetch(ring, index, descriptor, batch, head, start):
    """Rows start.. of a matrix into the ring's buffer for round `index`, as soon as that is free."""
    buffers, ready, free = ring
    STAGES: gl.constexpr = buffers.shape[0]
    BYTES: gl.constexpr = buffers.shape[3] * buffers.shape[4] * 2
    slot = index % STAGES
    mbarrier.wait(free.index(slot), (index // STAGES & 1) ^ 1)
    mbarrier.expect(ready.index(slot), BYTES)
    copy_block(descriptor, [batch, head, start, 0], ready.index(slot), buffers.index(slot))


@gluon.jit
def wait_for(ring, index):
    buffers, ready, free = ring
    STAGES: gl.constexpr = buffers.shape[0]
    mbarrier.wait(ready.index(index % STAGES), index // STAGES & 1)


@gluon.jit
def release(ring, index):
    buffers, ready, free = ring
    STAGES: gl.constexpr = buffers.shape[0]
    mbarrier.arrive(free.index(index % STAGES), count=1)


@gluon.jit
def matrix_of(ring, index):
    """[LENGTH, DIMS] in shared memory."""
    buffers, ready, free = ring
    STAGES: gl.constexpr = buffers.shape[0]
    return buffers.index(index % STAGES).reshape([buffers.shape[3], buffers.shape[4]])


@gluon.jit
def start_scores(a, b, LAYOUT: gl.constexpr):
    """a @ b.T, begun: two blocks in shared memory, [M, D] and [N, D]."""
    ROWS: gl.constexpr = a.shape[0]
    COLUMNS: gl.constexpr = b.shape[0]
    nothing = gl.zeros([ROWS, COLUMNS], gl.float32, LAYOUT)
    return warpgroup_mma(a, b.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def has_nan(x):
    return gl.max(gl.max((x != x).to(gl.int32), 1), 0)


@gluon.jit
def add_to(target, strides, part, start, length, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """part [64, DIMS] to rows start.. of a float32 matrix with `length` rows."""
    row = start + gl.arange(0, part.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    dim = gl.arange(0, part.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    pointers = (target + row.to(gl.int64) * strides[2])[:, None] + dim[None, :] * strides[3]
    exists = (row < length)[:, None] & (dim < HEAD_DIM)[None, :]
    gl.store(pointers, gl.load(pointers, mask=exists, other=0.0) + part, mask=exists)
