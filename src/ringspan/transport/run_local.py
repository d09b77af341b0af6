"""`run_local`: the workers of a ring of threads, in their caller's modes, each with its share of torch's threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ringspan.errors import ArgumentError, RingspanError, WorkerError, explain, shown
from ringspan.transport.local import DEFAULT_TIMEOUT_S, Board, LocalGroup, current_group, entered
from ringspan.transport.streams import streams_in_use, threads_are_not_captured


def run_local(fn: Callable[..., Any], num_workers: int, *args: Any, timeout: float | None = None) -> list[Any]:
    """Run ``fn(group, *args)`` in `num_workers` threads of this process, as the ranks of one ring.

    `group.rank()` and `group.size()` tell a worker its place. Returns the workers' results, by rank. Grad mode,
    inference mode and autocast of the caller hold in the workers. torch's threads are shared out over the workers while
    they run. `timeout` bounds every wait of one worker for another, in seconds (default 1800). Where CUDA is in use,
    each worker runs on a stream of its own of the caller's current device, after what the caller has launched; what
    the caller launches next comes after them. For tensors on another GPU none of that holds: torch.cuda.set_device
    first. Backward runs in the worker's own thread on every device. Workers
    share torch's random number generator: make what all of them need before, or give each a torch.Generator.

    If a worker raises, the others stop at their next exchange, and the first failure comes out: an error of
    ringspan with its type and the rank added, any other exception as WorkerError raised from it.
    """
    if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 1:
        raise ArgumentError(
            explain("num_workers must be an integer of at least 1.", got=shown(num_workers), fix="e.g. 4")
        )
    if timeout is not None and not (isinstance(timeout, (int, float)) and 0 < timeout <= threading.TIMEOUT_MAX):
        most = f"of at most {threading.TIMEOUT_MAX:.0e}"
        raise ArgumentError(explain(f"timeout must be a positive number of seconds {most}.", got=shown(timeout)))
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise threads_are_not_captured()
    board = Board(num_workers, DEFAULT_TIMEOUT_S if timeout is None else float(timeout))
    groups = [LocalGroup(board, rank) for rank in range(num_workers)]
    results: list[Any] = [None] * num_workers
    carry, streams = _carried_modes(), streams_in_use()
    begin, ends = streams.mark(), [None] * num_workers

    def work(group: LocalGroup) -> None:
        try:
            with entered(group), carry(), streams.own(group.rank()):
                streams.follow(begin)
                try:
                    results[group.rank()] = fn(group, *args)
                except BaseException as error:  # told here, since a GPU that is done for refuses the mark too
                    board.fail(group.rank(), error)
                ends[group.rank()] = streams.mark()
        except BaseException as error:  # also KeyboardInterrupt: the others must not wait for this worker
            board.fail(group.rank(), error)

    threads = [
        threading.Thread(target=work, args=(group,), name=f"ringspan-worker-{group.rank()}", daemon=True)
        for group in groups
    ]
    with _thread_shares.shared_by(num_workers):
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C in the caller, or no more threads: release the workers before leaving
            board.fail(None, error)
            raise
    try:
        for end in ends:
            streams.follow(end)
        streams.hold([x for x in tree_leaves(results) if isinstance(x, torch.Tensor)])
    except Exception:
        if board.failure is None:  # else a GPU that is done for, and what it was that failed is told below
            raise
    if board.failure is not None:
        _raise_failure(*board.failure)
    return results


def _raise_failure(rank: int | None, error: BaseException) -> None:
    if isinstance(error, RingspanError):
        error.add_note(f"raised in rank {rank} of run_local")
        raise error
    if not isinstance(error, Exception):
        raise error
    raise WorkerError(f"rank {rank} of run_local raised {type(error).__name__}: {error}") from error


def _carried_modes() -> Callable[[], AbstractContextManager]:
    """The caller's grad mode, inference mode and autocast, to be entered in another thread."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = [
        (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)) for device in ("cpu", "cuda")
    ]
    cache = torch.is_autocast_cache_enabled()

    @contextmanager
    def entered():
        # autograd's own threads, one a device, would run the backward of all workers: the first one's wait for the
        # others would never end.
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            torch.autograd.set_multithreading_enabled(False),
        ):
            contexts = [
                torch.autocast(device, dtype=dtype, enabled=True, cache_enabled=cache)
                for device, dtype, enabled in autocast
                if enabled
            ]
            for context in contexts:
                context.__enter__()
            try:
                yield
            finally:
                for context in reversed(contexts):
                    context.__exit__(None, None, None)

    return entered


class _ThreadShares:
    """torch.set_num_threads holds for a thread, and for those that start later: the first run_local sets it, and each
    sets the number from before in its caller's thread, since others may have begun while it ran. Not a worker's: it has
    its share.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._before = 0

    @contextmanager
    def shared_by(self, num_workers: int):
        in_worker = current_group() is not None
        entered = False
        try:
            with self._lock:
                self._depth, entered = self._depth + 1, True
                if self._depth == 1:
                    self._before = torch.get_num_threads()
                    torch.set_num_threads(max(1, self._before // num_workers))
            yield
        finally:
            with self._lock:
                self._depth -= entered
                if not in_worker:
                    torch.set_num_threads(self._before)


_thread_shares = _ThreadShares()
