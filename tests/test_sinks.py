"""A score without a key for every head: exact forward and backward, and refused where it cannot be meant."""

import pytest
import torch
from definition import bound_of_lse, bound_of_out, bounds_of_gradients, relative_error, seen_by_mask
from processes import results, run_processes

import ringspan
from ringspan import execute, run_local
from ringspan.kernels.table import KERNELS
from ringspan.problem import Mask
from ringspan.state import state_dtype

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
SINKS = torch.tensor([0.5, -3.0, 6.0, -torch.inf])


def whole(tokens, dtype=torch.float32, seed=0):
    """q, k, v, do, dlse of the whole sequence."""
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    q, k, v, do = (torch.randn(2, h, tokens, HEAD_DIM, generator=generator).to(dtype) for h in heads)
    return q, k, v, do, torch.randn(2, HEADS, tokens, generator=generator)


def with_a_key(tensors, sinks, mask):
    """The same as attention of one more key: of value 0, and of one more dimension that makes its score the sink.

    A sink of -inf is a key that nobody sees, and so is a number in its place.
    """
    q, k, v, do, dlse = (x.double() for x in tensors)
    group = HEADS // KV_HEADS
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    there = ~sinks.isneginf()
    score = torch.where(there, sinks, 0.0).double() / HEAD_DIM**-0.5
    q = torch.nn.functional.pad(q, (0, 1), value=1.0)
    k = torch.nn.functional.pad(k, (0, 1, 1, 0))
    k[:, :, 0, -1] = score
    v = torch.nn.functional.pad(v, (0, 1, 1, 0))
    do = torch.nn.functional.pad(do, (0, 1))
    seen = seen_by_mask(mask)
    seen = torch.cat([there.view(1, -1, 1, 1).expand(2, -1, len(seen), 1), seen.expand(2, HEADS, -1, -1)], -1)
    return q, k, v, do, dlse, seen


def exact(tensors, sinks, mask):
    """out, lse, dq, dk, dv and the sinks' gradient in float64, by torch's autograd."""
    q, k, v, do, dlse = (x.double() for x in tensors)
    q, k, v, sinks = (x.detach().double().requires_grad_() for x in (q, k, v, sinks))
    wide_k, wide_v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = (q @ wide_k.mT * HEAD_DIM**-0.5).masked_fill(~seen_by_mask(mask), -torch.inf)
    scores = torch.cat([sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1), scores], -1)
    lse = scores.logsumexp(-1)
    out = torch.exp(scores - lse.unsqueeze(-1))[..., 1:] @ wide_v
    ((out * do).sum() + (lse * dlse).sum()).backward()
    return {"out": out.detach(), "lse": lse.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad, "dsinks": sinks.grad}


def ring(tensors, sinks, layout="contiguous", **options):
    """Run by every rank of the current group."""
    place = dict(layout=layout)
    q, k, v, do, dlse = (ringspan.shard(x, 2, **place) for x in tensors)
    q, k, v, sinks = (x.detach().clone().requires_grad_() for x in (q, k, v, sinks))
    out, lse = ringspan.ring_attention(q, k, v, sinks=sinks, layout=layout, return_lse=True, **options)
    ((out.double() * do.double()).sum() + (lse.double() * dlse.double()).sum()).backward()
    parts = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return {name: ringspan.unshard(x.detach(), 2, **place) for name, x in parts.items()} | {"dsinks": sinks.grad}


def check(found, tensors, sinks, mask, rounds_weights=False):
    """found: of every rank."""
    right = exact(tensors, sinks, mask)
    dtype = tensors[0].dtype
    q, k, v, do, dlse, seen = with_a_key(tensors, sinks, mask)
    narrow = (x.to(dtype) for x in (q, k, v))
    assert relative_error(found[0]["out"], right["out"]) <= bound_of_out(*narrow, seen, HEAD_DIM**-0.5, rounds_weights)
    assert found[0]["out"].dtype == dtype
    torch.testing.assert_close(
        found[0]["lse"].double(), right["lse"], rtol=0, atol=bound_of_lse(q.to(dtype), k.to(dtype), HEAD_DIM**-0.5)
    )
    bounds = bounds_of_gradients(*(x.to(dtype) for x in (q, k, v, do)), dlse, seen, HEAD_DIM**-0.5, rounds_weights)
    for name, bound in zip(("dq", "dk", "dv"), bounds, strict=True):
        rounding = torch.finfo(dtype).eps * float(right[name].norm())
        assert float((found[0][name].double() - right[name]).norm()) <= 2 * bound + 2 * rounding, name
    # Sums over rows of p times (do . out - dlse), out rounded: each term's rounding, as if all had one sign.
    of_terms = (do.abs()[..., :-1] * right["out"].abs()).sum(-1) + dlse.abs()
    weights = torch.exp(sinks.double().unsqueeze(-1) - right["lse"])
    bound = 8 * torch.finfo(dtype).eps * (weights * of_terms).sum((0, 2)) + 1e-12
    assert ((sum(x["dsinks"].double() for x in found) - right["dsinks"]).abs() <= bound).all()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
