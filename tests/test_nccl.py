"""The torch.distributed transport under NCCL's rules: the order of posting, simulated, and whole rings of threads."""

import itertools
import threading
import time
import weakref
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field

import fake_nccl
import pytest
import torch
from definition import attention, relative_error
from happens_before import Recorder, Watched
from transport_behaviour import BEHAVIOURS, NUM_RANKS, opened, parcel_of, spec_of
from whole import Case, check

import ringspan
from ringspan import call, execute, reshard
from ringspan.agreement import Terms, agree
from ringspan.layout import from_lengths, split
from ringspan.options import Options
from ringspan.problem import Mask
from ringspan.schedule.ring import ring_schedule
from ringspan.transport import torch_dist
from ringspan.transport.contract import Channel, Parcel, Pending, allocate
from ringspan.transport.process_group import ProcessGroupTransport
from ringspan.transport.torch_dist import TorchDistTransport

LAYOUTS = ("contiguous", "striped", "zigzag")
# With what follows from them: rings, ranks that skip steps, shards that jump over ranks, ranks that do nothing.
MASKS = (
    dict(),
    dict(causal=True),
    dict(causal=True, window_size=(2, 0)),
    dict(window_size=(0, 5)),
    dict(cu_seqlens=(0, 1, 14, 14, 23, 37, 37)),
    dict(causal=True, cu_seqlens=(0, 5, 6, 30, 37)),
)
TOKENS = 37


@dataclass
class Posting(Channel):
    """A channel that only notes what is posted, and in which batches. Each entry: (what, peer, label)."""

    rank: int
    size: int
    in_order: bool
    batches: list = field(default_factory=list)
    _gathered: list | None = None

    def post(self, index, lane, sends=(), receives=()):
        label = (index, lane)
        entries = [("receive", peer, label) for peer, _ in receives] + [("send", peer, label) for peer, _ in sends]
        if self._gathered is not None:
            self._gathered += entries
        elif entries:
            self.batches.append(entries)
        return Arrived([spec for _, spec in receives])

    @contextmanager
    def together(self):
        self._gathered = []
        yield
        if self._gathered:
            self.batches.append(self._gathered)
        self._gathered = None

    def close(self):
        pass


class Arrived(Pending):
    def __init__(self, specs):
        self._specs = specs

    def wait(self):
        return [Parcel(allocate(spec)) for spec in self._specs]


class Idle:
    """A kernel that computes nothing."""

    enough_keys = 0

    def absorb_runs(self, *_):
        pass

    absorb_gradient = absorb_runs


class Blind(execute.Job):
    def visible(self, tile):
        return None


def posted(num_ranks, layout, options, direction, in_order=True):
    """Every rank's batches in one pass of the real loop."""
    causal, documents = options.get("causal", False), options.get("cu_seqlens")
    left, right = options.get("window_size", (-1, -1))
    mask = Mask(TOKENS, TOKENS, left, 0 if causal else right, documents)
    lengths = tuple(len(range(rank, TOKENS, num_ranks)) for rank in range(num_ranks))
    if layout == "zigzag":
        chunks = [len(range(chunk, TOKENS, 2 * num_ranks)) for chunk in range(2 * num_ranks)]
        lengths = tuple(chunks[rank] + chunks[-1 - rank] for rank in range(num_ranks))
    held, batches = from_lengths(layout, lengths), []
    for rank in range(num_ranks):
        travels = "queries" if direction.endswith("queries travel") else "keys"
        schedule = ring_schedule(mask, held, held, rank, travels, direction != "forward")
        num_travelling = 2 if travels == "keys" else 4 if direction.startswith("backward") else 1
        job = Blind(schedule, Idle(), 1.0, lengths, lengths, (False,) * num_travelling)
        channel = Posting(rank, num_ranks, in_order)
        x = torch.zeros(1, 1, lengths[rank], 1)
        if direction.startswith("forward"):
            execute.forward(job, channel, x, x, x)
        else:
            execute.backward(job, channel, x, x, x, x, x[..., 0], x[..., 0])
        batches.append(channel.batches)
    return batches


def stuck(batches):
    """What is left when batches run by NCCL's rules (see fake_nccl.py); raises where labels do not match."""
    queues = [deque([list(batch) for batch in mine]) for mine in batches]
    moved = True
    while moved:
        moved = False
        for rank, queue in enumerate(queues):
            for entry in list(queue[0]) if queue else ():
                what, peer, label = entry
                theirs = queues[peer][0] if queues[peer] else []
                # The first of each direction between two ranks: a later one does not overtake.
                mine_first = next(x for x in queue[0] if x[:2] == (what, peer))
                other = next((x for x in theirs if x[0] != what and x[1] == rank), None)
                if entry is mine_first and other is not None:
                    assert other[2] == label, f"rank {rank} {what}s {label}, rank {peer} {other[0]}s {other[2]}"
                    queue[0].remove(entry)
                    theirs.remove(other)
                    moved = True
        for queue in queues:
            while queue and not queue[0]:
                queue.popleft()
                moved = True
    return [list(queue) for queue in queues]


