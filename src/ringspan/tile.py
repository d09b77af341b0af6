"""ONE unit of work: a run of queries against a run of keys, and the interval of keys that each row sees.

A kernel is handed `RowIntervals` and knows nothing of documents, windows or layouts. A `Tile` stores only the
rule (two ranges and the mask) and makes the intervals, vectorised, when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache

import numpy as np

from ringspan.problem import UNBOUNDED, Mask


class Kind(Enum):
    EMPTY = "empty"
    FULL = "full"
    BAND = "band"
    GENERAL = "general"


@dataclass(frozen=True)
class Band:
    """Row i sees key j iff i + lower <= j < i + upper; None is unbounded."""

    lower: int | None = None
    upper: int | None = None

    def kind(self, num_rows: int, num_keys: int) -> Kind:
        # j - i takes every value from 1 - num_rows to num_keys - 1, and nothing else.
        smallest, largest = 1 - num_rows, num_keys - 1
        lower = smallest if self.lower is None else max(self.lower, smallest)
        upper = largest if self.upper is None else min(self.upper - 1, largest)
        if num_rows == 0 or num_keys == 0 or lower > upper:
            return Kind.EMPTY
        return Kind.FULL if (lower, upper) == (smallest, largest) else Kind.BAND


@dataclass(frozen=True, eq=False)
class RowIntervals:
    """Row i of a tile sees its keys lo[i] <= j < hi[i]: from a band, or from arrays.

    num_rows, num_keys: the tile's size T, S.
    band: the rule, where there is one; else
    lo, hi: int32 or int64 arrays, [T], [B, H, T], or [B, 1, T] for all heads alike; values are clipped to [0, S],
        lo >= hi sees nothing.
    """

    num_rows: int
    num_keys: int
    band: Band | None = Band()
    lo: np.ndarray | None = None
    hi: np.ndarray | None = None

    @cached_property
    def kind(self) -> Kind:
        if self.band is not None:
            return self.band.kind(self.num_rows, self.num_keys)
        lo, hi = self.arrays()
        if not (lo < hi).any():
            return Kind.EMPTY
        return Kind.FULL if not lo.any() and (hi == self.num_keys).all() else Kind.GENERAL

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(lo, hi), int64, [T], [B, H, T] or [B, 1, T], clipped to [0, S]."""
        if self.band is None:
            assert self.lo is not None and self.hi is not None
            bounds = (self.lo.astype(np.int64), self.hi.astype(np.int64))
        else:
            rows = np.arange(self.num_rows, dtype=np.int64)
            lower = -self.num_rows if self.band.lower is None else self.band.lower
            upper = self.num_keys if self.band.upper is None else self.band.upper
            bounds = (rows + lower, rows + upper)
        lo, hi = (np.clip(bound, 0, self.num_keys) for bound in bounds)
        return lo, hi

    def block(self, rows: slice, keys: slice) -> RowIntervals:
        """The same for a run of the rows and a run of the keys (slices with explicit start and stop)."""
        num_rows, num_keys = rows.stop - rows.start, keys.stop - keys.start
        if self.band is None:
            assert self.lo is not None and self.hi is not None
            lo, hi = (bound[..., rows].astype(np.int64) - keys.start for bound in (self.lo, self.hi))
            return RowIntervals(num_rows, num_keys, None, lo, hi)
        shift = rows.start - keys.start
        moved = (None if edge is None else edge + shift for edge in (self.band.lower, self.band.upper))
        return RowIntervals(num_rows, num_keys, Band(*moved))

    def heads(self, batch: slice, heads: slice) -> RowIntervals:
        """The same for some batch entries and query heads."""
        if self.band is not None or self.lo is None or self.lo.ndim == 1:
            return self
        assert self.hi is not None
        chosen = (batch, heads if self.lo.shape[1] > 1 else slice(0, 1))
        return RowIntervals(self.num_rows, self.num_keys, None, self.lo[chosen], self.hi[chosen])

    def within(self, lo: np.ndarray, hi: np.ndarray) -> RowIntervals:
        """The same, cut down to what bounds [B, H, T] of the tile's own rows and keys leave."""
        mine = self.arrays()
        return RowIntervals(self.num_rows, self.num_keys, None, np.maximum(mine[0], lo), np.minimum(mine[1], hi))

    def key_span(self) -> tuple[int, int]:
        """The smallest [start, stop) that holds every key that some row sees; (0, 0) where none is."""
        lo, hi = self.arrays()
        seeing = lo < hi
        if not seeing.any():
            return 0, 0
        return int(lo[seeing].min()), int(hi[seeing].max())

    def num_visible_pairs(self) -> int:
        """Visible (row, key) pairs; summed over the axes that the intervals have."""
        lo, hi = self.arrays()
        return int(np.maximum(hi - lo, 0).sum())

    def pieces(self) -> Iterator[Piece]:
        """The visible rows as runs in which lo and hi each stay put or each step by one per row.

        Intervals of shape [T] only. Packed documents come out as one piece a document; a causal diagonal
        that the tile's edge clips comes out as a diagonal and a rectangle.
        """
        if self.band is not None and self.band.lower is None and self.band.upper is not None:
            yield from self._pieces_below(self.band.upper)
            return
        lo, hi = self.arrays()
        seeing = lo < hi
        lo_steps, hi_steps = np.diff(lo), np.diff(hi)
        regular = seeing[:-1] & seeing[1:] & (lo_steps >> 1 == 0) & (hi_steps >> 1 == 0)
        code = np.where(regular, 2 * lo_steps + hi_steps, -1)
        ends = np.append(np.flatnonzero(np.diff(code)) + 1, self.num_rows - 1)
        row = 0
        while row < self.num_rows:
            last = row
            if row < self.num_rows - 1 and code[row] >= 0:
                last = int(ends[np.searchsorted(ends, row, side="right")])
            if seeing[row]:
                steps = (int(lo_steps[row]), int(hi_steps[row])) if last > row else (0, 0)
                yield Piece(slice(row, last + 1), int(lo[row]), int(hi[row]), *steps)
            row = last + 1

    def _pieces_below(self, upper: int) -> Iterator[Piece]:
        """Row i sees j < i + upper: a diagonal until the tile's last key, then a rectangle."""
        first = max(0, 1 - upper)
        edge = min(max(self.num_keys - upper + 1, first), self.num_rows)
        if first < edge:
            yield Piece(slice(first, edge), 0, first + upper, 0, 1)
        if max(first, edge) < self.num_rows and self.num_keys:
            yield Piece(slice(edge, self.num_rows), 0, self.num_keys, 0, 0)


