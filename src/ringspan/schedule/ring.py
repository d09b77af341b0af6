"""The ring: neighbours hand shards on, and whoever does not need a shard is left out.

Two rules say it all. A shard for step t + 1 comes from the neighbour that works on it in step t, if there is
one, else straight from its owner. Its gradient, or the state of travelling queries, goes from the rank of step t to
the rank of step t + 1, if that one works on the shard, else straight home. So every hop ends at a rank that uses what
it carries, and a rank never holds more than the shard it works on and the one that is arriving.
(Liu, Zaharia, Abbeel: Ring Attention with Blockwise Transformers, 2023, for the ring itself.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from ringspan.layout import Layout
from ringspan.problem import Mask, Problem
from ringspan.schedule.contract import Hop, Schedule, Step, Travels
from ringspan.tile import Tile
from ringspan.tiling import meet, tiles_between


def ring_schedule(
    mask: Mask, query_layout: Layout, key_layout: Layout, rank: int, travels: Travels = "keys", rides: bool = False
) -> Schedule:
    """One rank's schedule. rides: results for the travelling shard ride along: gradients, or states of queries."""
    keeps_intervals = mask.key_ranges is not None or query_layout.has_many_runs or key_layout.has_many_runs
    ring = (_large_ring if keeps_intervals else _ring)(mask, query_layout, key_layout, travels)
    return ring.schedule(rank, rides)


def travelling_side(problem: Problem, backward: bool) -> Travels:
    """What should travel: whichever moves fewer bytes, judged by the whole group's sizes.

    In the forward, queries only where that halves them: their states are made, moved and merged step by step.
    """
    if backward:
        return min(("keys", "queries"), key=lambda travels: backward_hop_bytes(problem, travels))
    queries, keys = (forward_hop_bytes(problem, travels) for travels in ("queries", "keys"))
    return "queries" if 2 * queries < keys else "keys"


def forward_hop_bytes(problem: Problem, travels: Travels) -> int:
    """Bytes that move if every shard makes one hop: k, v; or q with its state."""
    dim, value_dim = problem.dims
    if travels == "keys":
        rows = problem.batch * problem.num_kv_heads * problem.mask.num_keys
        return rows * (dim + value_dim) * problem.itemsize_bytes
    rows = problem.batch * problem.num_heads * problem.mask.num_queries
    return rows * (dim * problem.itemsize_bytes + (value_dim + 2) * problem.state_itemsize_bytes)


def backward_hop_bytes(problem: Problem, travels: Travels) -> int:
    """Bytes that move if every shard makes one hop with its gradient: k, v, dk, dv; or q, do, lse, delta, dq."""
    inputs, state, (dim, value_dim) = problem.itemsize_bytes, problem.state_itemsize_bytes, problem.dims
    if travels == "keys":
        rows = problem.batch * problem.num_kv_heads * problem.mask.num_keys
        return rows * (dim + value_dim) * (inputs + state)
    rows = problem.batch * problem.num_heads * problem.mask.num_queries
    return rows * ((dim + value_dim) * inputs + (dim + 2) * state)


@dataclass(frozen=True)
class _Ring:
    """All ranks' schedules of one mask; each is made when it is asked for, and kept as long as this is."""

    mask: Mask
    query_layout: Layout
    key_layout: Layout
    travels: Travels
    _schedules: dict[tuple[int, bool], Schedule] = field(default_factory=dict, compare=False)
    _tiles: dict[tuple[int, int], tuple[Tile, ...]] = field(default_factory=dict, compare=False)
    _works: dict[tuple[int, int], bool] = field(default_factory=dict, compare=False)

    @property
    def num_ranks(self) -> int:
        return self.query_layout.num_ranks

    def schedule(self, rank: int, rides: bool) -> Schedule:
        if (rank, rides) not in self._schedules:
            steps = (self.step(rank, index, rides) for index in range(self.num_ranks + rides))
            doing = tuple(step for step in steps if not step.idle)
            readers = tuple(self.readers(rank))
            self._schedules[rank, rides] = Schedule(rank, self.num_ranks, self.travels, doing, readers)
        return self._schedules[rank, rides]

    def tiles(self, rank: int, shard: int) -> tuple[Tile, ...]:
        """What `rank` computes with the travelling `shard`."""
        if (rank, shard) not in self._tiles:
            self._tiles[rank, shard] = tiles_between(*self._meeting(rank, shard), self.mask)
        return self._tiles[rank, shard]

    def _meeting(self, rank: int, shard: int) -> tuple[tuple[range, ...], tuple[range, ...]]:
        query_rank, key_rank = (rank, shard) if self.travels == "keys" else (shard, rank)
        return self.query_layout.ranges(query_rank), self.key_layout.ranges(key_rank)

    def works(self, index: int, shard: int) -> bool:
        """Whether the rank that meets `shard` at a step computes anything with it."""
        if not 0 <= index < self.num_ranks:
            return False
        rank = (shard + index) % self.num_ranks
        if self.mask.key_ranges is not None or not self.query_layout.has_many_runs:
            return bool(self.tiles(rank, shard))
        if (rank, shard) not in self._works:  # tiles that hold arrays are made for the rank that asks only
            self._works[rank, shard] = meet(*self._meeting(rank, shard), self.mask)
        return self._works[rank, shard]

    def readers(self, rank: int):
        for index in range(1, self.num_ranks):
            if self.works(index, rank):
                yield (rank + index) % self.num_ranks

    def step(self, rank: int, index: int, rides: bool) -> Step:
        shard = (rank - index) % self.num_ranks
        last = index == self.num_ranks  # only what rides comes home then
        return Step(
            index,
            shard,
            () if last else self.tiles(rank, shard),
            () if last else tuple(self._sends(rank, index, shard)),
            None if last else self._receive(rank, index),
            tuple(self._ride_receives(rank, index, shard)) if rides else (),
            self._ride_send(rank, index, shard) if rides else None,
        )

    def _sends(self, rank: int, index: int, shard: int):
        neighbour = (rank + 1) % self.num_ranks
        if (index == 0 or self.works(index, shard)) and self.works(index + 1, shard):
            yield Hop(neighbour, shard)
        if index > 0 and not self.works(index, rank) and self.works(index + 1, rank):
            yield Hop((rank + index + 1) % self.num_ranks, rank)

    def _receive(self, rank: int, index: int) -> Hop | None:
        shard = (rank - index - 1) % self.num_ranks
        if not self.works(index + 1, shard):
            return None
        handed_on = index == 0 or self.works(index, shard)
        return Hop((rank - 1) % self.num_ranks if handed_on else shard, shard)

    def _ride_receives(self, rank: int, index: int, shard: int):
        if index >= 2 and self.works(index, shard) and self.works(index - 1, shard):
            yield Hop((rank - 1) % self.num_ranks, shard)
        # What belongs to this rank's own shard comes home from the last of a run of ranks that worked on it.
        if index >= 2 and self.works(index - 1, rank) and not self.works(index, rank):
            yield Hop((rank + index - 1) % self.num_ranks, rank)

    def _ride_send(self, rank: int, index: int, shard: int) -> Hop | None:
        if index == 0 or not self.works(index, shard):
            return None
        goes_on = self.works(index + 1, shard)
        return Hop((rank + 1) % self.num_ranks if goes_on else shard, shard)


_ring = lru_cache(maxsize=128)(_Ring)
_large_ring = lru_cache(maxsize=8)(_Ring)  # intervals are kept with it: 16 bytes a query, or a query and shard
