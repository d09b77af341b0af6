"""Tiles: the intervals that a kernel is handed, held against the mask's words pair by pair."""

from itertools import product

import numpy as np
import pytest
from definition import seen_by_intervals
from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.layout import LAYOUTS, Layout, split
from ringspan.problem import KeyRanges, Mask
from ringspan.schedule.check import visible_pairs
from ringspan.tile import Band, Kind, Piece, RowIntervals, Tile
from ringspan.tiling import tiles_between

many_examples = settings(max_examples=5 * settings().max_examples)  # these are cheap


def seen(visible: RowIntervals) -> np.ndarray:
    return seen_by_intervals(visible).numpy()


def kind_of(seen: np.ndarray) -> Kind | None:
    """EMPTY, FULL, or None for anything between."""
    if not seen.any():
        return Kind.EMPTY
    return Kind.FULL if seen.all() else None


@st.composite
def masks(draw) -> Mask:
    num_tokens = draw(st.integers(0, 40))
    left, right = (draw(st.just(-1) | st.integers(0, 45)) for _ in range(2))
    cuts = draw(st.none() | st.lists(st.integers(0, num_tokens), max_size=6).map(sorted))
    documents = None if cuts is None else (0, *cuts, num_tokens)
    return Mask(num_tokens, num_tokens, left, right, documents, draw(st.none() | key_ranges(num_tokens)))


@st.composite
def key_ranges(draw, num_tokens: int) -> tuple[KeyRanges, ...]:
    """One, or two of which the second begins where the first ends; some reach beyond the sequence, some are empty."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    cuts = rng.integers(-5, num_tokens + 6, (*draw(st.sampled_from([(), (2,)])), num_tokens, 3))
    if draw(st.booleans()):  # as in a sequence: ascending, so that there are long runs
        cuts.sort(-2)
    cuts.sort(-1)
    parts = [cuts[..., :2], cuts[..., 1:]][: draw(st.integers(1, 2))]
    return tuple(map(KeyRanges.of, parts))


def slices(size: int) -> list[slice]:
    """Every run of `size` rows or keys, empty ones included."""
    return [slice(start, stop) for start in range(size + 1) for stop in range(start, size + 1)]


edges = st.none() | st.integers(-12, 12)


@st.composite
def bounds(draw, shape: tuple[int, ...], num_keys: int) -> list[np.ndarray]:
    """lo, hi: what a slow walk and what pure chance make of them, some beyond the tile's edges."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    dtype = draw(st.sampled_from([np.int32, np.int64]))
    if draw(st.booleans()):
        return [rng.integers(-3, num_keys + 4, shape).astype(dtype) for _ in range(2)]
    starts = rng.integers(-3, num_keys + 1), rng.integers(0, num_keys + 4)
    return [(start + rng.choice((0, 0, 1, 1, 1, 2), shape).cumsum(-1)).astype(dtype) for start in starts]


@st.composite
def row_intervals(draw, leading_axes=((), (2, 3), (2, 1)), largest=9) -> RowIntervals:
    num_rows, num_keys = (draw(st.integers(0, largest)) for _ in range(2))
    if draw(st.booleans()):
        return RowIntervals(num_rows, num_keys, Band(draw(edges), draw(edges)))
    return RowIntervals(
        num_rows, num_keys, None, *draw(bounds((*draw(st.sampled_from(leading_axes)), num_rows), num_keys))
    )


@many_examples
@given(masks(), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS), st.integers(1, 5))
def test_the_tiles_of_any_two_shards_show_what_the_mask_shows(mask, query_name, key_name, num_ranks):
    queries, keys = split(query_name, mask.num_queries, num_ranks), split(key_name, mask.num_keys, num_ranks)
    expected = visible_pairs(mask)
    for query_rank, key_rank in product(range(num_ranks), range(num_ranks)):
        assert_tiles_show(expected, mask, queries, query_rank, keys, key_rank)


