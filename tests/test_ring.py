"""Rings of threads against float64 attention over the whole sequence: every layout, mask, and number of ranks."""

import threading

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from definition import OUT_BOUNDS, attention, bound_of_lse, bound_of_out, relative_error
from hypothesis import given
from whole import Case, check, ring

import ringspan
from ringspan import reshard, run_local
from ringspan.observe import steps

LAYOUTS = ("contiguous", "striped", "zigzag")


def masks(tokens):
    third = tokens // 3
    return {
        "none": {},
        "causal": dict(causal=True),
        "window": dict(window_size=(7, 3)),
        "causal window": dict(causal=True, window_size=(20, 99)),
        "self only": dict(window_size=(0, 0)),
        "documents": dict(cu_seqlens=[0, third, third, tokens]),
        "causal documents": dict(causal=True, cu_seqlens=[0, third, tokens - third, tokens]),
        "key ranges": dict(key_ranges=torch.arange(2 * tokens).view(tokens, 2) * 41 % (tokens + 20) - 10),
    }


def assert_ring_is_exact(case, num_ranks):
    found = run_local(ring, num_ranks, case, timeout=60)
    check(case, found[0])
    for name, x in found[0].items():
        for other in found[1:]:
            assert torch.equal(x, other[name])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", masks(3))
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7, 8])
def test_a_ring_of_any_size_is_exact_under_every_mask_and_layout(num_ranks, mask, layout):
    tokens = 129
    assert_ring_is_exact(Case(tokens, 4, 2, layout=layout, options=masks(tokens)[mask]), num_ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 63, 257])
def test_a_length_that_divides_by_nothing_is_exact(tokens, layout):
    for num_ranks in (2, 7):
        assert_ring_is_exact(Case(tokens, layout=layout, options=dict(causal=True)), num_ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ring_of_64_workers_is_exact(layout):
    assert_ring_is_exact(Case(300, layout=layout, options=dict(causal=True)), 64)


@pytest.mark.parametrize("dtype", OUT_BOUNDS)
@pytest.mark.parametrize("causal", [False, True])
def test_every_dtype_is_exact_to_its_own_rounding(dtype, causal):
    case = Case(200, 4, 1, 32, dtype=dtype, layout="zigzag", options=dict(causal=causal))
    assert_ring_is_exact(case, 4)


@pytest.mark.parametrize("dtype", OUT_BOUNDS)
def test_the_error_does_not_grow_with_the_number_of_workers(dtype):
    def error(num_ranks):
        case = Case(512, 1, 1, 16, dtype=dtype, options=dict(causal=True), layout="striped")
        q, k, v, *_ = case.tensors()
        exact, _ = attention(q, k, v, case.seen(), case.scale)
        return relative_error(run_local(ring, num_ranks, case)[0]["out"], exact)

    alone = error(1)
    for num_ranks in (2, 8, 64):
        assert error(num_ranks) <= max(2 * alone, OUT_BOUNDS[dtype] / 4)


@pytest.mark.parametrize(("tokens", "keys"), [(40, 100), (100, 40), (3, 64), (64, 3), (5, 0)])
def test_cross_attention_of_unequal_lengths_is_exact(tokens, keys):
    assert_ring_is_exact(Case(tokens, 4, 2, keys=keys), 3)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads_are_exact_whichever_side_travels_in_the_backward(kv_heads, causal):
    assert_ring_is_exact(Case(150, 8, kv_heads, layout="zigzag", options=dict(causal=causal)), 3)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(24, 16), (5, 33)])
@pytest.mark.parametrize("kv_heads", [1, 8])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_values_may_have_a_head_dim_of_their_own(num_ranks, kv_heads, head_dim, value_dim):
    for layout, options in (("zigzag", dict(causal=True)), ("contiguous", {})):
        case = Case(100, 8, kv_heads, head_dim, value_dim=value_dim, layout=layout, options=options)
        assert_ring_is_exact(case, num_ranks)
    assert_ring_is_exact(Case(3, 8, kv_heads, head_dim, value_dim=value_dim, keys=200), num_ranks)  # queries travel


