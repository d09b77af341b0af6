"""Short records between the processes of one host: each rank has a pipe, its peers open it through /proc and write.

A pipe keeps the order of writes, takes records of up to PIPE_BUF bytes whole or not at all, and wakes who sleeps
on it; so no memory is shared for signals, and nobody spins. A peer's death shows on its pidfd, which is polled
together with the pipe. Only a rank's last words lie in shared memory too, as a full pipe would lose them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import select
import stat
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

_HEAD = struct.Struct("<IIIq")  # bytes of the body, kind, sender, call
LARGEST_BODY = select.PIPE_BUF - _HEAD.size
_PIPE_BYTES = 1 << 20
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Record:
    """One message. kind: what the body means; sender: a rank of the group."""

    kind: int
    sender: int
    call: int
    body: bytes

    def packed(self) -> bytes:
        assert len(self.body) <= LARGEST_BODY, f"a record of {len(self.body)} bytes would not be written whole"
        return _HEAD.pack(len(self.body), self.kind, self.sender, self.call) + self.body

    @staticmethod
    def unpacked(packed: bytes, at: int = 0) -> Record | None:
        """The record that begins there, if all of it is there."""
        if len(packed) < at + _HEAD.size:
            return None
        length, kind, sender, call = _HEAD.unpack_from(packed, at)
        begin = at + _HEAD.size
        return Record(kind, sender, call, packed[begin : begin + length]) if len(packed) >= begin + length else None


class Page:
    """A page of memory that all ranks have mapped and one writes: a number, then that rank's last words.

    A pipe may be full; what stands here stays, for whoever looks.
    """

    SIZE = mmap.PAGESIZE

    def __init__(self, memory: Tensor) -> None:
        self._bytes = memory.numpy()
        self._numbers = self._bytes[:16].view(np.int64)  # the number; the bytes of the last words and their checksum

    @property
    def nonce(self) -> int:
        return int(self._numbers[0])

    @nonce.setter
    def nonce(self, number: int) -> None:
        self._numbers[0] = number

    @property
    def said(self) -> bool:
        return self._numbers[1] != 0

    def say(self, record: Record) -> None:
        packed = record.packed()
        self._bytes[16 : 16 + len(packed)] = np.frombuffer(packed, np.uint8)
        self._numbers[1] = len(packed) << 32 | zlib.crc32(packed)

    def read(self) -> Record | None:
        """What is said; None where not all of it is to be seen yet, on processors that may reorder writes."""
        length, checksum = divmod(int(self._numbers[1]), 1 << 32)
        packed = self._bytes[16 : 16 + length].tobytes()
        return Record.unpacked(packed) if zlib.crc32(packed) == checksum else None


class Inbox:
    """This rank's own pipe."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # over this user's quota of pipe memory: the usual 64 KiB then
            fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._unread = b""

    def read(self) -> list[Record]:
        """What has come, in the order of its writing."""
        with contextlib.suppress(BlockingIOError):
            while True:
                chunk = os.read(self.read_end, _CHUNK)
                self._unread += chunk
                if len(chunk) < _CHUNK:
                    break
        records, at = [], 0
        while (record := Record.unpacked(self._unread, at)) is not None:
            records.append(record)
            at += _HEAD.size + len(record.body)
        self._unread = self._unread[at:]
        return records

    def sleep(self, seconds: float, watched: Iterable[Link], until_room_in: Link | None = None) -> Link | None:
        """Until a record has come, a watched peer is gone, or there is room in a pipe; the peer that is gone."""
        poll = select.poll()
        poll.register(self.read_end, select.POLLIN)
        by_fd = {link.pidfd: link for link in watched}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        if until_room_in is not None:
            poll.register(until_room_in.pipe, select.POLLOUT)
        return next((by_fd[fd] for fd, _ in poll.poll(seconds * 1000) if fd in by_fd), None)

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)


class Link:
    """The way to one peer: its pipe, and whether its process lives. Raises OSError where there is no way."""

    def __init__(self, rank: int, pid: int, pipe: int) -> None:
        self.rank, self.pid = rank, pid
        self.pidfd = os.pidfd_open(pid)
        try:
            # For reading too, so that a write to a peer that is gone is no SIGPIPE.
            self.pipe = os.open(f"/proc/{pid}/fd/{pipe}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            os.close(self.pidfd)
            raise
        if not stat.S_ISFIFO(os.fstat(self.pipe).st_mode):
            self.close()
            raise OSError(errno.ESTALE, "what was announced as a pipe is none")

    def send(self, record: Record) -> bool:
        """Whether there was room."""
        try:
            os.write(self.pipe, record.packed())
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.pipe)
