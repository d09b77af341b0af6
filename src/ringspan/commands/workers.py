"""In which processes a job runs: local ones that are started and watched here, or those that torchrun started."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ringspan.commands import attend
from ringspan.commands.asked import Exit
from ringspan.commands.job import Job, refuse_unwritable
from ringspan.commands.report import complain
from ringspan.errors import PeerRefusedError, RankFailedError, RingspanError, UnsupportedError
from ringspan.transport.cores import num_cores

_HOST = "127.0.0.1"
_STORY_CHARACTERS = 20_000
_GRACE_S = 1.0  # after the first failure, how long the others may take to say what they know

Story = tuple[int, str]  # how near it is to the cause (0: the nearest), and what to tell


def tell(error: BaseException) -> Story:
    """What a worker says of the exception that ended it."""
    if isinstance(error, RankFailedError):
        return 3, str(error)
    if isinstance(error, PeerRefusedError):
        return 2, str(error)
    if isinstance(error, RingspanError):
        return 1, str(error)
    return 0, "".join(traceback.format_exception(error)).rstrip()[-_STORY_CHARACTERS:]


def exit_of(error: BaseException) -> Exit:
    refused = isinstance(error, (ValueError, TypeError, UnsupportedError)) and isinstance(error, RingspanError)
    return Exit.BAD_INPUT if refused else Exit.FAILED


# Processes that torchrun started.


def run_under_torchrun(planned: Callable[[int], Job], timeout_s: float) -> NoReturn:
    """The job on the ranks that torchrun started, on one machine or several. planned: the job for so many workers."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    rank, size = dist.get_rank(), dist.get_world_size()
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # what torchrun sets where the user said nothing
        torch.set_num_threads(max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", size))))
    try:
        job = _planned_alike(planned, rank, size)
        code = Exit.BAD_INPUT if job is None else attend.run_as_rank(job)
        dist.destroy_process_group()
    except Exception as error:
        complain(f"worker {rank} of {size}: {tell(error)[1]}")
        code = exit_of(error)
    _leave(code)


def _planned_alike(planned: Callable[[int], Job], rank: int, size: int) -> Job | None:
    """This rank's job, or None where some rank refused: rank 0 says which and why."""
    job, refusal = None, None
    try:
        job = planned(size)
        if rank == 0:
            refuse_unwritable(job)
    except RingspanError as error:
        refusal = str(error)
    refusals: list[Any] = [None] * size
    dist.all_gather_object(refusals, refusal)
    ranks = [other for other, text in enumerate(refusals) if text is not None]
    if ranks and rank == 0:
        complain(f"{refusals[ranks[0]]}\n  on   rank {', '.join(map(str, ranks))}")
    return None if ranks else job


# Processes of one's own.


def run_local_processes(job: Job) -> Exit:
    """The job in processes of this machine, over gloo. Leaves none of them behind, whatever happens."""
    store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])  # torch is then imported once, not once a worker
    workers = [_Worker(context, rank, job, store.port) for rank in range(job.num_workers)]
    try:
        return _supervise(workers)
    finally:
        _end(workers)
        if job.part is not None:
            job.part.unlink(missing_ok=True)


class _Worker:
    """One process, from outside."""

    def __init__(self, context: Any, rank: int, job: Job, port: int) -> None:
        self.rank = rank
        self._inbox, outbox = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(
            target=_work, args=(rank, job, port, outbox), name=f"ringspan-worker-{rank}", daemon=True
        )
        self.process.start()
        outbox.close()

    def story(self) -> Story | None:
        """Why the process ended, or None if it ended well."""
        code = self.process.exitcode
        if code in (Exit.OK, Exit.BEYOND_BOUND):
            return None
        try:
            return self._inbox.recv()
        except (EOFError, OSError):
            return -1, self._ended_by(code)

    def _ended_by(self, code: int | None) -> str:
        if code is None or code >= 0:
            return f"it ended with status {code} and without a word"
        hint = "; was there enough memory?" if -code == signal.SIGKILL else ""
        return f"it was ended by {signal.Signals(-code).name}{hint}"


def _supervise(workers: list[_Worker]) -> Exit:
    """Wait until all workers are done, or the first one failed and the others had time to tell."""
    running: dict[Any, _Worker] = {worker.process.sentinel: worker for worker in workers}
    stories: list[tuple[Story, _Worker]] = []
    deadline: float | None = None
    while running and (deadline is None or time.monotonic() < deadline):
        for sentinel in wait(list(running), timeout=None if deadline is None else deadline - time.monotonic()):
            worker = running.pop(sentinel)
            worker.process.join()
            story = worker.story()
            if story is not None:
                stories.append((story, worker))
                deadline = deadline or time.monotonic() + _GRACE_S
    if stories:
        return _blame(stories, len(workers))
    return Exit(workers[0].process.exitcode or 0)


def _blame(stories: list[tuple[Story, _Worker]], num_workers: int) -> Exit:
    """Tell the story that is nearest to the cause."""
    (_, text), worker = min(stories, key=lambda item: item[0][0])
    refused = worker.process.exitcode == Exit.BAD_INPUT
    complain(text if refused else f"worker {worker.rank} of {num_workers} failed, so there is no result.\n{text}")
    return Exit.BAD_INPUT if refused else Exit.FAILED


def _end(workers: list[_Worker]) -> None:
    for end in ("terminate", "kill"):
        for worker in workers:
            if worker.process.is_alive():
                getattr(worker.process, end)()
        deadline = time.monotonic() + 2.0
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))


def _work(rank: int, job: Job, port: int, outbox: Connection) -> None:
    """A worker process, from inside."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and it ends the workers
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody outside this machine is to be heard
    torch.set_num_threads(max(1, num_cores() // job.num_workers))
    try:
        store = dist.TCPStore(_HOST, port)
        timeout = timedelta(seconds=job.timeout_s)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job.num_workers, timeout=timeout)
        code = attend.run_as_rank(job)
        dist.destroy_process_group()
    except BaseException as error:
        code = exit_of(error)
        outbox.send(tell(error))
    _leave(code)


def _leave(code: Exit) -> NoReturn:
    """End at once: a thread that sits in one of gloo's waits must not hold up the end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_parent() -> None:
    """However the parent ends, also by SIGKILL, this process ends with it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(Exit.FAILED)

    threading.Thread(target=watch, name="ringspan-watches-parent", daemon=True).start()
