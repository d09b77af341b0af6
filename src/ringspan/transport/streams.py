"""The order of work on an accelerator's streams, where tensors pass from one stream to another.

A kernel that was launched has not run yet, and a thread that was told of it knows nothing of when it will. Three
rules make a hand-over safe, and who breaks one reads or overwrites memory too early:

- after the last write (or read) on one stream a `mark`, before the first read (or write) on the other a `follow`;
- what another stream's allocator gave is to be held (`hold`) by the stream that uses it, or it may be given out
  again as soon as the last reference is gone;
- nobody blocks: only streams wait.

tests/happens_before.py checks them on recorded streams: every read must come after the write that it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ringspan.errors import UnsupportedError, explain


class Streams:
    """A CPU's: an operation that has returned is done, so there is nothing to order."""

    def mark(self) -> Any:
        """This point of the current stream."""
        return None

    def follow(self, mark: Any) -> None:
        """What is launched on the current stream from now on comes after the mark. None: nothing to wait for."""

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Their memory is not given out again before the current stream is done with them."""

    def own(self, place: int) -> AbstractContextManager:
        """A place's stream, of the device and beside the stream that were current where this object was made.

        It is current in the block.
        """
        return nullcontext()


class CudaStreams(Streams):
    """CUDA's, of the device that is current where it is made."""

    def __init__(self) -> None:
        self._device = torch.cuda.current_device()
        self._beside = torch.cuda.current_stream(self._device).cuda_stream

    def mark(self) -> Any:
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def follow(self, mark: Any) -> None:
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def hold(self, tensors: Sequence[Tensor]) -> None:
        stream = torch.cuda.current_stream(self._device)
        for x in filter(_on_gpu, tensors):
            x.record_stream(stream)

    @contextmanager
    def own(self, place: int):
        # A new thread's current device is the first one, whatever its parent's was.
        with torch.cuda.device(self._device), torch.cuda.stream(_stream(self._device, self._beside, place)):
            yield


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


@cache
def _stream(device: int, beside: int, place: int) -> torch.cuda.Stream:
    """The same in every call: torch keeps freed memory by stream, and on a new one each tensor is a cudaMalloc.

    beside: the caller's. Rings inside of the workers of a ring must not share theirs, nor take those of the workers.
    """
    return torch.cuda.Stream(device)


_CPU = Streams()


def streams_of(device_type: str) -> Streams:
    return CudaStreams() if device_type == "cuda" else _CPU


def streams_in_use() -> Streams:
    """CUDA's once this process has begun to use it: asking a GPU that nobody uses would take its memory."""
    return CudaStreams() if torch.cuda.is_initialized() else _CPU


def threads_are_not_captured() -> UnsupportedError:
    """Captures of several threads cannot wait for each other."""
    what = "a ring of threads cannot be captured into a CUDA graph."
    return UnsupportedError(explain(what, fix="a process for each rank, with NCCL"))
