"""The Triton kernels as a kernel of the house: NVIDIA GPUs from Ampere on, or CPU tensors in Triton's interpreter."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ringspan.kernels import hopper_kernel
from ringspan.kernels.contract import TileByTile
from ringspan.kernels.triton_bounds import Bounds, bounds
from ringspan.kernels.triton_configs import FLAGGED, Config, Configs, configs
from ringspan.kernels.triton_launch import launch
from ringspan.state import SoftmaxState
from ringspan.tile import Kind, RowIntervals

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_HEAD_DIM = 256
_OLDEST_CAPABILITY = (8, 0)  # the first with bfloat16 on tensor cores and asynchronous copies
_SMALLEST_FACTOR = 2.0**-100  # in place of 0, which would make NaN of a hidden score's -inf


class Triton(TileByTile):
    name = "triton"
    sets_threads = False
    captures = True

    def __init__(self, configs: Callable[[tuple[int, int] | None, int, int], Configs] = configs) -> None:
        self._configs = configs

    def declines(self, dtype: torch.dtype, device: torch.device, head_dim: int) -> str | None:
        if find_spec("triton") is None:
            return "triton is not installed"
        reason = _why_not_on(device)
        if reason is not None:
            return reason
        if dtype not in _DTYPES:
            return f"its arithmetic is float32, {dtype} needs more"
        if head_dim > _LARGEST_HEAD_DIM:
            return f"it serves head_dim up to {_LARGEST_HEAD_DIM}, not {head_dim}"
        return None

    def absorb(self, state: SoftmaxState, q: Tensor, k: Tensor, v: Tensor, visible: RowIntervals, scale: float) -> None:
        if visible.kind is Kind.EMPTY or not q.shape[0]:
            return
        factor = max(abs(scale) * math.log2(math.e), _SMALLEST_FACTOR)
        known, flags = bounds(visible, q.device), None
        if scale >= 0 and hopper_kernel.serves(q, k, v):
            flags = hopper_kernel.absorb(state, q, k, v, known, factor)
            if flags is None:
                return
        self._absorb(state, q, k, v, known, factor, scale < 0, flags)

    def _absorb(
        self,
        state: SoftmaxState,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        known: Bounds,
        factor: float,
        flipped: bool,
        flags: Tensor | None,
    ) -> None:
        """flags: the only blocks to be taken in, and carefully."""
        from ringspan.kernels.triton_forward import absorb_kernel

        config = self._configs_for(q, v).forward if flags is None else FLAGGED
        tensors = (state.acc, state.row_max, state.row_sum, q, k, v)
        _launch(
            absorb_kernel,
            config,
            q.shape[0] * q.shape[1] * _blocks(q, config.rows),
            *tensors,
            known.lo,
            known.hi,
            known.lo if flags is None else flags,
            *(x.stride() for x in tensors),
            known.strides,
            num_heads=q.shape[1],
            group=q.shape[1] // k.shape[1],
            factor=factor,
            FLIPPED=flipped,
            FLAGGED=flags is not None,
            **known.common,
            **_sizes(q, v),
        )

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
        if visible.kind is Kind.EMPTY or not q.shape[0]:
            return
        known, flags = bounds(visible, q.device), None
        if hopper_kernel.serves(q, k, v, do):
            flags = hopper_kernel.absorb_gradient(dq, dk, dv, q, k, v, do, lse, delta, known, scale)
            if flags is None:
                return
        self._absorb_gradient(dq, dk, dv, q, k, v, do, lse, delta, known, scale, flags)

    def _absorb_gradient(
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
        known: Bounds,
        scale: float,
        flags: tuple[Tensor, Tensor] | None,
    ) -> None:
        """flags: the only blocks to be taken in, and carefully; of dk and dv, and of dq."""
        from ringspan.kernels.triton_backward import absorb_dkdv_kernel, absorb_dq_kernel

        chosen = self._configs_for(q, v) if flags is None else Configs(FLAGGED, FLAGGED, FLAGGED)
        of_keys, of_rows = (known.lo, known.lo) if flags is None else flags
        inputs = (q, k, v, do, lse, delta)
        numbers = {"scale": scale, "factor": scale * math.log2(math.e), "FLAGGED": flags is not None}
        group = q.shape[1] // k.shape[1]
        numbers |= {"group": group} | known.common | _sizes(q, v)
        bounded = (known.lo, known.hi)

        tensors: tuple[Tensor, ...] = (dk, dv, *inputs)
        ranges, range_strides = known.ranges(group, chosen.dkdv.keys, chosen.dkdv.rows)
        _launch(
            absorb_dkdv_kernel,
            chosen.dkdv,
            k.shape[0] * k.shape[1] * _blocks(k, chosen.dkdv.keys),
            *(*tensors, *bounded, ranges, of_keys),
            *(*(x.stride() for x in tensors), known.strides, range_strides),
            num_kv_heads=k.shape[1],
            **numbers,
        )
        tensors = (dq, *inputs)
        _launch(
            absorb_dq_kernel,
            chosen.dq,
            q.shape[0] * q.shape[1] * _blocks(q, chosen.dq.rows),
            *(*tensors, *bounded, of_rows),
            *(*(x.stride() for x in tensors), known.strides),
            num_heads=q.shape[1],
            **numbers,
        )

    def _configs_for(self, q: Tensor, v: Tensor) -> Configs:
        capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
        return self._configs(capability, max(_dims(q), _dims(v)), q.dtype.itemsize)


def _why_not_on(device: torch.device) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu":
        return None if interpreted else "it serves GPUs; CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it serves NVIDIA GPUs, these tensors are on {device}"
    if interpreted:
        return "TRITON_INTERPRET=1 is set, and Triton's interpreter would take hours for GPU tensors"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        needed, got = (".".join(map(str, x)) for x in (_OLDEST_CAPABILITY, capability))
        return f"it needs compute capability {needed} (Ampere) or later, this GPU has {got}"
    return None


def _dims(x: Tensor) -> int:
    """head_dim as blocks have it: a power of two, and at least 16 for tensor cores."""
    return max(16, 1 << (x.shape[-1] - 1).bit_length())


def _sizes(q: Tensor, v: Tensor) -> dict[str, int]:
    return {"HEAD_DIM": q.shape[-1], "DIMS": _dims(q), "VALUE_DIM": v.shape[-1], "VALUE_DIMS": _dims(v)}


def _blocks(x: Tensor, length: int) -> int:
    return -(-x.shape[2] // length)


def _launch(kernel: Any, config: Config, num_programs: int, *args: Any, **numbers: Any) -> None:
    sizes = {"ROWS": config.rows, "KEYS": config.keys, "STAGES": config.stages}
    launch(kernel, num_programs, *args, **sizes, **numbers, num_warps=config.warps)
