"""Triton: which blocks of rows see a block of keys, of intervals that are no band.

The backward of dk and dv walks along the rows. Under a band the rows that see a key follow from its place; from arrays
of intervals they have to be looked for, once for all programs.

Imports triton: only to be imported where it is about to be used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringspan.kernels.triton_blocks import seen_keys
from ringspan.kernels.triton_launch import launch

_CHUNK_ROWS = 2048  # that a program looks at together


def row_ranges(lo: Tensor, hi: Tensor, num_keys: int, group: int, key_block: int, row_block: int) -> Tensor:
    """[B, K, key blocks, 4] of lo, hi [B, H, T], [B, 1, ..] of [B, 1, T], [1, 1, ..] of [T], int32: (begin,
    full_begin, full_end, end).

    Row blocks begin..end hold all rows that see a key of the block, of any of the `group` query heads that read a key
    head; full_begin..full_end, a run of them, see it whole in all of these heads.
    """
    if lo.ndim == 1:
        lo, hi = lo[None, None], hi[None, None]
    batch, heads, num_rows = lo.shape
    group = group if heads > 1 else 1
    num_blocks = triton.cdiv(num_keys, key_block)
    ranges = torch.empty((batch, heads // group, num_blocks, 4), dtype=torch.int32, device=lo.device)
    launch(
        row_ranges_kernel, batch * (heads // group) * num_blocks,
        ranges, lo, hi, lo.stride(), heads // group, group, num_rows, num_keys,
        KEYS=key_block, ROWS=row_block, CHUNK=max(_CHUNK_ROWS // row_block, 1),
    )  # fmt: skip
    return ranges


@triton.jit(do_not_specialize=["num_kv_heads", "group", "num_rows", "num_keys"])
def row_ranges_kernel(
    ranges, lo, hi, bound_strides, num_kv_heads, group, num_rows, num_keys,
    KEYS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: a block of keys of one key head."""
    num_blocks = tl.cdiv(num_keys, KEYS)
    start = tl.program_id(0) % num_blocks * KEYS
    stop = tl.minimum(start + KEYS, num_keys)
    batch, kv_head = tl.program_id(0) // num_blocks // num_kv_heads, tl.program_id(0) // num_blocks % num_kv_heads
    num_row_blocks = tl.cdiv(num_rows, ROWS)
    begin, full_begin, full_end, end = num_row_blocks, 0, num_row_blocks, 0
    for member in range(group):
        bounds = batch.to(tl.int64) * bound_strides[0] + (kv_head * group + member).to(tl.int64) * bound_strides[1]
        mine = _ranges_of_head(lo + bounds, hi + bounds, bound_strides[2], start, stop, num_rows, num_keys, ROWS, CHUNK)
        begin, end = tl.minimum(begin, mine[0]), tl.maximum(end, mine[3])
        full_begin, full_end = tl.maximum(full_begin, mine[1]), tl.minimum(full_end, mine[2])
    begin = tl.minimum(begin, end)
    none = full_begin >= full_end
    ranges += tl.program_id(0).to(tl.int64) * 4
    tl.store(ranges, begin)
    tl.store(ranges + 1, tl.where(none, end, full_begin))
    tl.store(ranges + 2, tl.where(none, end, full_end))
    tl.store(ranges + 3, end)


@triton.jit
def _ranges_of_head(lo, hi, stride, start, stop, num_rows, num_keys, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """(begin, full_begin, full_end, end) of one query head; full: the first run."""
    num_row_blocks = tl.cdiv(num_rows, ROWS)
    begin, end, full_begin = num_row_blocks, 0, num_row_blocks
    for first in range(0, num_row_blocks, CHUNK):
        index = first + tl.arange(0, CHUNK)
        sees, whole = _sees(index, lo, hi, stride, start, stop, num_rows, num_keys, ROWS)
        begin = tl.minimum(begin, tl.min(tl.where(sees, index, num_row_blocks), 0))
        end = tl.maximum(end, tl.max(tl.where(sees, index + 1, 0), 0))
        full_begin = tl.minimum(full_begin, tl.min(tl.where(whole, index, num_row_blocks), 0))
    full_end = end
    for first in range(full_begin, end, CHUNK):
        index = first + tl.arange(0, CHUNK)
        sees, whole = _sees(index, lo, hi, stride, start, stop, num_rows, num_keys, ROWS)
        full_end = tl.minimum(full_end, tl.min(tl.where(whole, end, index), 0))
    return begin, full_begin, full_end, end


@triton.jit
def _sees(index, lo, hi, stride, start, stop, num_rows, num_keys, ROWS: tl.constexpr):
    """Of row blocks, whether a row sees some of the keys start..stop, and whether all rows see all of them."""
    row = index[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    first, last = seen_keys(lo, hi, stride, row, num_rows, num_keys, 0, 0, False)
    sees = tl.max(((first < stop) & (last > start)).to(tl.int32), 1) == 1
    whole = tl.min(((first <= start) & (last >= stop)).to(tl.int32), 1) == 1
    return sees, whole
