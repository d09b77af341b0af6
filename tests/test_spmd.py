"""The SPMD entries, as their contract says: on torch tensors and on NumPy arrays, in one ring and in several."""

import math
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from definition import OUT_BOUNDS, attention, bounds_of_gradients, gradients, relative_error
from processes import results, run_processes
from torch.fx.experimental.proxy_tensor import make_fx

import ringspan
from ringspan import ring_attention_spmd_bwd, ring_attention_spmd_fwd, run_local
from ringspan.kernels import threads
from ringspan.kernels.table import KERNELS
from ringspan.kernels.threads import num_threads


class Spmd:
    """A whole sequence, cut up for the workers of a ring in the contract's shapes."""

    def __init__(
        self,
        seqlen,
        workers,
        b=1,
        h=2,
        h_kv=None,
        d=16,
        causal=False,
        striped=False,
        dtype=torch.float32,
        seed=0,
        device="cpu",
    ):
        self.workers, self.causal, self.striped, self.d = workers, causal, striped, d
        generator = torch.Generator().manual_seed(seed)
        heads, total = (h, h_kv or h, h_kv or h, h), workers * seqlen
        normal = (torch.randn(b, n, total, d, generator=generator) for n in heads)
        self.q, self.k, self.v, self.dy = (x.to(device, dtype) for x in normal)
        if causal:  # the contract's pre-scaled q
            self.q = (self.q * d**-0.5).to(dtype)
        self.scale = 1.0 if causal else d**-0.5
        everything = torch.ones(total, total, dtype=torch.bool, device=device)
        self.mask = everything.tril() if causal else everything
        self.options = dict(num_workers=workers, use_causal_mask=causal, softmax_scale=1.0 if causal else None)

    def cut(self, x, worker):
        """[b, h, seqlen, d] of one worker."""
        return x[:, :, worker :: self.workers] if self.striped else x.chunk(self.workers, 2)[worker]

    def forward(self, worker, tp_q=False, tp_k=False, convert=lambda x: x, lnc=None, **options):
        q, k, v = (self.cut(x, worker) for x in (self.q, self.k, self.v))
        q, k = q if tp_q else q.mT, k if tp_k else k.mT
        entry = ring_attention_spmd_fwd if lnc is None else ring_attention_spmd_fwd[lnc]
        args = (convert(x.contiguous()) for x in (q, k, v))
        return entry(*args, striped_input=self.striped, tp_q=tp_q, tp_k=tp_k, **self.options, **options)

    def backward(self, worker, o, lse, convert=lambda x: x, **options):
        q, k, v, dy = (convert(self.cut(x, worker).mT.contiguous()) for x in (self.q, self.k, self.v, self.dy))
        o = o.swapaxes(-1, -2)
        return ring_attention_spmd_bwd(q, k, v, o, dy, lse, striped_attention=self.striped, **self.options, **options)

    def whole(self, parts):
        """Worker's [b, h, seqlen, ...] put together again."""
        return torch.stack(parts, 3).flatten(2, 3) if self.striped else torch.cat(parts, 2)

    def check(self, results, mask=None):
        """results: (o, lse, (dq, dk, dv)) by worker, tensors."""
        mask = self.mask if mask is None else mask
        out, lse = attention(self.q, self.k, self.v, mask, self.scale)
        found = self.whole([o for o, _, _ in results])
        assert found.dtype == self.q.dtype
        assert relative_error(found, out) <= OUT_BOUNDS[self.q.dtype]
        seqlen = results[0][0].shape[2]
        folded = [x for _, x, _ in results]
        assert folded[0].shape == (*out.shape[:2], 128, math.ceil(seqlen / 128))
        flat = [x.mT.reshape(*x.shape[:2], -1) for x in folded]
        assert not any(x[..., seqlen:].any() for x in flat), "padding is 0"
        expected = torch.where(lse.isneginf(), 0.0, lse)
        assert torch.allclose(self.whole([x[..., :seqlen] for x in flat]).double(), expected, atol=2e-5)
        do, dlse = self.dy, torch.zeros_like(lse)
        exact = gradients(self.q, self.k, self.v, do, dlse, mask, self.scale)
        bounds = bounds_of_gradients(self.q, self.k, self.v, do, dlse, mask, self.scale)
        rounded = relative_error(found, out)  # delta is made from the rounded output
        for index, (grad, bound) in enumerate(zip(exact, bounds, strict=True)):
            mine = self.whole([grads[index].mT for *_, grads in results])
            assert mine.dtype == torch.float32
            assert (mine - grad).norm() <= 4 * bound + 2 * rounded * grad.norm()


