"""How the ranks of a group make themselves known to each other, before they share memory."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ringspan.errors import SharedMemoryFullError
from ringspan.transport import segments
from ringspan.transport.contract import Transport
from ringspan.transport.inbox import Inbox, Link, Page

_INTRODUCTION_BYTES = 512


class Introduction:
    """What one rank says of itself, and a page with a number in it that the others must find there.

    What goes wrong here is said too: whoever raised now would leave the others waiting.
    """

    inbox: Inbox
    pages: dict[int, Page]  # by rank, this one's among them

    def __init__(self, rank: int, undo: contextlib.ExitStack) -> None:
        self.rank = rank
        self.words: dict[str, Any] = {"no": segments.why_unsupported()}
        if self.words["no"] is None:
            try:
                self._introduce(undo)
            except SharedMemoryFullError as error:
                self.words = {"no": _short(error.__cause__ or error)}
            except OSError as error:
                self.words = {"no": _short(error)}

    def _introduce(self, undo: contextlib.ExitStack) -> None:
        self.inbox = Inbox()
        undo.callback(self.inbox.close)
        memory, nonce = segments.create(Page.SIZE), secrets.randbits(60)
        page = Page(memory)
        page.nonce = nonce
        self.pages = {self.rank: page}
        segment = segments.segment_of(memory)
        assert segment is not None
        self.words |= {
            "host": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "pid": os.getpid(),
            "pipe": self.inbox.write_end,
            "page": [segment.fd, len(segment), segment.serial],
            "nonce": nonce,
        }

    def meet(self, everyone: Sequence[dict[str, Any]], undo: contextlib.ExitStack) -> tuple[list[Link], str | None]:
        """The ways to all others, or why there is none."""
        links: list[Link] = []
        for rank, words in enumerate(everyone):
            if words["host"] != self.words["host"]:
                return links, f"rank {rank} is on another host"
            try:
                page = Page(segments.open_peer(words["pid"], *words["page"]))
                if page.nonce != words["nonce"]:
                    return links, f"process {words['pid']} is not rank {rank} here"
                if rank != self.rank:
                    self.pages[rank] = page
                    links.append(Link(rank, words["pid"], words["pipe"]))
                    undo.callback(links[-1].close)
            except OSError as error:
                reason = error.strerror or str(error)
                return links, f"cannot open the memory of rank {rank}, process {words['pid']}: {reason}"[:200]
        return links, None


def exchange(beside: Transport, words: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank says, by rank."""
    message = json.dumps(words, ensure_ascii=False).encode(errors="replace")
    assert len(message) <= _INTRODUCTION_BYTES
    answers = beside.agree(beside.begin_call(), message.ljust(_INTRODUCTION_BYTES))
    return [json.loads(answer) for answer in answers]


def _short(error: BaseException) -> str:
    return str(error)[: _INTRODUCTION_BYTES // 5]  # whatever the alphabet
