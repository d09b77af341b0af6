"""The driver's end of one contender: its processes, blocked in a read unless asked; every wait has a bound."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from benchmarks.peers.contract import Peer, Problem

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 120
LIMIT_S = 300
GRACE_S = 5  # for the other ranks, once one has failed


class PeerFailed(Exception):
    """What a peer said when it failed, or that it died or did not answer."""


class Group:
    def __init__(self, peer: Peer, workers: int, python: str):
        self.peer, self.workers = peer, workers
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        self.closed = False
        try:
            for rank in range(peer.num_processes(workers)):
                self._start(rank, python)
            self._answers(START_LIMIT_S)
        except BaseException:
            self.close()
            raise

    def show(self, problem: Problem) -> list[list]:
        return self._ask("show", problem)

    def prepare(self, problem: Problem) -> None:
        self._ask("prepare", problem)

    def time(self, repeats: int = 1) -> float:
        """Seconds of a call, the slowest rank's."""
        return max(self._ask("time", repeats))

    def versions(self) -> dict[str, str]:
        return self._ask("versions")[0]

    def close(self) -> None:
        self.closed = True
        for process in self._processes:
            process.kill()
            process.wait()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    def _start(self, rank: int, python: str) -> None:
        ours, theirs = Pipe()
        place = dict(peer=self.peer.name, rank=rank, workers=self.workers, store=f"{self._folder.name}/store")
        asked = json.dumps(dict(place=place, fd=theirs.fileno()))
        with open(self._log(rank), "wb") as log:
            process = subprocess.Popen(
                [python, "-m", "benchmarks.peers.worker", asked],
                cwd=ROOT,
                env=environment_of(self.peer, self.workers),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        theirs.close()
        self._pipes.append(ours)
        self._processes.append(process)

    def _ask(self, question: str, *arguments: Any) -> list[Any]:
        try:
            for pipe in self._pipes:
                pipe.send((question, arguments))
            return self._answers(LIMIT_S)
        except OSError as error:
            self.close()
            raise PeerFailed(f"died: {error}") from None
        except BaseException:
            self.close()
            raise

    def _answers(self, limit_s: float) -> list[Any]:
        """One answer of every rank. After a failure the group is of no use: the caller closes it."""
        deadline = time.monotonic() + limit_s
        answers: dict[int, Any] = {}
        failures: list[str] = []
        while len(answers) < len(self._pipes):
            pending = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                failures = failures or [f"no answer within {limit_s:.0f} s"]
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)
                answers[rank] = self._receive(rank)
                if isinstance(answers[rank], dict) and "error" in answers[rank]:
                    failures.append(answers[rank]["error"])
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures:
            raise PeerFailed(failures[0])
        return [answers[rank] for rank in range(len(self._pipes))]

    def _receive(self, rank: int) -> Any:
        try:
            return self._pipes[rank].recv()
        except (EOFError, OSError):
            code = self._processes[rank].wait(timeout=GRACE_S)
            lines = self._log(rank).read_text(errors="replace").strip().splitlines()
            return {"error": f"process ended with {code}: {lines[-1][:300] if lines else 'no output'}"}

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"log{rank}"


def environment_of(peer: Peer, workers: int) -> dict[str, str]:
    """Threads that wait sleep, for all alike: an idle group must not take the cores from the one that is timed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OPENBLAS_", "PYTHONPATH"))}
    return kept | {
        "OMP_NUM_THREADS": str(peer.num_threads()),
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={workers}",
    }
