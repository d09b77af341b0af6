"""The tiles of a shard of queries and a shard of keys: the fewest in which every visible pair is, once.

Few large tiles are cheaper than many small ones. Shards of one or two runs make a tile for each pair of runs, most of
them bands or full. Shards of many runs (packed documents) make a single one: positions ascend within a shard, so the
interval of global positions that a query sees is an interval of the shard's own slots too, wherever its runs lie.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ringspan.problem import UNBOUNDED, KeyRanges, Mask
from ringspan.tile import Kind, Tile

_FEW_RUNS = 2


def meet(query_ranges: tuple[range, ...], key_ranges: tuple[range, ...], mask: Mask) -> bool:
    """Whether any pair of the two shards is visible, without making tiles: of masks without key ranges, whose every
    query sees its own position. So what a run of queries sees is one run of keys, from its first's to its last's."""
    if not query_ranges or not key_ranges:
        return False
    lo, _ = mask.intervals(np.array([run.start for run in query_ranges]))
    _, hi = mask.intervals(np.array([run.stop - 1 for run in query_ranges]))
    starts, stops = (np.array([getattr(run, end) for run in key_ranges]) for end in ("start", "stop"))
    first = np.searchsorted(stops, lo, side="right")  # the first run of keys that does not end before
    there = first < len(starts)
    return bool((starts[first[there]] < hi[there]).any())


def tiles_between(query_ranges: tuple[range, ...], key_ranges: tuple[range, ...], mask: Mask) -> tuple[Tile, ...]:
    """The tiles of a query shard and a key shard. Ranges ascend. Tiles in which no pair is visible are left out."""
    if query_ranges == key_ranges and mask.is_causal_only:
        # Later in the shard is later in the sequence, wherever the shard's runs lie: one diagonal.
        length = sum(map(len, query_ranges))
        return (_local_tile(slice(0, length), slice(0, length), right=0),) if length else ()
    if _scattered(query_ranges, key_ranges):
        return tuple(tile for part in mask.parts if (tile := _scattered_tile(query_ranges, key_ranges, part)))
    found: list[Tile] = []
    for tile in (tile for part in mask.parts for tile in _tiles_of(query_ranges, key_ranges, part)):
        if tile.kind is not Kind.EMPTY:
            found.append(tile)
            while len(found) > 1 and (joined := _joined(found[-2], found[-1])):
                found[-2:] = [joined]
    return tuple(found)


def _tiles_of(query_ranges: tuple[range, ...], key_ranges: tuple[range, ...], mask: Mask) -> Iterator[Tile]:
    row_start = 0
    for queries in query_ranges:
        key_start = 0
        for keys in key_ranges:
            yield Tile(queries, keys, row_start, key_start, mask)
            key_start += len(keys)
        row_start += len(queries)


def _joined(first: Tile, second: Tile) -> Tile | None:
    """Two full tiles as one, where together they are a rectangle."""
    if not first.kind is second.kind is Kind.FULL:
        return None
    if first.rows == second.rows and first.columns.stop == second.columns.start:
        return _local_tile(first.rows, slice(first.columns.start, second.columns.stop))
    if first.columns == second.columns and first.rows.stop == second.rows.start:
        return _local_tile(slice(first.rows.start, second.rows.stop), first.columns)
    return None


def _scattered(query_ranges: tuple[range, ...], key_ranges: tuple[range, ...]) -> bool:
    return max(len(query_ranges), len(key_ranges)) > _FEW_RUNS


def _scattered_tile(query_ranges: tuple[range, ...], key_ranges: tuple[range, ...], part: Mask) -> Tile | None:
    """The one tile of shards in many runs, of the rows and keys between the first and the last that it needs."""
    queries, keys = _positions(query_ranges), _positions(key_ranges)
    lo, hi = (np.searchsorted(keys, bound) for bound in part.intervals(queries))
    seeing = lo < hi
    if not seeing.any():
        return None
    seers = np.flatnonzero(seeing.any(axis=tuple(range(seeing.ndim - 1))))
    rows, columns = slice(int(seers[0]), int(seers[-1]) + 1), slice(int(lo[seeing].min()), int(hi[seeing].max()))
    ranges = np.stack([lo, hi], -1)[..., rows, :] - columns.start
    if ranges.ndim > 2:
        ranges = ranges[:, 0]  # of all heads
    return _local_tile(rows, columns, key_ranges=(KeyRanges.of(ranges),))


def _positions(ranges: tuple[range, ...]) -> np.ndarray:
    return np.concatenate([np.arange(run.start, run.stop, run.step) for run in ranges] or [np.empty(0, np.int64)])


def _local_tile(
    rows: slice, columns: slice, right: int = UNBOUNDED, key_ranges: tuple[KeyRanges, ...] | None = None
) -> Tile:
    """A tile whose rule needs no global positions: its own rows and keys, counted from 0, stand for them."""
    num_rows, num_keys = rows.stop - rows.start, columns.stop - columns.start
    length = max(num_rows, num_keys)
    mask = Mask(length, length, right=right, key_ranges=key_ranges)
    return Tile(range(num_rows), range(num_keys), rows.start, columns.start, mask)