def test_unequal_contiguous_shards_of_any_lengths_are_exact():
    case = Case(100, options=dict(causal=True, window_size=(30, 0)))
    q, k, v, *_ = case.tensors()
    exact, _ = attention(q, k, v, case.seen(), case.scale)

    def work(group, lengths):
        start = sum(lengths[: group.rank()])
        mine = slice(start, start + lengths[group.rank()])
        return ringspan.ring_attention(q[:, :, mine], k[:, :, mine], v[:, :, mine], **case.options)

    for lengths in ((100, 0, 0), (0, 1, 99), (13, 0, 87), (50, 49, 1)):
        out = torch.cat(run_local(work, 3, lengths), 2)
        assert relative_error(out, exact) < OUT_BOUNDS[torch.float32]


@given(st.data())
def test_random_problems_are_exact(data):
    tokens = data.draw(st.integers(1, 90))
    group = data.draw(st.sampled_from([1, 2, 3]))
    kv_heads = data.draw(st.sampled_from([1, 2]))
    options = {"causal": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        sides = st.integers(-1, tokens)
        options["window_size"] = (data.draw(sides), data.draw(sides))
    if data.draw(st.booleans()):
        cuts = data.draw(st.lists(st.integers(0, tokens), max_size=6))
        options["cu_seqlens"] = [0, *sorted(cuts), tokens]
    if data.draw(st.booleans()):
        options["softmax_scale"] = data.draw(st.floats(-1, 1, width=32))
    case = Case(
        tokens,
        group * kv_heads,
        kv_heads,
        data.draw(st.sampled_from([1, 3, 16, 33])),
        data.draw(st.sampled_from([1, 2])),
        layout=data.draw(st.sampled_from((*LAYOUTS, "packed") if "cu_seqlens" in options else LAYOUTS)),
        value_dim=data.draw(st.sampled_from([None, 2, 20])),
        options=options,
        seed=data.draw(st.integers(0, 99)),
    )
    assert_ring_is_exact(case, data.draw(st.integers(1, 5)))


@given(st.data())
def test_random_cross_attention_is_exact_whichever_side_travels(data):
    group, kv_heads = data.draw(st.sampled_from([(1, 1), (1, 2), (3, 1)]))
    case = Case(
        data.draw(st.integers(0, 40)),
        group * kv_heads,
        kv_heads,
        data.draw(st.sampled_from([16, 33])),  # one number alone may cancel to any error of its own size
        data.draw(st.sampled_from([1, 2])),
        keys=data.draw(st.integers(0, 200)),
        options={"softmax_scale": data.draw(st.floats(-1, 1, width=32))},
        seed=data.draw(st.integers(0, 99)),
    )
    assert_ring_is_exact(case, data.draw(st.integers(1, 5)))


def test_two_runs_of_one_call_give_the_same_bits():
    for layout in LAYOUTS:
        case = Case(130, 4, 2, dtype=torch.bfloat16, layout=layout, options=dict(causal=True))
        first, second = (run_local(ring, 4, case)[0] for _ in range(2))
        for name, x in first.items():
            assert torch.equal(x, second[name])


def test_any_strides_of_the_inputs_give_the_same_bits():
    q, k, v, *_ = Case(60, 4, 2).tensors()

    def work(group, flip):
        mine = [ringspan.shard(x, 2) for x in (q, k, v)]
        if flip == "all" or (flip == "one rank" and group.rank() == 1):
            mine = [x.mT.contiguous().mT for x in mine]
        elif flip == "tokens before heads":
            mine = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in mine]
        return ringspan.ring_attention(*mine, causal=True)

    plain = run_local(work, 3, "none")
    for flip in ("all", "one rank", "tokens before heads"):
        for mine, expected in zip(run_local(work, 3, flip), plain, strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["q", "k", "v", "do"])
