"""Process groups on one host, for tensors on GPUs: shards are published once, and whoever needs one pulls it.

A pull is a copy by the copy engine, on a stream of its own: no multiprocessor and no channel of NCCL's takes part.
What ranks tell each other goes through shared memory's pipes. A note is sent when the work that it tells of has been
launched, not when it is done; the reader's stream waits for the owner's event, and the owner's for the reader's
before it writes there again. So no thread waits for a GPU, and no stream for what has not been launched
(docs/decisions/0023-peer-memory.md).
"""

from __future__ import annotations

import itertools
import os
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from ringspan.errors import RankFailedError, UnsupportedError, explain
from ringspan.transport.contract import Channel, Parcel, Pending, Spec, Transport, spec_of
from ringspan.transport.device_memory import CudaMemory, Words
from ringspan.transport.introduction import exchange
from ringspan.transport.segments import Pool, contiguous_view, laid_out
from ringspan.transport.shared_channel import Loan, Note
from ringspan.transport.shared_memory import SharedMemoryTransport

_LANES = 2
_TRIAL_BYTES, _TRIAL_ROUNDS = 1 << 20, 2
_INTRODUCTION = -1  # stands for a step
_DRAIN_S, _POLL_S = 10.0, 1e-4


@dataclass(eq=False)
class Window:
    """Memory of this rank on its GPU that others may open. has_readers: whether any may read what it held last."""

    serial: int
    memory: Tensor
    has_readers: bool = False

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes


@dataclass
class _Peer:
    """One other rank: its events, by lane, after which what it published may be read; the event after which this
    rank has read it, and the one after which it has read this rank's. windows: what is open of its memory, by serial;
    told: which of this rank's windows it knows."""

    written: list[Any]
    has_read: Any
    was_read: Any
    windows: dict[int, Tensor] = field(default_factory=dict)
    told: dict[int, weakref.ref[Window]] = field(default_factory=dict)


def connect(control: SharedMemoryTransport, memory: Callable[[], Any] = CudaMemory) -> PeerMemory | str:
    """Try, on all ranks of a group at once, whether they can read each other's memory of their GPUs; or the reason why
    not. The outcome is the same on every rank. memory: gives that of the current device, as `CudaMemory` has it.
    """
    me, reason = _tried(lambda: _Introduction(control, memory()))
    if (unable := _first_reason(control, reason)) is not None:
        return unable
    words = me.meet()
    peers, reason = _tried(lambda: {rank: me.open(rank, told) for rank, told in words.items()})
    if (unable := _first_reason(control, reason)) is not None:
        return unable
    for number in range(_TRIAL_ROUNDS):
        for part in (partial(me.write, number, peers), partial(me.compare, number, peers)):
            wrong, reason = _tried(part)
            if (unable := _first_reason(control, reason or wrong)) is not None:
                return unable
    return PeerMemory(control, me.gpu, me.written, peers)


def _tried(attempt: Callable[[], Any]) -> tuple[Any, str | None]:
    """What came of it, or why nothing did: whoever raised here would leave the others waiting."""
    try:
        return attempt(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:100]


def _first_reason(control: SharedMemoryTransport, reason: str | None) -> str | None:
    """After all ranks have said theirs."""
    answers = exchange(control, {"no": reason})
    return next((f"rank {rank}: {answer['no']}" for rank, answer in enumerate(answers) if answer["no"]), None)


class _Introduction:
    """What one rank lets the others open, and a trial of it.

    The trial has rounds, since it is events that are recorded again that must be waited for.
    """

    def __init__(self, control: SharedMemoryTransport, gpu: Any) -> None:
        self.gpu = gpu
        self._control = control
        self.written = [gpu.new_event() for _ in range(_LANES)]
        self._has_read = {rank: gpu.new_event() for rank in control.links}
        self._trial = gpu.create(_TRIAL_BYTES)
        self._words = {rank: self._words_for(rank) for rank in control.links}
        self._theirs: dict[int, Tensor] = {}

    def _words_for(self, rank: int) -> Words:
        share = self.gpu.share_event
        return [[share(event) for event in self.written], share(self._has_read[rank]), self.gpu.share(self._trial)]

    def meet(self) -> dict[int, Words]:
        call = self._control.begin_call()
        for rank, words in self._words.items():
            note = Note(self._control.rank, _INTRODUCTION, words)
            self._control.tell(rank, call, note.packed(_INTRODUCTION, 0))
        return {rank: self._control.note(call, rank, _INTRODUCTION, 0).lies for rank in self._words}

    def open(self, rank: int, words: Words) -> _Peer:
        written, was_read, trial = words
        self._theirs[rank] = self.gpu.open(trial)
        events = [self.gpu.open_event(event) for event in written]
        return _Peer(events, self._has_read[rank], self.gpu.open_event(was_read))

    def write(self, number: int, peers: dict[int, _Peer]) -> None:
        """After a delay: whoever does not wait for it reads what was there before."""
        for peer in peers.values():
            self.gpu.streams().follow(peer.was_read)
        self.gpu.delay()
        self._trial.fill_(self._value(number, self._control.rank))
        self.gpu.record(self.written[0])

    def compare(self, number: int, peers: dict[int, _Peer]) -> str | None:
        """What is wrong, if anything."""
        for rank, peer in peers.items():
            with self.gpu.pulling():
                self.gpu.streams().follow(peer.written[0])
                found = self._theirs[rank].clone()
                self.gpu.record(peer.has_read)
                wrong = int((found != self._value(number, rank)).sum())  # waits for this stream
            if wrong:
                return f"read {wrong} of {_TRIAL_BYTES} bytes of rank {rank} wrongly"
        return None

    def _value(self, number: int, rank: int) -> int:
        return (1 + number + _TRIAL_ROUNDS * rank) % 251


