"""Watching a ring at work: who wants to know is told of every step of every call of this thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

_thread = threading.local()


@dataclass(frozen=True)
class StepRecord:
    """One finished step of one rank.

    phase: "forward" or "backward". index: of the step; place: how many steps this rank has finished, of
    num_steps. compute_s: in kernels; wait_s: for transfers.
    """

    phase: str
    index: int
    place: int
    num_steps: int
    compute_s: float
    wait_s: float


@contextmanager
def steps(callback: Callable[[StepRecord], None]):
    """Call `callback` after every step that this thread's calls finish inside the block."""
    watchers = _thread.__dict__.setdefault("watchers", [])
    watchers.append(callback)
    try:
        yield
    finally:
        watchers.remove(callback)


class StepTimer:
    """Splits the time of a pass into computing and waiting. Cheap enough to run always."""

    def __init__(self, phase: str, num_steps: int) -> None:
        self._phase, self._num_steps, self._place = phase, num_steps, 0
        self._spent = {"compute": 0.0, "wait": 0.0}

    @contextmanager
    def time(self, what: str):
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._spent[what] += time.perf_counter() - begin

    def finish_step(self, index: int) -> None:
        self._place += 1
        record = StepRecord(
            self._phase, index, self._place, self._num_steps, self._spent["compute"], self._spent["wait"]
        )
        self._spent = {"compute": 0.0, "wait": 0.0}
        for callback in getattr(_thread, "watchers", ()):
            callback(record)
