"""What all ranks of a ring derive alike from what they agreed on: the mask, the layouts, the schedule, the kernel."""

from __future__ import annotations

from torch import Tensor

from ringspan.agreement import Agreed
from ringspan.errors import ArgumentError, LayoutError, explain
from ringspan.execute import Job
from ringspan.kernels import table as kernel_table
from ringspan.kernels.contract import Kernel
from ringspan.layout import from_lengths
from ringspan.options import Options
from ringspan.problem import Mask, Problem
from ringspan.schedule.ring import ring_schedule, travelling_side
from ringspan.state import state_dtype
from ringspan.terms import DO, K, Membership, Q, V
from ringspan.tile import Tile
from ringspan.tiling import tiles_between
from ringspan.transport.contract import Channel


def decide(
    channel: Channel,
    agreed: Agreed,
    options: Options,
    ring: Membership,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backward: bool,
    sinks: bool = False,
) -> Job:
    """This rank's job in the forward or the backward. sinks: whether there are any."""
    mask = mask_of(sum(agreed.query_lengths), sum(agreed.key_lengths), channel.size, options)
    documents = options.cu_seqlens if options.layout == "packed" else None  # they would be kept with the layout
    queries, keys = (
        from_lengths(options.layout, lengths, documents) for lengths in (agreed.query_lengths, agreed.key_lengths)
    )
    itemsizes = q.element_size(), state_dtype(q.dtype).itemsize
    problem = Problem(mask, q.shape[0], q.shape[1], k.shape[1], q.shape[3], *itemsizes, v.shape[3])
    # Bounds belong to the queries of a rank, so with them it is the keys that travel.
    travels = "keys" if ring.bounds is not None else travelling_side(problem, backward)
    rides = backward or travels == "queries"
    schedule = ring_schedule(mask, queries, keys, channel.rank, travels, rides)
    # Sinks, and for travelling queries the keys of other ranks, join what a tile makes of a row.
    only_tile = travels == "keys" and not sinks and sum(len(step.tiles) for step in schedule.steps) == 1
    kernel = kernel_for(options, q, v, only_tile)
    flips_q, flips_k, flips_v, flips_do = (bool(agreed.flipped & bit) for bit in (Q, K, V, DO))
    wire: tuple[bool, ...] = (flips_k, flips_v)
    if travels == "queries":
        wire = (flips_q, flips_do, False, False) if backward else (flips_q,)
    return Job(schedule, kernel, scale_of(options, q), queries.lengths, keys.lengths, wire, ring.bounds)


def mask_of(num_queries: int, num_keys: int, num_ranks: int, options: Options) -> Mask:
    """The mask of the whole sequence; refuses what has no meaning for its lengths."""
    mask = Mask(num_queries, num_keys, options.left, options.right, options.cu_seqlens, options.key_ranges)
    if num_queries != num_keys and (options.layout != "contiguous" or mask.compares_positions):
        what, fix = f"layout={options.layout!r}", 'layout="contiguous"'
        if mask.compares_positions:
            what = "causal, window_size and cu_seqlens"
            fix = "no mask, or key_ranges alone, which say who sees what (ringspan.masks.continued: later queries)"
        raise LayoutError(
            explain(
                f"{what} cannot be used with cross attention of unequal lengths.",
                got=f"q: {num_queries} tokens, k: {num_keys} tokens over {num_ranks} ranks",
                fix=fix,
            )
        )
    if options.cu_seqlens is not None and options.cu_seqlens[-1] != num_queries:
        raise ArgumentError(
            explain(
                "cu_seqlens must end at the number of tokens of the whole sequence.",
                got=f"it ends at {options.cu_seqlens[-1]}, the ranks hold {num_queries} tokens",
                fix="boundaries are global, the same on every rank: (0, ..., total)",
            )
        )
    if options.key_ranges is not None and options.key_ranges[0].num_queries != num_queries:
        raise ArgumentError(
            explain(
                "key_ranges must have a range for each query of the whole sequence.",
                got=f"{options.key_ranges[0].num_queries} ranges, the ranks hold {num_queries} queries",
                fix="the same tensor [T, 2] or [B, T, 2] on every rank, T of all ranks together",
            )
        )
    return mask


def tiles_of_own_keys(num_queries: int, key_lengths: tuple[int, ...], rank: int, options: Options) -> tuple[Tile, ...]:
    """What a rank computes where all ranks have the same queries."""
    ranges = options.key_ranges
    if ranges is not None and ranges[0].num_queries != num_queries:
        raise ArgumentError(
            explain(
                "key_ranges must have a range for each query.",
                got=f"{ranges[0].num_queries} ranges, q has {num_queries} queries",
                fix="[T, 2] or [B, T, 2], T the number of queries that every rank has",
            )
        )
    mask = Mask(num_queries, sum(key_lengths), key_ranges=ranges)
    keys = from_lengths("contiguous", key_lengths)
    return tiles_between((range(num_queries),), keys.ranges(rank), mask)


def scale_of(options: Options, q: Tensor) -> float:
    return q.shape[3] ** -0.5 if options.scale is None else options.scale


def kernel_for(options: Options, q: Tensor, v: Tensor, only_tile: bool = False) -> Kernel:
    return kernel_table.choose(options.kernel, q.dtype, q.device, max(q.shape[3], v.shape[3]), only_tile)