def assert_tiles_show(
    expected: np.ndarray, mask: Mask, queries: Layout, query_rank: int, keys: Layout, key_rank: int
) -> None:
    for part, rows, columns in product(mask.parts, queries.ranges(query_rank), keys.ranges(key_rank)):
        tile, pairs = Tile(rows, columns, 0, 0, part), visible_pairs(part)[(..., *np.ix_(rows, columns))]
        assert np.array_equal(np.broadcast_to(seen(tile.intervals()), pairs.shape), pairs)
        assert tile.kind is (kind_of(pairs) or tile.kind)
        assert (tile.kind in (Kind.BAND, Kind.GENERAL)) == (kind_of(pairs) is None)
    held = (..., *np.ix_(queries.positions(query_rank), keys.positions(key_rank)))
    found = np.zeros(expected[held].shape, dtype=int)
    for tile in tiles_between(queries.ranges(query_rank), keys.ranges(key_rank), mask):
        assert tile.kind is not Kind.EMPTY
        found[..., tile.rows, tile.columns] += seen(tile.intervals())
    assert np.array_equal(found, expected[held])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("left", "right"), [(-1, 0), (5, 0), (0, 0), (3, -1)])
def test_a_mask_without_documents_makes_bands_only_in_every_layout(name, left, right):
    layout = split(name, 61, 4)
    for query_rank, key_rank in product(range(4), range(4)):
        for tile in tiles_between(layout.ranges(query_rank), layout.ranges(key_rank), Mask(61, 61, left, right)):
            assert tile.intervals().band is not None


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("mask", [Mask(61, 61), Mask(61, 61, right=0)])
def test_what_one_tile_can_show_is_one_tile(name, mask):
    layout = split(name, 61, 4)
    for query_rank, key_rank in product(range(4), range(4)):
        assert len(tiles_between(layout.ranges(query_rank), layout.ranges(key_rank), mask)) <= 1


@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 29), (29, 5), (7, 0), (0, 7)])
def test_without_a_mask_every_tile_of_unequal_lengths_is_full(num_queries, num_keys):
    queries, keys = split("contiguous", num_queries, 3), split("contiguous", num_keys, 3)
    for query_rank, key_rank in product(range(3), range(3)):
        tiles = tiles_between(queries.ranges(query_rank), keys.ranges(key_rank), Mask(num_queries, num_keys))
        assert [tile.kind for tile in tiles] == [Kind.FULL] * bool(queries.lengths[query_rank] * keys.lengths[key_rank])


def test_the_kind_of_a_band_is_what_its_pairs_say():
    edges = (None, *range(-6, 7))
    for num_rows, num_keys, lower, upper in product(range(5), range(5), edges, edges):
        band = Band(lower, upper)
        expected = kind_of(seen(RowIntervals(num_rows, num_keys, band))) or Kind.BAND
        assert band.kind(num_rows, num_keys) is expected, (num_rows, num_keys, band)


@many_examples
@given(row_intervals())
def test_kind_span_count_and_arrays_are_what_the_pairs_say(visible):
    pairs = seen(visible)
    assert visible.kind is (kind_of(pairs) or (Kind.GENERAL if visible.band is None else Kind.BAND))
    assert visible.num_visible_pairs() == pairs.sum()
    keys = np.flatnonzero(pairs.any(axis=tuple(range(pairs.ndim - 1))))
    assert visible.key_span() == ((keys[0], keys[-1] + 1) if len(keys) else (0, 0))
    lo, hi = visible.arrays()
    assert np.array_equal(seen(RowIntervals(visible.num_rows, visible.num_keys, None, lo, hi)), pairs)
    for bound in (lo, hi):
        assert bound.dtype == np.int64
        assert ((bound >= 0) & (bound <= visible.num_keys)).all()


@many_examples
@given(row_intervals(leading_axes=[(), (2, 3)], largest=5))
def test_a_block_shows_what_the_whole_shows_there(visible):
    pairs = seen(visible)
    for rows, keys in product(slices(visible.num_rows), slices(visible.num_keys)):
        block = visible.block(rows, keys)
        assert (block.num_rows, block.num_keys) == (rows.stop - rows.start, keys.stop - keys.start)
        assert np.array_equal(seen(block), pairs[..., rows, keys])
        assert (block.band is None) == (visible.band is None)


@given(row_intervals())
def test_heads_are_chosen_where_intervals_have_heads(visible):
    whole = np.broadcast_to(seen(visible), (2, 3, visible.num_rows, visible.num_keys))
    for batch, heads in product(slices(2), slices(3)):
        expected = whole[batch, heads]
        assert np.array_equal(np.broadcast_to(seen(visible.heads(batch, heads)), expected.shape), expected)


