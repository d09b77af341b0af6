"""The C++ kernel on the instruction set that it chooses here; tests/test_native.py runs the others."""

import math
import os
import subprocess
import sys

import pytest
import torch
from definition import attention, gradients, relative_error, seen_by_intervals
from kernel_behaviour import KernelBehaviour, Tile, backward, forward, make_tile

import ringspan
from ringspan import _native
from ringspan.kernels.native import Native, NativeRounded
from ringspan.kernels.table import UNROUNDED, choose
from ringspan.kernels.threads import limited_to, num_threads
from ringspan.state import SoftmaxState
from ringspan.tile import Band, RowIntervals

# AMX multiplies weights as two bfloat16 each, of 8 bits: all but 2^-17 of them.
WEIGHT_ERRORS = {torch.bfloat16: 2.0**-17} if _native.info()["isa"] == "amx" else {}


class TestNative(KernelBehaviour):
    kernel = Native()
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    weight_errors = WEIGHT_ERRORS
    refuses = ((torch.float64, "cpu", 64), (torch.float32, "meta", 64), (torch.float32, "cpu", 257))


rounds = pytest.mark.skipif(not _native.info()["rounds_weights"], reason="bfloat16 is no faster than float32 here")


@rounds
class TestNativeRounded(KernelBehaviour):
    kernel = NativeRounded()
    dtypes = (torch.bfloat16,)
    rounds_weights = True
    steadiness = (2**-8, 2**-8)  # another last bit of a float32 weight, and it may round to its other neighbour
    refuses = ((torch.bfloat16, "meta", 64), (torch.bfloat16, "cpu", 257))


@rounds
@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_a_ring_with_rounded_weights_keeps_the_bound_whatever_its_size(num_workers):
    full = make_tile(RowIntervals(301, 301, Band(upper=1)), heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16)

    def work(group):
        q, k, v, do = (ringspan.shard(x, 2, layout="zigzag", group=group) for x in full[:4])
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = ringspan.ring_attention(*leaves, causal=True, layout="zigzag", kernel="native_rounded", group=group)
        parts = (out.detach(), *torch.autograd.grad(out, leaves, do))
        return [ringspan.unshard(x, 2, layout="zigzag", group=group) for x in parts]

    found = ringspan.run_local(work, num_workers)[0]
    seen, dlse = seen_by_intervals(full.visible), torch.zeros_like(full.dlse)
    exact, _ = attention(full.q, full.k, full.v, seen, full.scale)
    assert relative_error(found[0], exact) <= 2.5e-3
    # Half a unit for out, which delta is made of, for p and ds, and for the result.
    for mine, wanted in zip(found[1:], gradients(full.q, full.k, full.v, full.do, dlse, seen, full.scale), strict=True):
        assert relative_error(mine, wanted) <= 3 * 2.0**-9


EVERY = [
    (Native(), torch.float32),
    (Native(), torch.bfloat16),
    pytest.param(NativeRounded(), torch.bfloat16, marks=rounds),
]
every_way = pytest.mark.parametrize(("kernel", "dtype"), EVERY)


