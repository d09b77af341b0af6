"""The order of streams: rings of threads that each have a stream of their own, under a happens-before checker."""

from contextlib import contextmanager

import pytest
import torch
from happens_before import Watched, leave_out, recorded_streams

import ringspan
from ringspan import call, run_local
from ringspan.layout import from_lengths
from ringspan.options import Options
from ringspan.transport import local, streams
from ringspan.transport.contract import Parcel, spec_of
from ringspan.transport.streams import CudaStreams

ON_GPU = streams._on_gpu


@pytest.fixture
def recorder(monkeypatch):
    """Rings of threads behave as on a GPU whose every operation is recorded."""
    monkeypatch.setattr(local, "streams_of", lambda device_type: CudaStreams())
    with recorded_streams(monkeypatch) as recorder:
        yield recorder


def ring_of_threads(recorder, num_ranks=3, tokens=13, options=None, queries=None):
    """Forward and backward, kernel and all; inputs are made by the caller, overwritten by their ranks at the end.

    queries: how many there are, if not as many as tokens.
    """
    options = options or Options(right=0, layout="zigzag", kernel="reference")
    layout, layout_of_queries = (
        from_lengths(options.layout, tuple(n // num_ranks + (r < n % num_ranks) for r in range(num_ranks)))
        for n in (tokens, tokens if queries is None else queries)
    )

    def work(group):
        with Watched(recorder):
            where, mine = (
                [place for held in x.ranges(group.rank()) for place in held] for x in (layout, layout_of_queries)
            )
            q, k, v, do = (x[:, :, places] for x, places in zip(whole, (mine, where, where, mine), strict=True))
            out, lse = call.forward(group.transport, q, k, v, options)
            found = call.backward(group.transport, do, None, (q, k, v, out, lse), options)
            call.forward(group.transport, q, k, v, options)  # after it no gradient comes home that orders the rest
            for x in (q, k, v, do, out, lse):
                x.zero_()
            return found

    with Watched(recorder):
        whole = torch.randn(4, 1, 2, tokens, 4)
        for grads in run_local(work, num_ranks, timeout=60):
            for x in grads:
                x.zero_()


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("mask", [dict(), dict(right=0), dict(left=3, right=0), dict(cu_seqlens=(0, 2, 12, 12))])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_access_in_a_ring_of_threads_is_ordered_by_events(recorder, layout, mask, num_ranks):
    ring_of_threads(recorder, num_ranks, 12, Options(layout=layout, kernel="reference", **mask))
    assert recorder.num_accesses > 100
    assert recorder.races == []


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_access_is_ordered_where_queries_travel(recorder, num_ranks):
    ring_of_threads(recorder, num_ranks, 30, Options(kernel="reference"), queries=5)
    assert recorder.num_accesses > 100
    assert recorder.races == []


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_access_is_ordered_where_all_ranks_have_the_queries(recorder, num_ranks):
    def work(group):
        with Watched(recorder):
            k, v = (x[group.rank()].clone() for x in keys)
            for _ in range(2):
                for x in call.decode(group.transport, q, k, v, Options(kernel="reference")):
                    x.zero_()
            k.zero_(), v.zero_()

    with Watched(recorder):
        q, keys = torch.randn(1, 2, 3, 4), torch.randn(2, num_ranks, 1, 2, 6, 4)
        run_local(work, num_ranks, timeout=60)
    assert recorder.num_accesses > 50
    assert recorder.races == []


def test_a_reader_s_mark_is_there_before_its_owner_may_see_that_it_is_done(recorder):
    class Counts(dict):
        def __setitem__(self, call, left):
            assert left or box.read[call]
            super().__setitem__(call, left)

    def work(group):
        nonlocal box
        transport = group.transport
        box = transport._board.boxes[0]
        if transport.rank == 0:
            box.num_readers = Counts()
        transport.agree(transport.begin_call(), b"x")
        channel = transport.channel(1, range(2))
        mine = torch.zeros(1)
        if transport.rank == 0:
            channel.post(0, 0, [(1, Parcel((mine,)))])
        else:
            (parcel,) = channel.post(0, 0, (), [(0, spec_of([mine]))]).wait()
            channel.release(parcel)
        channel.close()

    box = None
    run_local(work, 2, timeout=60)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("mark", "post"),
        ("follow", "take"),
        ("hold", "take"),
        ("mark", "release"),
        ("follow", "close"),
        ("mark", "run_local"),
        ("follow", "work"),
        ("mark", "work"),
        ("follow", "run_local"),
    ],
)
def test_without_any_one_of_its_events_a_ring_of_threads_has_races(recorder, monkeypatch, name, where):
    left_out = leave_out(monkeypatch, CudaStreams, name, where)
    ring_of_threads(recorder)
    assert left_out and recorder.races


