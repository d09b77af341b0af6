"""What every kernel does, whoever wrote it. A kernel's test file declares what it serves and inherits the rest:

    class TestMine(KernelBehaviour):
        kernel = Mine()
        dtypes = (torch.float32,)

Exact means: for `out` design.md's bound, for gradients at most twice the error of the plain formulas (definition.py);
a kernel that rounds weights to its inputs' dtype is measured against plain formulas that do the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise, product
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from definition import (
    attention,
    bound_of_lse,
    bound_of_out,
    bounds_of_gradients,
    gradients,
    relative_error,
    seen_by_intervals,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringspan.kernels.contract import SCRATCH_BYTES, Kernel
from ringspan.problem import Mask
from ringspan.state import SoftmaxState, state_dtype
from ringspan.tile import Band, RowIntervals

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Tile(NamedTuple):
    """The inputs of one kernel call, gradients included."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    dlse: Tensor
    visible: RowIntervals
    scale: float


def make_tile(
    visible: RowIntervals,
    *,
    batch=1,
    heads=2,
    kv_heads=1,
    dim=16,
    value_dim=None,
    dtype=torch.float32,
    scale=None,
    size=1.0,
) -> Tile:
    """Normal numbers, on the default device; scores then have a standard deviation of size**2."""
    num_rows, num_keys = visible.num_rows, visible.num_keys
    dims = dim, value_dim or dim
    q, do = (_normal(batch, heads, num_rows, length).to(dtype) for length in dims)
    k, v = (_normal(batch, kv_heads, num_keys, length).to(dtype) for length in dims)
    dlse = _normal(batch, heads, num_rows).to(state_dtype(dtype))
    return Tile(q * size, k * size, v, do, dlse, visible, dim**-0.5 if scale is None else scale)


def _normal(*shape: int) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, device="cpu").to(torch.get_default_device())


def forward(kernel: Kernel, tile: Tile, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse). dtype: of out, q's unless said."""
    state = SoftmaxState.empty(tile.q, tile.v.shape[-1])
    kernel.absorb(state, tile.q, tile.k, tile.v, tile.visible, tile.scale)
    return state.finalize(dtype or tile.q.dtype)


def empty_gradients(tile: Tile) -> list[Tensor]:
    dtype = state_dtype(tile.q.dtype)
    return [torch.zeros(x.shape, dtype=dtype) for x in (tile.q, tile.k, tile.v)]


def row_constants(kernel: Kernel, tile: Tile) -> tuple[Tensor, Tensor]:
    """lse and delta as the ring hands them to a backward, but from an `out` that was not rounded to 16 bits."""
    out, lse = forward(kernel, tile, state_dtype(tile.q.dtype))
    return lse, (out * tile.do).sum(-1) - tile.dlse


def backward(kernel: Kernel, tile: Tile, lse: Tensor | None = None, delta: Tensor | None = None) -> list[Tensor]:
    if lse is None or delta is None:
        lse, delta = row_constants(kernel, tile)
    found = empty_gradients(tile)
    kernel.absorb_gradient(*found, tile.q, tile.k, tile.v, tile.do, lse, delta, tile.visible, tile.scale)
    return found


def assert_forward_exact(tile: Tile, out: Tensor, lse: Tensor, rounds_weights: bool = False) -> None:
    seen = seen_by_intervals(tile.visible)
    exact_out, exact_lse = attention(tile.q, tile.k, tile.v, seen, tile.scale)
    assert out.dtype == tile.q.dtype
    assert lse.dtype == state_dtype(tile.q.dtype)
    assert relative_error(out, exact_out) <= bound_of_out(tile.q, tile.k, tile.v, seen, tile.scale, rounds_weights)
    # -inf exactly where nothing is seen; elsewhere close. (-inf - -inf is NaN, hence the replacement.)
    assert torch.equal(torch.isneginf(lse), torch.isneginf(exact_lse))
    error = (lse.double() - exact_lse).nan_to_num(0.0).abs()
    assert error.numel() == 0 or error.max() <= bound_of_lse(tile.q, tile.k, tile.scale)