DIRECTIONS = ("forward", "forward, queries travel", "backward, keys travel", "backward, queries travel")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_posted_ends_under_ncclis_order_and_every_send_meets_its_receive(layout, direction):
    for num_ranks in range(1, 10):
        for options in MASKS:
            batches = posted(num_ranks, layout, options, direction)
            assert not any(stuck(batches)), (num_ranks, options)


def test_the_simulation_finds_the_circle_in_the_order_that_gloo_is_given():
    batches = posted(3, "contiguous", {}, "backward, keys travel", in_order=False)
    assert all(stuck(batches))


def test_the_simulation_finds_transfers_that_meet_the_wrong_ones():
    with pytest.raises(AssertionError, match="rank 0 sends"):
        stuck([[[("send", 1, (0, 0)), ("send", 1, (0, 1))]], [[("receive", 0, (0, 1)), ("receive", 0, (0, 0))]]])


def ranks(world, work):
    """work(transport) on a thread for each rank; results by rank, the first error raised."""
    results, errors = [None] * world.size, []

    def run(rank):
        try:
            results[rank] = work(TorchDistTransport(world.groups[rank]))
        except BaseException as error:
            errors.append(error)
            with world.changed:
                world.errors.append(f"rank {rank} raised {error!r}")
                world.changed.notify_all()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results


@pytest.fixture
def nccl(monkeypatch):
    fake_nccl.install(monkeypatch)


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
def test_torch_dist_under_ncclis_rules(nccl, behaviour):
    def work(transport):
        transport.agree(transport.begin_call(), b"x")  # in some behaviours not every rank opens a channel
        behaviour(transport)

    ranks(fake_nccl.World(NUM_RANKS), work)


def ring_of(case, transport, kernel="auto"):
    """As `whole.ring`, on a transport."""
    keys = case.tokens if case.keys is None else case.keys
    where, where_keys = (held_by(transport, case.layout, tokens) for tokens in (case.tokens, keys))
    places = (where, where_keys, where_keys, where, where)
    q, k, v, do, dlse = (x[:, :, place] for x, place in zip(case.tensors(), places, strict=True))
    mask = case.mask
    options = Options(mask.left, mask.right, mask.cu_seqlens, mask.key_ranges, case.layout, kernel=kernel)
    out, lse = call.forward(transport, q, k, v, options)
    dlse = torch.where(lse.isinf(), 0.0, dlse)
    dq, dk, dv = (grad.to(q.dtype) for grad in call.backward(transport, do, dlse, (q, k, v, out, lse), options))
    return {"out": (where, out), "lse": (where, lse), "dq": (where, dq), "dk": (where_keys, dk), "dv": (where_keys, dv)}


def held_by(transport, layout, tokens):
    ranges = split(layout, tokens, transport.size).ranges(transport.rank)
    return [place for span in ranges for place in span]


CASES = [
    Case(53, 4, kv_heads, 8, layout=layout, options=options)
    for layout in LAYOUTS
    for options, kv_heads in (
        ({}, 4),
        (dict(causal=True), 1),
        (dict(causal=True, window_size=(9, 0)), 4),
        (dict(cu_seqlens=[0, 8, 8, 30, 53]), 1),
        (dict(key_ranges=[torch.tensor([[0, 9]] * 53), torch.tensor([[30, 44]] * 53)]), 2),
    )
]
FEW_QUERIES = Case(9, 4, 4, 8, keys=53)  # these travel in the forward
CASES.append(FEW_QUERIES)


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_rings_under_ncclis_rules_are_exact(nccl, num_ranks):
    for case in CASES:
        world = fake_nccl.World(num_ranks)
        parts = ranks(world, lambda transport, case=case: ring_of(case, transport))
        whole = {}
        for name in parts[0]:
            order = torch.tensor([place for found in parts for place in found[name][0]]).argsort()
            whole[name] = torch.cat([found[name][1] for found in parts], 2)[:, :, order]
        check(case, whole)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.complex64, torch.bool, torch.float32], ids=str)
def test_tensors_of_dtypes_that_nccl_has_no_name_for_are_gathered_too(nccl, dtype):
    whole = torch.arange(24).view(8, 3).to(dtype)

    def work(transport):
        mine = whole[transport.rank * 2 : transport.rank * 2 + 2 + 2 * (transport.rank == 2)]
        return reshard._Unshard._gathered(transport, mine, 0, "contiguous", None, False)[0]

    for found in ranks(fake_nccl.World(3), work):
        assert found.dtype == dtype and torch.equal(found.view(torch.uint8), whole.view(torch.uint8))


