"""The definition, in plain torch: short, slow, any float dtype up to float64, any device, any intervals.

It works in blocks, so no score matrix of a whole tile ever exists.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ringspan.kernels.blocks import Block, blocks
from ringspan.kernels.contract import SCRATCH_BYTES
from ringspan.state import NEVER, SoftmaxState
from ringspan.tile import Kind, RowIntervals

_SCORE_SIZED = 6  # temporaries of the size of a block's scores that are alive at once, at the most
_ROW_SIZED = 6  # the same of the size of its rows or keys times D


class Reference:
    name = "reference"

    def declines(self, dtype: torch.dtype, device: torch.device, head_dim: int) -> str | None:
        return None

    def absorb(self, state: SoftmaxState, q: Tensor, k: Tensor, v: Tensor, visible: RowIntervals, scale: float) -> None:
        for block in _blocks(q, k, visible, state.acc.dtype):
            part = state.select(block.rows, block.heads, block.batch)
            _absorb_block(part, *_block_inputs(block, state.acc.dtype, (q,), (k, v)), seen_in(block, visible, k), scale)

    def absorb_gradient(
        self,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        do: Tensor,
        lse: Tensor,
        delta: Tensor,
        visible: RowIntervals,
        scale: float,
    ) -> None:
        for block in _blocks(q, k, visible, dq.dtype):
            bq, bdo, bk, bv = _block_inputs(block, dq.dtype, (q, do), (k, v))
            rows = (_grouped(block.queries(x), k, block) for x in (lse, delta))
            seen = seen_in(block, visible, k)
            part_q, part_k, part_v = _gradient_block(bq, bk, bv, bdo, *rows, seen, scale)
            block.queries(dq).add_(part_q.view(block.queries(dq).shape))
            block.keyed(dk).add_(part_k)
            block.keyed(dv).add_(part_v)


def _blocks(q: Tensor, k: Tensor, visible: RowIntervals, dtype: torch.dtype):
    def scratch_elements(num_kv: int, group: int, num_rows: int, num_keys: int) -> int:
        scores, rows = group * num_rows * num_keys, group * num_rows + num_keys
        return num_kv * (_SCORE_SIZED * scores + _ROW_SIZED * rows * q.shape[-1])

    return blocks(q, k, visible, scratch_elements, SCRATCH_BYTES // dtype.itemsize, smallest=16)


def _block_inputs(block: Block, dtype: torch.dtype, row_tensors, key_tensors) -> list[Tensor]:
    """The block's inputs in the state's dtype; rows as [b, K, G*t, D], so that a group shares its keys."""
    rows = []
    for x in row_tensors:
        part = block.queries(x)
        num_kv = block.kv_heads.stop - block.kv_heads.start
        rows.append(part.to(dtype).reshape(part.shape[0], num_kv, -1, part.shape[-1]))
    return [*rows, *(block.keyed(x).to(dtype) for x in key_tensors)]


def _grouped(x: Tensor, k: Tensor, block: Block) -> Tensor:
    """lse or delta of a block, [b, H, t], as [b, K, G*t]."""
    return x.reshape(x.shape[0], block.kv_heads.stop - block.kv_heads.start, -1)


def seen_in(block: Block, visible: RowIntervals, k: Tensor) -> Tensor | None:
    """Bool mask that broadcasts to the block's scores [b, K, G*t, s], or None where every row sees every key."""
    part = block.intervals(visible)
    if part.kind is Kind.FULL:
        return None
    lo, hi = (torch.from_numpy(bound).to(k.device) for bound in part.arrays())
    num_kv = block.kv_heads.stop - block.kv_heads.start
    group = (block.heads.stop - block.heads.start) // num_kv
    if lo.ndim == 1:
        lo, hi = (bound.repeat(group) for bound in (lo, hi))
    else:
        lo, hi = (bound.reshape(bound.shape[0], num_kv, -1) for bound in (lo, hi))
    key = torch.arange(part.num_keys, device=k.device)
    return (lo[..., None] <= key) & (key < hi[..., None])


def _scores(q: Tensor, k: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(scale)
    return scores if seen is None else scores.masked_fill_(~seen, NEVER)


def _absorb_block(state: SoftmaxState, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> None:
    scores = _scores(q, k, seen, scale)
    row_max = scores.amax(-1)
    base = torch.where(row_max == NEVER, 0.0, row_max)
    weights = scores.sub_(base.unsqueeze(-1)).exp_()
    shape = state.row_max.shape
    acc = _product(weights, v, seen).view(state.acc.shape)
    state.merge_(acc, row_max.view(shape), weights.sum(-1).view(shape))


def _gradient_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    seen: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # A row that saw nothing anywhere has lse = -inf; +inf in its place gives it weight 0 everywhere.
    lse = torch.where(lse == NEVER, math.inf, lse)
    weights = _scores(q, k, seen, scale).sub_(lse.unsqueeze(-1)).exp_()
    d_scores = torch.matmul(do, v.transpose(-1, -2)).sub_(delta.unsqueeze(-1)).mul_(weights)
    seen_back = None
    if seen is not None:
        # Masked: 0 whatever came of it (0 * NaN is NaN).
        weights, d_scores = (x.masked_fill_(~seen, 0.0) for x in (weights, d_scores))
        seen_back = seen.transpose(-1, -2)
    return (
        _product(d_scores, k, seen).mul_(scale),
        _product(d_scores.transpose(-1, -2), q, seen_back).mul_(scale),
        _product(weights.transpose(-1, -2), do, seen_back),
    )


def _product(weights: Tensor, operand: Tensor, seen: Tensor | None) -> Tensor:
    """weights @ operand, where a weight of 0 that stands for "not seen" hides even NaN and inf.

    IEEE's 0 * NaN is NaN, so non-finite operands are taken out of the product and put back into the rows
    that see them: NaN for NaN or for infinities of both signs, else the infinity.
    """
    finite = torch.isfinite(operand)
    if seen is None or bool(finite.all()):
        return torch.matmul(weights, operand)
    clean = torch.matmul(weights, torch.where(finite, operand, 0.0))
    sees = seen.to(weights.dtype).expand(weights.shape)

    def meets(which: Tensor) -> Tensor:
        return torch.matmul(sees, which.to(weights.dtype)) > 0

    up, down, nan = meets(operand == math.inf), meets(operand == -math.inf), meets(torch.isnan(operand))
    clean = torch.where(up, math.inf, torch.where(down, -math.inf, clean))
    return torch.where(nan | (up & down), math.nan, clean)
