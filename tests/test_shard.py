"""shard and positions: a place that is given, documents, and graphs of torch.compile."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import results, run_processes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import ringspan
from ringspan import run_local


def test_a_place_may_be_given_instead_of_a_group():
    x = torch.arange(10)
    assert ringspan.shard(x, 0, layout="striped", rank=1, num_ranks=3).tolist() == [1, 4, 7]
    assert ringspan.positions(10, layout="zigzag", rank=0, num_ranks=2).tolist() == [0, 1, 2, 8, 9]
    with pytest.raises(ringspan.ArgumentError, match="a place is a group, or rank and num_ranks"):
        ringspan.positions(10, rank=1)
    with pytest.raises(ringspan.ArgumentError, match="rank 3 of 3"):
        ringspan.shard(x, 0, rank=3, num_ranks=3)
    for no_integer in (2.5, True):
        with pytest.raises(ringspan.ArgumentTypeError, match="num_tokens must be an integer"):
            ringspan.positions(no_integer)
    with pytest.raises(ringspan.ArgumentTypeError, match="num_tokens must be an integer") as told:
        ringspan.positions(torch.randn(30, 30))  # not all that it holds
    assert len(str(told.value)) < 300
    with pytest.raises(ringspan.ArgumentError, match="rank must be at least 0"):
        ringspan.shard(x, 0, rank=-1, num_ranks=3)
    with pytest.raises(ringspan.ArgumentError, match="a place is a group, or rank and num_ranks"):
        run_local(lambda group: ringspan.shard(x, 0, group=group, rank=0, num_ranks=2), 2)
    assert ringspan.positions(np.int64(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_shard_is_a_copy_that_lies_in_one_piece(layout, num_ranks):
    x = torch.arange(24.0).view(2, 6, 2)
    for dim in (1, -2):
        mine = ringspan.shard(x, dim, layout=layout, rank=0, num_ranks=num_ranks)
        assert mine.is_contiguous() and mine.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert torch.equal(mine, x[:, ringspan.positions(6, layout=layout, rank=0, num_ranks=num_ranks)])


def test_a_dimension_may_be_counted_from_the_end():
    x = torch.arange(24.0).view(2, 2, 6).requires_grad_()

    def work(group):
        full = ringspan.unshard(ringspan.shard(x, -1, layout="zigzag"), -1 if group.rank() else 2, layout="zigzag")
        (grad,) = torch.autograd.grad(full.square().sum(), x)
        return torch.equal(full, x), grad

    found = run_local(work, 3)
    assert all(same for same, _ in found)
    assert torch.equal(sum(grad for _, grad in found), 3 * 2 * x)  # every rank's loss holds every token


def test_positions_count_from_the_start_of_each_document():
    documents = [0, 4, 4, 10]
    found = ringspan.positions(10, layout="zigzag", rank=0, num_ranks=2, cu_seqlens=documents)
    assert found.tolist() == [0, 1, 2, 4, 5]
    assert torch.equal(
        found, ringspan.positions(10, layout="zigzag", rank=0, num_ranks=2, cu_seqlens=torch.tensor(documents))
    )
    with pytest.raises(ringspan.ArgumentError, match="must begin with 0"):
        ringspan.positions(11, cu_seqlens=[])
    with pytest.raises(ringspan.ArgumentError, match="it ends at 10, there are 11 tokens"):
        ringspan.positions(11, cu_seqlens=documents)


def test_a_process_that_is_one_of_several_is_no_ring_of_one(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    x = torch.zeros(1, 1, 4, 2)
    for call in (lambda: ringspan.shard(x, 2), lambda: ringspan.positions(4), lambda: ringspan.ring_attention(x, x, x)):
        with pytest.raises(ringspan.ArgumentError, match="RANK=1 and WORLD_SIZE=4"):
            call()
    assert ringspan.positions(4, rank=1, num_ranks=4).tolist() == [1]
    assert ringspan.run_local(lambda group: ringspan.positions(4).tolist(), 1) == [[0, 1, 2, 3]]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ringspan.positions(4).tolist() == [0, 1, 2, 3]


def gradient(y, x):
    return torch.autograd.grad(y.square().sum(), x)[0]


def place(x, layout, rank, num_ranks):
    """What a model does at its beginning: this rank's tokens, and where they are."""
    where = ringspan.positions(x.shape[1], layout=layout, rank=rank, num_ranks=num_ranks)
    return ringspan.shard(x, 1, layout=layout, rank=rank, num_ranks=num_ranks) * where[:, None]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