def test_shards_of_two_lengths_travel_as_all_ranks_hold_them_in_memory(nccl):
    """[.., D, T] too: the longer ones are longer in their last dim then."""
    whole = Case(7, 2, 2, 8).tensors()[:4]

    def work(transport, flip):
        q, k, v, do = (x[:, :, held_by(transport, "contiguous", 7)] for x in whole)
        k, v = (x.mT.contiguous().mT if flip else x for x in (k, v))
        out, lse = call.forward(transport, q, k, v, Options())
        return out, lse, *call.backward(transport, do, None, (q, k, v, out, lse), Options())

    plain, flipped = (ranks(fake_nccl.World(3), lambda transport, flip=flip: work(transport, flip)) for flip in (0, 1))
    for mine, expected in zip(flipped, plain, strict=True):
        assert all(map(torch.equal, mine, expected))


@pytest.mark.parametrize("case", [CASES[0], CASES[11], CASES[13], FEW_QUERIES])
def test_streams_order_every_access_under_ncclis_rules(nccl, case):
    assert races_of(case) == []


def races_of(case, follows=True):
    recorder = Recorder()
    world = fake_nccl.World(3, recorder, follows)

    def work(transport):
        with recorder.on(f"rank {transport.rank}"), Watched(recorder):
            for _, x in ring_of(case, transport, kernel="reference").values():
                x.zero_()

    ranks(world, work)
    assert recorder.num_accesses > 100
    return [race for race in recorder.races if "holding" not in race]  # NCCL's works hold their tensors


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_queries_that_all_ranks_have_are_exact_and_ordered_too(nccl, num_ranks):
    recorder = Recorder()
    q, k, v = torch.randn(1, 4, 3, 8), *torch.randn(2, 1, 2, 53, 8)
    exact, _ = attention(q, k, v, torch.ones(3, 53, dtype=torch.bool), 8**-0.5)

    def work(transport):
        with recorder.on(f"rank {transport.rank}"), Watched(recorder):
            where = held_by(transport, "contiguous", 53)
            for _ in range(2):
                out, _ = call.decode(transport, q, k[:, :, where], v[:, :, where], Options(kernel="reference"))
            return out

    found = ranks(fake_nccl.World(num_ranks, recorder), work)
    assert all(torch.equal(out, found[0]) for out in found) and relative_error(found[0], exact) < 2e-6
    assert [race for race in recorder.races if "holding" not in race] == []


def test_races_show_when_waiting_orders_no_stream(nccl, monkeypatch):
    def only_block(work):
        with work._world.changed:
            assert work._world.changed.wait_for(lambda: work._batch.done, 20)

    monkeypatch.setattr(fake_nccl.Work, "wait", only_block)
    assert any("reads" in race for race in races_of(CASES[0]))


def test_races_show_when_transfers_do_not_begin_after_the_poster_s_stream(nccl):
    assert any("NCCL" in race for race in races_of(CASES[0], follows=False))


