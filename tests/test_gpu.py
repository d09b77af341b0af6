"""Whole calls on a GPU: rings of threads on one of them, SPMD entries, NCCL, CUDA graphs, torch.compile, refusals."""

import os
import re
import signal
import threading

import pytest
import torch
from definition import attention, relative_error
from gpu_at_hand import DEVICE, counting
from processes import results, run_processes
from test_decode import check as check_decoding
from test_decode import tensors as decoding_tensors
from test_sinks import SINKS
from test_sinks import check as check_sinks
from test_sinks import ring as ring_of_sinks
from test_sinks import whole as whole_of_sinks
from test_spmd import MASKS, Spmd, both, documents
from whole import Case, check, ring

import ringspan
from ringspan import run_local
from ringspan.kernels import table
from ringspan.kernels.torch_cuda import LIBRARIES, TorchCuda
from ringspan.kernels.triton_kernel import Triton
from ringspan.problem import Mask

LAYOUTS = ("contiguous", "striped", "zigzag")
TIMEOUT_S = 100  # the first rank to launch a kernel compiles it, for seconds

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{of_torch}:UserWarning")
    for of_torch in ("TensorFloat32 tensor cores", "Attempting to run cuBLAS")
]


def masks(tokens):
    third = tokens // 3
    return {
        "none": {},
        "causal": dict(causal=True),
        "window": dict(window_size=(20, 7)),
        "causal window": dict(causal=True, window_size=(50, 0)),
        "causal documents": dict(causal=True, cu_seqlens=[0, third, third, tokens - third, tokens]),
        "key ranges": dict(key_ranges=torch.arange(2 * tokens, device="cpu").view(tokens, 2) * 41 % (tokens + 20) - 10),
    }


def on_gpu(tokens, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16, **rest) -> Case:
    halves = dtype in (torch.bfloat16, torch.float16)
    return Case(tokens, heads, kv_heads, head_dim, dtype=dtype, device=DEVICE, rounds_weights=halves, **rest)


def exact_ring(case: Case, num_ranks: int) -> dict[str, torch.Tensor]:
    """Whole results of a ring, which all of its ranks have and which are those of float64 attention."""
    first, *others = run_local(ring, num_ranks, case, timeout=TIMEOUT_S)
    assert {x.device.type for x in first.values()} == {DEVICE}
    check(case, first)
    assert all(torch.equal(x, other[name]) for name, x in first.items() for other in others)
    return first


