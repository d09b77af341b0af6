"""The C++ kernel on the instruction set that it chooses here; tests/test_native.py runs the others."""

import os
import subprocess
import sys

import pytest
import torch
from definition import attention, gradients, relative_error, seen_by_intervals
from kernel_behaviour import KernelBehaviour, make_tile

import ringspan
from ringspan import _native
from ringspan.kernels.native import Native, NativeRounded
from ringspan.kernels.table import choose
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


def test_auto_does_not_round_weights():
    assert choose("auto", torch.bfloat16, torch.device("cpu"), 64).name == "native"


def test_where_it_is_required_a_missing_module_is_a_failure():
    done = run_without_module(RINGSPAN_REQUIRE_NATIVE="1")
    assert done.returncode != 0 and "ringspan._native" in done.stderr
