"""A happens-before checker for streams: it notes every read and write of every tensor with the stream that does it,
and every event that orders streams, and finds the accesses that no chain of events puts in order.

Threads that run the code under test are real; streams are made up, one a worker. What a host thread waits for orders
nothing on them here, as with a GPU.
"""

from __future__ import annotations

import itertools
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CALLER = "caller"  # the stream of whoever has not entered one


class Recorder:
    """Vector clocks of streams; the accesses to each storage; `races`, in words."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._thread = threading.local()
        self._serial = itertools.count()
        self._clocks: dict[str, dict[str, int]] = {}
        self._storages: dict[int, _Storage] = {}
        self.races: list[str] = []
        self.num_accesses = 0

    @property
    def current(self) -> str:
        return getattr(self._thread, "stream", CALLER)

    @contextmanager
    def on(self, stream: str):
        before = self.current
        self._thread.stream = stream
        try:
            yield
        finally:
            self._thread.stream = before

    def new_stream(self) -> str:
        return f"stream {next(self._serial)}"

    def now(self, stream: str | None = None) -> dict[str, int]:
        with self._lock:
            return dict(self._clock(stream or self.current))

    def follow(self, clock: dict[str, int], stream: str | None = None) -> None:
        with self._lock:
            mine = self._clock(stream or self.current)
            for other, time in clock.items():
                mine[other] = max(mine.get(other, 0), time)

    @property
    def seen(self) -> dict[str, int]:
        """What this thread itself has waited for."""
        return self._thread.__dict__.setdefault("seen", {})

    def see(self, clock: dict[str, int]) -> None:
        for other, time in clock.items():
            self.seen[other] = max(self.seen.get(other, 0), time)

    def _clock(self, stream: str) -> dict[str, int]:
        return self._clocks.setdefault(stream, {stream: 0})

    def read(self, x: torch.Tensor, stream: str | None = None) -> None:
        self._access(x, stream or self.current, "reads", write=False)

    def write(self, x: torch.Tensor, stream: str | None = None) -> None:
        self._access(x, stream or self.current, "writes", write=True)

    def hold(self, x: torch.Tensor, stream: str) -> None:
        with self._lock:
            self._storage(x, stream).held.add(stream)

    def _storage(self, x: torch.Tensor, stream: str) -> _Storage:
        memory = x.untyped_storage()
        return self._storages.setdefault(memory._cdata, _Storage(memory, stream))

    def _access(self, x: torch.Tensor, stream: str, verb: str, write: bool) -> None:
        with self._lock:
            self.num_accesses += 1
            clock, storage = self._clock(stream), self._storage(x, stream)
            clock[stream] += 1
            before = list(storage.written.items()) + (list(storage.read.items()) if write else [])
            for other, time in before:
                if clock.get(other, 0) < time:
                    self.races.append(f"{stream} {verb} {tuple(x.shape)} before {other} is done with it")
            if CALLER not in (stream, storage.home) and stream not in storage.held | {storage.home}:
                self.races.append(f"{stream} {verb} {tuple(x.shape)} of {storage.home} without holding it")
            if write:
                storage.written, storage.read = {stream: clock[stream]}, {}
            else:
                storage.read[stream] = clock[stream]


class _Storage:
    """What is known of one piece of memory; it is kept, so that no other comes to lie at its address."""

    def __init__(self, memory, home: str) -> None:
        self.memory, self.home = memory, home
        self.written: dict[str, int] = {}
        self.read: dict[str, int] = {}
        self.held: set[str] = set()


class Watched(TorchDispatchMode):
    """Notes what this thread's operations read and write, on its current stream."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        if any(x.alias_info and not x.alias_info.is_write for x in schema.returns) or "empty" in func.__name__:
            return out  # a view, or memory that nobody has written yet
        if func is torch.ops.aten._local_scalar_dense.default:  # a number for the host, which waits for it
            self._recorder.see(self._recorder.now())
        changed = []
        for place, argument in enumerate(schema.arguments):
            given = args[place] if place < len(args) else (kwargs or {}).get(argument.name)
            tensors = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)]
            if argument.alias_info and argument.alias_info.is_write:
                changed += tensors
            else:
                for x in tensors:
                    self._recorder.read(x)
        for x in changed or [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]:
            self._recorder.write(x)
        return out


def fake_torch(recorder: Recorder) -> SimpleNamespace:
    """As much of torch.cuda as ringspan.transport.streams asks for."""

    class Event:
        def __init__(self):
            self.clock = {}

        def record(self, stream):
            self.clock = recorder.now(stream.name)

    class Stream:
        def __init__(self, device=None, name=None):
            self.name = name or recorder.new_stream()
            self.cuda_stream = self.name  # a number on a GPU

        def wait_event(self, event):
            recorder.follow(event.clock, self.name)

    @contextmanager
    def device(_):
        yield

    cuda = SimpleNamespace(
        Event=Event,
        Stream=Stream,
        current_stream=lambda device=None: Stream(name=recorder.current),
        stream=lambda stream: recorder.on(stream.name),
        device=device,
        current_device=lambda: 0,
        is_initialized=lambda: True,
    )
    return SimpleNamespace(cuda=cuda)


@contextmanager
def recorded_streams(monkeypatch):
    """A recorder, while what ringspan.transport.streams does is recorded by it, with every tensor on a GPU."""
    from ringspan.transport import streams

    recorder = Recorder()
    monkeypatch.setattr(streams, "torch", fake_torch(recorder))
    monkeypatch.setattr(streams, "_on_gpu", lambda x: True)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: recorder.hold(x, stream.name), raising=False)
    streams._stream.cache_clear()  # of another recorder
    yield recorder
    streams._stream.cache_clear()


def leave_out(monkeypatch, owner, name: str, where: str) -> list[str]:
    """Have a method of owner do nothing where a function of that name calls it; what grows with every such call."""
    there, left_out = getattr(owner, name), []

    def sometimes(self, *args):
        if sys._getframe(1).f_code.co_name != where:
            return there(self, *args)
        left_out.append(where)
        return None

    monkeypatch.setattr(owner, name, sometimes)
    return left_out
