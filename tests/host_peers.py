"""Stand-ins for `CudaMemory`, so that peer memory runs without a GPU: between processes, and between threads whose
streams are recorded."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from contextlib import nullcontext

import torch
from happens_before import CALLER, Recorder, fake_torch

from ringspan.transport import segments
from ringspan.transport.streams import CudaStreams, Streams

POISON = 0xFF  # a NaN in every floating-point dtype


class HostMemory:
    """Of the host, that other processes open. What is launched is done, so its events order nothing."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.created: list[int] = []
        self.num_shared = self.num_opened = self.num_delays = 0

    def create(self, num_bytes):
        self.created.append(num_bytes)
        return segments.create(num_bytes).fill_(POISON)

    def share(self, memory):
        self.num_shared += 1
        return [os.getpid(), *segments.Whereabouts.of(memory).packed()]

    def open(self, words):
        self.num_opened += 1
        pid, serial, fd, size, *_ = words
        return segments.open_peer(pid, fd, size, serial)

    def new_event(self):
        return "event"

    def share_event(self, event):
        return event

    def open_event(self, words):
        return words

    def record(self, event):
        pass

    def streams(self):
        return Streams()

    def pulling(self):
        return nullcontext()

    def delay(self):
        self.num_delays += 1

    def is_done(self, event):
        return True

    def is_current(self):
        return True


class RecordedWorld:
    """What the threads of one process share that stand for processes with a GPU each."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.cuda = fake_torch(recorder).cuda
        self.shared: dict[str, object] = {}
        self.serials = itertools.count()
        self.lock = threading.Lock()

    def put(self, x) -> str:
        with self.lock:
            name = f"handle {next(self.serials)}"
            self.shared[name] = x
            return name


class _OpenedEvent:
    """Another process's, which records it."""

    def __init__(self, event) -> None:
        self._event = event

    @property
    def clock(self):
        return self._event.clock


class RecordedMemory(HostMemory):
    """A GPU's whose every access and event is recorded. Run with `streams.torch` patched by `fake_torch`."""

    def __init__(self, world: RecordedWorld) -> None:
        super().__init__()
        self._world = world
        self._pulls = world.recorder.new_stream()

    def create(self, num_bytes):
        memory = torch.empty(max(num_bytes, 1), dtype=torch.uint8)
        memory.numpy().fill(POISON)  # not an access of any stream
        self._world.recorder._storage(memory, self._world.recorder.current)
        return memory

    def share(self, memory):
        self._world.recorder._storage(memory, CALLER).home = CALLER  # who opened it keeps it, not its streams
        return self._world.put(memory)

    def open(self, words):
        memory = self._world.shared.pop(words)
        opened = memory[:]
        weakref.finalize(opened, self._let_go, memory).atexit = False
        return opened

    def _let_go(self, memory):
        """torch waits for the current stream here, and then its owner may have the memory back."""
        recorder = self._world.recorder
        done = max(recorder.now().get(self._pulls, 0), recorder.seen.get(self._pulls, 0))
        if recorder._storage(memory, CALLER).read.get(self._pulls, 0) > done:
            recorder.races.append(f"{recorder.current} lets go of {tuple(memory.shape)} before it has been read")

    def is_done(self, event):
        self._world.recorder.see(event.clock)
        return True

    def new_event(self):
        return self._world.cuda.Event()

    def share_event(self, event):
        return self._world.put(event)

    def open_event(self, words):
        return _OpenedEvent(self._world.shared.pop(words))

    def record(self, event):
        event.record(self._world.cuda.current_stream())

    def streams(self):
        return CudaStreams()

    def pulling(self):
        return self._world.recorder.on(self._pulls)
