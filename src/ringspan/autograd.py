"""torch.autograd and torch.compile around one call: its custom ops, and the formula that links two of them.

The whole call (checks, agreement, plan, loop) happens inside of the ops, so that graphs hold one node for it. A
group travels through a graph by its name. The ops' outputs alias no input. All ranks must reach them, so they count as
having side effects: torch.compile may drop none, though its outputs are unused, or known without it, being empty.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.fx.node import has_side_effect

from ringspan import call, errors
from ringspan.errors import RingspanError, UnsupportedError
from ringspan.options import Options, ranges_of
from ringspan.problem import UNBOUNDED
from ringspan.state import state_dtype
from ringspan.transport.table import resolve

_traced: WeakKeyDictionary[TracingContext, int] = WeakKeyDictionary()  # calls in the graph of each


def next_place_in_graph() -> int:
    """While a graph is traced, which of its calls this is: a constant in it. Ranks trace the same program.

    Inductor orders what is independent by the memory that it takes, and so by shapes, which differ between ranks.
    """
    context = TracingContext.try_get()
    if context is None:
        return 0
    _traced[context] = number = _traced.get(context, 0) + 1
    return number


# As torch.compiler.assume_constant_result does, which loads torch._dynamo, and with it Triton.
next_place_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.library.custom_op("ringspan::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    key_ranges: Sequence[Tensor],
    group: str,
    layout: str,
    left: int,
    right: int,
    scale: float | None,
    kernel: str,
    transport: str,
    agreement: bool,
    gradients: str,
    place_in_graph: int,
) -> tuple[Tensor, Tensor]:
    rest = (layout, left, right, scale, kernel, transport, agreement, gradients, place_in_graph)
    options = _options(q, group, cu_seqlens, key_ranges, *rest)
    return call.forward(resolve(group), q, k, v, options, sinks=sinks)


def _out_and_lse(q, k, v, *options):
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=state_dtype(q.dtype))


attend.register_fake(_out_and_lse)


@torch.library.custom_op("ringspan::attend_backward", mutates_args=())
def attend_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    key_ranges: Sequence[Tensor],
    group: str,
    layout: str,
    left: int,
    right: int,
    scale: float | None,
    kernel: str,
    transport: str,
    agreement: bool,
    gradients: str,
    place_in_graph: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rest = (layout, left, right, scale, kernel, transport, agreement, gradients, place_in_graph)
    options = _options(q, group, cu_seqlens, key_ranges, *rest)
    found = call.backward(resolve(group), d_out, d_lse, (q, k, v, out, lse), options)
    dq, dk, dv = (grad.to(q.dtype) for grad in found)
    return dq, dk, dv


@attend_backward.register_fake
def _(d_out, d_lse, q, k, v, out, lse, *options):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


@torch.library.custom_op("ringspan::decode", mutates_args=())
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    key_ranges: Sequence[Tensor],
    group: str,
    scale: float | None,
    kernel: str,
    transport: str,
    agreement: bool,
    place_in_graph: int,
) -> tuple[Tensor, Tensor]:
    rest = ("contiguous", UNBOUNDED, UNBOUNDED, scale, kernel, transport, agreement, "", place_in_graph)
    options = _options(q, group, None, key_ranges, *rest)
    return call.decode(resolve(group), q, k, v, options, sinks)


decode.register_fake(_out_and_lse)


def _refuse_second_derivative(ctx, *_):
    raise UnsupportedError("ring_attention is differentiable once: its second derivative is not computed.")


attend_backward.register_autograd(_refuse_second_derivative)


@torch.library.custom_op("ringspan::refuse", mutates_args=())
def refuse_later(q: Tensor, value_dim: int, kind: str, message: str, group: str) -> tuple[Tensor, Tensor]:
    """What a graph holds of a call that was refused while it was traced: the other ranks hear of it when it runs."""
    call.refuse(resolve(group), getattr(errors, kind, errors.ArgumentError)(message), q)


@refuse_later.register_fake
def _(q, value_dim, kind, message, group):
    return q.new_empty((*q.shape[:-1], value_dim)), q.new_empty(q.shape[:3])


# A graph that is differentiated needs a formula, though it never comes to use.
refuse_later.register_autograd(lambda ctx, *_: (None,) * 5)


def _options(
    q, group, cu_seqlens, key_ranges, layout, left, right, scale, kernel, transport, agreement, *rest
) -> Options:
    """What an op was given as the call knows it. If a mask's values cannot be had, the other ranks must hear of it."""
    try:
        documents = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
        ranges = ranges_of(key_ranges)
    except Exception as error:
        if not agreement:
            raise
        call.refuse(resolve(group), error, q)
    return Options(left, right, documents, ranges, layout, scale, kernel, transport, agreement, *rest)


def _keep(ctx, inputs, output) -> None:
    q, k, v, sinks, cu_seqlens, key_ranges, *options = inputs
    ctx.set_materialize_grads(False)
    # The mask as the caller gave it: autograd then refuses a backward after it was changed.
    ctx.save_for_backward(q, k, v, *output, sinks, cu_seqlens, *key_ranges)
    ctx.options = options


def _differentiate(ctx, d_out: Tensor | None, d_lse: Tensor | None):
    group, *_, agreement, gradients, _ = ctx.options
    try:
        q, k, v, out, lse, sinks, cu_seqlens, *key_ranges = ctx.saved_tensors
        if d_out is None:
            d_out = torch.zeros_like(out)
    except RingspanError:
        raise  # of a forward that a checkpoint runs again: on every rank alike, or told already
    except Exception as error:  # a tensor was changed in place here, say: the other ranks must hear of it
        if agreement and gradients != "sinks":
            with contextlib.suppress(RingspanError):
                call.refuse(resolve(group), error, d_out, d_lse)
        raise
    if gradients == "sinks":  # of nothing else, on any rank; and a sink's gradient is of this rank's rows
        grads = None, None, None
    else:
        grads = attend_backward(d_out, d_lse, q, k, v, out, lse, cu_seqlens, key_ranges, *ctx.options)
    d_sinks = _of_sinks(sinks, out, lse, d_out, d_lse) if ctx.needs_input_grad[3] else None
    return (*grads, d_sinks, None, [None] * len(key_ranges), *(None for _ in ctx.options))


def _of_sinks(sinks: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None) -> Tensor:
    """A sink is a key of value 0 and score s_h, so ds_h = sum over rows of p (0 - delta), p = exp(s_h - lse)."""
    delta = (d_out.to(lse.dtype) * out).sum(-1)
    if d_lse is not None:
        delta = delta - d_lse
    # Of a row with lse -inf the sink is -inf too.
    weights = torch.exp(sinks.to(lse.dtype).unsqueeze(-1) - torch.where(lse.isneginf(), 0.0, lse))
    return -(weights * delta).sum((0, 2)).to(sinks.dtype)


attend.register_autograd(_differentiate, setup_context=_keep)

for _op in (attend, attend_backward, decode, refuse_later):
    has_side_effect(_op._opoverload)
