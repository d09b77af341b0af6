"""Threads that sit in waits which can be neither polled nor aborted, while their callers watch the outcome."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from typing import Any


class Outcome(Future):
    """When works are done. position: the work that is being waited for; at_ns: when all were done."""

    position = 0
    at_ns: int | None = None


def stop_all(waiters: dict[Any, Waiter]) -> None:
    for waiter in waiters.values():
        waiter.stop()


class Waiter:
    """A thread that sits in gloo's waits, one list of works after the other, in the order of their posting."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        # A daemon: a thread inside gloo's wait must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()

    def wait_for(self, works: list) -> Outcome:
        outcome = Outcome()
        self._jobs.put((works, outcome))
        return outcome

    def stop(self) -> None:
        self._jobs.put(None)

    @staticmethod
    def _run(jobs: queue.SimpleQueue) -> None:
        while (job := jobs.get()) is not None:
            works, outcome = job
            failure = work = None
            try:
                for outcome.position, work in enumerate(works):
                    work.wait()
            except Exception as error:  # gloo raises RuntimeError and DistBackendError
                failure = error if isinstance(error, RuntimeError) else RuntimeError(str(error))
            # The caller must be the last to hold the works: one that dies in this thread while the interpreter
            # shuts down takes the process with it ("terminate called without an active exception").
            del job, work, works
            outcome.at_ns = time.perf_counter_ns()
            if failure is None:
                outcome.set_result(None)
            else:
                outcome.set_exception(failure)
            del outcome, failure
