"""What the Triton kernels are told of a tile's mask: two integers of a band, or arrays of intervals on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ringspan.errors import UnsupportedError, explain
from ringspan.tile import Band, Kind, RowIntervals

Strides = tuple[int, int, int]


@dataclass(frozen=True)
class Bounds:
    """lo, hi: int32 on the device, by strides (B, H, T); empty under a band, as the ranges of row blocks are."""

    lo: Tensor
    hi: Tensor
    strides: Strides
    rule: dict[str, int]  # num_rows, num_keys, lower, upper
    is_band: bool
    hides: bool  # whether any row does not see all keys
    _ranges: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    @property
    def common(self) -> dict[str, Any]:
        """The arguments that all kernels have of it."""
        return self.rule | {"BAND": self.is_band}

    def ranges(self, group: int, key_block: int, row_block: int) -> tuple[Tensor, Strides]:
        """(which row blocks see a block of keys, [B, K, key blocks, 4], its strides by batch, head and block)."""
        if self.is_band:
            return self.lo, (0, 0, 0)
        from ringspan.kernels.triton_ranges import row_ranges

        key = group, key_block, row_block
        if key not in self._ranges:
            self._ranges[key] = row_ranges(self.lo, self.hi, self.rule["num_keys"], *key)
        found = self._ranges[key]
        return found, _strides(found[..., 0])


# By tile, and then by device and stream: what was copied on one stream may not be there yet for another.
_known: WeakKeyDictionary[RowIntervals, dict[tuple[torch.device, int], Bounds]] = WeakKeyDictionary()


def bounds(visible: RowIntervals, device: torch.device) -> Bounds:
    """A band costs two integers, other intervals one copy to the device, once for all calls with the same tile."""
    stream = 0
    if visible.band is None and device.type == "cuda":  # a band's tensors are empty, so there is nothing to wait for
        if torch.cuda.is_current_stream_capturing():
            raise mask_is_not_captured()
        stream = torch.cuda.current_stream(device).cuda_stream
    known = _known.setdefault(visible, {})
    found = known.get((device, stream))
    if found is None:
        found = _of_arrays(visible, device) if visible.band is None else _of_band(visible, visible.band, device)
        known[device, stream] = found
    return found


def mask_is_not_captured() -> UnsupportedError:
    return UnsupportedError(
        explain(
            "this mask cannot be captured into a CUDA graph.",
            got="cu_seqlens, key_ranges or bounds: a graph does not repeat the copy of the rows' intervals to the GPU",
            fix="capture calls without them, or run this one outside of the graph",
        )
    )


def _of_band(visible: RowIntervals, band: Band, device: torch.device) -> Bounds:
    num_rows, num_keys = visible.num_rows, visible.num_keys
    lower = -num_rows if band.lower is None else band.lower
    upper = num_keys if band.upper is None else band.upper
    lower, upper = (min(max(edge, -num_rows), num_keys) for edge in (lower, upper))
    none = torch.empty(0, dtype=torch.int32, device=device)
    return Bounds(none, none, (0, 0, 0), _rule(visible, lower, upper), True, visible.kind is not Kind.FULL)


def _of_arrays(visible: RowIntervals, device: torch.device) -> Bounds:
    both = torch.from_numpy(np.stack(visible.arrays()).astype(np.int32))
    if device.type == "cuda":  # from pinned memory the copy does not wait for the GPU, nor the host for it
        both = both.pin_memory().to(device, non_blocking=True)
    lo, hi = both
    return Bounds(lo, hi, _strides(lo), _rule(visible, 0, 0), False, visible.kind is not Kind.FULL)


def _strides(x: Tensor) -> Strides:
    """By batch entry, head and row, of [T], [B, 1, T] or [B, H, T]: 0 where all have the same."""
    if x.ndim == 1:
        return 0, 0, x.stride(0)
    batch, head, row = (stride if length > 1 else 0 for stride, length in zip(x.stride(), x.shape, strict=True))
    return batch, head, row


def _rule(visible: RowIntervals, lower: int, upper: int) -> dict[str, int]:
    return {"num_rows": visible.num_rows, "num_keys": visible.num_keys, "lower": lower, "upper": upper}
