"""Launches the kernels for Hopper: which calls they serve, in which blocks, and what is done anew after them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringspan.kernels.triton_bounds import Bounds
from ringspan.kernels.triton_configs import GROUP_ROWS
from ringspan.kernels.triton_launch import launch
from ringspan.state import SoftmaxState

# Gluon is an experimental part of Triton, whose names still change: these are the versions it was run or compiled with.
_VERSIONS = ((3, 6), (3, 9))
CAPABILITY = (9, 0)  # the only one with wgmma
_ALIGNMENT_BYTES = 16  # of the copy engine: where a matrix begins, and its strides
_FEWEST = 64  # rows and keys: fewer fill no group of warps
_LARGEST_STRIDE = 2**40  # bytes


class Config(NamedTuple):
    """Keys (of dk, dv: rows) of a block, stages of the ring of buffers, groups of warps that multiply, and registers a
    thread: at the launch, which all have the same, and then those of the groups that multiply."""

    block: int
    stages: int
    groups: int
    at_launch: int
    registers: int


class Configs(NamedTuple):
    """None: not for such heads, whose gradients of keys and values do not fit the registers."""

    forward: Config
    dq: Config | None
    dkdv: Config | None


# By head_dim, padded: the first that is not smaller.
CONFIGS = {
    64: Configs(Config(128, 2, 3, 128, 160), Config(128, 3, 2, 168, 240), Config(128, 2, 2, 168, 240)),
    128: Configs(Config(128, 2, 2, 168, 240), Config(64, 4, 2, 168, 240), Config(64, 2, 2, 168, 240)),
    256: Configs(Config(64, 2, 2, 168, 240), None, None),
}
_SMALLEST_HEAD_DIM = 40  # below, half a block of 64 would be padding


@cache
def why_not_there() -> str | None:
    """Why this Triton cannot have these kernels; None where it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    import triton

    oldest, newest = (".".join(map(str, version)) for version in _VERSIONS)
    if not _VERSIONS[0] <= tuple(int(x) for x in triton.__version__.split(".")[:2]) <= _VERSIONS[1]:
        return f"they are known to work with Triton {oldest} to {newest}, this is {triton.__version__}"
    return None


def serves(q: Tensor, k: Tensor, v: Tensor, do: Tensor | None = None) -> bool:
    """Whether a tile can be theirs. do: of a backward."""
    matrices = (q, k, v) if do is None else (q, k, v, do)
    return (
        q.is_cuda
        and q.dtype.itemsize == 2
        and torch.cuda.get_device_capability(q.device) == CAPABILITY
        and why_not_there() is None
        and min(q.shape[2], k.shape[2]) >= _FEWEST
        and q.shape[-1] == v.shape[-1]
        and _SMALLEST_HEAD_DIM <= q.shape[-1] <= max(CONFIGS)
        and (do is None or configs(q.shape[-1])[1].dkdv is not None)
        and all(map(_is_ready, matrices))
    )


def _is_ready(x: Tensor) -> bool:
    """Whether the copy engine can read x where it is."""
    outer = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    strides = [stride * x.element_size() for size, stride in outer if size > 1]
    return (
        x.stride(-1) == 1
        and x.data_ptr() % _ALIGNMENT_BYTES == 0
        and x.shape[-1] * x.element_size() % _ALIGNMENT_BYTES == 0
        and all(0 < stride < _LARGEST_STRIDE and stride % _ALIGNMENT_BYTES == 0 for stride in strides)
    )


def configs(head_dim: int) -> tuple[int, Configs]:
    """(head_dim as blocks have it, their sizes)."""
    return next((dims, chosen) for dims, chosen in CONFIGS.items() if head_dim <= dims)


