"""One rank's end of a torch.distributed process group, by the best means that reach all of its ranks.

Whether the ranks can read each other's memory is tried once per group, at its first call. If so, agreements go
through shared memory's pipes, and so do CPU tensors; all else goes through the process group itself, or by peer memory.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ringspan.errors import UnsupportedError, explain
from ringspan.transport import peer_trial
from ringspan.transport.contract import Channel, Transport, of_the_parent
from ringspan.transport.peer_memory import PeerMemory, not_captured
from ringspan.transport.shared_memory import SharedMemoryTransport, connect
from ringspan.transport.torch_dist import TorchDistTransport, cannot_send

_transports: weakref.WeakKeyDictionary[Any, ProcessGroupTransport] = weakref.WeakKeyDictionary()
_transports_lock = threading.Lock()
_of_parent: weakref.WeakSet[Any] = weakref.WeakSet()  # groups that were there when this process was forked


def _note_groups_of_parent() -> None:
    """A transport knows its process, but the child may make the first call on a group."""
    if dist.is_available():
        _of_parent.update(dist.distributed_c10d._world.pg_map)


os.register_at_fork(after_in_child=_note_groups_of_parent)


def transport_of(group: dist.ProcessGroup) -> ProcessGroupTransport:
    """This rank's one transport of a process group."""
    if group in _of_parent:  # before the lock, which another thread may have held at the fork
        raise of_the_parent(f"process {os.getpid()}, forked when the group was there")
    with _transports_lock:
        if group not in _transports:
            _transports[group] = ProcessGroupTransport(group)
        return _transports[group]


class ProcessGroupTransport(Transport):
    """Shared memory where it reaches every rank, torch.distributed elsewhere; peer memory where asked for, and for
    GPUs that torch.distributed cannot serve."""

    capturable = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.torch_dist = TorchDistTransport(group)
        self.rank, self.size = self.torch_dist.rank, self.torch_dist.size
        self.shared_memory: SharedMemoryTransport | None = None
        self.why_not_shared: str | None = "the group has made no call yet"
        self._tried = False
        self._peer_memory: PeerMemory | str | None = None  # a reason why not; None: not tried yet

    @property
    def _best(self) -> Transport:
        return self.shared_memory or self.torch_dist

    def begin_call(self) -> int:
        if not self._tried:
            self.torch_dist.settle_life()
            found = connect(self.torch_dist, self.torch_dist.timeout_s)
            self._tried = True
            if isinstance(found, str):
                self.why_not_shared = found
            else:
                self.shared_memory, self.why_not_shared = found, None
                # torch holds this object as long as the group is not destroyed, and a DeviceMesh the group for ever.
                _, store = dist.distributed_c10d._world.pg_map.get(self.torch_dist.group, (None, None))
                if store is not None:
                    found.leave_with(store)
        return self._best.begin_call()

    def agree(self, call: int, message: bytes) -> list[bytes]:
        return self._best.agree(call, message)

    def channel(self, call: int, members: Sequence[int], via: str = "auto", device_type: str = "cpu") -> Channel:
        return self._carrier(via, device_type).channel(call, members, via, device_type)

    def _carrier(self, via: str, device_type: str) -> Transport:
        """What is to carry tensors that are there. Every rank comes to the same one, or the same refusal."""
        if via == "torch_dist":
            return self.torch_dist
        if via == "shared_memory":
            found: Transport | str = self.shared_memory or f"{self.why_not_shared}"
            return _able(via, found if device_type == "cpu" else f"the tensors are on {device_type}")
        if via == "peer_memory":
            return _able(via, self._peers() if device_type == "cuda" else f"the tensors are on {device_type}")
        if device_type == "cpu":
            return self._best
        reason = self.torch_dist.why_not(device_type)
        if reason is not None and device_type == "cuda":
            peers = self._peers()
            if isinstance(peers, PeerMemory):
                return peers
            raise cannot_send(device_type, f"{reason}, and of peer memory: {peers}")
        return self.torch_dist

    def _peers(self) -> PeerMemory | str:
        """Tried at the first call that asks for it; what came of it is the same on every rank."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():  # on every rank alike
            raise not_captured()
        if self._peer_memory is None:
            if self.shared_memory is None:
                self._peer_memory = f"its ranks must be processes of one host: {self.why_not_shared}"
            else:
                self._peer_memory = peer_trial.connect(self.shared_memory)
        return self._peer_memory

    def fail(self, error: BaseException) -> None:
        self._best.fail(error)


def _able(via: str, found: Transport | str) -> Transport:
    if isinstance(found, str):
        what = f"transport={via!r} cannot serve this call."
        raise UnsupportedError(explain(what, got=found, fix='transport="auto"'))
    return found
