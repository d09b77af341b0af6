"""Schedules: proved by the checker, counted by hand; and the checker is seen to refuse what is wrong."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from ringspan.layout import LAYOUTS, Layout, from_lengths, split
from ringspan.problem import KeyRanges, Mask, Problem
from ringspan.schedule.check import ScheduleError, check, visible_pairs
from ringspan.schedule.contract import Hop, Schedule, Step
from ringspan.schedule.ring import backward_hop_bytes, forward_hop_bytes, ring_schedule, travelling_side
from ringspan.tiling import tiles_between

PASSES = {
    "forward": ("keys", False),
    "backward, keys travel": ("keys", True),
    "backward, queries travel": ("queries", True),
}
every_pass = pytest.mark.parametrize(("travels", "rides"), PASSES.values(), ids=PASSES)
RULES = {
    "no mask": dict(),
    "causal": dict(right=0),
    "itself only": dict(left=0, right=0),
    "window": dict(left=9, right=4),
    "causal window": dict(left=5, right=0),
    "right-open window": dict(left=6),
    "left-open window": dict(right=3),
    "documents": dict(documents=True),
    "documents, causal window": dict(documents=True, left=7, right=0),
    "key ranges": dict(ranges=((),)),
    "causal key ranges of each batch entry": dict(ranges=((2,),), right=0),
    "two key ranges a query": dict(ranges=((2,), (2,))),
}


def masked(rule: str, num_tokens: int) -> Mask:
    """The rule's mask; its documents and ranges are of all sizes, some empty, and cut anywhere."""
    options = dict(RULES[rule])
    if options.pop("documents", False):
        a, b, c = (num_tokens * part // 64 for part in (9, 40, 41))
        options["cu_seqlens"] = (0, 0, a, a, a, b, c, num_tokens, num_tokens)
    axes = options.pop("ranges", ())
    if axes:  # each begins where the one before stops; the later in the sequence the further
        cuts = np.random.default_rng(num_tokens).integers(-2, num_tokens // 2 + 3, (*axes[0], num_tokens, 3))
        cuts = np.sort(cuts, -1) + np.arange(num_tokens)[:, None] // 2
        options["key_ranges"] = tuple(KeyRanges.of(cuts[..., i : i + 2]) for i in range(len(axes)))
    return Mask(num_tokens, num_tokens, **options)


def schedules(mask: Mask, queries: Layout, keys: Layout, travels="keys", rides=False) -> list[Schedule]:
    return [ring_schedule(mask, queries, keys, rank, travels, rides) for rank in range(queries.num_ranks)]


def prove(mask: Mask, queries: Layout, keys: Layout, travels="keys", rides=False) -> None:
    plans = schedules(mask, queries, keys, travels, rides)
    check(plans, mask, queries, keys, rides)
    assert not any(step.idle for plan in plans for step in plan.steps)


def receivers(plans: list[Schedule]) -> set[tuple[int, int]]:
    """(shard, rank that it reaches)."""
    return {(step.receive.shard, plan.rank) for plan in plans for step in plan.steps if step.receive}


def num_hops(plans: list[Schedule]) -> int:
    return sum(len(step.send) for plan in plans for step in plan.steps)


@every_pass
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_ring_schedule_visits_every_visible_pair_exactly_once(name, rule, travels, rides):
    for num_ranks, num_tokens in product(range(1, 10), (0, 1, 2, 7, 29, 64)):
        layout = split(name, num_tokens, num_ranks)
        prove(masked(rule, num_tokens), layout, layout, travels, rides)


@every_pass
@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 7), (7, 0), (5, 29), (29, 5), (64, 1)])
def test_queries_and_keys_need_not_be_equally_many(num_queries, num_keys, travels, rides):
    for num_ranks in range(1, 10):
        queries, keys = (split("contiguous", tokens, num_ranks) for tokens in (num_queries, num_keys))
        prove(Mask(num_queries, num_keys), queries, keys, travels, rides)


