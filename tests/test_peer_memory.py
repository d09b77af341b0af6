"""Peer memory without a GPU: between processes over memory of the host, and between threads whose streams are recorded.

What a GPU does with it is in test_gpu.py.
"""

import gc
import multiprocessing as mp
import signal
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from happens_before import Watched, leave_out, recorded_streams
from host_peers import HostMemory, RecordedMemory, RecordedWorld
from one_process import ends
from processes import results, run_processes
from test_transport_shared_memory import call_until_killed, shards
from transport_behaviour import BEHAVIOURS, NUM_RANKS, opened, parcel_of, same, spec_of
from whole import Case, check, ring

import ringspan
from ringspan import call
from ringspan.layout import from_lengths
from ringspan.options import Options
from ringspan.transport import device_memory, peer_channel, peer_memory, peer_trial, process_group, streams
from ringspan.transport.contract import Parcel, allocate
from ringspan.transport.peer_memory import PeerMemory
from ringspan.transport.peer_trial import connect
from ringspan.transport.process_group import ProcessGroupTransport, transport_of
from ringspan.transport.streams import CudaStreams, Streams

RANKS = 3


def world():
    return transport_of(dist.group.WORLD)


def connected(memory=HostMemory):
    """This rank's peer memory, or the reason why there is none."""
    transport = world()
    transport.begin_call()
    return connect(transport.shared_memory, memory)


def carry_everything(memory=HostMemory):
    """Have every call of this process on a process group go through peer memory."""
    process_group.peer_trial.connect = lambda control: connect(control, memory)
    ProcessGroupTransport._carrier = lambda self, via, device_type: self._peers()


def behave(rank, place):
    BEHAVIOURS[place](connected())


@pytest.mark.parametrize("place", range(len(BEHAVIOURS)), ids=[behaviour.__name__ for behaviour in BEHAVIOURS])
def test_between_processes(place):
    results(run_processes(behave, NUM_RANKS, place))


CASES = [
    Case(61, 2, 2, 16, layout="zigzag", options=dict(causal=True)),
    Case(40, 4, 2, 8, dtype=torch.bfloat16, layout="striped", options=dict(causal=True)),
    Case(33, 2, 1, 16, options=dict(window_size=(5, 3))),
    Case(50, 2, 2, 8, options=dict(cu_seqlens=(0, 7, 7, 31, 50), causal=True)),
    Case(2, 1, 1, 4, options=dict(causal=True)),
]


def whole_rings(rank):
    carry_everything()
    found = [ring(None, case) for case in CASES for _ in range(2)]
    assert isinstance(world()._peers(), PeerMemory) and world()._peers() is world()._peers()
    assert not world()._peers().control._loans and world()._peers().gpu.num_delays == peer_trial._ROUNDS
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_forward_and_backward_are_exact(num_ranks):
    for found in results(run_processes(whole_rings, num_ranks)):
        for place, one in enumerate(found):
            check(CASES[place // 2], one)
            for name, x in one.items():
                assert torch.equal(x, found[place - place % 2][name]), f"{name} of the second run"


def few_queries(rank):
    carry_everything()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8, generator=generator) for n in (3, 20, 20))
    mine = (ringspan.shard(x, 2) for x in (k, v))
    decoded = ringspan.decode_attention(q, *mine)
    mine = (ringspan.shard(x, 2) for x in (q, k, v))
    return decoded, ringspan.unshard(ringspan.ring_attention(*mine), 2)


def test_decoding_and_queries_that_travel():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8, generator=generator) for n in (3, 20, 20))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for found in results(run_processes(few_queries, RANKS)):
        for out in found:
            torch.testing.assert_close(out, expected)


def count_windows(rank):
    """What 20 calls made and opened after 3 like them; what is still open where sizes change all the time."""
    carry_everything()
    case = Case(120, 2, 2, 16, layout="zigzag", options=dict(causal=True))
    for _ in range(3):
        ring(None, case)
    peers = world()._peers()
    memory = peers.gpu
    before = (memory.num_shared, memory.num_opened)
    for _ in range(20):
        ring(None, case)
    steady = (memory.num_shared - before[0], memory.num_opened - before[1])
    windows = []
    for tokens in [*range(40, 4000, 180)] * 2:
        ring(None, Case(tokens, 2, 1, 16, layout="striped", options=dict(causal=True)))
        windows.append(max(len(peer.windows) for peer in peers.peers.values()))
    return steady, windows


