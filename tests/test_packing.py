"""The layout of packed documents: every token once, equal lengths, equal work, few ranks that share a document."""

import gc
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import results, run_processes

import ringspan
from ringspan import run_local
from ringspan.layout import split
from ringspan.packing import NEAR_ENOUGH, packed
from ringspan.problem import KeyRanges, Mask
from ringspan.schedule import ring as rings
from ringspan.schedule.check import check
from ringspan.schedule.ring import ring_schedule
from ringspan.tiling import meet, tiles_between

documents = st.lists(st.integers(0, 40), min_size=1, max_size=12).map(
    lambda sizes: tuple(np.cumsum([0, *sizes]).tolist())
)


def work_of(ranges, cu_seqlens):
    """Visible pairs of a causal mask, query by query."""
    starts = np.asarray(cu_seqlens)
    where = np.concatenate([np.arange(run.start, run.stop) for run in ranges] or [np.empty(0, int)])
    return int((where - starts[np.searchsorted(starts, where, side="right") - 1] + 1).sum())


def long_tailed(num_tokens, seed, typical=7.0, spread=1.4):
    """Documents of which few are long, as those of texts are."""
    random, sizes = np.random.default_rng(seed), []
    while sum(sizes) < num_tokens:
        sizes.append(min(int(random.lognormal(typical, spread)) + 1, num_tokens - sum(sizes)))
    return tuple(np.cumsum([0, *random.permutation(sizes)]).tolist())


@given(documents, st.integers(1, 7))
def test_every_token_has_one_place_and_lengths_are_those_of_the_rule(cu_seqlens, num_ranks):
    held = packed(cu_seqlens, num_ranks)
    tokens = [position for runs in held for run in runs for position in run]
    assert sorted(tokens) == list(range(cu_seqlens[-1]))
    assert [sum(map(len, runs)) for runs in held] == list(split("contiguous", cu_seqlens[-1], num_ranks).lengths)
    for runs in held:  # ascending, and none goes on where another ends
        assert all(first.stop < second.start for first, second in pairwise(runs))
    assert split("packed", cu_seqlens[-1], num_ranks, cu_seqlens).lengths == tuple(sum(map(len, x)) for x in held)


@pytest.mark.parametrize("num_ranks", [2, 5, 8, 16])
@pytest.mark.parametrize("seed", range(6))
def test_all_ranks_have_the_same_work(num_ranks, seed):
    cu_seqlens = long_tailed(60_000, seed)
    held = packed(cu_seqlens, num_ranks)
    work = [work_of(runs, cu_seqlens) for runs in held]
    # Runs of equal length may do; else only whole tokens keep it from being exact.
    allowed = NEAR_ENOUGH if all(len(runs) == 1 for runs in held) else 1.01
    assert max(work) * num_ranks / sum(work) <= allowed


def hops(layout, mask, num_ranks):
    plans = [ring_schedule(mask, layout, layout, rank) for rank in range(num_ranks)]
    return sum(len(step.send) for plan in plans for step in plan.steps)


def test_few_ranks_share_a_document():
    cu_seqlens = long_tailed(1 << 20, 1, 7.5, 1.2)
    mask = Mask(1 << 20, 1 << 20, right=0, cu_seqlens=cu_seqlens)
    layout = split("packed", 1 << 20, 64, cu_seqlens)
    assert hops(layout, mask, 64) <= 64 * 63 / 3


def test_equal_documents_stay_where_they_are():
    assert packed((0, 10, 20, 30, 40), 4) == tuple((range(10 * rank, 10 * rank + 10),) for rank in range(4))


def test_documents_of_nearly_equal_work_stay_where_they_are_too():
    """9 of 10 tokens, 10 of 9: 10 / 9.5 would be too much, but a token sees itself: 11 / 10.5."""
    cu_seqlens = (*range(0, 90, 10), *range(90, 181, 9))
    assert packed(cu_seqlens, 2) == ((range(90),), (range(90, 180),))


def test_a_document_that_goes_on_at_the_next_rank_is_work_there_too():
    """As runs of equal length rank 0 has 21 + 15 + 1 pairs, and rank 1 has 14 + 36."""
    cu_seqlens = (0, 6, 11, 16, 24)
    assert max(work_of(runs, cu_seqlens) for runs in packed(cu_seqlens, 2)) < 50


def test_a_rank_makes_the_tiles_that_it_computes_and_no_others(monkeypatch):
    """Each holds an array of its rows; what other ranks compute is known without."""
    cu_seqlens = long_tailed(3000, 0, 4.0)
    mask, layout, made = Mask(3000, 3000, right=0, cu_seqlens=cu_seqlens), split("packed", 3000, 6, cu_seqlens), []
    monkeypatch.setattr(rings, "tiles_between", lambda *args: (made.append(args[0]), tiles_between(*args))[1])
    assert ring_schedule(mask, layout, layout, 2).steps
    assert made == [layout.ranges(2)] * 6


def test_only_the_schedules_of_few_masks_with_arrays_are_kept():
    kept = []
    for length in range(1, 30):
        mask = Mask(60, 60, right=0, cu_seqlens=(0, length, 60))
        layout = split("packed", 60, 3, mask.cu_seqlens)
        kept.append(weakref.ref(ring_schedule(mask, layout, layout, 0)))
    gc.collect()
    assert sum(schedule() is not None for schedule in kept) <= 8