def test_what_is_not_finite_reaches_only_those_that_see_it(which, bad):
    case = Case(48, 1, 1, 4, layout="zigzag", options=dict(causal=True, cu_seqlens=[0, 17, 48]))
    names = ("q", "k", "v", "do")
    tensors = dict(zip(names, case.tensors()[:4], strict=True))
    place = 25  # in the second document
    tensors[which][0, 0, place, 1] = bad
    seen = case.seen()
    row_bad = seen[:, place].clone() if which in "kv" else torch.arange(48) == place
    key_bad = seen[row_bad].any(0)

    def work(group):
        q, k, v, do = (ringspan.shard(tensors[name], 2, layout="zigzag") for name in names)
        for x in (q, k, v):
            x.requires_grad_()
        out, lse = ringspan.ring_attention(q, k, v, layout="zigzag", return_lse=True, **case.options)
        out.backward(do)
        return [
            ringspan.unshard(x.detach(), 2, layout="zigzag")[0, 0]
            for x in (out, lse[..., None], q.grad, k.grad, v.grad)
        ]

    out, lse, dq, dk, dv = (~x.isfinite().all(-1) for x in run_local(work, 3)[0])
    for name, found, allowed in (
        ("out", out, row_bad),
        ("lse", lse, row_bad),
        ("dq", dq, row_bad),
        ("dk", dk, key_bad),
        ("dv", dv, key_bad),
    ):
        assert not (found & ~allowed).any(), f"{name} is not finite where nothing bad is seen"
    hit = {"q": out, "k": out, "v": out, "do": dq}[which]
    assert hit[row_bad].any()
    if bad != bad:
        assert hit[row_bad].all()


def test_a_query_that_sees_no_key_has_out_0_and_lse_minus_infinity():
    def work(group):
        q, k, v = torch.randn(3, 1, 2, 4, 8, requires_grad=True).unbind(0)
        out, lse = ringspan.ring_attention(q, k[:, :, :0], v[:, :, :0], return_lse=True)
        out.sum().backward()
        assert not out.any() and lse.isneginf().all()

    run_local(work, 3)


def test_agreement_can_be_switched_off_where_all_lengths_are_equal():
    case = Case(96, layout="striped", options=dict(causal=True, agreement=False))
    assert_ring_is_exact(case, 4)


def test_without_a_group_a_call_is_a_ring_of_one():
    q, k, v = torch.randn(3, 1, 2, 33, 8).unbind(0)
    out = ringspan.ring_attention(q, k, v, causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [0, 1, 10, 37])
def test_unshard_undoes_shard_and_positions_name_the_tokens(tokens, layout):
    full = torch.arange(2 * tokens * 3).view(2, tokens, 3)

    def work(group):
        mine = ringspan.shard(full, 1, layout=layout)
        assert torch.equal(mine, full[:, ringspan.positions(tokens, layout=layout)])
        return ringspan.unshard(mine, 1, layout=layout)

    for num_ranks in (1, 2, 5):
        for found in run_local(work, num_ranks):
            assert torch.equal(found, full)


def test_shard_and_unshard_differentiate_the_sum_of_all_ranks_losses():
    def work(group):
        x = torch.arange(10.0, requires_grad=True)
        mine = ringspan.shard(x, 0, layout="zigzag")
        whole = ringspan.unshard(mine, 0, layout="zigzag")
        (whole * (group.rank() + 1)).sum().backward()
        return x.grad

    # Every rank's loss holds every token: 1 + 2 + 3 for each, and each rank's x feeds its own shard only.
    assert torch.equal(torch.stack(run_local(work, 3)).sum(0), torch.full((10,), 6.0))


def test_without_agreement_ranks_may_still_hold_their_tensors_in_any_layout_of_memory():
    q, k, v, *_ = Case(30).tensors()

    def work(group, agreement):
        mine = [ringspan.shard(x, 2) for x in (q, k, v)]
        if group.rank() == 1:
            mine[1] = mine[1].mT.contiguous().mT
        return ringspan.ring_attention(*mine, agreement=agreement)

    for mine, expected in zip(run_local(work, 3, False), run_local(work, 3, True), strict=True):
        assert torch.equal(mine, expected)


