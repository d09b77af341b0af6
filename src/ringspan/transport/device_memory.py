"""A GPU's memory and events that the other processes of a host can open: CUDA's interprocess handles, by torch's means.

Memory is opened on the opener's own GPU, where a copy of it is one of the copy engine's, over NVLink or PCIe, and
the owner's GPU need not be visible to the opener. An event may be recorded again and again in the process that made
it; whoever opened it waits for what was recorded last when it asks.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ringspan.errors import UnsupportedError, explain
from ringspan.transport.streams import CudaStreams

_LONGEST = 3000  # characters: a note is to hold what opens a piece of memory
_DELAY_CYCLES = 50_000_000  # some 30 ms

Words = list  # what JSON can hold


class CudaMemory:
    """That of the device that is current where it is made, from then on."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._pulls = torch.cuda.Stream(self.device)

    def create(self, num_bytes: int) -> Tensor:
        """[uint8], not initialised."""
        with torch.inference_mode(False):  # it is used again by calls in other modes
            return torch.empty(max(num_bytes, 1), dtype=torch.uint8, device=self.device)

    def share(self, memory: Tensor) -> Words:
        """What opens it, once: torch keeps the memory until whoever opened it lets go.

        Raises RuntimeError where CUDA cannot, as for memory of cudaMallocAsync, and UnsupportedError where it takes
        many words, as for much memory of expandable segments.
        """
        _, *words, _, _ = memory.untyped_storage()._share_cuda_()  # without the event of torch's own
        shared = [b64encode(word).decode() if isinstance(word, bytes) else word for word in words]
        if (length := len(str(shared))) > _LONGEST:
            raise UnsupportedError(
                explain(
                    "memory of this GPU takes more words to share than one note of peer memory holds.",
                    got=f"{length} characters for {memory.nbytes} bytes",
                    fix='PYTORCH_CUDA_ALLOC_CONF without expandable_segments, or transport="torch_dist"',
                )
            )
        return shared

    def open(self, words: Words) -> Tensor:
        """A peer's memory [uint8]. Letting go of it waits for the current stream."""
        handle, size, offset, counter, counter_at = words
        with torch.inference_mode(False):
            storage = torch.UntypedStorage._new_shared_cuda(
                *(self.device.index, b64decode(handle), size, offset),
                # No event to wait for: torch never closes one that it opens, and readers wait for `written` anyway.
                *(b64decode(counter), counter_at, b"", False),
            )
            return torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)

    def new_event(self) -> Any:
        return torch.cuda.Event(interprocess=True)

    def share_event(self, event: Any) -> str:
        return b64encode(event.ipc_handle()).decode()

    def open_event(self, words: str) -> Any:
        return torch.cuda.Event.from_ipc_handle(self.device, b64decode(words))

    def record(self, event: Any) -> None:
        """On the current stream."""
        event.record(torch.cuda.current_stream(self.device))

    def streams(self) -> CudaStreams:
        return CudaStreams()

    def pulling(self) -> AbstractContextManager:
        """A stream for pulls alone, always the same one, is current in the block."""
        return torch.cuda.stream(self._pulls)

    def delay(self) -> None:
        """Keep the current stream busy for a while: a trial must notice who does not wait for it."""
        torch.cuda._sleep(_DELAY_CYCLES)

    def is_done(self, event: Any) -> bool:
        return event.query()

    def is_current(self) -> bool:
        """Whether this is the device of the call."""
        return torch.cuda.current_device() == self.device.index
