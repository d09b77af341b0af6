"""What a call takes beyond its inputs and outputs: two K/V shards, the float32 state, and one tile's scratch."""

import os

import pytest
import torch
from processes import results, run_processes

import ringspan
from ringspan.kernels.contract import SCRATCH_BYTES

MIB = 1 << 20
# Page tables, thread stacks, allocator slack: what a warmed-up process still takes for nothing in particular.
SLACK = 6 * MIB


def status_bytes(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_of_a_call(rank, num_ranks, layout, dtype, transport):
    """Peak of this process during one call, over what it held before the call."""
    q, k, v = (torch.randn(1, 4, 4096, 128).to(dtype) for _ in range(3))
    small = q[:, :, :64].contiguous()
    for _ in range(2):
        ringspan.ring_attention(small, small, small, causal=True, layout=layout, transport=transport)
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # resets the high-water mark
    before = status_bytes("VmRSS")
    out = ringspan.ring_attention(q, k, v, causal=True, layout=layout, transport=transport)
    return status_bytes("VmHWM") - before, out.numel() * out.element_size()


@pytest.mark.parametrize("transport", ["shared_memory", "torch_dist"])
@pytest.mark.parametrize("layout", ["striped", "zigzag"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_a_worker_does_not_grow_with_the_ring(layout, dtype, transport):
    shard = 4 * 4096 * 128 * dtype.itemsize
    state = 4 * 4096 * (128 + 2) * 4
    bound = 2 * (2 * shard) + state + SCRATCH_BYTES + SLACK
    for num_ranks in (1, 2, 4):
        found = results(run_processes(peak_of_a_call, num_ranks, num_ranks, layout, dtype, transport))
        # What is mapped of the other ranks is theirs, although it counts in each process that reads it.
        mapped = (num_ranks - 1) * 2 * shard if transport == "shared_memory" else 0
        beyond = [peak - out - mapped for peak, out in found]
        assert max(beyond) <= bound, f"{[x / MIB for x in beyond]} MiB, bound {bound / MIB} MiB, {num_ranks} ranks"


def peak_of_threads(rank, num_workers, tokens):
    """The same for a ring of threads in this process, all its workers together; and the bytes of their outputs."""
    q, k, v = (torch.randn(1, 4, tokens, 128) for _ in range(3))
    shards = [[x.chunk(num_workers, 2)[worker].contiguous() for x in (q, k, v)] for worker in range(num_workers)]
    warm = [[x[:, :, :64].contiguous() for x in shard] for shard in shards]

    def work(group, held):
        return ringspan.ring_attention(*held[group.rank()], causal=True)

    ringspan.run_local(work, num_workers, warm)
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before = status_bytes("VmRSS")
    outs = ringspan.run_local(work, num_workers, shards)
    return status_bytes("VmHWM") - before, sum(out.numel() * out.element_size() for out in outs)


@pytest.mark.parametrize("num_workers", [2, 16])
def test_threads_hold_no_copies_of_keys_and_only_as_many_scratches_as_compute_at_once(num_workers):
    tokens = 8192
    ((peak, out),) = results(run_processes(peak_of_threads, 1, num_workers, tokens))
    state = 4 * tokens * (128 + 2) * 4
    scratch = len(os.sched_getaffinity(0)) * SCRATCH_BYTES
    assert peak - out <= state + scratch + SLACK, f"{(peak - out) / MIB} MiB beyond inputs and outputs"
