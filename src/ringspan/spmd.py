"""The SPMD entries: ring attention under the contract that Trainium's `ring_attention_spmd_fwd` / `_bwd` publish.

Shapes, defaults and the meaning of every argument are that contract's; the work is `ringspan.call`'s. Where the
contract gives wrong or surprising results without a word, these refuse or are right: docs/spmd.md has the list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ringspan import arrays, call
from ringspan.arguments import check_alike, check_carried_out, check_tensors
from ringspan.arrays import Array
from ringspan.errors import ArgumentError, ArgumentTypeError, explain, shown
from ringspan.kernels.threads import limited_to
from ringspan.reshard import untraced
from ringspan.spmd_arguments import (
    Groups,
    bounds_of,
    check_cores,
    check_inputs,
    check_like_q,
    check_no_grad,
    check_shapes,
    check_sizes,
    options_of,
    rings_of,
)
from ringspan.state import NEVER
from ringspan.terms import Membership
from ringspan.transport.contract import Transport
from ringspan.transport.table import group_name, resolve

LSE_ROWS = 128  # lse is [b, h, 128, ceil(seqlen / 128)]: query s at [.., s % 128, s // 128]
_LSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@untraced
def _forward(
    q: Array,
    k: Array,
    v: Array,
    replica_groups: Groups | None = None,
    num_workers: int = 1,
    softmax_scale: float | None = None,
    use_causal_mask: bool = False,
    striped_input: bool = False,
    training: bool = False,
    lse_dtype: Any = torch.float32,
    tp_q: bool = False,
    tp_k: bool = False,
    bound_min: Array | None = None,
    bound_max: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Ring attention of this worker's queries over the keys and values of all workers of its ring.

    Args:
        q: [b, h, seqlen, d] if tp_q else [b, h, d, seqlen]. k: [b, h_kv, seqlen, d] if tp_k else
            [b, h_kv, d, seqlen]. v: [b, h_kv, seqlen, d]. h a multiple of h_kv, d from 1 to 256, seqlen equal
            on all workers. torch tensors, or NumPy arrays (results then are NumPy arrays). Not differentiable.
        replica_groups: tuples of ranks of the world, each an independent ring of num_workers; worker r is the
            r-th entry. None: one ring of the whole world, or with num_workers=1 a ring of one on every rank.
        softmax_scale: default 1/sqrt(d). With use_causal_mask q must be pre-scaled and this must be 1.0.
        use_causal_mask: worker r holds positions r*seqlen ...; a query sees keys at or before its position.
        striped_input: worker r holds positions r, r + n, r + 2n, ...; only with use_causal_mask.
        training: also return lse. lse_dtype: its dtype; float16 is refused where lse is beyond 65504.
        bound_min, bound_max: [b*h, seqlen, 1], packed documents: local query i sees only local keys j with
            bound_min[i] <= j < bound_max[i] of every worker; only with use_causal_mask and striped_input.

    Returns:
        o [b, h, seqlen, d] in q's dtype; if training (o, lse), lse [b, h, 128, ceil(seqlen/128)], the natural
        logarithm of the sum of exp of the scaled, masked scores; padding is 0. A fully masked row: o 0, lse 0.

    Raises: as `ringspan.ring_attention`.
    """
    check_carried_out("ring_attention_spmd_fwd", q, k, v)
    transport = _world()
    try:
        kind = arrays.kind_of(q=q, k=k, v=v)
        tensors = {name: arrays.to_torch(name, x) for name, x in (("q", q), ("k", k), ("v", v))}
        check_inputs(tensors)
        tq, tk, tv = tensors["q"], tensors["k"], tensors["v"]
        check_alike(tq, tk, tv)
        axes = (
            "b h seqlen d" if tp_q else "b h d seqlen",
            "b h_kv seqlen d" if tp_k else "b h_kv d seqlen",
            "b h_kv seqlen d",
        )
        check_shapes(tensors, axes, "tp_q and tp_k say how q and k lie: [b, h, d, seqlen] unless True")
        tq, tk = (tq if tp_q else tq.mT), (tk if tp_k else tk.mT)
        check_sizes(tq)
        check_tensors(tq, tk, tv)
        lse_type = _lse_dtype(lse_dtype, tq.dtype)
        arrays.check_returnable(lse_type, kind)
        options = options_of(softmax_scale, use_causal_mask, striped_input, "striped_input")
        bounds = bounds_of(bound_min, bound_max, tq, use_causal_mask and striped_input)
        ring = Membership(rings_of(replica_groups, num_workers, transport), True, bounds)
    except Exception as error:
        call.refuse(transport, error, q, k, v)
    with torch.no_grad():
        out, lse = call.forward(transport, tq, tk, tv, options, ring)
        o = arrays.from_torch(out, kind)
        if not training:
            return o
        with call.running(transport):
            return o, arrays.from_torch(_rounded(_folded(lse), lse_type), kind)


