"""Any torch.distributed process group: non-blocking point-to-point, gloo on CPUs and NCCL on GPUs, which has been run
with groups of one rank only (docs/gpus.md).

gloo's transfers go on by themselves, but its waits can be neither polled nor aborted. So helper threads
sit in them from the moment of posting, while the caller watches them and a key of the group's store under which the
first rank that fails leaves its name and reason. A rank that fails closes the connections on which it still sends: its
caller may overwrite what is sent.

NCCL's transfers run on a stream of the process group. They begin after what the current stream held when they were
posted, so a buffer is read to its end before it is received into again; waiting for them makes the current stream
wait. They know no tags and run in the order of their posting (docs/decisions/0009-nccl-order.md).
"""

from __future__ import annotations

import contextlib
import re
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.errors import RankFailedError, UnsupportedError, explain
from ringspan.transport.bulletin import WATCH_S, Bulletin
from ringspan.transport.contract import Channel, Parcel, Pending, Spec, Transport, allocate, spec_of
from ringspan.transport.waiter import Outcome, Waiter, stop_all

# Tags of ringspan's messages: this bit, then call, step, lane and the tensor's place in its parcel.
_TAG_BIT = 1 << 30
_CALLS, _STEPS, _LANES, _PLACES = 1 << 10, 1 << 14, 1 << 2, 1 << 3

_AGREEMENT_LANE = -1

_POLL_S = 2e-5  # how often it asks an accelerator
_NO_STORE_S = 30.0  # how long a rank waits on where nobody can be told of a failure any more


Operation = tuple[Callable, Tensor, int, int]  # isend or irecv, what, the peer in the ring, the tag

# What torch has a name of NCCL's for, besides complex numbers. Others go as bytes: torch would raise between NCCL's
# start and end of a batch, and every later transfer of this thread, of any group, would wait for that end.
_OF_NCCL = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
)


