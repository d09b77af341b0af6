"""The Triton kernels, on CPU tensors in Triton's interpreter."""

import pytest
import torch
from kernel_behaviour import KernelBehaviour

from ringspan.kernels.triton_kernel import Triton

pytest.importorskip("triton", reason="triton is not installed")


class TestTriton(KernelBehaviour):
    kernel = Triton()
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    refuses = ((torch.float64, "cpu", 64), (torch.float32, "meta", 64), (torch.float32, "cpu", 257))
