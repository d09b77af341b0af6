"""Gradients through the ring as users of torch take them: gradcheck, compile, checkpoint, autocast, grad modes."""

import threading
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from definition import relative_error
from processes import results, run_processes
from torch.utils.checkpoint import checkpoint

import ringspan
from ringspan import call, run_local


def tensors(dtype=torch.float32, tokens=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 4, tokens, 8), (1, 2, tokens, 8), (1, 2, tokens, 8))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(causal=True, window_size=(3, 0))])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_gradcheck_passes_through_a_whole_ring(options, kv_heads):
    """Every rank moves the same element of its own shard by the same amount, so that the ranks stay in step; the
    sum of all ranks' outputs is what each rank's gradient is of."""

    def work(group):
        generator = torch.Generator().manual_seed(group.rank())
        q, k, v = (
            torch.randn(1, heads, 3, 2, generator=generator, dtype=torch.float64).requires_grad_()
            for heads in (2, kv_heads, kv_heads)
        )

        def together(*shards):
            out, lse = ringspan.ring_attention(*shards, layout="zigzag", return_lse=True, **options)
            # Each rank sees the sum over ranks, so that a moved element shows wherever it is used.
            return torch.stack([ringspan.unshard(x, 2, layout="zigzag").sum() for x in (out * weight, lse)])

        weight = torch.arange(12, dtype=torch.float64).view(1, 2, 3, 2)

        def alone_moved(which, place, change):
            moved = [x.detach().clone() for x in (q, k, v)]
            if group.rank() == which[0]:
                moved[which[1]].view(-1)[place] += change
            with torch.no_grad():
                return together(*moved).sum()

        (together(q, k, v).sum() / group.size()).backward()
        step = 1e-6
        for rank in range(group.size()):
            for index, x in enumerate((q, k, v)):
                for place in range(x.numel()):
                    up, down = (alone_moved((rank, index), place, change) for change in (step, -step))
                    if group.rank() == rank:
                        expected = (up - down) / (2 * step)
                        assert abs(x.grad.view(-1)[place] - expected) < 1e-7

    run_local(work, 2)


def test_gradcheck_of_torch_passes_on_a_ring_of_one():
    q, k, v = (x[..., :3].detach().requires_grad_() for x in tensors(torch.float64, tokens=5))
    fn = lambda *x: ringspan.ring_attention(*x, causal=True, return_lse=True)  # noqa: E731
    assert torch.autograd.gradcheck(fn, (q, k, v))


