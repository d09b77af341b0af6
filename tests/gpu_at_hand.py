"""The GPU that tests are run on, and what they share. Importing this skips a test module where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ringspan.kernels.torch_cuda import Attend, Library

DEVICE = "cuda"

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU that this torch can use", allow_module_level=True)


def counting(library: Library, calls: list[str]) -> Library:
    """The same, noting its name for every call."""

    def attend(*args):
        calls.append(library.name)
        return library.attend(*args)

    counted: Attend = attend
    return replace(library, attend=counted)
