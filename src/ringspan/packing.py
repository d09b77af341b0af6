"""WHO holds which packed documents: all ranks have the same work, and few ranks share a document.

Of a document of L tokens a causal mask shows L (L + 1) / 2 pairs: a token of a long one is more work than one of a
short one. Cut into runs of equal length (contiguous), a ring waits for the rank that got the long one; dealt out token
by token (striped), every rank needs the keys of all. Here each rank gets so many tokens of longer and so many of
shorter documents that it has its share of the work, and a document goes to as few ranks as its work allows. Like in a
zigzag, a part of a document is a run from its beginning and one from its end, further inwards from part to part:
then all its tokens are the same work, whatever the sizes of the parts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

NEAR_ENOUGH = 1.05  # work of the busiest rank / mean with which runs of equal length do


@lru_cache(maxsize=64)
def packed(cu_seqlens: tuple[int, ...], num_ranks: int) -> tuple[tuple[range, ...], ...]:
    """By rank the runs of tokens that it holds, ascending; the first total % num_ranks ranks hold one token more."""
    total = cu_seqlens[-1]
    lengths = [total // num_ranks + (rank < total % num_ranks) for rank in range(num_ranks)]
    documents = [range(start, stop) for start, stop in pairwise(cu_seqlens) if start < stop]
    equal_runs = [range(start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]
    if _imbalance(equal_runs, documents) <= NEAR_ENOUGH:
        return tuple(_joined([run]) for run in equal_runs)
    return tuple(_joined(runs) for runs in _mixed(documents, lengths))


def _imbalance(runs: Sequence[range], documents: Sequence[range]) -> float:
    """Work of the busiest run over the mean."""
    work, left = [], deque(documents)
    for run in runs:
        work.append(0)
        while left and left[0].start < run.stop:
            document = left[0]
            part = range(max(run.start, document.start), min(run.stop, document.stop))
            work[-1] += len(part) * (part.start + part.stop + 1 - 2 * document.start)
            if document.stop > run.stop:
                break
            left.popleft()
    return max(work) * len(work) / max(1, sum(work))


@dataclass
class _Rest:
    """What nobody has taken yet of a document: all but as many tokens from its beginning and its end. density: twice
    the work of each token."""

    run: range
    density: int

    def take(self, num_tokens: int) -> list[range]:
        """The outermost tokens, half from either end."""
        start, stop = self.run.start + (num_tokens + 1) // 2, self.run.stop - num_tokens // 2
        taken = [range(self.run.start, start), range(stop, self.run.stop)]
        self.run = range(start, stop)
        return taken


def _mixed(documents: Sequence[range], lengths: Sequence[int]) -> list[list[range]]:
    """By rank runs with so many tokens, and the same work, as near as whole tokens allow.

    What is left has the work, on average, that every rank should get: so among it there always is a document of at
    least that density and one of at most that. The nearest two are mixed; the longest and shortest remain for the last.
    """
    left = sorted((_Rest(document, len(document) + 1) for document in documents), key=_density)
    work_left, tokens_left = sum(rest.density * len(rest.run) for rest in left), sum(lengths)
    held: list[list[range]] = []
    for length in lengths:
        held.append([])
        work = work_left * length // max(1, tokens_left)
        tokens_left -= length
        while length:
            place = bisect_left(left, work / length, key=_density)
            high, low = min(place, len(left) - 1), max(place - 1, 0)
            above, below = left[high], left[low]
            of_above = length
            if below.density < above.density:  # of_above * above's + (length - of_above) * below's is the work
                of_above = (work - length * below.density) // (above.density - below.density)
                of_above = min(max(of_above, 0), length)
            taking, num_tokens, place = above, of_above, high
            if of_above < len(above.run) and (of_above == 0 or length - of_above >= len(below.run)):
                taking, num_tokens, place = below, length - of_above, low
            num_tokens = min(num_tokens, len(taking.run))
            held[-1] += taking.take(num_tokens)
            length -= num_tokens
            work -= num_tokens * taking.density
            work_left -= num_tokens * taking.density
            if not taking.run:
                left.pop(place)
    return held


def _density(rest: _Rest) -> int:
    return rest.density


def _joined(runs: Sequence[range]) -> tuple[range, ...]:
    """Ascending, with runs that continue each other as one."""
    found: list[range] = []
    for run in sorted(filter(None, runs), key=lambda run: run.start):
        if found and found[-1].stop == run.start:
            found[-1] = range(found[-1].start, run.stop)
        else:
            found.append(run)
    return tuple(found)