def assert_backward_exact(
    tile: Tile, found: list[Tensor], rounds_weights: bool = False, weight_error: float = 0.0
) -> None:
    inputs = (tile.q, tile.k, tile.v, tile.do, tile.dlse, seen_by_intervals(tile.visible), tile.scale)
    bounds = bounds_of_gradients(*inputs, rounds_weights, weight_error)
    for name, mine, exact, bound in zip(("dq", "dk", "dv"), found, gradients(*inputs), bounds, strict=True):
        assert mine.dtype == state_dtype(tile.q.dtype), name
        assert torch.linalg.vector_norm(mine.double() - exact) <= bound, name


def _by_mask(**rule):
    """Intervals as the ring makes them from a mask: of queries and keys that start at other places."""

    def make(num_rows: int, num_keys: int) -> RowIntervals:
        total = num_rows + num_keys + 10
        mask = Mask(total, total, **{**rule, "cu_seqlens": (0, 5, 5, total // 3, total // 2, total // 2 + 1, total)})
        lo, hi = mask.intervals(np.arange(10, 10 + num_rows))
        return RowIntervals(num_rows, num_keys, None, lo - 7, hi - 7)

    return make


def _random(*axes: int, dtype=np.int64):
    """Any intervals: empty ones, lo > hi, bounds outside the keys."""

    def make(num_rows: int, num_keys: int) -> RowIntervals:
        rng = np.random.default_rng(num_rows + num_keys)
        lo, hi = (rng.integers(-num_keys, 2 * num_keys + 1, (*axes, num_rows)).astype(dtype) for _ in range(2))
        return RowIntervals(num_rows, num_keys, None, lo, hi)

    return make


def _band(lower: int | None, upper: int | None):
    return lambda num_rows, num_keys: RowIntervals(num_rows, num_keys, Band(lower, upper))


# batch 2 and heads 4 throughout, so that the intervals with these axes fit.
BATCH, HEADS = 2, 4
VISIBLE = {
    "full": _band(None, None),
    "nothing": lambda num_rows, num_keys: RowIntervals(num_rows, num_keys, Band(upper=-num_rows)),
    "diagonal": _band(None, 1),
    "diagonal without itself": _band(None, 0),
    "diagonal further right": _band(None, 40),
    "diagonal further down": _band(None, -40),
    "from the diagonal on": _band(0, None),
    "itself only": _band(0, 1),
    "window": _band(-17, 6),
    "window on the left": _band(-30, -5),
    "documents": _by_mask(),
    "causal documents": _by_mask(right=0),
    "documents with a window": _by_mask(left=9, right=4),
    "any intervals": _random(),
    "any intervals in int32": _random(dtype=np.int32),
    "any intervals of each head": _random(BATCH, HEADS),
    "any intervals of each batch entry": _random(BATCH, 1),
}
SIZES = [(1, 1), (1, 63), (63, 1), (63, 129), (129, 63), (129, 129), (333, 1000), (1000, 333), (1, 1000), (1000, 1)]
HEAD_COUNTS = [(1, 1, 1), (2, 3, 3), (1, 6, 2), (2, 5, 1), (3, 8, 4)]

visible_kinds = pytest.mark.parametrize("kind", VISIBLE)


class KernelBehaviour:
    """The suite. A subclass sets these; `refuses` lists (dtype, device, head_dim) it must decline besides.

    rounds_weights: p and ds are rounded to the inputs' dtype before they meet v, do, k and q, as tensor cores want it.
    weight_errors: what else a p or ds may be wrong by, as a part of it, by the inputs' dtype.
    steadiness: (rtol, atol) of what a NaN elsewhere may change where it does not reach.
    rows_of_minus_infinity_are_nan: whether a row whose scores are all -inf has NaN for out, not 0.
    one_in: of the cases of every test only one in so many is run with the fast tests (conftest.py).
    device: what it serves; a subclass for another one makes it the default device of its tests (test_gpu_kernels.py).
    """

    kernel: ClassVar[Kernel]
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    head_dims: ClassVar[tuple[int, ...]] = (1, 3, 16, 64, 128, 256)
    refuses: ClassVar[tuple[tuple[torch.dtype, str, int], ...]] = ()
    rounds_weights: ClassVar[bool] = False
    weight_errors: ClassVar[Mapping[torch.dtype, float]] = {}
    steadiness: ClassVar[tuple[float, float]] = (1e-4, 1e-5)
    rows_of_minus_infinity_are_nan: ClassVar[bool] = False
    one_in: ClassVar[int] = 1
    device: ClassVar[str] = "cpu"

    @pytest.fixture(params=FLOATS, ids=str)
    def dtype(self, request) -> torch.dtype:
        if request.param not in self.dtypes:
            pytest.skip(f"{self.kernel.name} does not serve {request.param}")
        return request.param

    def check(self, tile: Tile) -> None:
        assert_forward_exact(tile, *forward(self.kernel, tile), self.rounds_weights)
        self.check_gradients(tile, backward(self.kernel, tile))

    def check_gradients(self, tile: Tile, found: list[Tensor]) -> None:
        assert_backward_exact(tile, found, self.rounds_weights, self.weight_errors.get(tile.q.dtype, 0.0))

    # What it serves

    def test_it_serves_what_it_declares_and_refuses_the_rest(self):
        for dtype, dim in product(FLOATS, self.head_dims):
            declines = self.kernel.declines(dtype, torch.device(self.device), dim)
            assert declines is None if dtype in self.dtypes else declines, (dtype, dim)
        for dtype, device, dim in self.refuses:
            assert self.kernel.declines(dtype, torch.device(device), dim), (dtype, device, dim)

    # Exactness

    @visible_kinds
    def test_it_is_exact_for_every_kind_of_visibility(self, kind, dtype):
        self.check(make_tile(VISIBLE[kind](131, 190), batch=BATCH, heads=HEADS, kv_heads=2, dtype=dtype))

    @pytest.mark.parametrize(("num_rows", "num_keys"), SIZES)
    @pytest.mark.parametrize("kind", ["full", "diagonal", "causal documents", "any intervals"])
    def test_it_is_exact_for_awkward_sizes(self, kind, num_rows, num_keys):
        self.check(make_tile(VISIBLE[kind](num_rows, num_keys), heads=2, dim=32, dtype=self.dtypes[0]))

    @pytest.mark.parametrize(("batch", "heads", "kv_heads"), HEAD_COUNTS)
    @pytest.mark.parametrize("kind", ["full", "diagonal", "window"])
    def test_query_heads_read_the_key_head_of_their_group(self, kind, batch, heads, kv_heads, dtype):
        self.check(make_tile(VISIBLE[kind](63, 70), batch=batch, heads=heads, kv_heads=kv_heads, dtype=dtype))

    @pytest.mark.parametrize("kind", ["full", "diagonal", "any intervals"])
    def test_it_is_exact_for_every_head_dim(self, kind, dtype):
        for dim in self.head_dims:
            self.check(make_tile(VISIBLE[kind](63, 129), dim=dim, dtype=dtype))

    @pytest.mark.parametrize(
        ("dim", "value_dim"), [(1, 5), (5, 1), (16, 100), (48, 32), (33, 130), (192, 128), (2, 256)]
    )
    @pytest.mark.parametrize("kind", ["full", "diagonal", "any intervals"])
    def test_values_may_have_a_head_dim_of_their_own(self, kind, dim, value_dim, dtype):
        tile = make_tile(VISIBLE[kind](63, 129), heads=4, kv_heads=2, dim=dim, value_dim=value_dim, dtype=dtype)
        self.check(tile)
        found, again = (backward(self.kernel, tile) for _ in range(2))
        assert all(map(torch.equal, found, again))

    @pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
    @pytest.mark.parametrize("kind", ["full", "diagonal", "window"])
    def test_any_finite_scale_is_taken_as_it_is(self, kind, scale, dtype):
        self.check(make_tile(VISIBLE[kind](63, 129), scale=scale, dtype=dtype))

    @pytest.mark.parametrize("size", [2.0, 5.0])
    @pytest.mark.parametrize("kind", ["full", "diagonal", "window"])
    def test_it_is_exact_for_peaked_rows(self, kind, size, dtype):
        self.check(make_tile(VISIBLE[kind](129, 333), dim=64, size=size, dtype=dtype))

    @pytest.mark.parametrize("kind", ["full", "diagonal", "window"])
    @pytest.mark.parametrize("factor", [2.0**-70, 2.0**70])
    def test_gradients_scale_with_do_however_small_or_large_it_is(self, kind, factor, dtype):
        # Gradients are linear in do and delta, and a power of two is exact: the bits must scale along.
        # float16 cannot hold such a do.
        if dtype == torch.float16:
            pytest.skip("float16 has no such numbers")
        tile = make_tile(VISIBLE[kind](40, 50), dtype=dtype)
        lse, delta = row_constants(self.kernel, tile)
        scaled = backward(self.kernel, tile._replace(do=tile.do * factor), lse, delta * factor)
        self.check_gradients(tile, [x / factor for x in scaled])

    @pytest.mark.parametrize("kind", ["full", "diagonal", "window"])
    def test_a_gradient_of_lse_alone_is_exact(self, kind, dtype):
        tile = make_tile(VISIBLE[kind](63, 129), dtype=dtype)
        tile.do[:, :, ::2] = 0  # rows that only lse pulls at, between rows that both do
        self.check_gradients(tile, backward(self.kernel, tile))

    @settings(max_examples=60, suppress_health_check=[HealthCheck.differing_executors])  # each kernel inherits it
    @given(data=st.data())
    def test_it_is_exact_for_whatever_comes(self, data):
        number = st.integers(1, 40)
        num_rows, num_keys, dim = (data.draw(number, name) for name in ("T", "S", "D"))
        batch, kv_heads, group = (data.draw(st.integers(1, 3), name) for name in ("B", "K", "group"))
        edge = st.none() | st.integers(-45, 45)
        axes = data.draw(st.sampled_from([None, (), (batch, kv_heads * group), (batch, 1)]), "axes of the intervals")
        if axes is None:
            visible = RowIntervals(num_rows, num_keys, Band(data.draw(edge), data.draw(edge)))
        else:
            rng = np.random.default_rng(data.draw(st.integers(0, 1000), "seed of the intervals"))
            lo, hi = (rng.integers(-5, num_keys + 6, (*axes, num_rows)) for _ in range(2))
            visible = RowIntervals(num_rows, num_keys, None, lo, hi)
        value_dim = data.draw(st.none() | number, "E")
        dtype = data.draw(st.sampled_from(self.dtypes), "dtype")
        scale = data.draw(st.sampled_from([-1.0, 0.0, 0.125, 1.0]), "scale")
        sizes = {"batch": batch, "heads": kv_heads * group, "kv_heads": kv_heads, "dim": dim, "value_dim": value_dim}
        tile = make_tile(visible, **sizes, dtype=dtype, scale=scale)
        storage = data.draw(st.sampled_from(sorted(STORAGES)), "storage")
        self.check(tile._replace(**{name: STORAGES[storage](getattr(tile, name)) for name in ("q", "k", "v", "do")}))

    # Parts of a tile

    @visible_kinds
    def test_absorbing_a_tile_in_pieces_is_as_exact_as_in_one_go(self, kind, dtype):
        tile = make_tile(VISIBLE[kind](131, 190), batch=BATCH, heads=HEADS, kv_heads=2, dtype=dtype)
        state, found, (lse, delta) = SoftmaxState.empty(tile.q), empty_gradients(tile), row_constants(self.kernel, tile)
        # Keys back to front, and one piece of no keys at all.
        for rows, keys in product(_pieces(0, 1, 50, 131), reversed(_pieces(0, 60, 60, 61, 128, 190))):
            q, do = tile.q[:, :, rows], tile.do[:, :, rows]
            k, v = tile.k[:, :, keys], tile.v[:, :, keys]
            part = tile.visible.block(rows, keys)
            self.kernel.absorb(state.select(rows), q, k, v, part, tile.scale)
            targets = (found[0][:, :, rows], found[1][:, :, keys], found[2][:, :, keys])
            self.kernel.absorb_gradient(*targets, q, k, v, do, lse[:, :, rows], delta[:, :, rows], part, tile.scale)
        assert_forward_exact(tile, *state.finalize(tile.q.dtype))
        self.check_gradients(tile, found)

    @visible_kinds
    def test_runs_absorbed_together_have_the_bits_of_one_after_the_other(self, kind, dtype):
        tile = make_tile(VISIBLE[kind](131, 190), batch=BATCH, heads=HEADS, kv_heads=2, dtype=dtype)
        state = SoftmaxState.empty(tile.q)
        rows = slice(0, 131)
        # Keys back to front: rows of a diagonal see nothing of the first runs, or nothing of the last.
        runs = [
            (tile.k[:, :, keys], tile.v[:, :, keys], tile.visible.block(rows, keys))
            for keys in reversed(_pieces(0, 60, 60, 61, 128, 190))
        ]
        # The last ones lie otherwise, as shards of several ranks may.
        runs[3:] = [(STORAGES["dims first"](k), v, visible) for k, v, visible in runs[3:]]
        self.kernel.absorb_runs(state, tile.q, runs, tile.scale)
        apart = SoftmaxState.empty(tile.q)
        for run in runs:
            self.kernel.absorb(apart, tile.q, *run, tile.scale)
        assert torch.equal(state.acc, apart.acc) and torch.equal(state.row_sum, apart.row_sum)
        assert_forward_exact(tile, *state.finalize(tile.q.dtype), self.rounds_weights)

    def test_the_error_does_not_grow_with_the_number_of_pieces(self):
        tile = make_tile(RowIntervals(64, 1024), dim=64, dtype=self.dtypes[0])
        state = SoftmaxState.empty(tile.q)
        for start in range(0, 1024, 8):
            keys = slice(start, start + 8)
            part = tile.visible.block(slice(0, 64), keys)
            self.kernel.absorb(state, tile.q, tile.k[:, :, keys], tile.v[:, :, keys], part, tile.scale)
        assert_forward_exact(tile, *state.finalize(tile.q.dtype))

    def test_gradients_are_added_to_what_is_there(self):
        tile = make_tile(VISIBLE["diagonal"](63, 63), dtype=self.dtypes[0])
        lse, delta = row_constants(self.kernel, tile)
        once = backward(self.kernel, tile, lse, delta)
        twice = [x.clone() for x in once]
        inputs = (tile.q, tile.k, tile.v, tile.do, lse, delta)
        self.kernel.absorb_gradient(*twice, *inputs, tile.visible, tile.scale)
        for first, both in zip(once, twice, strict=True):
            torch.testing.assert_close(both, 2 * first, rtol=1e-5, atol=1e-5)

    # Edges

    @visible_kinds
    def test_rows_that_see_nothing_stay_as_they_are(self, kind, dtype):
        tile = make_tile(VISIBLE[kind](131, 190), batch=BATCH, heads=HEADS, dtype=dtype)
        blind = ~seen_by_intervals(tile.visible).any(-1).expand(BATCH, HEADS, 131)
        fresh = (torch.randn_like(tile.dlse) for _ in range(2))
        state = SoftmaxState(torch.randn(tile.q.shape, dtype=tile.dlse.dtype), *fresh)
        before = [x.clone() for x in (state.acc, state.row_max, state.row_sum)]
        self.kernel.absorb(state, tile.q, tile.k, tile.v, tile.visible, tile.scale)
        for old, new in zip(before, (state.acc, state.row_max, state.row_sum), strict=True):
            assert torch.equal(old[blind], new[blind])
        assert not backward(self.kernel, tile)[0][blind].any()

    @pytest.mark.parametrize("kind", ["full", "diagonal", "any intervals"])
    def test_rows_whose_scores_are_all_minus_infinity_are_as_those_that_see_nothing(self, kind, dtype):
        """-inf in k, hidden or not; then the same row sees finite scores too."""
        if self.rows_of_minus_infinity_are_nan:
            pytest.skip("a library's softmax makes NaN of them, as plain softmax does")
        tile = make_tile(VISIBLE[kind](70, 90), batch=BATCH, heads=HEADS, dtype=dtype)
        tile.q[..., 0] = 1
        tile.k[:, :, :40, 0] = -torch.inf
        for keys in (slice(0, 40), slice(0, 90)):
            part = tile.visible.block(slice(0, 70), keys)
            k, v = tile.k[:, :, keys], tile.v[:, :, keys]
            # What -inf hides is what no interval shows.
            seen = seen_by_intervals(part) & (torch.arange(part.num_keys) >= 40)
            out, lse = forward(self.kernel, tile._replace(k=k, v=v, visible=part))
            exact_out, exact_lse = attention(tile.q, k.nan_to_num(neginf=0.0), v, seen, tile.scale)
            bound = bound_of_out(tile.q, k.nan_to_num(neginf=0.0), v, seen, tile.scale, self.rounds_weights)
            assert relative_error(out, exact_out) <= max(bound, 2e-6)
            assert torch.equal(lse.isneginf(), exact_lse.isneginf())

    @pytest.mark.parametrize(
        ("score", "value"), [(-41.0, 1e-24), (-41.0, 1e20), (0.0, 1e30), (41.0, 1e-30), (41.0, 1e24)]
    )
    def test_weights_and_values_do_not_overflow_or_vanish_together(self, score, value, dtype):
        if dtype == torch.float16:
            pytest.skip("float16 does not reach that far")
        tile = make_tile(RowIntervals(5, 70, Band()), dim=4, dtype=dtype, scale=1.0)
        tile.q.zero_()[..., 0] = 1
        tile.k[..., 0] = score
        tile = tile._replace(v=tile.v * value)
        assert_forward_exact(tile, *forward(self.kernel, tile), self.rounds_weights)

    @pytest.mark.parametrize("axis", ["batch", "rows", "keys"])
    @pytest.mark.parametrize("kind", ["full", "diagonal", "any intervals", "any intervals of each head"])
    def test_a_size_of_zero_is_legal_and_changes_nothing(self, kind, axis):
        num_rows, num_keys = 0 if axis == "rows" else 20, 0 if axis == "keys" else 30
        batch = 0 if axis == "batch" else BATCH
        visible = VISIBLE[kind](num_rows, num_keys)
        if visible.lo is not None and visible.lo.ndim == 3:
            visible = visible.heads(slice(0, batch), slice(0, HEADS))
        tile = make_tile(visible, batch=batch, heads=HEADS, dtype=self.dtypes[0])
        out, lse = forward(self.kernel, tile)
        assert not out.any()
        assert torch.isneginf(lse).all()
        assert not any(x.any() for x in backward(self.kernel, tile))

    # Memory

    @pytest.mark.parametrize("kind", ["full", "diagonal", "window"])
    @pytest.mark.parametrize("storage", ["heads last", "dims first", "every other", "reversed axes", "one batch entry"])
    def test_strides_do_not_matter(self, kind, storage, dtype):
        tile = make_tile(VISIBLE[kind](63, 70), batch=BATCH, heads=HEADS, kv_heads=2, dtype=dtype)
        strided = {name: STORAGES[storage](getattr(tile, name)) for name in ("q", "k", "v", "do")}
        self.check(tile._replace(**strided))

    @pytest.mark.parametrize("kind", ["full", "diagonal", "window"])
    def test_state_and_gradients_may_be_views_of_something_larger(self, kind, dtype):
        tile = make_tile(VISIBLE[kind](63, 70), batch=BATCH, heads=HEADS, kv_heads=2, dtype=dtype)
        state, found = SoftmaxState.empty(tile.q), empty_gradients(tile)
        views = SoftmaxState(*(_inside_nan(x) for x in (state.acc, state.row_max, state.row_sum)))
        found = [_inside_nan(x) for x in found]
        lse, delta = (_inside_nan(x) for x in row_constants(self.kernel, tile))
        self.kernel.absorb(views, tile.q, tile.k, tile.v, tile.visible, tile.scale)
        self.kernel.absorb_gradient(*found, tile.q, tile.k, tile.v, tile.do, lse, delta, tile.visible, tile.scale)
        for view in (views.acc, views.row_max, views.row_sum, *found):
            assert torch.isnan(view._base).sum() == view._base.numel() - view.numel()
        assert_forward_exact(tile, *views.finalize(tile.q.dtype))
        self.check_gradients(tile, found)

    @visible_kinds
    def test_inputs_are_not_changed_and_two_calls_give_the_same_bits(self, kind, dtype):
        tile = make_tile(VISIBLE[kind](131, 190), batch=BATCH, heads=HEADS, dtype=dtype)
        lse, delta = row_constants(self.kernel, tile)
        inputs = (tile.q, tile.k, tile.v, tile.do, lse, delta)
        before = [x.clone() for x in inputs]
        runs = [(*forward(self.kernel, tile), *backward(self.kernel, tile, lse, delta)) for _ in range(2)]
        assert all(map(torch.equal, *runs))
        assert all(map(torch.equal, before, inputs))

    @pytest.mark.parametrize("shape", [
        # rows, keys, heads, key heads, head dim
        (4096, 4096, 1, 1, 64),
        (2048, 2048, 8, 8, 64),
        (16, 65536, 1, 1, 64),  # a copy of k or v alone would be over the bound
        (32768, 16, 2, 1, 64),  # the same of q
        (1024, 512, 64, 1, 128),  # a group of 64 heads cannot be cut up by key heads
        (512, 512, 4, 4, 256),
    ])  # fmt: skip
    @pytest.mark.parametrize("kind", ["full", "diagonal", "window"])
    def test_scratch_stays_within_the_bound(self, kind, shape):
        num_rows, num_keys, heads, kv_heads, dim = shape
        dtype = torch.bfloat16 if torch.bfloat16 in self.dtypes else self.dtypes[0]  # widened copies count too
        tile = make_tile(VISIBLE[kind](num_rows, num_keys), heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
        if kind == "window":  # a narrow one: what is measured is memory, not work
            tile = tile._replace(visible=RowIntervals(num_rows, num_keys, Band(-100, 0)))
        state, found = SoftmaxState.empty(tile.q), empty_gradients(tile)
        inputs, rest = (tile.q, tile.k, tile.v), (tile.visible, tile.scale)
        delta = torch.zeros_like(tile.dlse)
        assert peak_bytes(lambda: self.kernel.absorb(state, *inputs, *rest)) <= SCRATCH_BYTES
        lse = state.finalize(tile.q.dtype)[1]
        call = lambda: self.kernel.absorb_gradient(*found, *inputs, tile.do, lse, delta, *rest)  # noqa: E731
        assert peak_bytes(call) <= SCRATCH_BYTES

    # NaN and inf

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("where", ["q", "k", "v", "do"])
    @visible_kinds
    def test_nan_and_inf_reach_only_what_sees_them(self, kind, where, bad, dtype):
        visible = VISIBLE[kind](70, 90)
        clean = make_tile(visible, batch=BATCH, heads=HEADS, kv_heads=2, dtype=dtype)
        tile = clean._replace(**{where: getattr(clean, where).clone()})
        index = (1, 1, 41, 3)  # one batch entry, one head, one row or key, one of the dims
        getattr(tile, where)[index] = bad

        seen = seen_by_intervals(visible).expand(BATCH, HEADS, 70, 90)
        rows = _reached_rows(seen, where, index)
        keys = (seen & rows.unsqueeze(-1)).any(2).unflatten(1, (2, 2)).any(2)
        rtol, atol = self.steadiness
        # Not rounded to 16 bits: where NaN is about, a kernel may compute in another order, and change nothing else.
        (out, lse), (clean_out, clean_lse) = (forward(self.kernel, x, state_dtype(dtype)) for x in (tile, clean))
        delta = (out.double() * tile.do).sum(-1) - tile.dlse
        found = backward(self.kernel, tile, lse, delta.to(lse.dtype))
        clean_delta = (clean_out.double() * clean.do).sum(-1) - clean.dlse
        clean_found = backward(self.kernel, clean, clean_lse, clean_delta.to(lse.dtype))

        forward_rows = rows if where != "do" else torch.zeros_like(rows)
        scored_rows = forward_rows if where != "v" else torch.zeros_like(rows)
        weighed_keys = keys if where != "v" else torch.zeros_like(keys)  # v has no part in dv
        for name, mine, good, reached in (
            ("out", out, clean_out, forward_rows),
            ("lse", lse.unsqueeze(-1), clean_lse.unsqueeze(-1), scored_rows),
            ("dq", found[0], clean_found[0], rows),
            ("dk", found[1], clean_found[1], keys),
            ("dv", found[2], clean_found[2], weighed_keys),
        ):
            nonfinite = ~(mine.isfinite() | (mine == good)).all(-1)  # lse -inf is good where nothing is seen
            assert not (nonfinite & ~reached).any(), f"{name}: {bad} reaches what does not see it"
            # A score of inf may end as a weight of 0 or 1, but a NaN, or an infinite value, must never get lost.
            if np.isnan(bad) or (where == "v" and name == "out"):
                assert torch.equal(nonfinite, reached), f"{name}: {bad} got lost"
            torch.testing.assert_close(mine[~reached], good[~reached], rtol=rtol, atol=atol)


def _reached_rows(seen: Tensor, where: str, index: tuple[int, int, int, int]) -> Tensor:
    """[B, H, T]: rows that are bad themselves or see a bad key; a row that sees nothing stays as it is."""
    batch, head, position, _ = index
    rows = torch.zeros(seen.shape[:3], dtype=torch.bool)
    if where in ("q", "do"):
        rows[batch, head, position] = seen[batch, head, position].any()
    else:
        heads = slice(2 * head, 2 * head + 2)  # the query heads that read this key head
        rows[batch, heads] = seen[batch, heads, :, position]
    return rows


def _pieces(*boundaries: int) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(boundaries)]


def _inside_nan(x: Tensor) -> Tensor:
    """The same values, as a view into memory whose other elements are NaN."""
    larger = torch.full([size + 2 for size in x.shape], np.nan, dtype=x.dtype)
    view = larger[tuple(slice(1, -1) for _ in x.shape)]
    view.copy_(x)
    return view


def _every_other(x: Tensor) -> Tensor:
    larger = torch.full([2 * size for size in x.shape], np.nan, dtype=x.dtype)
    larger[::2, ::2, ::2, ::2] = x
    return larger[::2, ::2, ::2, ::2]


STORAGES = {
    "as made": lambda x: x,
    "heads last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dims first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other": _every_other,
    "reversed axes": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "one batch entry": lambda x: x[:1].expand_as(x),
}


def peak_bytes(call) -> int:
    """The most that the call had allocated from torch at any moment, beyond what was there before."""
    if torch.get_default_device().type == "cuda":
        call()  # cuBLAS's workspace, which is made once, is nobody's scratch
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(np.cumsum([change for _, change in changes]), default=0)
