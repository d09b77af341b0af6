"""One call from a rank's tensors to its results: check -> agree -> decide in integers -> run the loop.

Below the custom ops and the SPMD entries, which both end here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ringspan import execute
from ringspan.agreement import Agreed, Terms, agree, agreed_before, check_met, remember, unchecked
from ringspan.arguments import check_like, check_tensors
from ringspan.decide import decide, kernel_for, scale_of, tiles_of_own_keys
from ringspan.errors import ArgumentError, RingspanError, UnsupportedError, explain
from ringspan.kernels.contract import captures
from ringspan.kernels.triton_bounds import mask_is_not_captured
from ringspan.options import Options, check_documents, check_ranges
from ringspan.problem import UNBOUNDED
from ringspan.state import state_dtype
from ringspan.terms import WHOLE_GROUP, Membership, terms_of
from ringspan.transport.contract import Channel, Transport


def forward(
    transport: Transport,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    ring: Membership = WHOLE_GROUP,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of this rank's queries; shapes as in `ringspan.ring_attention`."""

    def check() -> Terms:
        check_tensors(q, k, v)
        check_documents(options.cu_seqlens)
        check_ranges(options.key_ranges, q)
        kernel_for(options, q, v)  # chosen again later; here, so that a rank whose kernels all decline refuses
        terms = terms_of("ring_attention", (q, k, v), options, ring)
        terms.common["whether there are sinks"] = sinks is not None
        return replace(terms, place=options.place_in_graph)

    with on_device_of(q), transport.one_call():
        channel, agreed, number = begin(transport, check, options.agreement, ring)
        with interruption_told(transport):
            _check_capture(q, v, options, ring)
            job = decide(channel, agreed, options, ring, q, k, v, backward=False, sinks=sinks is not None)
        with running(transport):
            out, lse = execute.forward(job, channel, q, k, v, sinks)
    _forwards.note(lse, number, transport)
    return out, lse