def test_ranks_that_differ_in_what_unshard_differentiates_are_told():
    def work(group):
        with pytest.raises(ringspan.DisagreementError, match="requires_grad"):
            ringspan.unshard(torch.zeros(3, requires_grad=group.rank() == 0), 0)

    run_local(work, 2, timeout=30)


@pytest.mark.parametrize(
    ("other", "dim", "layout", "words"),
    [
        (torch.zeros(4, 4), 0, "zigzag", "disagree on layout"),
        (torch.zeros(4, 4), 1, "contiguous", "disagree on dim"),
        (torch.zeros(4, 4).double(), 0, "contiguous", "disagree on dtype"),
        (torch.zeros(4, 5), 0, "contiguous", "disagree on shape"),
    ],
)
def test_ranks_that_unshard_what_does_not_belong_together_are_told(other, dim, layout, words):
    def work(group):
        x, place = (other, (dim, layout)) if group.rank() else (torch.zeros(4, 4), (0, "contiguous"))
        with pytest.raises(ringspan.DisagreementError, match=words):
            ringspan.unshard(x, place[0], layout=place[1])

    run_local(work, 2, timeout=30)


@pytest.mark.parametrize(
    ("layout", "words"), [("spiral", "layout is unknown"), ("packed", "needs to know the documents")]
)
def test_a_layout_that_nobody_can_unshard_is_refused_and_all_can_go_on(layout, words):
    def work(group):
        x = torch.full((2,), float(group.rank()))
        with pytest.raises(ringspan.ArgumentError, match=words):
            ringspan.unshard(x, 0, layout=layout)
        return ringspan.unshard(x, 0).tolist()

    assert run_local(work, 2, timeout=30) == [[0, 0, 1, 1]] * 2


@pytest.mark.parametrize("name", ["causal", "window_size", "return_lse", "agreement", "kernel"])
def test_a_tensor_in_the_place_of_something_else_is_not_shown_whole(name):
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ringspan.ArgumentTypeError, match=f"{name} must be") as told:
        ringspan.ring_attention(q, q, q, **{name: torch.randn(30, 30)})
    assert len(str(told.value)) < 300


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (dict(layout="striped"), "only the shard lengths of its own rule"),
        (dict(layout="zigzag"), "only the shard lengths of its own rule"),
        (dict(cu_seqlens=(0, 6)), "cu_seqlens must end at the number of tokens"),
    ],
)
def test_lengths_that_a_layout_does_not_have_are_refused_by_unshard_and_all_can_go_on(place, words):
    def work(group):
        x = torch.full((1 + 3 * group.rank(),), float(group.rank()))
        with pytest.raises(ringspan.ArgumentError, match=words):
            ringspan.unshard(x, 0, **place)
        return ringspan.unshard(x, 0).tolist()

    assert run_local(work, 2, timeout=30) == [[0, 1, 1, 1, 1]] * 2


def test_gradients_of_unshard_are_summed_in_float32():
    """Each of the small ones alone is lost beside 1 in bfloat16; together they are its next number."""

    def work(group):
        x = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
        full = ringspan.unshard(x, 0)
        full.backward(torch.full_like(full, 2**-9 if group.rank() else 1.0))
        return x.grad

    assert torch.cat(run_local(work, 5)).tolist() == [1 + 2**-7] * 5


def test_a_shard_may_be_overwritten_as_soon_as_unshard_returns(monkeypatch):
    put, overwritten = reshard._put, threading.Event()

    def late(full, *args):
        if threading.current_thread().name.endswith("-2"):
            overwritten.wait(timeout=0.3)  # which must not happen while this rank reads
        put(full, *args)

    monkeypatch.setattr(reshard, "_put", late)

    def work(group):
        x = torch.full((2,), float(group.rank()))
        full = ringspan.unshard(x, 0)
        x.fill_(float("nan"))
        overwritten.set()
        return full.tolist()

    assert run_local(work, 3) == [[0, 0, 1, 1, 2, 2]] * 3


