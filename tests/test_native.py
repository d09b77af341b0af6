import math
import os
import subprocess
import sys
import threading
from itertools import pairwise

import pytest
import torch
from definition import attention, gradients_given, relative_error, seen_by_intervals
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringspan import _native
from ringspan.tile import RowIntervals

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
thorough = settings(
    max_examples=int(os.environ.get("RINGSPAN_EXAMPLES", "40")), deadline=None, suppress_health_check=list(HealthCheck)
)


def stored(x, storage):
    """x with the same values, laid out differently in memory."""
    if storage == "transposed":
        return x.mT.contiguous().mT
    if storage == "stepped":
        wide = torch.full((*x.shape[:2], 2 * x.shape[2] + 1, 3 * x.shape[3] + 2), math.nan, dtype=x.dtype)
        view = wide[:, :, 1 : 2 * x.shape[2] + 1 : 2, 1 : 3 * x.shape[3] + 1 : 3]
        view.copy_(x)
        return view
    if storage == "token first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x


def empty_state(batch, heads, length, dim):
    """The identity, as rows of larger tensors that hold NaN elsewhere."""
    acc = torch.full((batch, heads, length + 3, dim + 5), math.nan)[:, :, 1 : length + 1, 2 : dim + 2]
    row_max = torch.full((batch, heads, 2 * length + 1), math.nan)[:, :, : 2 * length : 2]
    row_sum = torch.full((batch, length, heads), math.nan).mT
    return acc.zero_(), row_max.fill_(-math.inf), row_sum.zero_()


def finalize(acc, row_max, row_sum):
    seen = (row_sum != 0)[..., None]
    return torch.where(seen, acc / row_sum[..., None], 0.0), row_max + row_sum.log()


class Tile:
    rounds_weights = False

    def __init__(self, q, k, v, dout, scale, mask, visible):
        self.q, self.k, self.v, self.dout, self.scale, self.mask, self.visible = q, k, v, dout, scale, mask, visible

    def __repr__(self):
        q, k = (f"{list(x.shape)} {x.stride()}" for x in (self.q, self.k))
        return f"Tile(q {q}, k {k}, {self.q.dtype}, scale {self.scale}, {self.mask})"

    def forward(self, num_threads=1):
        state = empty_state(*self.q.shape)
        options = {"num_threads": num_threads, "rounds_weights": self.rounds_weights}
        _native.absorb(*state, self.q, self.k, self.v, scale=self.scale, **options, **self.mask)
        return state

    def backward(self, lse, delta, num_threads=1):
        grads = [torch.zeros(x.shape) for x in (self.q, self.k, self.v)]
        _native.absorb_gradient(
            *grads,
            self.q,
            self.k,
            self.v,
            self.dout,
            lse,
            delta,
            scale=self.scale,
            num_threads=num_threads,
            rounds_weights=self.rounds_weights,
            **self.mask,
        )
        return grads


def full_tile(batch, heads, kv_heads, queries, keys, dim, dtype=torch.float32, seed=0, spread=1.0, **mask):
    g = torch.Generator().manual_seed(seed)
    q, dout = (torch.randn(batch, heads, queries, dim, generator=g).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, kv_heads, keys, dim, generator=g).to(dtype) for _ in range(2))
    i = torch.arange(queries)
    lo, hi = mask.get("lo"), mask.get("hi")
    if lo is None:
        lo = i + mask["lower"] if mask.get("lower") is not None else torch.zeros_like(i)
        hi = i + mask["upper"] if mask.get("upper") is not None else torch.full_like(i, keys)
    visible = seen_by_intervals(RowIntervals(queries, keys, None, lo.numpy(), hi.numpy())).expand(
        batch, heads, queries, keys
    )
    return Tile((q * spread).to(dtype), k, v, dout, max(dim, 1) ** -0.5, mask, visible)


@st.composite
def tiles(draw, max_length=330, max_dim=256):
    batch, group, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    queries, keys = draw(st.integers(1, max_length)), draw(st.integers(1, max_length))
    dim = draw(st.one_of(st.sampled_from([1, 16, 64, 80, 128]), st.integers(1, max_dim)))
    shape = (batch, group * kv_heads, queries)
    kind = draw(st.sampled_from(["full", "band", "row intervals", "intervals of every head"]))
    edge = st.one_of(st.none(), st.integers(-keys - 5, keys + 5), st.sampled_from([0, 1, 10**30, -(10**30)]))
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    if kind == "full":
        mask = {}
    elif kind == "band":
        mask = {"lower": draw(edge), "upper": draw(edge)}
    else:
        size = shape if kind == "intervals of every head" else shape[2:]
        ends = torch.randint(-20, keys + 20, (2, *size), generator=g, dtype=torch.int32)
        if draw(st.booleans()):
            ends = ends.sort(0).values
        mask = {"lo": ends[0], "hi": ends[1]}
    far = {name: max(-(10**6), min(10**6, x)) if isinstance(x, int) else x for name, x in mask.items()}
    tile = full_tile(
        batch,
        group * kv_heads,
        kv_heads,
        queries,
        keys,
        dim,
        draw(st.sampled_from(DTYPES)),
        seed,
        draw(st.sampled_from([0.0, 1.0, 5.0, 40.0])),
        **far,
    )
    tile.mask = mask
    if tile.visible.shape[:3] != shape:
        tile.visible = tile.visible.expand(*shape, keys)
    storages = st.sampled_from(["plain", "transposed", "stepped", "token first"])
    for name in ("q", "k", "v", "dout"):
        setattr(tile, name, stored(getattr(tile, name), draw(storages)))
    tile.scale *= draw(st.sampled_from([1.0, -0.5]))
    return tile


