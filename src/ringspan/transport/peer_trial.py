"""Whether the ranks of a group can read the memory of each other's GPUs, found out by doing it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ringspan.transport.device_memory import CudaMemory, Words
from ringspan.transport.introduction import exchange
from ringspan.transport.peer_channel import LANES
from ringspan.transport.peer_memory import Peer, PeerMemory, is_done_by
from ringspan.transport.shared_channel import Note
from ringspan.transport.shared_memory import SharedMemoryTransport

_BYTES, _ROUNDS = 1 << 20, 2
_INTRODUCTION = -1  # stands for a step


def connect(control: SharedMemoryTransport, memory: Callable[[], Any] = CudaMemory) -> PeerMemory | str:
    """Try, on all ranks of a group at once, whether they can read the memory of each other's GPUs; or why not.

    The outcome is the same on every rank. memory: gives that of the current device, as `CudaMemory` has it.
    """
    trial, reason = _attempt(lambda: _Trial(control, memory()))
    if (unable := _first_reason(control, reason)) is not None:
        return unable
    words = trial.meet()
    peers, reason = _attempt(lambda: {rank: trial.open(rank, told) for rank, told in words.items()})
    if (unable := _first_reason(control, reason)) is not None:
        return unable
    for number in range(_ROUNDS):
        for part in (partial(trial.write, number, peers), partial(trial.compare, number, peers)):
            wrong, reason = _attempt(part)
            if (unable := _first_reason(control, reason or wrong)) is not None:
                return unable
    return PeerMemory(control, trial.gpu, trial.written, peers)


def _attempt(attempt: Callable[[], Any]) -> tuple[Any, str | None]:
    """What came of it, or why nothing did: whoever raised here would leave the others waiting."""
    try:
        return attempt(), None
    except Exception as error:
        told = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        return None, "".join(filter(str.isprintable, told))  # what JSON escapes may take more bytes than there are


def _first_reason(control: SharedMemoryTransport, reason: str | None) -> str | None:
    """After all ranks have said theirs."""
    answers = exchange(control, {"no": reason})
    return next((f"rank {rank}: {answer['no']}" for rank, answer in enumerate(answers) if answer["no"]), None)


class _Trial:
    """What one rank lets the others open, and a try of it, in rounds: what counts is an event's last recording."""

    def __init__(self, control: SharedMemoryTransport, gpu: Any) -> None:
        self.gpu = gpu
        self._control = control
        self.written = [gpu.new_event() for _ in range(LANES)]
        self._has_read = {rank: gpu.new_event() for rank in control.links}
        self._trial = gpu.create(_BYTES)
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

    def open(self, rank: int, words: Words) -> Peer:
        written, was_read, trial = words
        self._theirs[rank] = self.gpu.open(trial)
        events = [self.gpu.open_event(event) for event in written]
        return Peer(events, self._has_read[rank], self.gpu.open_event(was_read))

    def write(self, number: int, peers: dict[int, Peer]) -> None:
        """After a delay: whoever does not wait for it reads what was there before."""
        for peer in peers.values():
            self.gpu.streams().follow(peer.was_read)
        self.gpu.delay()
        self._trial.fill_(self._value(number, self._control.rank))
        self.gpu.record(self.written[0])

    def compare(self, number: int, peers: dict[int, Peer]) -> str | None:
        """What is wrong, if anything."""
        deadline = time.monotonic() + self._control.timeout_s / 2  # the others wait for this rank's answer meanwhile
        streams = self.gpu.streams()
        for rank, peer in peers.items():
            with self.gpu.pulling():
                streams.follow(peer.written[0])
                found = self._theirs[rank].clone()
                self.gpu.record(peer.has_read)
                different = (found != self._value(number, rank)).sum()
                if not is_done_by(deadline, self.gpu, streams.mark()):
                    return f"nothing of rank {rank} could be read within {self._control.timeout_s / 2:g} s"
                wrong = int(different)
            if wrong:
                return f"read {wrong} of {_BYTES} bytes of rank {rank} wrongly"
        return None

    def _value(self, number: int, rank: int) -> int:
        return (1 + number + _ROUNDS * rank) % 251
