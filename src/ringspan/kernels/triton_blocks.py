"""What the Triton kernels share on the device: blocks of a matrix, the keys that rows see, products that hide NaN.

Imports triton: only to be imported where a Triton kernel is about to run.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton decides the same way, and when it is imported: whether kernels run in its interpreter, on CPU tensors.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def matrix_block(base, start, stride_row, stride_dim, ROWS: tl.constexpr, DIMS: tl.constexpr):
    """Pointers [ROWS, DIMS] into a matrix [.., D] from row `start` on. 64 bits: tensors may exceed 2^31 elements."""
    base += tl.cast(start, tl.int64) * stride_row
    row = tl.arange(0, ROWS).to(tl.int64) * stride_row
    dim = tl.arange(0, DIMS).to(tl.int64) * stride_dim
    return base + row[:, None] + dim[None, :]


@triton.jit
def inside(start, num_rows, ROWS: tl.constexpr, DIMS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[ROWS, DIMS]: what of a block is part of its matrix."""
    row = start + tl.arange(0, ROWS) < num_rows
    dim = tl.arange(0, DIMS) < HEAD_DIM
    return row[:, None] & dim[None, :]


@triton.jit
def load_block(
    base, start, num_rows, strides, ROWS: tl.constexpr, DIMS: tl.constexpr, HEAD_DIM: tl.constexpr, WHOLE: tl.constexpr
):
    """A block of a matrix, 0 beyond its edges. WHOLE: none of its rows is beyond them."""
    pointers = matrix_block(base, start, strides[2], strides[3], ROWS, DIMS)
    if WHOLE and DIMS == HEAD_DIM:
        return tl.load(pointers)
    if WHOLE:
        return tl.load(pointers, mask=(tl.arange(0, DIMS) < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers, mask=inside(start, num_rows, ROWS, DIMS, HEAD_DIM), other=0.0)


@triton.jit
def of_head(base, batch, head, strides):
    """Where a head's matrix begins."""
    return base + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def seen_keys(lo, hi, stride, row, num_rows, num_keys, lower, upper, BAND: tl.constexpr):
    """(first, last) of each row: it sees first <= key < last; (num_keys, 0) where it sees none or is beyond the edge.

    From the rule of a band, or from arrays of int32.
    """
    if BAND:
        first, last = row + lower, row + upper
    else:
        offset = row.to(tl.int64) * stride
        first = tl.load(lo + offset, mask=row < num_rows, other=0)
        last = tl.load(hi + offset, mask=row < num_rows, other=0)
    first, last = tl.maximum(first, 0), tl.minimum(last, num_keys)
    sees = (row < num_rows) & (first < last)
    return tl.where(sees, first, num_keys), tl.where(sees, last, 0)


@triton.jit
def key_blocks(first, last, exists, num_keys, BLOCK: tl.constexpr):
    """(begin, full_begin, full_end, end): blocks that some row sees, and those within that all rows see entirely."""
    begin, end = tl.min(first, 0) // BLOCK, tl.cdiv(tl.max(last, 0), BLOCK)
    full_begin = tl.cdiv(tl.max(tl.where(exists, first, 0), 0), BLOCK)
    full_end = tl.min(tl.where(exists, last, num_keys), 0) // BLOCK
    none = full_begin >= full_end
    return begin, tl.where(none, end, full_begin), tl.where(none, end, full_end), end


@triton.jit
def partial_block(index, begin, full_begin, full_end):
    """The index-th block of those that are not full: first the ones before the full ones, then those behind."""
    before = full_begin - begin
    return tl.where(index < before, begin + index, full_end + index - before)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 as an operand of that dtype. Triton 3.9's interpreter cuts bfloat16 off where a GPU rounds to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, into):
    """a @ b + into, in float32. ieee: float32 operands are not rounded to tf32.

    Triton 3.9's interpreter multiplies the bit patterns of bfloat16; widened, it computes what a GPU does.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if a.dtype == tl.float32:
        # Without tensor cores a product is a chain of additions: `into` as its start would make one over all blocks.
        return into + tl.dot(a, b, input_precision="ieee")
    return tl.dot(a, b, into, input_precision="ieee")


@triton.jit
def dot_seen(weights, operand, seen, into):
    """weights @ operand + into, where weights that `seen` hides are 0 and hide even NaN and inf (0 * NaN is NaN).

    weights float32, seen [M, N]; operand [N, D]. A row of the operand that is not finite becomes 0, and NaN the weight
    of those that see it: their results are NaN as a whole. Slow, and only for the careful pass of a kernel.
    """
    finite = tl.abs(operand.to(tl.float32)) < float("inf")
    bad = tl.max((~finite).to(tl.int32), 1) == 1
    weights = rounded(tl.where(seen & bad[None, :], float("nan"), weights), operand.dtype)
    return dot(weights, tl.where(finite, operand, 0.0).to(operand.dtype), into)


@triton.jit
def has_nan(x):
    """Whether any element of a block is NaN."""
    return tl.max(tl.max((x != x).to(tl.int32), 1), 0) == 1