@every_way
@pytest.mark.parametrize("size", [3.0, 30.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("num_pieces", [1, 3])
def test_the_only_key_that_counts_has_weight_1_in_the_backward_however_large_its_score(kernel, dtype, size, num_pieces):
    """Its score is between size**2 and twice that, the others' are 0; they are absorbed in one piece or in several."""
    tile = make_tile(RowIntervals(40, 60, Band()), dtype=dtype, scale=0.7)
    tile.q.zero_()[..., 0] = size + size * torch.rand(1, 2, 40)
    tile.k[..., 0] = 0
    tile.k[:, :, 37, 0] = size / 0.7
    state = SoftmaxState.empty(tile.q)
    for piece in torch.arange(60).chunk(num_pieces):
        keys = slice(int(piece[0]), int(piece[-1]) + 1)
        visible = tile.visible.block(slice(0, 40), keys)
        kernel.absorb(state, tile.q, tile.k[:, :, keys], tile.v[:, :, keys], visible, tile.scale)
    out, lse = state.finalize(torch.float32)
    dq, _, dv = backward(kernel, tile, lse, (out * tile.do).sum(-1))
    others = 60 * torch.exp(torch.tensor(-(size**2)))  # what is left for them
    assert relative_error(dv[:, 0, 37], tile.do.double().sum((1, 2))) <= 1e-6 + others
    assert dq.abs().max() <= 60 * others + 1e-4 * size


@every_way
@pytest.mark.parametrize("score", [0.43, 0.2, -0.3, 7.0])
def test_a_long_sum_of_equal_weights_keeps_its_digits(kernel, dtype, score):
    """Each addition to a sum that grows rounds it in the same direction: over 262,144 keys two digits went so."""
    many, one = 1 << 18, torch.ones(1, 1, 3, 1, dtype=dtype)
    k, v = (torch.full((1, 1, many, 1), value, dtype=dtype) for value in (score, 0.7))
    tile = Tile(one, k, v, one, one[..., 0].float(), RowIntervals(3, many, Band()), 1.0)
    out, lse = forward(kernel, tile, torch.float32)
    assert relative_error(out, v[:, :, :3]) <= 2.5e-6
    assert (lse - k[0, 0, 0, 0].double() - math.log(many)).abs().max() <= 4e-6
    # The other way round, many queries add to the gradient of one key.
    lse = k[..., 0].float()
    turned = Tile(k, one[:, :, :1], one[:, :, :1], torch.ones_like(k), lse, RowIntervals(many, 1, Band()), 1.0)
    dv = backward(kernel, turned, lse, torch.zeros_like(lse))[2]
    assert abs(float(dv) / many - 1) <= 2.5e-6


@every_way
@pytest.mark.parametrize("score", [0.3, 5.0, 20.0])
@pytest.mark.parametrize(("num_calls", "bound"), [(8, 2.5e-6), (64, 2.5e-6), (256, 4e-6)])
def test_equal_weights_keep_their_digits_over_many_calls_too(kernel, dtype, score, num_calls, bound):
    """As with the shards of a large ring: what a call brings is summed by itself, and added to the state once."""
    keys = (1 << 16) // num_calls
    one = torch.ones(1, 1, 3, 1, dtype=dtype)
    k, v = (torch.full((1, 1, keys, 1), value, dtype=dtype) for value in (score, 0.7))
    state = SoftmaxState.empty(one)
    for _ in range(num_calls):
        kernel.absorb(state, one, k, v, RowIntervals(3, keys, Band()), 1.0)
    out, lse = state.finalize(torch.float32)
    assert relative_error(out, v[:, :, :3]) <= bound
    assert (lse - k[0, 0, 0, 0].double() - math.log(1 << 16)).abs().max() <= 2 * bound


def test_tiny_queries_under_a_huge_scale_are_not_taken_for_zeros():
    q, k, v = torch.full((1, 1, 4, 2), 1e-23), torch.randn(1, 1, 64, 2), torch.randn(1, 1, 64, 2)
    tile = Tile(q, k, v, q, q[..., 0], RowIntervals(4, 64, Band()), 3e25)
    exact, _ = attention(q, k, v, seen_by_intervals(tile.visible), tile.scale)
    assert relative_error(forward(Native(), tile)[0], exact) <= 2e-5  # scores of hundreds


def test_helper_threads_take_what_the_caller_makes_of_denormals():
    """torch.set_flush_denormal is a thread's own: bits must not depend on who computed which part."""
    q, k = torch.randn(1, 4, 600, 32), torch.randn(1, 4, 600, 32)
    tile = Tile(q, k, torch.randn(1, 4, 600, 32) * 1e-38, q, q[..., 0], RowIntervals(600, 600, Band()), 0.2)
    kept = forward(Native(), tile)[0]
    assert torch.set_flush_denormal(True)
    try:
        flushed = [forward(Native(), tile)[0] for _ in range(20)]
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(flushed[0], other) for other in flushed) and not torch.equal(flushed[0], kept)
    assert torch.equal(forward(Native(), tile)[0], kept)


WITHOUT_MODULE = """
import sys
sys.modules["ringspan._native"] = None  # what an installation without a compiler amounts to
import torch
from ringspan.kernels.table import KERNELS, choose
print(choose("auto", torch.float32, torch.device("cpu"), 64).name)
print(KERNELS[0].declines(torch.float32, torch.device("cpu"), 64))
"""


def run_without_module(**environment):
    command = [sys.executable, "-c", WITHOUT_MODULE]
    inherited = {name: value for name, value in os.environ.items() if name != "RINGSPAN_REQUIRE_NATIVE"}
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=60)


