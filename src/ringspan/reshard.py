"""Between a full tensor and its shards: taking a shard out, and gathering all of them on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ringspan.agreement import CALL, DEVICE_TYPE, Agreed, Terms
from ringspan.arguments import check_carried_out
from ringspan.call import MadeOn, begin, interruption_told, on_device_of, running
from ringspan.errors import UnsupportedError
from ringspan.layout import Layout, check_name, from_lengths, shard_length, split
from ringspan.options import documents_of
from ringspan.state import state_dtype
from ringspan.terms import documents_in_words
from ringspan.transport.contract import Channel, Parcel, Spec, Transport
from ringspan.transport.table import resolve

_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(fn: _Function) -> _Function:
    """torch.compile breaks its graph at fn and leaves all that it calls alone; traced, an exchange with other ranks
    would be taken to pieces, and fail where lengths are symbolic.

    As torch.compiler.disable does, which loads torch._dynamo, and with it Triton.
    A torch without these names would trace it.
    """
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    except ImportError:
        return fn
    marked: Any = fn
    set_code_exec_strategy(marked.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = "call it outside of what is compiled with fullgraph=True"
    return fn


def take(x: Tensor, dim: int, ranges: Sequence[range]) -> Tensor:
    """A contiguous copy of x at some positions of `dim`."""
    parts = [_at(x, dim, piece) for piece in ranges]
    if not parts:
        return x.narrow(dim, 0, 0).clone()
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("ringspan::shard", mutates_args=())
def shard_in_graph(x: Tensor, dim: int, layout: str, cu_seqlens: Tensor | None, rank: int, num_ranks: int) -> Tensor:
    """`take` of a rank's shard as one node of a graph."""
    return take(x, dim, _ranges_in_graph(x.shape[dim], layout, cu_seqlens, rank, num_ranks))


@shard_in_graph.register_fake
def _(x, dim, layout, cu_seqlens, rank, num_ranks):
    check_name(layout)
    length = shard_length(layout, x.shape[dim], rank, num_ranks)
    return x.new_empty((*x.shape[:dim], length, *x.shape[dim + 1 :]))


@torch.library.custom_op("ringspan::shard_backward", mutates_args=())
def _spread(
    d: Tensor, dim: int, layout: str, cu_seqlens: Tensor | None, rank: int, num_ranks: int, num_tokens: int
) -> Tensor:
    full = d.new_zeros((*d.shape[:dim], num_tokens, *d.shape[dim + 1 :]))
    _put(full, dim, _ranges_in_graph(num_tokens, layout, cu_seqlens, rank, num_ranks), d)
    return full


@_spread.register_fake
def _(d, dim, layout, cu_seqlens, rank, num_ranks, num_tokens):
    return d.new_empty((*d.shape[:dim], num_tokens, *d.shape[dim + 1 :]))


def _ranges_in_graph(
    num_tokens: int, layout: str, cu_seqlens: Tensor | None, rank: int, num_ranks: int
) -> tuple[range, ...]:
    return split(layout, num_tokens, num_ranks, documents_of(cu_seqlens)).ranges(rank)


def _keep_place(ctx, inputs, output) -> None:
    x, dim, layout, cu_seqlens, *place = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.place = dim, layout, place, x.shape[dim]


def _of_whole(ctx, d: Tensor):
    (cu_seqlens,), (dim, layout, place, num_tokens) = ctx.saved_tensors, ctx.place
    return _spread(d, dim, layout, cu_seqlens, *place, num_tokens), *[None] * 5


def _of_shard(ctx, d: Tensor):
    (cu_seqlens,), (dim, layout, place, _) = ctx.saved_tensors, ctx.place
    return shard_in_graph(d, dim, layout, cu_seqlens, *place), *[None] * 6


def _keep_place_of_shard(ctx, inputs, output) -> None:
    _keep_place(ctx, (output, *inputs[1:-1]), output)


shard_in_graph.register_autograd(_of_whole, setup_context=_keep_place)
_spread.register_autograd(_of_shard, setup_context=_keep_place_of_shard)


