"""Ranks that die, raise, come late or disagree: the others get an error that says so, soon, and none hangs."""

import functools
import os
import signal
import threading

import pytest
import torch
from processes import results, run_processes
from torch.utils.checkpoint import checkpoint

import ringspan
from ringspan import run_local
from ringspan.agreement import MESSAGE_BYTES, _pack
from ringspan.arguments import check_like, check_tensors
from ringspan.kernels.table import KERNELS
from ringspan.transport.local import Board


def shards(tokens=8, heads=2, head_dim=4, dtype=torch.float32, seed=0, batch=1, kv_heads=None, value_dim=None):
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, head_dim), (kv_heads or heads, head_dim), (kv_heads or heads, value_dim or head_dim)
    return [torch.randn(batch, num, tokens, dim, generator=generator).to(dtype) for num, dim in sizes]


def errors(endings):
    return [None if ending.error is None else (type(ending.error), str(ending.error)) for ending in endings]


# Each of these is what one rank does differently, and what the message must say on every rank.
DISAGREEMENTS = {
    "head_dim": (dict(head_dim=5, value_dim=4), {}, "disagree on head_dim.\n"),
    "dtype": (dict(dtype=torch.bfloat16), {}, "disagree on dtype"),
    "heads": (dict(heads=3), {}, "disagree on the number of query heads"),
    "key heads": (dict(kv_heads=1), {}, "disagree on the number of key/value heads"),
    "batch": (dict(batch=2), {}, "disagree on batch"),
    "head_dim of v": (dict(value_dim=5), {}, "disagree on head_dim of v"),
    "causal": ({}, dict(causal=True), "disagree on causal and window_size"),
    "layout": ({}, dict(layout="zigzag"), "disagree on layout"),
    "scale": ({}, dict(softmax_scale=0.5), "disagree on softmax_scale"),
    "documents": ({}, dict(cu_seqlens=[0, 3, 24]), "disagree on cu_seqlens"),
    "ranges": ({}, dict(key_ranges=torch.tensor([[0, 9]] * 24)), "disagree on key_ranges"),
    "kernel": ({}, dict(kernel="reference"), "disagree on kernel"),
}

