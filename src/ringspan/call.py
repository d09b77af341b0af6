"""One call from a rank's tensors to its results: check -> agree -> decide in integers -> run the loop.

Below the custom ops and the SPMD entries, which both end here.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from ringspan import execute
from ringspan.agreement import CALL, RINGS, Agreed, Terms, agree, unchecked
from ringspan.errors import ArgumentError, ArgumentTypeError, LayoutError, RingspanError, explain
from ringspan.kernels import table as kernel_table
from ringspan.kernels.contract import Kernel
from ringspan.layout import Layout, check_name, from_lengths
from ringspan.problem import UNBOUNDED, Mask, Problem
from ringspan.schedule.contract import Travels
from ringspan.schedule.ring import ring_schedule, travelling_side
from ringspan.state import state_dtype
from ringspan.transport.contract import Channel, Transport

_LARGEST_INT = 1 << 62
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Options:
    """What was asked, normalised. Window sides: -1 is unbounded. gradients: which of q, k, v require grad."""

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    cu_seqlens: tuple[int, ...] | None = None
    layout: str = "contiguous"
    scale: float | None = None
    kernel: str = "auto"
    agreement: bool = True
    gradients: str = ""


@dataclass(frozen=True)
class Ring:
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
            digest = hashlib.blake2b(repr(self.groups).encode(), digest_size=12).hexdigest()
            terms[RINGS] = f"{len(self.groups)} groups of {len(self.groups[0])}, digest {digest}"
        if self.equal_lengths:
            terms["seqlen"] = num_queries
            terms["whether bounds are given"] = self.bounds is not None
        return terms


WHOLE_GROUP = Ring()


def forward(
    transport: Transport, q: Tensor, k: Tensor, v: Tensor, options: Options, ring: Ring = WHOLE_GROUP
) -> tuple[Tensor, Tensor]:
    """(out, lse) of this rank's queries; shapes as in `ringspan.ring_attention`."""

    def check() -> Terms:
        check_tensors(q, k, v)
        check_documents(options.cu_seqlens)
        return _terms("ring_attention", (q, k, v), options, ring)

    channel, agreed = begin(transport, check, options.agreement, ring)
    job = _decide(channel, agreed, options, q, k).job("keys", False, agreed.flipped, ring)
    with running(transport):
        return execute.forward(job, channel, q, k, v)


