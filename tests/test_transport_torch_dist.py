"""The torch.distributed transport (gloo, processes): the behaviour suite, whole rings, groups within groups."""

import functools
import gc
import os
import select
import signal
import socket
import threading
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import results, run_processes
from torch.distributed.device_mesh import DeviceMesh
from transport_behaviour import BEHAVIOURS, NUM_RANKS
from whole import Case, check, ring

import ringspan
from ringspan.kernels.table import KERNELS
from ringspan.transport import bulletin, segments, torch_dist
from ringspan.transport.bulletin import WATCH_S, Bulletin
from ringspan.transport.process_group import transport_of
from ringspan.transport.waiter import Outcome, Waiter


def behave(rank, place):
    BEHAVIOURS[place](transport_of(dist.group.WORLD).torch_dist)


@pytest.mark.parametrize("place", range(len(BEHAVIOURS)), ids=[behaviour.__name__ for behaviour in BEHAVIOURS])
def test_torch_dist(place):
    results(run_processes(behave, NUM_RANKS, place))


CASES = [
    Case(129, 4, 2, layout=layout, options=options)
    for layout in ("contiguous", "striped", "zigzag")
    for options in ({}, dict(causal=True), dict(causal=True, window_size=(20, 0)), dict(cu_seqlens=[0, 40, 40, 129]))
] + [
    Case(2, layout="striped", options=dict(causal=True)),
    Case(700, 4, 4, 64, layout="zigzag", dtype=torch.bfloat16, options=dict(causal=True)),
    Case(700, 8, 1, 64, batch=2, options=dict(causal=True)),
    Case(30, 2, 2, keys=75),
    Case(100, 4, 2, 24, value_dim=16, layout="zigzag", options=dict(causal=True)),
]


def run_cases(rank, transport):
    return [ring(None, replace(case, options=case.options | {"transport": transport})) for case in CASES]