def plain_float32(tile):
    """Attention as anyone writes it, in float32, and its gradients."""
    heads = tile.q.shape[1]
    leaves = [x.float().clone().requires_grad_() for x in (tile.q, tile.k, tile.v)]
    q, k, v = leaves
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = (tile.scale * (q @ k.mT)).masked_fill(~tile.visible, -math.inf)
    out = torch.softmax(scores, -1).nan_to_num(0.0) @ v
    grads = torch.autograd.grad(out, leaves, tile.dout.float())
    return out.detach(), [g.nan_to_num(0.0) for g in grads]


def largest_score(tile):
    k = tile.k.double().repeat_interleave(tile.q.shape[1] // tile.k.shape[1], 1)
    return (tile.scale * (tile.q.double() @ k.mT)).abs().amax().item()


def weight_error(tile):
    """AMX multiplies weights as two bfloat16 each, of 8 bits: all but 2^-17 of them."""
    return 2.0**-17 if _native.info()["isa"] == "amx" and tile.q.dtype == torch.bfloat16 else 0.0


def forward_bound(tile, out):
    """Twice the plain error; with few rows that is a matter of luck, and rounding a score of 100 alone makes 6e-6."""
    plain = max(2e-6, 2 * relative_error(plain_float32(tile)[0], out), 6e-8 * largest_score(tile))
    return plain + weight_error(tile)


@pytest.mark.parametrize("spread", [1, 3, 10, 30, 100])
@pytest.mark.parametrize(("keys", "dim"), [(300, 64), (4096, 64), (4096, 128), (20000, 16)])
def test_forward_error_is_at_most_twice_that_of_torch(keys, dim, spread):
    tile = full_tile(1, 2, 1, 100, keys, dim, spread=spread)
    out, _ = attention(tile.q, tile.k, tile.v, tile.visible, tile.scale)
    torch_out = torch.nn.functional.scaled_dot_product_attention(tile.q, tile.k, tile.v, enable_gqa=True)
    assert relative_error(finalize(*tile.forward())[0], out) <= max(1e-6, 2 * relative_error(torch_out, out))


@pytest.mark.parametrize("keys", [300, 4096, 50000])
def test_the_error_in_bfloat16_does_not_grow_with_the_keys(keys):
    """Before the output is rounded it is that of float32, or of weights of 16 bits."""
    tile = full_tile(1, 2, 1, 100, keys, 64, torch.bfloat16)
    out, _ = attention(tile.q, tile.k, tile.v, tile.visible, tile.scale)
    assert relative_error(finalize(*tile.forward())[0], out) <= 2e-6 + weight_error(tile)


@thorough
@given(tiles())
def test_forward_matches_float64(tile):
    out, lse = attention(tile.q, tile.k, tile.v, tile.visible, tile.scale)
    got_out, got_lse = finalize(*tile.forward())
    seen = tile.visible.any(-1)
    assert relative_error(got_out, out) <= forward_bound(tile, out)
    assert torch.equal(got_lse > -math.inf, seen)
    assert ((got_lse - lse)[seen].abs() <= 2e-6 + 1e-6 * largest_score(tile)).all()


@thorough
@given(tiles())
def test_backward_matches_float64(tile):
    out, lse = attention(tile.q, tile.k, tile.v, tile.visible, tile.scale)
    delta = (out * tile.dout.double()).sum(-1)
    expected = gradients_given(tile.q, tile.k, tile.v, tile.dout, lse, delta, tile.visible, tile.scale)
    got = tile.backward(lse.float(), delta.float())
    # Where one key has all the weight, dq and dk are differences of nearly equal numbers: float32 keeps few digits.
    rounding = 2e-7 * (1 + lse[lse.isfinite()].abs().amax().item() if lse.isfinite().any() else 1)
    for x, reference, plain, size in zip(
        got, expected, plain_float32(tile)[1], gradient_sizes(tile, lse, delta), strict=True
    ):
        error = (x.double() - reference).norm().item()
        assert (
            error
            <= max(5e-6 * reference.norm().item(), 2 * (plain.double() - reference).norm().item(), 4 * rounding * size)
            + weight_error(tile) * size
        )


def gradient_sizes(tile, lse, delta):
    """Norms of the gradients' sums without cancellation."""
    heads = tile.q.shape[1]
    k, v = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (tile.k, tile.v))
    p = torch.exp(
        (tile.scale * (tile.q.double() @ k.mT)).masked_fill(~tile.visible, -math.inf) - lse[..., None]
    ).nan_to_num(0.0)
    ds = p * ((tile.dout.double() @ v.mT).abs() + delta.abs()[..., None])
    scale = abs(tile.scale)
    sums = (scale * ds @ k.abs(), scale * ds.mT @ tile.q.double().abs(), p.mT @ tile.dout.double().abs())
    return [x.norm().item() for x in sums]


