"""Triton: what a library's attention returned (out already divided, lse) into the softmax state, in one pass.

Imports triton: only to be imported where it is about to be used.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ringspan.kernels.triton_blocks import inside, load_block, matrix_block, of_head
from ringspan.kernels.triton_launch import launch
from ringspan.state import SoftmaxState

_ELEMENTS = 4096  # of acc that one program takes


def merge_normalised_(state: SoftmaxState, out: Tensor, lse: Tensor) -> None:
    """state.merge_(out, lse), reading and writing each element once.

    state: float32, any strides; out [B, H, T, D] of any dtype, lse [B, H, T] float32. No host synchronisation.
    """
    batch, heads, rows, dim = out.shape
    if not out.numel():
        return
    dims = triton.next_power_of_2(dim)
    block = max(_ELEMENTS // dims, 1)
    tensors = (state.acc, state.row_max, state.row_sum, out, lse)
    programs = triton.cdiv(rows, block) * heads * batch
    strides = (x.stride() for x in tensors)
    launch(merge_kernel, programs, *tensors, *strides, heads, rows, HEAD_DIM=dim, DIMS=dims, ROWS=block)


@triton.jit(do_not_specialize=["num_heads", "num_rows"])
def merge_kernel(
    acc,
    row_max,
    row_sum,
    out,
    lse,
    acc_strides,
    max_strides,
    sum_strides,
    out_strides,
    lse_strides,
    num_heads,
    num_rows,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: a block of rows of one head."""
    num_blocks = tl.cdiv(num_rows, ROWS)
    start = tl.program_id(0) % num_blocks * ROWS
    batch, head = tl.program_id(0) // num_blocks // num_heads, tl.program_id(0) // num_blocks % num_heads
    row = start + tl.arange(0, ROWS)
    exists = row < num_rows
    row_max = of_head(row_max, batch, head, max_strides) + row.to(tl.int64) * max_strides[2]
    row_sum = of_head(row_sum, batch, head, sum_strides) + row.to(tl.int64) * sum_strides[2]
    lse = of_head(lse, batch, head, lse_strides) + row.to(tl.int64) * lse_strides[2]

    peak = tl.load(row_max, mask=exists, other=0.0)
    other_peak = tl.load(lse, mask=exists, other=0.0)
    largest = tl.maximum(peak, other_peak, propagate_nan=tl.PropagateNan.ALL)
    # A row that neither side has seen keeps m = -inf; its factors must be e^-inf = 0, not e^nan.
    base = tl.where(largest == float("-inf"), 0.0, largest)
    mine, theirs = tl.exp(peak - base), tl.exp(other_peak - base)

    acc_block = matrix_block(of_head(acc, batch, head, acc_strides), start, acc_strides[2], acc_strides[3], ROWS, DIMS)
    within = inside(start, num_rows, ROWS, DIMS, HEAD_DIM)
    out = of_head(out, batch, head, out_strides)
    part = load_block(out, start, num_rows, out_strides, ROWS, DIMS, HEAD_DIM, WHOLE=False).to(tl.float32)
    merged = tl.load(acc_block, mask=within, other=0.0) * mine[:, None] + part * theirs[:, None]
    tl.store(acc_block, merged, mask=within)
    tl.store(row_sum, tl.load(row_sum, mask=exists, other=0.0) * mine + theirs, mask=exists)
    tl.store(row_max, largest, mask=exists)