# What one rank passes that breaks a rule, the class that it gets, and words of the message.
REFUSALS = {
    "rank of q": (lambda q, k, v: ((q[0], k, v), {}), ValueError, "q must have 4 dimensions"),
    "not a tensor": (lambda q, k, v: ((q, [1], v), {}), TypeError, "k must be a torch.Tensor"),
    "integers": (lambda q, k, v: ((q.int(), k, v), {}), TypeError, "q has an unsupported dtype"),
    "dtype mix": (lambda q, k, v: ((q, k.double(), v), {}), TypeError, "share one dtype"),
    "heads": (lambda q, k, v: ((q[:, :1], k, v), {}), ValueError, "multiple of the number of key/value heads"),
    "k, v shapes": (lambda q, k, v: ((q, k, v[:, :, 1:]), {}), ValueError, "k and v must have one shape"),
    "k, v heads": (lambda q, k, v: ((q, k, v[:, :1]), {}), ValueError, "k and v must have one shape"),
    "k, v batches": (lambda q, k, v: ((q, k, v.expand(2, -1, -1, -1)), {}), ValueError, "k and v must have one shape"),
    "head_dim": (lambda q, k, v: ((q[..., 1:], k, v), {}), ValueError, "one head_dim"),
    "layout": (lambda q, k, v: ((q, k, v), dict(layout="spiral")), ValueError, "layout is unknown"),
    "kernel": (lambda q, k, v: ((q, k, v), dict(kernel="abacus")), ValueError, "kernel is unknown"),
    "window": (lambda q, k, v: ((q, k, v), dict(window_size=(-2, 0))), ValueError, "at least -1"),
    "window on the right": (lambda q, k, v: ((q, k, v), dict(window_size=(0, -2))), ValueError, "at least -1"),
    "window type": (lambda q, k, v: ((q, k, v), dict(window_size=7)), TypeError, "two integers"),
    "scale": (lambda q, k, v: ((q, k, v), dict(softmax_scale=float("nan"))), ValueError, "must be finite"),
    "documents start": (lambda q, k, v: ((q, k, v), dict(cu_seqlens=[1, 24])), ValueError, "begin with 0"),
    "documents order": (lambda q, k, v: ((q, k, v), dict(cu_seqlens=[0, 9, 3, 24])), ValueError, "not decrease"),
    "causal": (lambda q, k, v: ((q, k, v), dict(causal=1)), TypeError, "causal must be a bool"),
    "transport": (lambda q, k, v: ((q, k, v), dict(transport="pigeon")), ValueError, "transport is unknown"),
    "kernel type": (lambda q, k, v: ((q, k, v), dict(kernel=None)), TypeError, "kernel must be a name"),
    "window size": (lambda q, k, v: ((q, k, v), dict(window_size=(2**70, 0))), ValueError, "at least -1"),
    "scale size": (lambda q, k, v: ((q, k, v), dict(softmax_scale=10**400)), ValueError, "must be finite"),
    "documents size": (lambda q, k, v: ((q, k, v), dict(cu_seqlens=(0, 2**70))), ValueError, "64-bit"),
    "documents type": (lambda q, k, v: ((q, k, v), dict(cu_seqlens=torch.zeros(2))), TypeError, "tensor of integers"),
    "ranges type": (lambda q, k, v: ((q, k, v), dict(key_ranges=[[0, 9]] * 24)), TypeError, "must be a torch.Tensor"),
    "ranges dtype": (lambda q, k, v: ((q, k, v), dict(key_ranges=torch.zeros(24, 2))), TypeError, "must hold integers"),
    "ranges of 2**64": (
        lambda q, k, v: ((q, k, v), dict(key_ranges=torch.zeros(24, 2).to(torch.uint64))),
        TypeError,
        "integers",
    ),
    "sparse ranges": (
        lambda q, k, v: ((q, k, v), dict(key_ranges=torch.eye(24, 2).int().to_sparse())),
        TypeError,
        "must be a dense tensor",
    ),
    "sparse documents": (
        lambda q, k, v: ((q, k, v), dict(cu_seqlens=torch.tensor([0, 24]).to_sparse())),
        TypeError,
        "must be a dense tensor",
    ),
    "ranges without numbers": (
        lambda q, k, v: ((q, k, v), dict(key_ranges=torch.zeros(24, 2, device="meta").int())),
        TypeError,
        "the meta device",
    ),
    "ranges shape": (lambda q, k, v: ((q, k, v), dict(key_ranges=torch.zeros(24).int())), ValueError, "(start, stop)"),
    "ranges shapes": (
        lambda q, k, v: ((q, k, v), dict(key_ranges=[torch.zeros(24, 2).int(), torch.zeros(1, 24, 2).int()])),
        ValueError,
        "one shape",
    ),
    "ranges batch": (
        lambda q, k, v: ((q, k, v), dict(key_ranges=torch.zeros(2, 24, 2).int())),
        ValueError,
        "q's batch size",
    ),
    "ranges of one entry": (
        lambda q, k, v: ([x.expand(2, -1, -1, -1) for x in (q, k, v)], dict(key_ranges=torch.zeros(1, 24, 2).int())),
        ValueError,
        "q's batch size",
    ),
    "ranges twice": (
        lambda q, k, v: ((q, k, v), dict(key_ranges=[torch.tensor([[0, 9]] * 24)] * 2)),
        ValueError,
        "must not overlap",
    ),
    "ranges that overlap the last but one": (
        lambda q, k, v: ((q, k, v), dict(key_ranges=[torch.tensor([[at, at + 2]] * 24) for at in (0, 4, 1)])),
        ValueError,
        "those at 0 and 2 do",
    ),
    "ranges of three": (
        lambda q, k, v: ((q, k, v), dict(key_ranges=torch.zeros(24, 3).int())),
        ValueError,
        "(start, stop)",
    ),
    "documents without an end": (lambda q, k, v: ((q, k, v), dict(cu_seqlens=[0])), ValueError, "begin with 0"),
    "no documents": (lambda q, k, v: ((q, k, v), dict(cu_seqlens=[])), ValueError, "begin with 0"),
    "documents shape": (
        lambda q, k, v: ((q, k, v), dict(cu_seqlens=torch.tensor([[0], [24]]))),
        TypeError,
        "tensor of integers",
    ),
    "documents of truths": (
        lambda q, k, v: ((q, k, v), dict(cu_seqlens=torch.tensor([False, True]))),
        TypeError,
        "tensor of integers",
    ),
    "batch": (lambda q, k, v: ((q.expand(2, -1, -1, -1), k, v), {}), ValueError, "one batch size"),
    "no heads": (lambda q, k, v: ((q, k[:, :0], v[:, :0]), {}), ValueError, "at least one head"),
    "no dims": (lambda q, k, v: ((q[..., :0], k[..., :0], v), {}), ValueError, "head_dim 1"),
    "sparse": (lambda q, k, v: ((q, k.to_sparse(), v), {}), TypeError, "k must be a dense tensor"),
    "odd address": (lambda q, k, v: ((q, k, at_an_odd_address(v)), {}), ValueError, "v's elements must be aligned"),
    "window of truths": (lambda q, k, v: ((q, k, v), dict(window_size=(True, 0))), TypeError, "two integers"),
    "scale type": (lambda q, k, v: ((q, k, v), dict(softmax_scale=True)), TypeError, "must be a number"),
    # finite, but not when it is multiplied by log2(e), as kernels do in float32
    "scale in float32": (lambda q, k, v: ((q, k, v), dict(softmax_scale=-3e38)), ValueError, "must be finite"),
    "agreement": (lambda q, k, v: ((q, k, v), dict(agreement=1)), TypeError, "agreement must be a bool"),
    "return_lse": (lambda q, k, v: ((q, k, v), dict(return_lse=1)), TypeError, "return_lse must be a bool"),
    # Longer than a message; of the two, one is cut within a letter.
    "long": (lambda q, k, v: ((q, k, v), dict(layout="ü" * 2000)), ValueError, "layout is unknown"),
    "long too": (lambda q, k, v: ((q, k, v), dict(layout="u" + "ü" * 2000)), ValueError, "layout is unknown"),
    "documents words": (lambda q, k, v: ((q, k, v), dict(cu_seqlens=["a"])), TypeError, "must hold integers"),
    "documents dtype": (
        lambda q, k, v: ((q, k, v), dict(cu_seqlens=torch.tensor([0, 24 + 3j]))),
        TypeError,
        "tensor of integers",
    ),
    "window set": (lambda q, k, v: ((q, k, v), dict(window_size={9, 3})), TypeError, "two integers"),
    "inference mode": (
        lambda q, k, v: ((q.requires_grad_(), of_inference_mode(k), v), {}),
        TypeError,
        "k must not be of inference mode",
    ),
}


