"""WHAT is asked: who sees whom, in global positions, and the sizes of one attention call. Integers only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNBOUNDED = -1


@dataclass(frozen=True)
class Mask:
    """Which keys each query sees: always ONE interval of global key positions.

    num_queries, num_keys: lengths of the whole sequences (all ranks together).
    left, right: query p sees keys p - left .. p + right; -1 is unbounded (flash-attention's window_size;
        causal is right = 0). Both need num_queries == num_keys.
    cu_seqlens: boundaries (0, ..., total) of packed documents, or None: a query sees its own document only.
    """

    num_queries: int
    num_keys: int
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    cu_seqlens: tuple[int, ...] | None = None

    @property
    def sees_all(self) -> bool:
        return self.left == self.right == UNBOUNDED and self.cu_seqlens is None

    @property
    def is_causal_only(self) -> bool:
        return (self.left, self.right, self.cu_seqlens) == (UNBOUNDED, 0, None)

    def document(self, position: int) -> tuple[int, int]:
        """The [start, end) of the document that holds a global position."""
        if self.cu_seqlens is None:
            return 0, self.num_keys
        index = int(np.searchsorted(self.cu_seqlens, position, side="right"))
        return self.cu_seqlens[index - 1], self.cu_seqlens[index]

    def intervals(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per query position the [lo, hi) of the global key positions that it sees (int64)."""
        lo = np.zeros_like(positions)
        hi = np.full_like(positions, self.num_keys)
        if self.cu_seqlens is not None:
            boundaries = np.asarray(self.cu_seqlens, dtype=np.int64)
            index = np.searchsorted(boundaries, positions, side="right")
            lo, hi = boundaries[index - 1], boundaries[index]
        if self.left != UNBOUNDED:
            lo = np.maximum(lo, positions - self.left)
        if self.right != UNBOUNDED:
            hi = np.minimum(hi, positions + self.right + 1)
        return lo, hi

    def num_visible_pairs(self) -> int:
        """Pairs (query, key) that the mask shows, for one head of one batch entry."""
        lo, hi = self.intervals(np.arange(self.num_queries, dtype=np.int64))
        return int(np.maximum(hi - lo, 0).sum())


@dataclass(frozen=True)
class Problem:
    """One attention call as the whole group sees it: the mask and the sizes of its tensors.

    itemsize_bytes: of one element of q, k and v. state_itemsize_bytes: of the softmax state and gradients
    (4; 8 for float64 inputs).
    """

    mask: Mask
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize_bytes: int = 4
    state_itemsize_bytes: int = 4

    def forward_flops(self) -> int:
        """Floating-point operations of the two products of a forward: 4 * B * H * D * visible pairs."""
        return 4 * self.batch * self.num_heads * self.head_dim * self.mask.num_visible_pairs()