@every_pass
@pytest.mark.parametrize("rule", RULES)
def test_contiguous_shards_may_be_uneven_and_empty(rule, travels, rides):
    for lengths in ((0, 5, 0, 0, 9, 1), (29, 0), (0, 0, 7), (1, 30, 2, 31)):
        layout = from_lengths("contiguous", lengths)
        prove(masked(rule, sum(lengths)), layout, layout, travels, rides)
        keys = from_lengths("contiguous", lengths[::-1])  # cut elsewhere than the queries
        prove(masked(rule, sum(lengths)), layout, keys, travels, rides)


@pytest.mark.parametrize("travels", ["keys", "queries"])
@pytest.mark.parametrize(("name", "rule"), [*product(LAYOUTS, RULES)])
def test_a_shard_reaches_exactly_the_ranks_that_use_it_once_each(name, rule, travels):
    mask, layout = masked(rule, 29), split(name, 29, 5)
    plans, pairs = schedules(mask, layout, layout, travels), visible_pairs(mask)
    pairs = pairs.any((0, 1)) if pairs.ndim > 2 else pairs
    used = {
        (shard, rank)
        for shard, rank in product(range(5), range(5))
        if shard != rank
        and (pairs if travels == "queries" else pairs.T)[np.ix_(layout.positions(shard), layout.positions(rank))].any()
    }
    assert receivers(plans) == used
    assert num_hops(plans) == len(used)


@pytest.mark.parametrize("num_ranks", range(1, 10))
def test_causal_contiguous_shards_reach_the_ranks_above_and_no_others(num_ranks):
    mask, layout = Mask(64, 64, right=0), split("contiguous", 64, num_ranks)
    plans = schedules(mask, layout, layout)
    assert receivers(plans) == {(shard, rank) for shard in range(num_ranks) for rank in range(shard + 1, num_ranks)}
    assert num_hops(plans) == num_ranks * (num_ranks - 1) // 2


@pytest.mark.parametrize(("left", "reach"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (27, 7), (40, 7)])
def test_a_window_sends_a_shard_only_as_far_as_it_reaches(left, reach):
    layout = split("contiguous", 32, 8)  # 4 tokens a rank
    plans = schedules(Mask(32, 32, left, right=0), layout, layout)
    assert receivers(plans) == {(s, r) for s, r in product(range(8), range(8)) if 0 < r - s <= reach}
    assert num_hops(plans) == len(receivers(plans))


def test_documents_send_a_shard_only_where_one_continues():
    layout = split("contiguous", 24, 6)
    mask = Mask(24, 24, right=0, cu_seqlens=(0, 4, 8, 13, 13, 16, 24))
    # One document spans ranks 2 and 3, one ranks 4 and 5; the others end where their rank ends.
    assert receivers(schedules(mask, layout, layout)) == {(2, 3), (4, 5)}
    assert num_hops(schedules(mask, layout, layout)) == 2


@every_pass
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_last_step_sends_no_shard(name, travels, rides):
    layout = split(name, 29, 5)
    for plan in schedules(Mask(29, 29), layout, layout, travels, rides):
        assert [(step.index, len(step.send)) for step in plan.steps[:5]] == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 0)]
        # Gradients have one hop left, home.
        assert [(step.index, len(step.ride_receive)) for step in plan.steps[5:]] == [(5, 1)] * rides


def test_steps_without_anything_to_do_are_left_out():
    layout = split("contiguous", 12, 4)
    plans = schedules(Mask(12, 12, right=0), layout, layout)
    assert [[step.index for step in plan.steps] for plan in plans] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert not any(plan.steps for plan in schedules(Mask(0, 0), *[split("zigzag", 0, 4)] * 2, "queries", True))


# What the checker refuses. Three ranks of two tokens each, no mask, keys travel: rank r works on shard r - t at step
# t, every rank sends to the next, and gradients are home at step 3.
LAYOUT, ALL, CAUSAL = split("contiguous", 6, 3), Mask(6, 6), Mask(6, 6, right=0)


