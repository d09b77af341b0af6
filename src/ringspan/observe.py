"""Watching a ring at work: who wants to know is told of every step of every call of this thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ringspan.schedule.contract import Hop, Schedule, Step
from ringspan.transport.contract import Pending

_thread = threading.local()


@dataclass(frozen=True)
class Flight:
    """One hop that this rank received by copy. what: "shard", "gradient" or "state" (of travelling queries).

    begin_ns, end_ns: posted and arrived.
    """

    what: str
    hop: Hop
    begin_ns: int
    end_ns: int
    num_bytes: int


@dataclass(frozen=True)
class StepRecord:
    """One finished step of one rank. All times are of time.perf_counter_ns().

    phase: "forward" or "backward". place: how many steps this rank has finished, of num_steps.
    From begin_ns to handed_ns, handing out what others need (in shared memory, a copy of this rank's own shard); to
    posted_ns, in the first step, waiting for a core; to computed_ns, kernels; to end_ns, waiting for transfers.
    computed: the shards whose tiles were computed; small ones may be left to a later step and computed together.
    flights: of what arrived by copy for the next step; empty where shards are read in place.
    """

    phase: str
    step: Step
    place: int
    num_steps: int
    begin_ns: int
    handed_ns: int
    posted_ns: int
    computed_ns: int
    end_ns: int
    computed: tuple[int, ...]
    flights: tuple[Flight, ...]

    @property
    def compute_s(self) -> float:
        return (self.computed_ns - self.posted_ns) * 1e-9

    @property
    def wait_s(self) -> float:
        return (self.end_ns - self.computed_ns) * 1e-9

    @property
    def flight_s(self) -> float:
        """From the first posting to the last arrival of what this step received."""
        if not self.flights:
            return 0.0
        return (max(x.end_ns for x in self.flights) - min(x.begin_ns for x in self.flights)) * 1e-9


@contextmanager
def steps(callback: Callable[[StepRecord], None]):
    """Call `callback` after every step that this thread's calls finish inside the block."""
    watchers = _thread.__dict__.setdefault("watchers", [])
    watchers.append(callback)
    try:
        yield
    finally:
        watchers.remove(callback)


class StepClock:
    """Reads the clock between the parts of each step, and tells the watchers. Cheap enough to run always."""

    def __init__(self, phase: str, schedule: Schedule) -> None:
        self._phase, self._num_steps, self._place = phase, len(schedule.steps), 0
        self._begin_ns = self._posted_ns = self._computed_ns = time.perf_counter_ns()
        self._handed_ns: int | None = None
        self._computed: tuple[int, ...] = ()

    def handed_out(self) -> None:
        """Before the first step: this rank's own shard is where others can take it."""
        self._handed_ns = time.perf_counter_ns()

    def posted(self) -> None:
        self._posted_ns = time.perf_counter_ns()

    def computed(self, shards: tuple[int, ...]) -> None:
        self._computed_ns = time.perf_counter_ns()
        self._computed = shards

    def finish(self, step: Step, shards: Pending, rides: Pending | None = None) -> None:
        """shards, rides: what the step received, now that it was waited for."""
        end_ns = time.perf_counter_ns()
        self._place += 1
        watchers = getattr(_thread, "watchers", ())
        if watchers:
            flights = [*self._flights("shard", [step.receive] if step.receive else (), shards)]
            if rides is not None:
                what = "gradient" if self._phase == "backward" else "state"
                flights += self._flights(what, step.ride_receive, rides)
            record = StepRecord(
                self._phase,
                step,
                self._place,
                self._num_steps,
                self._begin_ns,
                self._handed_ns or self._posted_ns,
                self._posted_ns,
                self._computed_ns,
                end_ns,
                self._computed,
                tuple(flights),
            )
            for callback in watchers:
                callback(record)
        self._begin_ns, self._handed_ns = end_ns, None

    def _flights(self, what: str, hops: Sequence[Hop], pending: Pending):
        if hops and pending.arrived_ns is not None:
            for hop, num_bytes in zip(hops, pending.received_bytes, strict=True):
                # What is quick has arrived before the posting is over, and so before the clock is read.
                begin_ns = min(self._posted_ns, pending.arrived_ns)
                yield Flight(what, hop, begin_ns, pending.arrived_ns, num_bytes)
