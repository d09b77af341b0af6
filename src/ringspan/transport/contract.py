"""What a transport is: moving tuples of tensors between the ranks of one group, and nothing else.

A `Transport` belongs to one rank of one group and lives as long as the group. Each call of the library opens
one `Channel` on it, for all ranks of the group or for a ring of some of them. Every transport passes the one
behaviour suite, tests/transport_behaviour.py.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringspan.errors import UnsupportedError, explain


@dataclass(frozen=True)
class Spec:
    """What a parcel will hold: a shape for each tensor, a dtype for each, one device."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device


def spec_of(tensors: Sequence[Tensor]) -> Spec:
    return Spec(tuple(tuple(x.shape) for x in tensors), tuple(x.dtype for x in tensors), tensors[0].device)


def allocate(spec: Spec) -> tuple[Tensor, ...]:
    pairs = zip(spec.shapes, spec.dtypes, strict=True)
    return tuple(torch.empty(shape, dtype=dtype, device=spec.device) for shape, dtype in pairs)


@dataclass(eq=False)
class Parcel:
    """Tensors that travel together.

    owner: the ring's rank that lent them, for `release`; ready: after what they may be read, as `Streams.mark` says
    it (both of the local transport).
    """

    tensors: tuple[Tensor, ...]
    owner: int | None = None
    ready: Any = None


class Pending(ABC):
    """Transfers that were posted.

    arrived_ns: when the last of them was done, by time.perf_counter_ns(); known after `wait`, and only where
    tensors are copied. received_bytes: of each parcel that was received so.
    """

    arrived_ns: int | None = None
    received_bytes: Sequence[int] = ()

    @abstractmethod
    def wait(self) -> list[Parcel]:
        """Block, within the group's timeout, until all is sent and received; what was received, in order.

        On an accelerator it is the current stream that waits, not the caller.
        Raises RankFailedError, naming the rank that was waited for and the one that failed first, if known.
        """


class Channel(ABC):
    """One call's transfers. `rank` and `size` count within the ring that the channel was opened for.

    in_place: a parcel is read, or copied, from where its owner put it, so a shard is sent once to all its readers, by
    its owner, and is never handed on. With other channels a received parcel may be sent on until it is released.
    in_order: transfers run in the order of their posting, whatever their lane, and each only ends when the other
    rank has come to it too. So all that two ranks post for each other in one step goes into one `together`, or ranks
    wait for each other in a circle (docs/decisions/0009-nccl-order.md).
    """

    rank: int
    size: int
    in_place: bool = False
    in_order: bool = False

    @abstractmethod
    def post(
        self,
        index: int,
        lane: int,
        sends: Sequence[tuple[int, Parcel]] = (),
        receives: Sequence[tuple[int, Spec]] = (),
    ) -> Pending:
        """Start transfers and return at once. (index, lane) pairs a send with its receive between two ranks.

        A parcel that is sent must not be changed before `close`; one that `buffer` made, not before `wait`. It is
        not sent to a rank again that may still read it.
        """

    def together(self) -> AbstractContextManager:
        """What is posted inside starts at the end of it, at once; nothing is to be waited for inside."""
        return nullcontext()

    def buffer(self, spec: Spec) -> Parcel:
        """Fresh tensors, not initialised, to be filled and sent. `release` takes them back for reuse."""
        return Parcel(allocate(spec))

    def release(self, parcel: Parcel) -> None:  # noqa: B027 (not every transport reuses)
        """The caller is done with a received parcel, or with one that `buffer` made and whose `wait` is over."""

    @abstractmethod
    def close(self) -> None:
        """Block until every rank that reads this rank's own tensors has finished with them."""

    def computing(self) -> AbstractContextManager:
        """Around a pass. Lets a transport bound how many compute at once; it must not count who waits in it."""
        return nullcontext()


class Transport(ABC):
    """One rank's end of a group.

    capturable: whether transfers between GPUs can be captured into a CUDA graph, once the ranks have met.
    is_alone: whether there is nobody to meet, and so nothing to exchange. (A process group of one is not.)
    """

    rank: int
    size: int
    capturable: bool = False
    is_alone: bool = False

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._in_call = threading.Lock()

    @contextmanager
    def one_call(self) -> Iterator[None]:
        """Around a call: refuses what would mix with others', and what no exchange of the ranks would notice."""
        if os.getpid() != self._pid:  # nobody is told: the others know only the parent
            raise of_the_parent(f"process {os.getpid()}; the group's is {self._pid}")
        if not self._in_call.acquire(blocking=False):
            error = UnsupportedError(
                explain(
                    "a call began on a group while another was under way: ranks may take the two in another order.",
                    got=f"thread {threading.current_thread().name!r} of rank {self.rank}",
                    fix="one call after the other, or a group for each thread (torch.distributed.new_group)",
                )
            )
            self.fail(error)
            raise error
        try:
            yield
        finally:
            self._in_call.release()

    @abstractmethod
    def begin_call(self) -> int:
        """The number of the call that begins; equal on all ranks as long as they make the same calls."""

    @abstractmethod
    def agree(self, call: int, message: bytes) -> list[bytes]:
        """Every rank's message, by rank. All messages of a call have one length. Raises RankFailedError."""

    @abstractmethod
    def channel(self, call: int, members: Sequence[int], via: str = "auto", device_type: str = "cpu") -> Channel:
        """The channel of a ring of these ranks of the group, the caller among them. Every rank of the group opens one.

        via: a name in `ringspan.transport.table.TRANSPORTS`, for groups that several can serve.
        """

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """This rank gives up in the middle of a call: the others are told and raise; the group is done for."""


def of_the_parent(got: str) -> UnsupportedError:
    return UnsupportedError(
        explain(
            "a forked process cannot call on a group of its parent: the others would take it for the parent.",
            got=got,
            fix="call in the parent, or make a group in the child",
        )
    )
