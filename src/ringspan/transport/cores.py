"""How many may compute at once, and on which of this process's cores."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue

# PyDLL keeps Python's lock: CDLL would hand it to another thread for a call of nanoseconds, and wait to have it back.
_getcpu = getattr(ctypes.PyDLL(None), "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Permits:
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


class Cores(Permits):
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
