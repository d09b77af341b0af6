"""The public face of attention: ring_attention and decode_attention. (Of shards: sharding.py.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ringspan import call
from ringspan.arguments import (
    check_alike,
    check_can_be_kept,
    check_holds_numbers,
    check_no_transforms,
    check_sinks,
    check_tensor,
)
from ringspan.autograd import attend, decode, next_place_in_graph, refuse_later
from ringspan.errors import ArgumentTypeError, UnsupportedError, explain, shown
from ringspan.options import (
    Options,
    documents_tensor,
    normalised_options,
    ranges_tensors,
)
from ringspan.transport.table import check_transport, group_name, resolve


class _OfEither(TypedDict, total=False):
    key_ranges: Tensor | Sequence[Tensor] | None
    sinks: Tensor | None
    softmax_scale: float | None
    kernel: str
    transport: str
    agreement: bool


class OptionsOfRing(_OfEither, total=False):
    """What `ring_attention` takes beside the place of the tokens."""

    causal: bool
    window_size: tuple[int, int]


class _Options(OptionsOfRing, total=False):
    group: Any
    layout: str
    cu_seqlens: Sequence[int] | Tensor | None


@overload
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[_Options]
) -> Tensor: ...


@overload
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    cu_seqlens: Sequence[int] | Tensor | None = None,
    key_ranges: Tensor | Sequence[Tensor] | None = None,
    sinks: Tensor | None = None,
    layout: str = "contiguous",
    softmax_scale: float | None = None,
    return_lse: bool = False,
    kernel: str = "auto",
    transport: str = "auto",
    agreement: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention of this rank's queries over the keys and values of all ranks of the group.

    softmax(softmax_scale * Q K^T + mask) V, computed shard by shard with a float32 online softmax (Ring
    Attention, Liu et al. 2023). Every rank of the group must call it, with the same options, and so must every
    rank call backward, or none.

    Args:
        q: [B, H, T_local, D], this rank's queries; bfloat16, float16, float32 or float64; any strides.
            Autocast casts q, k and v to its dtype, which out then has too; it leaves float64 alone.
        k: [B, K, S_local, D], v: [B, K, S_local, E], this rank's keys and values; E is D unless values are shorter or
            longer than keys. H a multiple of K, and query head h reads key/value head h // (H / K), without
            expanding k and v. Lengths may differ between ranks, and may be 0.
        group: a torch.distributed ProcessGroup, a 1-D DeviceMesh of ascending ranks, or the group that `run_local`
            hands out. The place of a rank in the ring is its rank in the group.
            None: inside run_local the worker's group, else the default process group, else a ring of one.
        causal: a query sees keys at its own global position and before (window_size's right side becomes 0).
        window_size: (left, right): query p sees keys p - left .. p + right; -1 is unbounded.
        cu_seqlens: global document boundaries (0, ..., total), for every batch entry: a query sees its own
            document. Any lengths; a boundary may repeat.
        key_ranges: [T, 2] or [B, T, 2], integers, T the number of queries of all ranks together: query p sees keys
            key_ranges[p, 0] <= j < key_ranges[p, 1] of the whole sequence, none where that is empty; of a list of
            such tensors those that are in any, and no two may overlap. For what the rules above do not say (padding,
            prefixes, a mask_mod: ringspan.masks makes them); those of them that are given hold too. The same on
            every rank, best on the CPU, where the values are read.
        sinks: [H], floating point: a learned score for each query head that every query has beside those of its
            keys, and that has no value: exp(sinks[h]) more in the denominators of softmax, and in lse. The same on
            every rank, which is not compared; its gradient is of this rank's queries, to be summed over ranks as
            those of other parameters are.
        layout: "contiguous", "striped", "zigzag" or "packed": which tokens this rank's shard holds (see `shard`). The
            last three balance causal work, "packed" that of the documents of cu_seqlens. A mask other than
            key_ranges, or such a layout, needs as many queries as keys in all.
        softmax_scale: default D ** -0.5.
        return_lse: also return lse, the natural logarithm of the sum of exp of the scaled visible scores.
        kernel: "auto", or a name that `ringspan doctor` lists.
        transport: "auto", "local" (run_local groups), and for process groups "shared_memory" (CPU tensors, all
            ranks on one host: shards are read in place), "torch_dist", or "peer_memory" (tensors on NVIDIA GPUs, all
            ranks on one host: shards are pulled from GPU to GPU). "auto" takes the first of them that serves.
        agreement: False skips the exchange in which ranks compare their arguments. Then all ranks must hold
            equal lengths and pass equal arguments; where they do not, results are undefined.

    Returns:
        out [B, H, T_local, E] in q's dtype; with return_lse (out, lse), lse [B, H, T_local] in float32 (float64
        for float64 inputs). A query that sees no key has out 0 and lse -inf (or its sink). Both are differentiable,
        once. On return no rank reads this rank's tensors any more.

    Raises:
        ArgumentError, LayoutError (ValueError), ArgumentTypeError (TypeError), UnsupportedError
        (NotImplementedError): this rank's arguments break a rule, which the message names.
        PeerRefusedError, DisagreementError (ValueError): another rank's do, or the ranks' do not belong together.
        RankFailedError (RuntimeError): a rank died, raised, or did not come within the group's timeout.
    """
    name = group_name(group)
    try:
        # Their values are looked at inside of the op, so that graphs may hold tensors.
        documents, ranges = documents_tensor(cu_seqlens), ranges_tensors(key_ranges)
        q, k, v, options = _checked(
            "ring_attention",
            name,
            (q, k, v),
            sinks,
            return_lse,
            causal=causal,
            window_size=window_size,
            layout=layout,
            softmax_scale=softmax_scale,
            kernel=kernel,
            transport=transport,
            agreement=agreement,
        )
    except Exception as error:
        if agreement is False or (torch.compiler.is_compiling() and not isinstance(q, Tensor)):
            raise
        out, lse = _refused(error, name, q, k, v)
        return (out, lse) if return_lse else out
    out, lse = attend(
        q,
        k,
        v,
        sinks,
        documents,
        ranges,
        name,
        options.layout,
        options.left,
        options.right,
        options.scale,
        options.kernel,
        options.transport,
        options.agreement,
        options.gradients,
        next_place_in_graph() if torch.compiler.is_compiling() else 0,
    )
    return (out, lse) if return_lse else out


