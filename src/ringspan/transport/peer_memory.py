"""Process groups on one host, for tensors on GPUs: shards are published once, and whoever needs one pulls it.

A pull is a copy by the copy engine, on a stream of its own: no multiprocessor and no channel of NCCL's takes part.
What ranks tell each other goes through shared memory's pipes. A note is sent when the work that it tells of has been
launched, not when it is done; the reader's stream waits for the owner's event, and the owner's for the reader's
before it writes there again. So no thread waits for a GPU, and no stream for what has not been launched
(docs/decisions/0023-peer-memory.md).
"""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from typing import Any

from torch import Tensor

from ringspan.errors import RankFailedError, UnsupportedError, explain
from ringspan.transport.contract import Channel, Transport
from ringspan.transport.device_memory import Words
from ringspan.transport.peer_channel import PeerChannel
from ringspan.transport.segments import Pool
from ringspan.transport.shared_memory import SharedMemoryTransport

_DRAIN_S, _POLL_S = 10.0, 1e-4


@dataclass(eq=False)
class Window:
    """Memory of this rank on its GPU that others may open. was_lent: since it was written last."""

    serial: int
    memory: Tensor
    was_lent: bool = False

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes


@dataclass
class Peer:
    """What one other rank and this one share.

    written: events after which what it published may be read, by lane; has_read: the one after which this rank has
    read it, was_read: after which it has read this rank's. windows: what is open of its memory, by serial; told: which
    of this rank's windows it knows.
    """

    written: list[Any]
    has_read: Any
    was_read: Any
    windows: dict[int, Tensor] = field(default_factory=dict)
    told: dict[int, weakref.ref[Window]] = field(default_factory=dict)


class PeerMemory(Transport):
    """This rank's end of a process group whose ranks can open the memory of each other's GPUs."""

    def __init__(
        self, control: SharedMemoryTransport, gpu: Any, written: Sequence[Any], peers: dict[int, Peer]
    ) -> None:
        super().__init__()
        self.rank, self.size = control.rank, control.size
        self.control, self.gpu = control, gpu
        self.written, self.peers = written, peers
        serials = itertools.count()
        # A function of its own: with a method of this object it would lie in a circle, and stay until Python looks.
        self.pool: Pool[Window] = Pool(lambda num_bytes: Window(next(serials), gpu.create(num_bytes)))
        self._life = _Life(gpu, [peer.was_read for peer in peers.values()])
        # multiprocessing's, for its children end without Python's own finalizers.
        Finalize(self, self._life.drain, exitpriority=0)

    def begin_call(self) -> int:
        return self.control.begin_call()

    def agree(self, call: int, message: bytes) -> list[bytes]:
        return self.control.agree(call, message)

    def channel(self, call: int, members: Sequence[int], via: str = "auto", device_type: str = "cuda") -> Channel:
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
        if window.was_lent:
            streams = self.gpu.streams()
            for peer in self.peers.values():
                streams.follow(peer.was_read)
            window.was_lent = False
        return window

    def introduce(self, window: Window, reader: int) -> Words:
        """What the reader does not know yet: how to open the window; and which others are gone."""
        told = self.peers[reader].told
        gone = [serial for serial, known in told.items() if known() is None]
        for serial in gone:
            del told[serial]
        handle = None if window.serial in told else self.gpu.share(window.memory)
        told[window.serial] = weakref.ref(window)
        window.was_lent = True
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
        self.last_pull: Any = None

    def drain(self) -> None:
        """Bounded: what a process that was killed had launched may never be done."""
        deadline = time.monotonic() + _DRAIN_S
        for event in [*self._was_read, *filter(None, [self.last_pull])]:
            with contextlib.suppress(RuntimeError):  # the GPU, or the process that made the event, is done for
                is_done_by(deadline, self._gpu, event)


def is_done_by(deadline: float, gpu: Any, event: Any) -> bool:
    """Wait for the event until then, by time.monotonic(); whether it has come."""
    while not gpu.is_done(event):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def not_captured() -> UnsupportedError:
    what = "a call through peer memory cannot be captured into a CUDA graph: its ranks talk in every step."
    return UnsupportedError(explain(what, fix='transport="torch_dist", with NCCL'))
