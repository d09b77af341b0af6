"""Rings of threads in one process: the group, and the current group of a thread (run_local.py starts them).

Nothing is copied: a parcel is handed over as references, and a rank leaves a call only when nobody reads its
tensors any more. On a GPU every worker has a stream of its own, and it is the streams that wait for each other.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

from ringspan.errors import ArgumentError, PeerRefusedError, RankFailedError, UnsupportedError, explain
from ringspan.transport.contract import Channel, Parcel, Pending, Spec, Transport
from ringspan.transport.cores import Cores, Permits, num_cores
from ringspan.transport.streams import Streams, streams_of

DEFAULT_TIMEOUT_S = 1800.0

_serial = itertools.count()
_thread = threading.local()


class LocalGroup:
    """What `run_local` hands to each worker: its place among the threads of one ring."""

    def __init__(self, board: Board, rank: int) -> None:
        self._board = board
        self._rank = rank
        # Names the group; the rank is that of the worker thread in which the name is resolved. Made once: torch.compile
        # takes a number that changes from group to group for a symbolic one, of which it can make no text.
        self.name = f"local:{board.serial}"
        self.transport = LocalTransport(board, rank)

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._board.size

    def __repr__(self) -> str:
        return f"LocalGroup(rank={self._rank}, size={self._board.size})"


def current_group() -> LocalGroup | None:
    """The group of the `run_local` worker that this thread is, or None."""
    groups = getattr(_thread, "groups", None)
    return groups[-1] if groups else None


def resolve_local(name: str) -> LocalGroup:
    """The group of that name in which this thread is a worker."""
    for group in getattr(_thread, "groups", ()):
        if group.name == name:
            return group
    raise ArgumentError(
        explain(
            "a local ring must be used in its worker's own thread, forward and backward, and while run_local runs.",
            got=f"a call on {name} from thread {threading.current_thread().name!r}, which is not a worker of it",
            fix="call ring_attention and loss.backward() inside the function that run_local runs",
        )
    )


def alone() -> LocalGroup:
    """A ring of one, for callers without a group."""
    return LocalGroup(Board(1, DEFAULT_TIMEOUT_S), 0)


@contextmanager
def entered(group: LocalGroup):
    """This thread is a worker of the group."""
    if not hasattr(_thread, "groups"):
        _thread.groups = []
    _thread.groups.append(group)
    try:
        yield
    finally:
        _thread.groups.pop()


class Board:
    """What the ranks of one local ring share."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size = size
        self.serial = next(_serial)
        self.timeout_s = timeout_s
        self.boxes = [_Mailbox() for _ in range(size)]
        self.permits = Cores(min(size, num_cores()))
        # Of workers on a GPU: threads that all launch would hand Python's lock to and fro with every operation.
        self.launching = Permits(1)
        self.failure: tuple[int | None, BaseException] | None = None
        self.agreements: dict[int, _Rendezvous] = {}
        self.lock = threading.Lock()

    def fail(self, rank: int | None, error: BaseException) -> None:
        """Record the first failure and wake whoever waits. A refusal comes before those that only tell of it."""
        with self.lock:
            only_told = self.failure is not None and isinstance(self.failure[1], PeerRefusedError)
            if self.failure is None or (only_told and not isinstance(error, (PeerRefusedError, RankFailedError))):
                self.failure = (rank, error)
        for box in self.boxes:
            with box.changed:
                box.changed.notify_all()

    def check(self, what: Callable[[], str]) -> None:
        if self.failure is not None:
            rank, error = self.failure
            raise RankFailedError(f"{what()}: {_who(rank)} failed first: {error!r}")

    def wait(self, box: _Mailbox, ready: Callable[[], bool], waiting_for: Callable[[], str]) -> None:
        """With box.changed held: wait until ready, or raise when a rank failed or the timeout has passed."""
        deadline = time.monotonic() + self.timeout_s
        while not ready():
            self.check(lambda: f"gave up waiting for {waiting_for()}")
            left = deadline - time.monotonic()
            if left <= 0:
                raise RankFailedError(
                    explain(
                        f"waited {self.timeout_s:g} s for {waiting_for()}.",
                        fix="every rank must make the same calls; run_local(..., timeout=...) sets the bound",
                    )
                )
            box.changed.wait(left)


