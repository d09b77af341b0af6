"""The laws of the softmax state: parts of a row, computed anywhere, are put together in any order."""

from itertools import permutations

import pytest
import torch
from definition import relative_error

from ringspan.state import NEVER, SoftmaxState, state_dtype

SHAPE = (2, 3, 5)  # B, H, T
DIM = 4


def part(num_keys: int, dtype=torch.float32, size: float = 3.0) -> SoftmaxState:
    """The state of rows that saw num_keys keys."""
    scores, v = size * torch.randn(*SHAPE, num_keys, dtype=dtype), torch.randn(2, 3, num_keys, DIM, dtype=dtype)
    row_max = scores.amax(-1)
    weights = torch.exp(scores - row_max.unsqueeze(-1))
    return SoftmaxState(weights @ v, row_max, weights.sum(-1))


def empty(dtype=torch.float32) -> SoftmaxState:
    return SoftmaxState.empty(torch.zeros(*SHAPE, DIM, dtype=dtype))


def merged(first: SoftmaxState, *others: SoftmaxState) -> SoftmaxState:
    """A new state, from left to right."""
    found = SoftmaxState(*(x.clone() for x in tensors(first)))
    for other in others:
        found.merge_(*tensors(other))
    return found


def tensors(state: SoftmaxState) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return state.acc, state.row_max, state.row_sum


def same_bits(first: SoftmaxState, second: SoftmaxState) -> bool:
    return all(map(torch.equal, tensors(first), tensors(second)))


def result(state: SoftmaxState) -> tuple[torch.Tensor, torch.Tensor]:
    return merged(state).finalize(state.acc.dtype)


def assert_same_softmax(first: SoftmaxState, second: SoftmaxState, bound: float = 1e-6) -> None:
    for mine, theirs in zip(result(first), result(second), strict=True):
        assert relative_error(mine, theirs) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_an_empty_row_changes_nothing(dtype):
    state = part(7, dtype)
    assert same_bits(merged(state, empty(dtype)), state)
    assert same_bits(merged(empty(dtype), state), state)


def test_merging_rows_some_of_which_are_empty_changes_only_the_others():
    mine, theirs = part(7), part(3)
    for x, value in zip(tensors(theirs), (0.0, NEVER, 0.0), strict=True):
        x[:, :, ::2] = value
    found = merged(mine, theirs)
    assert same_bits(found.select(slice(0, None, 2)), mine.select(slice(0, None, 2)))
    assert not torch.equal(found.acc[:, :, 1::2], mine.acc[:, :, 1::2])


def test_merging_is_commutative_up_to_rounding():
    a, b = part(7), part(3)
    assert_same_softmax(merged(a, b), merged(b, a))


def test_merging_is_associative_up_to_rounding():
    a, b, c = part(7), part(1), part(3)
    assert_same_softmax(merged(merged(a, b), c), merged(a, merged(b, c)))


def test_parts_merged_in_any_order_make_the_softmax_of_the_whole():
    scores, v = 3 * torch.randn(*SHAPE, 12, dtype=torch.float64), torch.randn(2, 3, 12, DIM, dtype=torch.float64)
    parts = []
    for keys in (slice(0, 5), slice(5, 6), slice(6, 12)):
        weights = torch.exp(scores[..., keys] - 1.5)  # any reference near the largest score will do
        parts.append(SoftmaxState(weights @ v[:, :, keys], torch.full(SHAPE, 1.5).double(), weights.sum(-1)))
    for order in permutations(parts):
        out, lse = merged(empty(torch.float64), *order).finalize(torch.float64)
        assert relative_error(out, scores.softmax(-1) @ v) < 1e-14
        assert relative_error(lse, scores.logsumexp(-1)) < 1e-14


def test_scores_too_far_apart_for_exp_leave_the_larger_part():
    small, large = part(3), part(5)
    small.row_max -= 1e4
    large.row_max += 1e4
    for found in (merged(small, large), merged(large, small)):
        assert_same_softmax(found, large)
        assert all(x.isfinite().all() for x in tensors(found))


