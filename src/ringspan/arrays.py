"""torch tensors and NumPy arrays, without copies where memory can be shared."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ringspan.errors import ArgumentTypeError, UnsupportedError, explain

Array = Tensor | np.ndarray
Kind = Literal["torch", "numpy"]


def kind_of(**named: Any) -> Kind:
    """What all of the arrays are; refuses mixtures."""
    kinds: dict[str, str] = {}
    for name, x in named.items():
        if not isinstance(x, (Tensor, np.ndarray)):
            raise ArgumentTypeError(explain(f"{name} must be a torch tensor or a NumPy array.", got=str(type(x))))
        kinds[name] = "torch" if isinstance(x, Tensor) else "numpy"
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise ArgumentTypeError(explain("torch tensors and NumPy arrays cannot be mixed in one call.", got=told))
    return "numpy" if "numpy" in kinds.values() else "torch"


def to_torch(name: str, x: Any) -> Tensor:
    """x as a tensor that shares its memory (copied: read-only, unaligned and reversed NumPy arrays, negated views)."""
    if isinstance(x, Tensor):
        return x.resolve_neg()  # kernels read memory as it lies
    if not isinstance(x, np.ndarray):
        raise ArgumentTypeError(explain(f"{name} must be a torch tensor or a NumPy array.", got=str(type(x))))
    if isinstance(x, np.ma.MaskedArray):
        raise ArgumentTypeError(
            explain(
                f"{name} must not be a masked array: its mask would be ignored.", got=str(type(x)), fix="x.filled(...)"
            )
        )
    if not (x.flags.writeable and x.flags.aligned) or any(stride < 0 for stride in x.strides):
        x = x.copy()
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    try:
        return torch.from_numpy(x)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(explain(f"{name} has an unsupported NumPy dtype.", got=str(x.dtype))) from error


def from_torch(x: Tensor, kind: Kind) -> Array:
    """x, or its memory as a NumPy array. bfloat16 needs the package ml_dtypes."""
    if kind == "torch":
        return x
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy().view(_numpy_bfloat16())
    return x.numpy()


def check_returnable(dtype: torch.dtype, kind: Kind) -> None:
    """Refuse now what `from_torch` could not return later."""
    if kind == "numpy" and dtype == torch.bfloat16:
        _numpy_bfloat16()


def torch_dtype(dtype: Any) -> torch.dtype | None:
    """A torch, NumPy or ml_dtypes dtype, or its name, as torch's; None if there is no such."""
    if isinstance(dtype, torch.dtype):
        return dtype
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        return None
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def _numpy_bfloat16() -> np.dtype:
    try:
        import ml_dtypes
    except ImportError:
        raise UnsupportedError(
            explain("NumPy has no bfloat16 of its own.", fix="pip install ml_dtypes, or lse_dtype=float32")
        ) from None
    return np.dtype(ml_dtypes.bfloat16)