def _who(rank: int | None) -> str:
    return "the caller of run_local" if rank is None else f"rank {rank}"


class _Mailbox:
    """What is waited for at one rank: the parcels that it lends, agreements, and the readers of what it lent."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.parcels: dict[tuple, Parcel] = {}
        self.num_readers: dict[int, int] = {}  # by call
        self.readers: dict[int, Counter] = {}  # the same, by reader
        self.read: dict[int, list] = {}  # by call: after what on the readers' streams its tensors have been read


class _Rendezvous:
    def __init__(self, size: int) -> None:
        self.messages: list[bytes | None] = [None] * size
        self.num_missing = size
        self.num_readers = size


class LocalTransport(Transport):
    """One rank's end of a board."""

    def __init__(self, board: Board, rank: int) -> None:
        super().__init__()
        self._board = board
        self.rank = rank
        self.size = board.size
        self.is_alone = board.size == 1
        self._num_calls = 0

    def begin_call(self) -> int:
        self._num_calls += 1
        return self._num_calls

    def agree(self, call: int, message: bytes) -> list[bytes]:
        board, box = self._board, self._board.boxes[self.rank]
        with board.lock:
            meeting = board.agreements.setdefault(call, _Rendezvous(self.size))
            meeting.messages[self.rank] = message
            meeting.num_missing -= 1
            complete = meeting.num_missing == 0
        if complete:
            for other in board.boxes:
                with other.changed:
                    other.changed.notify_all()
        with box.changed:
            board.wait(box, lambda: meeting.num_missing == 0, lambda: f"{_missing(meeting)} to begin call {call}")
        with board.lock:
            meeting.num_readers -= 1
            if meeting.num_readers == 0:
                del board.agreements[call]
        return [message for message in meeting.messages if message is not None]

    def channel(self, call: int, members: Sequence[int], via: str = "auto", device_type: str = "cpu") -> Channel:
        permits = self._board.permits if device_type == "cpu" else self._board.launching
        return _LocalChannel(self._board, call, tuple(members), self.rank, streams_of(device_type), permits)

    def fail(self, error: BaseException) -> None:
        self._board.fail(self.rank, error)


def _missing(meeting: _Rendezvous) -> str:
    return _named(rank for rank, message in enumerate(meeting.messages) if message is None)


def _named(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in ranks]
    return f"rank{'s' if len(names) > 1 else ''} {', '.join(names)}"


