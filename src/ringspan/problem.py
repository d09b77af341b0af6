"""WHAT is asked: who sees whom, in global positions, and the sizes of one attention call. Integers only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import numpy as np

UNBOUNDED = -1
_BEYOND = 1 << 62  # every sequence, with room for a sum


@dataclass(frozen=True)
class KeyRanges:
    """For each query of the whole sequence one [lo, hi) of global key positions.

    digest: stands for the content, and its shape, wherever two are compared.
    lo, hi: int64, [T], or [B, 1, T] where batch entries differ (the axis between is of heads).
    """

    digest: bytes
    lo: np.ndarray = field(compare=False)
    hi: np.ndarray = field(compare=False)

    @classmethod
    def of(cls, ranges: np.ndarray) -> KeyRanges:
        """Of [T, 2] or [B, T, 2]: a copy, which all who ask for the same share as long as one of them lives."""
        ranges = np.ascontiguousarray(ranges, dtype=np.int64)
        content = hashlib.blake2b(repr(ranges.shape).encode(), digest_size=12)
        content.update(ranges.data)
        digest = content.digest()
        found = _shared.get(digest)
        if found is None:
            lo, hi = (ranges[..., side].clip(0, _BEYOND) for side in (0, 1))
            found = cls(digest, lo, hi) if lo.ndim == 1 else cls(digest, lo[:, None], hi[:, None])
            _shared[digest] = found
        return found

    @property
    def num_queries(self) -> int:
        return self.lo.shape[-1]

    @property
    def batch(self) -> int | None:
        """The batch size that they are for; None: for any."""
        return self.lo.shape[0] if self.lo.ndim > 1 else None

    def overlaps(self, other: KeyRanges) -> bool:
        """Whether some query has a key in both."""
        return bool((np.maximum(self.lo, other.lo) < np.minimum(self.hi, other.hi)).any())


_shared: WeakValueDictionary[bytes, KeyRanges] = WeakValueDictionary()


@dataclass(frozen=True)
class Mask:
    """Which keys each query sees: ONE interval of global key positions, what all the rules leave; or, where key ranges
    say so, several (`parts`).

    num_queries, num_keys: lengths of the whole sequences (all ranks together).
    left, right: query p sees keys p - left .. p + right; -1 is unbounded (flash-attention's window_size;
        causal is right = 0). Both need num_queries == num_keys.
    cu_seqlens: boundaries (0, ..., total) of packed documents, or None: a query sees its own document only.
    key_ranges: a query sees only what is in one of these, of which no two overlap; or None.
    """

    num_queries: int
    num_keys: int
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    cu_seqlens: tuple[int, ...] | None = None
    key_ranges: tuple[KeyRanges, ...] | None = None

    @property
    def sees_all(self) -> bool:
        return not self.compares_positions and self.key_ranges is None

    @property
    def compares_positions(self) -> bool:
        """Whether a rule compares where a query and a key are: query p and key p are one token then."""
        return (self.left, self.right, self.cu_seqlens) != (UNBOUNDED, UNBOUNDED, None)

    @property
    def is_causal_only(self) -> bool:
        return (self.left, self.right, self.cu_seqlens, self.key_ranges) == (UNBOUNDED, 0, None, None)

    @property
    def parts(self) -> tuple[Mask, ...]:
        """Masks of one interval a query, which together show what this one shows, and no pair twice."""
        if self.key_ranges is None or len(self.key_ranges) == 1:
            return (self,)
        return tuple(replace(self, key_ranges=(ranges,)) for ranges in self.key_ranges)

    @property
    def num_entries(self) -> int:
        """How many batch entries it tells apart; 1 where it holds for all."""
        of_ranges = self.key_ranges[0].batch if self.key_ranges else None
        return 1 if of_ranges is None else of_ranges

    def document(self, position: int) -> tuple[int, int]:
        """The [start, end) of the document that holds a global position."""
        if self.cu_seqlens is None:
            return 0, self.num_keys
        index = int(np.searchsorted(self.cu_seqlens, position, side="right"))
        return self.cu_seqlens[index - 1], self.cu_seqlens[index]

    def intervals(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per query position the [lo, hi) of the global key positions that it sees (int64), of a mask of one part.

        [positions], or [B, 1, positions] where batch entries differ.
        """
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
        if self.key_ranges is not None:
            (ranges,) = self.key_ranges
            lo = np.maximum(lo, ranges.lo[..., positions])
            hi = np.minimum(hi, ranges.hi[..., positions])
        return lo, hi

    def num_visible_pairs(self, batch: int = 1) -> int:
        """Pairs (query, key) that the mask shows, for one head, in all of `batch` entries."""
        pairs = 0
        for part in self.parts:
            lo, hi = part.intervals(np.arange(self.num_queries, dtype=np.int64))
            pairs += int(np.maximum(hi - lo, 0).sum()) * (batch if lo.ndim == 1 else 1)
        return pairs


@dataclass(frozen=True)
class Problem:
    """One attention call as the whole group sees it: the mask and the sizes of its tensors.

    head_dim: of q and k. value_dim: of v and out, if it is another. itemsize_bytes: of one element of q, k and v.
    state_itemsize_bytes: of the softmax state and gradients (4; 8 for float64 inputs).
    """

    mask: Mask
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize_bytes: int = 4
    state_itemsize_bytes: int = 4
    value_dim: int | None = None

    @property
    def dims(self) -> tuple[int, int]:
        """Of q and k, and of v and out."""
        return self.head_dim, self.head_dim if self.value_dim is None else self.value_dim

    def forward_flops(self) -> int:
        """Floating-point operations of the two products of a forward: 2 * H * (D + E) * visible pairs of the batch."""
        return 2 * self.num_heads * sum(self.dims) * self.mask.num_visible_pairs(self.batch)
