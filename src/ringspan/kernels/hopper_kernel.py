"""Launches the kernels for Hopper: which calls they serve, in which blocks, and what is done anew after them."""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringspan.state import SoftmaxState
from ringspan.tile import Kind, RowIntervals

# Gluon is an experimental part of Triton, whose names still change: these are the versions it was run or compiled with.
_VERSIONS = ((3, 6), (3, 9))
_CAPABILITY = (9, 0)  # the only one with wgmma
_ALIGNMENT_BYTES = 16  # of the copy engine: where a matrix begins, and its strides
_GROUP_ROWS = 64
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
    forward: Config
    dq: Config
    dkdv: Config


# By head_dim, padded: the first that is not smaller.
CONFIGS = {
    64: Configs(Config(128, 2, 3, 128, 160), Config(128, 2, 2, 168, 240), Config(64, 3, 2, 168, 240)),
    128: Configs(Config(128, 2, 2, 168, 240), Config(64, 2, 2, 168, 240), Config(64, 2, 2, 168, 240)),
}
LARGEST_HEAD_DIM = max(CONFIGS)
_SMALLEST_HEAD_DIM = 40  # below, half a block of 64 would be padding


@cache
def is_there() -> bool:
    """Whether this Triton is one of those that these kernels are known to work with."""
    if find_spec("triton") is None:
        return False
    import triton

    version = tuple(int(x) for x in triton.__version__.split(".")[:2])
    return _VERSIONS[0] <= version <= _VERSIONS[1]


def serves(q: Tensor, k: Tensor, v: Tensor, *others: Tensor, visible: RowIntervals) -> bool:
    """Whether a tile can be theirs. others: further matrices to be read, as do."""
    return (
        q.is_cuda
        and q.dtype.itemsize == 2
        and torch.cuda.get_device_capability(q.device) == _CAPABILITY
        and is_there()
        and visible.band is not None
        and min(visible.num_rows, visible.num_keys) >= _FEWEST
        and _SMALLEST_HEAD_DIM <= q.shape[-1] <= LARGEST_HEAD_DIM
        and all(map(_is_ready, (q, k, v, *others)))
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


def absorb(state: SoftmaxState, q: Tensor, k: Tensor, v: Tensor, visible: RowIntervals, factor: float) -> Tensor | None:
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
        q.shape[0] * q.shape[1] * -(-q.shape[2] // (config.groups * _GROUP_ROWS)),
        *tensors,
        _descriptor(q, _GROUP_ROWS, dims),
        _descriptor(k, config.block, dims),
        _descriptor(v, config.block, dims),
        flags,
        *(x.stride() for x in tensors),
        num_heads=q.shape[1],
        group=q.shape[1] // k.shape[1],
        factor=factor,
        GROUPS=config.groups,
        **_rule(visible),
        HEAD_DIM=q.shape[-1],
    )
    return flags if _hides(visible) else None


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
    visible: RowIntervals,
    scale: float,
) -> tuple[Tensor, Tensor] | None:
    """Returns flags of dk and dv [B, K, key blocks of 64] and of dq [B, H, row blocks of 64], as absorb does."""
    from ringspan.kernels.hopper_backward import absorb_dkdv_kernel, absorb_dq_kernel

    dims, chosen = configs(q.shape[-1])
    numbers = {"scale": scale, "factor": scale * math.log2(math.e), "group": q.shape[1] // k.shape[1]}
    numbers |= _rule(visible) | {"HEAD_DIM": q.shape[-1]}
    flags = _flags(k), _flags(q)
    for kernel, config, owner, targets, heads, mine in (
        (absorb_dkdv_kernel, chosen.dkdv, k, (dk, dv), {"num_kv_heads": k.shape[1]}, flags[0]),
        (absorb_dq_kernel, chosen.dq, q, (dq,), {"num_heads": q.shape[1]}, flags[1]),
    ):
        of_rows, of_keys = (_GROUP_ROWS, config.block) if owner is q else (config.block, _GROUP_ROWS)
        programs = owner.shape[0] * owner.shape[1] * -(-owner.shape[2] // (config.groups * _GROUP_ROWS))
        _launch(
            kernel,
            config,
            programs,
            *targets,
            _descriptor(q, of_rows, dims),
            _descriptor(k, of_keys, dims),
            _descriptor(v, of_keys, dims),
            _descriptor(do, of_rows, dims),
            lse,
            delta,
            mine,
            *(x.stride() for x in (*targets, lse, delta)),
            **heads,
            **numbers,
        )
    return flags if _hides(visible) else None


def _flags(x: Tensor) -> Tensor:
    return torch.empty((*x.shape[:2], -(-x.shape[2] // _GROUP_ROWS)), dtype=torch.int32, device=x.device)


def _hides(visible: RowIntervals) -> bool:
    return visible.kind is not Kind.FULL


def _rule(visible: RowIntervals) -> dict[str, int]:
    assert visible.band is not None
    num_rows, num_keys = visible.num_rows, visible.num_keys
    lower = -num_rows if visible.band.lower is None else visible.band.lower
    upper = num_keys if visible.band.upper is None else visible.band.upper
    lower, upper = (min(max(edge, -num_rows), num_keys) for edge in (lower, upper))
    return {
        "num_rows": num_rows,
        "num_keys": num_keys,
        "lower": lower,
        "upper": upper,
        "hides": int(_hides(visible)),
    }


def _descriptor(x: Tensor, length: int, dims: int) -> Any:
    """Of x [B, H, T, D] in blocks [1, 1, length, dims]; what is beyond its edges arrives as 0."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    strides = list(x.stride())
    for axis in (2, 1, 0):  # of an axis of length 1 torch's stride can be anything
        if x.shape[axis] == 1:
            strides[axis] = strides[axis + 1] * x.shape[axis + 1]
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, length, dims], layout)


def _launch(kernel: Any, config: Config, num_programs: int, *args: Any, **numbers: Any) -> None:
    with torch.cuda.device(args[0].device):
        kernel[(num_programs,)](
            *args,
            STAGES=config.stages,
            REGISTERS=config.registers,
            **numbers,
            num_warps=4,
            maxnreg=config.at_launch,
        )
