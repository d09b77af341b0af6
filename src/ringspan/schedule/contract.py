"""What a schedule is: for one rank, the steps that it takes, what it computes and what it sends in each.

In a ring of P ranks, at step t rank r works on the travelling shard of rank (r - t) mod P: its own at step 0.
Which shard travels is decided once for each pass: the keys and values (in the backward their gradients ride along),
or the queries (in the forward their softmax states ride along, in the backward their gradients).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ringspan.tile import Tile

Travels = Literal["keys", "queries"]


@dataclass(frozen=True)
class Hop:
    """One transfer: `peer` is the rank at the other end, `shard` the rank whose shard (or result) moves."""

    peer: int
    shard: int


@dataclass(frozen=True)
class Step:
    """What one rank does in one step.

    index: the step t; it is what both ends of a hop call it by.
    shard: whose shard is visiting, tiles: what is computed with it (nothing, where no pair is visible).
    send, receive: hops of shards for step t + 1, posted before the tiles are computed.
    ride_receive: results (gradients or states) that arrive while the tiles are computed: those for the visiting
        shard so far, or finished parts for this rank's own shard.
    ride_send: where the visiting shard's result goes once this rank's part is in it: on, or home.
    """

    index: int
    shard: int
    tiles: tuple[Tile, ...]
    send: tuple[Hop, ...] = ()
    receive: Hop | None = None
    ride_receive: tuple[Hop, ...] = ()
    ride_send: Hop | None = None

    @property
    def idle(self) -> bool:
        return not (self.tiles or self.send or self.receive or self.ride_receive or self.ride_send)


@dataclass(frozen=True)
class Schedule:
    """One rank's part of one pass. Steps in which it does nothing are left out.

    readers: the ranks that receive this rank's own shard, the one that needs it first foremost.
    """

    rank: int
    num_ranks: int
    travels: Travels
    steps: tuple[Step, ...]
    readers: tuple[int, ...]
