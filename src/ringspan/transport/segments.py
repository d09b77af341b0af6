"""Memory that several processes of one host can map: memfds, which have no name and so cannot be left behind.

A segment lives as long as somebody maps it. Its pages are reserved when it is made, so that a full memory is an
error there and not a bus error later; its size is sealed, so that a peer may trust what it maps; its inode tells it
from every other, so that a number that came to mean another file since is noticed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ringspan.errors import ArgumentError, ArgumentTypeError, SharedMemoryFullError, UnsupportedError, explain, shown
from ringspan.transport.contract import Spec

_CALLS_KEPT = 8  # a segment or mapping that so many calls of a group did not use is let go
_ALIGN = 64
_RESERVED_AT_ONCE = 4 << 20  # about a millisecond
_SMALL_BYTES = 1 << 20


class Segment(mmap.mmap):
    """The memory itself. fd: opens it; serial: its inode, which tells it from all others of this host."""

    fd: int
    serial: int

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.fd)


_segments: weakref.WeakValueDictionary[int, Segment] = weakref.WeakValueDictionary()  # this process's, by address


def segment_of(x: Tensor) -> Segment | None:
    """The segment of this process in which the tensor lies, as it looks to whoever reads it there."""
    return None if x.is_neg() or x.is_conj() else _segments.get(x.untyped_storage().data_ptr())


def why_unsupported() -> str | None:
    """Why this system has no such memory, or None."""
    for module, name in ((os, "memfd_create"), (os, "posix_fallocate"), (os, "pidfd_open"), (fcntl, "F_ADD_SEALS")):
        if not hasattr(module, name):
            return f"this system has no {name}"
    return None


def create(num_bytes: int) -> Tensor:
    """The memory [uint8] of a new segment of at least num_bytes, which lives as long as the tensor's storage.

    Raises SharedMemoryFullError where the memory is not to be had.
    """
    size = -(-max(num_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        segment = _reserved(size)
    except OSError as error:
        raise SharedMemoryFullError(
            explain(
                "there is no room for a segment of shared memory.",
                got=f"{size} bytes asked for: {error.strerror}",
                fix='free memory, raise the limit of this process or container, or pass transport="torch_dist"',
            )
        ) from error
    with torch.inference_mode(False):  # it is used again by calls in other modes
        memory = torch.frombuffer(segment, dtype=torch.uint8)
    _segments[memory.data_ptr()] = segment
    return memory


def _reserved(size: int) -> Segment:
    if size > _SMALL_BYTES and size > (left := memory_left()):
        # The kernel would not refuse, but kill: any process of the host, since reserved pages count for none.
        raise OSError(errno.ENOMEM, f"{left} bytes are left on this host or in this container")
    fd = os.memfd_create("ringspan", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # In pieces: Linux before 6.13 begins again from nothing when a signal comes in between.
        for at in range(0, size, _RESERVED_AT_ONCE):
            os.posix_fallocate(fd, at, min(_RESERVED_AT_ONCE, size - at))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        segment = Segment(fd, size)
    except BaseException:
        os.close(fd)
        raise
    segment.fd, segment.serial = fd, os.fstat(fd).st_ino
    return segment


def memory_left(root: Path = Path("/")) -> float:
    """Bytes that this process can still get: of the host, and of its containers (control groups)."""
    bounds = [math.inf]
    with contextlib.suppress(OSError, KeyError):  # an old or cut-down /proc has no MemAvailable
        fields = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        bounds.append(sum(int(fields[name].split()[0]) << 10 for name in ("MemAvailable", "SwapFree")))
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            kind = _GROUPS.get("memory" if "memory" in controllers.split(",") else controllers)
            if kind is None:
                continue
            place = root / "sys/fs/cgroup" / kind.mounted
            # From the first on: a container may see its own group there, and be told the path that the host knows.
            for name in path.split("/"):
                place /= name
                bounds.append(_left_in(place, kind))
    return min(bounds)


@dataclass(frozen=True)
class _Groups:
    """How a version of control groups calls things; stat: a prefix there, for the group with those within it."""

    mounted: str
    limit: str
    used: str
    stat: str


# By controllers, as /proc/self/cgroup has them: "" is version 2, where one group has all.
_GROUPS = {
    "": _Groups("", "memory.max", "memory.current", ""),
    "memory": _Groups("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


def _left_in(group: Path, kind: _Groups) -> float:
    try:
        limit = (group / kind.limit).read_text().strip()
        if limit == "max":
            return math.inf
        used = int((group / kind.used).read_text())
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # no limit here
        return math.inf
    # A sandbox may tell less than Linux does.
    return int(limit) - used + sum(int(held.get(f"{kind.stat}{which}_file", 0)) for which in ("inactive", "active"))


def open_peer(pid: int, fd: int, size: int, serial: int) -> Tensor:
    """The memory [uint8] of a segment that a process of this user holds open under this number; else OSError."""
    opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        found = os.fstat(opened)
        if (found.st_size, found.st_ino) != (size, serial):
            raise OSError(errno.ESTALE, "it is no longer, or not from here, the segment that was announced")
        with torch.inference_mode(False):
            # Unlike mmap.mmap it holds no file open: a rank maps several segments of each of its peers.
            return torch.from_file(f"/proc/self/fd/{opened}", shared=True, size=size, dtype=torch.uint8, device="cpu")
    except RuntimeError as error:
        raise OSError(errno.ENOMEM, str(error).splitlines()[0]) from error
    finally:
        os.close(opened)


def empty_shared(shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """A CPU tensor, not initialised, in memory that the other processes of this host can read in place.

    Keys and values that lie in such a tensor (or in a view of one) are not copied when a ring of processes on one
    host reads them; any others are copied once a call. The memory is freed with the tensor, at the latest 8 calls
    of a group that read it later.

    Raises ArgumentError for a shape that is none, ArgumentTypeError for a dtype that is none, UnsupportedError where
    the system has no such memory, and SharedMemoryFullError (a MemoryError) where the memory is full.
    """
    if (reason := why_unsupported()) is not None:
        raise UnsupportedError(explain("there is no shared memory here.", got=reason, fix="use torch.empty"))
    sizes = tuple(shape) if isinstance(shape, Sequence) else (None,)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ArgumentError(explain("shape must be a sequence of integers of at least 0.", got=shown(shape)))
    if not isinstance(dtype, torch.dtype):
        raise ArgumentTypeError(explain("dtype must be a torch.dtype.", got=shown(dtype), fix="torch.bfloat16, say"))
    num_bytes = math.prod(sizes) * dtype.itemsize
    return create(num_bytes)[:num_bytes].view(dtype).view(sizes)


@dataclass(frozen=True)
class Whereabouts:
    """Where a tensor lies, for another process: a segment, the byte at which it begins, its strides in elements."""

    serial: int
    fd: int
    size: int
    offset: int
    stride: tuple[int, ...]

    @staticmethod
    def of(x: Tensor) -> Whereabouts:
        segment = segment_of(x)
        assert segment is not None
        offset = int(x.storage_offset()) * x.element_size()
        return Whereabouts(segment.serial, segment.fd, len(segment), offset, x.stride())

    def packed(self) -> list[int]:
        return [self.serial, self.fd, self.size, self.offset, *self.stride]

    @staticmethod
    def unpacked(words: list[int]) -> Whereabouts:
        serial, fd, size, offset, *stride = words
        return Whereabouts(serial, fd, size, offset, tuple(stride))


def view(memory: Tensor, offset: int, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor of that shape and these strides that begins at a byte of a segment's memory."""
    if 0 in shape:
        return memory[:0].view(dtype).view(tuple(shape))
    num_elements = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    end = offset + num_elements * dtype.itemsize
    return memory[offset:end].view(dtype).as_strided(tuple(shape), tuple(stride))