def test_without_the_compiled_module_auto_takes_torch_ops_and_the_reason_is_told():
    name, reason = run_without_module().stdout.strip().splitlines()
    assert name == "torch_ops"
    assert "the compiled module is not there" in reason and "compiler" in reason


ELSEWHERE = """
import torch
from ringspan.errors import UnsupportedError
from ringspan.kernels.table import choose
from ringspan.state import SoftmaxState
try:
    choose("native_rounded", torch.bfloat16, torch.device("cpu"), 64)
except UnsupportedError as error:
    print(error)
"""


def test_where_a_processor_gains_nothing_by_rounded_weights_they_are_refused():
    environment = os.environ | {"RINGSPAN_ISA": "baseline"}
    command = [sys.executable, "-c", ELSEWHERE]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout
    assert "native_rounded: this processor multiplies bfloat16 no faster than float32 (baseline)" in said


def test_auto_rounds_the_weights_of_bfloat16_where_that_is_faster():
    gains = _native.info()["rounds_weights"]
    chosen = [choose("auto", dtype, torch.device("cpu"), 64).name for dtype in (torch.bfloat16, torch.float16)]
    assert chosen == ["native_rounded" if gains else "native", "native"]


def test_the_spmd_entries_keep_float32_weights_for_the_bound_of_their_contract():
    assert choose(UNROUNDED, torch.bfloat16, torch.device("cpu"), 64).name == "native"
    q = torch.randn(1, 2, 16, 40).bfloat16()  # few rows: rounded weights would be beyond it now and then
    for _ in range(20):
        k, v = torch.randn(2, 1, 2, 40, 16).bfloat16()
        out = ringspan.ring_attention_spmd_fwd(q, k.mT, v)
        seen = torch.ones(40, 40, dtype=torch.bool)
        exact, _ = attention(q.mT, k, v, seen, 0.25)
        assert relative_error(out, exact) <= 2.5e-3


def test_where_it_is_required_a_missing_module_is_a_failure():
    done = run_without_module(RINGSPAN_REQUIRE_NATIVE="1")
    assert done.returncode != 0 and "ringspan._native" in done.stderr


def test_it_computes_with_as_many_threads_as_it_is_told(monkeypatch):
    asked = []
    for name in ("absorb_runs", "absorb_gradient"):
        inner = getattr(_native, name)
        counting = lambda *args, inner=inner, **options: (asked.append(options["num_threads"]), inner(*args, **options))  # noqa: E731
        monkeypatch.setattr(_native, name, counting)
    tile = make_tile(RowIntervals(5, 7))
    for told in (1, 3, 10**9):
        with limited_to(told):
            backward(Native(), tile)
    assert asked == [1, 1, 3, 3, 1024, 1024], "one forward and one backward each, and no more than there may be"


def test_a_limit_of_threads_ends_with_its_block_however_that_ends():
    plain = num_threads()
    with limited_to(7):
        with pytest.raises(ZeroDivisionError), limited_to(3):
            _ = num_threads() / 0
        assert num_threads() == 7
        with limited_to(None):
            assert num_threads() == plain
        assert num_threads() == 7
    assert num_threads() == plain
