"""The local transport under the behaviour suite."""

import pytest
from transport_behaviour import BEHAVIOURS, NUM_RANKS

import ringspan
from ringspan import run_local


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
def test_local(behaviour):
    run_local(lambda group: behaviour(group.transport), NUM_RANKS, timeout=30)


def test_parcels_are_handed_over_without_a_copy():
    import torch

    from ringspan.transport.contract import Parcel, spec_of

    mine = torch.zeros(4)

    def work(group):
        channel = group.transport.channel(group.transport.begin_call(), range(2))
        if channel.rank == 0:
            channel.post(0, 0, [(1, Parcel((mine,)))]).wait()
        else:
            (arrived,) = channel.post(0, 0, (), [(0, spec_of([mine]))]).wait()
            assert arrived.tensors[0] is mine
            channel.release(arrived)
        channel.close()

    run_local(work, 2, timeout=30)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e10, "60"])
def test_a_timeout_that_no_wait_can_have_is_refused(timeout):
    with pytest.raises(ringspan.ArgumentError, match="timeout must be"):
        run_local(lambda group: None, 2, timeout=timeout)
