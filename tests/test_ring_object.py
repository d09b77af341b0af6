"""`ringspan.Ring`: the functions, with the place of the tokens said once."""

import copy
import dataclasses

import pytest
import torch

import ringspan
from ringspan import Ring, masks, run_local

TOKENS, DOCUMENTS = 101, (0, 40, 41, 90, 101)
PLACES = [
    {},
    dict(layout="striped"),
    dict(layout="zigzag"),
    dict(layout="zigzag", cu_seqlens=DOCUMENTS),
    dict(layout="packed", cu_seqlens=torch.tensor(DOCUMENTS)),
]


def test_a_copy_of_a_model_keeps_its_ring():
    ring = run_local(lambda group: Ring("zigzag", group), 2)[0]
    assert copy.deepcopy({"attention": ring})["attention"] is ring


def whole() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 4, TOKENS, 16, generator=generator) for _ in range(3)]


def through_functions(group, place):
    x = [x.requires_grad_() for x in whole()]
    out = ringspan.ring_attention(
        *(ringspan.shard(y, 2, group=group, **place) for y in x), group=group, causal=True, **place
    )
    out = ringspan.unshard(out, 2, group=group, **place)
    return out, *torch.autograd.grad(out.square().sum(), x), ringspan.positions(TOKENS, group=group, **place)


def through_ring(group, place):
    x, ring = [x.requires_grad_() for x in whole()], Ring(group=group, **place)
    out = ring.unshard(ring.attention(*(ring.shard(y, 2) for y in x), causal=True), 2)
    return out, *torch.autograd.grad(out.square().sum(), x), ring.positions(TOKENS)


@pytest.mark.parametrize("place", PLACES)
def test_it_does_what_the_functions_do_with_the_same_bits(place):
    for expected, found in zip(*(run_local(way, 3, place) for way in (through_functions, through_ring)), strict=True):
        assert all(map(torch.equal, expected, found))


def test_it_takes_the_other_options_of_attention():
    def work(group):
        ring = Ring("striped", group)
        shards = [ring.shard(x, 2) for x in whole()]
        options = dict(key_ranges=masks.prefix(9, TOKENS), sinks=torch.ones(4), softmax_scale=0.3, return_lse=True)
        found = ring.attention(*shards, **options)
        expected = ringspan.ring_attention(*shards, layout="striped", group=group, **options)
        return all(map(torch.equal, found, expected))

    assert run_local(work, 2) == [True, True]


@pytest.mark.parametrize("option", [dict(layout="zigzag"), dict(cu_seqlens=(0, TOKENS)), dict(group=None)])
def test_the_place_is_not_said_twice(option):
    with pytest.raises(TypeError, match=next(iter(option))):
        Ring().attention(*whole(), **option)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Ring().layout = "zigzag"


def test_without_a_group_it_is_of_the_worker_or_of_one():
    ring = Ring("zigzag")
    assert [len(x) for x in run_local(lambda _: ring.positions(TOKENS), 2)] == [51, 50]
    assert torch.equal(ring.positions(TOKENS), torch.arange(TOKENS))


def test_nonsense_is_refused_where_it_is_used():
    with pytest.raises(ringspan.ArgumentError, match="spiral"):
        Ring("spiral").shard(torch.ones(3), 0)
    with pytest.raises(ringspan.RingspanError, match="cu_seqlens"):
        Ring("packed").positions(TOKENS)
    ring, x = Ring(group="world"), whole()
    for use in (lambda: ring.shard(x[0], 2), lambda: ring.unshard(x[0], 2), lambda: ring.positions(TOKENS)):
        with pytest.raises(ringspan.ArgumentTypeError, match="group is not a group"):
            use()
    with pytest.raises(ringspan.ArgumentTypeError, match="group is not a group"):
        ring.attention(*x)


def test_a_block_that_is_given_rings_of_other_documents_is_one_graph_and_compiled_at_most_twice():
    graphs, (q, k, v) = [], whole()

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    def block(q, ring):
        return ring.attention(q * 2, k, v, causal=True)

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend=counting)
    for documents in (DOCUMENTS, (0, 1, 101), (0, 50, 60, 101), (0, 2, 3, 4, 5, 101)):
        ring = Ring("zigzag", cu_seqlens=torch.tensor(documents))
        assert torch.equal(compiled(q, ring), block(q, ring))
    torch.compiler.reset()
    assert len(graphs) <= 2


def test_what_is_compiled_for_one_ring_of_threads_serves_the_next():
    compiled = torch.compile(lambda q, ring: ring.attention(q, q, q), fullgraph=True, backend="aot_eager")
    q = torch.randn(1, 2, 12, 8)
    try:
        for _ in range(3):
            run_local(lambda group: compiled(q, Ring(group=group)), 1)
    finally:
        torch.compiler.reset()
