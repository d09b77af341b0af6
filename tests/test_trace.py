"""Traces: every rank's computing and transfers, on one clock, in the form that Perfetto reads."""

import json
import time
from collections import Counter
from itertools import pairwise

import pytest
import torch
from processes import results, run_processes

import ringspan
from ringspan import observe, run_local
from ringspan.layout import from_lengths
from ringspan.problem import Mask
from ringspan.schedule.ring import ring_schedule
from ringspan.transport.contract import Pending

NUM_RANKS, NUM_TOKENS = 3, 50


def traced_call(group, file, transport="auto"):
    """A forward and a backward; also what an observer beside the trace was told of the forward."""
    q, k, v = (torch.randn(1, 2, NUM_TOKENS, 8, requires_grad=True) for _ in range(3))
    records: list[observe.StepRecord] = []
    with ringspan.trace(file, group=group):
        with observe.steps(records.append):
            out = ringspan.ring_attention(q, k, v, group=group, transport=transport)
        out.sum().backward()
    return records


def in_process(rank, file, transport):
    return traced_call(None, file, transport)


def events_of(file):
    events = json.loads(file.read_text())["traceEvents"]
    return [event for event in events if event["ph"] == "X"], [event for event in events if event["ph"] == "M"]


def assert_every_rank_computes_every_shard(timed, named):
    assert {event["args"]["name"] for event in named if event["name"] == "process_name"} == {
        f"rank {rank}" for rank in range(NUM_RANKS)
    }
    computed = Counter(
        (event["pid"], event["args"]["phase"], int(shard))
        for event in timed
        if event["tid"] == 0
        for shard in event["name"].removeprefix("shards").removeprefix("shard").split(",")
    )
    every = [(phase, shard) for phase in ("forward", "backward") for shard in range(NUM_RANKS)]
    assert computed == Counter((rank, *one) for rank in range(NUM_RANKS) for one in every)
    for rank in range(NUM_RANKS):  # a rank computes one thing at a time, and its clock runs forward
        mine = [(event["ts"], event["dur"]) for event in timed if (event["pid"], event["tid"]) == (rank, 0)]
        assert all(begin + length <= after for (begin, length), (after, _) in pairwise(mine))


def test_a_ring_of_threads_shows_its_steps_and_its_waits(tmp_path):
    file = tmp_path / "trace.json"
    run_local(traced_call, NUM_RANKS, file)
    timed, named = events_of(file)
    assert_every_rank_computes_every_shard(timed, named)
    assert {event["name"] for event in timed if event["tid"] == 1} == {"hand out", "wait for a core", "wait"}


def test_copied_shards_and_gradients_show_their_flights(tmp_path):
    file = tmp_path / "trace.json"
    told = results(run_processes(in_process, NUM_RANKS, file, "torch_dist"))
    timed, named = events_of(file)
    assert_every_rank_computes_every_shard(timed, named)
    flights = [event for event in timed if "bytes" in event["args"]]
    shards = [(event["pid"], event["name"]) for event in flights if event["args"]["phase"] == "forward"]
    expected = [
        (rank, f"shard {(rank - step) % NUM_RANKS} from rank {(rank - 1) % NUM_RANKS}")
        for rank in range(NUM_RANKS)
        for step in range(1, NUM_RANKS)
    ]
    assert sorted(shards) == sorted(expected)
    one_shard = 2 * (1 * 2 * NUM_TOKENS * 8 * 4)  # k and v
    assert {event["args"]["bytes"] for event in flights if event["args"]["phase"] == "forward"} == {one_shard}
    assert any(event["name"].startswith("gradient") for event in flights)
    for records in told:
        for record in records:
            assert record.begin_ns <= record.handed_ns <= record.posted_ns <= record.computed_ns <= record.end_ns
            for flight in record.flights:
                assert record.begin_ns <= flight.begin_ns <= flight.end_ns <= record.end_ns
            assert len(record.flights) == (record.step.receive is not None)


def test_shards_that_are_read_in_place_have_no_flight(tmp_path):
    told = results(run_processes(in_process, NUM_RANKS, tmp_path / "trace.json", "shared_memory"))
    assert_every_rank_computes_every_shard(*events_of(tmp_path / "trace.json"))
    assert all(not record.flights and record.flight_s == 0 for records in told for record in records)


def test_a_block_that_raises_writes_nothing_and_leaves_no_watcher(tmp_path):
    with pytest.raises(KeyError), ringspan.trace(tmp_path / "trace.json"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    assert not observe._thread.watchers


def test_a_trace_around_run_local_instead_of_within_it_says_that_it_is_empty(tmp_path):
    q = torch.randn(1, 2, 4, 8)
    with (
        pytest.warns(UserWarning, match=r"holds no call(.|\n)*within the function"),
        ringspan.trace(tmp_path / "t.json"),
    ):
        run_local(lambda group: ringspan.ring_attention(q, q, q), 2)


def test_ranks_of_another_host_are_moved_by_the_wall_clock():
    from ringspan.trace import _on_one_clock

    def rank(host, ahead_ns, begin_ns):
        return [{"host": host, "ahead_ns": ahead_ns}, {"ts": begin_ns, "dur": 3000, "pid": 0}]

    moved = _on_one_clock([rank("a", 1_000_000, 5000), rank("a", 1_000_007, 6000), rank("b", 4_000_000, 7000)])
    assert [event["ts"] for event in moved] == [5.0, 6.0, 3007.0]
    assert {event["dur"] for event in moved} == {3.0}


def test_what_has_arrived_before_its_posting_is_over_has_flown_for_no_time():
    class Early(Pending):
        received_bytes = (64,)

        def __init__(self):
            self.arrived_ns = time.perf_counter_ns()

        def wait(self):
            return []

    schedule = ring_schedule(Mask(8, 8), *[from_lengths("contiguous", (4, 4))] * 2, 0)
    records = []
    with observe.steps(records.append):
        clock = observe.StepClock("forward", schedule)
        pending = Early()
        clock.posted()
        clock.computed((0,))
        clock.finish(schedule.steps[0], pending)
    (flight,) = records[0].flights
    assert flight.begin_ns == flight.end_ns == pending.arrived_ns and records[0].flight_s == 0


@pytest.mark.parametrize("folder", ["nowhere", "no\udcffwhere"], ids=["a name", "a name that is no text"])
def test_a_trace_that_cannot_be_written_is_refused_before_the_work_on_every_rank(tmp_path, folder):
    q = torch.randn(1, 1, 4, 2)

    def work(group):
        refused = pytest.raises(ringspan.ArgumentError, match="the trace cannot be written")
        with refused as told, ringspan.trace(tmp_path / folder / "trace.json"):
            ringspan.ring_attention(q, q, q)
        return isinstance(told.value, ringspan.PeerRefusedError)

    assert run_local(work, 2, timeout=20) == [False, True]
    assert not list(tmp_path.iterdir())
