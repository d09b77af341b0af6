"""The C++ kernel of csrc/: float32, bfloat16 and float16 on CPUs, any intervals, with threads of its own."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from ringspan.errors import ArgumentError
from ringspan.kernels.contract import KeyRun
from ringspan.kernels.threads import num_threads
from ringspan.state import SoftmaxState
from ringspan.tile import RowIntervals

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_HEAD_DIM = 256

_missing: str | None = None
try:
    from ringspan import _native
except ImportError as error:
    if os.environ.get("RINGSPAN_REQUIRE_NATIVE") == "1":
        raise
    _missing = f"the compiled module is not there ({error}); install ringspan with a C++20 compiler to have it"


@functools.cache
def info() -> dict[str, Any]:
    """isa: the instruction set in use; isas: those that this processor and build have; rounds_weights."""
    if _missing is not None:
        return {"isa": None, "isas": [], "rounds_weights": False}
    try:
        return dict(_native.info())
    except ValueError as error:  # before a call begins, so that it is a refusal that all ranks hear of
        raise ArgumentError(str(error)) from None


# Tensors go to C++ as capsules. Taking them from Tensor.__dlpack__, as nanobind would, is Python code: 3 microseconds a
# tensor against 0.4, and it refuses tensors that require grad.
class Native:
    name = "native"
    sets_threads = True
    rounds_weights = False
    # In calls of 256, a fifth of the time goes into reading the queries and moving the state.
    enough_keys = 4096

    def declines(self, dtype: torch.dtype, device: torch.device, head_dim: int) -> str | None:
        if _missing is not None:
            return _missing
        if device.type != "cpu":
            return f"it serves CPU tensors, these are on {device.type}"
        if dtype not in _DTYPES:
            return f"its arithmetic is float32, {dtype} needs more"
        if head_dim > _LARGEST_HEAD_DIM:
            return f"it serves head_dim up to {_LARGEST_HEAD_DIM}, not {head_dim}"
        info()
        return None

    def absorb(self, state: SoftmaxState, q: Tensor, k: Tensor, v: Tensor, visible: RowIntervals, scale: float) -> None:
        self.absorb_runs(state, q, [(k, v, visible)], scale)

    def absorb_runs(self, state: SoftmaxState, q: Tensor, runs: Sequence[KeyRun], scale: float) -> None:
        _native.absorb_runs(
            to_dlpack(state.acc),
            to_dlpack(state.row_max),
            to_dlpack(state.row_sum),
            to_dlpack(q),
            [(to_dlpack(k), to_dlpack(v), *_visibility(visible)) for k, v, visible in runs],
            scale=scale,
            num_threads=num_threads(),
            rounds_weights=self.rounds_weights,
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
        lower, upper, lo, hi = _visibility(visible)
        _native.absorb_gradient(
            *map(to_dlpack, (dq, dk, dv, q, k, v, do, lse, delta)),
            scale=scale,
            num_threads=num_threads(),
            rounds_weights=self.rounds_weights,
            lower=lower,
            upper=upper,
            lo=lo,
            hi=hi,
        )


class NativeRounded(Native):
    """The same with p and ds rounded to bfloat16 before they meet v, do, k and q, as in torch's attention and in the
    kernels of GPUs: for processors that multiply bfloat16 faster (docs/decisions/0013-rounded-weights.md)."""

    name = "native_rounded"
    rounds_weights = True

    def declines(self, dtype: torch.dtype, device: torch.device, head_dim: int) -> str | None:
        declined = super().declines(dtype, device, head_dim)
        if declined is not None:
            return declined
        if dtype != torch.bfloat16:
            return f"it is for bfloat16, these are {dtype}"
        if not info()["rounds_weights"]:
            return f"this processor multiplies bfloat16 no faster than float32 ({info()['isa']}): take native"
        return None


def _visibility(visible: RowIntervals) -> tuple[int | None, int | None, Any, Any]:
    """(lower, upper, lo, hi): a band's edges, or else each row's interval."""
    if visible.band is not None:
        return visible.band.lower, visible.band.upper, None, None
    lo, hi = visible.arrays()
    return None, None, lo.astype(np.int32), hi.astype(np.int32)
