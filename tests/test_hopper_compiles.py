"""The kernels for Hopper compile within what such a GPU has, and their products run side by side; without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from ringspan.kernels import hopper_kernel
from ringspan.kernels.triton_bounds import bounds
from ringspan.tile import Band, RowIntervals

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


@pytest.mark.parametrize(("head_dim", "num_described"), [(64, 8), (128, 4)])
def test_the_kernels_of_a_backward_share_descriptions_of_blocks_of_one_shape(monkeypatch, head_dim, num_described):
    described, launched = [], {}

    def describe(x, length, dims):
        described.append((x, length))
        return described[-1]

    stub = SimpleNamespace(absorb_dkdv_kernel="dkdv", absorb_dq_kernel="dq")
    monkeypatch.setitem(sys.modules, "ringspan.kernels.hopper_backward", stub)
    monkeypatch.setattr(hopper_kernel, "_descriptor", describe)
    monkeypatch.setattr(hopper_kernel, "_launch", lambda kernel, *args, **_: launched.update({kernel: args}))
    q, k, v, do = (torch.zeros(1, 2, 300, head_dim, dtype=torch.bfloat16) for _ in range(4))
    sums, of_rows = [x.float() for x in (q, k, v)], torch.zeros(1, 2, 300)
    known = bounds(RowIntervals(300, 300, Band(upper=1)), q.device)
    hopper_kernel.absorb_gradient(*sums, q, k, v, do, of_rows, of_rows, known, 0.1)
    assert len(described) == num_described
    _, chosen = hopper_kernel.configs(head_dim)
    for kernel, sizes in (("dkdv", (chosen.dkdv.block, 64)), ("dq", (64, chosen.dq.block))):
        found = [x for x in launched[kernel] if type(x) is tuple and len(x) == 2]
        for (x, length), tensor, place in zip(found, (q, k, v, do), (0, 1, 1, 0), strict=True):
            assert x is tensor and length == sizes[place]