class TorchDistTransport(Transport):
    """This rank's end of a process group."""

    capturable = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._group = weakref.ref(group)
        self.rank = group.rank()
        self.size = group.size()
        self._has_gloo = _gloo_of(group) is not None
        self._check_can_gather(group)
        self._backends: dict[str, str | None] = {}  # by device type
        self._met = False  # on the accelerator
        self.timeout_s = _timeout_s(group)
        self._bulletin = Bulletin(group)
        self._waiters: dict[tuple[int, bool], Waiter] = {}
        weakref.finalize(group, stop_all, self._waiters)
        self._num_calls = 0
        self._failure: str | None = None
        self.under_way: set[_Posted] = set()  # of gloo's

    def _check_can_gather(self, group: dist.ProcessGroup) -> None:
        """Refuse a group over which the ranks could not even compare their arguments."""
        has_gpu = _has_gpu()
        if self._has_gloo or (has_gpu and _backend_name(group, "cuda") not in (None, "fake")):
            return
        raise UnsupportedError(
            explain(
                "this process group cannot exchange anything between its ranks here.",
                got=f"its backend is {_backend_name(group, 'cpu') or _backend_name(group, 'cuda')}, and "
                f"{'there is a GPU' if has_gpu else 'no GPU is to be seen'}",
                fix='gloo, NCCL where there are GPUs, or both: init_process_group("cpu:gloo,cuda:nccl")',
            )
        )

    def settle_life(self) -> None:
        """Before the first call, agree on how many groups had this name: a rank may have made no call on some."""
        lives = self.agree(self.begin_call(), self._bulletin.life.to_bytes(8, "little"))
        self._bulletin.life = max(int.from_bytes(life, "little") for life in lives)

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        assert group is not None, "the process group was destroyed"
        return group

    def begin_call(self) -> int:
        if self._failure is not None:
            raise RankFailedError(
                explain(
                    "this process group is done for: an earlier call on it failed.",
                    got=self._failure,
                    fix="end the job, or make a new process group",
                )
            )
        self._num_calls += 1
        return self._num_calls

    def agree(self, call: int, message: bytes) -> list[bytes]:
        return self._gather(call, message, on_cpu=self._has_gloo)

    def _gather(self, call: int, message: bytes, on_cpu: bool) -> list[bytes]:
        device = torch.device("cpu") if on_cpu else _accelerator()
        mine = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            work = dist.all_gather(every, mine, group=self.group, async_op=True)
        except RuntimeError as error:  # a neighbour is gone already
            raise self.gave_up(f"every rank to begin call {call}", _said(error), call) from error
        self._met |= not on_cpu
        done = self.watch([work], _AGREEMENT_LANE, receives=True) if on_cpu else _Polled(work)
        self.wait([work], done, [None], lambda _: f"every rank to begin call {call}", call)
        return [part.tobytes() for part in torch.stack(every).cpu().numpy()]  # each copy from a GPU waits for it

    def channel(self, call: int, members: Sequence[int], via: str = "auto", device_type: str = "cpu") -> Channel:
        in_order = self.runs_in_order(device_type)
        if (reason := self.why_not(device_type)) is not None:
            raise cannot_send(device_type, reason)
        if in_order and not self._met:
            # NCCL's first operation on a group must be one of all ranks; the agreement may have gone through gloo.
            self._gather(call, b"\0", on_cpu=False)
        return _DistChannel(self, call, tuple(members), in_order)

    def why_not(self, device_type: str) -> str | None:
        """Why the group cannot send tensors that are there, or None."""
        if device_type not in self._backends:
            self._backends[device_type] = _backend_name(self.group, device_type)
        backend = self._backends[device_type]
        if backend is None or (backend == "gloo" and device_type != "cpu"):
            return f"it has {backend or 'no backend'} for them"
        return None

    def runs_in_order(self, device_type: str) -> bool:
        """Whether transfers go by NCCL, not gloo."""
        return device_type != "cpu"

    def fail(self, error: BaseException) -> None:
        reason = f"{type(error).__name__}: {error}"
        self._failure = self._failure or f"rank {self.rank}: {reason}"
        self._bulletin.report(self.rank, reason)
        # The caller may overwrite its tensors now. What gloo has not sent of them by then must not arrive.
        while self.under_way:
            self.under_way.pop().cut_off()

    def watch(self, works: list, lane: int, receives: bool) -> Outcome:
        """Have a thread wait for the works from now on. Those of one lane that receive, and those that only send,
        are waited for in the order of their posting; that is the order in which the loop needs them."""
        if (lane, receives) not in self._waiters:
            what = f"lane-{lane}-{'receives' if receives else 'sends'}"
            self._waiters[lane, receives] = Waiter(f"ringspan-waits-{what}-of-group-{self.group.group_name}")
        return self._waiters[lane, receives].wait_for(works)

    def order(self, works: list, waiting_for: str) -> None:
        """Have the current stream wait for the works. What NCCL knows of a failure by now comes out here; a hang is
        bounded by its watchdog, which ends the process, or here with TORCH_NCCL_BLOCKING_WAIT=1."""
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise self.gave_up(waiting_for, _said(error), None) from error

    def wait(
        self, works: list, done: Outcome | _Polled, peers: list, waiting_for, roll_call: int | None = None
    ) -> None:
        """Block until the works are done, in their order; raise RankFailedError when that cannot be any more.

        done: what `watch` gave for them.
        """
        deadline = time.monotonic() + self.timeout_s + 5.0  # gloo's own bound comes first, with a reason
        store_gone_at: float | None = None
        while True:
            try:
                done.result(timeout=WATCH_S)
                return
            except FutureTimeout:
                first = self._bulletin.first_failure()
                if first is None or first[0] is not None:
                    store_gone_at = None
                else:  # the rank that hosts it may have ended well: it was done first
                    store_gone_at = store_gone_at or time.monotonic()
                    if time.monotonic() < min(store_gone_at + _NO_STORE_S, deadline):
                        continue
                if first is not None:
                    raise self.gave_up(waiting_for(peers[done.position]), None, roll_call) from None
                if time.monotonic() > deadline:
                    reason = f"no answer within {self.timeout_s:g} s"
                    raise self.gave_up(waiting_for(peers[done.position]), reason, roll_call) from None
            except RuntimeError as error:
                raise self.gave_up(waiting_for(peers[done.position]), _said(error), roll_call) from error

    def gave_up(self, waited_for: str, reason: str | None, roll_call: int | None) -> RankFailedError:
        """The error to raise, after telling the others and asking who else is still there."""
        if reason is not None:  # first of all, so that the others stop waiting too
            self._bulletin.report(self.rank, f"waited for {waited_for}: {reason}")
        missing = "" if roll_call is None else self._bulletin.roll_call(self.rank, self.size, roll_call)
        first = self._bulletin.first_failure()
        self._failure = f"rank {self.rank} waited for {waited_for}{missing}"
        lines = [f"rank {self.rank} gave up waiting for {waited_for}{missing}."]
        if reason is not None:
            lines.append(f"  got  {reason}")
        if first is not None and first[0] != self.rank:
            lines.append(f"  {first[1]}" if first[0] is None else f"  rank {first[0]} failed first: {first[1]}")
        lines.append(f"  fix  look at that rank's own output; the group's timeout is {self.timeout_s:g} s")
        return RankFailedError("\n".join(lines))


