"""The Triton kernels compile, as the table of configurations has them, within what GPUs have. None is needed here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

# Of one block of threads, in KiB (CUDA programming guide, technical specifications per compute capability).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# Of one multiprocessor. Its shared memory is 1 KiB more than the above: that much the system keeps of each block.
THREADS = {80: 2048, 86: 1536, 90: 2048}
MODULE = Path(__file__).with_name("compiling.py")


def needed(architecture, kernel, dtype, head_dim, *options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, MODULE, *map(str, (architecture, kernel, dtype, head_dim)), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(architecture, kernel, dtype, head_dim, *options):
    found = needed(architecture, kernel, dtype, head_dim, *options)
    assert found["shared_bytes"] <= SHARED_KIB[architecture] << 10
    whole = found["loops"][0]
    assert (whole["tensor"] > 0) == (dtype != "f32"), "float32 is not rounded to tf32, other products use tensor cores"
    if head_dim <= 128 and not options:
        # Without tensor cores the operands are in registers too: float32 with 128 dims has more than fit.
        assert whole["spills"] <= whole["instructions"] * (0.125 if dtype == "f32" else 0.01), found


def test_the_forward_compiles_for_hopper_without_spills():
    check(90, "forward", "bf16", 64)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("architecture", "dtype"), [(80, "bf16"), (89, "bf16"), (90, "bf16"), (90, "f32")])
def test_every_configuration_fits_its_architecture(architecture, dtype, head_dim, kernel):
    check(architecture, kernel, dtype, head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
@pytest.mark.parametrize("architecture", [80, 90])
def test_a_head_dim_of_values_of_their_own_compiles(architecture, kernel):
    found = needed(architecture, kernel, "bf16", "192/128")
    assert found["shared_bytes"] <= SHARED_KIB[architecture] << 10
    assert found["shared_bytes"] <= needed(architecture, kernel, "bf16", 256)["shared_bytes"]


def test_gradients_of_keys_compile_for_general_intervals():
    check(90, "dkdv", "bf16", 64, "general")


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
@pytest.mark.parametrize("option", ["general", "strided"])
def test_general_intervals_and_any_strides_compile(kernel, option):
    check(90, kernel, "f16", 100, option)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [86, 100, 120])
def test_other_architectures_compile(architecture):
    check(architecture, "forward", "bf16", 128)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [1, 64, 256])
@pytest.mark.parametrize("architecture", [80, 86, 90])
def test_the_shared_memory_of_the_merge_leaves_room_for_all_threads(architecture, head_dim):
    """Its loads of out are wider, in elements, than its accesses of acc, and shared memory is where a block changes
    its layout. It lives by the threads that wait for memory at the same time, so that must not be what bounds them."""
    found = needed(architecture, "merge", "bf16", head_dim)
    blocks = THREADS[architecture] // (32 * found["warps"])
    assert blocks * (found["shared_bytes"] + 1024) <= (SHARED_KIB[architecture] + 1) << 10
