"""torch's own fused attention, where it returns the lse that a ring needs: flash attention on the CPU.

It computes rectangles and diagonals that start at the corner. Intervals are therefore taken apart into such
pieces (a packed document is one, a striped diagonal is one after its first row is cut off); what remains, such
as sliding windows, intervals that differ between heads or batch entries, and values of another head_dim, goes to the
reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from ringspan.kernels.blocks import Block, blocks
from ringspan.kernels.contract import SCRATCH_BYTES, TileByTile
from ringspan.kernels.reference import Reference
from ringspan.state import SoftmaxState
from ringspan.tile import Band, Kind, Piece, RowIntervals

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

_FEWEST_ROWS = 16  # pieces with fewer rows than this, on average, cost more as calls than the reference costs


class TorchOps(TileByTile):
    name = "torch_ops"
    sets_threads = False  # torch's own setting decides

    def __init__(self) -> None:
        self._reference = Reference()

    def declines(self, dtype: torch.dtype, device: torch.device, head_dim: int) -> str | None:
        if device.type != "cpu":
            return f"it serves CPU tensors only so far, these are on {device.type}"
        return None

    def absorb(self, state: SoftmaxState, q: Tensor, k: Tensor, v: Tensor, visible: RowIntervals, scale: float) -> None:
        calls = _calls(visible, scale) if q.shape[-1] == v.shape[-1] else None
        # Flash multiplies weights of 0 by V, and 0 * NaN would reach rows that do not see the NaN.
        if calls is None or (visible.kind is not Kind.FULL and not _finite(v)):
            self._reference.absorb(state, q, k, v, visible, scale)
            return
        dtype = state.acc.dtype
        for block, causal in _blocks(q, k, calls, dtype, 1 + _copies(dtype, q), _copies(dtype, k, v)):
            part = state.select(block.rows, block.heads, block.batch)
            self._absorb_block(part, block.queries(q), block.keyed(k), block.keyed(v), causal, scale)

    def _absorb_block(self, state: SoftmaxState, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> None:
        """One call of flash; a function of its own, so that its tensors die before the next one's."""
        out, lse = _FLASH(*(_ready(x, state.acc.dtype) for x in (q, k, v)), 0.0, causal, scale=scale)
        if _may_be_unseen(out, lse):
            self._reference.absorb(state, q, k, v, _corner(q.shape[2], k.shape[2], causal), scale)
        else:
            state.merge_(out, lse)

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
        calls = _calls(visible, scale) if q.shape[-1] == v.shape[-1] else None
        masked = visible.kind is not Kind.FULL
        # A row with lse -inf has weights of 0, not exp(-inf + inf).
        if calls is None or not _finite(lse) or (masked and not all(map(_finite, (q, k, v, do, delta)))):
            self._reference.absorb_gradient(dq, dk, dv, q, k, v, do, lse, delta, visible, scale)
            return
        dtype = dq.dtype
        row_sized, key_sized = 2 + _copies(dtype, q, do), 2 + _copies(dtype, k, v)
        for block, causal in _blocks(q, k, calls, dtype, row_sized, key_sized):
            into = (block.queries(dq), block.keyed(dk), block.keyed(dv))
            bq, bdo, blse, bdelta = (block.queries(x) for x in (q, do, lse, delta))
            self._add_gradient(into, bq, bdo, blse, bdelta, block.keyed(k), block.keyed(v), causal, scale)

    def _add_gradient(
        self,
        into: tuple[Tensor, Tensor, Tensor],
        q: Tensor,
        do: Tensor,
        lse: Tensor,
        delta: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float,
    ) -> None:
        """One call of flash's backward; a function of its own, so that its tensors die before the next one's."""
        q, k, v, do = (_ready(x, into[0].dtype) for x in (q, k, v, do))
        out = _stand_in_for_out(do, delta)
        if out is None:
            part = _corner(q.shape[2], k.shape[2], causal)
            self._reference.absorb_gradient(*into, q, k, v, do, lse, delta, part, scale)
            return
        parts = _FLASH_BACKWARD(do, q, k, v, out, lse, 0.0, causal, scale=scale)
        for target, part in zip(into, parts, strict=True):
            target.add_(part)


def _corner(num_rows: int, num_keys: int, causal: bool) -> RowIntervals:
    """A rectangle, or the diagonal that starts in its corner."""
    return RowIntervals(num_rows, num_keys, Band(upper=1) if causal else Band())


def _may_be_unseen(out: Tensor, lse: Tensor) -> bool:
    """Whether a row may be one whose scores are all -inf: flash gives it out 0 and lse 0, for -inf."""
    return bool((lse == 0).any()) and bool(((lse == 0) & (out == 0).all(-1)).any())


def _finite(x: Tensor) -> bool:
    # One pass, without a copy or a mask in memory. Of no elements there is no largest one.
    return x.numel() == 0 or bool(torch.isfinite(torch.linalg.vector_norm(x, torch.inf)))


