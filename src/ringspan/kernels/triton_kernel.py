"""The Triton kernels as a kernel of the house: NVIDIA GPUs from Ampere on, or CPU tensors in Triton's interpreter."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringspan.errors import UnsupportedError, explain
from ringspan.kernels import hopper_kernel
from ringspan.kernels.contract import TileByTile
from ringspan.kernels.triton_configs import FLAGGED, Config, Configs, configs
from ringspan.state import SoftmaxState
from ringspan.tile import Kind, RowIntervals

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_HEAD_DIM = 256
_OLDEST_CAPABILITY = (8, 0)  # the first with bfloat16 on tensor cores and asynchronous copies
_SMALLEST_FACTOR = 2.0**-100  # in place of 0, which would make NaN of a hidden score's -inf

# The interpreter keeps the program that it is at in one place for all threads.
_interpreter_lock = threading.Lock()


class Triton(TileByTile):
    name = "triton"
    sets_threads = False

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
        flags = None
        if scale >= 0 and hopper_kernel.serves(q, k, v, visible=visible):
            flags = hopper_kernel.absorb(state, q, k, v, visible, factor)
            if flags is None:
                return
        self._absorb(state, q, k, v, visible, factor, scale < 0, flags)

    def _absorb(
        self,
        state: SoftmaxState,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: RowIntervals,
        factor: float,
        flipped: bool,
        flags: Tensor | None,
    ) -> None:
        """flags: the only blocks to be taken in, and carefully."""
        from ringspan.kernels.triton_forward import absorb_kernel

        config = self._configs_for(q).forward if flags is None else FLAGGED
        lo, hi, bound_strides, rule = _visibility(visible, q.device)
        tensors = (state.acc, state.row_max, state.row_sum, q, k, v)
        _launch(
            absorb_kernel,
            config,
            q.shape[0] * q.shape[1] * _blocks(q, config.rows),
            *tensors,
            lo,
            hi,
            lo if flags is None else flags,
            *(x.stride() for x in tensors),
            bound_strides,
            num_heads=q.shape[1],
            group=q.shape[1] // k.shape[1],
            factor=factor,
            FLIPPED=flipped,
            FLAGGED=flags is not None,
            **rule,
            **_sizes(q),
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
        flags = None
        if hopper_kernel.serves(q, k, v, do, visible=visible):
            flags = hopper_kernel.absorb_gradient(dq, dk, dv, q, k, v, do, lse, delta, visible, scale)
            if flags is None:
                return
        self._absorb_gradient(dq, dk, dv, q, k, v, do, lse, delta, visible, scale, flags)

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
        visible: RowIntervals,
        scale: float,
        flags: tuple[Tensor, Tensor] | None,
    ) -> None:
        """flags: the only blocks to be taken in, and carefully; of dk and dv, and of dq."""
        from ringspan.kernels.triton_backward import absorb_dkdv_kernel, absorb_dq_kernel

        chosen = self._configs_for(q) if flags is None else Configs(FLAGGED, FLAGGED, FLAGGED)
        lo, hi, bound_strides, rule = _visibility(visible, q.device)
        of_keys, of_rows = (lo, lo) if flags is None else flags
        inputs = (q, k, v, do, lse, delta)
        numbers = {"scale": scale, "factor": scale * math.log2(math.e), "FLAGGED": flags is not None}
        numbers |= rule | _sizes(q)
        group = q.shape[1] // k.shape[1]
        for kernel, config, targets, mine, along, heads in (
            (
                absorb_dkdv_kernel,
                chosen.dkdv,
                (dk, dv),
                of_keys,
                _blocks(k, chosen.dkdv.keys),
                {"num_kv_heads": k.shape[1]},
            ),
            (absorb_dq_kernel, chosen.dq, (dq,), of_rows, _blocks(q, chosen.dq.rows), {"num_heads": q.shape[1]}),
        ):
            tensors = (*targets, *inputs)
            strides = (x.stride() for x in tensors)
            programs = targets[0].shape[0] * targets[0].shape[1] * along
            _launch(
                kernel,
                config,
                programs,
                *tensors,
                lo,
                hi,
                mine,
                *strides,
                bound_strides,
                group=group,
                **heads,
                **numbers,
            )

    def _configs_for(self, q: Tensor) -> Configs:
        capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
        return self._configs(capability, _dims(q), q.dtype.itemsize)


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


def _dims(q: Tensor) -> int:
    """head_dim as blocks have it: a power of two, and at least 16 for tensor cores."""
    return max(16, 1 << (q.shape[-1] - 1).bit_length())


def _sizes(q: Tensor) -> dict[str, int]:
    return {"HEAD_DIM": q.shape[-1], "DIMS": _dims(q)}


def _blocks(x: Tensor, length: int) -> int:
    return -(-x.shape[2] // length)


def _visibility(visible: RowIntervals, device: torch.device) -> tuple[Any, Any, tuple[int, int, int], dict[str, Any]]:
    """(lo, hi, their strides, the rule): a band costs two integers, other intervals one copy to the device."""
    num_rows, num_keys = visible.num_rows, visible.num_keys
    rule = {"num_rows": num_rows, "num_keys": num_keys, "lower": 0, "upper": 0, "BAND": visible.band is not None}
    if visible.band is not None:
        lower = -num_rows if visible.band.lower is None else visible.band.lower
        upper = num_keys if visible.band.upper is None else visible.band.upper
        lower, upper = (min(max(edge, -num_rows), num_keys) for edge in (lower, upper))
        none = torch.empty(0, dtype=torch.int32, device=device)
        return none, none, (0, 0, 0), rule | {"lower": lower, "upper": upper}
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            explain(
                "this mask cannot be captured into a CUDA graph.",
                got="rows that see other than a diagonal band: the copy of their intervals to the GPU is not repeated",
                fix="capture calls without cu_seqlens and bounds, or run this one outside of the graph",
            )
        )
    both = torch.from_numpy(np.stack(visible.arrays()).astype(np.int32))
    if device.type == "cuda":  # from pinned memory the copy does not wait for the GPU, nor the host for it
        both = both.pin_memory().to(device, non_blocking=True)
    lo, hi = both
    strides = lo.stride() if lo.ndim == 3 else (0, 0, lo.stride(0))
    return lo, hi, strides, rule


def _launch(kernel: Any, config: Config, num_programs: int, *args: Any, **numbers: Any) -> None:
    cpu = args[0].device.type == "cpu"
    with _interpreter_lock if cpu else torch.cuda.device(args[0].device):
        sizes = {"ROWS": config.rows, "KEYS": config.keys, "STAGES": config.stages}
        kernel[(num_programs,)](*args, **sizes, **numbers, num_warps=config.warps)
