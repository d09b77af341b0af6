"""A call's transfers in shared memory: a parcel is lent to its readers, who are told where it lies and give it back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ringspan.transport.contract import Channel, Parcel, Pending, Spec, spec_of
from ringspan.transport.segments import Whereabouts, contiguous_views, laid_out, segment_of, view

if TYPE_CHECKING:
    from ringspan.transport.shared_memory import SharedMemoryTransport


@dataclass(eq=False)
class Loan:
    """A parcel of this rank that others read. lies: where, as `Note` has it; memory: what the pool gave for it."""

    serial: int
    lies: list
    memory: Tensor | None = None
    readers: Counter = field(default_factory=Counter)

    def returned(self, reader: int) -> None:
        self.readers[reader] -= 1

    def reading(self) -> set[int]:
        return {reader for reader, count in self.readers.items() if count}


@dataclass(frozen=True)
class Note:
    """What a rank is told of a parcel: whose it is, under which number, and where it lies, as both channels know."""

    owner: int
    loan: int
    lies: list

    def packed(self, index: int, lane: int) -> bytes:
        return json.dumps([index, lane, self.owner, self.loan, self.lies], separators=(",", ":")).encode()

    @staticmethod
    def unpacked(body: bytes) -> tuple[int, int, Note]:
        index, lane, *rest = json.loads(body)
        return index, lane, Note(*rest)


class SharedChannel(Channel):
    in_place = True

    def __init__(self, transport: SharedMemoryTransport, call: int, members: tuple[int, ...]) -> None:
        self._transport = transport
        self._call = call
        self._members = members
        self._loans: dict[Parcel, Loan] = {}
        self._buffers: dict[Parcel, Tensor] = {}  # with their memory in the pool
        self._borrowed: dict[Parcel, Note] = {}
        self.rank = members.index(transport.rank)
        self.size = len(members)

    def post(
        self,
        index: int,
        lane: int,
        sends: Sequence[tuple[int, Parcel]] = (),
        receives: Sequence[tuple[int, Spec]] = (),
    ) -> Pending:
        for peer, parcel in sends:
            note = self._lend(parcel, self._members[peer])
            self._transport.tell(self._members[peer], self._call, note.packed(index, lane))
        filled = [self._loans[parcel] for _, parcel in sends if parcel in self._buffers]
        return _SharedPending(self, index, lane, receives, filled)

    def _lend(self, parcel: Parcel, reader: int) -> Note:
        assert parcel not in self._borrowed, "what is read in place is not handed on"
        loan = self._loans.get(parcel)
        if loan is None:
            loan = self._loans[parcel] = self._publish(parcel)
        loan.readers[reader] += 1
        return Note(self._transport.rank, loan.serial, loan.lies)

    def _publish(self, parcel: Parcel) -> Loan:
        """Copy what does not lie in shared memory already, once for all readers."""
        elsewhere = [place for place, x in enumerate(parcel.tensors) if segment_of(x) is None]
        tensors, memory = list(parcel.tensors), None
        if elsewhere:
            memory, copies = self._allocate(spec_of([tensors[place] for place in elsewhere]))
            for place, copy in zip(elsewhere, copies, strict=True):
                tensors[place] = copy.copy_(tensors[place])
        return self._transport.new_loan([Whereabouts.of(x).packed() for x in tensors], memory)

    def _allocate(self, spec: Spec) -> tuple[Tensor, tuple[Tensor, ...]]:
        memory = self._transport.pool.take(laid_out(spec)[1])
        return memory, contiguous_views(memory, spec)

    def buffer(self, spec: Spec) -> Parcel:
        memory, tensors = self._allocate(spec)
        parcel = Parcel(tensors)
        self._buffers[parcel] = memory
        return parcel

    def take(self, index: int, lane: int, peer: int, spec: Spec) -> Parcel:
        note = self._transport.note(self._call, self._members[peer], index, lane)
        parts = zip(map(Whereabouts.unpacked, note.lies), spec.shapes, spec.dtypes, strict=True)
        parcel = Parcel(
            tuple(
                view(self._transport.memory(note.owner, lies, self._call), lies.offset, shape, lies.stride, dtype)
                for lies, shape, dtype in parts
            )
        )
        self._borrowed[parcel] = note
        return parcel

    def await_readers(self, loans: Collection[Loan]) -> None:
        self._transport.await_readers(loans, self._call)

    def release(self, parcel: Parcel) -> None:
        if parcel in self._borrowed:
            note = self._borrowed.pop(parcel)
            self._transport.give_back(note.owner, self._call, note.loan)
        elif parcel in self._buffers:
            self._transport.pool.give_back(self._buffers.pop(parcel), self._call)
            self._end(self._loans.pop(parcel, None))

    def _end(self, loan: Loan | None) -> None:
        if loan is not None:
            self._transport.end_loan(loan, self._call)

    def close(self) -> None:
        self.await_readers(self._loans.values())
        for loan in self._loans.values():
            self._end(loan)
        self._loans.clear()
        self._transport.end_call(self._call)


class _SharedPending(Pending):
    def __init__(
        self,
        channel: SharedChannel,
        index: int,
        lane: int,
        receives: Sequence[tuple[int, Spec]],
        filled: Sequence[Loan],
    ) -> None:
        self._channel, self._index, self._lane = channel, index, lane
        self._receives, self._filled = receives, filled

    def wait(self) -> list[Parcel]:
        received = [self._channel.take(self._index, self._lane, peer, spec) for peer, spec in self._receives]
        if self._filled:
            self._channel.await_readers(self._filled)
        return received
