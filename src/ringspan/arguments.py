"""What one rank can say of its own arguments: the normalised options, and the refusal of what breaks a rule by itself.

Rules that need all ranks (lengths that do not belong together) are in `ringspan.call`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from ringspan.errors import ArgumentError, ArgumentTypeError, UnsupportedError, explain, shown
from ringspan.layout import check_name
from ringspan.problem import UNBOUNDED, KeyRanges

_LARGEST_INT = 1 << 62
_LARGEST_SCALE = torch.finfo(torch.float32).max / 1.5  # kernels multiply by scale * log2(e) in float32
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint32, torch.uint16, torch.uint8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Options:
    """What was asked, normalised. Window sides: -1 is unbounded. gradients: which of q, k, v, sinks require grad.

    place_in_graph: of a compiled call, which of its graph's calls it is, from 1; else 0.
    """

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    cu_seqlens: tuple[int, ...] | None = None
    key_ranges: tuple[KeyRanges, ...] | None = None
    layout: str = "contiguous"
    scale: float | None = None
    kernel: str = "auto"
    transport: str = "auto"
    agreement: bool = True
    gradients: str = ""
    place_in_graph: int = 0


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What one rank can see of q [B, H, T, D], k [B, K, S, D] and v [B, K, S, E] by itself."""
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        check_tensor(name, x)
        if x.shape[1] < 1 or x.shape[3] < 1:
            got = f"shape {_shape(x)}"
            raise ArgumentError(explain(f"{name} must have at least one head and head_dim 1.", got=got))
        if x.numel() and x.data_ptr() % x.element_size():
            raise ArgumentError(
                explain(f"{name}'s elements must be aligned in memory.", got="a view at an odd address", fix=".clone()")
            )
    check_alike(q, k, v)
    if k.shape[:3] != v.shape[:3]:
        raise ArgumentError(
            explain("k and v must have one shape but for head_dim.", got=f"k: {_shape(k)}, v: {_shape(v)}")
        )
    for axis, what in ((0, "batch size"), (3, "head_dim")):
        if q.shape[axis] != k.shape[axis]:
            raise ArgumentError(explain(f"q and k must have one {what}.", got=f"q: {_shape(q)}, k: {_shape(k)}"))
    if q.shape[1] % k.shape[1]:
        raise ArgumentError(
            explain(
                "the number of query heads must be a multiple of the number of key/value heads.",
                got=f"q: {q.shape[1]} heads, k: {k.shape[1]} heads",
            )
        )


