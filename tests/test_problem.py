"""Masks and sizes: what the mask says in intervals is what its words say, pair by pair."""

from itertools import pairwise, product

import numpy as np
import pytest

from ringspan.problem import KeyRanges, Mask, Problem
from ringspan.schedule.check import visible_pairs

DOCUMENTS = {
    0: [(0,), (0, 0), (0, 0, 0)],
    1: [(0, 1), (0, 0, 1, 1)],
    2: [(0, 1, 2), (0, 0, 2, 2)],
    7: [(0, 7), (0, 3, 7), (0, 0, 1, 1, 1, 6, 7, 7)],
    29: [(0, 1, 2, 3, 29), (0, 10, 10, 20, 29), (0, 28, 29)],
}
MASKS = [
    Mask(num_tokens, num_tokens, left, right, cu_seqlens)
    for num_tokens, documents in DOCUMENTS.items()
    for left, right, cu_seqlens in product((-1, 0, 1, 5, 28, 40), (-1, 0, 1, 5, 28, 40), (None, *documents))
]
UNEQUAL = [Mask(5, 29), Mask(29, 5), Mask(0, 7), Mask(7, 0)]


def key_ranges(*shape: int, num_keys: int = 29) -> KeyRanges:
    """Any: empty ones, stops before starts, some beyond the sequence."""
    return KeyRanges.of(np.random.default_rng(sum(shape)).integers(-3, num_keys + 4, (*shape, 2)))


RANGED = [
    Mask(29, 29, key_ranges=(key_ranges(29),)),
    Mask(29, 29, 5, 0, (0, 10, 10, 29), (key_ranges(29),)),
    Mask(29, 29, right=3, key_ranges=(key_ranges(3, 29),)),
    Mask(5, 29, key_ranges=(key_ranges(2, 5),)),
    Mask(29, 5, key_ranges=(key_ranges(29, num_keys=5),)),
]


def test_every_query_sees_the_one_interval_that_the_words_of_the_mask_give_it():
    for mask in MASKS + UNEQUAL + RANGED:
        lo, hi = mask.intervals(np.arange(mask.num_queries, dtype=np.int64))
        assert lo.dtype == hi.dtype == np.int64
        keys = np.arange(mask.num_keys)
        seen = (lo[..., None] <= keys) & (keys < hi[..., None])
        assert np.array_equal(seen, visible_pairs(mask)), mask


def test_intervals_do_not_depend_on_which_positions_are_asked_for():
    mask = Mask(29, 29, left=5, right=1, cu_seqlens=(0, 10, 10, 20, 29))
    everywhere = mask.intervals(np.arange(29, dtype=np.int64))
    for positions in (range(3, 29, 9), range(12, 20), range(28, 29), range(0)):
        asked = np.array(positions, dtype=np.int64)
        for found, expected in zip(mask.intervals(asked), everywhere, strict=True):
            assert np.array_equal(found, expected[asked])


def test_visible_pairs_are_counted_as_brute_force_counts_them():
    for mask in MASKS + UNEQUAL + RANGED:
        assert mask.num_visible_pairs(mask.num_entries) == visible_pairs(mask).sum(), mask
    for mask in (MASKS[-1], RANGED[0]):
        assert mask.num_visible_pairs(3) == 3 * mask.num_visible_pairs()


def test_the_brute_force_itself_says_what_the_words_say():
    for mask in (Mask(7, 7), Mask(7, 7, 2, 0), Mask(7, 7, -1, 1, (0, 0, 1, 5, 5, 7)), Mask(7, 7, 0, -1, (0, 3, 7))):
        boundaries = mask.cu_seqlens or (0, 7)
        documents = list(pairwise(boundaries))
        for query, key in product(range(7), range(7)):
            in_window = (mask.left < 0 or query - key <= mask.left) and (mask.right < 0 or key - query <= mask.right)
            together = any(start <= query < stop and start <= key < stop for start, stop in documents)
            assert visible_pairs(mask)[query, key] == (in_window and together)


def test_a_position_is_in_the_document_that_is_not_empty():
    mask = Mask(7, 7, cu_seqlens=(0, 0, 2, 2, 2, 7, 7))
    assert [mask.document(position) for position in range(7)] == [(0, 2)] * 2 + [(2, 7)] * 5
    assert Mask(7, 9).document(3) == (0, 9)


def test_only_a_mask_without_rules_sees_all():
    assert Mask(7, 9).sees_all
    for mask in (Mask(7, 7, right=0), Mask(7, 7, left=3), Mask(7, 7, cu_seqlens=(0, 7)), RANGED[0]):
        assert not mask.sees_all


def test_key_ranges_are_one_object_for_all_who_ask_for_the_same_and_others_for_others():
    content = np.arange(24).reshape(12, 2)
    first = KeyRanges.of(content)
    assert KeyRanges.of(content.copy()) is first and first.lo.tolist() == list(range(0, 24, 2))
    assert KeyRanges.of(content.reshape(2, 6, 2)) != first != KeyRanges.of(content + 1)
    content[0, 1] = 7  # what it was made of may change
    assert first.hi[0] == 1 and KeyRanges.of(content) != first


def test_key_ranges_overlap_where_a_query_has_a_key_in_both():
    def ranges(*pairs):
        return KeyRanges.of(np.array(pairs))

    assert ranges((0, 3), (2, 5)).overlaps(ranges((3, 4), (4, 9)))
    assert not ranges((0, 3), (2, 5)).overlaps(ranges((3, 4), (5, 9)))
    assert not ranges((0, 9), (0, 9)).overlaps(ranges((4, 4), (5, 3)))


def test_a_mask_of_several_key_ranges_shows_what_its_parts_show():
    cuts = np.sort(np.random.default_rng(0).integers(-2, 32, (2, 29, 4)), -1)
    mask = Mask(29, 29, right=4, key_ranges=tuple(KeyRanges.of(cuts[..., i : i + 2]) for i in (0, 2)))
    parts = sum(visible_pairs(part).astype(int) for part in mask.parts)
    assert len(mask.parts) == 2 and np.array_equal(parts, visible_pairs(mask))
    assert mask.num_visible_pairs(batch=2) == parts.sum()


@pytest.mark.parametrize(
    ("mask", "num_pairs"),
    [
        (Mask(6, 6), 36),
        (Mask(6, 6, right=0), 21),
        (Mask(6, 6, left=1, right=0), 11),
        (Mask(6, 6, cu_seqlens=(0, 2, 2, 6)), 20),
        (Mask(4, 9), 36),
        (Mask(0, 9), 0),
    ],
    ids=str,
)
def test_a_forward_costs_four_flops_per_visible_pair_head_entry_and_dim(mask, num_pairs):
    assert mask.num_visible_pairs() == num_pairs
    # Two products, a multiply and an add each; what the keys' heads share is computed for each query head.
    assert (
        Problem(mask, batch=2, num_heads=6, num_kv_heads=3, head_dim=5).forward_flops() == 2 * 2 * 2 * 6 * 5 * num_pairs
    )
    wider = Problem(mask, batch=2, num_heads=6, num_kv_heads=3, head_dim=5, value_dim=7)
    assert wider.forward_flops() == 2 * 2 * 6 * (5 + 7) * num_pairs


def test_problems_and_masks_of_equal_content_are_equal_and_hashable():
    first, second = (Problem(Mask(7, 7, right=0, cu_seqlens=(0, 3, 7)), 1, 2, 1, 8) for _ in range(2))
    assert first == second
    assert len({first, second}) == 1
