"""The online-softmax state of a set of query rows, and the laws by which parts of it are put together.

After Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), and Rabe and Staats,
"Self-attention does not need O(n^2) memory" (2021). A row's state (acc, m, l) stands for the numerator
acc * e^m and the denominator l * e^m; m is near the largest score seen. The empty state (0, -inf, 0) is the
identity of merging; merging is associative and commutative up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = float("-inf")
_ALL = slice(None)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything that is kept between steps: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class SoftmaxState:
    """acc [B, H, T, E], E the head_dim of v, row_max [B, H, T] and row_sum [B, H, T], all of `state_dtype`."""

    acc: Tensor
    row_max: Tensor
    row_sum: Tensor

    @classmethod
    def empty(cls, q: Tensor, value_dim: int | None = None) -> SoftmaxState:
        """The state of q's rows [B, H, T, D] before any key was seen. value_dim: head_dim of v, if not q's."""
        batch, heads, rows, dim = q.shape
        dtype = state_dtype(q.dtype)
        return cls(
            torch.zeros(batch, heads, rows, value_dim or dim, dtype=dtype, device=q.device),
            torch.full((batch, heads, rows), NEVER, dtype=dtype, device=q.device),
            torch.zeros(batch, heads, rows, dtype=dtype, device=q.device),
        )

    def select(self, rows: slice, heads: slice = _ALL, batch: slice = _ALL) -> SoftmaxState:
        """The same state, seen through some of its rows: changes show in both."""
        num_batch, num_heads, num_rows = self.row_max.shape
        # Three views that are all of their tensors cost as much as a small step's Python besides.
        if rows == slice(0, num_rows) and heads in (_ALL, slice(0, num_heads)) and batch in (_ALL, slice(0, num_batch)):
            return self
        return SoftmaxState(
            self.acc[batch, heads, rows], self.row_max[batch, heads, rows], self.row_sum[batch, heads, rows]
        )

    def merge_(self, acc: Tensor, row_max: Tensor, row_sum: Tensor | None = None) -> None:
        """Add another state of the same rows, in place. row_sum None: acc is already divided, row_max is lse."""
        largest, mine, theirs = _on_one_base(self.row_max, row_max)
        self.acc.mul_(mine.unsqueeze(-1)).addcmul_(acc, theirs.unsqueeze(-1))
        self.row_sum.mul_(mine).add_(theirs if row_sum is None else row_sum * theirs)
        self.row_max.copy_(largest)

    def finalize(self, dtype: torch.dtype, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(out [B, H, T, E] in dtype, lse [B, H, T]). A row that saw nothing: out 0, lse -inf. Uses up acc.

        sinks: [H]: for every row of head h one key more, of score sinks[h] and value 0.
        """
        row_max, row_sum, share = self.row_max, self.row_sum, None
        if sinks is not None:
            row_max, share, weight = _on_one_base(row_max, sinks.to(row_max.dtype).unsqueeze(-1))
            row_sum = row_sum * share + weight
        unseen = row_sum == 0
        divisor = torch.where(unseen, 1.0, row_sum)
        if share is not None:
            divisor /= share  # inf where nothing is left of acc
        out = self.acc.div_(divisor.unsqueeze(-1)).to(dtype)
        return out, torch.where(unseen, NEVER, row_max + row_sum.log())


def _on_one_base(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the larger of two m, and by what the parts that were made with each must be multiplied to stand for it)."""
    largest = torch.maximum(mine, theirs)
    # A row that neither side has seen keeps m = -inf; its factors must be e^-inf = 0, not e^nan.
    base = torch.where(largest == NEVER, 0.0, largest)
    return largest, torch.exp(mine - base), torch.exp(theirs - base)
