"""What one rank can see of its own tensors: the refusal of those that break a rule by themselves.

Options are in `ringspan.options`; rules that need all ranks (lengths that do not belong together) in `ringspan.decide`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from ringspan.errors import ArgumentError, ArgumentTypeError, UnsupportedError, explain

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What one rank can see of q [B, H, T, D], k [B, K, S, D] and v [B, K, S, E] by itself."""
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        check_tensor(name, x)
        if x.shape[1] < 1 or x.shape[3] < 1:
            got = f"shape {shape_in_words(x.shape)}"
            raise ArgumentError(explain(f"{name} must have at least one head and head_dim 1.", got=got))
        if x.numel() and x.data_ptr() % x.element_size():
            raise ArgumentError(
                explain(f"{name}'s elements must be aligned in memory.", got="a view at an odd address", fix=".clone()")
            )
    check_alike(q, k, v)
    if k.shape[:3] != v.shape[:3]:
        raise ArgumentError(
            explain(
                "k and v must have one shape but for head_dim.",
                got=f"k: {shape_in_words(k.shape)}, v: {shape_in_words(v.shape)}",
            )
        )
    for axis, what in ((0, "batch size"), (3, "head_dim")):
        if q.shape[axis] != k.shape[axis]:
            raise ArgumentError(
                explain(
                    f"q and k must have one {what}.", got=f"q: {shape_in_words(q.shape)}, k: {shape_in_words(k.shape)}"
                )
            )
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
            explain(
                f"{name} must have 4 dimensions [batch, heads, tokens, head_dim].",
                got=f"shape {shape_in_words(x.shape)}",
            )
        )


def check_local(name: str, x: Any) -> None:
    """Refuse a DTensor, whatever else x is."""
    # By name: importing torch.distributed.tensor takes half a second.
    if type(x).__name__ == "DTensor":
        raise ArgumentTypeError(
            explain(f"{name} must be a tensor of this rank's own.", got="a DTensor", fix=f"pass {name}.to_local()")
        )


def check_dense(name: str, x: Tensor) -> None:
    """Refuse a tensor whose numbers cannot be looked at where it lies."""
    if x.layout != torch.strided or x.is_nested:
        got = "a nested tensor" if x.is_nested else str(x.layout)
        raise ArgumentTypeError(explain(f"{name} must be a dense tensor.", got=got, fix="use .to_dense()"))
    check_holds_numbers(**{name: x})
    if not torch.compiler.is_compiling():
        check_no_transforms(name, **{name: x})


def check_holds_numbers(**tensors: Tensor) -> None:
    """Refuse meta tensors, of which torch would make up a result without a word to the other ranks."""
    for name, x in tensors.items():
        if x.device.type == "meta":
            fix = "load it first; torch's FakeTensorMode tells shapes alone"
            raise ArgumentTypeError(explain(f"{name} must hold numbers.", got="a tensor on the meta device", fix=fix))


def check_carried_out(what: str, *given: object) -> None:
    """Refuse where torch imitates operations, or records them one by one. An exchange with other ranks is none of them:
    what it brings would be missing, or a constant of what was recorded. (ring_attention is one operation.)

    Nobody is told: where nothing is carried out, that is not either, and all ranks record the same program.
    """
    modes = torch._C._TorchDispatchModeKey
    imitated = torch._C._get_dispatch_mode(modes.FAKE) is not None or any(  # type: ignore[attr-defined]
        type(x).__name__ == "FakeTensor" for x in given
    )
    if imitated or torch.jit.is_tracing() or torch._C._get_dispatch_mode(modes.PROXY) is not None:  # type: ignore[attr-defined]
        raise UnsupportedError(
            explain(
                f"{what} cannot be recorded or imitated: what the other ranks hold would be missing.",
                got="a fake tensor, or FakeTensorMode" if imitated else "make_fx, torch.export or torch.jit.trace",
                fix="call it outside of what is traced; ring_attention may be within",
            )
        )


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
                got=f"shape {shape_in_words(sinks.shape)}, q has {q.shape[1]} heads",
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
                got=f"{x.dtype} of shape {shape_in_words(x.shape)}",
                fix=f"expected {'' if any_dtype else q.dtype} {shape_in_words(shape)}",
            )
        )


def shape_in_words(shape: Sequence[int]) -> str:
    return f"[{', '.join(f'{length}' for length in shape)}]"  # not str, which dynamo cannot trace of symbolic sizes
