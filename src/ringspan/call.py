"""One call from a rank's tensors to its results: check -> agree -> decide in integers -> run the loop.

Below the custom ops and the SPMD entries, which both end here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ringspan import execute
from ringspan.agreement import (
    CALL,
    DEVICE_TYPE,
    RINGS,
    Agreed,
    Terms,
    agree,
    agreed_before,
    check_met,
    remember,
    unchecked,
)
from ringspan.arguments import Options, check_documents, check_like, check_ranges, check_tensors
from ringspan.errors import ArgumentError, LayoutError, RingspanError, UnsupportedError, explain
from ringspan.kernels import table as kernel_table
from ringspan.kernels.contract import Kernel, captures
from ringspan.kernels.triton_bounds import mask_is_not_captured
from ringspan.layout import Layout, from_lengths
from ringspan.problem import UNBOUNDED, Mask, Problem
from ringspan.schedule.ring import ring_schedule, travelling_side
from ringspan.state import state_dtype
from ringspan.transport.contract import Channel, Transport


@dataclass(frozen=True)
class Membership:
    """Which ranks of the group form this rank's ring, and what only the SPMD entries ask for.

    groups: the rings that run side by side and take part in one agreement; None: one ring of the whole group.
    equal_lengths: whether all ranks must hold equally many tokens.
    bounds: per local query [lo, hi) of local key indices, [B, H, T].
    """

    groups: tuple[tuple[int, ...], ...] | None = None
    equal_lengths: bool = False
    bounds: tuple[np.ndarray, np.ndarray] | None = None

    def members(self, transport: Transport) -> Sequence[int]:
        if self.groups is None:
            return range(transport.size)
        return next(ring for ring in self.groups if transport.rank in ring)

    def common_terms(self, num_queries: int) -> dict[str, object]:
        terms: dict[str, object] = {}
        if self.groups is not None:
            shown = str(self.groups) if len(str(self.groups)) < 100 else f"digest {_digest(self.groups)}"
            terms[RINGS] = f"{len(self.groups)} of {len(self.groups[0])}: {shown}"
        elif self.equal_lengths:
            terms[RINGS] = "one ring of all"
        if self.equal_lengths:
            terms["seqlen"] = num_queries
            terms["whether bounds are given"] = self.bounds is not None
        return terms


WHOLE_GROUP = Membership()


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
        terms = _terms("ring_attention", (q, k, v), options, ring)
        terms.common["whether there are sinks"] = sinks is not None
        return replace(terms, place=options.place_in_graph)

    with on_device_of(q), transport.one_call():
        channel, agreed, number = begin(transport, check, options.agreement, ring)
        with interruption_told(transport):
            _check_capture(q, v, options, ring)
            job = _decide(channel, agreed, options, q, k, v).job(False, agreed.flipped, ring, sinks is not None)
        with running(transport):
            out, lse = execute.forward(job, channel, q, k, v, sinks)
    _forwards.note(lse, number)
    return out, lse


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
        terms = _terms("the backward of ring_attention", (q, k, v, do), options, ring)
        return replace(terms, forward=_forwards.number_of(lse))

    with on_device_of(q), transport.one_call():
        channel, agreed, _ = begin(transport, check, options.agreement, ring)
        with interruption_told(transport):
            _check_capture(q, v, options, ring)
            job = _decide(channel, agreed, options, q, k, v).job(True, agreed.flipped, ring)
        with running(transport):
            dtype = state_dtype(q.dtype)
            if 0 in do.stride():  # of a sum, expanded: kernels read rows, Hopper's with strides that are not 0
                do = do.contiguous()
            delta = (do.to(dtype) * out).sum(-1)
            if d_lse is not None:
                delta -= d_lse
            return execute.backward(job, channel, q, k, v, do, lse.to(dtype), delta)


class _Forwards:
    """The number of the call that an lse came from, as long as its memory lives.

    The memory tells, since a graph of torch.compile holds nothing but tensors. A copy (of a rank that keeps what it
    saved elsewhere) has no number, and then this rank's is not compared.
    """

    def __init__(self) -> None:
        # A weak reference keeps the address from becoming another's.
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def note(self, lse: Tensor, number: int) -> None:
        if len(self._known) % 64 == 63:
            for address, (reference, _) in list(self._known.items()):
                if reference.expired():
                    self._known.pop(address, None)
        reference = StorageWeakRef(lse.untyped_storage())
        self._known[reference.cdata] = reference, number

    def number_of(self, lse: Tensor) -> int:
        _, number = self._known.get(lse.untyped_storage()._cdata, (None, 0))
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
    kernel = _kernel_for(options, q, v)
    if (options.left, options.right) != (UNBOUNDED, UNBOUNDED) and not captures(kernel):
        raise UnsupportedError(
            explain(
                "this masked call cannot be captured into a CUDA graph.",
                got=f"kernel {kernel.name!r}, which waits for the GPU in the middle of it: {q.dtype}, head_dim "
                f"{max(q.shape[3], v.shape[3])}",
                fix='what kernel="triton" serves, a call without a mask, or run this one outside of the graph',
            )
        )


def _kernel_for(options: Options, q: Tensor, v: Tensor, only_tile: bool = False) -> Kernel:
    return kernel_table.choose(options.kernel, q.dtype, q.device, max(q.shape[3], v.shape[3]), only_tile)


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


@dataclass(frozen=True)
class _Decided:
    """What all ranks of a ring derive alike from what they agreed on."""

    problem: Problem
    queries: Layout
    keys: Layout
    kernel: Callable[[bool], Kernel]  # given whether one tile is all that this rank computes
    scale: float
    rank: int

    def job(self, backward: bool, flipped: int, ring: Membership, sinks: bool = False) -> execute.Job:
        # Bounds belong to the queries of a rank, so with them it is the keys that travel.
        travels = "keys" if ring.bounds is not None else travelling_side(self.problem, backward)
        rides = backward or travels == "queries"
        schedule = ring_schedule(self.problem.mask, self.queries, self.keys, self.rank, travels, rides)
        # Sinks, and for travelling queries the keys of other ranks, join what a tile makes of a row.
        only_tile = travels == "keys" and not sinks and sum(len(step.tiles) for step in schedule.steps) == 1
        kernel = self.kernel(only_tile)
        q, k, v, do = (bool(flipped & bit) for bit in (_Q, _K, _V, _DO))
        wire = (k, v) if travels == "keys" else (q, do, False, False) if backward else (q,)
        return execute.Job(schedule, kernel, self.scale, self.queries.lengths, self.keys.lengths, wire, ring.bounds)


def _decide(channel: Channel, agreed: Agreed, options: Options, q: Tensor, k: Tensor, v: Tensor) -> _Decided:
    mask = mask_of(sum(agreed.query_lengths), sum(agreed.key_lengths), channel.size, options)
    documents = options.cu_seqlens if options.layout == "packed" else None  # they would be kept with the layout
    queries, keys = (
        from_lengths(options.layout, lengths, documents) for lengths in (agreed.query_lengths, agreed.key_lengths)
    )
    itemsizes = q.element_size(), state_dtype(q.dtype).itemsize
    problem = Problem(mask, q.shape[0], q.shape[1], k.shape[1], q.shape[3], *itemsizes, v.shape[3])
    kernel = partial(_kernel_for, options, q, v)
    scale = q.shape[3] ** -0.5 if options.scale is None else options.scale
    return _Decided(problem, queries, keys, kernel, scale, channel.rank)


def mask_of(num_queries: int, num_keys: int, num_ranks: int, options: Options) -> Mask:
    """The mask of the whole sequence; refuses what has no meaning for its lengths."""
    mask = Mask(num_queries, num_keys, options.left, options.right, options.cu_seqlens, options.key_ranges)
    if num_queries != num_keys and (options.layout != "contiguous" or mask.compares_positions):
        what, fix = f"layout={options.layout!r}", 'layout="contiguous"'
        if mask.compares_positions:
            what = "causal, window_size and cu_seqlens"
            fix = "no mask, or key_ranges alone, which say who sees what (ringspan.masks.continued: later queries)"
        raise LayoutError(
            explain(
                f"{what} cannot be used with cross attention of unequal lengths.",
                got=f"q: {num_queries} tokens, k: {num_keys} tokens over {num_ranks} ranks",
                fix=fix,
            )
        )
    if options.cu_seqlens is not None and options.cu_seqlens[-1] != num_queries:
        raise ArgumentError(
            explain(
                "cu_seqlens must end at the number of tokens of the whole sequence.",
                got=f"it ends at {options.cu_seqlens[-1]}, the ranks hold {num_queries} tokens",
                fix="boundaries are global, the same on every rank: (0, ..., total)",
            )
        )
    if options.key_ranges is not None and options.key_ranges[0].num_queries != num_queries:
        raise ArgumentError(
            explain(
                "key_ranges must have a range for each query of the whole sequence.",
                got=f"{options.key_ranges[0].num_queries} ranges, the ranks hold {num_queries} queries",
                fix="the same tensor [T, 2] or [B, T, 2] on every rank, T of all ranks together",
            )
        )
    return mask


_Q, _K, _V, _DO = 1, 2, 4, 8  # bits of Terms.flipped


def _terms(call: str, tensors: Sequence[Tensor], options: Options, ring: Membership) -> Terms:
    q, k, v = tensors[:3]
    ranges = None
    if options.key_ranges is not None:
        digest = _digest(tuple(part.digest for part in options.key_ranges))
        ranges = f"{len(options.key_ranges)} for each of {options.key_ranges[0].num_queries} queries, digest {digest}"
    # Chosen again after the exchange; here, so that a rank whose kernels all decline refuses before it.
    _kernel_for(options, q, v)
    common = {
        CALL: call,
        "batch": q.shape[0],
        "the number of query heads": q.shape[1],
        "the number of key/value heads": k.shape[1],
        "head_dim": q.shape[3],
        "head_dim of v": v.shape[3],
        "dtype": str(q.dtype),
        DEVICE_TYPE: q.device.type,
        **_mask_terms(options, ring),
        "cu_seqlens": documents_in_words(options.cu_seqlens),
        "key_ranges": ranges,
        "softmax_scale": options.scale,
        "kernel": options.kernel,
        "transport": options.transport,
        "which of q, k, v and sinks require grad": options.gradients or "none",
        **ring.common_terms(q.shape[2]),
    }
    flipped = sum(bit for bit, x in zip((_Q, _K, _V, _DO), tensors, strict=False) if _lies_flipped(x))
    return Terms(common, q.shape[2], k.shape[2], flipped, options.transport, q.device.type)


def _mask_terms(options: Options, ring: Membership) -> dict[str, object]:
    """By the names that the caller knows."""
    if ring.equal_lengths:  # the SPMD entries
        return {"use_causal_mask": options.right == 0, "striped_input": options.layout == "striped"}
    return {
        "layout": options.layout,
        "causal and window_size, as (left, right)": [options.left, options.right],
    }


def documents_in_words(cu_seqlens: tuple[int, ...] | None) -> str | None:
    """What stands for them where ranks compare."""
    return None if cu_seqlens is None else f"{len(cu_seqlens) - 1} documents, digest {_digest(cu_seqlens)}"


def _digest(numbers: tuple) -> str:
    """Stands for nested tuples of integers of any length in a message of fixed size."""
    return hashlib.blake2b(repr(numbers).encode(), digest_size=12).hexdigest()


def _lies_flipped(x: Tensor) -> bool:
    """Whether the memory of [B, H, T, D] is that of a contiguous [B, H, D, T]."""
    return x.mT.is_contiguous() and not x.is_contiguous()
