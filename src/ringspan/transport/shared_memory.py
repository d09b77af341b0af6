"""Process groups on one host, for CPU tensors: shards are published once in shared memory and read in place.

What a rank sends is a note of where a parcel lies (segments.py), through pipes (inbox.py). Whoever has read it
tells the owner, who may then reuse the memory. Nothing here has a name, so that nothing is left behind when a
process is killed.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import Tensor

from ringspan.errors import RankFailedError, SharedMemoryFullError, explain
from ringspan.transport.contract import Channel, Transport
from ringspan.transport.inbox import Inbox, Link, Page, Record
from ringspan.transport.introduction import Introduction, exchange
from ringspan.transport.segments import Mappings, Pool, Whereabouts, create
from ringspan.transport.shared_channel import Loan, Note, SharedChannel

_AGREEMENT, _PARCEL, _RELEASED, _FAILED, _LEFT = range(5)  # kinds of records
_LONGEST_SLEEP_S = 1.0  # until what others say in their pages is looked at again


def connect(beside: Transport, timeout_s: float) -> SharedMemoryTransport | str:
    """Try, on all ranks of a group at once, whether they can read each other's memory; or the reason why not.

    beside: the transport through which they make themselves known, and which is told of failures. The outcome is
    the same on every rank.
    """
    with contextlib.ExitStack() as undo:
        me = Introduction(beside.rank, undo)
        everyone = exchange(beside, me.words)
        if unable := [f"rank {rank}: {words['no']}" for rank, words in enumerate(everyone) if words["no"]]:
            return unable[0]
        links, reason = me.meet(everyone, undo)
        try:
            reasons = [answer["no"] for answer in exchange(beside, {"no": reason})]
            if any(reasons):
                return next(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason)
            undo.pop_all()
            return SharedMemoryTransport(beside, timeout_s, me.inbox, links, me.pages)
        except BaseException as error:  # the others may have all answers, and wait for this rank's records by now
            me.pages[me.rank].say(_failure(me.rank, 0, f"{type(error).__name__}: {error}"))
            raise


class SharedMemoryTransport(Transport):
    """This rank's end of a process group whose ranks can read each other's memory."""

    def __init__(
        self, beside: Transport, timeout_s: float, inbox: Inbox, links: Sequence[Link], pages: dict[int, Page]
    ) -> None:
        super().__init__()
        self.rank, self.size = beside.rank, beside.size
        self.timeout_s = timeout_s
        self.pool, self._mappings = Pool(create), Mappings()
        self.links = {link.rank: link for link in links}
        self._loans: dict[int, Loan] = {}
        self._loan_serials = itertools.count()
        self._beside = beside
        self._inbox = inbox
        self._messages: dict[tuple[int, int], bytes] = {}  # by call and sender
        self._notes: dict[tuple[int, int, int, int], Note] = {}  # by call, sender, index and lane
        self._call = 0  # the last that began here
        self._failed_first: tuple[int, str] | None = None
        self._spoiled: float = math.inf  # the earliest call that anybody gave up
        self._page = pages[self.rank]
        self._unsaid = {rank: page for rank, page in pages.items() if rank != self.rank}  # pages that say nothing yet
        self._left: set[int] = set()
        # Not at the process's end: that shows on its pidfd.
        weakref.finalize(self, _leave, self.rank, os.getpid(), self._page, inbox, links).atexit = False

    def leave_with(self, companion: Any) -> None:
        """Tell the others that this rank has left when that object goes, though the group is still held."""
        links = tuple(self.links.values())
        weakref.finalize(companion, _say_left, self.rank, os.getpid(), self._page, links).atexit = False

    def begin_call(self) -> int:
        self._call = self._beside.begin_call()
        return self._call

    def agree(self, call: int, message: bytes) -> list[bytes]:
        self._messages[call, self.rank] = message
        for rank in self.links:
            self._send(rank, _AGREEMENT, call, message)

        def missing() -> set[int]:
            return {rank for rank in self.links if (call, rank) not in self._messages}

        self.wait(lambda: not missing(), missing, f"to begin call {call}")
        return [self._messages.pop((call, rank)) for rank in range(self.size)]

    def channel(self, call: int, members: Sequence[int], via: str = "auto", device_type: str = "cpu") -> Channel:
        return SharedChannel(self, call, tuple(members))

    def fail(self, error: BaseException) -> None:
        # Whoever reads what this rank lent to the call must hear of it, though a failure in a later call is known.
        if not self._page.said and self._call < self._spoiled:
            first, reason = self._failed_first or (self.rank, f"{type(error).__name__}: {error}")
            record = _failure(first, self._call, reason)
            self._page.say(record)
            for link in self.links.values():
                link.send(record)  # to wake it; one whose pipe is full is awake, or will be soon
        self._beside.fail(error)  # last: a store whose host is gone may take its time

    def tell(self, rank: int, call: int, note: bytes) -> None:
        self._send(rank, _PARCEL, call, note)

    def note(self, call: int, sender: int, index: int, lane: int) -> Note:
        """Wait for what the sender tells of the parcel of this step and lane."""
        key = (call, sender, index, lane)
        self.wait(lambda: key in self._notes, lambda: {sender}, f"in step {index} of call {call}")
        return self._notes.pop(key)

    def has_note(self, call: int, sender: int, index: int, lane: int) -> bool:
        """Whether `note` would not wait."""
        self._collect()
        return (call, sender, index, lane) in self._notes

    def memory(self, owner: int, lies: Whereabouts, call: int) -> Tensor:
        """What the owner announced, mapped here."""
        pid = self.links[owner].pid
        try:
            return self._mappings.memory(pid, lies, call)
        except OSError as error:
            if error.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
                raise SharedMemoryFullError(
                    explain(
                        f"there is no room to map the memory of rank {owner}.",
                        got=f"{lies.size} bytes: {error.strerror}",
                        fix='raise the limits of this process, or pass transport="torch_dist"',
                    )
                ) from error
            raise RankFailedError(
                explain(
                    f"rank {self.rank} cannot map the memory of rank {owner}.",
                    got=f"{error}; process {pid}",
                    fix="look at that rank's own output: it may have died",
                )
            ) from error

    def new_loan(self, lies: list, memory: Tensor | None = None) -> Loan:
        loan = Loan(next(self._loan_serials), lies, memory)
        self._loans[loan.serial] = loan
        return loan

    def end_loan(self, loan: Loan, call: int) -> None:
        del self._loans[loan.serial]
        if loan.memory is not None:
            self.pool.give_back(loan.memory, call)

    def await_readers(self, loans: Collection[Loan], call: int) -> None:
        self.wait(
            lambda: not any(loan.reading() for loan in loans),
            lambda: set().union(*(loan.reading() for loan in loans)),
            f"to read rank {self.rank}'s tensors in call {call}",
        )

    def end_call(self, call: int) -> None:
        self.pool.end_call(call)
        self._mappings.end_call(call)

    def give_back(self, owner: int, call: int, loan: int) -> None:
        """Tell the owner that this rank has read its parcel."""
        self._send(owner, _RELEASED, call, str(loan).encode())

    def _send(self, rank: int, kind: int, call: int, body: bytes) -> None:
        record, link = Record(kind, self.rank, call, body), self.links[rank]
        if link.send(record):
            return
        sent = False

        def try_again() -> bool:
            nonlocal sent
            sent = sent or link.send(record)
            return sent

        self.wait(try_again, lambda: {rank}, f"to empty its pipe in call {call}", until_room_in=link)

    def wait(
        self,
        ready: Callable[[], bool],
        missing: Callable[[], Iterable[int]],
        what_for: str,
        until_room_in: Link | None = None,
    ) -> None:
        """Sleep until ready; raise RankFailedError when a missing rank is gone, another gave up, or time is up."""
        deadline = time.monotonic() + self.timeout_s
        gone: Link | None = None
        while True:
            self._collect()
            # What a rank lent to a call that it gave up may be overwritten, and may have been read since.
            if self._spoiled <= self._call:
                raise self._gave_up(missing(), what_for, None)
            if ready():
                return
            if self._failed_first is not None:
                raise self._gave_up(missing(), what_for, None)
            if gone is not None and gone.rank in missing():  # else it has done its part, and may end
                raise self._gave_up([gone.rank], what_for, f"its process {gone.pid} is gone")
            if self._left and (left := self._left.intersection(missing())):
                raise self._gave_up(left, what_for, "no answer: the process group was destroyed there")
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                raise self._gave_up(missing(), what_for, f"no answer within {self.timeout_s:g} s")
            watched = [self.links[rank] for rank in missing()]
            gone = self._inbox.sleep(min(seconds, _LONGEST_SLEEP_S), watched, until_room_in)

    def _gave_up(self, missing: Iterable[int], what_for: str, reason: str | None) -> RankFailedError:
        ranks = sorted(missing)
        names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" if ranks else "the other ranks"
        lines = [f"rank {self.rank} gave up waiting for {names} {what_for}."]
        if reason is not None:
            lines.append(f"  got  {reason}")
        if self._failed_first is not None:
            lines.append("  rank {} failed first: {}".format(*self._failed_first))
        lines.append(f"  fix  look at that rank's own output; the group's timeout is {self.timeout_s:g} s")
        error = RankFailedError("\n".join(lines))
        self.fail(error)
        return error

    def _collect(self) -> None:
        # Pages before the pipe: what a rank sent before it left counts.
        said = [(rank, page) for rank, page in self._unsaid.items() if page.said]
        for rank, page in said:
            if (record := page.read()) is not None:
                del self._unsaid[rank]
                self._hear_last(record)
        for record in self._inbox.read():
            if record.kind == _AGREEMENT:
                self._messages[record.call, record.sender] = record.body
            elif record.kind == _PARCEL:
                index, lane, note = Note.unpacked(record.body)
                self._notes[record.call, record.sender, index, lane] = note
            elif record.kind == _RELEASED:
                self._loans[int(record.body)].returned(record.sender)
            else:
                self._hear_last(record)

    def _hear_last(self, record: Record) -> None:
        """A rank's last words come twice: its page is certain, its record in the pipe wakes."""
        if record.kind == _LEFT:
            self._left.add(record.sender)
            return
        # Ranks may be calls ahead of each other: the earliest call that anybody gave up counts.
        self._spoiled = min(self._spoiled, record.call)
        if self._failed_first is None:
            self._failed_first = record.sender, record.body.decode(errors="replace")


def _failure(rank: int, call: int, reason: str) -> Record:
    """A rank's last words. rank: of those that failed, the first that is known; call: the one that is given up."""
    return Record(_FAILED, rank, call, reason.encode(errors="replace")[:2000])


def _say_left(rank: int, pid: int, page: Page, links: Sequence[Link]) -> None:
    """Whoever still waits for this rank would wait in vain."""
    if os.getpid() == pid and not page.said:  # a forked child does not speak for its parent
        record = Record(_LEFT, rank, 0, b"")
        page.say(record)
        for link in links:
            link.send(record)


def _leave(rank: int, pid: int, page: Page, inbox: Inbox, links: Sequence[Link]) -> None:
    """The end of a transport."""
    _say_left(rank, pid, page, links)
    inbox.close()
    for link in links:
        link.close()