class PeerMemory(Transport):
    """This rank's end of a process group whose ranks can open the memory of each other's GPUs."""

    def __init__(
        self, control: SharedMemoryTransport, gpu: Any, written: Sequence[Any], peers: dict[int, _Peer]
    ) -> None:
        super().__init__()
        self.rank, self.size = control.rank, control.size
        self.control, self.gpu = control, gpu
        self.written, self.peers = written, peers
        serials = itertools.count()
        # A function of its own: with a method of this object it would lie in a circle, and stay until Python looks.
        self.pool: Pool[Window] = Pool(lambda num_bytes: Window(next(serials), gpu.create(num_bytes)))
        self._life = _Life(gpu, [peer.was_read for peer in peers.values()])
        weakref.finalize(self, self._life.drain)

    def begin_call(self) -> int:
        return self.control.begin_call()

    def agree(self, call: int, message: bytes) -> list[bytes]:
        return self.control.agree(call, message)

    def channel(self, call: int, members: Sequence[int], via: str = "auto", device_type: str = "cuda") -> Channel:
        if self.gpu.is_capturing():  # on every rank alike
            raise UnsupportedError(
                explain(
                    "a call through peer memory cannot be captured into a CUDA graph: its ranks talk in every step.",
                    fix='transport="torch_dist", with NCCL',
                )
            )
        if not self.gpu.is_current():
            error = UnsupportedError(
                explain(
                    "the tensors of a group's calls through peer memory must stay on the GPU of the first one.",
                    got=f"another GPU than {self.gpu.device} on rank {self.rank}",
                    fix=f"one GPU for each rank, or a group for each GPU: here {self.gpu.device}",
                )
            )
            self.fail(error)
            raise error
        return PeerChannel(self, call, tuple(members))

    def fail(self, error: BaseException) -> None:
        self.control.fail(error)

    def window(self, num_bytes: int) -> Window:
        """That may be written on the current stream."""
        window = self.pool.take(num_bytes)
        if window.has_readers:
            streams = self.gpu.streams()
            for peer in self.peers.values():
                streams.follow(peer.was_read)
            window.has_readers = False
        return window

    def introduce(self, window: Window, reader: int) -> Words:
        """What the reader does not know yet: how to open the window; and which others are gone."""
        told = self.peers[reader].told
        gone = [serial for serial, known in told.items() if known() is None]
        for serial in gone:
            del told[serial]
        handle = None if window.serial in told else self.gpu.share(window.memory)
        told[window.serial] = weakref.ref(window)
        window.has_readers = True
        return [window.serial, handle, gone]

    def opened(self, owner: int, words: Words) -> Tensor:
        """A peer's window [uint8]."""
        serial, handle, gone = words
        windows = self.peers[owner].windows
        for old in gone:
            del windows[old]
        if handle is not None:
            try:
                windows[serial] = self.gpu.open(handle)
            except (RuntimeError, OSError) as error:  # most often its process is gone, and what it shared with it
                raise RankFailedError(
                    explain(
                        f"rank {self.rank} cannot open the memory of rank {owner}.",
                        got=f"{type(error).__name__}: {error}".splitlines()[0],
                        fix="look at that rank's own output: it may have died",
                    )
                ) from error
        return windows[serial]

    def pulled(self, done: Any) -> None:
        self._life.last_pull = done


class _Life:
    """What must be over before this process may end: its pulls, and what the others pull of it."""

    def __init__(self, gpu: Any, was_read: Sequence[Any]) -> None:
        self._gpu, self._was_read = gpu, was_read
        self._pid = os.getpid()
        self.last_pull: Any = None

    def drain(self) -> None:
        """Bounded: what a process that was killed had launched may never be done."""
        if os.getpid() != self._pid:  # a forked child has launched nothing
            return
        deadline = time.monotonic() + _DRAIN_S
        for event in [*self._was_read, *filter(None, [self.last_pull])]:
            try:
                while not self._gpu.is_done(event) and time.monotonic() < deadline:
                    time.sleep(_POLL_S)
            except RuntimeError:  # the GPU, or the process that made the event, is done for
                continue


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
        assert lane < _LANES
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
        return window, _views(window.memory, spec)

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
        return Parcel(_views(self._gpu.create(laid_out(spec)[1]), spec))

    def pull(self, owner: int, note: Note, lane: int, target: Parcel, begin: Any) -> Any:
        """Launch the copy; after what it is done. begin: after what the target may be written."""
        peer = self._transport.peers[owner]
        with self._gpu.pulling():
            # Here, for what is let go is waited for on the stream that read it.
            source = _views(self._transport.opened(owner, note.lies), spec_of(target.tensors))
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


def _views(memory: Tensor, spec: Spec) -> tuple[Tensor, ...]:
    """A parcel's tensors in one piece of memory, in the one way that all ranks know."""
    places = zip(laid_out(spec)[0], spec.shapes, spec.dtypes, strict=True)
    return tuple(contiguous_view(memory, offset, shape, dtype) for offset, shape, dtype in places)


class _Pull:
    """One parcel on its way. It is launched as soon as its owner's note is there, at the latest when it is waited
    for: who waited for the note before would not compute meanwhile."""

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
