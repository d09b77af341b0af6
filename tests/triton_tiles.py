"""What the tests of the Triton kernels share, in the interpreter and on a GPU."""

from __future__ import annotations

import torch

from ringspan.kernels.triton_configs import Config, Configs
from ringspan.kernels.triton_kernel import Triton
from ringspan.state import SoftmaxState


def of_blocks(*sizes: tuple[int, int]) -> Triton:
    forward, dq, dkdv = (Config(rows, keys, 4, 1) for rows, keys in sizes)
    return Triton(lambda *_: Configs(forward, dq, dkdv))


SMALL = {"wide": of_blocks((16, 32), (16, 64), (32, 16)), "tall": of_blocks((64, 16), (32, 16), (16, 32))}


def state_of(rows: int, dim: int, *, blind: slice) -> SoftmaxState:
    """Of 2 batch entries and 3 heads, on the default device; blind rows have seen nothing."""
    state = SoftmaxState(torch.randn(2, 3, rows, dim), torch.randn(2, 3, rows), torch.rand(2, 3, rows) + 0.5)
    state.acc[:, :, blind], state.row_max[:, :, blind], state.row_sum[:, :, blind] = 0.0, -torch.inf, 0.0
    return state
