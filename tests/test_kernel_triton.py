"""The Triton kernels, on CPU tensors in Triton's interpreter (conftest.py turns it on)."""

import os

import pytest
import torch
from kernel_behaviour import KernelBehaviour

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these are run in Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

import interpreter

from ringspan.kernels.triton_kernel import Triton

# NumPy warns of what the interpreter computes with NaN and inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    interpreter.hurry(monkeypatch)


class TestTriton(KernelBehaviour):
    kernel = Triton()
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    refuses = ((torch.float64, "cpu", 64), (torch.float32, "meta", 64), (torch.float32, "cpu", 257))
    rounds_weights = True
    one_in = 7
