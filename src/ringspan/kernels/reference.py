"""The definition, in plain torch: short, slow, any float dtype up to float64, any device, any intervals.

It works in blocks, so no score matrix of a whole tile ever exists.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ringspan.kernels.blocks import Block, blocks
from ringspan.kernels.contract import SCRATCH_BYTES, TileByTile
from ringspan.state import NEVER, SoftmaxState
from ringspan.tile import Kind, RowIntervals

_SCORE_SIZED = 6  # temporaries of the size of a block's scores that are alive at once, at the most
_ROW_SIZED = 6  # the same of the size of its rows or keys times D


class Reference(TileByTile):
    name = "reference"
    sets_threads = False  # torch's own setting decides

    def declines(self, dtype: torch.dtype, device: torch.device, head_dim: int) -> str | None:
        return None

    def absorb(self, state: SoftmaxState, q: Tensor, k: Tensor, v: Tensor, visible: RowIntervals, scale: float) -> None:
        dtype = state.acc.dtype
        for block in _blocks(q, k, v, visible, dtype):
            part = state.select(block.rows, block.heads, block.batch)
            bq, bk, bv = _grouped(q, block).to(dtype), block.keyed(k).to(dtype), block.keyed(v).to(dtype)
            _absorb_block(part, bq, bk, bv, _seen(block, visible, k.device), scale)

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
        dtype = dq.dtype
        for block in _blocks(q, k, v, visible, dtype):
            bq, bdo = (_grouped(x, block).to(dtype) for x in (q, do))
            bk, bv = (block.keyed(x).to(dtype) for x in (k, v))
            seen = _seen(block, visible, k.device)
            part_q, part_k, part_v = _gradient_block(
                bq, bk, bv, bdo, _grouped(lse, block), _grouped(delta, block), seen, scale
            )
            target = block.queries(dq)
            target.add_(part_q.view(target.shape))
            block.keyed(dk).add_(part_k)
            block.keyed(dv).add_(part_v)


def _blocks(q: Tensor, k: Tensor, v: Tensor, visible: RowIntervals, dtype: torch.dtype):
    dim = max(q.shape[-1], v.shape[-1])

    def scratch_elements(num_kv: int, group: int, num_rows: int, num_keys: int) -> int:
        scores, rows = group * num_rows * num_keys, group * num_rows + num_keys
        return num_kv * (_SCORE_SIZED * scores + _ROW_SIZED * rows * dim)

    itemsize = 8 if _rounds(dtype, q.device) else dtype.itemsize  # what is alive twice, in both dtypes, fits that too
    return blocks(q, k, visible, scratch_elements, SCRATCH_BYTES // itemsize, smallest=16)


def _grouped(x: Tensor, block: Block) -> Tensor:
    """A block's rows of [B, H, T, ...] as [b, K, G*t, ...], so that a group of query heads shares its keys."""
    part = block.queries(x)
    return part.reshape(part.shape[0], block.num_kv_heads, -1, *part.shape[3:])


def _seen(block: Block, visible: RowIntervals, device: torch.device) -> Tensor | None:
    """Bool mask that broadcasts to the block's scores [b, K, G*t, s], or None where every row sees every key."""
    part = block.intervals(visible)
    if part.kind is Kind.FULL:
        return None
    lo, hi = (torch.from_numpy(bound).to(device) for bound in part.arrays())
    num_heads = block.heads.stop - block.heads.start
    if lo.ndim == 1:
        lo, hi = (bound.repeat(num_heads // block.num_kv_heads) for bound in (lo, hi))
    else:
        wide = (bound.expand(-1, num_heads, -1) for bound in (lo, hi))
        lo, hi = (bound.reshape(bound.shape[0], block.num_kv_heads, -1) for bound in wide)
    key = torch.arange(part.num_keys, device=device)
    return (lo[..., None] <= key) & (key < hi[..., None])


def _rounds(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's products of such tensors lose most of their digits: float32 where the user allows TF32."""
    return dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    # The user's setting is for his own products, and is one for all threads: it is to be neither obeyed nor changed.
    if _rounds(a.dtype, a.device):
        return torch.matmul(a.double(), b.double()).to(a.dtype)
    return torch.matmul(a, b)


def _scores(q: Tensor, k: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    scores = _matmul(q, k.transpose(-1, -2)).mul_(scale)
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
    d_scores = _matmul(do, v.transpose(-1, -2)).sub_(delta.unsqueeze(-1)).mul_(weights)
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
        return _matmul(weights, operand)
    clean = _matmul(weights, torch.where(finite, operand, 0.0))
    sees = seen.to(weights.dtype).expand(weights.shape)

    def meets(which: Tensor) -> Tensor:
        return _matmul(sees, which.to(weights.dtype)) > 0

    up, down, nan = meets(operand == math.inf), meets(operand == -math.inf), meets(torch.isnan(operand))
    clean = torch.where(up, math.inf, torch.where(down, -math.inf, clean))
    return torch.where(nan | (up & down), math.nan, clean)