@pytest.mark.parametrize("agreement", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_that_have_not_met_do_not_meet_in_a_capture(nccl, monkeypatch, num_ranks, agreement):
    captured = []
    monkeypatch.setattr(call, "_is_captured", lambda device_type: bool(captured))
    world = fake_nccl.World(num_ranks)

    def work(transport):
        transport = ProcessGroupTransport(transport.group)
        monkeypatch.setattr(transport, "_tried", not captured)  # shared memory is not what this is about
        begun = lambda layout="zigzag": call.begin(transport, lambda: terms(layout), agreement)  # noqa: E731
        if captured:
            with pytest.raises(ringspan.UnsupportedError, match=r"no call with tensors on GPUs before, on this group"):
                begun()
            return None
        return transport, begun, begun()[1]

    terms = lambda layout: Terms({"layout": layout}, 8, 8, device_type="cuda")  # noqa: E731
    captured.append(True)
    ranks(world, work)
    assert world.num_batches == 0
    captured.clear()
    met = ranks(world, work)
    num_batches = world.num_batches
    captured.append(True)
    for _, begun, agreed in met:
        assert begun()[1] == agreed
        if agreement:
            with pytest.raises(ringspan.UnsupportedError, match="no call with these arguments before"):
                begun("striped")
    assert world.num_batches == num_batches > 0


@pytest.mark.parametrize("tokens", [42, 45])
def test_a_pass_holds_few_buffers_and_allocates_no_more_than_it_holds(nccl, monkeypatch, tokens):
    """With shards of two lengths, those of the other length are let go: two shards and three gradients at most."""
    num_ranks, made, alive = 7, [], set()
    most = {"forward": 0, "backward": 0}
    this = threading.local()

    def counted(spec):
        tensors = allocate(spec)
        key = (this.rank, next(serial))
        alive.add(key)
        weakref.finalize(tensors[0].untyped_storage(), alive.discard, key)
        made.append((this.rank, this.phase))
        most[this.phase] = max(most[this.phase], sum(rank == this.rank for rank, _ in alive))
        return tensors

    serial = itertools.count()
    monkeypatch.setattr(torch_dist, "allocate", counted)

    def work(transport):
        this.rank, this.phase = transport.rank, "forward"
        q = torch.randn(1, 2, len(range(transport.rank, tokens, num_ranks)), 4)
        options = Options(kernel="reference", layout="striped")
        out, lse = call.forward(transport, q, q, q, options)
        this.phase = "backward"
        call.backward(transport, q, None, (q, q, q, out, lse), options)

    ranks(fake_nccl.World(num_ranks), work)
    assert most["forward"] <= 2 and most["backward"] <= 5
    again = 1 if tokens % num_ranks == 0 else 3  # a ring meets a run of the one length, and of the other, and back
    for rank in range(num_ranks):
        assert made.count((rank, "forward")) <= 2 * again
        assert made.count((rank, "backward")) <= 5 * again


def test_an_abort_of_nccl_names_the_rank_that_was_waited_for_and_the_first_that_failed(nccl):
    world = fake_nccl.World(2)

    def aborted():
        raise RuntimeError("NCCL communicator was aborted.\nmore")

    def work(transport):
        channel = transport.channel(transport.begin_call(), (1, 0))  # not in the order of the group
        if transport.rank == 1:
            transport.fail(ValueError("out of luck"))
            return None
        pending = channel.post(0, 0, [(0, parcel_of(0))], [(0, spec_of(parcel_of(1)))])
        pending.works[0].wait = aborted
        while transport._bulletin.first_failure() is None:
            time.sleep(0.001)
        with pytest.raises(ringspan.RankFailedError) as caught:
            pending.wait()
        with pytest.raises(ringspan.RankFailedError, match="done for"):
            transport.begin_call()
        return str(caught.value)

    told = ranks(world, work)[0]
    assert "waiting for rank 1 in step 0 of call 1" in told and "communicator was aborted." in told
    assert "rank 1 failed first: ValueError: out of luck" in told and "more" not in told


def test_transfers_that_cannot_be_posted_are_told_where_they_are_waited_for(nccl, monkeypatch):
    def closed(operations):
        raise RuntimeError("Connection closed by peer")

    def work(transport):
        channel = transport.channel(transport.begin_call(), range(1))
        with monkeypatch.context() as patch:
            patch.setattr(fake_nccl.fake_dist, "batch_isend_irecv", closed)
            pending = channel.post(0, 0, [(0, parcel_of(0))], [(0, spec_of(parcel_of(0)))])
        with pytest.raises(ringspan.RankFailedError, match=r"rank 0 in step 0(.|\n)*Connection closed by peer"):
            pending.wait()
        return True

    assert ranks(fake_nccl.World(1), work) == [True]


def test_a_failure_elsewhere_ends_the_wait_for_an_agreement_on_the_accelerator(nccl):
    world = fake_nccl.World(2)

    def work(transport):
        if transport.rank == 1:
            transport.fail(ValueError("out of luck"))
            return None
        with pytest.raises(ringspan.RankFailedError, match="rank 1 failed first: ValueError: out of luck"):
            transport.agree(transport.begin_call(), b"hello")
        return True

    assert ranks(world, work)[0]


def test_ranks_that_made_other_numbers_of_calls_before_are_told(nccl):
    """As where one of them called with agreement=False, alone. What NCCL gathers has no number of its own."""

    def work(transport):
        for _ in range(1 + transport.rank):
            number = transport.begin_call()
        with pytest.raises(
            ringspan.DisagreementError, match=r"the number of the call\.\n  got  1 on rank 0; 2 on rank 1"
        ):
            agree(transport, number, Terms())
        return True

    assert ranks(fake_nccl.World(2), work) == [True, True]


def test_the_first_transfer_is_one_of_all_ranks_even_where_nothing_was_agreed_on(nccl):
    world = fake_nccl.World(3)
    ranks(world, lambda transport: opened(transport, (0, 1) if transport.rank < 2 else (2,)) and None)
    assert world.num_batches == 3
    ranks(
        world, lambda transport: transport.agree(transport.begin_call(), b"x") and opened(transport, range(3)) and None
    )
    assert world.num_batches == 6
