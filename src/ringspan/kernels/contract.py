"""What a kernel is: arithmetic on ONE tile of attention, and nothing else.

A kernel knows rows, keys and the interval of keys that each row sees. It does not know of ranks, layouts,
documents or windows. Every kernel passes the one behaviour suite, tests/kernel_behaviour.py.

    score   s_ij  = scale * q_i . k_j                    for lo_i <= j < hi_i
    absorb  acc_i, m_i, l_i  take in  e^(s_ij) v_j  and  e^(s_ij)
    weight  p_ij  = exp(s_ij - lse_i)                    lse over ALL keys of the row, of all tiles
            ds_ij = p_ij * (do_i . v_j - delta_i)        delta_i = do_i . out_i - dlse_i
    absorb_gradient  dq_i += scale * sum_j ds_ij k_j,  dk_j += scale * sum_i ds_ij q_i,  dv_j += sum_i p_ij do_i

(FlashAttention-2, Dao 2023, sections 2.3 and 3.1.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ringspan.state import SoftmaxState
from ringspan.tile import RowIntervals

SCRATCH_BYTES = 16 << 20  # what one kernel call may allocate beyond its arguments


KeyRun = tuple[Tensor, Tensor, RowIntervals]  # k, v, and what the rows see of them


class Kernel(Protocol):
    """Shapes: q, dq [B, H, T, D]; k, dk [B, K, S, D], v, dv [B, K, S, E], H a multiple of K; the state's acc and do
    [B, H, T, E]; lse, delta [B, H, T].

    Query head h reads key/value head h // (H / K); keys and values are never expanded. Inputs have any
    strides. State and gradients have the dtype of `state_dtype` and are changed in place, never replaced.

    Rules that the suite holds every kernel to: a row that sees nothing stays as it is; T, S or B
    of 0 is legal; NaN and inf reach only the rows that see them, and the gradients of what those rows see; a
    call allocates at most SCRATCH_BYTES; two calls on the same bits give the same bits.
    """

    name: str
    sets_threads: bool  # whether it computes with kernels.threads.num_threads() threads
    enough_keys: int  # a call that has fewer is dear beside what it computes

    def declines(self, dtype: torch.dtype, device: torch.device, head_dim: int) -> str | None:
        """Why this kernel cannot serve such tensors here, or None if it can. head_dim: the larger of D and E."""

    def absorb(self, state: SoftmaxState, q: Tensor, k: Tensor, v: Tensor, visible: RowIntervals, scale: float) -> None:
        """Take one tile into the state."""

    def absorb_runs(self, state: SoftmaxState, q: Tensor, runs: Sequence[KeyRun], scale: float) -> None:
        """Take tiles of the same rows into the state: with the bits of one after the other."""

    def absorb_gradient(
        self,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        do: Tensor,
        lse: Tensor,
        delta: Tensor,
        visible: RowIntervals,
        scale: float,
    ) -> None:
        """Add one tile's part to the gradients."""


def captures(kernel: Kernel) -> bool:
    """Whether a CUDA graph can hold its masked tiles: some kernels wait for the GPU there, and say nothing of it."""
    return getattr(kernel, "captures", False)


class TileByTile:
    """For kernels to which several tiles are no less work than each alone."""

    enough_keys = 0

    def absorb_runs(self: Kernel, state: SoftmaxState, q: Tensor, runs: Sequence[KeyRun], scale: float) -> None:
        for k, v, visible in runs:
            self.absorb(state, q, k, v, visible, scale)