def of_inference_mode(x):
    with torch.inference_mode():
        return x.clone()


def at_an_odd_address(x):
    return torch.frombuffer(bytearray(1 + x.nbytes), dtype=x.dtype, offset=1).view(x.shape)


def disagree(rank, different):
    found = []
    for tensors, options, _ in DISAGREEMENTS.values():
        mine = (tensors, options) if rank == different else ({}, {})
        try:
            ringspan.ring_attention(*shards(**mine[0]), **mine[1])
        except ringspan.DisagreementError as error:
            found.append(str(error))
    return found, good_call()


def refuse(rank, different):
    found = []
    for spoil, _, _ in REFUSALS.values():
        args, options = spoil(*shards()) if rank == different else (shards(), {})
        try:
            ringspan.ring_attention(*args, **options)
        except ringspan.RingspanError as error:
            found.append(error)
    return found, good_call()


def good_call():
    return ringspan.ring_attention(*shards(), causal=True).shape


@pytest.mark.parametrize("where", ["threads", "processes"])
def test_ranks_that_disagree_get_an_error_on_every_rank_and_can_go_on(where):
    for found, shape in by_rank(where, disagree, 3, 1):
        for message, (_, _, words) in zip(found, DISAGREEMENTS.values(), strict=True):
            assert words in message and "on rank 1" in message and "on ranks 0, 2" in message
        assert shape == (1, 2, 8, 4)


@pytest.mark.parametrize("where", ["threads", "processes"])
def test_a_rank_that_refuses_its_arguments_is_named_on_every_rank_and_all_can_go_on(where):
    for rank, (found, shape) in enumerate(by_rank(where, refuse, 3, 1)):
        for error, (_, kind, words) in zip(found, REFUSALS.values(), strict=True):
            assert words in str(error)
            if rank == 1:
                assert isinstance(error, kind)
            else:
                assert isinstance(error, ringspan.PeerRefusedError) and "rank 1 refused" in str(error)
        assert shape == (1, 2, 8, 4)


def by_rank(where, fn, num_ranks, *args):
    if where == "threads":
        return run_local(lambda group, *args: fn(group.rank(), *args), num_ranks, *args, timeout=30)
    return results(run_processes(fn, num_ranks, *args))


def test_what_a_rank_tells_has_one_length_however_long_its_reason_is():
    """Transports may count on it."""
    for num_letters in (0, 1, *range(700, 760), 5000):
        assert len(_pack(1, ringspan.ArgumentError("ü" * num_letters))) == MESSAGE_BYTES