class _LocalChannel(Channel):
    in_place = True

    def __init__(
        self,
        board: Board,
        call: int,
        members: tuple[int, ...],
        group_rank: int,
        streams: Streams,
        permits: Permits,
    ) -> None:
        self._streams = streams
        self._permits = permits
        self._board = board
        self._call = call
        self._members = members
        self._group_rank = group_rank
        self.rank = members.index(group_rank)
        self.size = len(members)
        self._computing = False

    def post(
        self,
        index: int,
        lane: int,
        sends: Sequence[tuple[int, Parcel]] = (),
        receives: Sequence[tuple[int, Spec]] = (),
    ) -> Pending:
        if sends:
            self._lend(index, lane, sends, self._streams.mark())
        return _LocalPending(self, index, lane, receives)

    def _lend(self, index: int, lane: int, sends: Sequence[tuple[int, Parcel]], ready: Any) -> None:
        box = self._board.boxes[self._group_rank]
        for parcel, peers in _by_parcel(sends):
            owner = self.rank if parcel.owner is None else parcel.owner
            self._count_readers(owner, peers, 1)  # before any of them can release it
            keys = [(self._call, self._members[peer], index, lane) for peer in peers]
            with box.changed:
                box.parcels.update(dict.fromkeys(keys, Parcel(parcel.tensors, owner, ready)))
                box.changed.notify_all()

    def take(self, index: int, lane: int, peer: int, spec: Spec) -> Parcel:
        source = self._members[peer]
        box = self._board.boxes[source]
        key = (self._call, self._group_rank, index, lane)
        parcel = box.parcels.pop(key, None)
        if parcel is None:
            self._wait(box, lambda: key in box.parcels, lambda: f"rank {source} in step {index} of call {self._call}")
            parcel = box.parcels.pop(key)
        _check_device(parcel, source, spec)
        self._streams.follow(parcel.ready)
        self._streams.hold(parcel.tensors)
        return parcel

    def release(self, parcel: Parcel) -> None:
        if parcel.owner is not None:
            self._count_readers(parcel.owner, [self.rank], -1, self._streams.mark())

    def _count_readers(self, owner: int, readers: Sequence[int], change: int, read: Any = None) -> None:
        box = self._board.boxes[self._members[owner]]
        with box.changed:
            if read is not None:  # before the count, which `close` looks at without the lock
                box.read.setdefault(self._call, []).append(read)
            counts = box.readers.setdefault(self._call, Counter())
            for reader in readers:
                counts[self._members[reader]] += change
            left = box.num_readers[self._call] = box.num_readers.get(self._call, 0) + change * len(readers)
            if left == 0:  # what the owner waits for in `close`; waking it for every reader costs all of them
                box.changed.notify_all()

    def close(self) -> None:
        # A rank that hands a parcel on counts its reader before it releases its own hold, so the count of
        # readers cannot touch 0 while anybody still reads or will read.
        box = self._board.boxes[self._group_rank]
        self._wait(
            box,
            lambda: not box.num_readers.get(self._call),
            lambda: f"{self._still_reading(box)} to read rank {self._group_rank}'s tensors in call {self._call}",
        )
        # What a rank lent that failed since, it may have overwritten.
        self._board.check(lambda: f"what was read in call {self._call} may be wrong")
        box.num_readers.pop(self._call, None)
        box.readers.pop(self._call, None)
        for read in box.read.pop(self._call, ()):
            self._streams.follow(read)

    def _still_reading(self, box: _Mailbox) -> str:
        return _named(rank for rank, count in sorted(box.readers[self._call].items()) if count)

    def _wait(self, box: _Mailbox, ready: Callable[[], bool], waiting_for: Callable[[], str]) -> None:
        if ready():
            return
        with self._others_computing(), box.changed:
            self._board.wait(box, ready, waiting_for)

    @contextmanager
    def computing(self):
        """At most as many workers as there are cores; each goes on until it must wait, while its caches are warm."""
        with self._permits:
            self._computing = True
            try:
                yield
            finally:
                self._computing = False

    @contextmanager
    def _others_computing(self):
        if not self._computing:
            yield
            return
        self._permits.give_back()
        try:
            yield
        finally:
            self._permits.take()


def _by_parcel(sends: Sequence[tuple[int, Parcel]]) -> list[tuple[Parcel, list[int]]]:
    """Each parcel with the peers that it goes to: most often one goes to all."""
    found: dict[int, tuple[Parcel, list[int]]] = {}
    for peer, parcel in sends:
        found.setdefault(id(parcel), (parcel, []))[1].append(peer)
    return list(found.values())


def _check_device(parcel: Parcel, source: int, spec: Spec) -> None:
    found = parcel.tensors[0].device
    if found != spec.device:
        raise UnsupportedError(
            explain(
                "the workers of a local ring must have their tensors on one device: they read each other's in place.",
                got=f"{found} on rank {source}, {spec.device} on the rank that reads",
                fix="one device for all workers, or a process for each device (torchrun, NCCL)",
            )
        )


class _LocalPending(Pending):
    def __init__(self, channel: _LocalChannel, index: int, lane: int, receives: Sequence[tuple[int, Spec]]) -> None:
        self._take = channel.take
        self._keys = [(index, lane, peer, spec) for peer, spec in receives]

    def wait(self) -> list[Parcel]:
        return [self._take(*key) for key in self._keys]