def check_alike(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse tensors of several dtypes or on several devices."""
    for name, x in (("k", k), ("v", v)):
        for what in ("dtype", "device"):
            mine, wanted = getattr(x, what), getattr(q, what)
            if mine != wanted:
                raise ArgumentTypeError(
                    explain(f"q, k and v must share one {what}.", got=f"q: {wanted}, {name}: {mine}", fix="use .to()")
                )


def check_tensor(name: str, x: Tensor) -> None:
    """What can be seen of one tensor [B, H, T, D] by itself, also while a graph is traced."""
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(explain(f"{name} must be a torch.Tensor.", got=str(type(x))))
    check_local(name, x)
    if x.dtype not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise ArgumentTypeError(explain(f"{name} has an unsupported dtype.", got=str(x.dtype), fix=f"one of {known}"))
    if x.layout != torch.strided or x.is_nested:
        got, fix = ("a nested tensor", "pack it, cu_seqlens=") if x.is_nested else (str(x.layout), "use .to_dense()")
        raise ArgumentTypeError(explain(f"{name} must be a dense tensor.", got=got, fix=fix))
    if x.ndim != 4:
        raise ArgumentError(
            explain(f"{name} must have 4 dimensions [batch, heads, tokens, head_dim].", got=f"shape {_shape(x)}")
        )


def check_local(name: str, x: Any) -> None:
    """Refuse a DTensor, whatever else x is."""
    # By name: importing torch.distributed.tensor takes half a second.
    if type(x).__name__ == "DTensor":
        raise ArgumentTypeError(
            explain(f"{name} must be a tensor of this rank's own.", got="a DTensor", fix=f"pass {name}.to_local()")
        )


def check_holds_numbers(**tensors: Tensor) -> None:
    """Refuse meta tensors, of which torch would make up a result without a word to the other ranks."""
    for name, x in tensors.items():
        if x.device.type == "meta":
            fix = "load it first; torch's FakeTensorMode tells shapes alone"
            raise ArgumentTypeError(explain(f"{name} must hold numbers.", got="a tensor on the meta device", fix=fix))


def check_can_be_kept(gradients: str, **tensors: Tensor | None) -> None:
    """Refuse what autograd cannot keep for a backward: it would say so after the ring has run, to this rank alone."""
    for name, x in tensors.items():
        if gradients and x is not None and x.is_inference():
            fix = f"{name}.clone() outside of inference mode, or torch.no_grad() around the call"
            raise ArgumentTypeError(
                explain(
                    f"{name} must not be of inference mode where gradients are asked for.",
                    got=f"a tensor of torch.inference_mode, and gradients of {gradients}",
                    fix=fix,
                )
            )


def check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    """Refuse sinks unless they are a number a query head, on q's device."""
    if sinks is None:
        return
    check_local("sinks", sinks)
    if not isinstance(sinks, Tensor) or sinks.dtype not in DTYPES or sinks.layout != torch.strided:
        got = f"{sinks.dtype}, {sinks.layout}" if isinstance(sinks, Tensor) else str(type(sinks))
        fix = f"a dense tensor of shape [{q.shape[1]}]"
        raise ArgumentTypeError(explain("sinks must be a torch.Tensor of floating point numbers.", got=got, fix=fix))
    if sinks.shape != q.shape[1:2]:
        raise ArgumentError(
            explain(
                "sinks must have one number for each query head.",
                got=f"shape {_shape(sinks)}, q has {q.shape[1]} heads",
                fix=f"shape [{q.shape[1]}]",
            )
        )
    if sinks.device != q.device:
        raise ArgumentTypeError(
            explain("sinks and q must share one device.", got=f"q: {q.device}, sinks: {sinks.device}", fix="use .to()")
        )


def check_no_transforms(what: str, **tensors: Tensor | None) -> None:
    """Refuse forward-mode differentiation, where torch would go on with a derivative of 0, and torch.func."""
    for name, x in tensors.items():
        if x is None:
            continue
        if forward_ad.unpack_dual(x).tangent is not None:
            raise UnsupportedError(
                explain(
                    f"{what} has no forward-mode derivative.",
                    got=f"{name} carries a tangent (torch.func.jvp, jacfwd or torch.autograd.forward_ad)",
                    fix="reverse mode: backward() or torch.autograd.grad",
                )
            )
        if not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(x):
            raise UnsupportedError(
                explain(
                    f"{what} does not go through the transforms of torch.func.",
                    got=f"{name} inside of grad, vjp, vmap or another",
                    fix="backward() or torch.autograd.grad; instead of vmap, the batch dimension",
                )
            )


def check_like(name: str, x: Tensor, q: Tensor, shape: Sequence[int], any_dtype: bool = False) -> None:
    """Refuse x unless it has q's device and dtype, and the shape."""
    if x.device != q.device:
        raise ArgumentTypeError(
            explain(f"{name} and q must share one device.", got=f"q: {q.device}, {name}: {x.device}", fix="use .to()")
        )
    if x.shape != torch.Size(shape) or not (any_dtype or x.dtype == q.dtype):
        raise ArgumentError(
            explain(
                f"{name} does not fit q and v.",
                got=f"{x.dtype} of shape {_shape(x)}",
                fix=f"expected {'' if any_dtype else q.dtype} {_shape_of(shape)}",
            )
        )


def normalised_options(
    *,
    causal: bool,
    window_size: Sequence[int],
    cu_seqlens: Sequence[int] | None,
    layout: str,
    softmax_scale: float | None,
    kernel: str,
    agreement: bool,
    gradients: str,
    transport: str = "auto",
) -> Options:
    """Options in the form that the loop knows, or the refusal of what breaks a rule by itself."""
    check_name(layout)
    if not isinstance(causal, bool):
        raise ArgumentTypeError(explain("causal must be a bool.", got=shown(causal), fix="bool(...)"))
    if not isinstance(agreement, bool):
        raise ArgumentTypeError(explain("agreement must be a bool.", got=shown(agreement)))
    left, right = _window(window_size)
    if causal:
        right = 0
    if not isinstance(kernel, str):
        raise ArgumentTypeError(explain("kernel must be a name.", got=shown(kernel), fix='"auto"'))
    scale = None if softmax_scale is None else _finite(softmax_scale)
    documents = None if cu_seqlens is None else _boundaries(cu_seqlens)
    check_documents(documents)
    return Options(
        left,
        right,
        cu_seqlens=documents,
        layout=layout,
        scale=scale,
        kernel=kernel,
        transport=transport,
        agreement=agreement,
        gradients=gradients,
    )


def _window(window_size: Sequence[int]) -> tuple[int, int]:
    try:
        left, right = window_size if isinstance(window_size, (Sequence, np.ndarray)) else ()
    except (TypeError, ValueError):
        raise ArgumentTypeError(
            explain("window_size must be two integers (left, right).", got=shown(window_size), fix="(-1, -1) is none")
        ) from None
    for side in (left, right):
        if isinstance(side, bool) or not isinstance(side, (int, np.integer)):
            fix = "int(...) of each"
            raise ArgumentTypeError(
                explain("window_size must be two integers (left, right).", got=shown(window_size), fix=fix)
            )
        if not UNBOUNDED <= side <= _LARGEST_INT:
            raise ArgumentError(
                explain(
                    "window_size must be at least -1 and at most 2**62 on each side.",
                    got=shown(window_size),
                    fix="-1 is unbounded",
                )
            )
    return int(left), int(right)


def _finite(softmax_scale: float) -> float:
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float, np.integer, np.floating)):
        got = f"{type(softmax_scale).__name__} {softmax_scale!r}"[:200]
        raise ArgumentTypeError(explain("softmax_scale must be a number.", got=got, fix="float(...)"))
    if not abs(softmax_scale) <= _LARGEST_SCALE:
        fix = f"at most {_LARGEST_SCALE:.1e}: kernels scale in float32"
        raise ArgumentError(explain("softmax_scale must be finite in float32.", got=repr(softmax_scale)[:80], fix=fix))
    return float(softmax_scale)