# Rings of threads, each with a stream of its own


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", masks(3))
def test_a_ring_of_any_size_is_exact_under_every_mask_and_layout(mask, layout, num_ranks):
    exact_ring(on_gpu(129, layout=layout, options=masks(129)[mask]), num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents_of_unequal_lengths_are_exact(causal, num_ranks):
    documents = [0, 3, 3, 400, 411, 500, 1100, 1101, 1200]
    exact_ring(on_gpu(1200, layout="packed", options=dict(causal=causal, cu_seqlens=documents)), num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_key_ranges_of_each_batch_entry_are_exact(num_ranks):
    lengths = torch.tensor([300, 77, 1], device="cpu")
    stop = lengths[:, None].expand(-1, 300)
    ranges = torch.stack([torch.zeros_like(stop), stop], -1)
    for layout, options in (("zigzag", dict(causal=True)), ("contiguous", {})):
        exact_ring(on_gpu(300, batch=3, layout=layout, options=options | dict(key_ranges=ranges)), num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_may_have_a_head_dim_of_their_own(num_ranks, dtype):
    case = on_gpu(300, head_dim=192, value_dim=128, dtype=dtype, layout="zigzag", options=dict(causal=True))
    exact_ring(case, num_ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize("num_ranks", [3, 8])
def test_a_length_that_divides_by_nothing_is_exact(num_ranks, tokens, layout):
    exact_ring(on_gpu(tokens, layout=layout, options=dict(causal=True)), num_ranks)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_every_dtype_is_exact_to_its_own_rounding(dtype, causal):
    exact_ring(on_gpu(200, dtype=dtype, layout="zigzag", options=dict(causal=causal)), 4)


@pytest.mark.parametrize("kv_heads", [1, 8])
def test_grouped_heads_are_exact_whichever_side_travels_in_the_backward(kv_heads):
    exact_ring(on_gpu(150, 8, kv_heads, layout="zigzag", options=dict(causal=True)), 3)


@pytest.mark.parametrize(("tokens", "keys"), [(40, 100), (5, 500), (1, 1000)])
def test_cross_attention_of_unequal_lengths_is_exact(tokens, keys):
    exact_ring(on_gpu(tokens, keys=keys), 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_ring_with_sinks_is_exact(dtype):
    tensors = whole_of_sinks(300, dtype)
    on_device = [x.to(DEVICE) for x in tensors]
    sinks = SINKS.to(DEVICE)
    found = run_local(lambda group: ring_of_sinks(on_device, sinks, "zigzag", causal=True), 4, timeout=TIMEOUT_S)
    found = [{name: x.cpu() for name, x in mine.items()} for mine in found]
    check_sinks(found, tensors, SINKS, Mask(300, 300, right=0), rounds_weights=dtype.itemsize == 2)


@pytest.mark.parametrize("head_dim", [33, 128, 256])
def test_other_head_dims_are_exact(head_dim):
    exact_ring(on_gpu(300, 2, 1, head_dim, layout="striped", options=dict(causal=True)), 2)


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_decoding_is_exact_and_every_rank_has_the_same_bits(num_ranks):
    lengths = [257, 0, 40, 1000, 1, 64, 300, 129][:num_ranks]
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (x.to(DEVICE) for x in decoding_tensors(3, lengths, dim=64, value_dim=64, dtype=dtype))
        check_decoding(q, k, v, lengths)
        check_decoding(q, k, v, lengths, sinks=torch.zeros(4, device=DEVICE))
        seen = torch.arange(sum(lengths), device=DEVICE) <= torch.arange(3, device=DEVICE)[:, None] + sum(lengths) - 3
        check_decoding(q, k, v, lengths, seen, key_ranges=ringspan.masks.continued(sum(lengths) - 3, 3))


def test_the_error_does_not_grow_with_the_number_of_workers():
    def error(num_ranks):
        case = on_gpu(2048, 2, 1, options=dict(causal=True), layout="zigzag")
        q, k, v, *_ = case.tensors()
        exact, _ = attention(q, k, v, case.seen(), case.scale)
        return relative_error(run_local(ring, num_ranks, case, timeout=TIMEOUT_S)[0]["out"], exact)

    alone = error(1)
    for num_ranks in (2, 8):
        assert error(num_ranks) <= 1.1 * alone


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_give_the_same_bits(layout):
    case = on_gpu(1000, layout=layout, options=dict(causal=True))
    first, second = (run_local(ring, 4, case, timeout=TIMEOUT_S)[0] for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def late(case: Case, cycles: int):
    """The same tensors, which the GPU comes to make only after a while."""

    class Late(Case):
        def tensors(self):
            made = super().tensors()
            torch.cuda._sleep(cycles)
            return [x.clone() for x in made]

    return Late(**vars(case))


@pytest.mark.parametrize("num_ranks", [2, 5])
@pytest.mark.parametrize("options", [dict(causal=True), {}], ids=str)
def test_streams_that_run_far_apart_give_the_same_bits(options, num_ranks, monkeypatch):
    """Every rank's stream is slow at other places: who reads before the other has written shows it."""
    case = on_gpu(500, layout="zigzag", options=options)
    calm = exact_ring(case, num_ranks)
    turns = threading.local()

    def slowly(absorb):
        def absorb_late(*args):
            rank = int(threading.current_thread().name.rpartition("-")[2])
            turns.count = getattr(turns, "count", rank) + 1
            torch.cuda._sleep(1_000_000 * (turns.count * (rank + 1) % 7))  # to 4 ms
            absorb(*args)
            torch.cuda._sleep(1_000_000 * (turns.count % 3))

        return absorb_late

    for name in ("absorb", "absorb_gradient"):
        monkeypatch.setattr(Triton, name, slowly(getattr(Triton, name)))
    for cycles in (0, 20_000_000):
        found = run_local(ring, num_ranks, late(case, cycles), timeout=TIMEOUT_S)
        for name, x in calm.items():
            assert all(torch.equal(x, other[name]) for other in found), name


def test_inputs_may_be_overwritten_as_soon_as_a_call_returns():
    case = on_gpu(256, options=dict(causal=True))
    q, k, v, *_ = case.tensors()

    def work(group):
        mine = [ringspan.shard(x, 2) for x in (q, k, v)]
        if group.rank() % 2:
            torch.cuda._sleep(50_000_000)
        out = ringspan.ring_attention(*mine, causal=True)
        for x in mine:
            x.fill_(torch.nan)
        return ringspan.unshard(out, 2)

    calm = run_local(ring, 4, case, timeout=TIMEOUT_S)[0]["out"]
    for found in run_local(work, 4, timeout=TIMEOUT_S):
        assert torch.equal(found, calm)


def test_workers_on_different_device_types_are_told():
    def work(group):
        q, k, v = torch.randn(3, 1, 2, 40, 64, device=DEVICE if group.rank() else "cpu").unbind()
        with pytest.raises(ringspan.DisagreementError, match="device type"):
            ringspan.ring_attention(q, k, v)

    run_local(work, 2, timeout=TIMEOUT_S)


# SPMD entries


@pytest.mark.parametrize(("causal", "striped"), MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_spmd_entries_are_exact_on_gpu_tensors(dtype, causal, striped):
    case = Spmd(256, 4, h=4, h_kv=2, d=64, causal=causal, striped=striped, dtype=dtype, device=DEVICE)
    case.check(run_local(both, 4, case, timeout=TIMEOUT_S))


def test_packed_documents_of_the_spmd_entries_are_exact_on_gpu_tensors():
    lengths, b, h = [4, 100, 8, 60], 2, 3
    low, high, same = documents(lengths, 4, b, h)
    case = Spmd(sum(lengths) // 4, 4, b, h, d=64, causal=True, striped=True, device=DEVICE)

    def work(group):
        bounds = dict(bound_min=torch.from_numpy(low).to(DEVICE), bound_max=torch.from_numpy(high).to(DEVICE))
        o, lse = case.forward(group.rank(), training=True, **bounds)
        return o, lse, case.backward(group.rank(), o, lse, **bounds)

    case.check(run_local(work, 4, timeout=TIMEOUT_S), case.mask & same.to(DEVICE))


# torch.distributed


def alone_in_its_group(rank):
    """As docs/gpus.md has it: the GPU is the default device. A call, forward and backward; then the same in a graph."""
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    torch.set_default_device(DEVICE)
    for options in (dict(causal=True), dict(cu_seqlens=[0, 100, 257])):
        case = on_gpu(257, layout="zigzag", options=options)
        check(case, ring(None, case))
    if DEVICE == "cuda":
        with torch.no_grad():
            captured_is_called(dict(causal=True, layout="zigzag"))
    return True


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_a_group_of_one_with_nccl_is_exact(backend):
    assert results(run_processes(alone_in_its_group, 1, backend=backend)) == [True]


def refused(rank, words):
    q, k, v = torch.randn(3, 1, 2, 64, 64, device=DEVICE).unbind()
    with pytest.raises(ringspan.RingspanError, match=words) as caught:
        ringspan.ring_attention(q, k, v)
    return type(caught.value).__name__


def test_two_ranks_on_one_gpu_are_refused_by_nccl_and_told():
    ended = run_processes(refused, 2, r"rank \d gave up waiting for", backend="cpu:gloo,cuda:nccl", limit_s=90)
    # Not how the processes end: NCCL may not let go of a group that it refused.
    assert [ending.value for ending in ended] == ["RankFailedError"] * 2, [ending.trace or ending for ending in ended]


# Processes that read each other's memory of one GPU


def whole_rings(rank, cases):
    found = [ring(None, case) for case in cases for _ in range(2)]
    return [{name: x.cpu() for name, x in one.items()} for one in found]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_processes_are_exact_through_peer_memory(num_ranks):
    """The only transport of a group that has no NCCL."""
    cases = [on_gpu(129, layout="zigzag", options=mask) for mask in masks(129).values() if "key_ranges" not in mask]
    cases += [on_gpu(1000, heads=8, dtype=torch.float32, options=dict(causal=True, transport="peer_memory"))]
    for found in results(run_processes(whole_rings, num_ranks, cases)):
        for place, one in enumerate(found):
            case = cases[place // 2]
            check(case, {name: x.to(DEVICE) for name, x in one.items()})
            assert all(torch.equal(x, found[place - place % 2][name]) for name, x in one.items()), "two runs"


def overwrite_late(rank, case):
    """Every rank's stream is slow at other places, and all write over what they passed at once."""
    found = []
    for number in range(6):
        q, k, v, do, _ = (ringspan.shard(x, 2) for x in case.tensors())
        for x in (q, k, v):
            x.requires_grad_()
        torch.cuda._sleep(20_000_000 * ((number + rank) % 3))
        out = ringspan.ring_attention(q, k, v, causal=True)
        torch.cuda._sleep(20_000_000 * ((number + 2 * rank) % 3))
        out.backward(do)
        found.append([x.detach().clone() for x in (out, q.grad, k.grad, v.grad)])
        for x in (q, k, v, do, out):
            x.detach().fill_(torch.nan)
    return [[x.cpu() for x in one] for one in found]


def test_processes_whose_streams_run_far_apart_give_the_same_bits():
    for first, *others in results(run_processes(overwrite_late, 3, on_gpu(500))):
        for other in others:
            assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def end_at_once(rank, case):
    """Rank 0 ends when it has launched its part; what rank 1 reads of it, it reads after that."""
    q, k, v, *_ = (ringspan.shard(x, 2) for x in case.tensors())
    ringspan.ring_attention(q, k, v)  # kernels are compiled and windows open
    torch.cuda.synchronize()
    if rank == 1:
        torch.cuda._sleep(500_000_000)
    out = ringspan.ring_attention(q, k, v)
    return out.cpu() if rank == 1 else None


def test_a_process_does_not_end_before_the_others_have_read_its_memory():
    case = on_gpu(4000)
    q, k, v, *_ = case.tensors()
    _, out = results(run_processes(end_at_once, 2, case))
    assert torch.equal(out.to(DEVICE), run_local(work_of(q, k, v), 2, timeout=TIMEOUT_S)[1])


def work_of(q, k, v):
    return lambda group: ringspan.ring_attention(*(ringspan.shard(x, 2) for x in (q, k, v)))


def call_until_killed(rank, victim):
    mine = torch.randn(3, 1, 2, 512, 64, device=DEVICE, dtype=torch.bfloat16).unbind()
    ringspan.ring_attention(*mine)
    if rank == victim:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
    try:
        while True:
            ringspan.ring_attention(*mine, causal=True)
    except ringspan.RankFailedError as error:
        return str(error)


def test_a_process_that_is_killed_is_named():
    endings = run_processes(call_until_killed, 3, 2)
    assert endings[2].exitcode == -signal.SIGKILL
    assert all("rank 2" in (ending.value or "") for ending in endings[:2]), endings


def capture_peers(rank):
    q, k, v = torch.randn(3, 1, 2, 64, 64, device=DEVICE).unbind()
    ringspan.ring_attention(q, k, v)
    with pytest.raises(ringspan.UnsupportedError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ringspan.ring_attention(q, k, v)
    return True


def test_peer_memory_is_not_captured():
    assert results(run_processes(capture_peers, 2)) == [True] * 2


# CUDA graphs


def captured_is_called(options):
    """A captured call, replayed over new inputs, gives the bits of the call itself."""
    q, k, v = (torch.randn(1, heads, 2048, 64, device=DEVICE, dtype=torch.bfloat16) for heads in (4, 2, 2))
    ringspan.ring_attention(q, k, v, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ringspan.ring_attention(q, k, v, return_lse=True, **options)
    for _ in range(2):
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        graph.replay()
        expected = ringspan.ring_attention(q, k, v, return_lse=True, **options)
        for name, mine, exact in zip(("out", "lse"), (out, lse), expected, strict=True):
            assert torch.equal(mine, exact), f"{name}: {(mine.float() - exact.float()).abs().max()}"


@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(window_size=(100, 30))], ids=str)
def test_a_captured_call_serves_new_inputs(options):
    with torch.no_grad():
        captured_is_called(options)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
def test_forward_and_backward_are_captured_together():
    def step():
        out = ringspan.ring_attention(q, k, v, causal=True)
        return out, *torch.autograd.grad(out, (q, k, v), do)

    shapes = [(1, heads, 300, 64) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for shape in shapes)
    do = torch.randn_like(q)
    side = torch.cuda.Stream()  # as torch's own documentation has it for a backward
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
    graph.replay()
    for name, mine, exact in zip(("out", "dq", "dk", "dv"), found, step(), strict=True):
        assert torch.equal(mine, exact), f"{name}: {(mine.float() - exact.float()).abs().max()}"


def capture_documents(rank):
    q, k, v = torch.randn(3, 1, 2, 300, 64, device=DEVICE, dtype=torch.bfloat16).unbind()
    call = lambda: ringspan.ring_attention(q, k, v, cu_seqlens=[0, 100, 300])  # noqa: E731
    before = call()
    with (
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        pytest.raises(ringspan.UnsupportedError, match="cannot be captured into a CUDA graph"),
    ):
        call()
    assert torch.equal(call(), before), "and goes on"
    return True


def capture_threads(rank):
    x = torch.randn(1, 2, 300, 64, device=DEVICE, dtype=torch.bfloat16)
    call = lambda: run_local(lambda group: ringspan.ring_attention(x, x, x), 2, timeout=TIMEOUT_S)  # noqa: E731
    before = call()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.mul(2)  # or torch warns of an empty graph
        with pytest.raises(ringspan.UnsupportedError, match="ring of threads cannot be captured"):
            call()
    assert torch.equal(call()[0], before[0]), "and goes on"
    return True


@pytest.mark.parametrize("refusal", [capture_documents, capture_threads])
def test_what_a_graph_would_not_repeat_is_refused(refusal):
    # In a process of its own: a capture that failed may leave CUDA useless to the tests that follow.
    assert results(run_processes(refusal, 1, backend="cpu:gloo,cuda:nccl")) == [True]


# torch.compile


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, about torch itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_call_is_one_graph_and_gives_the_results_of_the_plain_one(dtype):
    def fn(q, k, v):
        out = ringspan.ring_attention(q * 2, k, v, causal=True)
        return (out.float() * 3).sum(-1)  # in 16 bits a compiler rounds less often

    shapes = [(1, heads, 200, 64) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]
    weight = torch.randn(1, 4, 200, device=DEVICE)
    found = []
    with torch._inductor.config.patch(compile_threads=1):
        for call in (fn, torch.compile(fn, fullgraph=True)):
            out = call(*inputs)
            found.append([out, *torch.autograd.grad(out, inputs, weight)])
    for name, plain, compiled in zip(("out", "dq", "dk", "dv"), *found, strict=True):
        torch.testing.assert_close(compiled, plain, msg=lambda told, name=name: f"{name}: {told}")


# Which kernel serves, and what is refused


@pytest.mark.parametrize(
    ("num_workers", "causal", "dtype", "taken"),
    [
        (1, False, torch.bfloat16, ["cudnn"]),
        (2, False, torch.bfloat16, []),
        (1, True, torch.bfloat16, []),
        (1, False, torch.float32, []),
    ],
)
def test_auto_takes_a_library_only_where_one_full_tile_is_all_that_rows_see(
    num_workers, causal, dtype, taken, monkeypatch
):
    if not LIBRARIES[0].is_there():
        pytest.skip("this torch has no cuDNN that may serve")
    calls: list[str] = []
    libraries = [counting(library, calls) for library in LIBRARIES]
    kernel = TorchCuda(table.TRITON, libraries, choose=lambda *_: "cudnn")
    monkeypatch.setattr(table, "FOR_AN_ONLY_TILE", (kernel,))
    exact_ring(on_gpu(1100, dtype=dtype, options=dict(causal=causal)), num_workers)
    assert calls == taken


def test_a_kernel_asked_for_by_name_refuses_what_it_cannot_serve():
    for dtype, head_dim, reason in (
        (torch.float64, 64, "triton: its arithmetic is float32, torch.float64 needs more"),
        (torch.bfloat16, 257, "triton: it serves head_dim up to 256, not 257"),
    ):
        x = torch.randn(1, 1, 8, head_dim, device=DEVICE, dtype=dtype)
        with pytest.raises(ringspan.UnsupportedError, match=reason):
            ringspan.ring_attention(x, x, x, kernel="triton")
        ringspan.ring_attention(x, x, x)
    for kernel in ("native", "torch_ops"):
        x = torch.randn(1, 1, 8, 64, device=DEVICE)
        with pytest.raises(ringspan.UnsupportedError, match=f"{kernel}:"):
            ringspan.ring_attention(x, x, x, kernel=kernel)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_tensors_on_several_devices_are_refused(place):
    tensors = [torch.zeros(1, 1, 4, 64, device=DEVICE) for _ in range(3)]
    tensors[place] = tensors[place].cpu()
    with pytest.raises(ringspan.ArgumentTypeError, match="share one device"):
        ringspan.ring_attention(*tensors)


def test_under_autocast_attention_runs_in_its_dtype():
    q, k, v = (torch.randn(1, 2, 200, 64, device=DEVICE, requires_grad=True) for _ in range(3))
    with torch.autocast(DEVICE, torch.bfloat16):
        out = ringspan.ring_attention(q, k.bfloat16(), v, causal=True)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
    rounded = [x.detach().bfloat16() for x in (q, k, v)]
    assert torch.equal(out, ringspan.ring_attention(*rounded, causal=True))


def test_doctor_tells_what_this_gpu_can_use():
    for package in ("rich", "typer", "safetensors"):
        pytest.importorskip(package)
    from command_line import command

    ended = command("doctor")
    assert ended.status == 0, ended.err
    assert torch.cuda.get_device_name() in ended.out
    assert re.search(r"^ *triton +✗ +✗ +✓ +✓", ended.out, re.MULTILINE), ended.out
    assert re.search(r"torch_dist +nccl +✓", ended.out), ended.out
