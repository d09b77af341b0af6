"""Runs a function as the ranks of a gloo group in processes of their own, and tells how each one ended."""

from __future__ import annotations

import io
import multiprocessing as mp
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "ringspan", "torch._dynamo"])


@dataclass
class Ending:
    """How one rank ended: with a value, an exception, or (neither) dead. seconds: from the start of all."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    exitcode: int | None = None
    seconds: float = 0.0


def run_processes(
    fn: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    group_timeout_s: float = 60,
    limit_s: float = 120,
    backend: str | None = "gloo",
) -> list[Ending]:
    """fn(rank, *args) in num_ranks processes that form the default gloo group. Never waits beyond limit_s."""
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(num_ranks):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_work,
                args=(theirs, fn, rank, num_ranks, folder + "/store", group_timeout_s, backend, args),
                daemon=True,
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _endings(pipes, processes, limit_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def results(endings: list[Ending]) -> list[Any]:
    """The values of ranks that must all have ended well."""
    for rank, ending in enumerate(endings):
        assert ending.error is None and ending.exitcode == 0, f"rank {rank}: {ending.trace or ending}"
    return [ending.value for ending in endings]


def _work(
    pipe: Connection,
    fn: Callable,
    rank: int,
    num_ranks: int,
    store: str,
    timeout_s: float,
    backend: str | None,
    args: tuple,
) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        rendezvous = dist.FileStore(store, num_ranks)
        dist.init_process_group(
            backend, store=rendezvous, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=timeout_s)
        )
        # Nobody begins, or dies, before everybody has the group: through the store, which needs no living peer.
        rendezvous.set(f"made/{rank}", "")
        rendezvous.wait([f"made/{other}" for other in range(num_ranks)], timedelta(seconds=timeout_s))
        ending = Ending(fn(rank, *args))
    except Exception as error:
        ending = Ending(error=error, trace=traceback.format_exc())
    # As bytes: tensors that a pipe sends as they are live in memory that goes with this process.
    buffer = io.BytesIO()
    torch.save(ending, buffer)
    pipe.send_bytes(buffer.getvalue())
    if ending.error is None:
        dist.destroy_process_group()


def _endings(pipes: list[Connection], processes: list, limit_s: float) -> list[Ending]:
    begin = time.monotonic()
    endings: dict[int, Ending] = {}
    while len(endings) < len(pipes):
        left = limit_s - (time.monotonic() - begin)
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in endings]
        ready = wait(waiting, timeout=max(0.0, left))
        assert ready, f"ranks {[pipes.index(pipe) for pipe in waiting]} did not end within {limit_s} s"
        for pipe in ready:
            try:
                ending = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            except EOFError:
                ending = Ending()
            ending.seconds = time.monotonic() - begin
            endings[pipes.index(pipe)] = ending
    for rank, process in enumerate(processes):
        process.join(timeout=10)
        endings[rank].exitcode = process.exitcode
    return [endings[rank] for rank in range(len(pipes))]
