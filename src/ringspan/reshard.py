"""Between a full tensor and its shards: taking a shard out, and gathering all of them on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ringspan.agreement import CALL, Terms
from ringspan.call import begin, running
from ringspan.errors import UnsupportedError
from ringspan.layout import Layout, check_name, from_lengths, shard_length, split
from ringspan.state import state_dtype
from ringspan.transport.contract import Channel, Parcel, Spec
from ringspan.transport.table import resolve


def take(x: Tensor, dim: int, ranges: Sequence[range]) -> Tensor:
    """A contiguous copy of x at some positions of `dim`."""
    parts = [_at(x, dim, piece) for piece in ranges]
    if not parts:
        return x.narrow(dim, 0, 0).clone()
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("ringspan::shard", mutates_args=())
def shard_in_graph(x: Tensor, dim: int, layout: str, group: str, rank: int, num_ranks: int) -> Tensor:
    """`take` of a rank's shard as one node of a graph. The place: that in the group of that name, or as given."""
    rank, num_ranks = _place_in_graph(group, rank, num_ranks)
    return take(x, dim, split(layout, x.shape[dim], num_ranks).ranges(rank))


@shard_in_graph.register_fake
def _(x, dim, layout, group, rank, num_ranks):
    check_name(layout)
    length = shard_length(layout, x.shape[dim], *_place_in_graph(group, rank, num_ranks))
    return x.new_empty((*x.shape[:dim], length, *x.shape[dim + 1 :]))


@torch.library.custom_op("ringspan::shard_backward", mutates_args=())
def _spread(d: Tensor, dim: int, layout: str, group: str, rank: int, num_ranks: int, num_tokens: int) -> Tensor:
    rank, num_ranks = _place_in_graph(group, rank, num_ranks)
    full = d.new_zeros((*d.shape[:dim], num_tokens, *d.shape[dim + 1 :]))
    _put(full, dim, split(layout, num_tokens, num_ranks).ranges(rank), d)
    return full


@_spread.register_fake
def _(d, dim, layout, group, rank, num_ranks, num_tokens):
    return d.new_empty((*d.shape[:dim], num_tokens, *d.shape[dim + 1 :]))


def _place_in_graph(group: str, rank: int, num_ranks: int) -> tuple[int, int]:
    if not group:
        return rank, num_ranks
    transport = resolve(group)
    return transport.rank, transport.size


def _keep_place(ctx, inputs, output) -> None:
    x, dim, *place = inputs
    ctx.place = (dim, *place, x.shape[dim])


shard_in_graph.register_autograd(lambda ctx, d: (_spread(d, *ctx.place), *[None] * 5), setup_context=_keep_place)
_spread.register_autograd(
    lambda ctx, d: (shard_in_graph(d, *ctx.place), *[None] * 6),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "place", inputs[1:6]),
)


def unshard(x: Tensor, dim: int, layout: str, group: str) -> Tensor:
    full = _Unshard.apply(x, dim, layout, group, torch.is_grad_enabled() and x.requires_grad)
    assert isinstance(full, Tensor)
    return full


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, layout: str, group: str, differentiated: bool) -> Tensor:
        channel, agreed, transport = _begin("unshard", x, x.shape[dim], dim, layout, group, differentiated)
        ctx.arguments = (dim, layout, group, x.shape[dim])
        with running(transport):
            places = from_lengths(layout, agreed.query_lengths)
            full = x.new_empty((*x.shape[:dim], places.num_tokens, *x.shape[dim + 1 :]))
            _put(full, dim, places.ranges(channel.rank), x)
            mine = Parcel((x,))  # one for all, since shared memory holds a copy of each until `close`
            for peer, arrived in _swap_with_each(channel, lambda _: mine, lambda peer: _like(x, dim, places, peer)):
                _put(full, dim, places.ranges(peer), arrived)
            channel.close()
        return full

    @staticmethod
    def backward(ctx, d_full: Tensor):
        return _Summed.apply(d_full, *ctx.arguments), None, None, None, None


class _Summed(torch.autograd.Function):
    """This rank's shard of the sum of all ranks' tensors; a function of its own, for second derivatives to meet."""

    @staticmethod
    def forward(ctx, d_full: Tensor, dim: int, layout: str, group: str, length: int) -> Tensor:
        channel, agreed, transport = _begin("the backward of unshard", d_full, length, dim, layout, group, True)
        with running(transport):
            places = from_lengths(layout, agreed.query_lengths)
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


def _begin(what: str, x: Tensor, length: int, dim: int, layout: str, group: str, differentiated: bool):
    shape: list[int | None] = list(x.shape)
    shape[dim] = None

    def check() -> Terms:
        common = {CALL: what, "dtype": str(x.dtype), "shape": shape, "dim": dim, "layout": layout}
        common["requires_grad"] = differentiated
        return Terms(common, length, device_type=x.device.type)

    transport = resolve(group)
    channel, agreed = begin(transport, check, agreement=True)
    return channel, agreed, transport


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
