"""Shared memory between processes: the behaviour suite."""

import pytest
from processes import results, run_processes
from transport_behaviour import BEHAVIOURS, NUM_RANKS

from ringspan.transport.table import group_name, resolve


def behave(rank, place):
    BEHAVIOURS[place](resolve(group_name(None)))
    assert resolve(group_name(None)).shared_memory is not None


@pytest.mark.parametrize("place", range(len(BEHAVIOURS)), ids=[behaviour.__name__ for behaviour in BEHAVIOURS])
def test_shared_memory(place):
    results(run_processes(behave, NUM_RANKS, place))