@dataclass(frozen=True)
class Piece:
    """Rows whose intervals follow one line: row i of the piece sees lo + i*lo_step <= j < hi + i*hi_step."""

    rows: slice
    lo: int
    hi: int
    lo_step: int
    hi_step: int


@dataclass(frozen=True)
class Tile:
    """Queries at some global positions against keys at others, under a mask of one part.

    row_start, key_start: where the two runs begin in their shards.
    """

    queries: range
    keys: range
    row_start: int
    key_start: int
    mask: Mask

    @cached_property
    def rows(self) -> slice:
        return slice(self.row_start, self.row_start + len(self.queries))

    @cached_property
    def columns(self) -> slice:
        return slice(self.key_start, self.key_start + len(self.keys))

    def intervals(self) -> RowIntervals:
        """Local key indices that each row sees."""
        if self._in_band is not None:
            return self._in_band
        num_rows = len(self.queries) * self.mask.num_entries
        return (_kept_intervals if num_rows <= _KEPT_ROWS else _intervals)(self)

    @property
    def kind(self) -> Kind:
        return self.intervals().kind

    @cached_property
    def _in_band(self) -> RowIntervals | None:
        band = self._band
        return None if band is None else RowIntervals(len(self.queries), len(self.keys), band)

    @property
    def _band(self) -> Band | None:
        """The tile as a diagonal band, where only a window matters and both runs have one stride."""
        if not self.queries or not self.keys:
            return Band()
        if self.mask.key_ranges is not None:
            return None
        stride = self.queries.step
        if not self.mask.sees_all and stride != self.keys.step:
            return None
        start, stop = self.mask.document(self.queries[0])
        if not (start <= self.queries[-1] < stop):
            return None
        if self.keys[-1] < start or self.keys[0] >= stop:
            return Band(upper=-len(self.queries))
        if self.keys[0] < start or self.keys[-1] >= stop:
            return None
        distance = self.queries.start - self.keys.start
        lower = None if self.mask.left == UNBOUNDED else -((self.mask.left - distance) // stride)
        upper = None if self.mask.right == UNBOUNDED else (distance + self.mask.right) // stride + 1
        return Band(lower, upper)


def _intervals(tile: Tile) -> RowIntervals:
    """The intervals of a tile that is no band."""
    positions = np.arange(tile.queries.start, tile.queries.stop, tile.queries.step, dtype=np.int64)
    size = len(tile.queries), len(tile.keys)
    lo, hi = (
        # Local index of the first key at or after a global position: a ceiling division.
        np.clip(-((tile.keys.start - bound) // tile.keys.step), 0, size[1]).astype(np.int32)
        for bound in tile.mask.intervals(positions)
    )
    found = RowIntervals(*size, None, lo, hi)
    return RowIntervals(*size) if found.kind is Kind.FULL else found


# All layers of a model ask for the same ones. Up to 512 KiB each.
_KEPT_ROWS = 1 << 16
_kept_intervals = lru_cache(maxsize=128)(_intervals)