def _said(error: RuntimeError) -> str:
    """What gloo said, without the place in its sources and its advice."""
    text = str(error).strip().splitlines()[0]
    return re.sub(r"^\[\S*gloo\S*\] ", "", text).split(". This is typically")[0]


class _DistChannel(Channel):
    def __init__(self, transport: TorchDistTransport, call: int, members: tuple[int, ...], in_order: bool) -> None:
        self._transport = transport
        self.in_order = in_order
        self._gathered: list[tuple[_Posted, list[Operation]]] | None = None
        self._call = call
        self._members = members
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
        posted = _Posted(self._transport, f"in step {index} of call {self._call}")
        operations: list[Operation] = []
        for peer, spec in receives:
            parcel = self.buffer(spec)
            posted.received.append(parcel)
            operations += self._operations(dist.irecv, parcel.tensors, peer, index, lane)
        for peer, parcel in sends:
            messages = [x.resolve_conj().resolve_neg().contiguous() for x in parcel.tensors]
            posted.kept += messages
            operations += self._operations(dist.isend, messages, peer, index, lane)
        if not operations:
            return posted
        posted.peers = [self._members[peer] for _, _, peer, _ in operations]
        if self._gathered is not None:
            self._gathered.append((posted, operations))
            return posted
        self._start([posted], operations)
        if not self.in_order and posted.refused is None:
            self._transport.under_way.add(posted)
            posted.done = self._transport.watch(posted.works, lane, bool(receives))
        return posted

    def _operations(
        self, what: Callable, tensors: Sequence[Tensor], peer: int, index: int, lane: int
    ) -> Iterator[Operation]:
        for place, x in enumerate(tensors):
            if x.numel():  # both ends know the sizes
                as_bytes = self.in_order and x.dtype not in _OF_NCCL and not x.is_complex()
                yield what, x.reshape(-1).view(torch.uint8) if as_bytes else x, peer, self._tag(index, lane, place)

    @contextmanager
    def together(self):
        self._gathered = []
        try:
            yield
            gathered = self._gathered
        finally:
            self._gathered = None
        if gathered:
            self._start([posted for posted, _ in gathered], [x for _, operations in gathered for x in operations])

    def _start(self, posts: Sequence[_Posted], operations: Sequence[Operation]) -> None:
        group, works, refused = self._transport.group, [], None
        try:
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(what, x, dist.get_global_rank(group, self._members[peer]), group, tag)
                    for what, x, peer, tag in operations
                ]
            )
        except RuntimeError as error:  # the connection to a peer is closed
            refused = error
        for posted in posts:
            posted.works, posted.refused = works, refused

    def _tag(self, index: int, lane: int, place: int) -> int:
        assert lane < _LANES and place < _PLACES
        tag = self._call % _CALLS
        for value, bound in ((index % _STEPS, _STEPS), (lane, _LANES), (place, _PLACES)):
            tag = tag * bound + value
        return _TAG_BIT | tag

    def buffer(self, spec: Spec) -> Parcel:
        spare = self._spare.get(spec)
        if spare:
            return spare.pop()
        self._spare.clear()  # of other lengths: kept, they would be more than the two shards that a rank may hold
        return Parcel(allocate(spec))

    def release(self, parcel: Parcel) -> None:
        self._spare.setdefault(spec_of(parcel.tensors), []).append(parcel)

    def close(self) -> None:
        self._spare.clear()