def backward(
    transport: Transport,
    do: Tensor,
    d_lse: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    options: Options,
    ring: Ring = WHOLE_GROUP,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the state's dtype, given saved = (q, k, v, out, lse) of the forward."""
    q, k, v, out, lse = saved

    def check() -> Terms:
        check_tensors(q, k, v)
        for name, x in (("the gradient of out", do), ("out", out)):
            _check_like(name, x, q)
        _check_like("lse", lse, q[..., 0], any_dtype=True)
        return _terms("the backward of ring_attention", (q, k, v, do), options, ring)

    channel, agreed = begin(transport, check, options.agreement, ring)
    decided = _decide(channel, agreed, options, q, k)
    # Bounds belong to the queries of a rank, so with them it is the keys that travel.
    travels = "keys" if ring.bounds is not None else travelling_side(decided.problem)
    job = decided.job(travels, True, agreed.flipped, ring)
    with running(transport):
        dtype = state_dtype(q.dtype)
        delta = (do.to(dtype) * out).sum(-1)
        if d_lse is not None:
            delta -= d_lse
        return execute.backward(job, channel, q, k, v, do, lse.to(dtype), delta)


def begin(
    transport: Transport, check: Callable[[], Terms], agreement: bool, ring: Ring = WHOLE_GROUP
) -> tuple[Channel, Agreed]:
    """This rank's own check, then the exchange with the others; the channel for what follows."""
    terms: Terms | RingspanError
    try:
        terms = check()
    except Exception as error:  # whatever it is, the others must hear of it now and not wait
        terms = _refusal(error)
    call = transport.begin_call()
    members = ring.members(transport)
    agreed = agree(transport, call, terms, ring.groups) if agreement else unchecked(terms, len(members))
    return transport.channel(call, members), agreed


def refuse(transport: Transport, error: Exception) -> NoReturn:
    """Take part in the agreement of a call that this rank refuses, so that no rank waits for it; raises."""
    refusal = _refusal(error)
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
    kernel: Kernel
    scale: float
    rank: int

    def job(self, travels: Travels, rides: bool, flipped: int, ring: Ring) -> execute.Job:
        schedule = ring_schedule(self.problem.mask, self.queries, self.keys, self.rank, travels, rides)
        q, k, v, do = (bool(flipped & bit) for bit in (_Q, _K, _V, _DO))
        wire = (k, v) if travels == "keys" else (q, do, False, False)
        return execute.Job(
            schedule, self.kernel, self.scale, self.queries.lengths, self.keys.lengths, wire, ring.bounds
        )


def _decide(channel: Channel, agreed: Agreed, options: Options, q: Tensor, k: Tensor) -> _Decided:
    mask = mask_of(sum(agreed.query_lengths), sum(agreed.key_lengths), channel.size, options)
    queries, keys = (from_lengths(options.layout, lengths) for lengths in (agreed.query_lengths, agreed.key_lengths))
    problem = Problem(
        mask, q.shape[0], q.shape[1], k.shape[1], q.shape[3], q.element_size(), state_dtype(q.dtype).itemsize
    )
    kernel = kernel_table.choose(options.kernel, q.dtype, q.device, q.shape[3])
    scale = q.shape[3] ** -0.5 if options.scale is None else options.scale
    return _Decided(problem, queries, keys, kernel, scale, channel.rank)


def mask_of(num_queries: int, num_keys: int, num_ranks: int, options: Options) -> Mask:
    """The mask of the whole sequence; refuses what has no meaning for its lengths."""
    mask = Mask(num_queries, num_keys, options.left, options.right, options.cu_seqlens)
    if num_queries != num_keys and (options.layout != "contiguous" or not mask.sees_all):
        what = f"layout={options.layout!r}" if mask.sees_all else "causal, window_size and cu_seqlens"
        raise LayoutError(
            explain(
                f"{what} cannot be used with cross attention of unequal lengths.",
                got=f"q: {num_queries} tokens, k: {num_keys} tokens over {num_ranks} ranks",
                fix='layout="contiguous" without a mask',
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
    return mask


_Q, _K, _V, _DO = 1, 2, 4, 8  # bits of Terms.flipped


def _terms(call: str, tensors: Sequence[Tensor], options: Options, ring: Ring) -> Terms:
    q, k = tensors[:2]
    documents = None
    if options.cu_seqlens is not None:
        digest = hashlib.blake2b(np.asarray(options.cu_seqlens, dtype=np.int64).tobytes(), digest_size=12)
        documents = f"{len(options.cu_seqlens) - 1} documents, digest {digest.hexdigest()}"
    kernel_table.choose(options.kernel, q.dtype, q.device, q.shape[3])
    common = {
        CALL: call,
        "batch": q.shape[0],
        "the number of query heads": q.shape[1],
        "the number of key/value heads": k.shape[1],
        "head_dim": q.shape[3],
        "dtype": str(q.dtype),
        "device type": q.device.type,
        "layout": options.layout,
        "causal and window_size, as (left, right)": [options.left, options.right],
        "cu_seqlens": documents,
        "softmax_scale": options.scale,
        "kernel": options.kernel,
        "which of q, k, v require grad": options.gradients,
        **ring.common_terms(q.shape[2]),
    }
    flipped = sum(bit for bit, x in zip((_Q, _K, _V, _DO), tensors, strict=False) if _lies_flipped(x))
    return Terms(common, q.shape[2], k.shape[2], flipped)


def _lies_flipped(x: Tensor) -> bool:
    """Whether the memory of [B, H, T, D] is that of a contiguous [B, H, D, T]."""
    return x.mT.is_contiguous() and not x.is_contiguous()


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What one rank can see of q [B, H, T, D], k and v [B, K, S, D] by itself."""
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        check_tensor(name, x)
        if x.numel() and x.data_ptr() % x.element_size():
            raise ArgumentError(
                explain(f"{name}'s elements must be aligned in memory.", got="a view at an odd address", fix=".clone()")
            )
    for name in ("k", "v"):
        for what in ("dtype", "device"):
            mine, wanted = getattr(named[name], what), getattr(q, what)
            if mine != wanted:
                raise ArgumentTypeError(
                    explain(f"q, k and v must share one {what}.", got=f"q: {wanted}, {name}: {mine}", fix="use .to()")
                )
    if k.shape != v.shape:
        raise ArgumentError(explain("k and v must have one shape [B, K, S, D].", got=f"k: {_shape(k)}, v: {_shape(v)}"))
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


def check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(explain(f"{name} must be a torch.Tensor.", got=str(type(x))))
    # By name: importing torch.distributed.tensor takes half a second.
    if type(x).__name__ == "DTensor":
        raise ArgumentTypeError(
            explain(f"{name} must be this rank's own shard.", got="a DTensor", fix=f"pass {name}.to_local()")
        )
    if x.dtype not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise ArgumentTypeError(explain(f"{name} has an unsupported dtype.", got=str(x.dtype), fix=f"one of {known}"))
    if x.layout != torch.strided:
        raise ArgumentTypeError(explain(f"{name} must be a dense tensor.", got=str(x.layout)))
    if x.ndim != 4:
        raise ArgumentError(
            explain(f"{name} must have 4 dimensions [batch, heads, tokens, head_dim].", got=f"shape {_shape(x)}")
        )
    if x.shape[1] < 1 or x.shape[3] < 1:
        raise ArgumentError(explain(f"{name} must have at least one head and head_dim 1.", got=f"shape {_shape(x)}"))


def _check_like(name: str, x: Tensor, like: Tensor, any_dtype: bool = False) -> None:
    if x.shape != like.shape or not (any_dtype or x.dtype == like.dtype):
        raise ArgumentError(
            explain(
                f"{name} does not fit q.",
                got=f"{x.dtype} of shape {_shape(x)}",
                fix=f"expected {'' if any_dtype else like.dtype} {_shape(like)}",
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
) -> Options:
    """Options in the form that the loop knows, or the refusal of what breaks a rule by itself."""
    check_name(layout)
    if not isinstance(causal, bool):
        raise ArgumentTypeError(explain("causal must be a bool.", got=repr(causal)))
    if not isinstance(agreement, bool):
        raise ArgumentTypeError(explain("agreement must be a bool.", got=repr(agreement)))
    left, right = _window(window_size)
    if causal:
        right = 0
    if not isinstance(kernel, str):
        raise ArgumentTypeError(explain("kernel must be a name.", got=repr(kernel), fix='"auto"'))
    scale = None if softmax_scale is None else _finite(softmax_scale)
    documents = None if cu_seqlens is None else _boundaries(cu_seqlens)
    check_documents(documents)
    return Options(left, right, documents, layout, scale, kernel, agreement, gradients)


def _window(window_size: Sequence[int]) -> tuple[int, int]:
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ArgumentTypeError(
            explain("window_size must be two integers (left, right).", got=repr(window_size), fix="(-1, -1) is none")
        ) from None
    for side in (left, right):
        if isinstance(side, bool) or not isinstance(side, int):
            raise ArgumentTypeError(explain("window_size must be two integers (left, right).", got=repr(window_size)))
        if not UNBOUNDED <= side <= _LARGEST_INT:
            raise ArgumentError(
                explain("window_size must be at least -1 on each side.", got=repr(window_size), fix="-1 is unbounded")
            )
    return left, right


def _finite(softmax_scale: float) -> float:
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
        raise ArgumentTypeError(explain("softmax_scale must be a number.", got=repr(softmax_scale)))
    # Kernels scale in float32, where what is larger is infinite.
    if not abs(softmax_scale) <= torch.finfo(torch.float32).max:
        raise ArgumentError(explain("softmax_scale must be finite (in float32).", got=repr(softmax_scale)[:80]))
    return float(softmax_scale)


def documents_tensor(cu_seqlens: Sequence[int] | Tensor | None) -> Tensor | None:
    """cu_seqlens as an int64 tensor on the CPU; its values are checked by `check_documents`."""
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, Tensor):
        return torch.tensor(_boundaries(cu_seqlens), dtype=torch.int64)
    if cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise ArgumentTypeError(
            explain(
                "cu_seqlens must be a 1-D tensor of integers.",
                got=f"{cu_seqlens.dtype} of shape {_shape(cu_seqlens)}",
            )
        )
    return cu_seqlens.detach().to("cpu", torch.int64)


def _boundaries(cu_seqlens: Sequence[int]) -> tuple[int, ...]:
    try:
        boundaries = tuple(map(operator.index, cu_seqlens))
    except TypeError:
        raise ArgumentTypeError(explain("cu_seqlens must hold integers.", got=repr(cu_seqlens)[:200])) from None
    if any(abs(boundary) > _LARGEST_INT for boundary in boundaries):
        raise ArgumentError(explain("cu_seqlens must hold 64-bit integers.", got=repr(boundaries)[:200]))
    return boundaries


def check_documents(boundaries: tuple[int, ...] | None) -> None:
    """Refuse boundaries that are not (0, ..., total), in order."""
    if boundaries is None:
        return
    if len(boundaries) < 2 or boundaries[0] != 0:
        raise ArgumentError(
            explain(
                "cu_seqlens must begin with 0 and end with the number of tokens.",
                got=repr(boundaries)[:200],
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
    return f"[{', '.join(map(str, shape))}]"
