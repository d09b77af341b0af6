"""The C++ kernel on the instruction set that it chooses here; tests/test_native.py runs the others."""

import torch
from kernel_behaviour import KernelBehaviour

from ringspan.kernels.native import Native


class TestNative(KernelBehaviour):
    kernel = Native()
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    refuses = ((torch.float64, "cpu", 64), (torch.float32, "meta", 64), (torch.float32, "cpu", 257))
