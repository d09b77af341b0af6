"""Which kernel serves a call: one row a kernel, fastest first, and each one's reason where it declines."""

from __future__ import annotations

import torch

from ringspan.errors import ArgumentError, UnsupportedError, explain, shown
from ringspan.kernels.contract import Kernel
from ringspan.kernels.native import Native, NativeRounded
from ringspan.kernels.reference import Reference
from ringspan.kernels.torch_cuda import TorchCuda
from ringspan.kernels.torch_ops import TorchOps
from ringspan.kernels.triton_kernel import Triton

TRITON = Triton()
ROUNDED = NativeRounded()
KERNELS: tuple[Kernel, ...] = (ROUNDED, Native(), TRITON, TorchOps(), Reference())
# As "auto", without weights that are rounded where they need not be: for the SPMD entries. Their contract allows an
# error of 2.5e-3, and with rounded weights a few rows may be beyond it.
UNROUNDED = "auto, not rounded"
# Asked first by "auto" where one tile is all that the call's rows see; merging what it returns would not be exact.
FOR_AN_ONLY_TILE: tuple[Kernel, ...] = (TorchCuda(TRITON),)


def names() -> tuple[str, ...]:
    return ("auto", *(kernel.name for kernel in KERNELS))


def choose(name: str, dtype: torch.dtype, device: torch.device, head_dim: int, only_tile: bool = False) -> Kernel:
    """The kernel of that name, or for "auto" the first of the table that does not decline."""
    auto = name in ("auto", UNROUNDED)
    candidates = [kernel for kernel in KERNELS if name == kernel.name or (auto and _in_auto(kernel, device))]
    if name == UNROUNDED:
        candidates.remove(ROUNDED)
    if not candidates:
        known = ", ".join(map(repr, names()))
        raise ArgumentError(explain("kernel is unknown.", got=shown(name), fix=f"one of {known}"))
    if only_tile and auto:
        candidates = [*FOR_AN_ONLY_TILE, *candidates]
    reasons = []
    for kernel in candidates:
        reason = kernel.declines(dtype, device, head_dim)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise UnsupportedError(
        explain(
            f"kernel={name!r} cannot serve {dtype} tensors with head_dim {head_dim} on {device}.",
            got="; ".join(reasons),
            fix='kernel="auto" takes whichever can',
        )
    )


def _in_auto(kernel: Kernel, device: torch.device) -> bool:
    # On CPUs Triton has an interpreter, for tests, that is thousands of times slower than any other kernel.
    return kernel is not TRITON or device.type != "cpu"