class _OptionsOfDecoding(_OfEither, total=False):
    group: Any


@overload
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[_OptionsOfDecoding]
) -> Tensor: ...


@overload
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[_OptionsOfDecoding]
) -> tuple[Tensor, Tensor]: ...


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    key_ranges: Tensor | Sequence[Tensor] | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    kernel: str = "auto",
    transport: str = "auto",
    agreement: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention of queries that every rank has, over the keys and values of all ranks: decoding.

    Nothing goes round: each rank absorbs the keys that it has, and all exchange their float32 softmax states once and
    merge them in one order ("Flash-Decoding", Dao et al. 2023, with ranks for splits). So every rank has the
    whole result, on processors of one kind in the same bits. Worth it where queries are few: a state is E + 2 numbers
    of float32 for each row of out.

    Args:
        q: [B, H, T, D], the same on every rank (shapes are compared, numbers are not).
        k: [B, K, S_local, D], v: [B, K, S_local, E], of this rank. Which rank has which keys, and how many, is free.
        key_ranges: as in `ring_attention`, T the number of queries; key positions count through rank 0's keys,
            then rank 1's, ... None: every query sees every key, as a single new token does.
        agreement: False as in `ring_attention`; equally many keys on all ranks are needed with key_ranges only.
        The others as in `ring_attention`. Not differentiable. Under autocast all keys are cast in every call.

    Returns: out [B, H, T, E] in q's dtype; with return_lse (out, lse), lse [B, H, T]. The same on every rank.

    Raises: as `ring_attention`.
    """
    name = group_name(group)
    try:
        ranges = ranges_tensors(key_ranges)
        q, k, v, options = _checked(
            "decode_attention",
            name,
            (q, k, v),
            sinks,
            return_lse,
            softmax_scale=softmax_scale,
            kernel=kernel,
            transport=transport,
            agreement=agreement,
        )
        if options.gradients:
            fix = "call it under torch.no_grad(), or ring_attention with the queries on one rank"
            raise UnsupportedError(
                explain("decode_attention is not differentiable.", got=f"gradients of {options.gradients}", fix=fix)
            )
    except Exception as error:
        if agreement is False or (torch.compiler.is_compiling() and not isinstance(q, Tensor)):
            raise
        out, lse = _refused(error, name, q, k, v)
        return (out, lse) if return_lse else out
    place = next_place_in_graph() if torch.compiler.is_compiling() else 0
    out, lse = decode(
        q, k, v, sinks, ranges, name, options.scale, options.kernel, options.transport, options.agreement, place
    )
    return (out, lse) if return_lse else out


def _checked(
    what: str, name: str, tensors: tuple[Any, Any, Any], sinks: Tensor | None, return_lse: bool, **asked: Any
) -> tuple[Tensor, Tensor, Tensor, Options]:
    """q, k and v as attention takes them, and the options; refuses what a rank can see by itself. name: the group's."""
    check_transport(name, asked["transport"])
    q, k, v = _autocast(*tensors)
    if not q.device == k.device == v.device:  # an op sees it too, but not where one of them is a meta tensor
        check_alike(q, k, v)
    check_sinks(sinks, q)
    check_no_transforms(what, q=q, k=k, v=v, sinks=sinks)
    if not torch.compiler.is_compiling():
        check_holds_numbers(q=q, k=k, v=v)
    options = normalised_options(**asked, gradients=_gradients(q=q, k=k, v=v, sinks=sinks))
    if not torch.compiler.is_compiling():
        check_can_be_kept(options.gradients, q=q, k=k, v=v, sinks=sinks)
    if not isinstance(return_lse, bool):
        raise ArgumentTypeError(explain("return_lse must be a bool.", got=shown(return_lse)))
    return q, k, v, options


def _refused(error: Exception, name: str, q: Any, k: Any, v: Any) -> tuple[Tensor, Tensor]:
    """Raises, once the other ranks know. While a graph is traced ranks cannot talk: what is returned does so when the
    graph runs."""
    if not torch.compiler.is_compiling():
        call.refuse(resolve(name), error, q, k, v)
    value_dim = v.shape[-1] if isinstance(v, Tensor) and v.ndim else q.shape[-1]
    return refuse_later(q, value_dim, type(error).__name__, str(error.args[0]), name)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, attention runs in its dtype, as torch's own does."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
    device = q.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v


def _gradients(**tensors: Tensor | None) -> str:
    if not torch.is_grad_enabled():
        return ""
    return ",".join(name for name, x in tensors.items() if x is not None and x.requires_grad)
