"""The public face of shards: shard, unshard, positions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ringspan import call, reshard
from ringspan.arguments import check_carried_out, check_holds_numbers, check_local, check_no_transforms
from ringspan.errors import ArgumentError, ArgumentTypeError, explain, shown
from ringspan.layout import split
from ringspan.options import documents_of, documents_tensor
from ringspan.transport.table import group_name, place_in, resolve


def shard(
    x: Tensor,
    dim: int,
    *,
    layout: str = "contiguous",
    group: Any = None,
    rank: int | None = None,
    num_ranks: int | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """This rank's shard of a full tensor: a copy of the tokens that `layout` gives it, along `dim`.

    contiguous: one run, the first n % P ranks hold one token more. striped: tokens r, r + P, r + 2P, ... zigzag:
    of 2P runs (the first n % 2P one longer) run r, then run 2P-1-r. packed: of documents, so many tokens as
    contiguous, in the order of the sequence; which ones, so that all ranks have the same work and few share a document
    (docs/masks.md), follows from cu_seqlens. No communication. Differentiable: the gradient with respect to
    the x of this rank is 0 outside of its shard.

    rank, num_ranks: the place in a ring instead of a group, where there is none, as in a data loader's process.
    cu_seqlens: as in `ring_attention`; "packed" needs it, others look at its end only.
    """
    dim, documents = _checked_dim(x, dim), documents_tensor(cu_seqlens)
    rank, num_ranks = _place(group, rank, num_ranks)
    if torch.compiler.is_compiling():
        check_no_transforms("shard under torch.compile", x=x)
        return reshard.shard_in_graph(x, dim, layout, documents, rank, num_ranks)
    return reshard.take(x, dim, split(layout, x.shape[dim], num_ranks, documents_of(documents)).ranges(rank))


@reshard.untraced
def unshard(
    x: Tensor,
    dim: int,
    *,
    layout: str = "contiguous",
    group: Any = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """The full tensor on every rank, from every rank's shard along `dim`: the inverse of `shard`.

    Every rank of the group must call it, forward and backward. Differentiable, once: a shard's gradient is the sum
    over the ranks of the gradients that they have for it (the gradient of the sum of all ranks' losses),
    summed in float32.

    cu_seqlens: as in `shard`. The same on every rank.
    """
    check_carried_out("unshard", x)
    name = group_name(group)
    try:
        dim = _checked_dim(x, dim)
        check_holds_numbers(x=x)
        check_no_transforms("unshard", x=x)
        documents = documents_of(documents_tensor(cu_seqlens))
        split(layout, documents[-1] if documents else 0, 1, documents)
    except Exception as error:
        call.refuse(resolve(name), error, x)
    return reshard.unshard(x, dim, layout, name, documents)


def positions(
    num_tokens: int,
    *,
    layout: str = "contiguous",
    group: Any = None,
    rank: int | None = None,
    num_ranks: int | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Global positions of the tokens in this rank's shard of a sequence of `num_tokens` (int64, [T_local], on the
    CPU).

    rank, num_ranks: as in `shard`. cu_seqlens: as in `ring_attention`: count from the start of each document, as the
    position embeddings of packed documents do.
    """
    where = torch.arange(_index("num_tokens", num_tokens, at_least=0), device="cpu")
    documents = documents_tensor(cu_seqlens)
    if documents is not None:
        if not torch.compiler.is_compiling():
            documents_of(documents)
        where = where - documents[torch.searchsorted(documents, where, right=True) - 1]
    return shard(where, 0, layout=layout, group=group, rank=rank, num_ranks=num_ranks, cu_seqlens=documents)


def _place(group: Any, rank: int | None, num_ranks: int | None) -> tuple[int, int]:
    """(rank, number of ranks): as given, or of the group."""
    if rank is None and num_ranks is None:
        # In a graph as numbers: what is compiled for one rank is wrong for another, and caches go by the graph.
        return place_in(group)
    if rank is None or num_ranks is None or group is not None:
        got = f"group={group!r}, rank={rank!r}, num_ranks={num_ranks!r}"
        raise ArgumentError(explain("a place is a group, or rank and num_ranks.", got=got))
    num_ranks = _index("num_ranks", num_ranks, at_least=1)
    rank = _index("rank", rank, at_least=0)
    if rank >= num_ranks:
        raise ArgumentError(explain("rank must be less than num_ranks.", got=f"rank {rank} of {num_ranks}"))
    return rank, num_ranks


def _index(name: str, value: Any, at_least: int) -> int:
    try:
        found = value if isinstance(value, int) else operator.index(value)  # a symbolic size must stay one
    except TypeError:
        found = None
    if found is None or isinstance(value, bool):
        raise ArgumentTypeError(explain(f"{name} must be an integer.", got=shown(value)))
    if found < at_least:
        raise ArgumentError(explain(f"{name} must be at least {at_least}.", got=str(found)))
    return found


def _checked_dim(x: Tensor, dim: int) -> int:
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(explain("x must be a torch.Tensor.", got=str(type(x))))
    check_local("x", x)
    if x.layout != torch.strided or x.is_nested:
        got = "a nested tensor" if x.is_nested else str(x.layout)
        raise ArgumentTypeError(explain("x must be a dense tensor.", got=got, fix="use .to_dense()"))
    dim = _index("dim", dim, at_least=-x.ndim)
    if dim >= x.ndim:
        raise ArgumentError(explain(f"dim must be one of x's {x.ndim} dimensions.", got=str(dim)))
    return dim % x.ndim
