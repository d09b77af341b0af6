"""How many threads a kernel that has threads of its own uses: torch's number, unless the caller says otherwise."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch

_thread = threading.local()
_MOST = 1024  # that a kernel is asked for


def num_threads() -> int:
    """For a kernel call of this thread. Inside run_local torch's number is this worker's share of the cores."""
    return min(getattr(_thread, "limit", None) or torch.get_num_threads(), _MOST)


@contextmanager
def limited_to(limit: int | None):
    """Inside the block, kernel calls of this thread use `limit` threads; None leaves it to torch's number."""
    before = getattr(_thread, "limit", None)
    _thread.limit = limit
    try:
        yield
    finally:
        _thread.limit = before
