"""Keys that each query sees, spelled out: the masks of docs/masks.md, by their words, and rings under them."""

from itertools import product

import numpy as np
import pytest
import torch
from definition import attention, relative_error
from processes import results, run_processes
from whole import Case, check, ring

import ringspan
from ringspan import masks, run_local
from ringspan.layout import split
from ringspan.observe import steps
from ringspan.problem import KeyRanges, Mask
from ringspan.tile import Band
from ringspan.tiling import tiles_between

TOKENS, BATCH = 129, 3
LENGTHS = torch.tensor([100, 129, 5])
IMAGES = [(7, 31), (31, 33), (90, 129)]
ANSWERS = [40, 1, 58]  # after a prompt of 30


def answer_of(p: int) -> int:
    """0 is the prompt."""
    return 0 if p < 30 else 1 if p < 70 else 2 if p < 71 else 3


# By name: what is passed, and what it means for a batch entry, a query and a key.
CASES = {
    "padding": (dict(key_ranges=masks.padding(LENGTHS, TOKENS)), lambda b, p, j: j < LENGTHS[b]),
    "causal padding": (
        dict(key_ranges=masks.padding(LENGTHS, TOKENS), causal=True),
        lambda b, p, j: j <= p and j < LENGTHS[b],
    ),
    "padding on the left": (
        dict(key_ranges=masks.padding(LENGTHS, TOKENS, left=True), causal=True),
        lambda b, p, j: j <= p and j >= TOKENS - LENGTHS[b],
    ),
    "prefix": (dict(key_ranges=masks.prefix(50, TOKENS)), lambda b, p, j: j < 50 or j <= p),
    "prefix of each entry": (
        dict(key_ranges=masks.prefix(LENGTHS, TOKENS)),
        lambda b, p, j: j < LENGTHS[b] or j <= p,
    ),
    "images": (
        dict(key_ranges=masks.images_in_text(IMAGES, TOKENS)),
        lambda b, p, j: j <= p or any(first <= p < last and first <= j < last for first, last in IMAGES),
    ),
    "frames": (
        dict(key_ranges=masks.frames(10, 2, TOKENS)),
        lambda b, p, j: 0 <= p // 10 - j // 10 <= 2,
    ),
    "chunks": (
        dict(key_ranges=masks.frames(16, 0, TOKENS), causal=True),
        lambda b, p, j: j <= p and j // 16 == p // 16,
    ),
    "window and first": (
        dict(key_ranges=masks.window_and_first(20, 4, TOKENS), causal=True),
        lambda b, p, j: j <= p and (j < 4 or p - j <= 20),
    ),
    "shared prompt": (
        dict(key_ranges=masks.shared_prompt(30, ANSWERS), causal=True),
        lambda b, p, j: j <= p and answer_of(j) in (0, answer_of(p)),
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


def case_of(name: str, **fields) -> Case:
    return Case(TOKENS, 4, 2, batch=BATCH, options=CASES[name][0], **fields)


def exact_ring(case: Case, num_ranks: int) -> None:
    found = run_local(ring, num_ranks, case, timeout=60)
    check(case, found[0])
    for name, x in found[0].items():
        assert all(torch.equal(x, other[name]) for other in found[1:])


@every_case
def test_a_recipe_shows_what_its_words_say(name):
    shows = CASES[name][1]
    said = [[[bool(shows(b, p, j)) for j in range(TOKENS)] for p in range(TOKENS)] for b in range(BATCH)]
    seen = case_of(name).seen()
    assert torch.equal(seen.expand(BATCH, 1, TOKENS, TOKENS)[:, 0], torch.tensor(said))


@every_case
@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_a_ring_of_any_size_is_exact_in_every_layout(name, layout, num_ranks):
    exact_ring(case_of(name, layout=layout), num_ranks)


@every_case
@pytest.mark.parametrize("kernel", ["reference", "torch_ops"])
def test_any_kernel_serves_them(name, kernel):
    case = case_of(name, layout="zigzag")
    case.options = case.options | dict(kernel=kernel)
    exact_ring(case, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_is_exact_to_its_own_rounding(dtype):
    exact_ring(case_of("causal padding", dtype=dtype, layout="striped"), 3)


@pytest.mark.parametrize(("tokens", "keys"), [(40, 100), (100, 40), (2, 300)])
@pytest.mark.parametrize("axes", [(), (2,)])
def test_the_keys_may_be_another_sequence_of_another_length(tokens, keys, axes):
    ranges = np.sort(np.random.default_rng(0).integers(-5, keys + 6, (*axes, tokens, 2)), -1)
    for heads in (1, 4):  # few queries travel, where they are fewer bytes than keys
        exact_ring(Case(tokens, heads, 1, keys=keys, batch=2, options=dict(key_ranges=torch.from_numpy(ranges))), 3)


def test_later_queries_of_a_longer_sequence_are_its_last_ones():
    whole = Case(100, 4, 2, options=dict(causal=True))
    q, k, v, *_ = whole.tensors()
    exact, _ = attention(q, k, v, whole.seen(), whole.scale)
    for num_before in (0, 63, 99):
        ranges = masks.continued(num_before, 100 - num_before)
        (out, *_) = run_local(
            lambda group, q, ranges: whole_out(q, k, v, key_ranges=ranges), 3, q[:, :, num_before:], ranges
        )
        assert relative_error(out, exact[:, :, num_before:]) < 2e-6


def test_new_tokens_see_by_position_what_a_cache_holds_in_another_order():
    num_before, case = 91, Case(100, 4, 2, options=dict(causal=True))
    q, k, v, *_ = case.tensors()
    exact, _ = attention(q, k, v, case.seen(), case.scale)

    def work(group):
        old, new = ringspan.positions(num_before, layout="zigzag"), torch.arange(num_before, 100)
        held = torch.cat([old, new[new % 3 == group.rank()]])  # ranks take turns to keep a new token
        where = ringspan.unshard(held, 0)
        ranges = masks.from_mask(where <= new[:, None])
        q_new = ringspan.shard(q[:, :, num_before:], 2)
        return ringspan.unshard(ringspan.ring_attention(q_new, k[:, :, held], v[:, :, held], key_ranges=ranges), 2)

    assert relative_error(run_local(work, 3)[0], exact[:, :, num_before:]) < 2e-6


def over_processes(rank, case):
    return ring(None, case)


@pytest.mark.parametrize("transport", ["shared_memory", "torch_dist"])
def test_processes_are_exact_too(transport):
    case = case_of("window and first", layout="zigzag")
    case.options = case.options | dict(transport=transport)
    for found in results(run_processes(over_processes, 2, case)):
        check(case, found)


def test_with_sinks_they_are_what_they_are_with_a_key_more():
    case = case_of("frames")
    q, k, v, *_ = case.tensors()
    sinks = torch.tensor([0.5, -3.0, 6.0, -torch.inf])
    out, lse = attention(q, k, v, case.seen(), case.scale)
    expected = out * torch.sigmoid(lse - sinks.double()[:, None]).unsqueeze(-1)
    call = lambda group: ringspan.ring_attention(  # noqa: E731
        *(ringspan.shard(x, 2) for x in (q, k, v)), sinks=sinks, **case.options
    )
    assert relative_error(torch.cat(run_local(call, 3), 2), expected) < 2e-6


def shards_met(options: dict, num_ranks: int, tokens: int = 64) -> list[set]:
    """For each rank the shards that it computed with."""

    def work(group):
        q, k, v, *_ = (ringspan.shard(x, 2) for x in Case(tokens, batch=2).tensors())
        met = []
        with steps(met.append):
            ringspan.ring_attention(q, k, v, **options)
        return {shard for record in met for shard in record.computed}

    return run_local(work, num_ranks, timeout=60)


def test_shards_that_nobody_sees_are_neither_sent_nor_computed():
    """8 ranks of 8 tokens each."""
    assert shards_met(dict(key_ranges=masks.padding(torch.tensor([9, 16]), 64)), 8) == [{0, 1}] * 8
    assert shards_met(dict(key_ranges=masks.frames(16, 0, 64)), 8) == [{r - r % 2, r - r % 2 + 1} for r in range(8)]
    found = shards_met(dict(key_ranges=masks.window_and_first(8, 4, 64), causal=True), 8)
    assert found == [{0, max(r - 1, 0), r} for r in range(8)]


def test_ranges_that_show_all_are_no_mask_to_kernels():
    ranges, layout = KeyRanges.of(np.array([[-9, 99]] * 64)), split("striped", 64, 3)
    (tile,) = tiles_between(layout.ranges(0), layout.ranges(2), Mask(64, 64, key_ranges=(ranges,)))
    assert tile.intervals().band == Band()
    case = Case(64, batch=2)
    q, k, v, *_ = case.tensors()
    plain, ranged = (
        run_local(lambda group, options=options: whole_out(q, k, v, **options), 3)[0]
        for options in ({}, dict(key_ranges=torch.tensor([[-9, 99]] * 64)))
    )
    assert torch.equal(plain, ranged)


def whole_out(q, k, v, **options):
    mine = (ringspan.shard(x, 2) for x in (q, k, v))
    return ringspan.unshard(ringspan.ring_attention(*mine, **options), 2)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own use of it
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_what_is_changed_after_a_call_is_seen_by_the_next_and_refused_by_its_backward(backend):
    q, k, v, *_ = Case(20).tensors()
    q.requires_grad_()
    attend = torch.compile(lambda q, ranges: ringspan.ring_attention(q, k, v, key_ranges=ranges), backend=backend)
    ranges = torch.tensor([[0, 20]] * 20)
    out = attend(q, ranges)
    assert torch.equal(out, ringspan.ring_attention(q, k, v))
    ranges[:, 1] = 10
    assert torch.equal(attend(q, ranges), ringspan.ring_attention(q, k[:, :, :10], v[:, :, :10]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_it_is_compiled_without_a_graph_break():
    case = case_of("shared prompt")
    q, k, v, *_ = case.tensors()
    q.requires_grad_()
    ranges = case.options["key_ranges"]

    def fn(q, first, second):
        return ringspan.ring_attention(q, k, v, causal=True, key_ranges=[first, second]).square().sum()

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    expected, found = (torch.autograd.grad(call(q, *ranges), q)[0] for call in (fn, compiled))
    assert torch.equal(expected, found)
    others = [ranges[0], ranges[1].clamp(max=70)]
    assert torch.equal(compiled(q, *others), fn(q, *others)) and fn(q, *others) != fn(q, *ranges)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8, torch.uint32])
def test_any_integers_are_taken_however_far_they_reach(dtype):
    q, k, v, *_ = Case(20).tensors()
    edges = torch.iinfo(dtype)
    ranges = torch.tensor([[max(edges.min, -(2**62)), min(edges.max, 2**62)]] * 20).to(dtype)
    assert torch.equal(ringspan.ring_attention(q, k, v, key_ranges=ranges), ringspan.ring_attention(q, k, v))
    ranges = torch.tensor([[edges.max, edges.min]] * 20, dtype=dtype)
    assert not ringspan.ring_attention(q, k, v, key_ranges=ranges).any()


@pytest.mark.parametrize("start", [20, 2**31, 2**32, 2**40])
def test_ranges_that_begin_beyond_the_sequence_show_nothing(start):
    """Tiles keep their intervals in 32 bits, of which none of the larger starts has any left."""
    q, k, v, *_ = Case(20).tensors()
    assert not ringspan.ring_attention(q, k, v, key_ranges=torch.tensor([[start, 2 * start]] * 20)).any()


def test_ranges_of_no_tokens_are_legal():
    for batch, num_ranks in product((1, 2), (1, 3)):
        case = Case(0, batch=batch, options=dict(key_ranges=torch.empty(batch, 0, 2, dtype=torch.int64)))
        exact_ring(case, num_ranks)