@given(documents, st.integers(1, 5), st.sampled_from([0, -1]), st.sampled_from([-1, 0, 5]), st.booleans())
def test_schedules_are_right(cu_seqlens, num_ranks, right, left, rides):
    total = cu_seqlens[-1]
    mask = Mask(total, total, left, right, cu_seqlens)
    layout = split("packed", total, num_ranks, cu_seqlens)
    plans = [ring_schedule(mask, layout, layout, rank, "keys", rides) for rank in range(num_ranks)]
    check(plans, mask, layout, layout, rides)
    for rank in range(num_ranks):
        for shard in range(num_ranks):
            ranges = layout.ranges(rank), layout.ranges(shard)
            tiles = tiles_between(*ranges, mask)
            assert meet(*ranges, mask) == bool(tiles)
            if max(map(len, ranges)) > 2:  # of one tile: nobody computes what lies before and after all that is seen
                for tile in tiles:
                    lo, hi = tile.intervals().arrays()
                    seeing = lo < hi
                    assert seeing[0] and seeing[-1]
                    assert tile.intervals().key_span() == (0, len(tile.keys))


@given(documents, st.integers(1, 4), st.booleans(), st.data())
def test_schedules_under_key_ranges_too_are_right(cu_seqlens, num_ranks, of_each_entry, data):
    total = cu_seqlens[-1]
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    shape = (2, total) if of_each_entry else (total,)
    first = np.sort(random.integers(0, total + 1, (*shape, 2)), -1)
    second = np.stack([first[..., 1], first[..., 1] + random.integers(0, 9, shape)], -1)
    parts = KeyRanges.of(first), KeyRanges.of(second)
    mask = Mask(total, total, right=0, cu_seqlens=cu_seqlens, key_ranges=parts)
    layout = split("packed", total, num_ranks, cu_seqlens)
    check([ring_schedule(mask, layout, layout, rank) for rank in range(num_ranks)], mask, layout, layout)


CU_SEQLENS = (0, 3, 3, 90, 101, 180, 191, 200, 203)


def whole(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, 203, 8, generator=generator, dtype=dtype) for heads in (4, 2, 2, 4)]


def ring(rank=None, options=None, transport="auto"):
    """out, dq, dk, dv of the whole sequence, on every rank."""
    place = dict(layout="packed", cu_seqlens=CU_SEQLENS)
    q, k, v, do = (ringspan.shard(x, 2, **place) for x in whole())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = ringspan.ring_attention(q, k, v, transport=transport, **place, **(options or {}))
    out.backward(do)
    return [ringspan.unshard(x.detach(), 2, **place) for x in (out, q.grad, k.grad, v.grad)]


def exact(causal):
    q, k, v, do = whole()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    document = torch.bucketize(torch.arange(203), torch.tensor(CU_SEQLENS), right=True)
    seen = document[:, None] == document
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen.tril() if causal else seen, enable_gqa=True
    )
    out.backward(do)
    return [out.detach(), q.grad, k.grad, v.grad]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_a_ring_is_exact(num_ranks, causal):
    for found in run_local(lambda group: ring(options=dict(causal=causal)), num_ranks):
        for x, expected in zip(found, exact(causal), strict=True):
            torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("transport", ["shared_memory", "torch_dist"])
def test_rings_of_processes_are_exact(transport):
    for found in results(run_processes(ring, 3, dict(causal=True), transport)):
        for x, expected in zip(found, exact(True), strict=True):
            torch.testing.assert_close(x, expected)


def test_shards_are_differentiable_in_graphs_and_back_together():
    x = torch.randn(2, 203, 3, requires_grad=True)
    place = dict(layout="packed", cu_seqlens=torch.tensor(CU_SEQLENS), rank=1, num_ranks=3)
    cut = lambda x: ringspan.shard(x, 1, **place) * ringspan.positions(203, **place)[:, None]  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(cut, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, cut(x))
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (compiled, cut(x))]
    assert torch.equal(*grads)


def test_what_it_needs_is_said():
    x = torch.zeros(1, 1, 8, 2)
    with pytest.raises(ringspan.ArgumentError, match="needs to know the documents"):
        ringspan.shard(x, 2, layout="packed", rank=0, num_ranks=2)
    with pytest.raises(ringspan.ArgumentError, match="needs to know the documents"):
        ringspan.ring_attention(x, x, x, layout="packed", causal=True)
    with pytest.raises(ringspan.ArgumentError, match="it ends at 7, there are 8 tokens"):
        ringspan.shard(x, 2, layout="packed", cu_seqlens=[0, 7], rank=0, num_ranks=2)

    def lengths(group):
        y = torch.zeros(1, 1, 4 + group.rank(), 2)
        with pytest.raises(ringspan.LayoutError, match="takes only the shard lengths of its own rule"):
            ringspan.ring_attention(y, y, y, layout="packed", cu_seqlens=[0, 9])

    run_local(lengths, 2)
    with pytest.raises(ringspan.ArgumentError, match="it ends at 9, there are 16 tokens"):
        run_local(lambda group: ringspan.unshard(x, 2, layout="packed", cu_seqlens=[0, 9]), 2)
    with pytest.raises(ringspan.DisagreementError, match="disagree on cu_seqlens"):
        run_local(lambda group: ringspan.unshard(x, 2, layout="packed", cu_seqlens=[0, 1 + group.rank(), 16]), 2)