def changed(plans: list[Schedule], rank: int, index: int, **fields) -> list[Schedule]:
    """The schedules with another step; a field is the new value or a function of the old one."""
    (step,) = (step for step in plans[rank].steps if step.index == index)
    values = {name: new(getattr(step, name)) if callable(new) else new for name, new in fields.items()}
    steps = tuple(replace(old, **values) if old is step else old for old in plans[rank].steps)
    return [*plans[:rank], replace(plans[rank], steps=steps), *plans[rank + 1 :]]


def without_tiles_that_show_something(plans: list[Schedule]) -> list[Schedule]:
    """A tile of keys behind all queries, beside the right ones."""
    (hidden,) = tiles_between(LAYOUT.ranges(0), LAYOUT.ranges(0), ALL)
    return changed(plans, 0, 0, tiles=lambda tiles: (*tiles, replace(hidden, keys=range(4, 6), mask=CAUSAL)))


def with_the_last_tile_in_two_steps(plans: list[Schedule]) -> list[Schedule]:
    """Rank 1 leaves the second of its queries to a step in which nothing has come."""
    ((tile,),) = (step.tiles for step in plans[1].steps if step.index == 2)
    plans = changed(plans, 1, 2, tiles=(replace(tile, queries=range(1)),))
    later = Step(3, 2, (replace(tile, queries=range(1), row_start=1),))
    return [plans[0], replace(plans[1], steps=(*plans[1].steps, later)), plans[2]]