def test_an_untouched_row_has_out_0_and_lse_minus_infinity():
    state = empty()
    state.select(slice(0, 2)).merge_(*tensors(part(3).select(slice(0, 2))))
    out, lse = state.finalize(torch.float32)
    assert not out[:, :, 2:].any() and (lse[:, :, 2:] == -torch.inf).all()
    assert out[:, :, :2].all() and lse[:, :, :2].isfinite().all()


@pytest.mark.parametrize("has_sum", [True, False])
def test_two_empty_rows_make_an_empty_row_and_no_nan(has_sum):
    state = empty()
    state.merge_(*tensors(empty())[: 2 + has_sum])
    assert same_bits(state, empty())
    out, lse = state.finalize(torch.float32)
    assert not out.any() and (lse == -torch.inf).all()


def test_a_part_given_as_out_and_lse_merges_like_its_state():
    mine, theirs = part(7), part(3)
    found = merged(mine)
    found.merge_(*result(theirs))
    assert_same_softmax(found, merged(mine, theirs))


def test_an_empty_row_given_as_out_and_lse_changes_nothing():
    state = part(7)
    found = merged(state)
    found.merge_(torch.zeros_like(state.acc), torch.full_like(state.row_max, NEVER))
    assert same_bits(found, state)


def test_a_part_given_as_out_and_lse_fills_an_empty_row():
    found = empty()
    found.merge_(*result(theirs := part(3)))
    assert_same_softmax(found, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_float64_keeps_a_float64_state_and_all_else_a_float32_one(dtype):
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert state_dtype(dtype) == kept
    state = empty(dtype)
    state.merge_(*tensors(part(3, kept)))
    assert {x.dtype for x in tensors(state)} == {kept}
    out, lse = state.finalize(dtype)
    assert (out.dtype, lse.dtype) == (dtype, kept)


def test_float64_loses_nothing_to_float32_on_the_way():
    a, b = part(7, torch.float64), part(3, torch.float64)
    assert_same_softmax(merged(merged(empty(torch.float64), a), b), merged(b, a), bound=1e-14)


def test_out_is_as_wide_as_the_values_where_they_are_not_as_wide_as_the_queries():
    assert SoftmaxState.empty(torch.zeros(*SHAPE, DIM), value_dim=7).acc.shape == (*SHAPE, 7)


def test_an_empty_state_is_on_the_device_of_the_queries_whatever_the_default_is():
    q = torch.zeros(*SHAPE, DIM)
    with torch.device("meta"):
        state = SoftmaxState.empty(q)
    assert {x.device for x in tensors(state)} == {q.device}


def test_select_of_everything_is_the_state_itself():
    state = part(3)
    num_batch, num_heads, num_rows = state.row_max.shape
    assert state.select(slice(0, num_rows)) is state
    assert state.select(slice(0, num_rows), slice(0, num_heads), slice(0, num_batch)) is state
    rows = slice(0, num_rows)
    for fewer in ((slice(1, num_rows),), (rows, slice(0, 1)), (rows, slice(None), slice(0))):
        assert state.select(*fewer).row_max.numel() < state.row_max.numel()


def test_select_is_a_view_of_the_rows_heads_and_entries_that_it_names():
    state, added = part(7), part(3)
    before, rows, heads, batch = merged(state), slice(1, 4), slice(2, 3), slice(0, 1)
    state.select(rows, heads, batch).merge_(*tensors(added.select(rows, heads, batch)))
    chosen = torch.zeros(SHAPE, dtype=torch.bool)
    chosen[batch, heads, rows] = True
    everywhere = merged(before, added)
    for now, then, all_merged in zip(tensors(state), tensors(before), tensors(everywhere), strict=True):
        assert torch.equal(now[chosen], all_merged[chosen])
        assert torch.equal(now[~chosen], then[~chosen])
