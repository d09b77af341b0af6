"""What a rank tells the others of its call, by names that the caller knows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ringspan.agreement import CALL, DEVICE_TYPE, RINGS, Terms
from ringspan.options import Options
from ringspan.transport.contract import Transport

Q, K, V, DO = 1, 2, 4, 8  # bits of Terms.flipped


@dataclass(frozen=True)
class Membership:
    """Which ranks of the group form this rank's ring, and what only the SPMD entries ask for.

    groups: the rings that run side by side and take part in one agreement; None: one ring of the whole group.
    equal_lengths: whether all ranks must hold equally many tokens.
    bounds: per local query [lo, hi) of local key indices, [B, H, T].
    """

    groups: tuple[tuple[int, ...], ...] | None = None
    equal_lengths: bool = False
    bounds: tuple[np.ndarray, np.ndarray] | None = None

    def members(self, transport: Transport) -> Sequence[int]:
        if self.groups is None:
            return range(transport.size)
        return next(ring for ring in self.groups if transport.rank in ring)

    def common_terms(self, num_queries: int) -> dict[str, object]:
        terms: dict[str, object] = {}
        if self.groups is not None:
            shown = str(self.groups) if len(str(self.groups)) < 100 else f"digest {_digest(self.groups)}"
            terms[RINGS] = f"{len(self.groups)} of {len(self.groups[0])}: {shown}"
        elif self.equal_lengths:
            terms[RINGS] = "one ring of all"
        if self.equal_lengths:
            terms["seqlen"] = num_queries
            terms["whether bounds are given"] = self.bounds is not None
        return terms


WHOLE_GROUP = Membership()


def terms_of(call: str, tensors: Sequence[Tensor], options: Options, ring: Membership) -> Terms:
    """call: the function's name; tensors: q, k, v, and in a backward do."""
    q, k, v = tensors[:3]
    ranges = None
    if options.key_ranges is not None:
        digest = _digest(tuple(part.digest for part in options.key_ranges))
        ranges = f"{len(options.key_ranges)} for each of {options.key_ranges[0].num_queries} queries, digest {digest}"
    common = {
        CALL: call,
        "batch": q.shape[0],
        "the number of query heads": q.shape[1],
        "the number of key/value heads": k.shape[1],
        "head_dim": q.shape[3],
        "head_dim of v": v.shape[3],
        "dtype": str(q.dtype),
        DEVICE_TYPE: q.device.type,
        **_mask_terms(options, ring),
        "cu_seqlens": documents_in_words(options.cu_seqlens),
        "key_ranges": ranges,
        "softmax_scale": options.scale,
        "kernel": options.kernel,
        "transport": options.transport,
        "which of q, k, v and sinks require grad": options.gradients or "none",
        **ring.common_terms(q.shape[2]),
    }
    flipped = sum(bit for bit, x in zip((Q, K, V, DO), tensors, strict=False) if _lies_flipped(x))
    return Terms(common, q.shape[2], k.shape[2], flipped, options.transport, q.device.type)


def _mask_terms(options: Options, ring: Membership) -> dict[str, object]:
    """By the names that the caller knows."""
    if ring.equal_lengths:  # the SPMD entries
        return {"use_causal_mask": options.right == 0, "striped_input": options.layout == "striped"}
    return {
        "layout": options.layout,
        "causal and window_size, as (left, right)": [options.left, options.right],
    }


def documents_in_words(cu_seqlens: tuple[int, ...] | None) -> str | None:
    """What stands for them where ranks compare."""
    return None if cu_seqlens is None else f"{len(cu_seqlens) - 1} documents, digest {_digest(cu_seqlens)}"


def _digest(numbers: tuple) -> str:
    """Stands for nested tuples of integers of any length in a message of fixed size."""
    return hashlib.blake2b(repr(numbers).encode(), digest_size=12).hexdigest()


def _lies_flipped(x: Tensor) -> bool:
    """Whether the memory of [B, H, T, D] is that of a contiguous [B, H, D, T]."""
    return x.mT.is_contiguous() and not x.is_contiguous()