def test_windows_are_reused_and_opened_once_and_those_that_are_gone_are_let_go():
    for steady, windows in results(run_processes(count_windows, RANKS)):
        assert steady == (0, 0)
        assert max(windows) < 16, windows


class Refusing(HostMemory):
    def share(self, memory):
        raise NotImplementedError("cudaMallocAsync shares nothing\nand so on")


class Blind(HostMemory):
    def open(self, words):
        raise RuntimeError("CUDA error: peer access is not supported between these two devices")


class Stale(HostMemory):
    """Whoever reads does not wait: it finds what was there when it came the first time."""

    def open(self, words):
        there = super().open(words)

        class Memory:
            def clone(self):
                self.seen = getattr(self, "seen", there.clone())
                return self.seen

        return Memory()


class Stuck(HostMemory):
    """A GPU that never comes to what was launched."""

    def is_done(self, event):
        return False


class Full(HostMemory):
    def delay(self):
        raise torch.OutOfMemoryError("CUDA out of memory")


def try_to_connect(rank, memory, victim):
    return connected(memory if rank == victim else HostMemory)


@pytest.mark.parametrize(
    ("memory", "told"),
    [
        (Refusing, "rank 1: NotImplementedError: cudaMallocAsync shares nothing"),
        (Blind, "rank 1: RuntimeError: CUDA error: peer access is not supported between these two devices"),
        (Full, "rank 1: OutOfMemoryError: CUDA out of memory"),
        (Stale, "rank 1: read 1048576 of 1048576 bytes of rank 0 wrongly"),
    ],
)
def test_where_a_rank_cannot_all_of_them_know_why(memory, told):
    assert results(run_processes(try_to_connect, RANKS, memory, 1)) == [told] * RANKS


def test_a_gpu_that_never_reads_is_every_rank_s_reason_within_the_timeout():
    told = "rank 1: nothing of rank 0 could be read within 2 s"
    assert results(run_processes(try_to_connect, RANKS, Stuck, 1, group_timeout_s=4)) == [told] * RANKS


def test_a_trial_has_a_round_that_finds_what_was_not_waited_for():
    """In the first one a reader that is too early finds what was never written."""
    assert peer_trial._ROUNDS >= 2
    values = {(number, rank): peer_trial._Trial._value(None, number, rank) for number in (0, 1) for rank in range(8)}
    assert len(set(values.values())) == len(values) and not {0, 0xFF} & set(values.values())


def ask_for_it(rank):
    x = torch.randn(1, 2, 5, 8)
    messages = []
    for group in (None, dist.new_group([0, 1])):
        with pytest.raises(ringspan.UnsupportedError) as caught:
            ringspan.ring_attention(x, x, x, group=group, transport="peer_memory")
        messages.append(str(caught.value))
    torch.testing.assert_close(ringspan.ring_attention(x, x, x), ringspan.ring_attention(x, x, x))
    return messages


def test_tensors_on_cpus_are_refused_and_the_group_works_on():
    for messages in results(run_processes(ask_for_it, 2)):
        for message in messages:
            assert "transport='peer_memory' cannot serve this call" in message and "the tensors are on cpu" in message


def carriers(rank):
    transport = world()
    transport.begin_call()
    found = {}
    for via in ("auto", "peer_memory"):
        with pytest.raises(ringspan.UnsupportedError) as caught:
            transport._carrier(via, "cuda")
        found[via] = str(caught.value)
    assert transport._carrier("auto", "cpu") is transport._carrier("shared_memory", "cpu") is transport.shared_memory
    assert transport._carrier("torch_dist", "cpu") is transport.torch_dist
    with pytest.raises(ringspan.UnsupportedError, match="the tensors are on cuda"):
        transport._carrier("shared_memory", "cuda")
    transport._peer_memory = there = connected()
    assert transport._carrier("auto", "cuda") is transport._carrier("peer_memory", "cuda") is there
    transport.torch_dist._backends["cuda"] = "nccl"
    assert transport._carrier("auto", "cuda") is transport.torch_dist
    assert transport._carrier("peer_memory", "cuda") is there
    return found


