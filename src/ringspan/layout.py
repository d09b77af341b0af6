"""WHO holds which token. A layout maps each rank to the global positions of its shard, as Python ranges.

contiguous  rank r holds one run of tokens; any lengths (`split_evenly` gives the first ranks one more)
striped     rank r holds r, r + P, r + 2P, ...: balances a causal mask to within one token
zigzag      2P chunks, rank r holds chunk r and chunk 2P-1-r: balances a causal mask, keeps long runs
packed      whole documents, and parts of those that are too much work for one rank (packing.py)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

from ringspan.errors import ArgumentError, LayoutError, explain, shown
from ringspan.packing import packed

LAYOUTS = ("contiguous", "striped", "zigzag")  # that need to know nothing of documents
NAMES = (*LAYOUTS, "packed")


@dataclass(frozen=True)
class Layout:
    """Positions of one sequence over num_ranks ranks. Made by `split` or `from_lengths`, which check."""

    name: str
    lengths: tuple[int, ...]
    cu_seqlens: tuple[int, ...] | None = None  # of "packed"

    @property
    def num_ranks(self) -> int:
        return len(self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def has_many_runs(self) -> bool:
        """Whether shards may lie in many runs, so that their tiles hold arrays."""
        return self.name == "packed"

    def ranges(self, rank: int) -> tuple[range, ...]:
        """Global positions of a rank's tokens, in the order in which its shard holds them."""
        if self.name == "striped":
            found: tuple[range, ...] = (range(rank, self.num_tokens, self.num_ranks),)
        elif self.name == "zigzag":
            chunks = _cut(self.num_tokens, 2 * self.num_ranks)
            found = _joined(chunks[rank], chunks[2 * self.num_ranks - 1 - rank])
        elif self.name == "packed":
            assert self.cu_seqlens is not None
            found = packed(self.cu_seqlens, self.num_ranks)[rank]
        else:
            start = self._starts[rank]
            found = (range(start, start + self.lengths[rank]),)
        return tuple(piece for piece in found if piece)

    def positions(self, rank: int) -> list[int]:
        return [position for piece in self.ranges(rank) for position in piece]

    def locate(self, position: int) -> tuple[int, int]:
        """(rank, slot in its shard) of a global position."""
        for rank in range(self.num_ranks):
            slot = 0
            for piece in self.ranges(rank):
                if position in piece:
                    return rank, slot + piece.index(position)
                slot += len(piece)
        raise IndexError(f"position {position} of a sequence of {self.num_tokens} tokens")

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(accumulate(self.lengths, initial=0))


def split(name: str, num_tokens: int, num_ranks: int, cu_seqlens: tuple[int, ...] | None = None) -> Layout:
    """The layout that `shard` uses: lengths by the layout's own rule. cu_seqlens: (0, ..., num_tokens)."""
    check_name(name)
    if num_tokens < 0 or num_ranks < 1:
        raise ArgumentError(f"{num_tokens} tokens cannot be spread over {num_ranks} ranks")
    return Layout(name, _lengths_by_rule(name, num_tokens, num_ranks), _documents_of(name, num_tokens, cu_seqlens))


@lru_cache(maxsize=128)
def from_lengths(name: str, lengths: tuple[int, ...], cu_seqlens: tuple[int, ...] | None = None) -> Layout:
    """The layout of shards whose lengths are given. All but contiguous take only those of their rule."""
    check_name(name)
    expected = _lengths_by_rule(name, sum(lengths), len(lengths))
    if name != "contiguous" and lengths != expected:
        raise LayoutError(
            explain(
                f"layout={name!r} takes only the shard lengths of its own rule.",
                got=f"lengths {_shorten(lengths)} by rank; the rule gives {_shorten(expected)} "
                f"for {sum(lengths)} tokens",
                fix=f"cut the sequence with ringspan.shard(..., layout={name!r}), or use "
                'layout="contiguous", which takes any lengths',
            )
        )
    return Layout(name, lengths, _documents_of(name, sum(lengths), cu_seqlens))


def _documents_of(name: str, num_tokens: int, cu_seqlens: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if cu_seqlens is not None and cu_seqlens[-1] != num_tokens:
        got = f"it ends at {cu_seqlens[-1]}, there are {num_tokens} tokens"
        raise ArgumentError(explain("cu_seqlens must end at the number of tokens of the whole sequence.", got=got))
    if name != "packed":
        return None
    if cu_seqlens is None:
        raise ArgumentError(
            explain(
                'layout="packed" needs to know the documents.',
                got="no cu_seqlens",
                fix="cu_seqlens=(0, ..., total); on the command line --documents",
            )
        )
    return cu_seqlens


def shard_length(name: str, num_tokens: int, rank: int, num_ranks: int) -> int:
    """The length of one shard by the layout's own rule; num_tokens may be symbolic."""
    if name == "zigzag":
        pieces = 2 * num_ranks
        return _piece_length(num_tokens, pieces, rank) + _piece_length(num_tokens, pieces, pieces - 1 - rank)
    # The others agree: the first num_tokens % num_ranks ranks hold one more.
    return _piece_length(num_tokens, num_ranks, rank)


def check_name(name: str) -> None:
    if name not in NAMES:
        raise ArgumentError(explain("layout is unknown.", got=shown(name), fix=f"one of {', '.join(map(repr, NAMES))}"))


def _lengths_by_rule(name: str, num_tokens: int, num_ranks: int) -> tuple[int, ...]:
    return tuple(shard_length(name, num_tokens, rank, num_ranks) for rank in range(num_ranks))


@lru_cache(maxsize=256)
def _cut(num_tokens: int, num_pieces: int) -> tuple[range, ...]:
    """num_pieces consecutive runs; the first num_tokens % num_pieces of them one longer."""
    stops = accumulate((_piece_length(num_tokens, num_pieces, index) for index in range(num_pieces)), initial=0)
    return tuple(range(start, stop) for start, stop in pairwise(stops))


def _piece_length(num_tokens: int, num_pieces: int, index: int) -> int:
    return (num_tokens + num_pieces - 1 - index) // num_pieces


def _joined(first: range, second: range) -> tuple[range, ...]:
    """Two runs as one where the second continues the first: one tile instead of four."""
    if first.stop == second.start:
        return (range(first.start, second.stop),)
    return first, second


def _shorten(lengths: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, lengths[:8]))
    return f"({shown}{', ...' if len(lengths) > 8 else ''})"