def decode(
    transport: Transport, q: Tensor, k: Tensor, v: Tensor, options: Options, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries that all ranks have; shapes as in `ringspan.decode_attention`."""

    def check() -> Terms:
        check_tensors(q, k, v)
        check_ranges(options.key_ranges, q)
        kernel_for(options, q, v)
        terms = terms_of("decode_attention", (q, k, v), options, WHOLE_GROUP)
        terms.common["the number of queries"] = q.shape[2]
        terms.common["whether there are sinks"] = sinks is not None
        return replace(terms, place=options.place_in_graph)

    with on_device_of(q), transport.one_call():
        channel, agreed, _ = begin(transport, check, options.agreement)
        with interruption_told(transport):
            _check_capture(q, v, options, WHOLE_GROUP)
            tiles = tiles_of_own_keys(q.shape[2], agreed.key_lengths, channel.rank, options)
            kernel = kernel_for(options, q, v)
        with running(transport):
            return execute.decode(kernel, tiles, scale_of(options, q), channel, q, k, v, sinks)


def backward(
    transport: Transport,
    do: Tensor,
    d_lse: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    options: Options,
    ring: Membership = WHOLE_GROUP,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the state's dtype, given saved = (q, k, v, out, lse) of the forward."""
    q, k, v, out, lse = saved

    def check() -> Terms:
        check_tensors(q, k, v)
        for name, x in (("the gradient of out", do), ("out", out)):
            check_like(name, x, q, (*q.shape[:3], v.shape[3]))
        check_like("lse", lse, q, q.shape[:3], any_dtype=True)
        kernel_for(options, q, v)
        terms = terms_of("the backward of ring_attention", (q, k, v, do), options, ring)
        return replace(terms, forward=_forwards.number_of(lse, transport))

    with on_device_of(q), transport.one_call():
        channel, agreed, _ = begin(transport, check, options.agreement, ring)
        with interruption_told(transport):
            _check_capture(q, v, options, ring)
            job = decide(channel, agreed, options, ring, q, k, v, backward=True)
        with running(transport):
            dtype = state_dtype(q.dtype)
            if 0 in do.stride():  # of a sum, expanded: kernels read rows, Hopper's with strides that are not 0
                do = do.contiguous()
            delta = (do.to(dtype) * out).sum(-1)
            if d_lse is not None:
                delta -= d_lse
            return execute.backward(job, channel, q, k, v, do, lse.to(dtype), delta)


class MadeOn:
    """The transport of a forward, for its backward to compare with; a graph that keeps this keeps no group alive.

    torch gives a name anew after destroy_process_group, perhaps to other ranks, and a graph holds the name.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = weakref.ref(transport)  # bare, dynamo would take it for the transport

    def check(self, transport: Transport) -> None:
        if self._transport() is not transport and not transport.is_alone:
            raise ArgumentError(
                explain(
                    "the group of the forward is not that of its backward.",
                    got="another of the same name: made since, or of another worker",
                    fix="keep a group until the last backward on it is done, or make the forward call again",
                )
            )


class _Forwards:
    """The number of the call that an lse came from, as long as its memory lives.

    The memory tells, since a graph of torch.compile holds nothing but tensors. A copy (of a rank that keeps what it
    saved elsewhere) has no number, and then this rank's is not compared.
    """

    def __init__(self) -> None:
        # A weak reference keeps the address from becoming another's.
        self._known: dict[int, tuple[StorageWeakRef, int, MadeOn]] = {}

    def note(self, lse: Tensor, number: int, transport: Transport) -> None:
        if len(self._known) % 64 == 63:
            for address, (reference, *_) in list(self._known.items()):
                if reference.expired():
                    self._known.pop(address, None)
        reference = StorageWeakRef(lse.untyped_storage())
        self._known[reference.cdata] = reference, number, MadeOn(transport)

    def number_of(self, lse: Tensor, transport: Transport) -> int:
        found = self._known.get(lse.untyped_storage()._cdata)
        if found is None:
            return 0
        _, number, made_on = found
        made_on.check(transport)
        return number


_forwards = _Forwards()


def on_device_of(*given: object) -> AbstractContextManager:
    """CUDA's streams, and NCCL, go by the current device: it must be that of the call's tensors.

    given: these, or whatever was passed for them.
    """
    found = next((x.device for x in given if isinstance(x, Tensor) and x.device.type == "cuda"), None)
    return nullcontext() if found is None else torch.cuda.device(found)


def begin(
    transport: Transport, check: Callable[[], Terms], agreement: bool, ring: Membership = WHOLE_GROUP
) -> tuple[Channel, Agreed, int]:
    """This rank's own check, then the exchange with the others; the channel for what follows, and the call's number.

    While a CUDA graph is captured nothing can be exchanged: what was agreed on in a call before holds.
    """
    terms: Terms | RingspanError
    members = ring.members(transport)
    with interruption_told(transport):
        try:
            terms = check()
        except Exception as error:  # whatever it is, the others must hear of it now and not wait
            terms = _refusal(error)
        captured = isinstance(terms, Terms) and _is_captured(terms.device_type) and not transport.is_alone
        if captured:
            check_met(transport)
        call = transport.begin_call()
        agreed = _agreed(transport, call, terms, agreement, ring, captured)
        assert isinstance(terms, Terms)  # a refusal was raised by the agreement
        channel = transport.channel(call, members, terms.transport, terms.device_type)
        if terms.device_type == "cuda" and transport.capturable and not captured:
            remember(transport, terms, agreed if agreement else None)
        return channel, agreed, call


@contextmanager
def interruption_told(transport: Transport):
    """Around what fails on every rank alike, if it fails: only an interruption must be told, for the others go on."""
    try:
        yield
    except RingspanError:
        raise  # on every rank alike, or told already
    except BaseException as error:
        transport.fail(error)
        raise


def _is_captured(device_type: str) -> bool:
    return device_type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check_capture(q: Tensor, v: Tensor, options: Options, ring: Membership) -> None:
    """Of a mask, or a mask's kernel, that no graph can hold, on every rank alike: before any of them has begun."""
    if not _is_captured(q.device.type):
        return
    if any(rule is not None for rule in (options.cu_seqlens, options.key_ranges, ring.bounds)):
        raise mask_is_not_captured()
    kernel = kernel_for(options, q, v)
    if (options.left, options.right) != (UNBOUNDED, UNBOUNDED) and not captures(kernel):
        raise UnsupportedError(
            explain(
                "this masked call cannot be captured into a CUDA graph.",
                got=f"kernel {kernel.name!r}, which waits for the GPU in the middle of it: {q.dtype}, head_dim "
                f"{max(q.shape[3], v.shape[3])}",
                fix='what kernel="triton" serves, a call without a mask, or run this one outside of the graph',
            )
        )


def _agreed(
    transport: Transport, call: int, terms: Terms | RingspanError, agreement: bool, ring: Membership, captured: bool
) -> Agreed:
    if not agreement:
        return unchecked(terms, len(ring.members(transport)))
    if captured:
        assert isinstance(terms, Terms)
        return agreed_before(transport, terms)
    return agree(transport, call, terms, ring.groups)


def refuse(transport: Transport, error: Exception, *given: object) -> NoReturn:
    """Take part in the agreement of a call that this rank refuses, so that no rank waits for it; raises.

    given: what was passed for its tensors.
    """
    refusal = _refusal(error)
    with on_device_of(*given), transport.one_call(), interruption_told(transport):
        agree(transport, transport.begin_call(), refusal)
    raise refusal


def _refusal(error: Exception) -> RingspanError:
    if isinstance(error, RingspanError):
        return error
    refusal = ArgumentError(f"{type(error).__name__}: {error}")
    refusal.__cause__ = error
    return refusal


@contextmanager
def running(transport: Transport):
    """Around everything that only some ranks may fail at: a failure is told to the others before it is raised."""
    try:
        # The caller's autocast must not reach the float32 arithmetic inside.
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    except BaseException as error:
        transport.fail(error)
        raise