def both(group, case, worker=None, **options):
    worker = group.rank() if worker is None else worker
    o, lse = case.forward(worker, training=True, **options)
    extra = {name: x for name, x in options.items() if name in ("replica_groups",)}
    return o, lse, case.backward(worker, o, lse, **extra)


MASKS = [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize(("causal", "striped"), MASKS)
@pytest.mark.parametrize(
    ("b", "h", "seqlen", "d", "workers"),
    [
        (1, 1, 256, 128, 2),
        (2, 3, 130, 16, 4),
        (1, 3, 65, 128, 4),
        (1, 2, 1, 1, 3),
        (1, 1, 64, 256, 2),
        (1, 1, 12, 8, 33),
    ],
)
def test_every_shape_and_mask_is_exact_forward_and_backward(b, h, seqlen, d, workers, causal, striped):
    case = Spmd(seqlen, workers, b, h, d=d, causal=causal, striped=striped)
    case.check(run_local(both, workers, case))


@pytest.mark.parametrize(("causal", "striped"), MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exact_to_its_rounding(dtype, causal, striped):
    case = Spmd(96, 4, causal=causal, striped=striped, dtype=dtype)
    case.check(run_local(both, 4, case))


@pytest.mark.parametrize("h_kv", [1, 2])
def test_grouped_heads_need_no_broadcasting(h_kv):
    case = Spmd(48, 3, h=4, h_kv=h_kv, causal=True, striped=True)
    case.check(run_local(both, 3, case))


@pytest.mark.parametrize("tp_q", [False, True])
@pytest.mark.parametrize("tp_k", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_layouts_of_q_and_k_do_not_matter(tp_q, tp_k, causal):
    case = Spmd(40, 2, causal=causal)
    case.check(run_local(lambda group: both(group, case, tp_q=tp_q, tp_k=tp_k), 2))


@pytest.mark.parametrize("striped", [False, True])
def test_four_rings_of_two_run_side_by_side_causal_in_each(striped):
    groups = ((0, 4), (1, 5), (2, 6), (3, 7))
    cases = [Spmd(144, 2, h=6, causal=True, striped=striped, seed=seed) for seed in range(4)]

    def work(group):
        ring = next(i for i, members in enumerate(groups) if group.rank() in members)
        worker = groups[ring].index(group.rank())
        return both(group, cases[ring], worker, replica_groups=groups, tp_q=True, tp_k=True)

    results = run_local(work, 8)
    for case, members in zip(cases, groups, strict=True):
        case.check([results[rank] for rank in members])


def test_the_order_of_a_replica_group_is_the_order_of_the_sequence():
    case = Spmd(20, 3, causal=True)
    ring = (2, 0, 1)
    results = run_local(lambda group: both(group, case, ring.index(group.rank()), replica_groups=(ring,)), 3)
    case.check([results[rank] for rank in ring])


def test_one_worker_is_a_ring_of_one_on_every_rank():
    cases = [Spmd(30, 1, causal=True, seed=seed) for seed in range(3)]
    for rank, result in enumerate(run_local(lambda group: both(group, cases[group.rank()], 0), 3)):
        cases[rank].check([result])


@pytest.mark.parametrize("lnc", [1, 2, 3])
def test_a_launch_with_cores_gives_the_same_bits(lnc):
    case = Spmd(33, 2, h=3, causal=True)
    plain = run_local(lambda group: case.forward(group.rank()), 2)
    for mine, expected in zip(run_local(lambda group: case.forward(group.rank(), lnc=lnc), 2), plain, strict=True):
        assert torch.equal(mine, expected)


def test_the_default_of_lnc_size_leaves_a_plain_backward_all_cores(monkeypatch):
    cores = []
    for kernel in KERNELS:
        plain = kernel.absorb_gradient
        counting = lambda *args, plain=plain: (cores.append(num_threads()), plain(*args))[1]  # noqa: E731
        monkeypatch.setattr(kernel, "absorb_gradient", counting)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 7)
    given = given_to_backward()
    ring_attention_spmd_bwd(**given)
    ring_attention_spmd_bwd(**given, lnc_size=2)
    ring_attention_spmd_bwd[1](**given)
    assert cores == [7, 2, 1]


def test_what_is_wrong_in_one_ring_is_told_in_those_beside_it():
    """They are calls of one group: where one ring went on alone, the next call of all would find it elsewhere."""

    def work(group):
        x = torch.randn(1, 2, 4, 8)
        options = dict(use_causal_mask=True, softmax_scale=1.0) if group.rank() == 3 else {}
        with pytest.raises(
            ringspan.DisagreementError, match=r"use_causal_mask\.\n  got  False on rank 2; True on rank 3"
        ):
            ring_attention_spmd_fwd(x, x, x.mT, num_workers=2, replica_groups=((0, 1), (2, 3)), **options)
        return True

    assert run_local(work, 4, timeout=30) == [True] * 4


def documents(lengths, workers, b, h):
    """Bounds of packed documents under striping: the same local ranges on every worker. And the global mask."""
    local = np.cumsum([0, *(length // workers for length in lengths)])
    which = np.repeat(np.arange(len(lengths)), np.diff(local))
    low, high = (np.tile(local[which + i].astype(np.float32)[None, :, None], (b * h, 1, 1)) for i in (0, 1))
    whole = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    return low, high, whole[:, None] == whole[None, :]


@pytest.mark.parametrize(("b", "h"), [(1, 1), (2, 3)])
def test_packed_documents_of_unequal_length_are_exact(b, h):
    lengths = [4, 100, 8, 60]
    low, high, same = documents(lengths, 4, b, h)
    case = Spmd(sum(lengths) // 4, 4, b, h, causal=True, striped=True)

    def work(group):
        bounds = dict(bound_min=torch.from_numpy(low), bound_max=torch.from_numpy(high))
        o, lse = case.forward(group.rank(), training=True, **bounds)
        first = {name: x.view(b, h, -1)[:, 0] for name, x in bounds.items()}  # the backward's [B, S]
        return o, lse, case.backward(group.rank(), o, lse, **first)

    case.check(run_local(work, 4), case.mask & same)


def test_bounds_may_differ_per_batch_and_head_and_may_hide_everything():
    b, h, seqlen = 2, 2, 24
    generator = np.random.default_rng(0)
    low = generator.integers(-2, seqlen, (b * h, seqlen, 1)).astype(np.float32)
    high = low + generator.integers(-3, seqlen, (b * h, seqlen, 1)).astype(np.float32)
    case = Spmd(seqlen, 1, b, h, causal=True, striped=True)
    key = np.arange(seqlen)
    mask = torch.from_numpy((low <= key) & (key < high)).view(b, h, seqlen, seqlen) & case.mask
    assert not mask.any(-1).all(), "some rows see nothing"
    # Between two integers, and beyond all: a key is an integer, and is seen from the first that is not below.
    low, high = low - 0.25, high - 0.75
    low[low < 0], high[high >= seqlen] = -math.inf, math.inf

    def work(group):
        bounds = dict(bound_min=torch.from_numpy(low), bound_max=torch.from_numpy(high))
        o, lse = case.forward(0, training=True, **bounds)
        assert not o[~mask.any(-1)].any()
        return o, lse, case.backward(0, o, lse, **bounds)

    case.check(run_local(work, 1), mask)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_numpy_arrays_come_back_as_numpy_arrays(dtype):
    torch_dtype = ringspan.arrays.torch_dtype(dtype)
    case = Spmd(50, 2, causal=True, dtype=torch_dtype)

    def to_numpy(x):
        array = x.float().numpy().astype(dtype)
        array.flags.writeable = False
        return array

    def work(group):
        o, lse = case.forward(group.rank(), training=True, convert=to_numpy)
        grads = case.backward(group.rank(), o, lse, convert=to_numpy)
        assert all(isinstance(x, np.ndarray) for x in (o, lse, *grads)) and o.dtype == dtype
        o = torch.from_numpy(o.astype(np.float32)).to(torch_dtype)
        return o, torch.from_numpy(lse), [torch.from_numpy(x) for x in grads]

    case.check(run_local(work, 2))


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16, "float16", np.float32])
def test_lse_comes_in_the_dtype_asked_for(wanted):
    case = Spmd(130, 1)
    _, lse = run_local(lambda group: case.forward(0, training=True, lse_dtype=wanted), 1)[0]
    assert lse.dtype == ringspan.arrays.torch_dtype(wanted)


STRIPED = dict(use_causal_mask=True, striped_input=True, softmax_scale=1.0, bound_max=torch.ones(2, 8, 1))
MISUSES = {
    "causal without scale": (dict(use_causal_mask=True), "softmax_scale must be 1.0"),
    "causal with a scale": (dict(use_causal_mask=True, softmax_scale=0.25), "softmax_scale must be 1.0"),
    "striped without causal": (dict(striped_input=True), "striped_input requires use_causal_mask"),
    "workers": (dict(num_workers=3), "num_workers must be the size of the world"),
    "rank missing": (dict(replica_groups=((0, 2),)), "exactly once"),
    "rank twice": (dict(replica_groups=((0, 1), (1, 0))), "exactly once"),
    "group size": (dict(replica_groups=((0,), (1,))), "must hold num_workers ranks"),
    "bounds alone": (dict(bound_min=torch.zeros(2, 8, 1)), "go together"),
    "bounds unmasked": (dict(bound_min=torch.zeros(2, 8, 1), bound_max=torch.ones(2, 8, 1)), "require use_causal_mask"),
    "bounds of runs": (
        dict(bound_min=torch.zeros(2, 8, 1), bound_max=torch.ones(2, 8, 1), use_causal_mask=True, softmax_scale=1.0),
        "require use_causal_mask and striped input",
    ),
    "causal with a truth": (dict(use_causal_mask=True, softmax_scale=True), "softmax_scale must be 1.0"),
    "bounds that are NaN": (dict(STRIPED, bound_min=torch.full((2, 8, 1), math.nan)), "must not hold NaN"),
    "bounds that require grad": (
        dict(STRIPED, bound_min=torch.zeros(2, 8, 1, requires_grad=True)),
        "bound_min requires grad",
    ),
    "lse_dtype": (dict(lse_dtype=torch.int32), "lse_dtype must be"),
    "lse_dtype 64": (dict(lse_dtype=torch.float64), "lse_dtype must be"),
    "seqlen": (
        dict(tp_q=True),
        r"q and k must have one d\.(.|\n)*q: \[1, 2, 4, 8\] as \[b, h, seqlen, d\](.|\n)*tp_q and tp_k",
    ),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_refused_on_every_rank(name):
    options, words = MISUSES[name]

    def work(group):
        x = torch.randn(1, 2, 4, 8)
        with pytest.raises(ringspan.RingspanError, match=words) as caught:
            ring_attention_spmd_fwd(x, x, x.mT, **{"num_workers": 2, **(options if group.rank() else {})})
        assert isinstance(caught.value, (ValueError, TypeError))
        return ring_attention_spmd_fwd(x, x, x.mT, num_workers=2).shape

    assert run_local(work, 2, timeout=30) == [(1, 2, 8, 4)] * 2


def test_sizes_that_the_contract_does_not_have_are_refused():
    x, wide = torch.zeros(1, 2, 0, 8), torch.zeros(1, 2, 4, 257)
    with pytest.raises(ringspan.ArgumentError, match="seqlen must be at least 1"):
        ring_attention_spmd_fwd(x, x, x, tp_q=True, tp_k=True)
    with pytest.raises(ringspan.ArgumentError, match="seqlen must be at least 1"):
        ring_attention_spmd_fwd(x.mT, x.mT, x)
    with pytest.raises(ringspan.ArgumentError, match="seqlen must be at least 1"):
        ring_attention_spmd_bwd(*[x.mT] * 5, torch.zeros(1, 2, 128, 0))
    with pytest.raises(ringspan.ArgumentError, match="d must be from 1 to 256"):
        ring_attention_spmd_fwd(wide, wide, wide, tp_q=True, tp_k=True)
    with pytest.raises(ringspan.ArgumentError, match="d must be from 1 to 256"):
        ring_attention_spmd_bwd(*[wide.mT] * 5, torch.zeros(1, 2, 128, 1))


def test_what_requires_grad_is_sent_to_ring_attention():
    x = torch.randn(1, 2, 4, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"use ringspan\.ring_attention"):
        ring_attention_spmd_fwd(x, x, x.mT)
    with torch.no_grad():
        ring_attention_spmd_fwd(x, x, x.mT)


def test_mixtures_of_torch_and_numpy_and_bad_cores_are_refused():
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(TypeError, match="cannot be mixed"):
        ring_attention_spmd_fwd(x, x.numpy(), x.mT)
    array = x.numpy()
    masked = np.ma.masked_array(array.swapaxes(2, 3), mask=True)
    with pytest.raises(TypeError, match="k must not be a masked array"):
        ring_attention_spmd_fwd(array.swapaxes(2, 3), masked, array)
    for lnc in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="lnc must be"):
            ring_attention_spmd_fwd[lnc]
    with pytest.raises(ValueError, match="lnc_size must be"):
        ring_attention_spmd_bwd(x, x, x, x, x, torch.zeros(1, 2, 128, 1), lnc_size=0)


def test_workers_of_unequal_length_and_different_replica_groups_are_told():
    def unequal(group):
        x = torch.randn(1, 2, 4, 8 + group.rank())
        with pytest.raises(ringspan.DisagreementError, match="disagree on seqlen"):
            ring_attention_spmd_fwd(x, x, x.mT, num_workers=2)

    def regrouped(group):
        x = torch.randn(1, 2, 4, 8)
        rings = ((0, 1), (2, 3)) if group.rank() else ((0, 2), (1, 3))
        with pytest.raises(ringspan.DisagreementError, match="disagree on replica_groups"):
            ring_attention_spmd_fwd(x, x, x.mT, num_workers=2, replica_groups=rings)

    def bounded(group):
        x = torch.randn(1, 2, 8, 4)
        bounds = dict(bound_min=torch.zeros(2, 8, 1), bound_max=torch.ones(2, 8, 1)) if group.rank() else {}
        options = dict(num_workers=2, use_causal_mask=True, striped_input=True, softmax_scale=1.0, tp_q=True, tp_k=True)
        with pytest.raises(ringspan.DisagreementError, match="whether bounds are given"):
            ring_attention_spmd_fwd(x, x, x, **options, **bounds)

    run_local(bounded, 2, timeout=30)
    run_local(unequal, 2, timeout=30)
    run_local(regrouped, 4, timeout=30)


def test_a_negated_view_counts_as_what_it_says():
    numbers = torch.randn(1, 2, 16, 64, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    q, k = numbers.conj().imag, numbers.real
    assert q.is_neg()
    run = lambda q: run_local(lambda group: ring_attention_spmd_fwd(q, k, k.mT, tp_k=False), 1)[0]  # noqa: E731
    assert torch.equal(run(q), run(q.resolve_neg()))


BACKWARD = ["q_ref", "k_ref", "v_ref", "o_ref", "dy_ref"]


def given_to_backward(**others):
    x = {name: torch.randn(1, 2, 8, 6) for name in BACKWARD} | {"lse_ref": torch.zeros(1, 2, 128, 1)}
    return {name: others.get(name, lambda x: x)(x[name]) for name in x}


@pytest.mark.parametrize("name", BACKWARD[1:])
def test_what_lies_the_wrong_way_is_told_in_the_shapes_that_were_passed(name):
    words = rf"q_ref and {name} must have one D\.\n  got  q_ref: \[1, 2, 8, 6\] as .*; {name}: \[1, 2, 6, 8\] as \[B, N"
    with pytest.raises(ringspan.ArgumentError, match=words):
        ring_attention_spmd_bwd(**given_to_backward(**{name: lambda x: x.mT}))


@pytest.mark.parametrize("name", ["o_ref", "dy_ref"])
def test_o_and_dy_must_have_the_dtype_of_q(name):
    with pytest.raises(
        ringspan.ArgumentTypeError, match=rf"{name} must have q_ref's dtype(.|\n)*{name}: torch.bfloat16"
    ):
        ring_attention_spmd_bwd(**given_to_backward(**{name: torch.Tensor.bfloat16}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda lse: lse.requires_grad_(), "lse_ref requires grad"),
        (lambda lse: lse.long(), "must be the lse that the forward returned"),
        (lambda lse: lse[..., 0], "must be the lse that the forward returned"),
        (lambda lse: lse.numpy(), "cannot be mixed"),
    ],
)
def test_what_cannot_be_the_forward_s_lse_is_refused(spoil, words):
    with pytest.raises(ringspan.RingspanError, match=words):
        ring_attention_spmd_bwd(**given_to_backward(lse_ref=spoil))


def test_bounds_of_runs_are_refused_in_the_backward_too():
    bounds = dict(bound_min=torch.zeros(1, 6), bound_max=torch.ones(1, 6))
    with pytest.raises(ringspan.ArgumentError, match="require use_causal_mask and striped input"):
        ring_attention_spmd_bwd(**given_to_backward(), use_causal_mask=True, softmax_scale=1.0, **bounds)


def test_bounds_of_a_wrong_shape_are_told_both_that_are_right():
    bounds = dict(bound_min=torch.zeros(1, 5), bound_max=torch.ones(1, 5))
    options = dict(use_causal_mask=True, softmax_scale=1.0, striped_attention=True)
    with pytest.raises(ringspan.ArgumentError, match=r"\[2, 6, 1\], or \[b, seqlen\] = \[1, 6\]"):
        ring_attention_spmd_bwd(**given_to_backward(), **options, **bounds)


def test_an_lse_beyond_float16_is_refused_not_made_infinite():
    """Its inf would make all gradients 0."""
    q = torch.full((1, 1, 4, 64), 400.0)
    options = dict(training=True, tp_q=True, tp_k=True)
    with pytest.raises(ringspan.ArgumentError, match=r"does not fit into float16(.|\n)*1\.28e\+06(.|\n)*lse_dtype"):
        ring_attention_spmd_fwd(q, q, q, lse_dtype=torch.float16, **options)
    _, lse = ring_attention_spmd_fwd(q, q, q, lse_dtype=torch.bfloat16, **options)
    assert lse.isfinite().all()


def test_a_rank_whose_lse_is_beyond_float16_is_named_to_the_others():
    """They have their results, and would wait for it in their next call."""
    told = []

    def work(group):
        q = torch.full((1, 1, 4, 64), 400.0 if group.rank() else 1.0)
        options = dict(training=True, tp_q=True, tp_k=True, lse_dtype=torch.float16, num_workers=2)
        try:
            for _ in range(2):
                ring_attention_spmd_fwd(q, torch.full_like(q, 400.0), q, **options)
        except ringspan.RingspanError as error:
            told.append(str(error))

    with pytest.raises(ringspan.ArgumentError, match="does not fit into float16"):
        run_local(work, 2, timeout=10)
    assert any("rank 1 failed first: ArgumentError" in text for text in told)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            dict(use_causal_mask=True, softmax_scale=1.0),
            "the ranks disagree on use_causal_mask.\n  got  True on rank 0",
        ),
        (
            dict(use_causal_mask=True, softmax_scale=1.0, striped_input=True),
            "disagree on striped_input.\n  got  True on rank 0",
        ),
        (
            dict(num_workers=1),
            "replica_groups and num_workers.\n  got  '2 of 1: ((0,), (1,))' on rank 0; 'one ring of all'",
        ),
        (dict(replica_groups=((1, 0),)), "got  '1 of 2: ((1, 0),)' on rank 0"),
    ],
)
def test_what_ranks_disagree_on_is_told_by_its_name_here(options, words):
    def work(group):
        x = torch.randn(1, 2, 4, 8)
        given = options if group.rank() == 0 else dict(use_causal_mask=False)
        with pytest.raises(ringspan.DisagreementError, match=re.escape(words)):
            ring_attention_spmd_fwd(x, x, x.mT, **{"num_workers": 2, **given})
        return True

    assert all(run_local(work, 2, timeout=30))


def entries_in_a_program(rank):
    q, k, v = torch.randn(3, 2, 1, 2, 16, 8, generator=torch.Generator().manual_seed(0))[:, rank]

    def program(q, k, v):
        o, lse = ring_attention_spmd_fwd[1](q, k, v, num_workers=2, tp_q=True, tp_k=True, training=True)
        grads = ring_attention_spmd_bwd(q.mT, k.mT, v.mT, o.mT, o.mT, lse, num_workers=2)
        return o + 1, *grads

    with pytest.raises(ringspan.UnsupportedError, match="ring_attention_spmd_fwd cannot be recorded"):
        make_fx(program)(q, k, v)
    expected = program(q, k, v)
    return all(map(torch.equal, torch.compile(program, backend="aot_eager")(q, k, v), expected))


def test_torch_compile_leaves_the_entries_alone_and_make_fx_gets_no_constants_of_them():
    assert results(run_processes(entries_in_a_program, 2)) == [True, True]