def test_ranks_in_different_functions_are_told_that_and_nothing_else():
    """Everything else differs too, and means nothing."""

    def work(group):
        mine = (
            (lambda: ringspan.ring_attention(*shards())) if group.rank() else lambda: ringspan.unshard(torch.ones(3), 0)
        )
        with pytest.raises(ringspan.DisagreementError, match="the function that is called") as caught:
            mine()
        return str(caught.value).count("the ranks disagree on")

    assert run_local(work, 2, timeout=30) == [1, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (lambda at: dict(window_size=(at, 3)), r"\(left, right\)\.\n  got  \[5, 3\] on rank 0; \[6, 3\]"),
        (lambda at: dict(cu_seqlens=[0, at, 16]), "cu_seqlens"),
        (lambda at: dict(key_ranges=torch.tensor([[0, at]] * 16)), "key_ranges"),
        (lambda at: dict(key_ranges=[torch.tensor([[0, 1]] * 16), torch.tensor([[2, at]] * 16)]), "key_ranges"),
    ],
)
def test_ranks_whose_masks_differ_in_a_number_are_told(options, words):
    def work(group):
        with pytest.raises(ringspan.DisagreementError, match=words):
            ringspan.ring_attention(*shards(), **options(5 + group.rank()))

    run_local(work, 2, timeout=30)


def test_ranks_that_name_other_transports_are_told():
    def work(group):
        with pytest.raises(
            ringspan.DisagreementError, match=r"disagree on transport\.\n  got  'auto' on rank 0; 'local' on"
        ):
            ringspan.ring_attention(*shards(), transport="local" if group.rank() else "auto")
        return good_call()

    assert run_local(work, 2, timeout=30) == [(1, 2, 8, 4)] * 2


@pytest.mark.parametrize("transport", ["shared_memory", "torch_dist"])
def test_a_transport_between_processes_is_refused_by_threads_and_by_a_ring_of_one(transport):
    def work(group):
        with pytest.raises(ringspan.ArgumentError, match=r"cannot serve this group(.|\n)*of threads \(run_local\)"):
            ringspan.ring_attention(*shards(), transport=transport)
        return good_call()

    assert run_local(work, 2, timeout=30) == [(1, 2, 8, 4)] * 2
    with pytest.raises(ringspan.ArgumentError, match="cannot serve this group"):
        ringspan.ring_attention(*shards(), transport=transport)


def test_a_check_that_fails_in_an_unforeseen_way_is_a_refusal_too(monkeypatch):
    def fail(q, k, v):
        if threading.current_thread().name.endswith("-1"):
            raise OSError("unforeseen")

    monkeypatch.setattr("ringspan.call.check_tensors", fail)

    def work(group):
        with pytest.raises(ringspan.ArgumentError, match="OSError: unforeseen") as caught:
            ringspan.ring_attention(*shards())
        return type(caught.value), type(caught.value.__cause__)

    found = run_local(work, 2, timeout=30)
    assert found == [(ringspan.PeerRefusedError, type(None)), (ringspan.ArgumentError, OSError)]


def test_lengths_that_no_zigzag_or_stripe_has_are_refused_on_every_rank():
    def work(group, layout):
        with pytest.raises(ringspan.LayoutError, match="takes only the shard lengths of its own rule"):
            ringspan.ring_attention(*shards(tokens=8 + 3 * group.rank()), layout=layout)
        q, k, v = shards()
        with pytest.raises(ValueError, match="unequal lengths"):
            ringspan.ring_attention(q[:, :, 1:], k, v, causal=True)
        with pytest.raises(ValueError, match="cu_seqlens must end at"):
            ringspan.ring_attention(*shards(), cu_seqlens=[0, 23])
        with pytest.raises(ValueError, match="a range for each query of the whole sequence"):
            ringspan.ring_attention(*shards(), key_ranges=torch.zeros(23, 2).int())
        return good_call()

    for layout in ("zigzag", "striped"):
        assert run_local(work, 3, layout) == [(1, 2, 8, 4)] * 3


