"""What a call is asked, in the form that the loop knows, and the refusal of what breaks a rule by itself."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise

import numpy as np
import torch
from torch import Tensor

from ringspan.arguments import check_dense, check_local, shape_in_words
from ringspan.errors import ArgumentError, ArgumentTypeError, explain, shown
from ringspan.layout import check_name
from ringspan.problem import UNBOUNDED, KeyRanges

_LARGEST_INT = 1 << 62
_LARGEST_SCALE = torch.finfo(torch.float32).max / 1.5  # kernels multiply by scale * log2(e) in float32
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint32, torch.uint16, torch.uint8)


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


def normalised_options(
    *,
    softmax_scale: float | None,
    kernel: str,
    agreement: bool,
    gradients: str,
    causal: bool = False,
    window_size: Sequence[int] = (UNBOUNDED, UNBOUNDED),
    cu_seqlens: Sequence[int] | None = None,
    layout: str = "contiguous",
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
                got=f"{cu_seqlens.dtype} of shape {shape_in_words(cu_seqlens.shape)}",
            )
        )
    check_dense("cu_seqlens", cu_seqlens)
    return _on_cpu(cu_seqlens)


def documents_of(cu_seqlens: Tensor | None) -> tuple[int, ...] | None:
    """The boundaries that `documents_tensor` made a tensor of, checked."""
    boundaries = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    check_documents(boundaries)
    return boundaries


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
                    got=f"shape {' and '.join(shape_in_words(x.shape) for x in parts[:8])}",
                    fix="shape [T, 2] or [batch, T, 2]",
                )
            )
    return [_on_cpu(part) for part in parts]


def ranges_of(tensors: Sequence[Tensor]) -> tuple[KeyRanges, ...] | None:
    """The values of what `ranges_tensors` made."""
    return tuple(KeyRanges.of(part.numpy()) for part in tensors) or None


def _on_cpu(mask: Tensor) -> Tensor:
    """int64; of a tensor of inference mode, which autograd cannot keep, a copy."""
    mask = mask.detach().to("cpu", torch.int64)
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not mask.is_inference():
        return mask
    return mask.clone()


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
