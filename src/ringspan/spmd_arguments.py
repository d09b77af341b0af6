"""What one rank can see of the arguments of an SPMD entry by itself, and what the contract's words mean for a call."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ringspan import arrays
from ringspan.arguments import check_tensor
from ringspan.arrays import Array
from ringspan.errors import ArgumentError, ArgumentTypeError, explain, shown
from ringspan.kernels.table import UNROUNDED
from ringspan.options import Options, normalised_options
from ringspan.transport.contract import Transport

Groups = Sequence[Sequence[int]]


def check_cores(name: str, cores: int) -> None:
    if isinstance(cores, bool) or not isinstance(cores, int) or cores < 1:
        raise ArgumentError(explain(f"{name} must be an integer of at least 1.", got=shown(cores)))


def check_inputs(tensors: dict[str, Tensor]) -> None:
    for name, x in tensors.items():
        check_tensor(name, x)
        check_no_grad(name, x)


def check_no_grad(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            explain(
                "the SPMD entries are not differentiable.",
                got=f"{name} requires grad",
                fix="use ringspan.ring_attention, or call under torch.no_grad()",
            )
        )


def check_shapes(tensors: dict[str, Tensor], axes: Sequence[str], hint: str) -> None:
    """Refuse shapes that do not go together, in the axes that the caller's tensors have."""
    seen: dict[str, tuple[str, str]] = {}
    for (name, x), letters in zip(tensors.items(), axes, strict=True):
        told = f"{name}: {list(x.shape)} as [{letters.replace(' ', ', ')}]"
        for axis, size in zip(letters.split(), x.shape, strict=True):
            other, told_of_other = seen.setdefault(axis, (name, told))
            place = axes[list(tensors).index(other)].split().index(axis)
            if size != tensors[other].shape[place]:
                got = f"{told_of_other}; {told}"
                raise ArgumentError(explain(f"{other} and {name} must have one {axis}.", got=got, fix=hint))


def check_like_q(tensors: dict[str, Tensor]) -> None:
    q = tensors["q_ref"]
    for name in ("o_ref", "dy_ref"):
        x = tensors[name]
        if x.dtype != q.dtype or x.device != q.device:
            got = f"q_ref: {q.dtype} on {q.device}, {name}: {x.dtype} on {x.device}"
            raise ArgumentTypeError(explain(f"{name} must have q_ref's dtype and device.", got=got, fix="use .to()"))


def check_sizes(q: Tensor) -> None:
    if q.shape[2] < 1:
        fix = "ringspan.ring_attention takes empty shards"
        raise ArgumentError(explain("seqlen must be at least 1.", got=str(q.shape[2]), fix=fix))
    if q.shape[3] > 256:
        raise ArgumentError(explain("d must be from 1 to 256.", got=str(q.shape[3])))


def options_of(scale: float | None, causal: bool, striped: bool, striped_name: str) -> Options:
    if striped and not causal:
        raise ArgumentError(
            explain(
                f"{striped_name} requires use_causal_mask.",
                got=f"{striped_name}=True, use_causal_mask=False",
                fix="without a mask the order of the tokens does not matter: leave it False",
            )
        )
    if causal and (isinstance(scale, bool) or scale != 1.0):
        raise ArgumentError(
            explain(
                "with use_causal_mask q must be scaled beforehand and softmax_scale must be 1.0.",
                got=f"softmax_scale={scale!r}",
                fix="pass q * d ** -0.5 and softmax_scale=1.0",
            )
        )
    return normalised_options(
        causal=bool(causal),
        layout="striped" if striped else "contiguous",
        softmax_scale=scale,
        kernel=UNROUNDED,
        agreement=True,
        gradients="",
    )


def rings_of(groups: Groups | None, num_workers: int, transport: Transport) -> tuple[tuple[int, ...], ...] | None:
    """The rings of the world, or None for one of all; the caller's own is in it exactly once."""
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 1:
        raise ArgumentError(explain("num_workers must be an integer of at least 1.", got=shown(num_workers)))
    if groups is None:
        if num_workers == transport.size:
            return None
        if num_workers == 1:
            return tuple((rank,) for rank in range(transport.size))
        raise ArgumentError(
            explain(
                "without replica_groups num_workers must be the size of the world, or 1.",
                got=f"num_workers={num_workers}, a world of {transport.size}",
                fix="pass replica_groups=((...), ...), each of num_workers ranks",
            )
        )
    try:
        rings = tuple(tuple(map(operator.index, group)) for group in groups)
    except (TypeError, ValueError):
        raise ArgumentTypeError(
            explain("replica_groups must be tuples of ranks.", got=shown(groups), fix="((0, 1), (2, 3))")
        ) from None
    _check_rings(rings, num_workers, transport.size)
    return rings


def _check_rings(rings: tuple[tuple[int, ...], ...], num_workers: int, world: int) -> None:
    for ring in rings:
        if len(ring) != num_workers:
            raise ArgumentError(
                explain(
                    "each of replica_groups must hold num_workers ranks.",
                    got=f"{ring} has {len(ring)}, num_workers={num_workers}",
                )
            )
    listed = sorted(rank for ring in rings for rank in ring)
    if listed != list(range(world)):
        twice = sorted({rank for rank in listed if listed.count(rank) > 1})
        absent = sorted(set(range(world)) - set(listed))
        beyond = sorted(set(listed) - set(range(world)))
        told = [
            f"{what} {ranks}" for what, ranks in (("missing", absent), ("twice", twice), ("unknown", beyond)) if ranks
        ]
        raise ArgumentError(
            explain(
                f"replica_groups must name each of the world's {world} ranks exactly once.",
                got="; ".join(told),
            )
        )


def bounds_of(low: Array | None, high: Array | None, q: Tensor, allowed: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """(lo, hi), int64 [B, H, T], from bounds of shape [B*H, T, 1] or [B, T]."""
    if low is None and high is None:
        return None
    if low is None or high is None:
        raise ArgumentError(explain("bound_min and bound_max go together.", got="only one of them"))
    if not allowed:
        raise ArgumentError(
            explain(
                "bound_min and bound_max require use_causal_mask and striped input.",
                fix="ringspan.ring_attention takes cu_seqlens with every layout",
            )
        )
    lo, hi = (_bound(name, x, q) for name, x in (("bound_min", low), ("bound_max", high)))
    return lo, hi


def _bound(name: str, bound: Array, q: Tensor) -> np.ndarray:
    batch, heads, rows, _ = q.shape
    tensor = arrays.to_torch(name, bound)
    check_no_grad(name, tensor)
    values = np.asarray(tensor.detach().to("cpu", torch.float64))
    if values.shape == (batch * heads, rows, 1):
        values = values.reshape(batch, heads, rows)
    elif values.shape == (batch, rows):
        values = np.broadcast_to(values[:, None, :], (batch, heads, rows))
    else:
        raise ArgumentError(
            explain(
                f"{name} has the wrong shape.",
                got=str(list(values.shape)),
                fix=f"[b*h, seqlen, 1] = [{batch * heads}, {rows}, 1], or [b, seqlen] = [{batch}, {rows}]",
            )
        )
    if np.isnan(values).any():
        raise ArgumentError(explain(f"{name} must not hold NaN."))
    # An integer j is >= x iff j >= ceil(x), and < x iff j < ceil(x); beyond the shard all bounds are alike.
    return np.ceil(np.clip(values, 0, rows)).astype(np.int64)
