"""What a call takes beyond its inputs and outputs: two K/V shards, the float32 state, and one tile's scratch."""

import os
import weakref
from contextlib import contextmanager

import pytest
import torch
from processes import results, run_processes

import ringspan
from ringspan.kernels.contract import SCRATCH_BYTES
from ringspan.kernels.reference import Reference
from ringspan.state import SoftmaxState
from ringspan.transport.local import _LocalChannel

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


@pytest.mark.parametrize("num_queries", [40, 4])  # 4 travel
def test_threads_compute_in_every_pass_only_where_they_are_counted(num_queries, monkeypatch):
    """Or more of them than there are cores would hold a scratch each."""
    computing, counted = set(), []

    @contextmanager
    def entered(self, computing_of=_LocalChannel.computing):
        with computing_of(self):
            computing.add(self.rank)
            yield
            computing.discard(self.rank)

    def watched(name):
        inner = getattr(Reference, name)
        return lambda self, *args: (counted.append((name, bool(computing))), inner(self, *args))[1]

    monkeypatch.setattr(_LocalChannel, "computing", entered)
    for name in ("absorb_runs", "absorb_gradient"):
        monkeypatch.setattr(Reference, name, watched(name))

    def work(group):
        q = torch.randn(1, 2, num_queries, 8).requires_grad_()
        k = torch.randn(1, 2, 40, 8)
        ringspan.ring_attention(q, k, k, kernel="reference").sum().backward()

    ringspan.run_local(work, 1)
    assert set(counted) == {("absorb_runs", True), ("absorb_gradient", True)}


def test_a_rank_that_others_still_read_has_let_go_of_its_state(monkeypatch):
    states, alive = [], []
    empty, close = SoftmaxState.empty, _LocalChannel.close

    def noted(*args):
        state = empty(*args)
        states.extend(weakref.ref(x) for x in (state.acc, state.row_max, state.row_sum))
        return state

    def noting(self):
        alive.extend(reference for reference in states if reference() is not None)
        close(self)

    monkeypatch.setattr(SoftmaxState, "empty", noted)
    monkeypatch.setattr(_LocalChannel, "close", noting)
    q = torch.randn(1, 2, 40, 8).bfloat16()  # float32 results would be the state's own memory
    ringspan.run_local(lambda group: ringspan.ring_attention(q, q, q), 1)
    assert len(states) == 3 and not alive