def _ready(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the state's dtype, and with a last stride of 1, without which flash on the CPU is silently wrong."""
    return x if _is_ready(x, dtype) else x.to(dtype, memory_format=torch.contiguous_format, copy=True)


def _is_ready(x: Tensor, dtype: torch.dtype) -> bool:
    return x.dtype == dtype and (x.stride(-1) == 1 or x.shape[-1] == 1)


def _copies(dtype: torch.dtype, *tensors: Tensor) -> int:
    return sum(not _is_ready(x, dtype) for x in tensors)


def _stand_in_for_out(do: Tensor, delta: Tensor) -> Tensor | None:
    """An `out` for which flash's backward finds the given delta, since all it does with out is sum(do * out).

    do * (delta / |do|^2), whose sum with do has only terms of one sign, so that it is as exact as delta
    itself; by way of do over the power of two in its largest element, so that squares neither overflow nor
    vanish. None where no such out exists (do = 0 with delta != 0, which only a gradient of lse makes).
    """
    largest = torch.linalg.vector_norm(do, torch.inf, dim=-1)
    largest = torch.where(largest == 0, 1.0, largest)
    power = largest / (2 * torch.frexp(largest).mantissa)
    unit = do / power.unsqueeze(-1)  # has do's strides, the last one 1
    norm = torch.linalg.vector_norm(unit, dim=-1).square()
    factor = torch.where(delta == 0, 0.0, delta / power / norm)
    return unit.mul_(factor.unsqueeze(-1)) if bool(torch.isfinite(factor).all()) else None


Call = tuple[slice, slice, bool]  # rows, keys, whether causal from the corner


def _calls(visible: RowIntervals, scale: float) -> list[Call] | None:
    """The visible pairs as rectangles and corner diagonals, or None where they are too many or of other shapes."""
    if visible.kind is Kind.FULL:
        return [(slice(0, visible.num_rows), slice(0, visible.num_keys), False)]
    # Flash hides pairs before it scales: -inf * 0 is NaN, and -inf * -1 is not hidden at all.
    if visible.arrays()[0].ndim > 1 or scale <= 0:
        return None
    calls: list[Call] = []
    for call in chain.from_iterable(map(_calls_of, visible.pieces())):
        calls.append(call)
        if len(calls) * _FEWEST_ROWS > visible.num_rows + 4 * _FEWEST_ROWS:
            return None
    return calls


def _calls_of(piece: Piece) -> Iterator[Call]:
    num_rows = piece.rows.stop - piece.rows.start
    if piece.lo_step:  # row by row: a document of one token and the first row of the next; of a window that is too many
        for i in range(num_rows):
            row = piece.rows.start + i
            yield slice(row, row + 1), slice(piece.lo + i, piece.hi + i * piece.hi_step), False
        return
    if not piece.hi_step:
        yield piece.rows, slice(piece.lo, piece.hi), False
        return
    # Every row sees the keys before the first row's last one; the diagonal starts there.
    corner = piece.hi - 1
    if corner > piece.lo:
        yield piece.rows, slice(piece.lo, corner), False
    yield piece.rows, slice(corner, corner + num_rows), True


def _blocks(
    q: Tensor, k: Tensor, calls: list[Call], dtype: torch.dtype, row_sized: int, key_sized: int
) -> Iterator[tuple[Block, bool]]:
    """Flash calls within the scratch bound, that allocate row_sized tensors like q and key_sized tensors like k."""
    dim = q.shape[-1]

    def scratch_elements(num_kv: int, group: int, num_rows: int, num_keys: int) -> int:
        return num_kv * (row_sized * group * num_rows + key_sized * num_keys) * dim

    # Flash itself takes up to two blocks of 256 x 512 scores a thread.
    whole_budget = SCRATCH_BYTES // dtype.itemsize
    budget = max(whole_budget - torch.get_num_threads() * 2 * 256 * 512, whole_budget // 4)
    num_batch, num_heads, num_kv = q.shape[0], q.shape[1], k.shape[1]
    for rows, keys, causal in calls:
        num_rows, num_keys = rows.stop - rows.start, keys.stop - keys.start
        if scratch_elements(num_batch * num_kv, num_heads // num_kv, num_rows, num_keys) <= budget:
            yield Block(slice(0, num_batch), slice(0, num_kv), slice(0, num_heads), rows, keys), causal
            continue
        whole = _corner(num_rows, num_keys, causal)
        for block in blocks(q[:, :, rows], k[:, :, keys], whole, scratch_elements, budget, smallest=16):
            part = whole.block(block.rows, block.keys)
            yield from _moved(block, part, rows.start, keys.start)


def _moved(block: Block, part: RowIntervals, row: int, key: int) -> Iterator[tuple[Block, bool]]:
    """A block's own rectangles and diagonals, in the rows and keys of the whole tile."""
    for rows, keys, causal in _calls(part, scale=1.0) or ():
        yield (
            Block(
                block.batch,
                block.kv_heads,
                block.heads,
                slice(rows.start + block.rows.start + row, rows.stop + block.rows.start + row),
                slice(keys.start + block.keys.start + key, keys.stop + block.keys.start + key),
            ),
            causal,
        )
