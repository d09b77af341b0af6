"""A sequence over a ring: its layout, group and documents, said once for all that is done with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack, overload

from torch import Tensor

from ringspan.api import OptionsOfRing, ring_attention
from ringspan.reshard import untraced
from ringspan.sharding import positions, shard, unshard


@dataclass(frozen=True, eq=False)
class Ring:
    """Where the tokens of one sequence are: `shard`, `unshard`, `positions` and `ring_attention` that agree on it.

    A layout that is given to one of them and forgotten at another is no error, only wrong numbers; this cannot forget.

    layout, group: as in `ring_attention`. cu_seqlens: as there, the documents of this sequence: which see only
    themselves in `attention`, and in each of which `positions` begin at 0. All are looked at in the calls, which
    raise what those functions raise.
    """

    layout: str = "contiguous"
    group: Any = None
    cu_seqlens: Sequence[int] | Tensor | None = None

    def __deepcopy__(self, memo: dict) -> Ring:
        return self  # nothing of it changes, and a group has no copy

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's shard of a full tensor, along dim."""
        return shard(x, dim, layout=self.layout, group=self.group, cu_seqlens=self.cu_seqlens)

    @untraced
    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """The full tensor on every rank, from every rank's shard. Every rank must call it."""
        return unshard(x, dim, layout=self.layout, group=self.group, cu_seqlens=self.cu_seqlens)

    def positions(self, num_tokens: int) -> Tensor:
        """Positions of this rank's tokens in the sequence, or each in its document; int64, on the CPU."""
        return positions(num_tokens, layout=self.layout, group=self.group, cu_seqlens=self.cu_seqlens)

    @overload
    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[OptionsOfRing]
    ) -> Tensor: ...

    @overload
    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[OptionsOfRing]
    ) -> tuple[Tensor, Tensor]: ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """`ring_attention` of this rank's shards, and its other options: causal, window_size, sinks, ..."""
        return ring_attention(q, k, v, layout=self.layout, group=self.group, cu_seqlens=self.cu_seqlens, **options)
