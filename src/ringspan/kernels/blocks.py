"""Cutting one tile into blocks whose scratch stays within bounds. Shared by the kernels that work in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from torch import Tensor

from ringspan.tile import RowIntervals


@dataclass(frozen=True)
class Block:
    """Some batch entries, key/value heads with the query heads that read them, rows and keys of a tile."""

    batch: slice
    kv_heads: slice
    heads: slice
    rows: slice
    keys: slice

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads.stop - self.kv_heads.start

    def queries(self, x: Tensor) -> Tensor:
        """The block's part of q, dq [B, H, T, D], do [B, H, T, E] or lse, delta [B, H, T]."""
        return x[self.batch, self.heads, self.rows]

    def keyed(self, x: Tensor) -> Tensor:
        """The block's part of k, dk [B, K, S, D], or v, dv [B, K, S, E]."""
        return x[self.batch, self.kv_heads, self.keys]

    def intervals(self, visible: RowIntervals) -> RowIntervals:
        return visible.heads(self.batch, self.heads).block(self.rows, self.keys)


def blocks(
    q: Tensor,
    k: Tensor,
    visible: RowIntervals,
    scratch_elements: Callable[[int, int, int, int], int],
    budget_elements: int,
    smallest: int = 128,
) -> Iterator[Block]:
    """Blocks of a tile, keys outermost, without those whose keys no row of the block sees.

    scratch_elements(num_kv, group, num_rows, num_keys): what one block needs that has num_kv pairs of a batch
    entry and a key/value head, each read by `group` query heads. The largest blocks within the budget are
    taken; rows and keys are not cut below `smallest`.
    """
    num_batch, num_heads, num_rows, _ = q.shape
    num_kv_heads, num_keys = k.shape[1], k.shape[2]
    if not (num_batch and num_heads and num_rows and num_keys):
        return
    group = num_heads // num_kv_heads
    size = {"batch": num_batch, "kv": num_kv_heads, "rows": num_rows, "keys": num_keys}

    def too_big() -> bool:
        num_kv = size["batch"] * size["kv"]
        return scratch_elements(num_kv, group, size["rows"], size["keys"]) > budget_elements

    for axis in ("batch", "kv"):
        while too_big() and size[axis] > 1:
            size[axis] = (size[axis] + 1) // 2
    while too_big() and max(size["rows"], size["keys"]) > smallest:
        longer = "rows" if size["rows"] >= size["keys"] else "keys"
        size[longer] = (size[longer] + 1) // 2

    starts = (
        range(0, length, size[axis])
        for axis, length in (("batch", num_batch), ("kv", num_kv_heads), ("rows", num_rows))
    )
    for batch_start, kv_start, row_start in product(*starts):
        batch = slice(batch_start, min(batch_start + size["batch"], num_batch))
        kv_heads = slice(kv_start, min(kv_start + size["kv"], num_kv_heads))
        heads = slice(kv_heads.start * group, kv_heads.stop * group)
        rows = slice(row_start, min(row_start + size["rows"], num_rows))
        first, last = visible.heads(batch, heads).block(rows, slice(0, num_keys)).key_span()
        for key_start in range(first, last, size["keys"]):
            keys = slice(key_start, min(key_start + size["keys"], last))
            yield Block(batch, kv_heads, heads, rows, keys)
