"""The local transport under the behaviour suite."""

import queue
import threading

import pytest
import torch
from transport_behaviour import BEHAVIOURS, NUM_RANKS

import ringspan
from ringspan import run_local
from ringspan.transport import cores as of_cores
from ringspan.transport import local
from ringspan.transport.contract import Parcel, spec_of
from ringspan.transport.local import LocalTransport


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
def test_local(behaviour):
    run_local(lambda group: behaviour(group.transport), NUM_RANKS, timeout=30)


def test_parcels_are_handed_over_without_a_copy():
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


def test_a_reader_is_counted_before_it_can_find_what_it_reads():
    """Or the owner could leave the call meanwhile."""

    def work(group):
        box = group.transport._board.boxes[0]

        class Parcels(dict):
            def update(self, found):
                assert box.num_readers == {1: 2}
                super().update(found)

        channel, mine = group.transport.channel(group.transport.begin_call(), range(3)), Parcel((torch.zeros(4),))
        if channel.rank == 0:
            box.parcels = Parcels()
            channel.post(0, 0, [(1, mine), (2, mine)])
        else:
            (arrived,) = channel.post(0, 0, (), [(0, spec_of(mine.tensors))]).wait()
            channel.release(arrived)
        channel.close()

    run_local(work, 3, timeout=30)


def test_of_those_that_a_parcel_was_lent_to_only_who_still_reads_is_named():
    taken = threading.Barrier(3)

    def work(group):
        channel, mine = group.transport.channel(group.transport.begin_call(), range(3)), Parcel((torch.zeros(4),))
        if channel.rank == 0:
            channel.post(0, 0, [(1, mine), (2, mine)])
            taken.wait(30)
            group.transport._board.timeout_s = 0.01
            with pytest.raises(ringspan.RankFailedError, match="for rank 1 to read rank 0's tensors"):
                channel.close()
        else:
            (arrived,) = channel.post(0, 0, (), [(0, spec_of(mine.tensors))]).wait()
            if channel.rank == 2:
                channel.release(arrived)
            taken.wait(30)

    run_local(work, 3, timeout=30)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e10, "60"])
def test_a_timeout_that_no_wait_can_have_is_refused(timeout):
    with pytest.raises(ringspan.ArgumentError, match="timeout must be"):
        run_local(lambda group: None, 2, timeout=timeout)


@pytest.mark.parametrize("num_workers", [0, -1, 2.0, True, "2"])
def test_a_number_of_workers_that_no_ring_can_have_is_refused(num_workers):
    with pytest.raises(ringspan.ArgumentError, match="num_workers must be"):
        run_local(lambda group: None, num_workers)


def test_a_ring_of_one_exchanges_nothing_and_refuses_as_others_do(monkeypatch):
    monkeypatch.setattr(LocalTransport, "agree", lambda *_: pytest.fail("there is nobody to agree with"))
    x = torch.randn(1, 2, 8, 4, requires_grad=True)
    ringspan.ring_attention(x, x, x, causal=True).sum().backward()
    run_local(lambda group: ringspan.unshard(ringspan.ring_attention(x, x, x, group=group), 2, group=group), 1)
    with pytest.raises(ringspan.ArgumentError, match="layout is unknown"):
        ringspan.ring_attention(x, x, x, layout="spiral")
    with pytest.raises(ringspan.ArgumentError, match="cu_seqlens must end at the number of tokens"):
        ringspan.ring_attention(x, x, x, cu_seqlens=[0, 9])


def test_every_caller_of_overlapping_calls_has_its_threads_back():
    """The one that ends first, while another goes on, and the one that began in its share."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    began, ended = threading.Event(), threading.Event()
    left = {}

    def first():
        torch.set_num_threads(2)
        run_local(lambda group: began.set() or second_runs.wait(30), 2)
        left["first"] = torch.get_num_threads()
        ended.set()

    def second():
        assert began.wait(30)
        run_local(lambda group: second_runs.set() or ended.wait(30), 2)
        left["second"] = torch.get_num_threads()

    second_runs = threading.Event()
    try:
        callers = [threading.Thread(target=call) for call in (first, second)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
        assert left == {"first": 2, "second": 2}
    finally:
        torch.set_num_threads(before)


def test_a_worker_keeps_its_share_after_a_ring_of_its_own():
    before = torch.get_num_threads()
    torch.set_num_threads(4)

    def work(group):
        share = torch.get_num_threads()
        run_local(lambda inner: None, 2)
        return share, torch.get_num_threads()

    try:
        assert run_local(work, 2) == [(2, 2)] * 2 and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_no_call_leaves_anything_at_its_group():
    def work(group):
        q, k, v = (torch.randn(1, 2, 5, 4).requires_grad_() for _ in range(3))
        one = torch.randn(1, 2, int(group.rank() == 0), 4)  # it travels
        out = ringspan.ring_attention(q, k, v, causal=True, layout="zigzag")
        ringspan.unshard(out, 2, layout="zigzag").square().sum().backward()
        ringspan.ring_attention(one, k, v).sum().backward()
        return group.transport._board

    board, *_ = run_local(work, 4)
    assert not board.agreements
    for box in board.boxes:
        assert not (box.parcels or box.num_readers or box.readers or box.read)


def test_a_thread_that_may_not_be_moved_goes_on_where_it_is(monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(of_cores, "_getcpu", lambda: 0)
    monkeypatch.setattr(of_cores.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(of_cores.os, "sched_setaffinity", refuse)
    of_cores._move_to(1)


@pytest.mark.parametrize(("num_workers", "num_cores", "at_once"), [(5, 2, 2), (2, 8, 2)])
def test_as_many_workers_compute_at_once_as_there_are_cores(monkeypatch, num_workers, num_cores, at_once):
    monkeypatch.setattr(local, "num_cores", lambda: num_cores)
    permits = local.Board(num_workers, timeout_s=10).permits
    for _ in range(at_once):
        permits.take()
    assert permits._free.empty()


@pytest.mark.skipif(of_cores._getcpu is None, reason="threads cannot be moved here")
@pytest.mark.parametrize(("core", "moves"), [(0, []), (1, [(1, {0}), (1, {0, 1})])])
def test_who_waits_for_a_core_goes_on_where_the_other_left(monkeypatch, core, moves):
    """And may be moved on from there; who need not wait stays where it is."""
    here, seen, waits = threading.local(), [], threading.Event()
    here.core = 0
    monkeypatch.setattr(of_cores, "_getcpu", lambda: here.core)
    monkeypatch.setattr(of_cores.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(of_cores.os, "sched_setaffinity", lambda _, cores: seen.append((here.core, cores)))

    class Free(queue.Queue):
        def get(self, block=True, timeout=None):
            if block:
                waits.set()
            return super().get(block, timeout)

    cores = of_cores.Cores(1)
    cores._free = Free()

    def worker():
        here.core = core
        with cores:
            pass

    thread = threading.Thread(target=worker)
    thread.start()
    assert waits.wait(10) and not seen
    cores.give_back()
    thread.join(10)
    assert seen == moves
    cores.take()
    assert seen == moves