def unshard(x: Tensor, dim: int, layout: str, group: str, documents: tuple[int, ...] | None = None) -> Tensor:
    differentiated = torch.is_grad_enabled() and x.requires_grad
    full = _Unshard.apply(x, dim, layout, documents, group, differentiated)
    assert isinstance(full, Tensor)
    return full


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, layout: str, documents, group: str, differentiated: bool) -> Tensor:
        transport = resolve(group)
        if type(x).__name__ == "AsyncCollectiveTensor":  # what tensor parallelism returns, with no memory of its own
            x = x.trigger_wait()  # type: ignore[attr-defined]
        with on_device_of(x), transport.one_call():
            full, number = _Unshard._gathered(transport, x, dim, layout, documents, differentiated)
        ctx.arguments = dim, layout, documents, group, x.shape[dim], number, MadeOn(transport)
        return full

    @staticmethod
    def _gathered(
        transport: Transport, x: Tensor, dim: int, layout: str, documents, differentiated: bool
    ) -> tuple[Tensor, int]:
        asked = dim, layout, documents
        channel, agreed, number = _begin(transport, "unshard", x, x.shape[dim], *asked, differentiated)
        with interruption_told(transport):  # lengths that the layout does not have are every rank's refusal
            places = from_lengths(layout, agreed.query_lengths, documents)
        with running(transport):
            full = x.new_empty((*x.shape[:dim], places.num_tokens, *x.shape[dim + 1 :]))
            _put(full, dim, places.ranges(channel.rank), x)
            mine = Parcel((x,))  # one for all, since shared memory holds a copy of each until `close`
            for peer, arrived in _swap_with_each(channel, lambda _: mine, lambda peer: _like(x, dim, places, peer)):
                _put(full, dim, places.ranges(peer), arrived)
            channel.close()
        return full, number

    @staticmethod
    def backward(ctx, d_full: Tensor):
        return _Summed.apply(d_full, *ctx.arguments), *[None] * 5


class _Summed(torch.autograd.Function):
    """This rank's shard of the sum of all ranks' tensors; a function of its own, for second derivatives to meet."""

    @staticmethod
    def forward(ctx, d_full: Tensor, dim: int, layout: str, documents, group: str, *rest) -> Tensor:
        check_carried_out("the backward of unshard", d_full)
        transport = resolve(group)
        with on_device_of(d_full), transport.one_call():
            return _Summed._of_all_ranks(transport, d_full, dim, layout, documents, *rest)

    @staticmethod
    def _of_all_ranks(
        transport: Transport, d_full: Tensor, dim: int, layout: str, documents, length: int, number: int, made_on
    ) -> Tensor:
        asked = "the backward of unshard", d_full, length, dim, layout, documents
        channel, agreed, _ = _begin(transport, *asked, True, number, made_on)
        with running(transport):
            places = from_lengths(layout, agreed.query_lengths, documents)
            mine = take(d_full, dim, places.ranges(channel.rank))
            total = mine.to(state_dtype(mine.dtype)) if mine.is_floating_point() else mine
            slices = _swap_with_each(
                channel,
                lambda peer: Parcel((take(d_full, dim, places.ranges(peer)),)),
                lambda _: _like(mine, dim, places, channel.rank),
            )
            for _, arrived in slices:
                total = total + arrived
            channel.close()
        return total.to(d_full.dtype)

    @staticmethod
    def backward(ctx, *_):
        raise UnsupportedError("unshard is differentiable once: its second derivative is not computed.")


def _begin(
    transport: Transport,
    what: str,
    x: Tensor,
    length: int,
    dim: int,
    layout: str,
    documents,
    differentiated: bool,
    forward: int = 0,
    made_on: MadeOn | None = None,
) -> tuple[Channel, Agreed, int]:
    shape: list[int | None] = list(x.shape)
    shape[dim] = None

    def check() -> Terms:
        if made_on is not None:
            made_on.check(transport)
        common = {CALL: what, "dtype": str(x.dtype), "shape": shape, "dim": dim, "layout": layout}
        common["cu_seqlens"] = documents_in_words(documents)
        common["requires_grad"] = differentiated
        common[DEVICE_TYPE] = x.device.type
        return Terms(common, length, device_type=x.device.type, forward=forward)

    return begin(transport, check, agreement=True)


def _swap_with_each(channel: Channel, outgoing, expected) -> Iterator[tuple[int, Tensor]]:
    """Swap a tensor with one rank after the other. outgoing: a Parcel, expected: a Spec, by peer."""
    for distance in range(1, channel.size):
        to, source = (channel.rank + distance) % channel.size, (channel.rank - distance) % channel.size
        pending = channel.post(distance, 0, [(to, outgoing(to))], [(source, expected(source))])
        (parcel,) = pending.wait()
        yield source, parcel.tensors[0]
        channel.release(parcel)


def _like(x: Tensor, dim: int, places: Layout, rank: int) -> Spec:
    shape = (*x.shape[:dim], places.lengths[rank], *x.shape[dim + 1 :])
    return Spec((shape,), (x.dtype,), x.device)


def _put(full: Tensor, dim: int, ranges: Sequence[range], x: Tensor) -> None:
    start = 0
    for piece in ranges:
        _at(full, dim, piece).copy_(x.narrow(dim, start, len(piece)))
        start += len(piece)


def _at(x: Tensor, dim: int, piece: range) -> Tensor:
    index = [slice(None)] * x.ndim
    index[dim] = slice(piece.start, piece.stop, piece.step)
    return x[tuple(index)]