@pytest.mark.parametrize("transport", ["shared_memory", "torch_dist"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_rings_of_processes_are_exact_and_have_the_bits_of_rings_of_threads(num_ranks, transport):
    found = results(run_processes(run_cases, num_ranks, transport))
    for place, case in enumerate(CASES):
        check(case, found[0][place])
        for mine in found[1:]:
            assert all(torch.equal(found[0][place][name], x) for name, x in mine[place].items())
        threads = ringspan.run_local(ring, num_ranks, case)[0]
        assert all(torch.equal(found[0][place][name], x) for name, x in threads.items())


def one_case(rank):
    return ring(None, CASES[1])


@pytest.mark.parametrize("backend", [None, "cpu:gloo"])
def test_a_group_made_without_naming_gloo_alone_serves_cpu_tensors(backend):
    for found in results(run_processes(one_case, 2, backend=backend)):
        check(CASES[1], found)


def groups_in_groups(rank):
    """Two groups at once in one process, from two threads; a mesh's axes; and a group that leaves the caller out."""
    case = Case(60, layout="zigzag", options=dict(causal=True))
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    found = [ring(mesh["cp"], case), ring(mesh["dp"].get_group(), case)]
    both = [dist.new_group([0, 1, 2, 3]) for _ in range(2)]
    at_once = [None, None]

    def work(place):
        at_once[place] = [ring(both[place], case) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for runs in at_once:
        found += runs
    pair = dist.new_group([1, 2])
    q = torch.randn(1, 1, 4, 8)
    if rank in (1, 2):
        outs = [ringspan.ring_attention(q, q, q, group=pair, transport=name) for name in ("auto", "torch_dist")]
        assert torch.equal(*outs)
    else:
        with pytest.raises(ValueError, match="does not contain this rank"):
            ringspan.ring_attention(q, q, q, group=pair)
    with pytest.raises(ValueError, match="1-D DeviceMesh"):
        ringspan.ring_attention(q, q, q, group=mesh)
    some = DeviceMesh("cpu", [1, 2])
    for call in (lambda: ringspan.ring_attention(q, q, q, group=some), lambda: ringspan.shard(q, 2, group=some)):
        if rank in (1, 2):
            call()
        else:
            with pytest.raises(ringspan.ArgumentError, match="does not contain this rank"):
                call()
    another_order = DeviceMesh("cpu", [[1, 0], [3, 2]], mesh_dim_names=("dp", "cp"))["cp"]  # its group's is ascending
    for call in (ringspan.ring_attention, ringspan.shard):
        args = (q, q, q) if call is ringspan.ring_attention else (q, 2)
        with pytest.raises(ringspan.ArgumentError, match=r"ranks ascend(.|\n)*got  ranks (1, 0|3, 2)\n"):
            call(*args, group=another_order)
    ringspan.ring_attention(q, q, q, group=another_order.get_group())
    with pytest.raises(TypeError, match="group is not a group"):
        ringspan.ring_attention(q, q, q, group="world")
    with pytest.raises(ValueError, match="cannot serve this group"):
        ringspan.ring_attention(q, q, q, transport="local")
    return found


def test_groups_within_groups_and_two_groups_at_once_do_not_mix():
    case = Case(60, layout="zigzag", options=dict(causal=True))
    for mine in results(run_processes(groups_in_groups, 4)):
        for found in mine:
            check(case, found)


def spmd(rank):
    from test_spmd import Spmd, both

    groups = ((0, 3), (1, 2))
    place = next(i for i, members in enumerate(groups) if rank in members)
    case = Spmd(50, 2, h=3, causal=True, striped=True, seed=place)
    return both(None, case, groups[place].index(rank), replica_groups=groups)


def test_spmd_rings_run_side_by_side_on_one_process_group():
    from test_spmd import Spmd

    found = results(run_processes(spmd, 4))
    for place, members in enumerate(((0, 3), (1, 2))):
        Spmd(50, 2, h=3, causal=True, striped=True, seed=place).check([found[rank] for rank in members])


def buffers_of_a_call(rank):
    """How many buffers a forward and a backward over gloo allocate, and what is under way afterwards."""
    made = []
    allocate = torch_dist.allocate
    torch_dist.allocate = lambda spec: made.append(spec) or allocate(spec)
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    out = ringspan.ring_attention(q, q, q, transport="torch_dist")
    forward = len(made)
    out.sum().backward()
    backward = len(made) - forward
    # What the last rank does last here is to send a gradient home.
    ringspan.ring_attention(q, q, q, causal=True, transport="torch_dist").sum().backward()
    return forward, backward, len(transport_of(dist.group.WORLD).torch_dist.under_way)


def test_buffers_ping_pong():
    """The shard in use and the one that arrives; in the backward gradients too, one arriving, in work and leaving."""
    for forward, backward, under_way in results(run_processes(buffers_of_a_call, 5)):
        assert forward == 2 and backward <= 2 + 3 and not under_way


def many_calls(rank):
    def open_files():
        return len(os.listdir("/proc/self/fd"))

    case = Case(40, 2, 1, 8, layout="striped", options=dict(causal=True))
    for _ in range(3):
        ring(None, case)
    before = open_files(), threading.active_count()
    first = ring(None, case)
    for _ in range(50):
        again = ring(None, case)
    gc.collect()
    assert all(torch.equal(again[name], x) for name, x in first.items())
    # gloo lets go of some files late, and the store opens one for an instant: what counts is that none pile up.
    after = open_files(), threading.active_count()
    assert all(x <= y + 1 for x, y in zip(after, before, strict=True)), (before, after)


def test_many_calls_leave_no_file_and_no_thread_behind():
    results(run_processes(many_calls, 3))


def threads_of_a_group(rank):
    """Those that wait for gloo and for the store, and which of them go on after the group is destroyed."""
    before, group = set(threading.enumerate()), dist.new_group([0, 1])
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    ringspan.ring_attention(q, q, q, group=group, transport="torch_dist").sum().backward()
    made = [thread for thread in threading.enumerate() if thread not in before and "ringspan" in thread.name]
    dist.destroy_process_group(group)
    del group
    gc.collect()
    for thread in made:
        thread.join(10)
    return [thread.name.split("-of-")[0] for thread in made], [thread.name for thread in made if thread.is_alive()]


def test_a_group_that_is_destroyed_takes_its_threads_with_it():
    for names, alive in results(run_processes(threads_of_a_group, 2)):
        assert {"ringspan-waits-lane-0-receives", "ringspan-asks-the-store"} <= set(names) and not alive, alive


class NamedGroup:
    """What the bulletin of a group needs of it."""

    group_name = "0"

    def __init__(self, store, rank):
        self.get_group_store, self.rank = lambda: store, lambda: rank


def test_a_new_group_of_the_same_name_knows_nothing_of_the_failures_of_the_old_one():
    store = dist.HashStore()
    old = Bulletin(NamedGroup(store, 0))
    old.report(0, "no room")
    assert old.first_failure() == (0, "no room")
    new = Bulletin(NamedGroup(store, 0))
    assert new.first_failure() is None and old.first_failure() == (0, "no room")


def test_of_several_failures_the_first_counts_however_long_its_reason_is():
    store = dist.HashStore()
    both = [Bulletin(NamedGroup(store, rank)) for rank in range(2)]
    both[1].report(1, "ü" * 5000)
    both[0].report(0, "gave up waiting for rank 1")
    for left in both:
        rank, reason = left.first_failure()
        assert rank == 1 and reason.startswith("üüü")


def settle(rank):
    transport = transport_of(dist.group.WORLD)
    left = transport.torch_dist._bulletin
    left.life += rank  # as if rank 1 had made calls on a group of that name before, and rank 0 none
    transport.begin_call()
    return left.life


def test_ranks_agree_on_how_many_groups_had_the_name():
    assert results(run_processes(settle, 2)) == [2, 2]


def outlive_the_store(rank, port):
    """Rank 0 hosts the store and is done first; the others go on with a call that it has no part in any more."""
    dist.destroy_process_group()
    store = dist.TCPStore("127.0.0.1", port, 3, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timedelta(seconds=30))
    segments.why_unsupported = lambda: "this test is of torch_dist"
    q, k, v = (torch.randn(1, 1, 8, 4, generator=torch.Generator().manual_seed(rank)) for _ in range(3))
    pids: list = [None] * 3
    dist.all_gather_object(pids, os.getpid())
    ringspan.ring_attention(q, k, v, causal=True)
    if rank == 1:
        host = os.pidfd_open(pids[0])
        for kernel in KERNELS:
            kernel.absorb_runs = functools.partial(wait_for_the_end_of, host, kernel.absorb_runs)
    out = ringspan.ring_attention(q, k, v, causal=True)
    if rank == 0:
        os._exit(0)
    dist.destroy_process_group = lambda: None  # what it would ask of the store cannot be had
    return out


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for_the_end_of(process, absorb, *args):
    assert select.select([process], [], [], 20)[0]
    threading.Event().wait(5 * WATCH_S)  # so that rank 2, which waits for this one, looks for the store
    absorb(*args)


def test_a_rank_that_is_done_first_may_take_the_store_with_it():
    _, *others = run_processes(outlive_the_store, 3, free_port(), limit_s=60)
    for ending in others:
        assert ending.error is None, ending.trace
        assert ending.value.shape == (1, 1, 8, 4)


def test_which_of_several_waits_failed_is_known():
    """Its rank is the one that is named."""
    waiter, works = Waiter("of-a-test"), [SimpleNamespace(wait=lambda: None), SimpleNamespace(wait=lambda: 1 / 0)]
    outcome = waiter.wait_for(works)
    with pytest.raises(RuntimeError, match="division by zero"):  # whatever kind of error it was
        outcome.result(60)
    assert outcome.position == 1
    waiter.stop()


class SilentStore:
    """One whose host has been stopped."""

    def __init__(self):
        self.goes_on = threading.Event()
        self.check = self.compare_set = self.set = lambda *_: self.goes_on.wait()

    def clone(self):
        return self

    def add(self, key, number):
        return number


@pytest.mark.timeout(20)
def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(bulletin, "_STORE_S", 0.05)
    store = SilentStore()
    left = Bulletin(NamedGroup(store, 0))
    try:
        left.report(0, "no room")
        monkeypatch.setattr(bulletin, "_STORE_S", 600)  # which only an answer would give it again
        assert left.first_failure() == (None, "the process group's store is gone (no answer)")
        assert left.roll_call(0, 2, 1) == ""
    finally:
        store.goes_on.set()


def outlast_a_stopped_host(rank, port, in_place):
    """Rank 0 hosts the store and is stopped. Nothing ends the others' wait but the group's timeout."""
    dist.destroy_process_group()
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=2))
    if not in_place:
        segments.why_unsupported = lambda: "this test is of torch_dist"
    bulletin._STORE_S = 0.2
    pids: list = [None] * 2
    dist.all_gather_object(pids, os.getpid())
    q = torch.ones(1, 1, 4, 2)
    ringspan.ring_attention(q, q, q)
    dist.destroy_process_group = lambda: None  # what it would ask of the store may not be had
    if rank == 0:
        store.set("done", "")
        store.wait(["told"])
        return None
    store.wait(["done"])  # or it would be stopped in the call before, and fail in that
    os.kill(pids[0], signal.SIGSTOP)
    try:
        ringspan.ring_attention(q, q, q)
    except ringspan.RankFailedError as error:
        return str(error)
    finally:
        os.kill(pids[0], signal.SIGCONT)
        store.set("told", "")


@pytest.mark.parametrize("in_place", [True, False])
def test_a_stopped_rank_that_hosts_the_store_is_not_waited_for_beyond_the_timeout(in_place):
    _, told = results(run_processes(outlast_a_stopped_host, 2, free_port(), in_place, limit_s=60))
    assert isinstance(told, str) and "to begin call" in told, told


def fail_before_its_keys_are_sent(rank):
    """Rank 0 fails when rank 1 has not come to receive its keys, and overwrites them."""
    q, k, v = (torch.randn(1, 1, 64, 16) for _ in range(3))
    store = dist.group.WORLD.get_group_store()
    options = dict(causal=True, transport="torch_dist")
    ringspan.ring_attention(q, k, v, **options)

    def fail(*_):
        store.wait(["posting"])
        raise MemoryError("no room for this tile")

    def late(*args, post=torch_dist._DistChannel.post):
        store.set("posting", "")
        store.wait(["overwritten"])
        return post(*args)

    if rank == 1:
        torch_dist._DistChannel.post = late
    try:
        if rank == 0:
            for kernel in KERNELS:
                kernel.absorb_runs = fail
        return ringspan.ring_attention(q, k, v, **options)
    except MemoryError:
        k.fill_(float("nan"))
        v.fill_(float("nan"))
        store.set("overwritten", "")
        store.wait(["told"])
    except ringspan.RankFailedError as error:
        return str(error)
    finally:
        if rank == 1:
            store.set("told", "")


def test_what_gloo_has_not_sent_when_a_rank_fails_does_not_arrive():
    _, told = results(run_processes(fail_before_its_keys_are_sent, 2, group_timeout_s=20, limit_s=60))
    assert isinstance(told, str) and "rank 0 failed first: MemoryError: no room for this tile" in told, told


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("timeout_s", "no_store_s"), [(0.1, 600.0), (600.0, 0.1)])
def test_without_a_store_a_wait_lasts_no_longer_than_the_groups_timeout_or_the_bound(
    monkeypatch, timeout_s, no_store_s
):
    monkeypatch.setattr(torch_dist, "_NO_STORE_S", no_store_s)
    transport = object.__new__(torch_dist.TorchDistTransport)
    transport.rank, transport.size, transport.timeout_s = 1, 2, timeout_s
    transport._bulletin = Bulletin(NamedGroup(dist.HashStore(), 1))
    transport._bulletin.first_failure = lambda: (None, "the store is gone")
    with pytest.raises(ringspan.RankFailedError, match="the store is gone"):
        transport.wait([], Outcome(), ["0"], lambda peer: f"rank {peer}")


def call_on_a_destroyed_group(rank):
    group, q = dist.new_group([0, 1]), torch.ones(1, 1, 4, 2)
    ringspan.ring_attention(q, q, q, group=group)
    dist.barrier()
    dist.destroy_process_group(group)
    for call in (
        lambda: ringspan.ring_attention(q, q, q, group=group),
        lambda: ringspan.shard(q, 2, group=group),
        lambda: ringspan.unshard(q, 2, group=group),
    ):
        with pytest.raises(ringspan.ArgumentError, match="the process group is gone"):
            call()


def test_calls_on_a_destroyed_group_are_refused():
    results(run_processes(call_on_a_destroyed_group, 2))


def test_a_group_that_only_pretends_to_exchange_is_refused():
    from torch.testing._internal.distributed.fake_pg import FakeStore  # makes the backend known

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        x = torch.ones(1, 1, 4, 8)
        for call in (lambda: ringspan.ring_attention(x, x, x), lambda: ringspan.unshard(x, 2)):
            with pytest.raises(ringspan.UnsupportedError, match=r"cannot exchange anything(.|\n)*its backend is fake"):
                call()
    finally:
        dist.destroy_process_group()