@untraced
def _backward(
    q_ref: Array,
    k_ref: Array,
    v_ref: Array,
    o_ref: Array,
    dy_ref: Array,
    lse_ref: Array,
    use_causal_mask: bool = False,
    mixed_precision: bool = True,
    softmax_scale: float | None = None,
    num_workers: int = 1,
    lnc_size: int = 1,
    replica_groups: Groups | None = None,
    striped_attention: bool = False,
    bound_min: Array | None = None,
    bound_max: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of `ring_attention_spmd_fwd` with respect to this worker's q, k and v.

    Args:
        q_ref, o_ref, dy_ref: [B, N, D, S]; k_ref, v_ref: [B, N_kv, D, S]; of one dtype. lse_ref: the forward's; one
            in bfloat16 or float16 makes gradients wrong by about 1e-2 or 1e-3.
        softmax_scale: the scale of the scores, default 1/sqrt(D); with use_causal_mask it must be 1.0, and dq is
            then the gradient with respect to the pre-scaled q.
        mixed_precision: accepted; accumulation is float32 either way. lnc_size: from 2 on as the launch [lnc]; 1, the
            default, leaves a plain call all cores. ring_attention_spmd_bwd[1](...) computes on one.
        bound_min, bound_max: [B, S], or the forward's [B*N, S, 1].
        The rest as in the forward (striped_attention is its striped_input).

    Returns:
        dq [B, N, D, S], dk and dv [B, N_kv, D, S], float32 (float64 for float64 inputs).
    """
    check_carried_out("ring_attention_spmd_bwd", q_ref, k_ref, v_ref)
    transport = _world()
    try:
        named = {"q_ref": q_ref, "k_ref": k_ref, "v_ref": v_ref, "o_ref": o_ref, "dy_ref": dy_ref}
        kind = arrays.kind_of(**named, lse_ref=lse_ref)
        tensors = {name: arrays.to_torch(name, x) for name, x in named.items()}
        check_inputs(tensors)
        q, k, v, out, dy = tensors.values()
        check_alike(q, k, v)
        check_shapes(
            tensors, ("B N D S", "B N_kv D S", "B N_kv D S", "B N D S", "B N D S"), "all five are [B, N, D, S]"
        )
        check_like_q(tensors)
        q, k, v, out, dy = (x.mT for x in (q, k, v, out, dy))
        check_sizes(q)
        check_tensors(q, k, v)
        check_cores("lnc_size", lnc_size)
        lse = arrays.to_torch("lse_ref", lse_ref)
        check_no_grad("lse_ref", lse)
        lse = _unfolded(lse, q)
        options = options_of(softmax_scale, use_causal_mask, striped_attention, "striped_attention")
        bounds = bounds_of(bound_min, bound_max, q, use_causal_mask and striped_attention)
        ring = Membership(rings_of(replica_groups, num_workers, transport), True, bounds)
    except Exception as error:
        call.refuse(transport, error, q_ref, k_ref, v_ref)
    # Without a launch, lnc_size says how many cores; the default 1 leaves a plain call all that the worker has.
    with torch.no_grad(), limited_to(lnc_size) if lnc_size > 1 else nullcontext():
        grads = call.backward(transport, dy, None, (q, k, v, out, lse), options, ring)
        dq, dk, dv = (arrays.from_torch(grad.mT, kind) for grad in grads)
        return dq, dk, dv


class _Entry:
    """A function that can also be launched as entry[lnc](...), lnc the cores that a worker computes with.

    Results have the same bits for every lnc. Which kernels honour it, `ringspan doctor` says.
    """

    def __init__(self, name: str, function: Callable) -> None:
        self._function = function
        self.__doc__ = function.__doc__
        self.__name__ = self.__qualname__ = name
        self.__wrapped__ = function  # so that inspect.signature and help() show the arguments

    def __call__(self, *args, **kwargs):
        return self._function(*args, **kwargs)

    def __getitem__(self, lnc: int) -> Callable:
        check_cores("lnc", lnc)

        @functools.wraps(self._function)
        def launched(*args, **kwargs):
            with limited_to(lnc):
                return self._function(*args, **kwargs)

        return launched

    def __repr__(self) -> str:
        return f"<{self.__name__}>"


ring_attention_spmd_fwd = _Entry("ring_attention_spmd_fwd", _forward)
ring_attention_spmd_bwd = _Entry("ring_attention_spmd_bwd", _backward)


def _world() -> Transport:
    return resolve(group_name(None))


def _lse_dtype(wanted: Any, dtype: torch.dtype) -> torch.dtype:
    found = arrays.torch_dtype(wanted)
    if found not in _LSE_DTYPES or (found == torch.float64 and dtype != torch.float64):
        raise ArgumentTypeError(
            explain("lse_dtype must be float32, bfloat16 or float16 (float64 with float64 inputs).", got=shown(wanted))
        )
    return found


def _folded(lse: Tensor) -> Tensor:
    """[b, h, s] as [b, h, 128, ceil(s/128)]; padding and rows that saw nothing are 0."""
    batch, heads, rows = lse.shape
    columns = -(-rows // LSE_ROWS)
    padded = lse.new_zeros(batch, heads, columns * LSE_ROWS)
    padded[..., :rows] = torch.where(lse == NEVER, 0.0, lse)
    return padded.view(batch, heads, columns, LSE_ROWS).mT.contiguous()


def _rounded(lse: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = lse.to(dtype)
    # Only float16 has less range than lse: its inf would make every gradient of the row 0.
    if dtype == torch.float16 and bool((rounded.isinf() & lse.isfinite()).any()):
        raise ArgumentError(
            explain(
                "lse does not fit into float16.",
                got=f"an lse of {float(lse[lse.isfinite()].abs().max()):.6g}, the largest number is 65504",
                fix="lse_dtype=torch.float32",
            )
        )
    return rounded


def _unfolded(lse: Tensor, q: Tensor) -> Tensor:
    batch, heads, rows, _ = q.shape
    expected = (batch, heads, LSE_ROWS, -(-rows // LSE_ROWS))
    if tuple(lse.shape) != expected or not lse.is_floating_point():
        raise ArgumentError(
            explain(
                "lse_ref must be the lse that the forward returned.",
                got=f"{lse.dtype} of shape {list(lse.shape)}",
                fix=f"shape {list(expected)}",
            )
        )
    return lse.mT.reshape(batch, heads, -1)[..., :rows]