def test_the_caller_s_stream_follows_that_of_a_worker_that_failed(recorder):
    with Watched(recorder):
        mine = [torch.zeros(3) for _ in range(2)]

    def work(group):
        with Watched(recorder):
            mine[group.rank()].add_(1)
        if group.rank() == 1:
            raise ValueError("out of luck")

    with pytest.raises(ringspan.WorkerError, match="rank 1 of run_local raised ValueError: out of luck"):
        run_local(work, 2)
    with Watched(recorder):
        for x in mine:
            x.zero_()
    assert recorder.num_accesses >= 6 and recorder.races == []


def test_the_error_of_a_worker_comes_out_where_its_gpu_is_done_for(recorder, monkeypatch):
    def work(group):
        monkeypatch.setattr(CudaStreams, "mark", lambda self: 1 / 0)
        raise ValueError("an illegal access")

    with pytest.raises(ringspan.WorkerError, match="ValueError: an illegal access"):
        run_local(work, 1)


def test_the_error_of_a_worker_comes_out_where_the_caller_s_gpu_is_done_for_too(recorder, monkeypatch):
    def work(group):
        monkeypatch.setattr(CudaStreams, "follow", lambda self, mark: 1 / 0)
        raise ValueError("an illegal access")

    with pytest.raises(ringspan.WorkerError, match="rank 0 of run_local raised ValueError: an illegal access"):
        run_local(work, 1)


def rings_inside_of_rings(recorder) -> list[tuple[str, list[str]]]:
    """Each worker's stream, and those of the ring that it runs, whose results it reads."""

    def inner(group):
        with Watched(recorder):
            return recorder.current, torch.ones(3)

    def outer(group):
        with Watched(recorder):
            found = run_local(inner, 2)
            for _, x in found:
                x.add_(1)
            return recorder.current, [stream for stream, _ in found]

    return run_local(outer, 2)


def test_rings_inside_of_rings_have_streams_of_their_own_and_their_results_are_held(recorder):
    found = rings_inside_of_rings(recorder)
    every = [stream for outer, inner in found for stream in (outer, *inner)]
    assert len(set(every)) == 6
    assert recorder.races == []
    assert rings_inside_of_rings(recorder) == found, "and the same in the next call"


def test_results_that_nobody_holds_are_noticed(recorder, monkeypatch):
    monkeypatch.setattr(CudaStreams, "hold", lambda self, tensors: None)
    rings_inside_of_rings(recorder)
    assert any("without holding it" in race for race in recorder.races)


def test_workers_run_on_the_device_of_their_caller(recorder, monkeypatch):
    """A new thread's own is the first one."""
    entered = []

    @contextmanager
    def device(number):
        entered.append(number)
        yield

    monkeypatch.setattr(streams.torch.cuda, "device", device)
    monkeypatch.setattr(streams.torch.cuda, "current_device", lambda: 3)
    run_local(lambda group: None, 2)
    assert entered == [3, 3]


def test_results_that_lie_on_the_cpu_are_not_held(recorder, monkeypatch):
    """torch has no stream to hold them for."""
    monkeypatch.setattr(streams, "_on_gpu", ON_GPU)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: pytest.fail("this tensor has no stream"))
    run_local(lambda group: torch.ones(3), 2)


def test_workers_run_backward_in_their_own_thread_on_every_device():
    assert torch.autograd.is_multithreading_enabled()
    assert run_local(lambda group: torch.autograd.is_multithreading_enabled(), 2) == [False, False]


def test_workers_on_two_devices_are_refused():
    there, here = torch.zeros(3, device="meta"), torch.zeros(3)

    def work(group):
        channel = group.transport.channel(group.transport.begin_call(), range(2))
        if channel.rank == 0:
            channel.post(0, 0, [(1, Parcel((there,)))]).wait()
        else:
            channel.post(0, 0, (), [(0, spec_of([here]))]).wait()

    with pytest.raises(NotImplementedError, match=r"on one device(.|\n)*meta on rank 0, cpu on the rank that reads"):
        run_local(work, 2, timeout=30)


def test_a_cpu_has_no_streams_to_order():
    cpu = streams.streams_of("cpu")
    assert streams.streams_in_use() is cpu and cpu.mark() is None
    cpu.follow(None)
    cpu.hold([torch.zeros(1)])
    with cpu.own(0):
        pass
