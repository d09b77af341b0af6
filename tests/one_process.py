"""The ends of one group of shared memory in one process, each for a thread, or for one that plays all ranks."""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace

from ringspan.transport import inbox, segments, shared_memory


def ends(num_ranks):
    """The ends of one group in one process; what would ask each other by torch.distributed only counts."""
    inboxes = [inbox.Inbox() for _ in range(num_ranks)]
    memory = [segments.create(inbox.Page.SIZE) for _ in range(num_ranks)]
    found = []
    for rank in range(num_ranks):
        beside = SimpleNamespace(rank=rank, size=num_ranks, fail=lambda error: None)
        beside.begin_call = itertools.count(1).__next__
        others = [other for other in range(num_ranks) if other != rank]
        links = [inbox.Link(other, os.getpid(), inboxes[other].write_end) for other in others]
        pages = {other: inbox.Page(x) for other, x in enumerate(memory)}
        found.append(shared_memory.SharedMemoryTransport(beside, 10, inboxes[rank], links, pages))
    return found