def test_peer_memory_carries_what_was_asked_of_it_and_what_nothing_else_can():
    for found in results(run_processes(carriers, 2)):
        assert "cannot serve this call" in found["peer_memory"] and "rank 0: " in found["peer_memory"]
        assert "it has gloo for them, and of peer memory: rank 0: " in found["auto"] and "cuda:nccl" in found["auto"]


def on_two_hosts(rank):
    transport = world()
    transport._tried, transport.why_not_shared = True, "rank 1 is on another host"
    return transport._peers()


def test_ranks_of_several_hosts_have_none():
    told = "its ranks must be processes of one host: rank 1 is on another host"
    assert results(run_processes(on_two_hosts, 2)) == [told] * 2


class Elsewhere(HostMemory):
    device = torch.device("cuda:0")

    def is_current(self):
        return False


def on_another_gpu(rank):
    transport = connected(Elsewhere if rank == 1 else HostMemory)
    try:
        channel = opened(transport, range(2))
        channel.post(0, 0, (), [(1 - rank, spec_of(parcel_of(1 - rank)))]).wait()
    except ringspan.RingspanError as error:
        return str(error)


def test_a_call_on_another_gpu_is_refused_and_the_others_are_told():
    others, mine = results(run_processes(on_another_gpu, 2))
    assert "must stay on the GPU of the first one" in mine and "another GPU than cuda:0 on rank 1" in mine
    assert "rank 1 failed first: UnsupportedError" in others


def in_a_capture(rank):
    """Nothing is tried in it, and so nothing is found to fail."""
    transport = world()
    transport.begin_call()
    torch.cuda.is_available = torch.cuda.is_current_stream_capturing = lambda: True
    for via in ("auto", "peer_memory"):
        with pytest.raises(ringspan.UnsupportedError, match=r"cannot be captured into a CUDA graph(.|\n)*torch_dist"):
            transport._carrier(via, "cuda")
    assert transport._peer_memory is None


def test_a_capture_is_refused():
    results(run_processes(in_a_capture, 2))


def killed_in_a_call(rank, victim, wait_s):
    carry_everything()
    return call_until_killed(rank, victim, wait_s)


@pytest.mark.parametrize("wait_s", [0.001, 0.0173, 0.0389])
def test_a_rank_killed_at_any_moment_is_named(wait_s):
    endings = run_processes(killed_in_a_call, 4, 3, wait_s)
    assert endings[3].exitcode == -signal.SIGKILL
    told = [endings[rank].value for rank in range(3)]
    assert all(told) and all("rank 3" in text for text in told), endings


def fail_at_a_copy(rank):
    carry_everything()
    ringspan.ring_attention(*shards(rank))
    if rank == 1:
        peer_channel.PeerChannel.pull = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room"))
    try:
        ringspan.ring_attention(*shards(rank))
    except (ringspan.RankFailedError, torch.OutOfMemoryError) as error:
        return str(error)


def test_a_rank_that_fails_in_the_middle_is_named():
    first, second, third = results(run_processes(fail_at_a_copy, RANKS, group_timeout_s=20))
    assert second == "no room"
    for told in (first, third):
        assert "rank 1 failed first: OutOfMemoryError: no room" in told


def open_what_is_gone(rank):
    carry_everything()
    ringspan.ring_attention(*shards(rank))

    def gone(words):
        raise RuntimeError("CUDA error: invalid resource handle\nCUDA kernel errors might be reported later")

    if rank == 1:
        world()._peers().gpu.open = gone
    with pytest.raises(ringspan.RankFailedError) as caught:
        ringspan.ring_attention(*(torch.cat([x, x], 2) for x in shards(rank)))  # in windows that nobody has opened
    return str(caught.value)