def test_shards_and_positions_are_nodes_of_a_graph(layout, dynamic):
    for rank, tokens in ((0, 2), (1, 17), (2, 23)):
        torch._dynamo.reset()
        x = torch.randn(2, tokens, 3, requires_grad=True)
        compiled = torch.compile(place, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        found = compiled(x, layout, rank, 3)
        grad = gradient(found, x)
        expected = place(x, layout, rank, 3)
        assert torch.equal(found, expected)
        assert torch.equal(grad, gradient(expected, x))


def place_in_group(rank, folder):
    """All ranks with torch's caches of compiled code in one folder, as they are on one host; one after the other."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    x = torch.arange(10.0).view(1, 10, 1)
    torch._dynamo.reset()
    fn = lambda x: ringspan.shard(x, 1, layout="zigzag") + ringspan.positions(x.shape[1], layout="zigzag")[:, None]  # noqa: E731
    for turn in range(3):
        if turn == rank:
            found = torch.compile(fn, fullgraph=True)(x)
        dist.barrier()
    return torch.equal(found, fn(x))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_graph_finds_its_place_in_the_group_of_processes_and_of_threads(tmp_path):
    assert results(run_processes(place_in_group, 3, str(tmp_path))) == [True] * 3
    x, fn = torch.ones(1, 7, 3), torch.compile(lambda x: ringspan.shard(x, 1), fullgraph=True, backend="aot_eager")
    assert run_local(lambda group: fn(x).shape[1], 3) == [3, 2, 2]


def test_positions_of_any_length_are_one_graph():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    fn = torch.compile(
        lambda x: x + ringspan.positions(x.shape[0], layout="zigzag", rank=1, num_ranks=2).sum(),
        fullgraph=True,
        backend=backend,
    )
    for tokens in range(20, 32):
        expected = ringspan.positions(tokens, layout="zigzag", rank=1, num_ranks=2).sum()
        assert torch.equal(fn(torch.zeros(tokens)), expected.expand(tokens).float())
    assert len(graphs) <= 3


def test_a_process_alone_may_compile_it():
    torch._dynamo.reset()
    x = torch.arange(4.0)
    fn = torch.compile(lambda x: ringspan.shard(x, 0) + ringspan.positions(4), fullgraph=True, backend="aot_eager")
    assert torch.equal(fn(x), 2 * x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own use of it
def test_a_graph_has_no_derivative_of_0_in_forward_mode():
    torch._dynamo.reset()
    x, tangent = torch.arange(4.0), torch.ones(4)
    differentiate = lambda x, t: torch.func.jvp(lambda x: ringspan.shard(x, 0, rank=0, num_ranks=2), (x,), (t,))[1]  # noqa: E731
    assert torch.equal(differentiate(x, tangent), torch.ones(2))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(differentiate, fullgraph=True, backend="aot_eager")(x, tangent)


def test_positions_are_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        found = ringspan.positions(6, rank=1, num_ranks=2, cu_seqlens=[0, 4, 6])
    assert found.tolist() == [3, 0, 1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch 2.15 asks its own copies
def test_the_ops_of_shard_pass_the_checks_of_torch_library():
    x = torch.randn(2, 7, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.ringspan.shard.default, (x, 1, "zigzag", None, 1, 3))
    d = torch.randn(2, 2, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.ringspan.shard_backward.default, (d, 1, "zigzag", None, 1, 3, 7))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_what_is_no_dense_tensor_of_this_rank_is_refused():
    class DTensor(torch.Tensor):  # by name, as that of torch.distributed.tensor
        pass

    nested = torch._nested_tensor_from_mask(torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    for x, words in (
        (torch.ones(4).as_subclass(DTensor), "x.to_local()"),
        (torch.ones(4).to_sparse(), ".to_dense()"),
        (nested, "a nested tensor"),
    ):
        for call in (ringspan.shard, ringspan.unshard):
            with pytest.raises(ringspan.ArgumentTypeError, match=words):
                call(x, 0)


def refused_by_one(x):
    """What each rank hears of an unshard to which rank 1 comes with x."""

    def work(group):
        with pytest.raises(ringspan.RingspanError) as caught:
            ringspan.unshard(x if group.rank() else torch.ones(1, 2), 1)
        return type(caught.value), str(caught.value)

    (peer, told), (own, words) = run_local(work, 2, timeout=20)
    assert peer is ringspan.PeerRefusedError and words.splitlines()[0] in told
    return own, words


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own use of it
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_unshard_refuses_what_torch_would_on_every_rank():
    nested = torch._nested_tensor_from_mask(torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    own, words = refused_by_one(nested)
    assert own is ringspan.ArgumentTypeError and "a nested tensor" in words
    own, words = refused_by_one(torch.ones(1, 2, device="meta"))
    assert own is ringspan.ArgumentTypeError and "x must hold numbers" in words
    with forward_ad.dual_level():
        own, words = refused_by_one(forward_ad.make_dual(torch.ones(1, 2), torch.ones(1, 2)))
    assert own is ringspan.UnsupportedError and "x carries a tangent" in words
    for transform in (torch.func.vmap, torch.func.grad):
        with pytest.raises(ringspan.UnsupportedError, match="unshard does not go through the transforms"):
            transform(lambda x: ringspan.unshard(x, 0).sum())(
                torch.ones(1, 2) if transform is torch.vmap else torch.ones(2)
            )


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
def test_unshard_is_not_recorded_as_constants_nor_imitated():
    x = torch.ones(3, requires_grad=True)
    full = ringspan.unshard(x, 0)

    def gather(x):
        return ringspan.unshard(x, 0)

    def differentiate(d):
        return torch.autograd.grad(full, x, d)

    with pytest.raises(ringspan.UnsupportedError, match="unshard cannot be recorded"):
        make_fx(gather)(torch.ones(3))
    with pytest.raises(ringspan.UnsupportedError, match="the backward of unshard cannot be recorded"):
        make_fx(differentiate)(torch.ones(3))
    with pytest.raises(ringspan.UnsupportedError, match="unshard cannot be recorded"):
        torch.jit.trace(gather, torch.ones(3), check_trace=False)
    with FakeTensorMode(), pytest.raises(ringspan.UnsupportedError, match="got  a fake tensor"):
        gather(torch.ones(3))
    assert gather(torch.ones(3)).tolist() == [1, 1, 1]


def differentiated_by_compiled_autograd(rank):
    weights, mine = torch.ones(4, 4, requires_grad=True), torch.arange(8.0).view(2, 4) + rank

    def gradient():
        (ringspan.unshard(mine @ weights, 0) ** 2).sum().backward()
        found, weights.grad = weights.grad, None
        return found

    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        found = gradient()
    return torch.equal(found, gradient())


def test_the_backward_of_unshard_goes_through_compiled_autograd():
    assert results(run_processes(differentiated_by_compiled_autograd, 2)) == [True, True]