def fall_silent(rank, phase, victim, transport):
    """One rank is killed at a phase of a call; the kernel of the others is not touched."""
    if rank == victim and phase == "the first call":
        die()
    good_call()
    if rank == victim:
        if phase == "publishing":
            ringspan.call.execute.forward = die
        else:
            die_in_kernel(forward=phase == "forward")
    q, k, v = (x.requires_grad_() for x in shards(tokens=16))
    out = ringspan.ring_attention(q, k, v, transport=transport)
    out.sum().backward()
    return "finished"


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_kernel(forward):
    from ringspan.kernels.table import KERNELS

    name = "absorb_runs" if forward else "absorb_gradient"
    calls = []

    def die_at_second(*args):
        calls.append(args)
        if len(calls) == 2:  # the first tile went well; its shard is on the way to a neighbour
            die()

    for kernel in KERNELS:
        kernel.enough_keys = 0  # or the small shards would be one call
        setattr(kernel, name, die_at_second)


@pytest.mark.parametrize("transport", ["shared_memory", "torch_dist"])
@pytest.mark.parametrize("phase", ["the first call", "publishing", "forward", "backward"])
def test_when_a_rank_is_killed_the_others_raise_soon_and_name_it(phase, transport):
    endings = run_processes(fall_silent, 4, phase, 2, transport, group_timeout_s=30)
    assert endings[2].exitcode == -signal.SIGKILL
    for rank in (0, 1, 3):
        error = endings[rank].error
        assert isinstance(error, ringspan.RankFailedError), (rank, endings[rank])
        assert endings[rank].exitcode == 0
        assert endings[rank].seconds < 25, "well before the group's timeout of 30 s"
    told = "\n".join(str(endings[rank].error) for rank in (0, 1, 3))
    assert "rank 2" in told or "ranks 2" in told


def raise_in_kernel(rank, victim):
    from ringspan.kernels.table import KERNELS

    def fail(*args):
        raise MemoryError("no room for this tile")

    if rank == victim:
        for kernel in KERNELS:
            kernel.absorb_runs = fail
    try:
        ringspan.ring_attention(*shards())
    except MemoryError as error:
        return "own", str(error)
    except ringspan.RankFailedError as error:
        with pytest.raises(ringspan.RankFailedError, match="process group is done for"):
            ringspan.ring_attention(*shards())
        return "told", str(error)


def test_when_a_rank_raises_in_the_middle_of_a_call_the_others_get_its_name_and_reason():
    found = results(run_processes(raise_in_kernel, 3, 1, group_timeout_s=60))
    assert found[1] == ("own", "no room for this tile")
    for rank in (0, 2):
        assert found[rank][0] == "told"
        assert "rank 1 failed first: MemoryError: no room for this tile" in found[rank][1]


def stay_away(rank, absent, num_calls):
    for _ in range(num_calls):
        good_call()
    if rank != absent:
        ringspan.ring_attention(*shards())
    else:
        # Alive but not calling: wait for the others' verdict, which comes through the store.
        import torch.distributed as dist

        store = dist.group.WORLD.get_group_store()
        store.wait([f"ringspan/{dist.group.WORLD.group_name}/1/failed"])


@pytest.mark.parametrize(("num_calls", "words"), [(0, "no sign of rank 1"), (2, "rank 1 to begin call")])
def test_a_rank_that_never_comes_is_named_when_the_timeout_has_passed(num_calls, words):
    endings = run_processes(stay_away, 3, 1, num_calls, group_timeout_s=4)
    for rank in (0, 2):
        assert isinstance(endings[rank].error, ringspan.RankFailedError)
        assert words in str(endings[rank].error), str(endings[rank].error)


def come_late(rank, seconds):
    if rank == 1:
        threading.Event().wait(seconds)
    return ringspan.ring_attention(*shards(), causal=True)


def test_a_rank_that_comes_late_is_waited_for():
    endings = run_processes(come_late, 3, 5.0)
    late = results(endings)
    punctual = run_local(lambda group: ringspan.ring_attention(*shards(), causal=True), 3)
    for mine, theirs in zip(late, punctual, strict=True):
        assert torch.equal(mine, theirs)


def test_a_worker_thread_that_raises_stops_the_others_and_comes_out_as_worker_error():
    stopped = []

    def work(group):
        if group.rank() == 1:
            raise KeyError("my own mistake")
        try:
            ringspan.ring_attention(*shards())
        except ringspan.RankFailedError as error:
            stopped.append(str(error))
            raise

    with pytest.raises(ringspan.WorkerError, match=r"rank 1 .*KeyError: 'my own mistake'") as caught:
        run_local(work, 3, timeout=30)
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(stopped) == 2 and all("rank 1 failed first" in text for text in stopped)


