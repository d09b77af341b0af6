"""Rings of threads in one process: the group, the current group of a thread, and `run_local`.

Nothing is copied: a parcel is handed over as references, and a rank leaves a call only when nobody reads its
tensors any more. On a GPU every worker has a stream of its own, and it is the streams that wait for each other.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ringspan.errors import (
    ArgumentError,
    PeerRefusedError,
    RankFailedError,
    RingspanError,
    UnsupportedError,
    WorkerError,
    explain,
)
from ringspan.transport.contract import Channel, Parcel, Pending, Spec, Transport
from ringspan.transport.streams import Streams, streams_in_use, streams_of, threads_are_not_captured

DEFAULT_TIMEOUT_S = 1800.0

# PyDLL keeps Python's lock: CDLL would hand it to another thread for a call of nanoseconds, and wait to have it back.
_getcpu = getattr(ctypes.PyDLL(None), "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None
_serial = itertools.count()
_thread = threading.local()


class LocalGroup:
    """What `run_local` hands to each worker: its place among the threads of one ring."""

    def __init__(self, board: _Board, rank: int) -> None:
        self._board = board
        self._rank = rank
        self.transport = LocalTransport(board, rank)

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._board.size

    @property
    def name(self) -> str:
        """Names the group; the rank is that of the worker thread in which the name is resolved."""
        return f"local:{self._board.serial}"

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
    return LocalGroup(_Board(1, DEFAULT_TIMEOUT_S), 0)


def run_local(fn: Callable[..., Any], num_workers: int, *args: Any, timeout: float | None = None) -> list[Any]:
    """Run ``fn(group, *args)`` in `num_workers` threads of this process, as the ranks of one ring.

    `group.rank()` and `group.size()` tell a worker its place. Returns the workers' results, by rank. Grad mode,
    inference mode and autocast of the caller hold in the workers. torch's threads are shared out over the workers while
    they run. `timeout` bounds every wait of one worker for another, in seconds (default 1800). Where CUDA is in use,
    each worker runs on a stream of its own of the caller's current device, after what the caller has launched; what
    the caller launches next comes after them. For tensors on another GPU none of that holds: torch.cuda.set_device
    first. Backward runs in the worker's own thread on every device. Workers
    share torch's random number generator: make what all of them need before, or give each a torch.Generator.

    If a worker raises, the others stop at their next exchange, and the first failure comes out: an error of
    ringspan with its type and the rank added, any other exception as WorkerError raised from it.
    """
    if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 1:
        raise ArgumentError(
            explain("num_workers must be an integer of at least 1.", got=repr(num_workers), fix="e.g. 4")
        )
    if timeout is not None and not (isinstance(timeout, (int, float)) and 0 < timeout <= threading.TIMEOUT_MAX):
        most = f"of at most {threading.TIMEOUT_MAX:.0e}"
        raise ArgumentError(explain(f"timeout must be a positive number of seconds {most}.", got=repr(timeout)))
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise threads_are_not_captured()
    board = _Board(num_workers, DEFAULT_TIMEOUT_S if timeout is None else float(timeout))
    groups = [LocalGroup(board, rank) for rank in range(num_workers)]
    results: list[Any] = [None] * num_workers
    carry, streams = _carried_modes(), streams_in_use()
    begin, ends = streams.mark(), [None] * num_workers

    def work(group: LocalGroup) -> None:
        try:
            with _entered(group), carry(), streams.own(group.rank()):
                streams.follow(begin)
                try:
                    results[group.rank()] = fn(group, *args)
                except BaseException as error:  # told here, since a GPU that is done for refuses the mark too
                    board.fail(group.rank(), error)
                ends[group.rank()] = streams.mark()
        except BaseException as error:  # also KeyboardInterrupt: the others must not wait for this worker
            board.fail(group.rank(), error)

    threads = [
        threading.Thread(target=work, args=(group,), name=f"ringspan-worker-{group.rank()}", daemon=True)
        for group in groups
    ]
    with _thread_shares.shared_by(num_workers):
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C in the caller, or no more threads: release the workers before leaving
            board.fail(None, error)
            raise
    try:
        for end in ends:
            streams.follow(end)
        streams.hold([x for x in tree_leaves(results) if isinstance(x, torch.Tensor)])
    except Exception:
        if board.failure is None:  # else a GPU that is done for, and what it was that failed is told below
            raise
    if board.failure is not None:
        _raise_failure(*board.failure)
    return results


def _raise_failure(rank: int | None, error: BaseException) -> None:
    if isinstance(error, RingspanError):
        error.add_note(f"raised in rank {rank} of run_local")
        raise error
    if not isinstance(error, Exception):
        raise error
    raise WorkerError(f"rank {rank} of run_local raised {type(error).__name__}: {error}") from error


@contextmanager
def _entered(group: LocalGroup):
    if not hasattr(_thread, "groups"):
        _thread.groups = []
    _thread.groups.append(group)
    try:
        yield
    finally:
        _thread.groups.pop()


def _carried_modes() -> Callable[[], AbstractContextManager]:
    """The caller's grad mode, inference mode and autocast, to be entered in another thread."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = [
        (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)) for device in ("cpu", "cuda")
    ]
    cache = torch.is_autocast_cache_enabled()

    @contextmanager
    def entered():
        # autograd's own threads, one a device, would run the backward of all workers: the first one's wait for the
        # others would never end.
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            torch.autograd.set_multithreading_enabled(False),
        ):
            contexts = [
                torch.autocast(device, dtype=dtype, enabled=True, cache_enabled=cache)
                for device, dtype, enabled in autocast
                if enabled
            ]
            for context in contexts:
                context.__enter__()
            try:
                yield
            finally:
                for context in reversed(contexts):
                    context.__exit__(None, None, None)

    return entered


