"""A call's transfers through peer memory: a parcel is published in a window, and its readers pull it from there."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ringspan.transport.contract import Channel, Parcel, Pending, Spec, spec_of
from ringspan.transport.segments import contiguous_views, laid_out
from ringspan.transport.shared_channel import Loan, Note

if TYPE_CHECKING:
    from ringspan.transport.peer_memory import PeerMemory, Window

LANES = 2  # with an event each: with one for both, a shard would wait for what left after it in the other


class PeerChannel(Channel):
    """in_place in that owners publish once and nobody hands on; what is read is a copy."""

    in_place = True

    def __init__(self, transport: PeerMemory, call: int, members: tuple[int, ...]) -> None:
        self._transport, self._control = transport, transport.control
        self._gpu, self.streams = transport.gpu, transport.gpu.streams()
        self._call = call
        self._members = members
        self._loans: dict[Parcel, tuple[Loan, Window]] = {}
        self._buffers: dict[Parcel, Window] = {}
        self._spare: dict[Spec, list[Parcel]] = {}
        self.rank = members.index(transport.rank)
        self.size = len(members)

    def post(
        self,
        index: int,
        lane: int,
        sends: Sequence[tuple[int, Parcel]] = (),
        receives: Sequence[tuple[int, Spec]] = (),
    ) -> Pending:
        assert lane < LANES
        for _, parcel in sends:
            if parcel not in self._loans:
                self._loans[parcel] = self._publish(parcel)
        if sends:  # readers wait for what their lane has recorded: of a parcel that another lane published too
            self._gpu.record(self._transport.written[lane])
        for peer, parcel in sends:
            reader = self._members[peer]
            note = self._lend(parcel, reader)
            self._control.tell(reader, self._call, note.packed(index, lane))
        filled = [self._loans[parcel][0] for _, parcel in sends if parcel in self._buffers]
        pulls = [_Pull(self, index, lane, self._members[peer], spec) for peer, spec in receives]
        return _PeerPending(self, pulls, filled)

    def _lend(self, parcel: Parcel, reader: int) -> Note:
        loan, window = self._loans[parcel]
        assert not loan.readers[reader], "sent twice: it may come to the second note first, and know no window"
        loan.readers[reader] += 1
        return Note(self._transport.rank, loan.serial, self._transport.introduce(window, reader))

    def _publish(self, parcel: Parcel) -> tuple[Loan, Window]:
        """Where it lies in a window, after a copy unless `buffer` made it."""
        window = self._buffers.get(parcel)
        if window is None:
            window, copies = self._allocate(spec_of(parcel.tensors))
            for copy, x in zip(copies, parcel.tensors, strict=True):
                copy.copy_(x)
        return self._control.new_loan([]), window

    def _allocate(self, spec: Spec) -> tuple[Window, tuple[Tensor, ...]]:
        window = self._transport.window(laid_out(spec)[1])
        return window, contiguous_views(window.memory, spec)

    def buffer(self, spec: Spec) -> Parcel:
        window, tensors = self._allocate(spec)
        parcel = Parcel(tensors)
        self._buffers[parcel] = window
        return parcel

    def target(self, spec: Spec) -> Parcel:
        """For what is pulled: this rank's own memory, which nobody else opens."""
        if spare := self._spare.get(spec):
            return spare.pop()
        self._spare.clear()  # of other lengths: kept, they would be more than the two shards that a rank may hold
        return Parcel(contiguous_views(self._gpu.create(laid_out(spec)[1]), spec))

    def pull(self, owner: int, note: Note, lane: int, target: Parcel, begin: Any) -> Any:
        """Launch the copy; after what it is done. begin: after what the target may be written."""
        peer = self._transport.peers[owner]
        with self._gpu.pulling():
            # Here, for what is let go is waited for on the stream that read it.
            source = contiguous_views(self._transport.opened(owner, note.lies), spec_of(target.tensors))
            self.streams.follow(begin)
            self.streams.follow(peer.written[lane])
            self.streams.hold(target.tensors)
            for x, y in zip(target.tensors, source, strict=True):
                x.copy_(y)
            self._gpu.record(peer.has_read)
            done = self.streams.mark()
        self._transport.pulled(done)
        self._control.give_back(owner, self._call, note.loan)
        return done

    def note(self, owner: int, index: int, lane: int, wait: bool) -> Note | None:
        if not wait and not self._control.has_note(self._call, owner, index, lane):
            return None
        return self._control.note(self._call, owner, index, lane)

    def await_readers(self, loans: Collection[Loan]) -> None:
        """Until all have launched their copies."""
        self._control.await_readers(loans, self._call)

    def release(self, parcel: Parcel) -> None:
        if parcel in self._buffers:
            window = self._buffers.pop(parcel)
            if parcel in self._loans:
                loan, _ = self._loans.pop(parcel)
                self._control.end_loan(loan, self._call)
            self._transport.pool.give_back(window, self._call)
        else:
            self._spare.setdefault(spec_of(parcel.tensors), []).append(parcel)

    def close(self) -> None:
        self.await_readers([loan for loan, _ in self._loans.values()])
        for loan, window in self._loans.values():
            self._control.end_loan(loan, self._call)
            self._transport.pool.give_back(window, self._call)
        self._loans.clear()
        self._spare.clear()
        self._transport.pool.end_call(self._call)


class _Pull:
    """One parcel on its way: launched at once if its owner's note is there, else when it is waited for.

    Who waited for the note at once would not compute meanwhile.
    """

    def __init__(self, channel: PeerChannel, index: int, lane: int, owner: int, spec: Spec) -> None:
        self._channel, self._index, self._lane, self._owner = channel, index, lane, owner
        self.target = channel.target(spec)
        self._begin = channel.streams.mark()
        self._done: Any = None
        self._launched = False
        self._launch(wait=False)

    def _launch(self, wait: bool) -> None:
        note = self._channel.note(self._owner, self._index, self._lane, wait)
        if note is not None:
            self._done = self._channel.pull(self._owner, note, self._lane, self.target, self._begin)
            self._launched = True

    def wait(self) -> Parcel:
        if not self._launched:
            self._launch(wait=True)
        self._channel.streams.follow(self._done)
        return self.target


class _PeerPending(Pending):
    def __init__(self, channel: PeerChannel, pulls: Sequence[_Pull], filled: Sequence[Loan]) -> None:
        self._channel, self._pulls, self._filled = channel, pulls, filled

    def wait(self) -> list[Parcel]:
        received = [pull.wait() for pull in self._pulls]
        self.received_bytes = [sum(x.nbytes for x in parcel.tensors) for parcel in received]
        if self._filled:
            self._channel.await_readers(self._filled)
        return received