def test_a_failure_inside_of_a_call_in_a_thread_comes_out_with_its_cause(monkeypatch):
    from ringspan.kernels.table import KERNELS

    def fail(*args):
        raise MemoryError("no room for this tile")

    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "absorb_runs", fail)
    with pytest.raises(ringspan.WorkerError, match="MemoryError: no room for this tile") as caught:
        run_local(lambda group: ringspan.ring_attention(*shards()), 2, timeout=30)
    assert isinstance(caught.value.__cause__, MemoryError)


def test_a_worker_thread_that_never_comes_is_named_when_the_timeout_has_passed():
    def work(group):
        if group.rank() != 1:
            ringspan.ring_attention(*shards())

    with pytest.raises(ringspan.RankFailedError, match=r"waited 0.5 s for rank 1 to begin call 1"):
        run_local(work, 3, timeout=0.5)


def test_backward_of_a_local_ring_outside_of_its_worker_raises_at_once():
    def work(group):
        q, k, v = (x.requires_grad_() for x in shards())
        return ringspan.ring_attention(q, k, v)

    outs = run_local(work, 2)
    with pytest.raises(ringspan.ArgumentError, match=r"loss.backward\(\) inside the function"):
        outs[0].sum().backward()


def overwrite(rank):
    from ringspan.kernels.table import KERNELS

    q, k, v = shards(tokens=16, seed=rank)
    if rank == 2:
        for kernel in KERNELS:
            plain = type(kernel).absorb_runs

            def slow(self, *args, plain=plain):
                threading.Event().wait(0.3)
                plain(self, *args)

            type(kernel).absorb_runs = slow
    out = ringspan.ring_attention(q, k, v)
    k.fill_(float("nan"))
    v.fill_(float("nan"))
    return out


def test_keys_may_be_overwritten_as_soon_as_a_call_returns_even_if_another_rank_is_slow():
    found = results(run_processes(overwrite, 3))
    full = [torch.cat([shards(tokens=16, seed=rank)[i] for rank in range(3)], 2) for i in range(3)]
    expected = torch.nn.functional.scaled_dot_product_attention(*full).chunk(3, 2)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_keys_may_be_overwritten_as_soon_as_a_call_returns_in_threads(monkeypatch):
    from ringspan.kernels.table import KERNELS

    for kernel in KERNELS:
        plain = kernel.absorb_runs

        def slow(*args, plain=plain):
            if threading.current_thread().name.endswith("-2"):
                threading.Event().wait(0.1)
            plain(*args)

        monkeypatch.setattr(kernel, "absorb_runs", slow)

    def work(group):
        q, k, v = shards(tokens=16, seed=group.rank())
        out = ringspan.ring_attention(q, k, v)
        k.fill_(float("nan"))
        v.fill_(float("nan"))
        return out

    full = [torch.cat([shards(tokens=16, seed=rank)[i] for rank in range(3)], 2) for i in range(3)]
    expected = torch.nn.functional.scaled_dot_product_attention(*full).chunk(3, 2)
    for mine, theirs in zip(run_local(work, 3), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("which", [1, 2])
def test_tensors_of_one_rank_on_different_devices_are_refused_by_name(which):
    tensors = [torch.zeros(1, 2, 4, 8) for _ in range(3)]
    tensors[which] = tensors[which].to("meta")
    with pytest.raises(TypeError, match=rf"must share one device.\n.*q: cpu, {'qkv'[which]}: meta"):
        check_tensors(*tensors)


def test_what_a_backward_is_given_must_be_on_the_device_of_q():
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(TypeError, match=r"lse and q must share one device.\n.*q: cpu, lse: meta"):
        check_like("lse", torch.zeros(1, 2, 4, device="meta"), q, q.shape[:3], any_dtype=True)


def test_without_an_agreement_a_refusal_waits_for_nobody():
    def work(group):
        if group.rank() == 1:  # the other makes no call at all
            with pytest.raises(ringspan.ArgumentError, match="layout is unknown"):
                ringspan.ring_attention(*shards(), layout="spiral", agreement=False)
        return True

    assert run_local(work, 2, timeout=10) == [True, True]


def allocation_fails(rank):
    x = torch.ones(4, 3)
    ringspan.unshard(x, 0)
    if rank == 1:
        torch.Tensor.new_empty = lambda *_: (_ for _ in ()).throw(MemoryError("no room for the whole"))
    ringspan.unshard(x, 0)


def test_a_rank_that_has_no_room_to_unshard_is_named_to_the_others():
    first, second = run_processes(allocation_fails, 2, group_timeout_s=60, limit_s=30)
    assert "rank 1 failed first: MemoryError: no room for the whole" in str(first.error)
    assert isinstance(second.error, MemoryError)


def allocation_fails_in_the_backward(rank):
    x = torch.ones(4, 3, requires_grad=True)
    full = ringspan.unshard(x, 0)
    if rank == 1:
        ringspan.reshard.take = lambda *_: (_ for _ in ()).throw(MemoryError("no room for a slice"))
    full.sum().backward()


def test_a_rank_that_has_no_room_in_the_backward_of_unshard_is_named_to_the_others():
    first, second = run_processes(allocation_fails_in_the_backward, 2, group_timeout_s=60, limit_s=30)
    assert "rank 1 failed first: MemoryError: no room for a slice" in str(first.error)
    assert isinstance(second.error, MemoryError)


def change_before_backward(rank):
    q, k, v = (x.requires_grad_() for x in shards())
    doubled = q * 2
    out = ringspan.ring_attention(doubled, k, v)
    if rank == 1:
        with torch.no_grad():
            doubled.mul_(2)
    out.sum().backward()


def test_a_backward_that_autograd_refuses_on_one_rank_is_told_to_the_others():
    first, second = run_processes(change_before_backward, 2, group_timeout_s=60, limit_s=30)
    assert isinstance(first.error, ringspan.PeerRefusedError) and "modified by an inplace operation" in str(first.error)
    assert isinstance(second.error, RuntimeError) and "modified by an inplace operation" in str(second.error)


def test_a_thread_that_cannot_start_leaves_no_other_waiting(monkeypatch):
    start = threading.Thread.start

    def start_but_one(thread):
        if thread.name == "ringspan-worker-2":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_but_one)
    told, ended = [], threading.Semaphore(0)

    def work(group):
        try:
            ringspan.ring_attention(*shards())
        except ringspan.RankFailedError as error:
            told.append(str(error))
        ended.release()

    with pytest.raises(RuntimeError, match="can't start new thread"):
        run_local(work, 3)
    assert all(ended.acquire(timeout=10) for _ in range(2))
    assert all("the caller of run_local failed first" in text for text in told), told


