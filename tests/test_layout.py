"""Layouts: every token has one place, at every number of ranks and at lengths that nothing divides."""

from itertools import product

import numpy as np
import pytest

from ringspan.errors import ArgumentError, LayoutError
from ringspan.layout import LAYOUTS, from_lengths, shard_length, split

LENGTHS = (0, 1, 2, 7, 29, 63, 64, 129, 1000)
every_layout = pytest.mark.parametrize("name", LAYOUTS)
every_number_of_ranks = pytest.mark.parametrize("num_ranks", range(1, 10))


def positions_by_rule(name: str, num_tokens: int, num_ranks: int) -> list[list[int]]:
    """By rank, from the words of the rule; numpy's array_split makes the first pieces one longer."""
    tokens = np.arange(num_tokens)
    if name == "striped":
        return [tokens[rank::num_ranks].tolist() for rank in range(num_ranks)]
    if name == "contiguous":
        return [piece.tolist() for piece in np.array_split(tokens, num_ranks)]
    chunks = [piece.tolist() for piece in np.array_split(tokens, 2 * num_ranks)]
    return [chunks[rank] + chunks[2 * num_ranks - 1 - rank] for rank in range(num_ranks)]


@every_layout
@every_number_of_ranks
def test_ranks_hold_the_positions_and_lengths_of_the_rule(name, num_ranks):
    for num_tokens in LENGTHS:
        layout = split(name, num_tokens, num_ranks)
        expected = positions_by_rule(name, num_tokens, num_ranks)
        assert [layout.positions(rank) for rank in range(num_ranks)] == expected
        assert layout.lengths == tuple(map(len, expected))
        assert (layout.num_tokens, layout.num_ranks) == (num_tokens, num_ranks)
        assert from_lengths(name, layout.lengths) == layout


@every_layout
@every_number_of_ranks
def test_ranges_partition_the_positions_and_none_of_them_is_empty(name, num_ranks):
    for num_tokens in LENGTHS:
        layout = split(name, num_tokens, num_ranks)
        ranges = [piece for rank in range(num_ranks) for piece in layout.ranges(rank)]
        assert all(ranges)
        assert sorted(position for piece in ranges for position in piece) == list(range(num_tokens))


@every_layout
@every_number_of_ranks
def test_locate_inverts_positions(name, num_ranks):
    for num_tokens in LENGTHS:
        layout = split(name, num_tokens, num_ranks)
        for rank in range(num_ranks):
            for slot, position in enumerate(layout.positions(rank)):
                assert layout.locate(position) == (rank, slot)


@every_layout
@pytest.mark.parametrize("position", [-1, 7])
def test_locate_refuses_a_position_outside_the_sequence(name, position):
    with pytest.raises(IndexError, match=f"position {position} of a sequence of 7 tokens"):
        split(name, 7, 3).locate(position)


@every_layout
@every_number_of_ranks
def test_no_rank_holds_two_tokens_more_than_another(name, num_ranks):
    for num_tokens in LENGTHS:
        lengths = split(name, num_tokens, num_ranks).lengths
        assert max(lengths) - min(lengths) <= (2 if name == "zigzag" else 1)


@pytest.mark.parametrize("name", ["striped", "zigzag"])
@pytest.mark.parametrize(("num_ranks", "num_tokens"), [*product(range(2, 10), (1, 2, 7, 64))])
def test_striped_and_zigzag_refuse_lengths_that_are_not_their_rules(name, num_ranks, num_tokens):
    lengths = split(name, num_tokens, num_ranks).lengths
    giver = max(range(num_ranks), key=lambda rank: lengths[rank])
    for taker in set(range(num_ranks)) - {giver}:
        moved = tuple(length - (rank == giver) + (rank == taker) for rank, length in enumerate(lengths))
        with pytest.raises(LayoutError, match=r"(?s)only the shard lengths of its own rule.*got .*fix "):
            from_lengths(name, moved)


@pytest.mark.parametrize("lengths", [(0,), (5,), (0, 0, 0), (0, 5, 0, 0, 9, 1), (9, 0), (1, 2, 3, 4)], ids=str)
def test_contiguous_takes_any_lengths(lengths):
    layout = from_lengths("contiguous", lengths)
    assert layout.lengths == lengths
    held = [layout.positions(rank) for rank in range(len(lengths))]
    assert tuple(map(len, held)) == lengths
    assert [position for positions in held for position in positions] == list(range(sum(lengths)))
    assert [layout.locate(p) for p in range(sum(lengths))] == [
        (rank, slot) for rank, length in enumerate(lengths) for slot in range(length)
    ]


@pytest.mark.parametrize("make", [lambda name: split(name, 4, 2), lambda name: from_lengths(name, (2, 2))])
def test_an_unknown_layout_is_refused_with_the_known_ones(make):
    with pytest.raises(ArgumentError, match=r"'spiral'\n.*'contiguous', 'striped', 'zigzag'"):
        make("spiral")


@pytest.mark.parametrize(("num_tokens", "num_ranks"), [(-1, 2), (4, 0)])
def test_a_negative_length_and_no_ranks_are_refused(num_tokens, num_ranks):
    with pytest.raises(ArgumentError, match=f"{num_tokens} tokens cannot be spread over {num_ranks} ranks"):
        split("contiguous", num_tokens, num_ranks)


def test_adjacent_zigzag_chunks_come_as_one_range():
    layout = split("zigzag", 12, 3)
    assert [layout.ranges(rank) for rank in range(3)] == [
        (range(2), range(10, 12)),
        (range(2, 4), range(8, 10)),
        (range(4, 8),),
    ]
    assert split("zigzag", 7, 1).ranges(0) == (range(7),)


@every_layout
@every_number_of_ranks
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_the_length_of_a_shard_is_that_of_its_ranges(name, num_ranks, num_tokens):
    whole = split(name, num_tokens, num_ranks)
    lengths = [shard_length(name, num_tokens, rank, num_ranks) for rank in range(num_ranks)]
    assert lengths == [sum(map(len, whole.ranges(rank))) for rank in range(num_ranks)]
