"""The result against float64 attention over the full keys, on sampled query rows, and against its bound.

Reads the input anew, by global position, and shares no code with the kernels, the layouts or the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ringspan.commands.source import Source
from ringspan.problem import Mask

NUM_ROWS = 64
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float64: 1e-12}
ROW_BOUND = 1e-2  # of a single row: far above any rounding, far below a wrong row
_BLOCK_ELEMENTS = 1 << 22  # of one block of keys


@dataclass(frozen=True)
class Rows:
    """Attention of sampled rows: their global positions, out [B, H, R, E] and lse [B, H, R]."""

    positions: np.ndarray
    out: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Verdict:
    """Relative errors, and what they may be. plain: that of plain attention in the same dtype, if it was needed.

    row_error: the worst row's. Under a causal mask the first rows outweigh the others in ||out||, so that one wrong
    row among many long ones would hardly show in out_error.
    """

    out_error: float
    row_error: float
    lse_error: float
    bound: float
    row_bound: float
    lse_bound: float
    plain: float | None = None

    @property
    def passed(self) -> bool:
        pairs = (self.out_error, self.bound), (self.row_error, self.row_bound), (self.lse_error, self.lse_bound)
        return all(error <= bound for error, bound in pairs)


def sampled_positions(num_queries: int, seed: int = 0) -> np.ndarray:
    """Ascending; the first and the last row are always among them."""
    others = np.random.default_rng(seed).permutation(max(0, num_queries - 2))[: NUM_ROWS - 2] + 1
    return np.unique(np.concatenate(([0, num_queries - 1], others)))


def judge(rows: Rows, truth: Rows, source: Source, mask: Mask, scale: float) -> Verdict:
    """The bounds are those of the dtype, or twice the error of plain attention in that dtype, if that is more."""
    errors = relative_error(rows.out, truth.out), worst_row(rows.out, truth.out)
    bounds, plain = (BOUNDS[source.dtype], ROW_BOUND), None
    if not (errors[0] <= bounds[0] and errors[1] <= bounds[1]):
        out = _plain_rows(rows.positions, source, mask, scale)
        plain = relative_error(out, truth.out)
        bounds = max(bounds[0], 2 * plain), max(bounds[1], 2 * worst_row(out, truth.out))
    lse_bound = BOUNDS[torch.float64 if source.dtype == torch.float64 else torch.float32]
    return Verdict(*errors, relative_error(rows.lse, truth.lse), *bounds, lse_bound, plain)


def worst_row(found: Tensor, truth: Tensor) -> float:
    """The largest relative error of a row of out [B, H, R, E] whose values are all finite."""
    rows = [row for row in range(truth.shape[2]) if bool(torch.isfinite(truth[:, :, row]).all())]
    return max((relative_error(found[:, :, row], truth[:, :, row]) for row in rows), default=0.0)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth|| where truth is finite; inf where found differs from what is not."""
    found, finite = found.double(), torch.isfinite(truth)
    if not torch.allclose(found[~finite], truth[~finite], equal_nan=True):
        return float("inf")
    difference, size = (float(torch.linalg.vector_norm(x)) for x in (found[finite] - truth[finite], truth[finite]))
    if not difference:
        return 0.0
    return difference / size if size else float("inf")


def exact_rows(
    positions: np.ndarray, source: Source, mask: Mask, scale: float, advance: Callable[[float], object]
) -> Rows:
    """The definition in float64, over the keys in blocks. advance is told of each block's share of the keys."""
    q = _queries(positions, source).double()
    lo, hi = mask.intervals(positions)
    batch, heads, num_rows, dim = *q.shape[:3], source.shapes["v"][3]
    acc = torch.zeros(batch, heads, num_rows, dim, dtype=torch.float64)
    largest, total = torch.full(q.shape[:3], -torch.inf).double(), torch.zeros(q.shape[:3]).double()
    _, kv_heads, num_keys, _ = source.shapes["k"]
    at_once = max(64, _BLOCK_ELEMENTS // (batch * heads * max(dim, q.shape[3])))
    for start in range(0, num_keys, at_once):
        block = range(start, min(start + at_once, num_keys))
        advance(len(block) / num_keys)
        if not ((lo < block.stop) & (hi > block.start) & (lo < hi)).any():
            continue
        k, v = (source.take(name, [block]).double().repeat_interleave(heads // kv_heads, 1) for name in "kv")
        for rows, keys, seen in _parts(lo - start, hi - start, k, v):
            scores = torch.matmul(q[:, :, rows], k[:, :, keys].mT).mul_(scale)
            if seen is not None:
                scores.masked_fill_(~seen, -torch.inf)
            _absorb(acc[:, :, rows], largest[:, :, rows], total[:, :, rows], scores, v[:, :, keys])
    unseen = total == 0
    out = acc / torch.where(unseen, 1.0, total).unsqueeze(-1)
    return Rows(positions, out, torch.where(unseen, -torch.inf, largest + total.log()))


def _parts(lo: np.ndarray, hi: np.ndarray, k: Tensor, v: Tensor):
    """Rows and keys of a block to be worked on together, and which of them see each other (None: all)."""
    lo, hi = np.clip(lo, 0, k.shape[2]), np.clip(hi, 0, k.shape[2])
    if bool(torch.isfinite(k).all()) and bool(torch.isfinite(v).all()):
        key = np.arange(k.shape[2])
        seen = (lo[:, None] <= key) & (key < hi[:, None])
        yield slice(0, len(lo)), slice(0, len(key)), torch.from_numpy(seen)
        return
    # 0 * NaN is NaN: where there is one, each row by itself, on the keys that it sees and no others.
    for row, (first, last) in enumerate(zip(lo.tolist(), hi.tolist(), strict=True)):
        if first < last:
            yield slice(row, row + 1), slice(first, last), None


def _absorb(acc: Tensor, largest: Tensor, total: Tensor, scores: Tensor, v: Tensor) -> None:
    new = torch.maximum(largest, scores.amax(-1))
    base = torch.where(new == -torch.inf, 0.0, new)
    weights, correction = torch.exp(scores - base.unsqueeze(-1)), torch.exp(largest - base)
    acc.mul_(correction.unsqueeze(-1)).add_(weights @ v)
    total.mul_(correction).add_(weights.sum(-1))
    largest.copy_(new)


def _plain_rows(positions: np.ndarray, source: Source, mask: Mask, scale: float) -> Tensor:
    """The same rows by torch's own attention in the input's dtype."""
    q = _queries(positions, source)
    num_keys = source.shapes["k"][2]
    k, v = (source.take(name, [range(num_keys)]) for name in "kv")
    lo, hi = mask.intervals(positions)
    key = np.arange(num_keys)
    seen = torch.from_numpy((lo[:, None] <= key) & (key < hi[:, None]))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.masked_fill(~seen.any(-1)[:, None], 0.0)


def _queries(positions: np.ndarray, source: Source) -> Tensor:
    return source.take("q", [range(position, position + 1) for position in positions.tolist()])