def test_the_refusal_comes_out_of_run_local_and_not_what_tells_of_it():
    heard = threading.Semaphore(0)

    def work(group):
        if group.rank() != 2:
            try:
                ringspan.ring_attention(*shards())
            finally:
                heard.release()
        try:
            ringspan.ring_attention(*shards(), layout="zigzg")
        finally:
            assert all(heard.acquire(timeout=10) for _ in range(2))  # so that the others fail first

    with pytest.raises(ringspan.ArgumentError, match="zigzg") as told:
        run_local(work, 3)
    assert not isinstance(told.value, ringspan.PeerRefusedError)
    assert told.value.__notes__ == ["raised in rank 2 of run_local"]


def test_who_gave_up_because_of_a_rank_that_told_of_a_refusal_does_not_come_out_either():
    board = Board(3, timeout_s=10)
    told, gave_up = ringspan.PeerRefusedError("rank 2 refused"), ringspan.RankFailedError("rank 0 failed first")
    refusal = ringspan.ArgumentError("layout is unknown")
    for rank, error in enumerate((told, gave_up, refusal)):
        board.fail(rank, error)
    assert board.failure == (2, refusal)


def test_the_first_failure_comes_out_of_run_local_and_not_what_followed_from_it():
    def work(group):
        if group.rank() == 0:
            raise ValueError("first")
        try:
            ringspan.ring_attention(*shards())
        except ringspan.RankFailedError:
            raise KeyError("of the cleaning up") from None

    with pytest.raises(ringspan.WorkerError, match=r"rank 0 .*ValueError: first"):
        run_local(work, 3, timeout=20)


def test_a_reader_that_is_waited_for_is_named(monkeypatch):
    kernel = next(kernel for kernel in KERNELS if kernel.name == "reference")
    absorb, released, tiles = kernel.absorb_runs, threading.Event(), []

    def absorb_or_stop(*args):
        if threading.current_thread().name == "ringspan-worker-1":
            tiles.append(args)
            if len(tiles) == 2:  # with the keys of rank 0
                released.wait(timeout=20)
        absorb(*args)

    monkeypatch.setattr(kernel, "absorb_runs", absorb_or_stop)
    monkeypatch.setattr(kernel, "enough_keys", 0)

    def work(group):
        try:
            ringspan.ring_attention(*shards(), causal=True, kernel="reference")
        finally:
            released.set()

    with pytest.raises(ringspan.RankFailedError, match="waited 1 s for rank 1 to read rank 0's tensors"):
        run_local(work, 2, timeout=1)


