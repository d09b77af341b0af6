"""Launches of Triton's kernels: on the tensors' device, one thread at a time."""

from __future__ import annotations

import threading
from typing import Any

import torch

# Ranks that are threads would compile the same kernel side by side; and Triton's interpreter keeps the program that it
# is at in one place for all threads. No launch waits for another thread, so none waits for ever.
_lock = threading.Lock()


def launch(kernel: Any, num_programs: int, *args: Any, **options: Any) -> None:
    """kernel[num_programs](*args, **options), where args[0] is a tensor."""
    with _lock:
        if args[0].is_cuda:
            with torch.cuda.device(args[0].device):
                kernel[(num_programs,)](*args, **options)
        else:
            kernel[(num_programs,)](*args, **options)
