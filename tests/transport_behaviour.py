"""ONE behaviour suite for every transport. A behaviour is a function that each rank of three runs on its Transport."""

from __future__ import annotations

import torch

from ringspan.transport.contract import Parcel, Spec, Transport

NUM_RANKS = 3


def parcel_of(rank: int, sizes=((2, 3), (5,)), dtypes=(torch.float32, torch.bfloat16)) -> Parcel:
    """Tensors that say whose they are."""
    pairs = zip(sizes, dtypes, strict=True)
    return Parcel(tuple(torch.full(size, 10.0 * rank + i).to(dtype) for i, (size, dtype) in enumerate(pairs)))


def spec_of(parcel: Parcel) -> Spec:
    tensors = parcel.tensors
    return Spec(tuple(tuple(x.shape) for x in tensors), tuple(x.dtype for x in tensors), tensors[0].device)


def same(found: Parcel, expected: Parcel) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(found.tensors, expected.tensors, strict=True))


def opened(transport: Transport, members=range(NUM_RANKS)):
    return transport.channel(transport.begin_call(), members)


def every_rank_gets_every_message(transport: Transport) -> None:
    for _ in range(3):
        found = transport.agree(transport.begin_call(), bytes([transport.rank] * 8))
        assert found == [bytes([rank] * 8) for rank in range(NUM_RANKS)]


def calls_are_numbered_alike_on_all_ranks(transport: Transport) -> None:
    first = transport.begin_call()
    assert transport.begin_call() == first + 1


def a_parcel_goes_round_the_ring_and_comes_home(transport: Transport) -> None:
    for sizes in (((2, 3), (5,)), ((1,), (0,)), ((300, 1000), (1,)), ((0, 4), (0,))):
        channel = opened(transport)
        own = held = parcel_of(transport.rank, sizes)
        for index in range(NUM_RANKS):
            up, down = (channel.rank + 1) % channel.size, (channel.rank - 1) % channel.size
            handed_on = Parcel(tuple(x.clone() for x in held.tensors)) if channel.in_place else held
            (arrived,) = channel.post(index, 0, [(up, handed_on)], [(down, spec_of(own))]).wait()
            assert same(arrived, parcel_of((channel.rank - index - 1) % NUM_RANKS, sizes))
            if held is not own:
                channel.release(held)
            held = arrived
        assert same(held, own)
        channel.release(held)
        channel.close()


def posting_does_not_wait_for_the_other_side(transport: Transport) -> None:
    """Everybody posts everything before anybody waits; lanes and steps keep the parcels apart."""
    channel = opened(transport)
    others = [rank for rank in range(channel.size) if rank != channel.rank]
    posted = []
    for index in range(3):
        for lane in range(2):
            mine = parcel_of(100 * channel.rank + 10 * index + lane)
            sends, receives = [(peer, mine) for peer in others], [(peer, spec_of(mine)) for peer in others]
            posted.append(channel.post(index, lane, sends, receives))
    for place, pending in reversed(list(enumerate(posted))):
        for peer, arrived in zip(others, pending.wait(), strict=True):
            assert same(arrived, parcel_of(100 * peer + 10 * (place // 2) + place % 2))
            channel.release(arrived)
    channel.close()


def a_parcel_goes_by_several_lanes(transport: Transport) -> None:
    channel = opened(transport)
    mine = parcel_of(channel.rank)
    up, down = (channel.rank + 1) % channel.size, (channel.rank - 1) % channel.size
    for lane, to, source in ((0, up, down), (1, down, up)):
        (arrived,) = channel.post(lane, lane, [(to, mine)], [(source, spec_of(mine))]).wait()
        assert same(arrived, parcel_of(source))
        channel.release(arrived)
    channel.close()


def tensors_of_any_strides_arrive_as_they_look(transport: Transport) -> None:
    channel = opened(transport)
    grid = torch.arange(24.0).view(4, 6) + 100 * channel.rank
    mine = Parcel((grid.mT, grid[:, ::2]))
    up, down = (channel.rank + 1) % channel.size, (channel.rank - 1) % channel.size
    (arrived,) = channel.post(0, 0, [(up, mine)], [(down, spec_of(mine))]).wait()
    theirs = torch.arange(24.0).view(4, 6) + 100 * down
    assert same(arrived, Parcel((theirs.mT, theirs[:, ::2])))
    channel.release(arrived)
    channel.close()


def negated_and_conjugated_views_arrive_as_they_look(transport: Transport) -> None:
    channel = opened(transport)
    numbers = [torch.complex(torch.arange(4.0), torch.full((4,), 1.0 + rank)) for rank in range(NUM_RANKS)]
    looks = [Parcel((torch._neg_view(x.real.contiguous()), x.conj().imag, x.conj())) for x in numbers]
    up, down = (channel.rank + 1) % channel.size, (channel.rank - 1) % channel.size
    (arrived,) = channel.post(0, 0, [(up, looks[channel.rank])], [(down, spec_of(looks[down]))]).wait()
    assert same(arrived, looks[down])
    channel.release(arrived)
    channel.close()


def after_close_the_owner_may_overwrite_what_it_sent(transport: Transport) -> None:
    """Rank 2 reads late. What it read must still be what was sent."""
    channel = opened(transport)
    mine = parcel_of(channel.rank, ((400, 500), (3,)))
    up, down = (channel.rank + 1) % channel.size, (channel.rank - 1) % channel.size
    pending = channel.post(0, 0, [(up, mine)], [(down, spec_of(mine))])
    if channel.rank == 2:
        torch.randn(500, 500) @ torch.randn(500, 500)  # a while
    (arrived,) = pending.wait()
    seen = Parcel(tuple(x.clone() for x in arrived.tensors))
    channel.release(arrived)
    channel.close()
    for x in mine.tensors:
        x.fill_(float("nan"))
    assert same(seen, parcel_of(down, ((400, 500), (3,))))


def a_ring_of_some_ranks_counts_in_its_own_order(transport: Transport) -> None:
    members = (2, 0)
    call = transport.begin_call()
    if transport.rank not in members:
        return
    channel = transport.channel(call, members)
    assert (channel.rank, channel.size) == (members.index(transport.rank), 2)
    mine = parcel_of(transport.rank)
    (arrived,) = channel.post(0, 0, [(1 - channel.rank, mine)], [(1 - channel.rank, spec_of(mine))]).wait()
    assert same(arrived, parcel_of(members[1 - channel.rank]))
    channel.release(arrived)
    channel.close()


def computing_can_be_entered_again_and_again(transport: Transport) -> None:
    channel = opened(transport)
    for _ in range(100):
        with channel.computing():
            pass
    channel.close()


BEHAVIOURS = (
    every_rank_gets_every_message,
    calls_are_numbered_alike_on_all_ranks,
    a_parcel_goes_round_the_ring_and_comes_home,
    posting_does_not_wait_for_the_other_side,
    a_parcel_goes_by_several_lanes,
    tensors_of_any_strides_arrive_as_they_look,
    negated_and_conjugated_views_arrive_as_they_look,
    after_close_the_owner_may_overwrite_what_it_sent,
    a_ring_of_some_ranks_counts_in_its_own_order,
    computing_can_be_entered_again_and_again,
)
