"""What is visiting, arriving, riding and leaving at one rank while its schedule runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ringspan.schedule.contract import Schedule, Step
from ringspan.state import NEVER, SoftmaxState
from ringspan.transport.contract import Channel, Parcel, Pending, Spec

_SHARDS, _RIDES = 0, 1  # lanes of a channel: shards on their way round, results riding along

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Law:
    """How parts of what rides are put together. begin: makes fresh tensors the result of nothing; join: in place."""

    begin: Callable[[Tensors], object]
    join: Callable[[Tensors, Tensors], object]


def _zero(tensors: Tensors) -> None:
    for x in tensors:
        x.zero_()


def _add(sums: Tensors, parts: Tensors) -> None:
    for x, part in zip(sums, parts, strict=True):
        x.add_(part)


def _begin_state(tensors: Tensors) -> None:
    acc, row_max, row_sum = tensors
    acc.zero_()
    row_max.fill_(NEVER)
    row_sum.zero_()


GRADIENTS = Law(_zero, _add)
STATES = Law(_begin_state, lambda state, part: SoftmaxState(*state).merge_(*part))  # acc, row_max, row_sum


class Traffic:
    """What is visiting, arriving, riding and leaving at this rank."""

    def __init__(
        self,
        channel: Channel,
        schedule: Schedule,
        own: Sequence[Tensor],
        lengths: tuple[int, ...],
        flipped: Sequence[bool],
        law: Law = GRADIENTS,
    ) -> None:
        self._channel = channel
        self._rank = schedule.rank
        self._lengths = lengths
        self._flipped = flipped
        self._law = law
        self._own = Parcel(tuple(_flip(own, flipped)))
        self._visiting: Parcel = self._own
        self._read: list[Parcel] = []  # visited before, and not released yet
        self._specs: dict[int, Spec] = {}  # of shards, by length
        self._parts: list[Parcel] = []  # results for visiting shards, from their beginning until they have left
        self._leaving: Pending | None = None
        self._held: Step | None = None  # its ride is to leave with the next step's transfers
        if channel.in_place:
            channel.post(0, _SHARDS, [(reader, self._own) for reader in schedule.readers])

    def visiting(self) -> tuple[Tensor, ...]:
        tensors = self._visiting.tensors
        return tuple(_flip(tensors, self._flipped)) if any(self._flipped) else tensors

    def post_step(self, step: Step, home: Sequence[Tensor]) -> tuple[Pending, Pending]:
        """Shards for the next step, and results that ride here. Where transfers run in order, the ride of step t
        leaves when it is received: in one batch with all else that is posted in step t + 1."""
        if not self._channel.in_order:
            return self.post_shards(step), self._post_ride_receives(step, home)
        if self._held is not None and self._held.index + 1 < step.index:  # this rank has nothing else in that step
            self._post_ride()
        with self._channel.together():  # shards before rides on both ends, for they know no lanes
            posted = self.post_shards(step), self._post_ride_receives(step, home)
            self._post_ride()
            return posted

    def post_shards(self, step: Step) -> Pending:
        hop = step.receive
        if self._channel.in_place:
            receives = [(hop.shard, self._spec_of_shard(hop.shard))] if hop else []
            return self._channel.post(0, _SHARDS, (), receives)
        sends = [(hop.peer, self._own if hop.shard == self._rank else self._visiting) for hop in step.send]
        receives = [(hop.peer, self._spec_of_shard(hop.shard))] if hop else []
        return self._channel.post(step.index, _SHARDS, sends, receives)

    def _spec_of_shard(self, shard: int) -> Spec:
        length, own = self._lengths[shard], self._own.tensors
        if length not in self._specs:
            shapes = [_long(x.shape, length, 3 if flip else 2) for x, flip in zip(own, self._flipped, strict=True)]
            self._specs[length] = _spec(shapes, own)
        return self._specs[length]

    def receive_shard(self, arriving: Pending, still_read: bool = False) -> None:
        """Wait for the step's hops; what arrived is visiting now. What was visiting may be overwritten, or only later,
        with the next one of which that is true, if it is still read.
        """
        arrived = arriving.wait()
        if self._visiting is not self._own:
            self._read.append(self._visiting)
        if not still_read:
            for parcel in self._read:
                self._channel.release(parcel)
            self._read.clear()
        self._visiting = arrived[0] if arrived else self._own

    def _post_ride_receives(self, step: Step, home: Sequence[Tensor]) -> Pending:
        receives = []
        for hop in step.ride_receive:
            shapes = [_long(x.shape, self._lengths[hop.shard], 2) for x in home]
            receives.append((hop.peer, _spec(shapes, home)))
        return self._channel.post(step.index - 1, _RIDES, (), receives)

    def receive_rides(self, step: Step, riding: Pending, part: Sequence[Tensor], home: Sequence[Tensor]) -> None:
        for hop, parcel in zip(step.ride_receive, riding.wait(), strict=True):
            self._law.join(home if hop.shard == self._rank else part, parcel.tensors)
            self._channel.release(parcel)

    def begin_part(self, home: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """For this rank's part of the result for what is visiting; it rides on to the next rank from where it lies."""
        length = self.visiting()[0].shape[2]
        part = self._channel.buffer(_spec([_long(x.shape, length, 2) for x in home], home))
        self._parts.append(part)
        self._law.begin(part.tensors)
        return part.tensors

    def send_ride(self, step: Step) -> None:
        self._finish_ride()
        if step.ride_send is not None:
            self._held = step
            if not self._channel.in_order:
                self._post_ride()

    def _post_ride(self) -> None:
        step, self._held = self._held, None
        if step is not None and step.ride_send is not None:
            self._leaving = self._channel.post(step.index, _RIDES, [(step.ride_send.peer, self._parts[-1])])

    def _finish_ride(self) -> None:
        if self._leaving is not None:
            self._leaving.wait()
            self._leaving = None
            self._channel.release(self._parts.pop(0))

    def finish(self) -> None:
        self._post_ride()
        self._finish_ride()
        self._channel.close()


def _flip(tensors: Sequence[Tensor], flipped: Sequence[bool]) -> list[Tensor]:
    return [x.mT if flip else x for x, flip in zip(tensors, flipped, strict=True)]


def _long(shape: Sequence[int], length: int, dim: int) -> tuple[int, ...]:
    return (*shape[:dim], length, *shape[dim + 1 :])


def _spec(shapes: Sequence[tuple[int, ...]], like: Sequence[Tensor]) -> Spec:
    return Spec(tuple(shapes), tuple(x.dtype for x in like), like[0].device)