def documents_tensor(cu_seqlens: Sequence[int] | Tensor | None) -> Tensor | None:
    """cu_seqlens as an int64 tensor on the CPU; its values are checked by `check_documents`."""
    if cu_seqlens is None:
        return None
    check_local("cu_seqlens", cu_seqlens)
    if not isinstance(cu_seqlens, Tensor):
        return torch.tensor(_boundaries(cu_seqlens), dtype=torch.int64, device="cpu")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in _INTEGERS:
        raise ArgumentTypeError(
            explain(
                "cu_seqlens must be a 1-D tensor of integers.",
                got=f"{cu_seqlens.dtype} of shape {_shape(cu_seqlens)}",
            )
        )
    check_dense("cu_seqlens", cu_seqlens)
    return _on_cpu(cu_seqlens)


def documents_of(cu_seqlens: Tensor | None) -> tuple[int, ...] | None:
    """The boundaries that `documents_tensor` made a tensor of, checked."""
    boundaries = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    check_documents(boundaries)
    return boundaries


def ranges_tensors(key_ranges: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """key_ranges, one or several, as int64 tensors on the CPU; whether they fit is for those to check who know."""
    if key_ranges is None:
        return []
    check_local("key_ranges", key_ranges)
    parts = [key_ranges] if isinstance(key_ranges, Tensor) else key_ranges
    if not isinstance(parts, (list, tuple)) or not parts or not all(isinstance(part, Tensor) for part in parts):
        got = shown(key_ranges) if isinstance(parts, (list, tuple)) else str(type(key_ranges))
        fix = "torch.tensor(...) of shape [T, 2] or [batch, T, 2], or several of these"
        raise ArgumentTypeError(explain("key_ranges must be a torch.Tensor, or a list of some.", got=got, fix=fix))
    for part in parts:
        check_local("key_ranges", part)
        if part.dtype not in _INTEGERS:
            fix = f"(start, stop) of the keys of each query, as one of {', '.join(map(str, _INTEGERS))}"
            raise ArgumentTypeError(explain("key_ranges must hold integers.", got=str(part.dtype), fix=fix))
        check_dense("key_ranges", part)
        if part.ndim not in (2, 3) or part.shape[-1] != 2 or part.shape != parts[0].shape:
            raise ArgumentError(
                explain(
                    "key_ranges must have a (start, stop) for each query, several of them one shape.",
                    got=f"shape {' and '.join(_shape(x) for x in parts[:8])}",
                    fix="shape [T, 2] or [batch, T, 2]",
                )
            )
    return [_on_cpu(part) for part in parts]


def _on_cpu(mask: Tensor) -> Tensor:
    """int64; of a tensor of inference mode, which autograd cannot keep, a copy."""
    mask = mask.detach().to("cpu", torch.int64)
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not mask.is_inference():
        return mask
    return mask.clone()


def check_dense(name: str, x: Tensor) -> None:
    """Refuse a tensor whose numbers cannot be looked at where it lies."""
    if x.layout != torch.strided or x.is_nested:
        got = "a nested tensor" if x.is_nested else str(x.layout)
        raise ArgumentTypeError(explain(f"{name} must be a dense tensor.", got=got, fix="use .to_dense()"))
    check_holds_numbers(**{name: x})
    if not torch.compiler.is_compiling():
        check_no_transforms(name, **{name: x})


def check_ranges(key_ranges: tuple[KeyRanges, ...] | None, q: Tensor) -> None:
    """Refuse key ranges of another number of batch entries, and some that overlap."""
    if key_ranges is None:
        return
    if key_ranges[0].batch not in (None, q.shape[0]):
        raise ArgumentError(
            explain(
                "key_ranges [B, T, 2] must have q's batch size.",
                got=f"B {key_ranges[0].batch}, q: batch {q.shape[0]}",
                fix="[T, 2] holds for all batch entries",
            )
        )
    overlapping = _overlapping(key_ranges)
    if overlapping:
        raise ArgumentError(
            explain(
                "several key_ranges must not overlap, or a query would see keys twice.",
                got=f"those at {overlapping[0]} and {overlapping[1]} do",
                fix="start the one where the other stops",
            )
        )


@lru_cache(maxsize=8)
def _overlapping(key_ranges: tuple[KeyRanges, ...]) -> tuple[int, int] | None:
    """Where two are that overlap."""
    pairs = combinations(enumerate(key_ranges), 2)
    return next(((i, j) for (i, first), (j, second) in pairs if first.overlaps(second)), None)


def _boundaries(cu_seqlens: Sequence[int]) -> tuple[int, ...]:
    try:
        boundaries = tuple(map(operator.index, cu_seqlens))
    except TypeError:
        raise ArgumentTypeError(explain("cu_seqlens must hold integers.", got=shown(cu_seqlens))) from None
    if any(abs(boundary) > _LARGEST_INT for boundary in boundaries):
        raise ArgumentError(explain("cu_seqlens must hold 64-bit integers.", got=shown(boundaries)))
    return boundaries


def check_documents(boundaries: tuple[int, ...] | None) -> None:
    """Refuse boundaries that are not (0, ..., total), in order."""
    if boundaries is None:
        return
    if len(boundaries) < 2 or boundaries[0] != 0:
        raise ArgumentError(
            explain(
                "cu_seqlens must begin with 0 and end with the number of tokens.",
                got=shown(boundaries),
                fix="(0, end of the first document, ..., total)",
            )
        )
    for place, (start, stop) in enumerate(pairwise(boundaries)):
        if stop < start:
            raise ArgumentError(
                explain("cu_seqlens must not decrease.", got=f"{start} then {stop} at index {place + 1}")
            )


def _shape(x: Tensor) -> str:
    return _shape_of(x.shape)


def _shape_of(shape: Sequence[int]) -> str:
    return f"[{', '.join(f'{length}' for length in shape)}]"  # not str, which dynamo cannot trace of symbolic sizes