class _Posted(Pending):
    """Transfers under way. Holds on to every buffer until they are done."""

    def __init__(self, transport: TorchDistTransport, where: str) -> None:
        self._transport = transport
        self._where = where
        self.received: list[Parcel] = []
        self.kept: list[Tensor] = []
        self.works: list = []
        self.peers: list[int] = []
        self.refused: RuntimeError | None = None
        self.done: Outcome | None = None

    def wait(self) -> list[Parcel]:
        def waiting_for(peer: int | str) -> str:
            return f"rank {peer} {self._where}"

        if self.refused is not None:
            raise self._transport.gave_up(waiting_for(_named(self.peers)), _said(self.refused), None) from self.refused
        if self.done is not None:
            self._transport.wait(self.works, self.done, self.peers, waiting_for)
            self._transport.under_way.discard(self)
            self.arrived_ns = self.done.at_ns
        elif self.works:
            self._transport.order(self.works, waiting_for(_named(self.peers)))
        self.received_bytes = [sum(x.nbytes for x in parcel.tensors) for parcel in self.received]
        self.kept.clear()
        return self.received

    def cut_off(self) -> None:
        """A wait of gloo's that ends too early closes the connections of the group, on both sides."""
        if self.done is not None and self.done.done():
            return
        for work in self.works:
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(milliseconds=1))


def cannot_send(device_type: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        explain(
            f"this process group cannot send tensors that are on {device_type}.",
            got=reason,
            fix='torch.distributed.init_process_group("cpu:gloo,cuda:nccl")',
        )
    )


def _named(ranks: Sequence[int]) -> str:
    return " or ".join(map(str, sorted(set(ranks))))


class _Polled:
    """A collective of an accelerator, asked again and again: its own wait would not let go of a caller who waits in
    vain. The other end of an `Outcome`."""

    position = 0

    def __init__(self, work: Any) -> None:
        self._work = work

    def result(self, timeout: float) -> None:
        until = time.monotonic() + timeout
        while not self._work.is_completed():
            if time.monotonic() > until:
                raise FutureTimeout
            time.sleep(_POLL_S)
        self._work.wait()


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _accelerator() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _gloo_of(group: dist.ProcessGroup) -> Any:
    """The group's gloo, whatever else serves its other devices ("cpu:gloo,cuda:nccl"), or None."""
    try:
        backend = group._get_backend(torch.device("cpu"))
    except RuntimeError:  # none for the CPU
        return None
    return backend if backend.name() == "gloo" else None


def _backend_name(group: dist.ProcessGroup, device_type: str) -> str | None:
    try:
        return group._get_backend(torch.device(device_type)).name()
    except RuntimeError:
        return None


def _timeout_s(group: dist.ProcessGroup) -> float:
    try:
        backend = _gloo_of(group) or group._get_backend(torch.device("cuda"))
        return backend.options._timeout.total_seconds()
    except (AttributeError, RuntimeError):
        return dist.constants.default_pg_timeout.total_seconds()