WRONG_FORWARD = {
    "a tile is missing": (ALL, "computed 0 times", lambda p: changed(p, 1, 1, tiles=())),
    "a tile is there twice": (ALL, "computed 2 times", lambda p: changed(p, 1, 1, tiles=lambda old: old * 2)),
    "a tile is of another mask": (
        CAUSAL,
        "visible False",
        lambda p: changed(p, 1, 0, tiles=tiles_between(LAYOUT.ranges(1), LAYOUT.ranges(1), ALL)),
    ),
    "a tile shows nothing": (CAUSAL, "a tile that shows nothing", without_tiles_that_show_something),
    "a whole rank is idle": (ALL, "computed 0 times", lambda p: [*p[:2], replace(p[2], steps=())]),
    "a send is missing": (ALL, "only one end knows", lambda p: changed(p, 1, 0, send=())),
    "a send goes to the wrong peer": (ALL, "only one end knows", lambda p: changed(p, 1, 0, send=(Hop(0, 1),))),
    "a send is posted twice": (ALL, "only one end knows", lambda p: changed(p, 1, 0, send=lambda old: old * 2)),
    "a shard is sent that nobody awaits": (
        ALL,
        "only one end knows",
        lambda p: changed(p, 1, 0, send=lambda old: (*old, Hop(0, 1))),
    ),
    "a shard is sent that is not there": (
        ALL,
        "which it does not hold",
        lambda p: changed(p, 1, 0, send=lambda old: (*old, Hop(0, 2))),
    ),
    "a shard is sent on a step too late": (
        ALL,
        "which it does not hold",
        lambda p: changed(p, 1, 2, send=(Hop(2, 0),)),
    ),
    "a shard is awaited from the wrong peer": (
        ALL,
        "only one end knows",
        lambda p: changed(p, 1, 0, receive=Hop(2, 0)),
    ),
    "a receive is missing": (ALL, "uses shard 0 but holds None", lambda p: changed(p, 1, 0, receive=None)),
    "both ends of a hop are missing": (
        ALL,
        "uses shard 0 but holds None",
        lambda p: changed(changed(p, 1, 0, receive=None), 0, 0, send=()),
    ),
    "a shard comes that is not used": (
        CAUSAL,
        "does not use it next",
        lambda p: changed(changed(p, 0, 0, receive=Hop(2, 2)), 2, 0, send=(Hop(0, 2),)),
    ),
    "a shard comes to a step without work": (
        CAUSAL,
        "does not use it next",
        lambda p: [
            replace(p[0], steps=(replace(p[0].steps[0], receive=Hop(2, 2)), Step(1, 2, ()))),
            p[1],
            changed(p, 2, 0, send=(Hop(0, 2),))[2],
        ],
    ),
    "a shard is used again when it has left": (ALL, "uses shard 2 but holds None", with_the_last_tile_in_two_steps),
    "a shard comes a step too early": (
        ALL,
        "does not use it next",
        lambda p: changed(p, 2, 0, receive=Hop(0, 0)),
    ),
    "a step is taken twice by all": (
        ALL,
        "one of them twice",
        lambda p: [replace(plan, steps=(replace(plan.steps[0], tiles=()), *plan.steps)) for plan in p],
    ),
    "steps are taken in another order": (
        CAUSAL,
        "in another order",
        lambda p: [p[0], replace(p[1], steps=p[1].steps[::-1]), p[2]],
    ),
    "a rank does not know who reads its shard": (ALL, "has readers", lambda p: [replace(p[0], readers=()), *p[1:]]),
    "a rank takes one more for a reader": (
        CAUSAL,
        "has readers",
        lambda p: [*p[:2], replace(p[2], readers=(0,))],
    ),
    "a result rides": (ALL, "ride where nobody waits", lambda p: changed(p, 1, 1, ride_send=Hop(2, 0))),
    "a result is awaited": (ALL, "ride where nobody waits", lambda p: changed(p, 1, 1, ride_receive=(Hop(0, 1),))),
}
WRONG_BACKWARD = {
    "a ride is not sent": ("keeps a result back", lambda p: changed(p, 1, 1, ride_send=None)),
    "a ride home is not sent": ("keeps a result back", lambda p: changed(p, 1, 2, ride_send=None)),
    "a ride home goes elsewhere": ("never sent", lambda p: changed(p, 1, 2, ride_send=Hop(0, 2))),
    "a ride skips a rank": ("never sent", lambda p: changed(p, 1, 1, ride_send=Hop(0, 0))),
    "a ride is of another shard": ("does not have", lambda p: changed(p, 1, 1, ride_send=lambda h: Hop(h.peer, 2))),
    "a ride is sent of the own shard": ("does not have", lambda p: changed(p, 1, 0, ride_send=Hop(2, 1))),
    "a ride is sent without work": ("does not have", lambda p: changed(p, 1, 3, ride_send=Hop(2, 1))),
    "nothing rides": (
        "keeps a result back",
        lambda p: [
            replace(x, steps=tuple(replace(step, ride_send=None, ride_receive=()) for step in x.steps)) for x in p
        ],
    ),
    "a ride is not awaited": ("nobody received", lambda p: changed(p, 2, 2, ride_receive=())),
    "a ride home is not awaited": ("nobody received", lambda p: changed(p, 0, 3, ride_receive=())),
    "a ride is awaited twice": ("never sent", lambda p: changed(p, 2, 2, ride_receive=lambda old: old * 2)),
    "a ride is awaited that nobody sends": ("never sent", lambda p: changed(p, 2, 1, ride_receive=(Hop(1, 1),))),
    "a ride comes to a rank without work": (
        "comes to no work",
        lambda p: changed(
            changed(changed(p, 1, 2, ride_send=Hop(0, 2)), 2, 3, ride_receive=()),
            *(0, 3),
            ride_receive=lambda old: (*old, Hop(1, 2)),
        ),
    ),
    "the last step is missing": (
        "left in flight",
        lambda p: [replace(plan, steps=tuple(step for step in plan.steps if step.index < 3)) for plan in p],
    ),
}


@pytest.mark.parametrize(("mask", "message", "spoil"), WRONG_FORWARD.values(), ids=WRONG_FORWARD)
def test_the_checker_refuses_a_forward_in_which(mask, message, spoil):
    plans = schedules(mask, LAYOUT, LAYOUT)
    check(plans, mask, LAYOUT, LAYOUT)
    with pytest.raises(ScheduleError, match=message):
        check(spoil(plans), mask, LAYOUT, LAYOUT)


