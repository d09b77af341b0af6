"""The kernels for Hopper compile within what such a GPU has, and their products run side by side; without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from ringspan.kernels import hopper_kernel

if hopper_kernel.why_not_there():
    pytest.skip(hopper_kernel.why_not_there(), allow_module_level=True)

SHARED_BYTES = 227 << 10  # of one block of threads (CUDA programming guide, technical specifications)
MODULE = Path(__file__).with_name("compiling_hopper.py")


def compiled(*args) -> dict[str, dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, MODULE, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = map(json.loads, filter(lambda line: line.startswith("{"), done.stdout.splitlines()))
    return {kernel["kernel"]: kernel for kernel in found}


def check(found: dict) -> None:
    assert found["shared_bytes"] <= SHARED_BYTES
    groups = [loop for loop in found["loops"] if loop["tensor"]]
    assert len(groups) >= 2, "each group of warps has a loop of its own"
    for loop in groups:
        # A compiler that sees a sum in use while a product adds to it waits for each product by itself.
        assert loop["waits"] <= loop["tensor"] // 2, found
    main = groups[0]
    assert main["spills"] <= main["instructions"] * 0.04, found


def test_the_forward_has_its_products_side_by_side():
    found = compiled(128, "band", "forward")
    check(found["absorb_kernel"])
    assert found["absorb_kernel"]["num_programs"] == 2 * 4 * 3  # batch entries, heads, blocks of 128 of 300 rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["band", "arrays"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_all_kernels_fit(head_dim, kind):
    found = compiled(head_dim, kind)
    assert set(found) == {"absorb_kernel", "absorb_dq_kernel", "absorb_dkdv_kernel"}
    for kernel in found.values():
        check(kernel)


@pytest.mark.slow
def test_other_types_and_the_largest_heads_fit():
    for found in (compiled(256, "band", "forward"), compiled(128, "band", "both", "f16")):
        for kernel in found.values():
            check(kernel)