@thorough
@given(tiles(), st.integers(0, 330))
def test_two_tiles_absorbed_one_after_the_other_are_one_tile(tile, cut):
    keys = tile.k.shape[2]
    cut = min(cut, keys)
    state = empty_state(*tile.q.shape)
    columns = torch.arange(keys)
    lo = torch.where(tile.visible, columns, keys).amin(-1)
    hi = torch.where(tile.visible, columns + 1, 0).amax(-1)
    for part in (slice(0, cut), slice(cut, keys)):
        bounds = {"lo": (lo - part.start).int(), "hi": (hi - part.start).int()}
        _native.absorb(
            *state, tile.q, tile.k[:, :, part], tile.v[:, :, part], scale=tile.scale, num_threads=1, **bounds
        )
    out, _ = attention(tile.q, tile.k, tile.v, tile.visible, tile.scale)
    assert relative_error(finalize(*state)[0], out) <= 1.5 * forward_bound(tile, out)


@thorough
@given(
    tiles(max_length=150, max_dim=40),
    st.sampled_from(["q", "k", "v"]),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.integers(0, 10**9),
)
def test_forward_keeps_non_finite_values_from_rows_that_do_not_see_them(tile, where, value, place):
    x = getattr(tile, where)
    x[tuple(place // 7**n % size for n, size in enumerate(x.shape))] = value
    out, _ = attention(tile.q, tile.k, tile.v, tile.visible, tile.scale)
    got, _ = finalize(*tile.forward())
    assert torch.equal(got.isfinite(), out.isfinite())
    finite = out.isfinite()
    clean = Tile(**(vars(tile) | {name: getattr(tile, name).nan_to_num(0.0, 0.0, 0.0) for name in "qkv"}))
    bound = 2 * forward_bound(clean, attention(clean.q, clean.k, clean.v, clean.visible, clean.scale)[0])
    assert relative_error(got.where(finite, 0.0), out.where(finite, 0.0)) <= max(5e-6, 10 * bound)


@thorough
@given(
    tiles(max_length=150, max_dim=20),
    st.sampled_from(["q", "k", "v", "dout", "lse", "delta"]),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.integers(0, 10**9),
)
def test_backward_keeps_non_finite_values_from_gradients_of_hidden_pairs(tile, where, value, place):
    out, lse = attention(tile.q, tile.k, tile.v, tile.visible, tile.scale)
    delta = (out * tile.dout.double()).sum(-1).float()
    lse = lse.float()
    x = {"lse": lse, "delta": delta}[where] if where in ("lse", "delta") else getattr(tile, where)
    x[tuple(place // 7**n % size for n, size in enumerate(x.shape))] = value
    expected = gradients_given(tile.q, tile.k, tile.v, tile.dout, lse, delta, tile.visible, tile.scale)
    for got, reference in zip(tile.backward(lse, delta), expected, strict=True):
        assert got[reference.isfinite()].isfinite().all()
        assert not got[reference.isnan()].isfinite().any()


@pytest.mark.parametrize("name", ["lse", "delta", "q", "k", "v", "dout"])
def test_a_nan_among_hidden_pairs_does_not_show_in_the_gradients(name):
    tile = full_tile(1, 2, 1, 300, 300, 24, upper=-200)  # rows 0 .. 200 see nothing, keys 100 .. 299 are never seen
    out, lse = attention(tile.q, tile.k, tile.v, tile.visible, tile.scale)
    lse, delta = lse.float(), (out * tile.dout).sum(-1).float()
    before = tile.backward(lse, delta)
    x = {"lse": lse, "delta": delta}[name] if name in ("lse", "delta") else getattr(tile, name)
    x[:, :, 150] = math.nan
    for a, b in zip(before, tile.backward(lse, delta), strict=True):
        assert relative_error(a, b.double()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, -0x7FFFFF], ids=hex)  # the last: 0xff800001
@pytest.mark.parametrize("name", ["lse", "delta"])
def test_a_nan_is_a_nan_whatever_its_bits(name, bits, dtype):
    tile = full_tile(1, 1, 1, 40, 40, 16, dtype)
    rows = {"lse": torch.zeros(1, 1, 40), "delta": torch.zeros(1, 1, 40)}
    rows[name].view(torch.int32)[..., 7] = bits
    dq, dk, dv = tile.backward(**rows)
    assert dq[:, :, 7].isnan().all() and dq.isnan().sum() == 16
    assert dk.isnan().all() and (name == "delta" or dv.isnan().all())


@thorough
@given(tiles())
def test_a_row_that_sees_nothing_keeps_its_bits(tile):
    state = tuple(torch.randn(x.shape) for x in tile.forward())
    before = [x.clone() for x in state]
    _native.absorb(*state, tile.q, tile.k, tile.v, scale=tile.scale, **tile.mask)
    blind = ~tile.visible.any(-1)
    for a, b in zip(before, state, strict=True):
        assert torch.equal(a[blind], b[blind])


@settings(thorough, max_examples=15)
@given(tiles())
def test_results_have_the_same_bits_whatever_the_number_of_threads(tile):
    _, lse = attention(tile.q, tile.k, tile.v, tile.visible, tile.scale)
    runs = [
        [x.clone() for x in tile.forward(n)] + tile.backward(lse.float(), torch.zeros(lse.shape), n)
        for n in (1, 1, 2, 5)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


rounds = pytest.mark.skipif(not _native.info()["rounds_weights"], reason="no products of bfloat16 to round weights for")


EVERY_DTYPE = [*((dtype, False) for dtype in DTYPES), pytest.param(torch.bfloat16, True, marks=rounds)]


@pytest.mark.parametrize(("dtype", "rounds_weights"), EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("spread", [1.0, 40.0])
@pytest.mark.parametrize("mask", [{}, {"upper": 1}, {"lower": -200, "upper": 1}, {"lower": 3, "upper": 150}], ids=str)
def test_a_row_has_the_same_bits_whatever_rows_share_its_work_item(mask, spread, dtype, rounds_weights):
    """More threads make smaller items. One long key sends its block another way, and one value is inf."""
    tile = full_tile(1, 2, 1, 700, 650, 40, dtype, spread=spread, **mask)
    tile.rounds_weights = rounds_weights
    tile.k[0, 0, 500] *= 50
    tile.v[0, 0, 300, 7] = math.inf
    one, *others = ([x.contiguous().view(torch.int32) for x in tile.forward(n)] for n in (1, 2, 3, 16, 64))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@rounds
@pytest.mark.parametrize("spread", [1.0, 40.0])
@pytest.mark.parametrize("keys", [1, 33, 300])
def test_rounded_weights_add_up_to_1_and_the_sum_stays_exact(keys, spread):
    tile = full_tile(1, 2, 1, 100, keys, 64, torch.bfloat16, spread=spread)
    tile.v[:] = tile.v[:, :, :1]  # all alike: whatever the weights, out is this value
    exact, tile.rounds_weights = tile.forward(), True
    acc, row_max, row_sum = tile.forward()
    out, lse = finalize(acc, row_max, row_sum)
    assert relative_error(out, tile.v[:, :, :1].double().expand_as(out)) <= 1e-6
    torch.testing.assert_close(lse, finalize(*exact)[1], rtol=1e-6, atol=1e-6)


@rounds
@pytest.mark.parametrize("keys", [300, 4096, 50000])
def test_the_error_of_rounded_weights_does_not_grow_with_the_keys(keys):
    tile = full_tile(1, 2, 1, 100, keys, 64, torch.bfloat16)
    tile.rounds_weights = True
    out, _ = attention(tile.q, tile.k, tile.v, tile.visible, tile.scale)
    assert 1e-4 <= relative_error(finalize(*tile.forward())[0], out) <= 2.0**-9


@rounds
@settings(thorough, max_examples=15)
@given(tiles())
def test_with_rounded_weights_too_bits_do_not_depend_on_the_number_of_threads(tile):
    for name in ("q", "k", "v", "dout"):
        setattr(tile, name, getattr(tile, name).bfloat16())
    tile.rounds_weights = True
    _, lse = attention(tile.q, tile.k, tile.v, tile.visible, tile.scale)
    one, *others = ([*tile.forward(n), *tile.backward(lse.float(), torch.zeros(lse.shape), n)] for n in (1, 1, 2, 5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def runs_of(tile, cuts):
    """The tile's keys cut at `cuts`, as (k, v, lower, upper, lo, hi)."""
    for first, last in pairwise([0, *sorted(cuts), tile.k.shape[2]]):
        band = (tile.mask.get(name) for name in ("lower", "upper"))
        ends = (tile.mask.get(name) for name in ("lo", "hi"))
        band = (None if edge is None else edge - first for edge in band)
        ends = (None if end is None else end - first for end in ends)
        yield (tile.k[:, :, first:last], tile.v[:, :, first:last], *band, *ends)


def in_runs(tile, cuts, num_threads=1):
    state = empty_state(*tile.q.shape)
    options = {"num_threads": num_threads, "rounds_weights": tile.rounds_weights}
    _native.absorb_runs(*state, tile.q, list(runs_of(tile, cuts)), scale=tile.scale, **options)
    return state


def one_by_one(tile, cuts):
    state = empty_state(*tile.q.shape)
    for k, v, *visible in runs_of(tile, cuts):
        mask = dict(zip(("lower", "upper", "lo", "hi"), visible, strict=True))
        options = {"num_threads": 1, "rounds_weights": tile.rounds_weights}
        _native.absorb(*state, tile.q, k, v, scale=tile.scale, **options, **mask)
    return state


def assert_same_bits(*states):
    """But for the bits of NaN."""
    first, *others = ([x.where(~x.isnan(), math.nan).contiguous().view(torch.int32) for x in state] for state in states)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@thorough
@given(tiles(), st.lists(st.floats(0, 1), max_size=5), st.sampled_from([1, 3]))
def test_runs_of_keys_in_one_call_have_the_bits_of_one_call_after_the_other(tile, cuts, num_threads):
    cuts = [int(cut * tile.k.shape[2]) for cut in cuts]
    together, apart = in_runs(tile, cuts, num_threads), one_by_one(tile, cuts)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    exact, _ = attention(tile.q, tile.k, tile.v, tile.visible, tile.scale)
    plain, _ = finalize(*tile.forward())
    assert relative_error(finalize(*together)[0], exact) <= 1.5 * relative_error(plain, exact) + 1e-6


@rounds
@thorough
@given(tiles(), st.lists(st.floats(0, 1), max_size=5), st.sampled_from([1, 3]))
def test_runs_have_the_bits_of_one_call_after_the_other_where_weights_are_rounded(tile, cuts, num_threads):
    tile.q, tile.k, tile.v = (x.to(torch.bfloat16) for x in (tile.q, tile.k, tile.v))
    tile.rounds_weights = True
    cuts = [int(cut * tile.k.shape[2]) for cut in cuts]
    together, apart = in_runs(tile, cuts, num_threads), one_by_one(tile, cuts)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize(("dtype", "rounds_weights"), EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("spread", [0.0, 1.0, 40.0])
def test_runs_of_more_blocks_than_one_sum_takes_have_the_bits_of_one_call_after_the_other(
    spread, dtype, rounds_weights
):
    """64 blocks of 128 or 256 keys are set aside, and so is every run: here two runs have more blocks, two have one."""
    ends = [300, 300 + 70 * 256, 301 + 70 * 256]
    tile = full_tile(1, 1, 1, 3, ends[-1] + 66 * 256, 2, dtype, spread=spread, lower=200)
    tile.rounds_weights = rounds_weights
    assert_same_bits(in_runs(tile, ends), one_by_one(tile, ends))


@pytest.mark.parametrize(("dtype", "rounds_weights"), EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("spread", [1.0, 40.0])
@pytest.mark.parametrize("bad", [10, 260, 299, 300, 301, 450])
def test_runs_with_an_infinite_value_have_the_bits_of_one_call_after_the_other(bad, spread, dtype, rounds_weights):
    """Its block goes another way, be it the first of its run, the last or the only one; rows begin in all the runs."""
    tile = full_tile(1, 2, 1, 100, 600, 24, dtype, spread=spread)
    tile.v[0, 0, bad, 3] = math.inf
    tile.rounds_weights = rounds_weights
    row = torch.arange(100, dtype=torch.int32)
    tile.mask = {"lo": 5 * row, "hi": torch.where(row % 3 == 0, bad, 600).int()}
    together = in_runs(tile, [300, 420, 500], num_threads=2)
    assert_same_bits(together, one_by_one(tile, [300, 420, 500]))
    reached = (tile.mask["lo"] <= bad) & (bad < tile.mask["hi"])
    assert together[0][:, :, ~reached].isfinite().all() and not together[0][:, :, reached, 3].isfinite().any()


def test_what_is_not_finite_in_one_run_reaches_only_the_rows_that_see_it():
    tile = full_tile(1, 2, 1, 100, 120, 24, upper=1)  # rows 30 .. 59 see a part of the second run, the first 30 nothing
    tile.v[0, 0, 45, 3], tile.k[0, 0, 50, 1] = math.nan, math.inf
    out, _ = finalize(*in_runs(tile, [30, 60]))
    whole, _ = finalize(*tile.forward())
    assert torch.equal(out.isfinite(), whole.isfinite())
    assert out[0, :, :45].isfinite().all() and not out[0, :, 45:, 3].isfinite().any()
    torch.testing.assert_close(out[whole.isfinite()], whole[whole.isfinite()], rtol=1e-5, atol=1e-5)


def test_runs_of_bfloat16_need_not_all_lie_alike():
    tile = full_tile(1, 2, 1, 40, 60, 16, dtype=torch.bfloat16, upper=20)
    even = in_runs(tile, [30])
    runs = [(tile.k[:, :, :30], tile.v[:, :, :30], None, 20, None, None)]
    runs.append((stored(tile.k[:, :, 30:], "transposed"), stored(tile.v[:, :, 30:], "stepped"), None, -10, None, None))
    state = empty_state(*tile.q.shape)
    _native.absorb_runs(*state, tile.q, runs, scale=tile.scale)
    torch.testing.assert_close(finalize(*state)[0], finalize(*even)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("runs", "error", "words"),
    [
        ([], TypeError, "runs must be a list of at least one"),
        (None, TypeError, "runs must be a list"),
        ([(1, 2)], TypeError, r"runs\[0\] must be a tuple \(k, v, lower, upper, lo, hi\)"),
        ([(2, 5), (3, 5)], ValueError, r"runs\[1\]: q must have a multiple of the heads of k: q has 4, k has 3"),
        ([(2, 5), (4, 5)], ValueError, r"runs\[1\]: k must have as many heads as in runs\[0\], 2, got 4"),
        (
            [(2, 5), (2, 5, 7)],
            ValueError,
            r"runs\[1\]: v must have as many numbers a token \(E\) as in runs\[0\], 8, got 7",
        ),
    ],
)
def test_wrong_runs_are_refused_with_their_number(runs, error, words):
    if runs and runs != [(1, 2)]:
        made = [(torch.zeros(2, *shape[:2], 8), torch.zeros(2, *shape[:2], *(shape[2:] or (8,)))) for shape in runs]
        runs = [(k, v, None, None, None, None) for k, v in made]
    arguments = {name: x for name, x in good_arguments().items() if name not in "kv"}
    with pytest.raises(error, match=words):
        _native.absorb_runs(**arguments, runs=runs)


@pytest.mark.parametrize("row_max", [0.0, -3.7, 41.3, -5000.2, 12345.6, 1e6])
def test_a_state_with_any_reference_takes_part_with_its_weight(row_max):
    tile = full_tile(1, 1, 1, 40, 50, 8)
    acc, maxima, sums = torch.randn(1, 1, 40, 8), torch.full((1, 1, 40), row_max), torch.rand(1, 1, 40) + 0.5
    offset = row_max if abs(row_max) > 100 else 0.0
    scores = tile.scale * tile.q.double() @ tile.k.double().mT
    shift = torch.maximum(maxima.double(), scores.amax(-1))
    weights = torch.exp(scores - shift[..., None])
    old = torch.exp(maxima.double() - shift)
    numerator = acc.double() * old[..., None] + weights @ tile.v.double()
    denominator = sums.double() * old + weights.sum(-1)
    _native.absorb(acc, maxima, sums, tile.q, tile.k, tile.v, scale=tile.scale)
    assert relative_error(acc / sums[..., None], numerator / denominator[..., None]) < 2e-6
    lse = maxima.double() + sums.double().log()
    assert ((lse - shift - denominator.log()).abs() < 2e-6 + 1e-9 * abs(offset)).all()


@pytest.mark.parametrize(
    "sizes",
    [
        (0, 2, 1, 3, 3, 4),
        (1, 0, 0, 3, 3, 4),
        (1, 0, 2, 3, 3, 4),
        (1, 2, 1, 0, 3, 4),
        (1, 2, 1, 3, 0, 4),
        (1, 2, 1, 3, 3, 0),
    ],
)
def test_an_empty_axis_changes_nothing(sizes):
    tile = full_tile(*sizes)
    for x in tile.forward():
        assert torch.equal(x, torch.full_like(x, -math.inf)) or not x.count_nonzero()
    rows = torch.zeros(tile.q.shape[:3])
    assert not any(g.count_nonzero() for g in tile.backward(rows, rows))


def test_gradients_are_added_to_what_is_there_and_may_be_left_out():
    tile = full_tile(1, 4, 2, 90, 70, 40, upper=1)
    out, lse = attention(tile.q, tile.k, tile.v, tile.visible, tile.scale)
    delta = (out * tile.dout).sum(-1).float()
    dq, dk, dv = tile.backward(lse.float(), delta)
    inputs = (tile.q, tile.k, tile.v, tile.dout, lse.float(), delta)
    ones = torch.ones_like(dq)
    _native.absorb_gradient(ones, None, None, *inputs, scale=tile.scale, upper=1)
    torch.testing.assert_close(ones, dq + 1)
    ones_k, ones_v = torch.ones_like(dk), torch.ones_like(dv)
    _native.absorb_gradient(None, ones_k, ones_v, *inputs, scale=tile.scale, upper=1)
    torch.testing.assert_close(ones_k, dk + 1)
    torch.testing.assert_close(ones_v, dv + 1)


def good_arguments():
    tile = full_tile(2, 4, 2, 6, 5, 8)
    return dict(zip(("acc", "row_max", "row_sum"), empty_state(2, 4, 6, 8), strict=True)) | {
        "q": tile.q,
        "k": tile.k,
        "v": tile.v,
        "scale": 0.5,
    }


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("acc", torch.zeros(2, 4, 6, 8, dtype=torch.float64), TypeError, "acc must be float32, got float64"),
        (
            "acc",
            torch.zeros(2, 4, 6, 7),
            ValueError,
            r"acc must have shape \[B, H, T, E\] = \[2, 4, 6, 8\], got \[2, 4, 6, 7\]",
        ),
        ("acc", torch.zeros(2, 4, 8, 6).mT, ValueError, "acc must have stride 1 on its last axis, got 6"),
        (
            "acc",
            torch.zeros(1, 4, 6, 8).expand(2, 4, 6, 8),
            ValueError,
            "acc is written to and must not be an expanded view",
        ),
        ("row_max", torch.zeros(2, 4, 5), ValueError, r"row_max must have shape \[B, H, T\]"),
        ("row_sum", torch.zeros(()).expand(2, 4, 6), ValueError, "row_sum is written to"),
        ("q", torch.zeros(2, 4, 6), ValueError, r"q must have 4 axes \[B, H, T, D\], got \[2, 4, 6\]"),
        (
            "q",
            torch.zeros(2, 4, 6, 8, dtype=torch.int32),
            TypeError,
            "q must be float32, bfloat16 or float16, got int32",
        ),
        ("q", torch.zeros(2, 4, 6, 8).to_sparse(), TypeError, "q must be a CPU array"),
        ("q", [[1.0]], TypeError, "q must be a CPU array .* got list"),
        ("q", None, TypeError, "q must be a CPU array .* got NoneType"),
        (
            "k",
            torch.zeros(2, 2, 5, 8, dtype=torch.bfloat16),
            TypeError,
            "k must have the dtype of q, float32, got bfloat16",
        ),
        ("k", torch.zeros(2, 3, 5, 8), ValueError, r"v must have shape \[B, K, S, E\] = \[2, 3, 5, 8\]"),
        ("v", torch.zeros(2, 2, 4, 8), ValueError, "v must have shape"),
        ("scale", math.nan, ValueError, "scale must be finite"),
        ("scale", math.inf, ValueError, "scale must be finite"),
        ("scale", 1e39, ValueError, "scale must be finite"),
        ("scale", "1", TypeError, "scale must be a number, got str"),
        ("lower", 0.5, TypeError, "lower must be an int, got float"),
        ("lo", torch.zeros(6, dtype=torch.int32), ValueError, "lo and hi must be given together"),
        ("num_threads", -1, ValueError, "num_threads must be 0 .* got -1"),
        ("num_threads", 10**30, ValueError, "num_threads must be"),
        ("rounds_weights", 1, TypeError, "rounds_weights must be a bool, got int"),
        ("rounds_weights", True, TypeError, "rounds_weights rounds to bfloat16, which q must be, got float32"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(name, value, error, words):
    with pytest.raises(error, match=words):
        _native.absorb(**(good_arguments() | {name: value}))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"lo": torch.zeros(6, dtype=torch.int64), "hi": torch.zeros(6, dtype=torch.int64)},
            TypeError,
            "lo must be int32, got int64",
        ),
        (
            {"lo": torch.zeros(5, dtype=torch.int32), "hi": torch.zeros(6, dtype=torch.int32)},
            ValueError,
            r"lo must have shape \[T\] = \[6\], got \[5\]",
        ),
        (
            {"lo": torch.zeros(6, dtype=torch.int32), "hi": torch.zeros(2, 6, dtype=torch.int32)},
            ValueError,
            r"hi must have shape \[T\], \[B, 1, T\] or \[B, H, T\]",
        ),
        (
            {"lo": torch.zeros(6, dtype=torch.int32), "hi": torch.zeros(6, dtype=torch.int32), "upper": 1},
            ValueError,
            "cannot be combined",
        ),
        (
            {"k": torch.zeros(2, 3, 5, 8), "v": torch.zeros(2, 3, 5, 8)},
            ValueError,
            "multiple of the heads of k: q has 4, k has 3",
        ),
        ({x: torch.zeros(1, 1, 1, 257) for x in ("q", "k", "v")}, ValueError, "at most 256"),
        ({"v": torch.zeros(2, 2, 5, 257)}, ValueError, "v must have at most 256"),
        (
            {x: torch.zeros(1, 1, 1, 1).expand(1, 1, 2**31, 1) for x in ("k", "v")} | {"q": torch.zeros(1, 1, 1, 1)},
            ValueError,
            "k must have at most",
        ),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(changes, error, words):
    with pytest.raises(error, match=words):
        _native.absorb(**(good_arguments() | changes))


def test_the_gradient_names_its_arguments_too():
    q, rows = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3)
    with pytest.raises(ValueError, match="dk and dv must be given together"):
        _native.absorb_gradient(q, q, None, q, q, q, q, rows, rows, scale=1.0)
    with pytest.raises(ValueError, match=r"lse must have shape \[B, H, T\]"):
        _native.absorb_gradient(q, q, q, q, q, q, q, rows[:, :, 1:], rows, scale=1.0)
    with pytest.raises(TypeError, match="do must have the dtype of q"):
        _native.absorb_gradient(q, q, q, q, q, q, q.half(), rows, rows, scale=1.0)


def test_calls_from_several_python_threads_do_not_disturb_each_other():
    many = [full_tile(1, 2, 1, 200 + n, 300, 32, seed=n, upper=1) for n in range(6)]
    alone = [[x.clone() for x in t.forward(1)] for t in many]
    together = [None] * len(many)

    def work(n):
        for _ in range(10):
            together[n] = [x.clone() for x in many[n].forward(1 + n % 3)]

    workers = [threading.Thread(target=work, args=(n,)) for n in range(len(many))]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


FORK = """
import os
{imports}
from ringspan import _native
q = np.random.default_rng(0).standard_normal((1, 4, 400, 32), dtype=np.float32)
def run():
    acc, m, l = np.zeros_like(q), np.full(q.shape[:3], -np.inf, dtype=q.dtype), np.zeros(q.shape[:3], dtype=q.dtype)
    _native.absorb(acc, m, l, q, q, q, scale=0.1, num_threads=3)
    return acc
before = run()
child = os.fork()
if child == 0:
    os._exit(0 if (run() == before).all() and _native.info()["helper_threads"] == 2 else 1)
assert os.waitpid(child, 0)[1] == 0
assert (run() == before).all()
"""


@pytest.mark.parametrize(
    "imports", ["import numpy as np", "import numpy as np, torch"], ids=["own pool", "with torch's OpenMP"]
)
def test_a_forked_child_starts_helpers_of_its_own(imports):
    subprocess.run([sys.executable, "-c", FORK.format(imports=imports)], check=True, timeout=120)


FORK_BEFORE_ANY_CALL = """
import os
import numpy as np, torch
from ringspan import _native
(torch.randn(1_000_000) + 1).exp()  # torch's OpenMP has its workers, the kernel was never called
child = os.fork()
if child == 0:
    q = np.random.default_rng(0).standard_normal((1, 4, 400, 32), dtype=np.float32)
    acc, m, l = np.zeros_like(q), np.full(q.shape[:3], -np.inf, dtype=q.dtype), np.zeros(q.shape[:3], dtype=q.dtype)
    _native.absorb(acc, m, l, q, q, q, scale=0.1, num_threads=3)
    os._exit(0 if _native.info()["helper_threads"] == 2 else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_may_be_the_first_to_call():
    subprocess.run([sys.executable, "-c", FORK_BEFORE_ANY_CALL], check=True, timeout=120)


def test_torch_and_the_kernel_use_the_same_threads_in_turn():
    """Both may use tiles (AMX), which are set up by thread."""
    tile = full_tile(1, 4, 4, 300, 400, 64, torch.bfloat16)

    def by_torch():
        return torch.nn.functional.scaled_dot_product_attention(tile.q, tile.k, tile.v), tile.q @ tile.k.mT

    before, mine = by_torch(), tile.forward(num_threads=2)
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(by_torch(), before, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(tile.forward(num_threads=2), mine, strict=True))


def with_an_unknown_instruction_set(code):
    environment = os.environ | {"RINGSPAN_ISA": "mmx"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_an_unknown_instruction_set_is_an_error():
    done = with_an_unknown_instruction_set("from ringspan import _native; _native.info()")
    assert done.returncode == 1
    assert "RINGSPAN_ISA must name an instruction set" in done.stderr
    assert "got 'mmx'" in done.stderr


def test_an_unknown_instruction_set_is_refused_before_a_call_begins():
    done = with_an_unknown_instruction_set(
        "import ringspan, torch; q = torch.randn(1, 2, 8, 16)\n"
        "try: ringspan.run_local(lambda group: ringspan.ring_attention(q, q, q), 2)\n"
        "except ringspan.ArgumentError as error: print(error)"
    )
    assert done.returncode == 0, done.stderr
    assert "RINGSPAN_ISA must name an instruction set" in done.stdout


OTHER_ISAS = [isa for isa in _native.info()["isas"] if isa != _native.info()["isa"]]


@pytest.mark.skipif("RINGSPAN_ISA" in os.environ, reason="one instruction set was asked for")
@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_all_of_this_holds_on_the_other_instruction_sets(isa):
    """Which one runs is chosen once a process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"RINGSPAN_ISA": isa, "RINGSPAN_EXAMPLES": "25"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout[-3000:]