class _ThreadShares:
    """torch.set_num_threads holds for a thread, and for those that start later: the first run_local sets it, and each
    sets the number from before in its caller's thread, since others may have begun while it ran. Not a worker's: it has
    its share.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._before = 0

    @contextmanager
    def shared_by(self, num_workers: int):
        in_worker = current_group() is not None
        entered = False
        try:
            with self._lock:
                self._depth, entered = self._depth + 1, True
                if self._depth == 1:
                    self._before = torch.get_num_threads()
                    torch.set_num_threads(max(1, self._before // num_workers))
            yield
        finally:
            with self._lock:
                self._depth -= entered
                if not in_worker:
                    torch.set_num_threads(self._before)


_thread_shares = _ThreadShares()


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Board:
    """What the ranks of one local ring share."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size = size
        self.serial = next(_serial)
        self.timeout_s = timeout_s
        self.boxes = [_Mailbox() for _ in range(size)]
        self.permits = _Cores(min(size, num_cores()))
        # Of workers on a GPU: threads that all launch would hand Python's lock to and fro with every operation.
        self.launching = _Permits(1)
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


class _Permits:
    """A semaphore that costs a microsecond: threading's own is made of Python."""

    def __init__(self, count: int) -> None:
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(None)

    def take(self) -> None:
        self._free.get()

    def give_back(self) -> None:
        self._free.put(None)

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.give_back()


class _Cores(_Permits):
    """Permits to compute. Who waited for one goes on where the other left.

    Left alone, Linux wakes it beside a thread that computes, as likely as not: no core is free at that moment. One
    core then stays idle until the next tick (docs/decisions/0011-small-shards.md).
    """

    def take(self) -> None:
        try:
            self._free.get_nowait()
        except queue.Empty:
            _move_to(self._free.get())

    def give_back(self) -> None:
        self._free.put(_current_core())


def _current_core() -> int | None:
    return None if _getcpu is None else _getcpu()


def _move_to(core: int | None) -> None:
    """Moves this thread, which the scheduler may move on."""
    if core is None or core == _current_core():
        return
    with contextlib.suppress(OSError):  # not allowed, or no more
        allowed = os.sched_getaffinity(0)
        if core in allowed:
            os.sched_setaffinity(0, {core})
            os.sched_setaffinity(0, allowed)


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

    def __init__(self, board: _Board, rank: int) -> None:
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
        board: _Board,
        call: int,
        members: tuple[int, ...],
        group_rank: int,
        streams: Streams,
        permits: _Permits,
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
