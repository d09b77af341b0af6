"""NCCL's rules for point-to-point operations, kept by threads on CPU tensors.

A rank's batches run one after the other, in the order of their posting. A batch ends when every send and receive
in it has met its other end in a batch that is running too: the n-th send from a to b meets the n-th receive of b from
a. Tags mean nothing. Data moves when both ends meet, not when they are posted; what is to be received is poisoned
until then. Waiting for a batch stands for a stream that waits, so a circle of ranks shows as a timeout.
"""

from __future__ import annotations

import threading
from collections import deque
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

SEND, RECEIVE = "send", "receive"
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
KNOWN = (*FLOATS, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


class World:
    """What the ranks of one group share. recorder: notes the accesses of each rank's communication stream.

    follows: whether a batch begins after what the poster's current stream held when it was posted, as with NCCL.
    """

    def __init__(self, size: int, recorder=None, follows: bool = True, timeout_s: float = 20.0) -> None:
        self.size, self.timeout_s = size, timeout_s
        self.recorder, self.follows = recorder, follows
        self.queues: list[deque[Batch]] = [deque() for _ in range(size)]
        self.changed = threading.Condition()
        self.store = dist.HashStore()
        self.errors: list[str] = []
        self.num_batches = 0
        self.groups = [Group(self, rank) for rank in range(size)]

    def post(self, rank: int, operations: list) -> Work:
        batch = Batch(rank, [Operation(*operation) for operation in operations])
        if self.recorder is not None:
            batch.begin = self.recorder.now() if self.follows else {}
        with self.changed, _disable_current_modes():
            for operation in batch.operations:
                if operation.what == RECEIVE:
                    operation.tensor.fill_(float("nan") if operation.tensor.is_floating_point() else 0x7F)
            self.queues[rank].append(batch)
            self.num_batches += 1
            while self._advance():
                pass
            self.changed.notify_all()
        return Work(self, batch)

    def _advance(self) -> bool:
        """Let what can meet meet, and batches that are complete end; whether anything has happened."""
        happened = False
        for rank, queue in enumerate(self.queues):
            for send in queue[0].open(SEND) if queue else ():
                theirs = self.queues[send.peer]
                receive = next((x for x in theirs[0].open(RECEIVE) if x.peer == rank), None) if theirs else None
                if receive is not None:
                    self._meet(queue[0], send, theirs[0], receive)
                    happened = True
                    break  # a later send to this peer must not overtake
        for queue in self.queues:
            if queue and not queue[0].open(SEND) + queue[0].open(RECEIVE):
                queue[0].operations.clear()  # it holds its tensors no longer
                queue.popleft().done = True
                happened = True
        return happened

    def _meet(self, batch: Batch, send: Operation, other: Batch, receive: Operation) -> None:
        send.done = receive.done = True
        if (send.tensor.shape, send.tensor.dtype) != (receive.tensor.shape, receive.tensor.dtype):
            self.errors.append(
                f"rank {batch.rank} sends {send.tensor.shape}, {other.rank} takes {receive.tensor.shape}"
            )
            return
        receive.tensor.copy_(send.tensor)
        if self.recorder is not None:
            clocks = [self.recorder.now(each.stream) for each in (batch, other)]
            for each in (batch, other):
                self.recorder.follow(each.begin, each.stream)
                for clock in clocks:
                    self.recorder.follow(clock, each.stream)
            self.recorder.read(send.tensor, batch.stream)
            self.recorder.follow(self.recorder.now(batch.stream), other.stream)
            self.recorder.write(receive.tensor, other.stream)


class Operation:
    def __init__(self, what: str, tensor: torch.Tensor, peer: int) -> None:
        self.what, self.tensor, self.peer, self.done = what, tensor, peer, False


class Batch:
    def __init__(self, rank: int, operations: list[Operation]) -> None:
        self.rank, self.operations, self.done = rank, operations, False
        self.begin: dict[str, int] = {}
        self.stream = f"NCCL of rank {rank}"

    def open(self, what: str) -> list[Operation]:
        return [x for x in self.operations if x.what == what and not x.done]


class Work:
    def __init__(self, world: World, batch: Batch) -> None:
        self._world, self._batch = world, batch

    def is_completed(self) -> bool:
        return self._batch.done

    def wait(self) -> None:
        world = self._world
        with world.changed:
            if not world.changed.wait_for(lambda: self._batch.done or world.errors, world.timeout_s):
                raise RuntimeError("NCCL operation timed out")
            if world.errors:
                raise RuntimeError(world.errors[0])
        if world.recorder is not None:
            world.recorder.follow(world.recorder.now(self._batch.stream))


class Group:
    """What TorchDistTransport asks of a process group."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self._rank = world, rank
        self.group_name = "fake"

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self.world.size

    def get_group_store(self):
        return self.world.store

    def _get_backend(self, device):
        if device.type == "cpu":
            raise RuntimeError("no backend for the CPU")
        options = SimpleNamespace(_timeout=timedelta(seconds=self.world.timeout_s))
        return SimpleNamespace(name=lambda: "nccl", options=options)


def isend() -> None: ...


def irecv() -> None: ...


def batch_isend_irecv(operations: list) -> list[Work]:
    group = operations[0].group
    for x in operations:
        if x.tensor.dtype not in KNOWN and not x.tensor.is_complex():
            raise TypeError(f"Input tensor data type is not supported for NCCL process group: {x.tensor.dtype}")
    what = {isend: SEND, irecv: RECEIVE}
    return [group.world.post(group.rank(), [(what[x.op], x.tensor, x.peer) for x in operations])]


def all_gather(every, mine, group, async_op):
    assert async_op
    me, others = group.rank(), [rank for rank in range(group.size()) if rank != group.rank()]
    every[me].copy_(mine)
    sends = [(SEND, mine, rank) for rank in others]
    return group.world.post(me, sends + [(RECEIVE, every[rank], rank) for rank in others])


fake_dist = SimpleNamespace(
    isend=isend,
    irecv=irecv,
    P2POp=lambda op, tensor, peer, group, tag: SimpleNamespace(op=op, tensor=tensor, peer=peer, group=group),
    batch_isend_irecv=batch_isend_irecv,
    all_gather=all_gather,
    get_global_rank=lambda group, rank: rank,
)


def install(monkeypatch) -> None:
    """Have ringspan.transport.torch_dist take CPU tensors for a GPU's and this module for torch.distributed."""
    from ringspan.transport import torch_dist

    monkeypatch.setattr(torch_dist, "dist", fake_dist)
    monkeypatch.setattr(torch_dist, "_has_gpu", lambda: True)
    monkeypatch.setattr(torch_dist, "_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch_dist.TorchDistTransport, "runs_in_order", lambda transport, device_type: True)
    monkeypatch.setattr(torch_dist, "_backend_name", lambda group, device_type: "nccl")
