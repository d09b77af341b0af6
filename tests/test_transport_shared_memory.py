"""Shared memory between the processes of one host: the behaviour suite, and what only this transport can get wrong."""

import gc
import os
import resource
import signal
import threading

import pytest
import torch
import torch.distributed as dist
from processes import results, run_processes
from transport_behaviour import BEHAVIOURS, NUM_RANKS, opened, parcel_of, same, spec_of
from whole import Case, check, ring

import ringspan
from ringspan.transport import segments
from ringspan.transport.process_group import transport_of


def world():
    return transport_of(dist.group.WORLD)


def behave(rank, place):
    BEHAVIOURS[place](world())
    assert world().shared_memory is not None, world().why_not_shared


@pytest.mark.parametrize("place", range(len(BEHAVIOURS)), ids=[behaviour.__name__ for behaviour in BEHAVIOURS])
def test_shared_memory(place):
    results(run_processes(behave, NUM_RANKS, place))


def fill_pipes(rank):
    """More notes than a pipe holds, both ways, before either rank reads any."""
    channel = opened(world(), range(2))
    mine, other, num_notes = parcel_of(rank), 1 - rank, 12_000
    for index in range(num_notes):
        channel.post(index, 0, [(other, mine)])
    for index in range(num_notes):
        (arrived,) = channel.post(index, 0, (), [(other, spec_of(mine))]).wait()
        assert same(arrived, parcel_of(other))
        channel.release(arrived)
    channel.close()


def test_ranks_that_fill_each_others_pipes_do_not_wait_for_ever():
    results(run_processes(fill_pipes, 2))


def shards(rank, tokens=64, make=torch.empty):
    generator = torch.Generator().manual_seed(rank)
    q, k, v = (make((1, 2, tokens, 16), dtype=torch.float32) for _ in range(3))
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape, generator=generator))
    return q, k, v


def plain(num_ranks, **options):
    full = [torch.cat([shards(rank)[i] for rank in range(num_ranks)], 2) for i in range(3)]
    return torch.nn.functional.scaled_dot_product_attention(*full, **options)


def copies_of_a_call(rank, make, narrow):
    copied = []
    take = segments.Pool.take

    def counted(self, num_bytes):
        copied.append(num_bytes)
        return take(self, num_bytes)

    segments.Pool.take = counted
    q, k, v = shards(rank, make=make)
    if narrow:  # a view with an offset and strides of its own
        wide = make((1, 64, 4, 16), dtype=torch.float32)
        wide[:, :, 1:3] = k.transpose(1, 2)
        k = wide[:, :, 1:3].transpose(1, 2)
    return copied, ringspan.ring_attention(q, k, v)


@pytest.mark.parametrize("narrow", [False, True])
def test_keys_in_empty_shared_are_read_where_they_are_and_others_are_copied_once(narrow):
    expected = plain(3).chunk(3, 2)
    for make, num_bytes in ((ringspan.empty_shared, []), (torch.empty, [2 * 64 * 2 * 16 * 4])):
        for rank, (copied, out) in enumerate(results(run_processes(copies_of_a_call, 3, make, narrow))):
            torch.testing.assert_close(out, expected[rank])
            assert copied == num_bytes


def test_memory_of_empty_shared_is_freed_with_the_tensor():
    def open_files():
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    x = ringspan.empty_shared((3, 5), dtype=torch.bfloat16)
    assert x.shape == (3, 5) and x.dtype == torch.bfloat16 and open_files() > before
    y = x[1:].T
    del x
    assert open_files() > before
    y.fill_(1)
    del y
    gc.collect()
    assert open_files() == before
    assert ringspan.empty_shared((0, 4)).shape == (0, 4)
    with pytest.raises(ringspan.ArgumentError, match="integers of at least 0"):
        ringspan.empty_shared((3, -1))


def run_out_of_memory(rank, victim):
    ringspan.ring_attention(*shards(rank))
    if rank == victim:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        ringspan.ring_attention(*shards(rank, tokens=1024))
    except ringspan.RingspanError as error:
        return error


def test_memory_that_is_full_is_an_error_on_every_rank():
    for rank, error in enumerate(results(run_processes(run_out_of_memory, 3, 1))):
        if rank == 1:
            assert isinstance(error, ringspan.SharedMemoryFullError) and isinstance(error, MemoryError)
            assert "262144 bytes asked for" in str(error) and 'transport="torch_dist"' in str(error)
        else:
            assert isinstance(error, ringspan.RankFailedError)
            assert "rank 1 failed first: SharedMemoryFullError" in str(error)


def without_access(rank, blind):
    if rank == blind:

        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        segments.open_peer = refuse
    out = ringspan.ring_attention(*shards(rank))
    with pytest.raises(ringspan.UnsupportedError) as caught:
        ringspan.ring_attention(*shards(rank), transport="shared_memory")
    again = ringspan.ring_attention(*shards(rank), transport="torch_dist")
    assert torch.equal(out, again)
    return out, str(caught.value)


def test_where_one_rank_cannot_read_the_others_all_use_torch_dist_and_say_why_when_asked():
    expected = plain(3).chunk(3, 2)
    for rank, (out, message) in enumerate(results(run_processes(without_access, 3, 1))):
        torch.testing.assert_close(out, expected[rank])
        assert "rank 1: cannot open the memory of rank 0" in message and "Permission denied" in message


def count_segments(rank):
    case = Case(120, 2, 2, 16, layout="zigzag", options=dict(causal=True))
    for _ in range(3):
        ring(None, case)
    pool, sizes = world().shared_memory.pool, []
    create = pool._make

    def counted(num_bytes):
        sizes.append(num_bytes)
        return create(num_bytes)

    pool._make = counted
    for _ in range(20):
        found = ring(None, case)
    made = len(sizes)
    files = []
    for tokens in [*range(40, 400, 20)] * 3:
        ring(None, Case(tokens, 2, 1, 16, layout="striped", options=dict(causal=True)))
        files.append(len(os.listdir("/proc/self/fd")))
    return found, made, files


def test_segments_are_reused_and_few_whatever_the_shapes():
    case = Case(120, 2, 2, 16, layout="zigzag", options=dict(causal=True))
    for found, made, files in results(run_processes(count_segments, 3)):
        check(case, found)
        assert made == 0, f"{made} new segments in 20 calls like those before"
        third = len(files) // 3
        assert max(files[2 * third :]) <= max(files[third : 2 * third]) + 3, files


def call_until_killed(rank, victim, wait_s):
    ringspan.ring_attention(*shards(rank))
    if rank == victim:
        threading.Timer(wait_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    try:
        while True:
            q, k, v = (x.requires_grad_() for x in shards(rank))
            ringspan.ring_attention(q, k, v, causal=True).sum().backward()
    except ringspan.RankFailedError as error:
        return str(error)


@pytest.mark.parametrize("wait_s", [0.001, 0.0173, 0.0389, 0.071, 0.113])
def test_a_rank_killed_at_any_moment_is_named_and_leaves_nothing_behind(wait_s):
    before = set(os.listdir("/dev/shm"))
    endings = run_processes(call_until_killed, 4, 3, wait_s)
    assert endings[3].exitcode == -signal.SIGKILL
    told = [endings[rank].value for rank in range(3)]
    assert all(told), endings
    assert all("rank 3" in text for text in told), told
    assert set(os.listdir("/dev/shm")) == before
