"""Compiles the kernels for Hopper as a launch has them, without a GPU, and prints what each needs.

    python compiling_hopper.py HEAD_DIM band|arrays [forward|backward|both] [bf16|f16]

The host's side runs as on a GPU, but on CPU tensors, down to Triton's binding of arguments; only the launch is missing.
"""

import json
import sys
from contextlib import nullcontext

import numpy as np
import torch
from compiling import loops
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ringspan.kernels import hopper_kernel, triton_bounds, triton_ranges
from ringspan.state import SoftmaxState
from ringspan.tile import Band, RowIntervals

ROWS, KEYS, HEADS, KV_HEADS = 300, 257, 4, 2


class NoDriver:
    """What Triton asks a driver for before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_only(kernel, num_programs, *args, **options) -> None:
    compiled = kernel.warmup(*args, grid=(num_programs,), **options)
    found = {"kernel": kernel.fn.__name__, "shared_bytes": compiled.metadata.shared, "num_programs": num_programs}
    print(json.dumps(found | {"loops": loops(compiled.asm["cubin"])}))


def main(head_dim: str, kind: str, passes: str = "both", dtype: str = "bf16") -> None:
    driver.set_active(NoDriver())
    torch.cuda.device = lambda device: nullcontext()
    hopper_kernel.launch = compile_only
    triton_ranges.row_ranges = lambda lo, hi, num_keys, *rest: torch.zeros(1, 1, 3, 4, dtype=torch.int32)
    of = {"bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    q, do = (torch.zeros(2, HEADS, ROWS, int(head_dim), dtype=of) for _ in range(2))
    k, v = (torch.zeros(2, KV_HEADS, KEYS, int(head_dim), dtype=of) for _ in range(2))
    lo = np.zeros(ROWS, dtype=np.int64)
    visible = RowIntervals(ROWS, KEYS, Band(upper=1)) if kind == "band" else RowIntervals(ROWS, KEYS, None, lo, lo + 9)
    known = triton_bounds.bounds(visible, torch.device("cpu"))
    if passes != "backward":
        hopper_kernel.absorb(SoftmaxState.empty(q), q, k, v, known, 0.1)
    if passes != "forward":
        sums = [torch.zeros(x.shape) for x in (q, k, v)]
        of_rows = torch.zeros(q.shape[:3])
        hopper_kernel.absorb_gradient(*sums, q, k, v, do, of_rows, of_rows, known, 0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