def absorb(state: SoftmaxState, q: Tensor, k: Tensor, v: Tensor, known: Bounds, factor: float) -> Tensor | None:
    """Of a positive factor, |scale| * log2(e). Returns flags [B, H, row blocks of 64], int32, where pairs are hidden:
    1 for blocks that are left as they were, since what hidden values are may have reached them."""
    from ringspan.kernels.hopper_forward import absorb_kernel

    dims, chosen = configs(q.shape[-1])
    config = chosen.forward
    flags = _flags(q)
    tensors = (state.acc, state.row_max, state.row_sum)
    _launch(
        absorb_kernel,
        config,
        q.shape[0] * q.shape[1] * -(-q.shape[2] // (config.groups * GROUP_ROWS)),
        *tensors,
        _descriptor(q, GROUP_ROWS, dims),
        _descriptor(k, config.block, dims),
        _descriptor(v, config.block, dims),
        known.lo,
        known.hi,
        flags,
        *(x.stride() for x in tensors),
        known.strides,
        num_heads=q.shape[1],
        group=q.shape[1] // k.shape[1],
        hides=int(known.hides),
        factor=factor,
        HEAD_DIM=q.shape[-1],
        GROUPS=config.groups,
        **known.common,
    )
    return flags if known.hides else None


def absorb_gradient(
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
) -> tuple[Tensor, Tensor] | None:
    """Returns flags of dk and dv [B, K, key blocks of 64] and of dq [B, H, row blocks of 64], as absorb does."""
    from ringspan.kernels.hopper_backward import absorb_dkdv_kernel, absorb_dq_kernel

    dims, (_, for_dq, for_dkdv) = configs(q.shape[-1])
    assert for_dq is not None and for_dkdv is not None, "serves says so"
    group = q.shape[1] // k.shape[1]
    numbers = {"scale": scale, "factor": scale * math.log2(math.e), "group": group}
    numbers |= {"hides": int(known.hides), "HEAD_DIM": q.shape[-1]} | known.common
    of_keys, of_rows = _flags(k), _flags(q)
    bounded = (lse, delta, known.lo, known.hi)
    strides = (lse.stride(), delta.stride(), known.strides)
    of_dkdv, of_dq = (for_dkdv.block, GROUP_ROWS), (GROUP_ROWS, for_dq.block)  # blocks of rows, of keys
    # One description may serve both kernels: four take as long on the host as half a launch.
    described = {blocks: _descriptors((q, k, v, do), blocks, dims) for blocks in {of_dkdv, of_dq}}

    ranges, range_strides = known.ranges(group, for_dkdv.groups * GROUP_ROWS, for_dkdv.block)
    _launch(
        absorb_dkdv_kernel,
        for_dkdv,
        k.shape[0] * k.shape[1] * -(-k.shape[2] // (for_dkdv.groups * GROUP_ROWS)),
        *(dk, dv),
        *described[of_dkdv],
        *(*bounded, ranges, of_keys),
        *(dk.stride(), dv.stride(), *strides, range_strides),
        num_kv_heads=k.shape[1],
        **numbers,
    )
    _launch(
        absorb_dq_kernel,
        for_dq,
        q.shape[0] * q.shape[1] * -(-q.shape[2] // (for_dq.groups * GROUP_ROWS)),
        dq,
        *described[of_dq],
        *(*bounded, of_rows),
        *(dq.stride(), *strides),
        num_heads=q.shape[1],
        **numbers,
    )
    return (of_keys, of_rows) if known.hides else None


def _descriptors(matrices: Sequence[Tensor], blocks: tuple[int, int], dims: int) -> list[Any]:
    """Of (q, k, v, do)."""
    rows, keys = blocks
    return [_descriptor(x, length, dims) for x, length in zip(matrices, (rows, keys, keys, rows), strict=True)]


def _flags(x: Tensor) -> Tensor:
    return torch.empty((*x.shape[:2], -(-x.shape[2] // GROUP_ROWS)), dtype=torch.int32, device=x.device)


def _descriptor(x: Tensor, length: int, dims: int) -> Any:
    """Of x [B, H, T, D] in blocks [1, 1, length, dims]; what is beyond its edges arrives as 0."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    strides = list(x.stride())
    for axis in (2, 1, 0):  # of an axis of length 1 torch's stride can be anything
        if x.shape[axis] == 1:
            strides[axis] = strides[axis + 1] * x.shape[axis + 1]
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, length, dims], _layout())


@cache
def _layout() -> Any:
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


def _launch(kernel: Any, config: Config, num_programs: int, *args: Any, **numbers: Any) -> None:
    sizes = {"STAGES": config.stages, "REGISTERS": config.registers}
    launch(kernel, num_programs, *args, **sizes, **numbers, num_warps=4, maxnreg=config.at_launch)
