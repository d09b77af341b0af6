"""What a call with CUDA tensors does before and around its kernels, told without a GPU: capture, graphs, refusals."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from processes import results, run_processes
from torch._subclasses.fake_tensor import FakeTensorMode

import ringspan
from ringspan import call, execute, reshard, run_local, sharding, spmd
from ringspan.agreement import CALL, DEVICE_TYPE, RINGS, Terms, agree
from ringspan.errors import ArgumentError, DisagreementError, UnsupportedError
from ringspan.kernels.contract import captures
from ringspan.kernels.table import FOR_AN_ONLY_TILE, KERNELS
from ringspan.kernels.triton_bounds import bounds
from ringspan.options import Options
from ringspan.tile import Band, RowIntervals
from ringspan.transport import local
from ringspan.transport.contract import Transport
from ringspan.transport.local import alone
from ringspan.transport.process_group import ProcessGroupTransport
from ringspan.transport.streams import streams_of


class Recording(Transport):
    """Rank 0 of two; notes what is exchanged. The other rank has the same terms, and `length` keys."""

    rank, size, capturable = 0, 2, True

    def __init__(self, length=8):
        self.length, self.num_exchanges = length, 0

    def begin_call(self):
        return 1

    def agree(self, call, message):
        self.num_exchanges += 1
        theirs = bytearray(message)
        theirs[24:32] = self.length.to_bytes(8, "little")
        return [message, bytes(theirs)]

    def channel(self, call, members, via="auto", device_type="cpu"):
        return SimpleNamespace(size=2)

    def fail(self, error):
        raise AssertionError


def begin(transport, layout="zigzag", error=None, agreement=True):
    def check():
        if error is not None:
            raise error
        return Terms({"layout": layout}, 8, 8, device_type="cuda")

    return call.begin(transport, check, agreement)[1]


@pytest.fixture
def capturing(monkeypatch):
    """A switch: whether a CUDA graph is being captured."""
    switch = SimpleNamespace(on=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: switch.on)
    return switch


def test_a_captured_call_exchanges_nothing_and_has_the_agreement_of_the_call_before(capturing):
    transport = Recording(length=5)
    warm = begin(transport)
    capturing.on = True
    assert begin(transport) == warm and warm.key_lengths == (8, 5)
    assert transport.num_exchanges == 1
    with pytest.raises(ArgumentError, match="no good"):
        begin(transport, error=ArgumentError("no good"))


def test_where_in_a_graph_a_call_is_and_whose_backward_is_no_matter_in_a_capture(capturing):
    """Both are numbers of one call, and the call before was another."""
    transport = Recording(length=5)
    warm = begin(transport)
    capturing.on = True
    terms = Terms({"layout": "zigzag"}, 8, 8, device_type="cuda")
    for numbered in (dict(forward=3), dict(place=2)):
        assert call.begin(transport, lambda numbered=numbered: replace(terms, **numbered), True)[1] == warm


def test_a_call_that_was_not_made_before_its_capture_is_refused(capturing):
    transport = Recording()
    begin(transport, "striped")
    capturing.on = True
    with pytest.raises(NotImplementedError, match=r"no call with these arguments(.|\n)*once.*before the capture"):
        begin(transport)
    begin(transport, agreement=False)


def test_what_was_not_compared_is_not_taken_for_agreed_on_in_a_capture(capturing):
    transport = Recording(length=5)
    begin(transport, agreement=False)
    capturing.on = True
    with pytest.raises(NotImplementedError, match="no call with these arguments before"):
        begin(transport)


def test_a_capture_is_refused_where_calls_alike_met_other_lengths_elsewhere(capturing):
    transport = Recording(length=5)
    begin(transport)
    transport.length = 6
    begin(transport)
    begin(transport)
    capturing.on = True
    with pytest.raises(NotImplementedError, match="different lengths or memory layouts on other ranks"):
        begin(transport)


def test_few_agreements_are_kept(capturing):
    transport = Recording()
    for place in range(100):
        begin(transport, f"layout {place}")
    capturing.on = True
    begin(transport, "layout 99")
    with pytest.raises(NotImplementedError, match="no call"):
        begin(transport, "layout 0")


def test_a_ring_of_threads_is_not_captured(capturing):
    capturing.on = True
    with pytest.raises(NotImplementedError, match="ring of threads cannot be captured"):
        run_local(lambda group: begin(group.transport), 2, timeout=30)


def test_a_ring_of_threads_is_not_captured_without_an_agreement_either(capturing):
    capturing.on = True
    with pytest.raises(NotImplementedError, match="ring of threads cannot be captured"):
        run_local(lambda group: begin(group.transport, agreement=False), 2, timeout=30)


def test_a_ring_of_one_without_a_process_group_is_captured_without_a_call_before(capturing, monkeypatch):
    monkeypatch.setattr(local, "streams_of", lambda device_type: streams_of("cpu"))
    capturing.on = True
    assert begin(alone().transport).key_lengths == (8,)


def test_threads_do_not_join_a_capture_that_they_could_not_leave(capturing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    capturing.on = True
    with pytest.raises(NotImplementedError, match="ring of threads cannot be captured"):
        run_local(lambda group: pytest.fail("no thread is started"), 2)


@pytest.mark.parametrize("backward", [False, True])
def test_documents_are_refused_in_a_capture_and_the_group_goes_on(backward, monkeypatch):
    captured = SimpleNamespace(on=False)
    monkeypatch.setattr(call, "_is_captured", lambda device_type: captured.on)

    def work(group):
        x = torch.randn(1, 2, 20, 16, requires_grad=True)
        before = ringspan.ring_attention(x, x, x, cu_seqlens=[0, 7, 20], group=group)
        captured.on = True
        again = lambda: ringspan.ring_attention(x, x, x, cu_seqlens=[0, 7, 20], group=group)  # noqa: E731
        with pytest.raises(UnsupportedError, match=r"mask cannot be captured(.|\n)*cu_seqlens"):
            before.sum().backward() if backward else again()
        ringspan.ring_attention(x, x, x, causal=True, group=group)
        captured.on = False
        return torch.equal(before, ringspan.ring_attention(x, x, x, cu_seqlens=[0, 7, 20], group=group))

    monkeypatch.setattr(call, "captures", lambda kernel: True)
    assert run_local(work, 1) == [True]


def test_bounds_of_the_spmd_entries_are_refused_in_a_capture(monkeypatch):
    for name in ("_is_captured", "captures"):
        monkeypatch.setattr(call, name, lambda _: True)
    x, bound = torch.randn(1, 2, 8, 4), torch.zeros(2, 8, 1)
    options = dict(use_causal_mask=True, striped_input=True, softmax_scale=1.0, tp_q=True, tp_k=True)
    with pytest.raises(UnsupportedError, match="mask cannot be captured"):
        ringspan.ring_attention_spmd_fwd(x, x, x, bound_min=bound, bound_max=bound + 1, **options)


@pytest.mark.parametrize("backward", [False, True])
def test_a_kernel_that_waits_for_the_gpu_under_a_mask_is_not_captured_and_the_group_goes_on(backward, monkeypatch):
    captured = SimpleNamespace(on=False)
    monkeypatch.setattr(call, "_is_captured", lambda device_type: captured.on)

    def work(group):
        x = torch.randn(1, 2, 20, 16, dtype=torch.float64, requires_grad=True)
        again = lambda **mask: ringspan.ring_attention(x, x, x, kernel="reference", group=group, **mask)  # noqa: E731
        before = again(causal=True)
        captured.on = True
        with pytest.raises(UnsupportedError, match=r"cannot be captured(.|\n)*'reference'(.|\n)*float64"):
            before.sum().backward() if backward else again(causal=True)
        again()  # which asks the GPU nothing
        captured.on = False
        return torch.equal(before, again(causal=True))

    monkeypatch.setattr(execute, "forward", counted(execute.forward))
    assert run_local(work, 1) == [True]
    assert execute.forward.num_calls == 3, "what is refused is refused before it begins"


def counted(function):
    def counting(*args):
        counting.num_calls += 1
        return function(*args)

    counting.num_calls = 0
    return counting


def test_only_kernels_that_say_so_are_captured():
    of_gpus = {kernel.name for kernel in (*KERNELS, *FOR_AN_ONLY_TILE) if captures(kernel)}
    assert of_gpus == {"triton", "torch_cuda"}


class Begun(Exception):
    pass


@pytest.fixture
def begun_on(monkeypatch):
    """Current devices, one inside the other, where a call talks to the other ranks; which ends it."""
    entered, found = [], []

    @contextmanager
    def device(which):
        entered.append(str(which))
        yield
        entered.pop()

    def begin(*_, **__):
        found.append(list(entered))
        raise Begun

    monkeypatch.setattr(torch.cuda, "device", device)
    for module in (call, reshard):
        monkeypatch.setattr(module, "begin", begin)
    monkeypatch.setattr(call, "agree", begin)
    for module in (reshard, sharding, spmd):  # fake tensors stand for real ones
        monkeypatch.setattr(module, "check_carried_out", lambda *_: None)
    return found


@pytest.mark.parametrize("name", ["forward", "unshard", "its backward", "a refusal", "a refused unshard", "spmd"])
def test_ranks_talk_to_each_other_on_the_gpu_of_the_call_s_tensors(begun_on, name):
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        x = torch.empty(1, 2, 8, 16, device="cuda:1")
        with pytest.raises(Begun):
            {
                "forward": lambda: call.forward(alone().transport, x, x, x, Options()),
                "unshard": lambda: reshard.unshard(x, 2, "contiguous", "alone"),
                "its backward": lambda: reshard._Summed.apply(x, 2, "contiguous", None, "alone", 8, 1, lambda: None),
                "a refusal": lambda: ringspan.ring_attention(x, x, x, layout="spiral"),
                "a refused unshard": lambda: ringspan.unshard(x, 4),
                "spmd": lambda: ringspan.ring_attention_spmd_fwd(x, x, x, num_workers=0),
            }[name]()
    assert begun_on == [["cuda:1"]]


def test_fake_cuda_tensors_give_results_of_the_right_device_shape_and_dtype():
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.empty(2, heads, 64, 32, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
        out, lse = ringspan.ring_attention(q, k, v, causal=True, return_lse=True)
        options = (None, [], "alone", "zigzag", -1, 0, None, "auto", "auto", True, "qkv", 0)
        grads = torch.ops.ringspan.attend_backward(out, None, q, k, v, out, lse, *options)
    assert [x.shape for x in (out, lse, *grads)] == [q.shape, q.shape[:3], q.shape, k.shape, v.shape]
    assert [x.dtype for x in (out, lse, *grads)] == [q.dtype, torch.float32, q.dtype, q.dtype, q.dtype]
    assert {x.device for x in (out, lse, *grads)} == {torch.device("cuda", 0)}
    assert all(x.is_contiguous() for x in (out, lse, *grads))


def test_a_compiled_call_on_cuda_is_one_operation_of_a_graph():
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def fn(q, k, v):
        return ringspan.ring_attention(q, k, v, causal=True) * 2

    with FakeTensorMode(), torch.no_grad():
        q = torch.empty(2, 4, 64, 32, device="cuda", dtype=torch.bfloat16)
        out = torch.compile(fn, fullgraph=True, backend=backend)(q, q, q)
    assert out.device.type == "cuda"
    assert seen == ["ringspan.attend.default", "<built-in function getitem>", "<built-in function mul>"]


def test_rings_side_by_side_have_tensors_of_one_device_type():
    """Else one of them would wait for the other in the first transfer between GPUs, which is one of all ranks."""

    def work(group):
        device = "cuda" if group.rank() < 2 else "cpu"
        terms = Terms({CALL: "f", RINGS: "2 groups of 2", DEVICE_TYPE: device}, 8, 8, device_type=device)
        told = r"disagree on device type(.|\n)*'cuda' on ranks 0, 1; 'cpu' on ranks 2, 3(.|\n)*every rank of the group"
        with pytest.raises(DisagreementError, match=told):
            agree(group.transport, group.transport.begin_call(), terms, ((0, 1), (2, 3)))

    run_local(work, 4, timeout=30)


def test_unshard_compares_device_types(monkeypatch):
    monkeypatch.setattr("ringspan.sharding.check_holds_numbers", lambda **x: None)  # "meta" stands for another device

    def work(group):
        with pytest.raises(DisagreementError, match=r"disagree on device type(.|\n)*'cpu' on rank 0; 'meta' on rank 1"):
            ringspan.unshard(torch.zeros(4, device="meta" if group.rank() else "cpu"), 0, group=group)

    run_local(work, 2, timeout=30)


@pytest.mark.parametrize("place", [1, 2])
def test_tensors_on_several_devices_are_refused(place):
    tensors = [torch.zeros(1, 1, 4, 4) for _ in range(3)]
    tensors[place] = tensors[place].to("meta")
    with pytest.raises(TypeError, match=f"share one device(.|\n)*q: cpu, {'qkv'[place]}: meta"):
        ringspan.ring_attention(*tensors)


def refused_by_gloo(rank):
    import torch.distributed as dist

    from ringspan.transport.process_group import transport_of

    transport = transport_of(dist.group.WORLD).torch_dist
    with pytest.raises(NotImplementedError, match=r"cannot send tensors that are on cuda(.|\n)*gloo(.|\n)*cuda:nccl"):
        transport.channel(transport.begin_call(), range(2), device_type="cuda")


def test_a_group_without_nccl_refuses_cuda_tensors():
    results(run_processes(refused_by_gloo, 2))


def test_shared_memory_that_is_asked_for_refuses_cuda_tensors():
    transport = object.__new__(ProcessGroupTransport)
    transport.shared_memory = object()  # it serves those of CPUs
    with pytest.raises(UnsupportedError, match=r"cannot serve this call(.|\n)*the tensors are on cuda"):
        transport.channel(1, range(2), "shared_memory", "cuda")


def test_a_mask_whose_copy_a_graph_would_not_repeat_is_not_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    edges = torch.tensor([0, 2]).numpy()
    with pytest.raises(UnsupportedError, match="cannot be captured"):
        bounds(RowIntervals(2, 3, None, edges, edges + 1), torch.device("cuda"))
    with FakeTensorMode():
        band = RowIntervals(2, 3, Band(upper=1))
        found = bounds(band, torch.device("cuda"))
        assert found.is_band and found.lo.numel() == found.hi.numel() == 0
        assert bounds(band, torch.device("cuda")) is found, "once for all calls"
        assert bounds(band, torch.device("cuda", 1)).lo.device.index == 1
        assert bounds(RowIntervals(2, 3, Band(upper=2)), torch.device("cuda")).rule["upper"] == 2
