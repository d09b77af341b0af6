"""Proves a schedule by playing it: slow, by brute force over positions, and knowing nothing of how it was made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ringspan.layout import Layout
from ringspan.problem import Mask
from ringspan.schedule.contract import Schedule


class ScheduleError(AssertionError):
    """A schedule that computes wrongly, waits for what never comes, or moves what nobody uses."""


def check(schedules: Sequence[Schedule], mask: Mask, queries: Layout, keys: Layout, rides: bool = False) -> None:
    """Raise ScheduleError unless all ranks' schedules of one pass together are right.

    Every visible pair is computed exactly once and no invisible one; every shard is there before it is used and
    is used at the step it was sent for; both ends of each hop agree; a shard's readers are the ranks that it
    reaches; no rank holds more than two visiting shards (the one in use and the one arriving); and with `rides`,
    each result (a gradient, or a state of travelling queries) reaches its owner once.
    """
    _check_pairs(schedules, mask, queries, keys)
    _check_hops(schedules)
    if rides:
        _check_rides(schedules)
    else:
        riding = any(step.ride_send or step.ride_receive for plan in schedules for step in plan.steps)
        _require(not riding, "results ride where nobody waits for them")


def _require(truth: bool, message: str) -> None:
    if not truth:
        raise ScheduleError(message)


def _check_pairs(schedules: Sequence[Schedule], mask: Mask, queries: Layout, keys: Layout) -> None:
    visible = visible_pairs(mask)
    computed = np.zeros(visible.shape, dtype=np.int64)
    for plan in schedules:
        for step in plan.steps:
            query_rank, key_rank = (plan.rank, step.shard) if plan.travels == "keys" else (step.shard, plan.rank)
            held_queries, held_keys = queries.positions(query_rank), keys.positions(key_rank)
            for tile in step.tiles:
                lo, hi = tile.intervals().arrays()
                seen = np.arange(len(tile.keys)) >= lo[..., None]
                seen &= np.arange(len(tile.keys)) < hi[..., None]
                _require(bool(seen.any()), f"rank {plan.rank} computes a tile that shows nothing: {tile}")
                rows, columns = held_queries[tile.rows], held_keys[tile.columns]
                computed[..., np.asarray(rows)[:, None], columns] += seen
    wrong = np.argwhere(computed != visible)
    if len(wrong):
        place = tuple(wrong[0].tolist())
        raise ScheduleError(
            f"query {place[-2]}, key {place[-1]} is computed {computed[place]} times, "
            f"visible {bool(visible[place])}; {len(wrong)} pairs are wrong"
        )


def visible_pairs(mask: Mask) -> np.ndarray:
    """[num_queries, num_keys] bool, from the words of the definition and nothing else.

    [B, 1, num_queries, num_keys] where batch entries differ.
    """
    seen = np.ones((mask.num_queries, mask.num_keys), dtype=bool)
    query, key = np.arange(mask.num_queries)[:, None], np.arange(mask.num_keys)[None, :]
    if mask.left >= 0:
        seen &= query - key <= mask.left
    if mask.right >= 0:
        seen &= key - query <= mask.right
    if mask.cu_seqlens is not None:
        document = np.repeat(np.arange(len(mask.cu_seqlens) - 1), np.diff(mask.cu_seqlens))
        seen &= document[:, None] == document[None, :]
    if mask.key_ranges is not None:
        in_one = [(ranges.lo[..., None] <= key) & (key < ranges.hi[..., None]) for ranges in mask.key_ranges]
        seen = seen & np.any(in_one, 0)
    return seen


def _check_hops(schedules: Sequence[Schedule]) -> None:
    posted: Counter = Counter()
    awaited: Counter = Counter()
    for plan in schedules:
        held = {plan.rank}
        visiting: int | None = None
        indices = [-1, *(step.index for step in plan.steps)]
        in_order = all(before < after for before, after in pairwise(indices))
        _require(in_order, f"rank {plan.rank} takes its steps in another order, or one of them twice")
        for step in plan.steps:
            expected = step.shard if step.tiles else None
            _require(
                expected in (None, plan.rank, visiting),
                f"rank {plan.rank} step {step.index} uses shard {expected} but holds {visiting}",
            )
            for hop in step.send:
                _require(hop.shard in held, f"rank {plan.rank} step {step.index} sends {hop}, which it does not hold")
                posted[(step.index, plan.rank, hop.peer, hop.shard)] += 1
            visiting = None
            if step.receive is not None:
                visiting = step.receive.shard
                awaited[(step.index, step.receive.peer, plan.rank, visiting)] += 1
                _require(
                    _used_at(plan, visiting, step.index + 1),
                    f"rank {plan.rank} receives shard {visiting} at step {step.index} and does not use it next",
                )
            held = {plan.rank} if visiting is None else {plan.rank, visiting}
    _require(posted == awaited, f"hops that only one end knows: {(posted - awaited) + (awaited - posted)}")
    reached = {plan.rank: Counter(peer for _, _, peer, shard in awaited if shard == plan.rank) for plan in schedules}
    for plan in schedules:
        readers = Counter(plan.readers)
        _require(readers == reached[plan.rank], f"rank {plan.rank} has readers {readers}, not {reached[plan.rank]}")


def _used_at(plan: Schedule, shard: int, index: int) -> bool:
    return any(step.index == index and step.shard == shard and bool(step.tiles) for step in plan.steps)


def _check_rides(schedules: Sequence[Schedule]) -> None:
    """Play the results that ride. What a rank has computed or received leaves it or is home: so all of it is home in
    the end, once, if nothing is kept back and nothing left in flight."""
    in_flight: set[tuple[int, int, int]] = set()  # (from, to, shard)
    by_index = {(plan.rank, step.index): step for plan in schedules for step in plan.steps}
    for index in range(1 + max((step for _, step in by_index), default=0)):
        sent = set()
        for plan in schedules:
            step = by_index.get((plan.rank, index))
            if step is None:
                continue
            for hop in step.ride_receive:
                parcel = (hop.peer, plan.rank, hop.shard)
                _require(parcel in in_flight, f"rank {plan.rank} step {index} waits for {hop}, never sent")
                in_flight.remove(parcel)
                joins = hop.shard == step.shard and bool(step.tiles)
                _require(hop.shard == plan.rank or joins, f"{hop} comes to no work")
            leaving = step.ride_send
            _require(
                leaving is None or bool(index and step.tiles and leaving.shard == step.shard),
                f"rank {plan.rank} step {index} sends a result that it does not have: {leaving}",
            )
            if index and step.tiles:
                if leaving is None:
                    raise ScheduleError(f"rank {plan.rank} step {index} keeps a result back")
                sent.add((plan.rank, leaving.peer, step.shard))
        _require(not in_flight, f"results that nobody received by step {index}: {list(in_flight)}")
        in_flight = sent
    _require(not in_flight, f"results left in flight: {list(in_flight)}")
