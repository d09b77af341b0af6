"""The kernel on torch's own fused attention."""

import torch
from kernel_behaviour import FLOATS, KernelBehaviour

from ringspan.kernels.torch_ops import TorchOps


class TestTorchOps(KernelBehaviour):
    kernel = TorchOps()
    dtypes = FLOATS
    refuses = ((torch.float32, "meta", 64),)