def test_a_second_derivative_is_refused():
    q, k, v = tensors()
    out = ringspan.ring_attention(q, k, v)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(ringspan.UnsupportedError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own use of it
def test_forward_mode_is_refused_and_not_a_derivative_of_0():
    q, k, v = (x.detach() for x in tensors())
    sinks = torch.zeros(q.shape[1])
    with pytest.raises(ringspan.UnsupportedError, match="k carries a tangent"):
        torch.func.jvp(lambda k: ringspan.ring_attention(q, k, v), (k,), (k,))
    with pytest.raises(ringspan.UnsupportedError, match="sinks carries a tangent"):
        torch.func.jacfwd(lambda sinks: ringspan.ring_attention(q, k, v, sinks=sinks))(sinks)


def refused_while_compiled(rank, dynamic):
    q, k, v = (x.detach() for x in tensors())
    sinks = torch.zeros(q.shape[1] + rank)

    def fn(q, k, v, sinks):
        return (ringspan.ring_attention(q, k, v[..., :3], sinks=sinks) @ torch.ones(3, 2)).square().sum()

    try:
        torch.compile(fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")(q, k, v, sinks)
    except ringspan.RingspanError as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_refused_while_a_graph_is_traced_is_told_to_all_when_it_runs(dynamic):
    (first, told), (second, said) = results(run_processes(refused_while_compiled, 2, dynamic))
    assert (first, second) == ("PeerRefusedError", "ArgumentError")
    assert "shape [5], q has 4 heads" in said and said.splitlines()[0] in told


@pytest.mark.parametrize(
    "options", [dict(layout="zigzg"), dict(window_size=3), dict(softmax_scale=float("nan")), dict(sinks=[0.0] * 4)]
)
def test_a_refusal_has_its_own_words_in_compiled_code_too(options):
    q, k, v = (x.detach() for x in tensors())
    compiled = torch.compile(lambda q: ringspan.ring_attention(q, k, v, **options), fullgraph=True, backend="aot_eager")
    with pytest.raises(ringspan.RingspanError, match=next(iter(options))):
        compiled(q)


def grads_of(loss, inputs):
    for x in inputs:
        x.grad = None
    loss.backward()
    return [x.grad.clone() for x in inputs]


def compile_and_checkpoint(rank):
    inputs = tensors(seed=rank)

    def fn(q, k, v, documents=(0, 31, 48)):
        out, lse = ringspan.ring_attention(
            q * 2, k, v, causal=True, layout="zigzag", cu_seqlens=documents, return_lse=True
        )
        return out.square().sum() + lse.sum()

    plain = fn(*inputs)
    expected = grads_of(plain, inputs)
    found = {"compile": torch.compile(fn, fullgraph=True, backend="aot_eager")(*inputs)}
    ways = {"compile": grads_of(found["compile"], inputs)}
    documents = torch.tensor([0, 31, 48])
    found["compile, a tensor of documents"] = torch.compile(fn, fullgraph=True, backend="aot_eager")(*inputs, documents)
    ways["compile, a tensor of documents"] = grads_of(found["compile, a tensor of documents"], inputs)
    for reentrant in (False, True):
        name = f"checkpoint {reentrant}"
        found[name] = checkpoint(fn, *inputs, use_reentrant=reentrant)
        ways[name] = grads_of(found[name], inputs)
    for name, grads in ways.items():
        assert torch.equal(found[name], plain), name
        for grad, exact in zip(grads, expected, strict=True):
            assert torch.equal(grad, exact), name
    return True


def test_compiled_without_a_graph_break_and_checkpointed_calls_have_the_same_bits():
    assert results(run_processes(compile_and_checkpoint, 2)) == [True, True]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch 2.15 asks its own copies
@pytest.mark.parametrize("op", ["attend", "attend_backward"])
def test_the_custom_ops_pass_the_checks_of_torch_library(op):
    q, k, v = (x.detach() for x in tensors())
    options = (None, [torch.tensor([[0, 20]] * 24)], "alone", "contiguous", -1, 0, None, "auto", "auto", True, "", 0)
    if op == "attend":
        args = (q, k, v, torch.zeros(q.shape[1], requires_grad=True), *options)
    else:
        out, lse = torch.ops.ringspan.attend(q, k, v, None, *options)
        args = (torch.randn_like(out), None, q, k, v, out, lse, *options)
    torch.library.opcheck(getattr(torch.ops.ringspan, op).default, args)


def test_under_autocast_attention_runs_in_its_dtype_and_accumulates_in_float32():
    q, k, v = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out = ringspan.ring_attention(q, k.bfloat16(), v)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
    rounded = [x.detach().bfloat16() for x in (q, k, v)]
    assert torch.equal(out, ringspan.ring_attention(*rounded))


def test_under_autocast_float64_stays_float64():
    """As in torch's own attention, which autocast takes for asked for."""
    q, k, v = (x.detach() for x in tensors(torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        out = ringspan.ring_attention(q, k, v)
        assert torch.nn.functional.scaled_dot_product_attention(q, q, q).dtype == torch.float64
    assert torch.equal(out, ringspan.ring_attention(q, k, v))


def test_the_gradient_of_lse_alone_is_right():
    q, k, v = tensors(torch.float64)
    _, lse = ringspan.ring_attention(q, k, v, return_lse=True)
    lse.sum().backward()
    leaf = q.detach().requires_grad_()
    (leaf @ k.detach().repeat_interleave(2, 1).mT * 8**-0.5).logsumexp(-1).sum().backward()
    torch.testing.assert_close(q.grad, leaf.grad)
    assert not v.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_delta_is_made_in_float32_of_inputs_of_16_bits(dtype, monkeypatch):
    """All of a row's gradients have its error in common, and subtract it from terms of its size."""
    found = []
    backward = call.execute.backward
    monkeypatch.setattr(call.execute, "backward", lambda *args: (found.append(args[-1]), backward(*args))[1])
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in tensors())
    out, lse = ringspan.ring_attention(q, k, v, return_lse=True)
    do, dlse = torch.randn_like(out), torch.randn_like(lse)
    torch.autograd.backward((out, lse), (do, dlse))
    exact = (do.double() * out.detach().double()).sum(-1) - dlse
    assert relative_error(found[0], exact) < 1e-6


def test_kernels_are_given_the_gradient_of_a_sum_as_rows_in_memory(monkeypatch):
    """torch expands it from one number; Hopper's kernels read no strides of 0 and would leave it to a slower one."""
    found = []
    backward = call.execute.backward
    monkeypatch.setattr(call.execute, "backward", lambda *args: (found.append(args[5]), backward(*args))[1])
    q, k, v = tensors()
    ringspan.ring_attention(q, k, v).sum().backward()
    assert found[0].is_contiguous() and torch.equal(found[0], torch.ones_like(found[0]))


def test_only_what_requires_grad_gets_one():
    q, k, v = tensors()
    k.requires_grad_(False)
    ringspan.ring_attention(q, k, v).sum().backward()
    assert q.grad is not None and k.grad is None and v.grad is not None


def test_ranks_that_differ_in_what_requires_grad_are_told():
    def work(group):
        q, k, v = tensors()
        if group.rank() == 1:
            k = k.detach()
        with pytest.raises(ringspan.DisagreementError, match="which of q, k, v and sinks require grad"):
            ringspan.ring_attention(q, k, v)

    run_local(work, 2)


def test_what_requires_grad_is_no_matter_where_nothing_is_differentiated():
    def work(group):
        q, k, v = (x.requires_grad_(group.rank() == 1) for x in (x.detach() for x in tensors()))
        with torch.no_grad():
            return ringspan.ring_attention(q, k, v).shape, ringspan.unshard(q, 2).shape

    assert run_local(work, 2) == [((1, 4, 24, 8), (1, 4, 48, 8))] * 2


def test_modes_of_the_caller_hold_in_the_workers_and_torch_threads_are_restored():
    before = torch.get_num_threads(), threading.active_count()

    def modes(group):
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        is_cached = torch.is_autocast_cache_enabled()
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, is_cached

    assert run_local(modes, 2) == [(True, False, False, True)] * 2
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert run_local(modes, 2) == [(False, False, torch.float16, True)] * 2
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert run_local(modes, 2) == [(True, False, torch.bfloat16, False)] * 2
    with torch.inference_mode():
        assert run_local(modes, 2) == [(False, True, False, True)] * 2
        out = run_local(lambda group: ringspan.ring_attention(*(x.detach() for x in tensors())), 2)
        assert not out[0].requires_grad
    assert (torch.get_num_threads(), threading.active_count()) == before


def test_the_graph_keeps_nothing_but_q_k_v_out_and_lse():
    q, k, v = tensors()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ringspan.ring_attention(q, k, v, causal=True)
    assert sorted(x.shape for x in kept) == sorted([q.shape, k.shape, v.shape, q.shape, q.shape[:3]])


def differentiated_and_refused(rank):
    q, k, v = tensors()
    compiled = torch.compile(
        lambda q: ringspan.ring_attention(q, k, v, layout="zigzg" if rank else "zigzag").sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    try:
        compiled(q).backward()
    except ringspan.RingspanError as error:
        return type(error).__name__, str(error)


def test_a_refusal_is_told_where_the_graph_is_differentiated_too():
    (first, told), (second, said) = results(run_processes(differentiated_and_refused, 2))
    assert (first, second) == ("PeerRefusedError", "ArgumentError")
    assert "layout is unknown" in said and said.splitlines()[0] in told


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own use of it
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_refusal_in_a_graph_is_told_though_nobody_uses_what_was_refused(backend):
    q, k, v = (x.detach() for x in tensors())

    def unused(q):
        ringspan.ring_attention(q, k, v, layout="zigzg")
        return q + 1

    with pytest.raises(ringspan.ArgumentError, match="layout is unknown"):
        torch.compile(unused, fullgraph=True, backend=backend)(q)
    torch.compiler.reset()


@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap of documents", "vmap of ranges"])
def test_the_transforms_of_torch_func_are_refused_in_ones_own_words(transform):
    q, k, v = (x.detach() for x in tensors())
    ways = {
        "grad": lambda: torch.func.grad(lambda q: ringspan.ring_attention(q, k, v).sum())(q),
        "vmap": lambda: torch.vmap(lambda k: ringspan.ring_attention(q, k, v))(k[None]),
        "vmap of documents": lambda: torch.vmap(lambda x: ringspan.ring_attention(q, k, v, cu_seqlens=x))(
            torch.tensor([[0, 9, 24], [0, 8, 24]])
        ),
        "vmap of ranges": lambda: torch.vmap(lambda x: ringspan.ring_attention(q, k, v, key_ranges=x))(
            torch.ones(2, 24, 2).int()
        ),
    }
    with pytest.raises(ringspan.UnsupportedError, match=r"torch\.func(.|\n)*inside of grad, vjp, vmap"):
        ways[transform]()


def test_masks_that_were_made_in_inference_mode_serve_training():
    def grads(documents, ranges):
        q, k, v = tensors()
        out = ringspan.ring_attention(q, k, v, cu_seqlens=documents, key_ranges=ranges)
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    made = torch.tensor([0, 9, 24]), torch.tensor([[3, 20]] * 24)
    with torch.inference_mode():
        of_inference_mode = [x.clone() for x in made]
    assert all(map(torch.equal, grads(*made), grads(*of_inference_mode)))


def test_meta_tensors_on_one_rank_are_a_refusal_and_no_made_up_result():
    def work(group):
        q, k, v = (x.detach().to("meta" if group.rank() else "cpu") for x in tensors())
        with pytest.raises((ringspan.ArgumentTypeError, ringspan.PeerRefusedError), match="q must hold numbers"):
            ringspan.ring_attention(q, k, v)
        return True

    assert run_local(work, 2, timeout=20) == [True, True]


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.to_qkv, self.to_out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + self.to_out(ringspan.ring_attention(q, k, v, causal=True).transpose(1, 2).flatten(2))

    def whose_output_is_unused(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        ringspan.ring_attention(q, k, v)
        return x + 1


@pytest.fixture
def passes(monkeypatch):
    """What a rank computed, in order."""
    made = []
    for name in ("forward", "backward"):
        inner = getattr(call, name)
        monkeypatch.setattr(
            call, name, lambda *args, name=name, inner=inner, **kw: made.append(name) or inner(*args, **kw)
        )
    return made


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own use of it
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_a_compiled_rank_calls_though_its_shard_is_empty_or_its_output_unused(backend, tokens, passes):
    """Else the others would wait for it. Inductor knows what has no elements without computing it."""
    model = Attention()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(torch.randn(1, tokens, 8)).square().sum().backward()
    assert passes == ["forward", "backward"]
    with torch.no_grad():
        compiled(torch.randn(1, tokens, 8))
        torch.compile(model.whose_output_is_unused, fullgraph=True, backend=backend)(torch.randn(1, tokens, 8))
    assert passes[2:] == ["forward", "forward"]
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own use of it
@pytest.mark.parametrize("compiled", [False, True])
def test_backwards_in_another_order_on_another_rank_are_refused(compiled):
    """All their shapes and options are equal; gradients would be of each other's tensors."""

    leaves = [[x.detach() * factor for x in tensors(seed=1)] for factor in (1, 2)]

    def attend(q, k, v):
        return ringspan.ring_attention(q, k, v, causal=True)

    if compiled:
        attend = torch.compile(attend, backend="aot_eager")

    def work(group):
        outs = [attend(*(ringspan.shard(x, 2).requires_grad_() for x in each)) for each in leaves]
        for out in outs if group.rank() else reversed(outs):
            out.square().sum().backward()

    with pytest.raises(ringspan.DisagreementError, match=r"which call this is the backward of(.|\n)*call 1 on rank 1"):
        run_local(work, 2, timeout=60)
    torch.compiler.reset()


def test_backwards_of_unshard_in_another_order_are_refused_too():
    def work(group):
        outs = [ringspan.unshard(torch.ones(3, requires_grad=True) * factor, 0) for factor in (1, 2)]
        for out in outs if group.rank() else reversed(outs):
            out.sum().backward()

    with pytest.raises(ringspan.DisagreementError, match="which call this is the backward of"):
        run_local(work, 2, timeout=60)


def test_backwards_in_any_order_that_ranks_share_are_right_also_where_what_was_saved_is_a_copy():
    def work(group):
        q, k, v = tensors(seed=1)
        grads = []
        for save in (False, True):
            hooks = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x) if save else nullcontext()
            leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
            with hooks:
                outs = [ringspan.ring_attention(*(x * factor for x in leaves), causal=True) for factor in (1, 2, 3)]
            for number in (2, 0, 1):
                outs[number].square().sum().backward(retain_graph=True)
            outs[1].sum().backward()
            grads.append([x.grad for x in leaves])
        return all(map(torch.equal, *grads))

    assert run_local(work, 2, timeout=60) == [True, True]


def test_only_calls_whose_memory_lives_are_remembered():
    def work(group):
        q, k, v = tensors()
        for _ in range(300):
            ringspan.ring_attention(q, k, v)
        return True

    assert all(run_local(work, 2, timeout=60)) and len(call._forwards._known) < 200


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own use of it
@pytest.mark.filterwarnings("ignore:.*TensorFloat32|.*lowmem_dropout:UserWarning")
def test_calls_that_inductor_orders_otherwise_on_another_rank_are_refused_not_mixed_up():
    """It orders what is independent by memory. All calls have equal shapes but for the lengths of shards."""

    def calls(x, y, z):
        def attend(t):
            heads = t.unflatten(-1, (2, -1)).transpose(1, 2)
            return ringspan.ring_attention(heads, heads, heads).transpose(1, 2).flatten(2)

        first, second, third = attend(x.repeat(1, 1, 8)), attend(y).sum(-1, keepdim=True), attend(z.repeat(1, 1, 4))
        return second + attend(y * 2).mean(), attend(third + 1).sum(), first.sum() + first.mean(1).sum()

    def work(group, reorder):
        torch._inductor.config.reorder_for_peak_memory = reorder  # a thread's own
        lengths = (64, 700, 64) if group.rank() else (64, 64, 700)
        with torch.no_grad():
            compiled(*(torch.randn(1, length, 16) for length in lengths))

    torch.compiler.reset()
    compiled = torch.compile(calls, fullgraph=True, dynamic=False)
    words = r"call of a compiled graph(.|\n)*reorder_for_peak_memory = False"
    with pytest.raises(ringspan.DisagreementError, match=words):
        run_local(work, 2, True, timeout=100)
    torch.compiler.reset()
    run_local(work, 2, False, timeout=100)
    torch.compiler.reset()


def test_each_call_of_a_graph_has_its_place_and_the_next_graph_begins_anew(monkeypatch):
    places, inner = [], call.forward

    def noting(transport, q, k, v, asked, **others):
        places.append(asked.place_in_graph)
        return inner(transport, q, k, v, asked, **others)

    monkeypatch.setattr(call, "forward", noting)
    q, k, v = (x.detach() for x in tensors())

    def twice(q):
        return ringspan.ring_attention(ringspan.ring_attention(q, k, v), k, v)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager", dynamic=False)
    for x in (q, q, q[:, :, :5]):
        compiled(x)
    twice(q)
    torch.compiler.reset()
    assert places == [1, 2] * 3 + [0, 0]


def backward_on_another_group_of_the_name(rank, folder):
    x = torch.ones(1, 1, 4, 8, requires_grad=True)
    results = ringspan.ring_attention(x, x, x), ringspan.unshard(x, 2)
    dist.destroy_process_group()
    again = dist.FileStore(f"{folder}/again", 2)
    dist.init_process_group("gloo", store=again, rank=1 - rank, world_size=2, timeout=timedelta(seconds=60))
    for result in results:
        with pytest.raises(ringspan.ArgumentError, match="the group of the forward is not that of its backward"):
            result.sum().backward()
    return ringspan.unshard(torch.tensor([rank]), 0).tolist()


def test_a_backward_does_not_run_on_another_group_of_the_same_name(tmp_path):
    assert results(run_processes(backward_on_another_group_of_the_name, 2, str(tmp_path))) == [[1, 0], [1, 0]]