def test_whose_memory_cannot_be_opened_any_more_is_named():
    """A rank that was killed when it had sent its note."""
    first, second = results(run_processes(open_what_is_gone, 2, group_timeout_s=20))
    assert second.startswith("rank 1 cannot open the memory of rank 0.") and "invalid resource handle" in second
    assert "rank 1 failed first: RankFailedError: rank 1 cannot open the memory of rank 0" in first


@pytest.fixture
def recorder(monkeypatch):
    with recorded_streams(monkeypatch) as recorder:
        yield recorder


def in_threads(recorder, work, num_ranks=RANKS):
    """work(transport) in a thread for each rank, with a stream of its own that is recorded."""
    peers, controls, errors, found = RecordedWorld(recorder), ends(num_ranks), [], [None] * num_ranks

    def run(rank):
        try:
            on, watched = recorder.on(f"rank {rank}"), Watched(recorder)
            with on, watched, torch.autograd.set_multithreading_enabled(False):
                transport = connect(controls[rank], lambda: RecordedMemory(peers))
                assert isinstance(transport, PeerMemory), transport
                found[rank] = work(transport)
        except BaseException as error:
            errors.append(error)
            controls[rank].fail(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors[0]
    assert not any(thread.is_alive() for thread in threads)
    return found


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
def test_every_access_is_ordered_by_events(recorder, behaviour):
    in_threads(recorder, behaviour, NUM_RANKS)
    assert recorder.races == []


def attend(recorder, num_ranks=RANKS, tokens=13, options=None, queries=None):
    """Forward, backward, and a forward after it; each rank overwrites its tensors at the end."""
    options = options or Options(right=0, layout="zigzag", kernel="reference")
    layout, layout_of_queries = (
        from_lengths(options.layout, tuple(n // num_ranks + (r < n % num_ranks) for r in range(num_ranks)))
        for n in (tokens, tokens if queries is None else queries)
    )
    whole, shards = torch.randn(4, 1, 2, tokens, 4), []
    for rank in range(num_ranks):
        where, mine = ([place for held in x.ranges(rank) for place in held] for x in (layout, layout_of_queries))
        shards.append([x[:, :, places] for x, places in zip(whole, (mine, where, where, mine), strict=True)])

    def work(transport):
        q, k, v, do = shards[transport.rank]
        for _ in range(2):
            out, lse = call.forward(transport, q, k, v, options)
            found = call.backward(transport, do, None, (q, k, v, out, lse), options)
        call.forward(transport, q, k, v, options)
        for x in (q, k, v, do, out, lse, *found):
            x.zero_()

    in_threads(recorder, work, num_ranks)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("mask", [dict(), dict(right=0), dict(left=3, right=0), dict(cu_seqlens=(0, 2, 12, 12))])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_access_of_a_ring_is_ordered(recorder, layout, mask, num_ranks):
    attend(recorder, num_ranks, 12, Options(layout=layout, kernel="reference", **mask))
    assert recorder.num_accesses > 100
    assert recorder.races == []


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_access_is_ordered_where_queries_travel(recorder, num_ranks):
    attend(recorder, num_ranks, 30, Options(kernel="reference"), queries=5)
    assert recorder.races == []


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_access_is_ordered_where_all_ranks_have_the_queries(recorder, num_ranks):
    tensors = [[torch.randn(1, 2, n, 4) for n in (3, 6, 6)] for _ in range(num_ranks)]

    def work(transport):
        q, k, v = tensors[transport.rank]
        for _ in range(3):
            for x in call.decode(transport, q, k, v, Options(kernel="reference")):
                x.zero_()
        for x in (q, k, v):
            x.zero_()

    in_threads(recorder, work, num_ranks)
    assert recorder.races == []


def test_windows_are_let_go_when_they_have_been_read_whatever_stream_is_current(recorder):
    """Each call is on another stream, which nothing orders after the last, and needs a window larger than those that
    are there, so that they are given up."""
    found = []

    def work(transport):
        for number in range(12):
            with recorder.on(f"stream {number} of rank {transport.rank}"):
                channel = opened(transport, range(2))
                mine, other = parcel_of(channel.rank, ((1000 * (1 + number),),), (torch.float32,)), 1 - channel.rank
                (arrived,) = channel.post(0, 0, [(other, mine)], [(other, spec_of(mine))]).wait()
                channel.release(arrived)
                channel.close()
        found.append(len(transport.peers[other].windows))

    in_threads(recorder, work, 2)
    assert max(found) < 6, "none was let go"
    assert recorder.races == []


@pytest.mark.parametrize(
    ("owner", "name", "where"),
    [
        (RecordedMemory, "record", "post"),
        (RecordedMemory, "record", "pull"),
        (CudaStreams, "follow", "pull"),
        (CudaStreams, "follow", "window"),
        (CudaStreams, "follow", "wait"),
        (CudaStreams, "mark", "__init__"),
        (CudaStreams, "mark", "pull"),
        (CudaStreams, "hold", "pull"),
    ],
)
def test_without_any_one_of_its_events_it_has_races(recorder, monkeypatch, owner, name, where):
    left_out = leave_out(monkeypatch, owner, name, where)
    attend(recorder)
    assert left_out and recorder.races


class Marking(Streams):
    def mark(self):
        return "pulled"


class Asked(HostMemory):
    asked: tuple = ()

    def streams(self):
        return Marking()

    def is_done(self, event):
        self.asked += (event,)
        return True


def destroy(rank):
    """What is left when the group was destroyed, and what was waited for by then."""
    carry_everything(Asked)
    gc.disable()
    ringspan.ring_attention(*shards(rank))
    peers, memory = weakref.ref(world()._peers()), world()._peers().gpu
    memory.asked = ()
    dist.destroy_process_group()
    left = peers() is not None, memory.asked
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # what ends this process has one
    return left


def test_a_group_that_is_destroyed_waits_for_its_pulls_and_lets_go_of_its_memory_at_once():
    """Not when Python next looks for circles: a process may end before, and memory of a GPU is dear."""
    assert results(run_processes(destroy, RANKS)) == [(False, ("event",) * (RANKS - 1) + ("pulled",))] * RANKS


def test_work_that_was_launched_late_is_waited_for_at_the_end_of_a_process():
    asked, peers = [], dict.fromkeys(("read by 1", "read by 2", "pulled"), 3)

    def is_done(event):
        asked.append(event)
        if event == "read by 2":
            raise RuntimeError("an illegal access")
        peers[event] -= 1
        return peers[event] == 0

    life = peer_memory._Life(SimpleNamespace(is_done=is_done), ["read by 1", "read by 2"])
    life.last_pull = "pulled"
    life.drain()
    assert asked == ["read by 1"] * 3 + ["read by 2"] + ["pulled"] * 3


def test_what_is_never_done_does_not_keep_a_process_for_ever(monkeypatch):
    monkeypatch.setattr(peer_memory, "_DRAIN_S", 0.05)
    life = peer_memory._Life(SimpleNamespace(is_done=lambda event: False), ["a", "b"])
    begin = time.monotonic()
    life.drain()
    assert 0.05 <= time.monotonic() - begin < 5


def end_without_goodbye(told):
    """A child of multiprocessing, which runs none of Python's finalizers."""
    global kept
    kept = connect(ends(1)[0], HostMemory)
    kept.gpu.is_done = lambda event: told.send(event) or True
    kept.pulled("the last pull")


def test_a_child_of_multiprocessing_waits_too_though_it_destroys_no_group():
    mine, theirs = mp.Pipe(duplex=False)
    child = mp.get_context("forkserver").Process(target=end_without_goodbye, args=(theirs,), daemon=True)
    child.start()
    theirs.close()
    try:
        assert mine.poll(20) and mine.recv() == "the last pull"
    finally:
        child.join(20)
    assert child.exitcode == 0


def test_handles_are_text_on_the_way_and_what_torch_gave_at_both_ends_but_for_its_event(monkeypatch):
    given, seen = ("cuda:0", b"\x01h", 64, 512, b"counter\x00", 3, b"\xffe", True), []

    class Event:
        def __init__(self, interprocess):
            assert interprocess

        def ipc_handle(self):
            return b"\x00e\xfe"

        @staticmethod
        def from_ipc_handle(device, handle):
            return device, handle

    cuda = SimpleNamespace(
        Stream=lambda device: "a stream",
        current_device=lambda: 5,
        Event=Event,
        current_stream=lambda device: SimpleNamespace(cuda_stream=0),
    )
    fake = SimpleNamespace(
        cuda=cuda,
        device=torch.device,
        uint8=torch.uint8,
        inference_mode=torch.inference_mode,
        empty=lambda *size, **options: SimpleNamespace(set_=lambda storage: storage),
        UntypedStorage=SimpleNamespace(_new_shared_cuda=lambda *args: seen.append(args) or "storage"),
    )
    monkeypatch.setattr(device_memory, "torch", fake)
    monkeypatch.setattr(streams, "torch", fake)
    memory = device_memory.CudaMemory()
    shared = SimpleNamespace(nbytes=512, untyped_storage=lambda: SimpleNamespace(_share_cuda_=lambda: given))
    words = memory.share(shared)
    assert memory.open(words) == "storage"
    assert seen == [(5, *given[1:6], b"", False)], "on this rank's own GPU, whatever the number of the owner's"
    assert all(isinstance(word, (str, int)) for word in words)
    event = memory.open_event(memory.share_event(memory.new_event()))
    assert event == (torch.device("cuda", 5), b"\x00e\xfe")
    given = ("cuda:0", bytes(2500), *given[2:])
    with pytest.raises(ringspan.UnsupportedError, match=r"more words to share(.|\n)*512 bytes"):
        memory.share(shared)


def send_what_was_overwritten(rank):
    """The caller may overwrite at once: what is read is what was published."""
    transport = connected()
    channel = opened(transport, range(2))
    mine, other = parcel_of(rank), 1 - rank
    pending = channel.post(0, 0, [(other, mine)])
    kept = [x.clone() for x in mine.tensors]
    for x in mine.tensors:
        x.fill_(-1)
    (arrived,) = channel.post(0, 0, (), [(other, spec_of(mine))]).wait()
    assert same(arrived, parcel_of(other)) and len(kept) == 2
    pending.wait()
    channel.release(arrived)
    buffer = channel.buffer(spec_of(Parcel(allocate(spec_of(mine)))))
    assert all(x.isnan().all() for x in buffer.tensors), "fresh memory is poisoned here"
    channel.release(buffer)
    channel.close()


def test_what_is_published_is_a_copy():
    results(run_processes(send_what_was_overwritten, 2))


def post_early_and_late(rank):
    transport = connected()
    channel = opened(transport, range(2))
    first, second, other = parcel_of(rank), parcel_of(10 + rank), 1 - rank
    early = channel.post(0, 0, (), [(other, spec_of(first))])
    transport.agree(transport.begin_call(), b"posted")
    for index, parcel in enumerate((first, second)):
        channel.post(index, 0, [(other, parcel)])
    transport.agree(transport.begin_call(), b"sent")
    late = channel.post(1, 0, (), [(other, spec_of(second))])
    assert same(early.wait()[0], parcel_of(other))
    channel.close()  # nobody is to read any more
    assert same(late.wait()[0], parcel_of(10 + other))
    assert early.received_bytes == late.received_bytes == [sum(x.nbytes for x in first.tensors)]


def test_posting_waits_for_no_note_and_pulls_at_once_where_there_is_one():
    results(run_processes(post_early_and_late, 2, group_timeout_s=10))


def receive_other_lengths(rank):
    transport = connected()
    channel = opened(transport, range(2))
    most = 0
    for index, length in enumerate((7, 5, 6, 5, 4)):
        mine, other = parcel_of(rank, ((length,),), (torch.float32,)), 1 - rank
        (arrived,) = channel.post(index, 0, [(other, mine)], [(other, spec_of(mine))]).wait()
        channel.release(arrived)
        del arrived
        most = max(most, len(channel._spare))
    channel.close()
    return most, len(channel._spare)


def test_of_what_was_pulled_into_no_more_is_kept_than_one_length():
    assert results(run_processes(receive_other_lengths, 2)) == [(1, 0)] * 2