@many_examples
@given(row_intervals(leading_axes=[(), (2, 3), (2, 1)]), st.sampled_from([(), (2, 3)]), st.data())
def test_within_bounds_only_what_both_show_is_left(visible, axes, data):
    lo, hi = data.draw(bounds((*axes, visible.num_rows), visible.num_keys))
    both = seen(visible) & seen(RowIntervals(visible.num_rows, visible.num_keys, None, lo, hi))
    assert np.array_equal(seen(visible.within(lo, hi)), both)


@many_examples
@given(row_intervals(leading_axes=[()]))
def test_pieces_cover_exactly_the_visible_pairs_once(visible):
    covered = np.zeros((visible.num_rows, visible.num_keys), dtype=int)
    for piece in visible.pieces():
        assert {piece.lo_step, piece.hi_step} <= {0, 1}
        assert piece.rows.start < piece.rows.stop <= visible.num_rows
        for i, row in enumerate(range(piece.rows.start, piece.rows.stop)):
            lo, hi = piece.lo + i * piece.lo_step, piece.hi + i * piece.hi_step
            assert 0 <= lo < hi <= visible.num_keys
            covered[row, lo:hi] += 1
    assert np.array_equal(covered, seen(visible))


def test_packed_documents_come_out_as_one_piece_a_document():
    causal = Tile(range(12), range(12), 0, 0, Mask(12, 12, right=0, cu_seqlens=(0, 5, 5, 8, 12)))
    assert list(causal.intervals().pieces()) == [
        Piece(slice(0, 5), 0, 1, 0, 1),
        Piece(slice(5, 8), 5, 6, 0, 1),
        Piece(slice(8, 12), 8, 9, 0, 1),
    ]


def test_a_causal_diagonal_that_the_edge_clips_comes_out_as_a_diagonal_and_a_rectangle():
    clipped = Tile(range(8), range(4), 0, 0, Mask(8, 8, right=0))
    assert [(p.rows, p.hi_step) for p in clipped.intervals().pieces()] in (
        [(slice(0, 4), 1), (slice(4, 8), 0)],
        [(slice(0, 5), 1), (slice(5, 8), 0)],
    )


def test_a_full_tile_is_one_piece():
    assert list(RowIntervals(4, 6).pieces()) == [Piece(slice(0, 4), 0, 6, 0, 0)]


def test_only_intervals_of_few_rows_are_kept():
    """A tile of a million rows that were kept would be 16 MiB, and 64 of them a gibibyte."""
    for num_rows, num_entries, kept in ((100, 1, True), (1 << 17, 1, False), (100, 2, True), (1 << 10, 128, False)):
        documents = dict(right=0, cu_seqlens=(0, 7, num_rows))
        ranges = KeyRanges.of(np.broadcast_to([3, num_rows - 3], (num_entries, num_rows, 2)))
        mask = Mask(num_rows, num_rows, **(documents if num_entries == 1 else dict(key_ranges=(ranges,))))
        tile = Tile(range(num_rows), range(num_rows), 0, 0, mask)
        assert tile.intervals().band is None
        assert (tile.intervals() is tile.intervals()) == kept


def test_the_intervals_of_a_tile_take_8_bytes_a_row():
    visible = Tile(range(100), range(100), 0, 0, Mask(100, 100, cu_seqlens=(0, 7, 100))).intervals()
    assert visible.lo.nbytes + visible.hi.nbytes == 8 * 100


def test_keys_of_other_documents_need_no_intervals_to_be_left_out():
    mask = Mask(100, 100, cu_seqlens=(0, 30, 60, 100))
    for keys in (range(30), range(60, 100), range(70, 90)):
        tile = Tile(range(30, 60), keys, 0, 0, mask)
        assert tile.kind is Kind.EMPTY and tile.intervals().band is not None


def test_bounds_of_int32_are_moved_into_a_block_however_far_they_reach():
    lo, hi = (np.full(4, edge, np.int32) for edge in (np.iinfo(np.int32).min, np.iinfo(np.int32).max))
    assert RowIntervals(4, 9, None, lo, hi).block(slice(1, 3), slice(2, 9)).kind is Kind.FULL