def fail_in_a_checkpoint(rank):
    """The forward that a checkpoint runs again fails on rank 0; then all go on."""
    q, k, v = (x.requires_grad_() for x in shards())
    runs = []

    def attend(q, k, v):
        runs.append(q)
        if rank == 0 and len(runs) == 2:
            k = k[..., 1:]
        return ringspan.ring_attention(q, k, v)

    out = checkpoint(attend, q, k, v, use_reentrant=False)
    try:
        out.sum().backward()
    except ringspan.RingspanError as error:
        return type(error).__name__, good_call()


@pytest.mark.parametrize("where", ["threads", "processes"])
def test_a_refusal_while_a_checkpoint_runs_again_is_told_once(where):
    found = by_rank(where, fail_in_a_checkpoint, 3)
    assert found == [("ArgumentError", (1, 2, 8, 4)), *[("PeerRefusedError", (1, 2, 8, 4))] * 2]


def call_twice_at_once(rank):
    """Rank 0 calls from a second thread while its first one computes."""
    from ringspan.kernels.table import KERNELS

    began, refused, told = threading.Event(), threading.Event(), []

    def held(*args, absorb):
        began.set()
        assert refused.wait(30)
        absorb(*args)

    def work():
        try:
            ringspan.ring_attention(*shards())
        except ringspan.RankFailedError as error:
            told.append(str(error))

    if rank == 1:
        work()
        return told
    for kernel in KERNELS:
        kernel.absorb_runs = functools.partial(held, absorb=kernel.absorb_runs)
    first = threading.Thread(target=work)
    first.start()
    assert began.wait(30)
    try:
        with pytest.raises(ringspan.UnsupportedError, match="while another was under way"):
            ringspan.ring_attention(*shards())
    finally:
        refused.set()
        first.join()
    with pytest.raises(ringspan.RankFailedError, match="process group is done for"):
        ringspan.ring_attention(*shards())


def test_a_call_beside_another_on_one_group_is_refused_on_every_rank():
    _, (told,) = results(run_processes(call_twice_at_once, 2, group_timeout_s=20, limit_s=60))
    assert "rank 0 failed first: UnsupportedError: a call began on a group while another was under way" in told


@pytest.mark.parametrize("what", ["ring_attention", "its backward", "unshard", "the backward of unshard"])
def test_every_call_is_refused_beside_another(what):
    def work(group):
        q, k, v = (x.requires_grad_() for x in shards())
        attend, unshard = lambda: ringspan.ring_attention(q, k, v), lambda: ringspan.unshard(q, 2)
        out = attend() if what.startswith("its") else unshard()
        with group.transport.one_call():
            {"ring_attention": attend, "unshard": unshard}.get(what, lambda: out.sum().backward())()

    with pytest.raises(ringspan.UnsupportedError, match="while another was under way"):
        run_local(work, 1)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_worker_without_being_an_error_comes_out_as_it_is(kind):
    def work(group):
        if group.rank() == 1:
            raise kind
        ringspan.ring_attention(*shards())

    with pytest.raises(kind):
        run_local(work, 2, timeout=20)


def test_what_was_read_of_a_worker_that_failed_meanwhile_is_no_result(monkeypatch):
    kernel = next(kernel for kernel in KERNELS if kernel.name == "reference")
    reading, overwritten = threading.Event(), threading.Event()
    absorb, told = kernel.absorb_runs, []

    def absorb_or_fail(*args):
        if threading.current_thread().name == "ringspan-worker-0":
            assert reading.wait(10)
            raise MemoryError("no room for this tile")
        reading.set()
        assert overwritten.wait(10)
        absorb(*args)

    monkeypatch.setattr(kernel, "absorb_runs", absorb_or_fail)

    def work(group):
        q, k, v = shards()
        try:
            ringspan.ring_attention(q, k, v, causal=True, kernel="reference")
        except MemoryError:
            k.fill_(float("nan"))
            v.fill_(float("nan"))
            overwritten.set()
        except ringspan.RankFailedError as error:
            told.append(str(error))

    with pytest.raises(ringspan.WorkerError, match="no room for this tile"):
        run_local(work, 2, timeout=20)
    assert len(told) == 1 and "rank 0 failed first: MemoryError('no room for this tile')" in told[0], told