@pytest.mark.parametrize(("message", "spoil"), WRONG_BACKWARD.values(), ids=WRONG_BACKWARD)
@pytest.mark.parametrize("travels", ["keys", "queries"])
def test_the_checker_refuses_a_backward_in_which(travels, message, spoil):
    plans = schedules(ALL, LAYOUT, LAYOUT, travels, rides=True)
    check(plans, ALL, LAYOUT, LAYOUT, rides=True)
    with pytest.raises(ScheduleError, match=message):
        check(spoil(plans), ALL, LAYOUT, LAYOUT, rides=True)


def sizes(mask=ALL, batch=2, num_heads=4, num_kv_heads=4, head_dim=16, **bytes_) -> Problem:
    return Problem(mask, batch, num_heads, num_kv_heads, head_dim, **bytes_)


@pytest.mark.parametrize(
    ("problem", "keys_bytes", "queries_bytes", "travels"),
    [
        # k, v, dk, dv: B*K*S * D*(2 + 2 + 4 + 4)    q, do, dq, lse, delta: B*H*T * (D*(2 + 2 + 4) + 4 + 4)
        (sizes(itemsize_bytes=2), 48 * 16 * 12, 48 * (16 * 8 + 8), "queries"),
        (sizes(itemsize_bytes=2, num_kv_heads=1), 12 * 16 * 12, 48 * (16 * 8 + 8), "keys"),
        (sizes(itemsize_bytes=4), 48 * 16 * 16, 48 * (16 * 12 + 8), "queries"),
        (sizes(itemsize_bytes=8, state_itemsize_bytes=8), 48 * 16 * 32, 48 * (16 * 24 + 16), "queries"),
        (sizes(itemsize_bytes=2, head_dim=1), 48 * 12, 48 * 16, "keys"),
        (sizes(Mask(100, 6), itemsize_bytes=2), 48 * 16 * 12, 800 * (16 * 8 + 8), "keys"),
        (sizes(Mask(6, 100), itemsize_bytes=2), 800 * 16 * 12, 48 * (16 * 8 + 8), "queries"),
        (sizes(itemsize_bytes=2, value_dim=4), 48 * (16 + 4) * 6, 48 * (16 * 6 + 4 * 2 + 8), "queries"),
    ],
    ids=["MHA bf16", "MQA bf16", "MHA f32", "MHA f64", "one dim", "many queries", "many keys", "short values"],
)
def test_in_the_backward_the_side_of_fewer_bytes_travels(problem, keys_bytes, queries_bytes, travels):
    assert backward_hop_bytes(problem, "keys") == keys_bytes
    assert backward_hop_bytes(problem, "queries") == queries_bytes
    assert travelling_side(problem, backward=True) == travels


@pytest.mark.parametrize(
    ("problem", "keys_bytes", "queries_bytes", "travels"),
    [
        # k, v: B*K*S * D*(2 + 2)                    q, acc, row_max, row_sum: B*H*T * (D*(2 + 4) + 4 + 4)
        (sizes(itemsize_bytes=2), 48 * 16 * 4, 48 * (16 * 6 + 8), "keys"),
        (sizes(Mask(6, 100), itemsize_bytes=2), 800 * 16 * 4, 48 * (16 * 6 + 8), "queries"),
        (sizes(Mask(6, 100), itemsize_bytes=2, num_kv_heads=1), 200 * 16 * 4, 48 * (16 * 6 + 8), "queries"),
        (sizes(Mask(6, 19), itemsize_bytes=2), 152 * 16 * 4, 48 * (16 * 6 + 8), "keys"),
        (sizes(Mask(0, 6), itemsize_bytes=2), 48 * 16 * 4, 0, "queries"),
        (sizes(Mask(6, 100), itemsize_bytes=2, value_dim=4), 800 * (16 + 4) * 2, 48 * (16 * 2 + 4 * 4 + 8), "queries"),
    ],
    ids=["as many", "many keys", "many keys of one head", "not twice as many bytes", "no queries", "short values"],
)
def test_in_the_forward_queries_travel_where_that_halves_the_bytes(problem, keys_bytes, queries_bytes, travels):
    assert forward_hop_bytes(problem, "keys") == keys_bytes
    assert forward_hop_bytes(problem, "queries") == queries_bytes
    assert travelling_side(problem, backward=False) == travels
