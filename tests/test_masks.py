"""`ringspan.masks`: key ranges of a function, of a dense mask and of slices are what these say; nonsense is refused.

What the common ones show is in test_key_ranges.py, by their words and under rings.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from definition import relative_error
from hypothesis import given
from hypothesis import strategies as st
from whole import Case, check, ring

import ringspan
from ringspan import masks, run_local

TOKENS = 70
DOCUMENT = torch.tensor([0] * 13 + [1] * 30 + [2] * 27)
LENGTH = torch.tensor([70, 1, 33])


def shown(ranges, num_keys: int) -> torch.Tensor:
    """The dense mask of key ranges; fails where two of them show a pair twice."""
    parts = [ranges] if isinstance(ranges, torch.Tensor) else ranges
    keys = torch.arange(num_keys)
    times = sum(((part[..., :1] <= keys) & (keys < part[..., 1:])).long() for part in parts)
    assert bool((times <= 1).all())
    return times.bool()


MODS = {
    "causal": lambda b, h, q, k: q >= k,
    "documents": lambda b, h, q, k: (DOCUMENT[q] == DOCUMENT[k]) & (q >= k),
    "window and first": lambda b, h, q, k: (q >= k) & ((q - k < 9) | (k < 4)),
    "holes": lambda b, h, q, k: (q + k) % 7 < 3,
    "rows that see nothing": lambda b, h, q, k: (q % 3 == 0) & (k > q),
    "all": lambda b, h, q, k: (q == q) & (k == k),
    "none": lambda b, h, q, k: q < -k - 1,
    "of keys alone": lambda b, h, q, k: k % 5 > 0,
    "padding": lambda b, h, q, k: k < LENGTH[b],
}


@pytest.mark.parametrize("name", MODS)
@pytest.mark.parametrize("num_keys", [TOKENS, 1, 41])
@pytest.mark.parametrize("at_once", [1, 100, 1 << 24])
def test_a_mask_mod_means_what_flex_attention_makes_of_it(name, num_keys, at_once, monkeypatch):
    from torch.nn.attention.flex_attention import create_mask

    monkeypatch.setattr(masks, "_PAIRS_AT_ONCE", at_once)
    batch = 3 if name == "padding" else None
    dense = create_mask(MODS[name], batch or 1, 1, TOKENS, num_keys, device="cpu")[:, 0]
    dense = dense if batch else dense[0]
    for ranges in (masks.from_mask_mod(MODS[name], TOKENS, num_keys, batch=batch), masks.from_mask(dense)):
        assert torch.equal(shown(ranges, num_keys), dense)
        assert all(part.dtype == torch.int64 and part.shape == (*dense.shape[:-1], 2) for part in ranges)


@pytest.mark.parametrize("name", ["documents", "window and first", "padding"])
def test_a_ring_under_a_mask_mod_is_exact(name):
    batch = 3 if name == "padding" else None
    options = dict(key_ranges=masks.from_mask_mod(MODS[name], TOKENS, TOKENS, batch=batch))
    case = Case(TOKENS, 4, 2, batch=3, layout="zigzag", options=options)
    check(case, run_local(ring, 3, case, timeout=60)[0])


@given(st.data())
def test_any_dense_mask_comes_back(data):
    shape = data.draw(st.sampled_from([(0, 3), (3, 0), (1, 1), (5, 40), (2, 3, 17), (2, 1, 4, 9), (0, 4, 4)]))
    bits = data.draw(st.integers(0, 2 ** max(1, torch.Size(shape).numel()) - 1))
    flat = [bool(bits >> place & 1) for place in range(torch.Size(shape).numel())]
    dense = torch.tensor(flat, dtype=torch.bool).view(shape)
    ranges = masks.from_mask(dense)
    dense = dense[:, 0] if dense.ndim == 4 else dense
    assert torch.equal(shown(ranges, shape[-1]), dense)


def test_a_mask_of_an_expanded_tensor_and_of_no_queries_is_taken():
    assert torch.equal(shown(masks.from_mask(torch.ones(1, 5, dtype=torch.bool).expand(4, 5)), 5), torch.ones(4, 5) > 0)
    assert [x.shape for x in masks.from_mask_mod(MODS["causal"], 0, 5)] == [(0, 2)]
    assert [x.shape for x in masks.from_mask_mod(MODS["padding"], 4, 0, batch=3)] == [(3, 4, 2)]


@pytest.mark.parametrize(
    "mask_mod",
    [
        lambda b, h, q, k: (h == 0) & (q >= k),
        lambda b, h, q, k: q - k < torch.tensor([4, 8])[h],
        lambda b, h, q, k: torch.where(h > 0, q, k) > k,
        lambda b, h, q, k: q * 2 ** (-h) > k,
        lambda b, h, q, k: torch.add(q, h) > k,
        lambda b, h, q, k: q > k if h else k > q,
        lambda b, h, q, k: (q - k).abs() < 4 * (1 + h),
        lambda b, h, q, k: h % 2 + q > k,
        lambda b, h, q, k: (q > k) & h.bool(),
        lambda b, h, q, k: (q > k) | (h & 1),
        lambda b, h, q, k: q - k < abs(h) ** 2,
        lambda b, h, q, k: torch.eq(q, other=h),
    ],
)
def test_a_mask_that_differs_by_head_is_refused_not_guessed(mask_mod):
    with pytest.raises(ringspan.UnsupportedError, match="must not depend on the head"):
        masks.from_mask_mod(mask_mod, 5, 5)


def test_a_mask_that_looks_at_the_entry_needs_to_know_how_many_there_are():
    with pytest.raises(ringspan.UnsupportedError, match=r"must not depend on the batch entry(.|\n)*batch="):
        masks.from_mask_mod(MODS["padding"], 5, 5)


# What MagiAttention's documentation of flex_flash_attn_func shows, rows from the first query on.
SHOWN_BY_SLICES = {
    (0, 5, 2): "11 11 11 11 11",
    (0, 2, 5): "11111 11111",
    (1, 5, 2): "00 00 00 10 11",
    (1, 2, 5): "11110 11111",
    (1, 5, 5): "10000 11000 11100 11110 11111",
    (2, 5, 2): "11 01 00 00 00",
    (2, 2, 5): "11111 01111",
    (2, 5, 5): "11111 01111 00111 00011 00001",
    (3, 5, 2): "00 00 00 00 00",
    (3, 2, 5): "11110 01111",
    (3, 5, 5): "10000 01000 00100 00010 00001",
}


@pytest.mark.parametrize(("kind", "num_queries", "num_keys"), SHOWN_BY_SLICES)
def test_slices_show_what_magi_attention_shows(kind, num_queries, num_keys):
    expected = [[c == "1" for c in row] for row in SHOWN_BY_SLICES[kind, num_queries, num_keys].split()]
    for name in (kind, masks.SLICE_TYPES[kind]):
        ranges = masks.from_slices([(2, 2 + num_queries)], [(3, 3 + num_keys)], [name], num_queries + 4)
        dense = shown(ranges, num_keys + 5)
        assert torch.equal(dense[2:-2, 3:-2], torch.tensor(expected))
        assert dense.sum() == torch.tensor(expected).sum()


def test_slices_of_the_same_queries_become_several_ranges():
    """Documents with a prefix that all see, some queries in three slices; also given as tensors."""
    q_ranges = torch.tensor([[0, 10], [10, 30], [10, 30], [30, 50], [30, 50], [40, 50]])
    k_ranges = torch.tensor([[0, 10], [0, 10], [10, 30], [0, 10], [30, 50], [12, 20]])
    types = torch.tensor([0, 0, 1, 0, 1, 0])
    expected = torch.zeros(50, 50, dtype=torch.bool)
    for (first, last), (start, stop), causal in zip(q_ranges.tolist(), k_ranges.tolist(), types.tolist(), strict=True):
        square = torch.ones(last - first, stop - start, dtype=torch.bool)
        expected[first:last, start:stop] |= square.tril(stop - start - last + first) if causal else square
    ranges = masks.from_slices(q_ranges, k_ranges, types, 50)
    assert len(ranges) == 3 and torch.equal(shown(ranges, 50), expected)
    case = Case(50, 2, batch=2, layout="striped", options=dict(key_ranges=ranges))
    check(case, run_local(ring, 3, case, timeout=60)[0])


def test_padding_is_of_the_keys_where_the_queries_are_another_sequence():
    for left in (False, True):
        ranges = masks.padding([2, 0], 5, left=left, num_queries=3)
        expected = [[[False] * 3 + [True] * 2 if left else [True] * 2 + [False] * 3] * 3, [[False] * 5] * 3]
        assert shown(ranges, 5).tolist() == expected


def test_a_batch_may_have_no_entries():
    assert masks.padding([], 5).shape == (0, 5, 2)


def test_images_may_be_named_in_any_order():
    images = [(5, 6), (1, 3), (3, 5)]
    assert torch.equal(masks.images_in_text(images, 8), masks.images_in_text(sorted(images), 8))


def test_a_row_may_have_as_many_runs_as_are_promised_and_no_more():
    for num_runs in (64, 65):
        mask = torch.arange(2 * num_runs).expand(3, -1) % 2 == 0
        if num_runs == 64:
            assert torch.equal(shown(masks.from_mask(mask), 128), mask)
        else:
            with pytest.raises(ringspan.UnsupportedError, match="got  65 runs for row 0"):
                masks.from_mask(mask)


def test_no_slices_show_nothing():
    assert not shown(masks.from_slices([], [], [], 7), 7).any()


MAKERS = {
    "padding": lambda: masks.padding([2, 0], 3, left=True),
    "prefix": lambda: masks.prefix([2, 0], 3),
    "images": lambda: masks.images_in_text([(0, 2)], 3),
    "frames": lambda: masks.frames(2, 1, 3),
    "window and first": lambda: masks.window_and_first(1, 1, 3),
    "shared prompt": lambda: masks.shared_prompt(1, [1, 2]),
    "continued": lambda: masks.continued(2, 3),
    "slices": lambda: masks.from_slices([(0, 2)], [(0, 3)], [1], 3),
    "no slices": lambda: masks.from_slices([], [], [], 3),
    "dense": lambda: masks.from_mask(torch.ones(3, 3, dtype=torch.bool, device="cpu")),
    "mask_mod": lambda: masks.from_mask_mod(lambda b, h, q, k: q >= k + b, 3, 3, batch=2),
    "mask_mod of nothing": lambda: masks.from_mask_mod(MODS["causal"], 0, 3),
}


@pytest.mark.parametrize("name", MAKERS)
def test_masks_are_made_on_the_cpu_whatever_the_default_device_is(name):
    expected = MAKERS[name]()
    with torch.device("meta"):
        found = MAKERS[name]()
    parts = [x if isinstance(x, list) else [x] for x in (found, expected)]
    assert all(map(torch.equal, *parts))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64])
def test_numbers_of_numpy_are_taken(dtype):
    lengths = np.array([3, 1], dtype)
    assert torch.equal(masks.padding(lengths, 4), masks.padding([3, 1], 4))
    assert torch.equal(masks.prefix(lengths, 4), masks.prefix([3, 1], 4))
    slices = [(0, 2), (2, 5)], [(0, 3), (1, 2)]
    for expected, found in zip(
        masks.from_slices(*slices, [3, 1], 5), masks.from_slices(*map(np.array, slices), lengths, 5), strict=True
    ):
        assert torch.equal(expected, found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masks.padding([3, 9], 8), "lengths must be from 0 to num_tokens.\n  got  9, num_tokens 8"),
        (lambda: masks.padding([3.0], 8), "lengths must hold whole numbers"),
        (lambda: masks.padding(3, 8), "lengths must have a number for each batch entry"),
        (lambda: masks.padding([[3]], 8), "lengths must hold whole numbers"),
        (lambda: masks.padding(torch.tensor([True]), 8), "lengths must hold whole numbers"),
        (lambda: masks.prefix(9, 8), "length must be from 0 to num_tokens"),
        (lambda: masks.prefix(-1, 8), "length must be from 0 to num_tokens"),
        (lambda: masks.padding(None, 8), "lengths must hold whole numbers.\n  got  None"),
        (lambda: masks.padding([[1], [2, 3]], 8), "lengths must hold whole numbers"),
        (lambda: masks.prefix(2**70, 8), "length must hold whole numbers"),
        (lambda: masks.padding(LENGTH.to("meta"), 8), "lengths must hold whole numbers"),
        (lambda: masks.frames(0, 1, 8), "tokens_each must be at least 1.\n  got  0"),
        (lambda: masks.frames(4, 1.5, 8), "before must be a whole number"),
        (lambda: masks.images_in_text([(2, 5), (4, 6)], 8), "got  (4, 6) after 5, of 8 tokens"),
        (lambda: masks.images_in_text([(5, 9)], 8), "got  (5, 9) after 0, of 8 tokens"),
        (lambda: masks.images_in_text([(5, 4)], 8), "got  (5, 4) after 0, of 8 tokens"),
        (lambda: masks.images_in_text([5], 8), "images must hold pairs (start, stop)"),
        (lambda: masks.images_in_text(None, 8), "images must be a sequence.\n  got  None"),
        (lambda: masks.window_and_first(-1, 4, 8), "left must be at least 0"),
        (lambda: masks.shared_prompt(3, [2, -1]), "answers must be at least 0"),
        (lambda: masks.shared_prompt(3, 2), "answers must be a sequence.\n  got  2"),
        (lambda: masks.continued(2**63 - 1, 2), "num_before must be at most 2**62"),
        (lambda: masks.continued(-3, 2), "num_before must be at least 0"),
        (lambda: masks.from_slices([(0, 9)], [(0, 9)], [1], 8), "got  queries [0, 9) of 8, keys [0, 9)"),
        (lambda: masks.from_slices([(0, 8)], [(5, 4)], [0], 8), "got  queries [0, 8) of 8, keys [5, 4)"),
        (lambda: masks.from_slices([(0, 8)], [(-1, 4)], [0], 8), "got  queries [0, 8) of 8, keys [-1, 4)"),
        (lambda: masks.from_slices([(-1, 4)], [(0, 8)], [0], 8), "got  queries [-1, 4) of 8, keys [0, 8)"),
        (lambda: masks.from_slices([(5, 4)], [(0, 8)], [0], 8), "got  queries [5, 4) of 8, keys [0, 8)"),
        (lambda: masks.from_slices([(0, 8)], [(0, 8)], [True], 8), "got  True"),
        (lambda: masks.from_slices([(0, 8)], [(0, 8)], [4], 8), "types must name how the slices are cut.\n  got  4"),
        (lambda: masks.from_slices([(0, 8)], [(0, 8)], ["casual"], 8), "got  'casual'"),
        (lambda: masks.from_slices([(0, 8)], [], [1], 8), "got  1, 0 and 1"),
        (lambda: masks.from_slices([(0, 8)], [(0, 8)], 1, 8), "types must be a sequence.\n  got  1"),
        (lambda: masks.from_slices([(0, 8)], [(0, 2**70)], [1], 8), "a slice must be within the sequence"),
        (lambda: masks.from_mask(torch.zeros(4, 4)), "mask must be a bool tensor"),
        (lambda: masks.from_mask(torch.ones(1, 2, 4, 4, dtype=torch.bool)), "the same for all heads"),
        (lambda: masks.from_mask(torch.arange(200).expand(2, 200) % 2 > 0), "got  100 runs for row 0"),
        (lambda: masks.from_mask(torch.ones(4, 4, dtype=torch.bool).to_sparse()), "mask must be a dense tensor"),
        (lambda: masks.from_mask(torch.ones(4, 4, dtype=torch.bool, device="meta")), "mask must hold numbers"),
        (lambda: masks.from_mask_mod(lambda b, h, q, k: q - k, 4, 4), "mask_mod must return a bool tensor"),
        (
            lambda: masks.from_mask_mod(lambda b, h, q, k: True, 4, 4),
            "mask_mod must return a bool tensor.\n  got  True",
        ),
        (lambda: masks.from_mask_mod(lambda b, h, q, k: (q > k)[None], 4, 4), "one bool for a query and a key"),
        (lambda: masks.from_mask_mod(None, 4, 4), "mask_mod must be a function"),
        (lambda: masks.from_mask_mod(MODS["causal"], 4.5, 4), "num_queries must be a whole number"),
    ],
)
def test_what_is_no_such_mask_is_refused_with_its_numbers(call, message):
    with pytest.raises(ringspan.RingspanError, match=re.escape(message)):
        call()


def test_the_page_about_masks_runs():
    (code,) = re.findall(
        r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "masks.md").read_text(), re.DOTALL
    )
    found: dict = {}
    exec(code, found)
    q, k, v = (found[name] for name in "qkv")
    document, place = found["document"], torch.arange(1000)
    seen = (place[:, None] >= place) & ((document[:, None] == document) | (place < 4))
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), seen)
    assert relative_error(found["out"], exact) < 2e-6