def test_a_ring_with_sinks_is_exact(num_ranks, layout):
    tensors = whole(129)
    found = run_local(lambda group: ring(tensors, SINKS, layout, causal=True, window_size=(40, 0)), num_ranks)
    check(found, tensors, SINKS, Mask(129, 129, 40, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_is_exact_to_its_own_rounding(dtype):
    tensors, sinks = whole(63, dtype), SINKS.to(state_dtype(dtype))
    found = run_local(lambda group: ring(tensors, sinks, "zigzag", causal=True), 3)
    check(found, tensors, sinks, Mask(63, 63, right=0))


@pytest.mark.parametrize("kernel", ["reference", "torch_ops", "native"])
def test_any_kernel_serves_them(kernel):
    reason = next(x for x in KERNELS if x.name == kernel).declines(torch.float32, torch.device("cpu"), HEAD_DIM)
    if reason is not None:
        pytest.skip(reason)
    tensors = whole(70)
    check([ring(tensors, SINKS, kernel=kernel)], tensors, SINKS, Mask(70, 70))


def test_where_only_sinks_are_learned_the_ring_does_not_turn_again(monkeypatch):
    monkeypatch.setattr(execute, "backward", None)  # what ran it would fail
    tensors = whole(20)

    def work(group):
        q, k, v, do, dlse = (ringspan.shard(x, 2) for x in tensors)
        sinks = SINKS.clone().requires_grad_()
        out, lse = ringspan.ring_attention(q, k, v, sinks=sinks, return_lse=True)
        ((out * do).sum() + (lse * dlse).sum()).backward()
        return sinks.grad

    found = sum(x.double() for x in run_local(work, 3))
    torch.testing.assert_close(found, exact(tensors, SINKS, Mask(20, 20))["dsinks"], rtol=1e-5, atol=1e-5)


def test_gradcheck_of_torch_passes():
    q, k, v, *_ = (x[..., :3].detach().requires_grad_() for x in whole(5, torch.float64))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    fn = lambda q, k, v, sinks: ringspan.ring_attention(q, k, v, sinks=sinks, causal=True, return_lse=True)  # noqa: E731
    assert torch.autograd.gradcheck(fn, (q, k, v, sinks))


def test_a_second_derivative_of_sinks_is_right():
    q, k, v, *_ = (x[..., :3].detach().requires_grad_() for x in whole(5, torch.float64))
    sinks = torch.tensor([0.5, -1.0, 2.0, -torch.inf], dtype=torch.float64, requires_grad=True)

    def first(sinks, attend):
        return torch.autograd.grad(attend(sinks).square().sum(), sinks, create_graph=True)[0][:3]

    def plain(sinks):
        wide = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        keys, values = wide
        scores = torch.cat([sinks.view(1, -1, 1, 1).expand(2, -1, 5, 1), q @ keys.mT * 3**-0.5], -1)
        return scores.softmax(-1)[..., 1:] @ values

    found, expected = (
        torch.autograd.grad(first(sinks, attend).square().sum(), sinks)[0][:3]
        for attend in (lambda sinks: ringspan.ring_attention(q, k, v, sinks=sinks), plain)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_sinks_far_from_all_scores_overflow_nothing(size):
    tensors = whole(33)
    sinks = torch.full((HEADS,), size)
    found = ring(tensors, sinks)
    check([found], tensors, sinks, Mask(33, 33))
    assert bool((found["out"] == 0).all()) is (size > 0)


def test_no_sink_is_a_sink_of_minus_infinity():
    q, k, v, *_ = whole(40)
    out, lse = ringspan.ring_attention(q, k, v, return_lse=True)
    same, same_lse = ringspan.ring_attention(q, k, v, sinks=torch.full((HEADS,), -torch.inf), return_lse=True)
    assert torch.equal(out, same) and torch.equal(lse, same_lse)


def test_a_query_that_sees_no_key_has_out_0_and_its_sink_as_lse():
    q, k, v, *_ = whole(4)
    sinks = SINKS.clone().requires_grad_()
    out, lse = ringspan.ring_attention(q, k[:, :, :0], v[:, :, :0], sinks=sinks, return_lse=True)
    assert not out.any() and torch.equal(lse, SINKS.view(1, -1, 1).expand_as(lse))
    (torch.where(lse.isinf(), 0.0, lse).sum() + out.sum()).backward()
    assert torch.equal(sinks.grad, torch.tensor([8.0, 8.0, 8.0, 0.0]))  # 2 batch entries x 4 rows; none where -inf


def compiled(rank):
    tensors = whole(24, seed=rank)[:3]
    sinks = torch.zeros(HEADS).requires_grad_()

    def fn(q, k, v, sinks):
        return ringspan.ring_attention(q, k, v, sinks=sinks * 2, causal=True).square().sum()

    plain = fn(*tensors, sinks)
    (expected,) = torch.autograd.grad(plain, sinks)
    found = torch.compile(fn, fullgraph=True, backend="aot_eager")(*tensors, sinks)
    (grad,) = torch.autograd.grad(found, sinks)
    return torch.equal(found, plain) and torch.equal(grad, expected) and bool(grad.any())


def test_compiled_without_a_graph_break_they_have_the_same_bits():
    assert results(run_processes(compiled, 2)) == [True, True]


@pytest.mark.parametrize(
    ("sinks", "error", "told"),
    [
        ([0.0] * HEADS, ringspan.ArgumentTypeError, "list"),
        (torch.zeros(HEADS, dtype=torch.int64), ringspan.ArgumentTypeError, "torch.int64"),
        (torch.zeros(HEADS).to_sparse(), ringspan.ArgumentTypeError, "torch.sparse_coo"),
        (torch.zeros(KV_HEADS), ringspan.ArgumentError, r"shape \[2\], q has 4 heads"),
        (torch.zeros(HEADS, 1), ringspan.ArgumentError, r"shape \[4, 1\]"),
        (torch.zeros(HEADS, device="meta"), ringspan.ArgumentTypeError, "share one device"),
    ],
)
def test_what_cannot_be_meant_is_refused_on_every_rank(sinks, error, told):
    def work(group):
        mine = sinks if group.rank() == 1 else torch.zeros(HEADS)
        with pytest.raises(error if group.rank() == 1 else ringspan.PeerRefusedError, match=told):
            ringspan.ring_attention(*whole(8)[:3], sinks=mine)
        return True

    assert run_local(work, 2) == [True, True]


def test_ranks_that_disagree_on_sinks_are_told():
    def presence(group):
        with pytest.raises(ringspan.DisagreementError, match="whether there are sinks"):
            ringspan.ring_attention(*whole(8)[:3], sinks=SINKS if group.rank() else None)

    def gradients(group):
        sinks = SINKS.clone().requires_grad_(group.rank() == 0)
        with pytest.raises(ringspan.DisagreementError, match="require grad"):
            ringspan.ring_attention(*whole(8)[:3], sinks=sinks)

    run_local(presence, 2)
    run_local(gradients, 2)


def test_queries_that_travel_to_the_keys_meet_their_sink_once():
    q, k, v, *_ = whole(300)
    q = q[:, :, :5]
    alone = ringspan.ring_attention(q, k, v, sinks=SINKS, return_lse=True)

    def work(group):
        mine = (ringspan.shard(x, 2) for x in (q, k, v))
        found = ringspan.ring_attention(*mine, sinks=SINKS, return_lse=True)
        return [ringspan.unshard(x, 2) for x in found]

    for found, expected in zip(run_local(work, 3)[0], alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_where_sinks_alone_require_grad_the_backward_of_a_rank_is_its_own_affair():
    """No rank talks to another then, and so a rank that autograd refuses has nobody to tell of it."""

    def work(group):
        q, k, v, *_ = whole(8)
        sinks = SINKS.clone().requires_grad_()
        out = ringspan.ring_attention(q, k, v, sinks=sinks)
        if group.rank() == 1:
            q.zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()
        # The next call of this rank is the next call of the others too.
        return ringspan.ring_attention(*whole(8)[:3], sinks=SINKS).shape

    assert run_local(work, 2, timeout=20) == [(2, HEADS, 8, HEAD_DIM)] * 2


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_sinks_may_have_a_dtype_of_their_own(kind):
    tensors = whole(20)
    found = ring(tensors, SINKS.to(kind))
    expected = ring(tensors, SINKS)
    assert found["lse"].dtype == torch.float32 and found["dsinks"].dtype == kind
    torch.testing.assert_close(found.pop("dsinks"), expected.pop("dsinks").to(kind), rtol=2**-7, atol=1e-6)
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_a_gradient_of_sinks_is_summed_in_float32_of_inputs_of_16_bits():
    """It has the rounding of out alone: of what is known of out and lse here, it is made to float32's digits."""
    q, k, v, do, _ = whole(200, torch.bfloat16)
    sinks = SINKS.clone().requires_grad_()
    out, lse = ringspan.ring_attention(q, k, v, sinks=sinks, return_lse=True)
    out.backward(do)
    terms = torch.exp(sinks.double().unsqueeze(-1) - lse) * (do.double() * out.double()).sum(-1)
    bound = 1e-5 * terms.abs().sum((0, 2))
    assert ((sinks.grad + terms.sum((0, 2))).abs() <= bound).all()