def test_a_second_derivative_of_unshard_is_refused():
    x = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad(ringspan.unshard(x, 0).square().sum(), x, create_graph=True)
    with pytest.raises(ringspan.UnsupportedError, match="differentiable once"):
        grad.sum().backward()
    full = ringspan.unshard(x, 0)
    (grad,) = torch.autograd.grad(full.pow(3).sum() + x.square().sum(), x, create_graph=True)
    with pytest.raises(ringspan.UnsupportedError, match="differentiable once"):
        torch.autograd.grad(grad.sum(), x)


def test_complex_tensors_are_unsharded_and_differentiated():
    def work(group):
        x = torch.full((2,), complex(group.rank(), 1), requires_grad=True)
        full = ringspan.unshard(x, 0)
        full.backward(torch.full_like(full, 1j * (1 + group.rank())))
        return full.tolist(), x.grad.tolist()

    assert run_local(work, 2) == [([1j, 1j, 1 + 1j, 1 + 1j], [3j, 3j])] * 2


def test_documents_may_be_a_list_whatever_the_default_device_is():
    q, k, v = torch.randn(3, 1, 2, 12, 8).unbind(0)
    expected = ringspan.ring_attention(q, k, v, cu_seqlens=[0, 5, 12])
    with torch.device("meta"):
        assert torch.equal(ringspan.ring_attention(q, k, v, cu_seqlens=[0, 5, 12]), expected)
        assert torch.equal(ringspan.shard(q, 2, cu_seqlens=[0, 5, 12]), q)


def test_a_window_may_be_an_array():
    q, k, v = torch.randn(3, 1, 2, 12, 8).unbind(0)
    expected = ringspan.ring_attention(q, k, v, window_size=(3, 1))
    assert torch.equal(ringspan.ring_attention(q, k, v, window_size=np.array([3, 1])), expected)


@pytest.mark.parametrize("dtype", OUT_BOUNDS)
@pytest.mark.parametrize("holder", [0, 2])
def test_few_queries_travel_to_the_keys_and_are_exact(dtype, holder):
    """As in decoding: one rank has a query, all have keys. No key leaves its rank, and one rounding ends it all."""
    case = Case(1, 4, 2, 32, keys=1000, dtype=dtype)
    q, k, v, *_ = case.tensors()
    exact, _ = attention(q, k, v, case.seen(), case.scale)

    def work(group):
        mine = slice(0, int(group.rank() == holder))
        keys = (ringspan.shard(x, 2) for x in (k, v))
        with steps(lambda record: seen.append(record.step)):
            return ringspan.ring_attention(q[:, :, mine], *keys)

    seen = []
    out = run_local(work, 4)[holder]
    assert relative_error(out, exact) <= bound_of_out(q, k, v, case.seen(), case.scale)
    assert {step.shard for step in seen if step.tiles} == {holder}, "every rank computes with the one query"


def test_few_queries_whose_scores_are_all_far_below_0_are_exact():
    """e to the power of them is 0 in float32: a state that begins on another rank must not begin at a score of 0."""
    case = Case(2, 4, 2, keys=300)
    q, k, v, *_ = case.tensors()
    q[..., 0], k[..., 0] = 1, -300 / case.scale
    exact, exact_lse = attention(q, k, v, case.seen(), case.scale)

    def work(group):
        mine = (ringspan.shard(x, 2) for x in (q, k, v))
        return [ringspan.unshard(x, 2) for x in ringspan.ring_attention(*mine, return_lse=True)]

    out, lse = run_local(work, 3)[0]
    assert relative_error(out, exact) <= bound_of_out(q, k, v, case.seen(), case.scale)
    assert (lse - exact_lse).abs().max() <= bound_of_lse(q, k, case.scale)
