"""One process of a group: prepares a problem, shows its result, does one timed call after another.

Started by group.py as `python -m benchmarks.peers.worker '{"peer": ...}'`; between questions it sleeps in a read.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import re
import signal
import sys
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from benchmarks.peers.adapters import PEERS
from benchmarks.peers.contract import Calls, Problem

GROUP_TIMEOUT_S = 120


def main() -> None:
    asked = json.loads(sys.argv[1])
    _die_with_the_driver()
    worker = Worker(**asked["place"])
    pipe = Connection(asked["fd"])
    answers = {"prepare": worker.prepare, "show": worker.show, "time": worker.time, "versions": worker.versions}
    with contextlib.suppress(EOFError):  # the driver has gone or closed the group
        worker.join()
        pipe.send("ready")
        while True:
            question, arguments = pipe.recv()
            try:
                pipe.send(answers[question](*arguments))
            except Exception as error:
                pipe.send(error_text(error))


class Worker:
    def __init__(self, peer: str, rank: int, workers: int, store: str):
        self.peer, self.rank, self.workers, self.store = PEERS[peer], rank, workers, store
        self.num_processes = self.peer.num_processes(workers)
        self.prepared: Calls | None = None

    def join(self) -> None:
        if self.peer.environment != "torch":
            return
        import torch
        import torch.distributed as dist

        torch.set_num_threads(self.peer.num_threads())
        if not self.peer.one_process:
            store = dist.FileStore(self.store, self.num_processes)
            timeout = timedelta(seconds=GROUP_TIMEOUT_S)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.num_processes, timeout=timeout)

    def prepare(self, problem: Problem) -> bool:
        self.prepared = None  # frees the last one
        gc.collect()
        places = np.concatenate(self.peer.ranges(problem, self.rank, self.workers))
        shards = np.ascontiguousarray(problem.arrays()[:, :, places])
        self.prepared = self.peer.calls(problem, shards, self.rank, self.workers)
        self.call = self.prepared.both if problem.backward else self.prepared.forward
        self.call()
        return True

    def show(self, problem: Problem) -> list[np.ndarray]:
        """out, and its gradients if asked for, of this process's tokens."""
        self.prepare(problem)
        results = self.call()
        return [self.prepared.read(x) for x in (results if problem.backward else [results])]

    def time(self, repeats: int) -> float:
        """Seconds of a call, from when all ranks are here."""
        if not self.peer.one_process:
            import torch.distributed as dist

            dist.barrier()
        begin = time.perf_counter()
        for _ in range(repeats):
            self.call()
        return (time.perf_counter() - begin) / repeats

    def versions(self) -> dict[str, str]:
        known = ("jax", "jaxlib") if self.peer.environment == "jax" else ("torch",)
        return {name: importlib.metadata.version(name) for name in (*known, *self.peer.packages)}


def error_text(error: BaseException) -> Any:
    """Sent in the place of an answer."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
    told = re.sub(r" \(/[^)]*\)", "", lines[0])  # without paths of this machine
    return {"error": f"{type(error).__name__}: {told[:300]}"}


def _die_with_the_driver() -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere the end of the pipe ends an idle one
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    main()