def _contiguous_view(memory: Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    end = offset + math.prod(shape) * dtype.itemsize
    return memory[offset:end].view(dtype).view(tuple(shape))


def contiguous_views(memory: Tensor, spec: Spec) -> tuple[Tensor, ...]:
    """A parcel's tensors in one piece of memory, as `laid_out` places them."""
    places = zip(laid_out(spec)[0], spec.shapes, spec.dtypes, strict=True)
    return tuple(_contiguous_view(memory, offset, shape, dtype) for offset, shape, dtype in places)


def laid_out(spec: Spec) -> tuple[list[int], int]:
    """At which byte of one segment each tensor of a parcel begins, and the bytes of all."""
    offsets, end = [], 0
    for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True):
        offsets.append(end)
        end += -(-math.prod(shape) * dtype.itemsize // _ALIGN) * _ALIGN
    return offsets, end


class Sized(Protocol):
    """A piece of memory: a tensor [uint8], or what holds one."""

    @property
    def nbytes(self) -> int: ...


Memory = TypeVar("Memory", bound=Sized)


class Pool(Generic[Memory]):
    """A rank's own memory that others read, reused from call to call.

    make: gives a piece of at least so many bytes.
    """

    def __init__(self, make: Callable[[int], Memory]) -> None:
        self._make = make
        self._free: dict[int, tuple[Memory, int]] = {}  # by identity, with the call that used it last
        self._idle = _Idle()

    def take(self, num_bytes: int) -> Memory:
        """Memory of at least num_bytes that nobody reads; what it holds is undefined.

        Never much more, or small calls would keep the memory of a large one for ever.
        """
        most = max(4 * num_bytes, _SMALL_BYTES)
        fits = [place for place, (memory, _) in self._free.items() if num_bytes <= memory.nbytes <= most]
        if not fits:
            return self._make(num_bytes)
        return self._free.pop(min(fits, key=lambda place: self._free[place][0].nbytes))[0]

    def give_back(self, memory: Memory, call: int) -> None:
        self._free[id(memory)] = memory, call

    def end_call(self, call: int) -> None:
        self._free = self._idle.kept(self._free, call)


class Mappings:
    """What this rank has mapped of its peers' segments, kept from call to call."""

    def __init__(self) -> None:
        self._held: dict[int, dict[int, tuple[Tensor, int]]] = {}  # by pid, by serial
        self._idle: dict[int, _Idle] = {}  # by pid

    def memory(self, pid: int, lies: Whereabouts, call: int) -> Tensor:
        of_peer = self._held.setdefault(pid, {})
        held = of_peer.get(lies.serial)
        memory = held[0] if held else open_peer(pid, lies.fd, lies.size, lies.serial)
        of_peer[lies.serial] = memory, call
        return memory

    def end_call(self, call: int) -> None:
        for pid, of_peer in self._held.items():
            self._held[pid] = self._idle.setdefault(pid, _Idle()).kept(of_peer, call)


class _Idle:
    """How long memory that a call did not use is kept: some calls, and no more of it than a recent call used.

    Without the second, lengths that change from call to call would pile up memory of all of them.
    """

    def __init__(self) -> None:
        self._used: deque[int] = deque(maxlen=_CALLS_KEPT)  # bytes, by call

    def kept(self, held: dict[int, tuple[Memory, int]], call: int) -> dict[int, tuple[Memory, int]]:
        self._used.append(sum(memory.nbytes for memory, last in held.values() if last == call))
        room = max(self._used)
        kept = {}
        for key, (memory, last) in sorted(held.items(), key=lambda one: -one[1][1]):  # the latest first
            if last < call:
                room -= memory.nbytes
                if room < 0 or last <= call - _CALLS_KEPT:
                    continue
            kept[key] = memory, last
        return kept
