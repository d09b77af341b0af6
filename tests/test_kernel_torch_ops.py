"""The kernel on torch's own fused attention."""

import numpy as np
import pytest
import torch
from kernel_behaviour import FLOATS, KernelBehaviour, assert_backward_exact, backward, make_tile, row_constants

from ringspan.kernels import torch_ops
from ringspan.kernels.reference import Reference
from ringspan.kernels.torch_ops import TorchOps
from ringspan.problem import Mask
from ringspan.tile import Band, RowIntervals


class TestTorchOps(KernelBehaviour):
    kernel = TorchOps()
    dtypes = FLOATS
    refuses = ((torch.float32, "meta", 64),)


def causal_documents(*cu_seqlens):
    num_rows = cu_seqlens[-1]
    mask = Mask(num_rows, num_rows, right=0, cu_seqlens=cu_seqlens)
    return RowIntervals(num_rows, num_rows, None, *mask.intervals(np.arange(num_rows)))


FLASH_HAS = {
    "rectangle": RowIntervals(63, 129),
    "diagonal": RowIntervals(129, 129, Band(upper=1)),
    "diagonal without itself": RowIntervals(64, 64, Band(upper=0)),
    "diagonal further right": RowIntervals(63, 129, Band(upper=40)),
    "diagonal that ends before the last row": RowIntervals(129, 63, Band(upper=1)),
    "documents, some of them short": causal_documents(0, 1, 3, 3, 50, 51, 64),
}


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("shape", FLASH_HAS)
def test_what_flash_attention_has_is_not_left_to_the_reference(shape, in_blocks, monkeypatch):
    """Results would be the same, only later."""
    for name in ("absorb", "absorb_gradient"):
        monkeypatch.setattr(Reference, name, None)
    if in_blocks:
        monkeypatch.setattr(torch_ops, "SCRATCH_BYTES", 1 << 16)
    tile = make_tile(FLASH_HAS[shape])
    tile.q[:, :, 0] = 0  # of one key that it sees, the lse is 0 then
    tile.do[:, :, 5], tile.dlse[:, :, 5] = 0, 0  # as of a token that the loss leaves out
    lse, delta = row_constants(TorchOps(), tile)
    assert_backward_exact(tile, backward(TorchOps(), tile, lse.nan_to_num(neginf=0.0), delta))
