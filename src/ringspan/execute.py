"""THE LOOP: runs one rank's schedule, forward and backward. The only place where kernels and transports meet.

In each step the hop for the next one is posted, then the tiles are computed on the shard that is here, then the
hop is waited for. What is computed, what is sent and in which order was decided before, in integers. (Where shards
are small and read in place, the forward computes some steps' tiles together.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ringspan.kernels.contract import Kernel, KeyRun
from ringspan.observe import StepClock
from ringspan.schedule.contract import Schedule, Step
from ringspan.state import SoftmaxState, state_dtype
from ringspan.tile import RowIntervals, Tile
from ringspan.traffic import STATES, Traffic
from ringspan.transport.contract import Channel, Parcel, spec_of

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Job:
    """Everything but the tensors.

    query_lengths, key_lengths: of the shards, by rank. flipped: of the travelling tensors, which all ranks hold
    as [.., D, T] in memory and send so. bounds: per local query [lo, hi) of local key indices, [B, H, T].
    """

    schedule: Schedule
    kernel: Kernel
    scale: float
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    flipped: tuple[bool, ...]
    bounds: tuple[np.ndarray, np.ndarray] | None = None

    def visible(self, tile: Tile) -> RowIntervals:
        intervals = tile.intervals()
        if self.bounds is None:
            return intervals
        return intervals.within(*(bound[..., tile.rows] - tile.key_start for bound in self.bounds))


def forward(
    job: Job, channel: Channel, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out [B, H, T, E] in q's dtype and lse [B, H, T] in the state's, of this rank's queries over all keys.

    sinks: [H], a score more for every row of a head, without a value.
    """
    if job.schedule.travels == "queries":
        return _forward_of_travelling_queries(job, channel, q, k, v, sinks)
    state = SoftmaxState.empty(q, v.shape[3])
    work = _Absorbing(job, state, q, channel.in_place)
    clock = StepClock("forward", job.schedule)
    traffic = Traffic(channel, job.schedule, (k, v), job.key_lengths, job.flipped)
    clock.handed_out()
    with channel.computing():
        for step in job.schedule.steps:
            k, v = traffic.visiting()  # first, or the shard before would still be held when one is allocated
            arriving = traffic.post_shards(step)
            clock.posted()
            clock.computed(work.take(step, k, v))
            traffic.receive_shard(arriving, still_read=work.is_waiting)
            clock.finish(step, arriving)
        out, lse = state.finalize(q.dtype, sinks)
    del state, work  # the others may read on for long
    channel.close()
    return out, lse


def _forward_of_travelling_queries(
    job: Job, channel: Channel, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same where queries are few: they go round, and their states ride along, as gradients do in the backward."""
    state = SoftmaxState.empty(q, v.shape[3])
    clock = StepClock("forward", job.schedule)
    traffic = Traffic(channel, job.schedule, (q,), job.query_lengths, job.flipped, STATES)
    clock.handed_out()

    def absorb(tile: Tile, visiting: Tensors, part: Tensors) -> None:
        (rows,) = visiting
        keys = _rows_of(k, tile.columns), _rows_of(v, tile.columns), job.visible(tile)
        job.kernel.absorb_runs(SoftmaxState(*part).select(tile.rows), _rows_of(rows, tile.rows), [keys], job.scale)

    with channel.computing():
        _run_with_rides(job.schedule, clock, traffic, (state.acc, state.row_max, state.row_sum), absorb)
        out, lse = state.finalize(q.dtype, sinks)
    traffic.finish()
    return out, lse


def decode(
    kernel: Kernel,
    tiles: Sequence[Tile],
    scale: float,
    channel: Channel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The forward where all ranks have the same queries, and nothing goes round.

    Each rank absorbs its own keys (tiles), and merges the states of all in one order: the same bits on like processors.
    """
    state = SoftmaxState.empty(q, v.shape[3])
    with channel.computing():
        for tile in tiles:
            run = _rows_of(k, tile.columns), _rows_of(v, tile.columns), tile.intervals()
            kernel.absorb_runs(state.select(tile.rows), _rows_of(q, tile.rows), [run], scale)
    mine = Parcel((state.acc, state.row_max, state.row_sum))
    others = [rank for rank in range(channel.size) if rank != channel.rank]
    spec = spec_of(mine.tensors)
    arrived = channel.post(0, 0, [(rank, mine) for rank in others], [(rank, spec) for rank in others]).wait()
    arrived.insert(channel.rank, mine)
    whole = SoftmaxState.empty(q, v.shape[3])
    for parcel in arrived:
        whole.merge_(*parcel.tensors)
        if parcel is not mine:
            channel.release(parcel)
    channel.close()
    return whole.finalize(q.dtype, sinks)


def backward(
    job: Job, channel: Channel, q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B, H, T, D], dk [B, K, S, D], dv [B, K, S, E] in the state's dtype, of this rank's queries, keys, values."""
    dtype = state_dtype(q.dtype)
    keys_travel = job.schedule.travels == "keys"
    rows_in: Tensors = (q, do, lse, delta)
    keys_in: Tensors = (k, v)
    rows_out: Tensors = (_zeros(q, dtype),)
    keys_out: Tensors = (_zeros(k, dtype), _zeros(v, dtype))
    staying, travelling = (rows_in, keys_in) if keys_travel else (keys_in, rows_in)
    sums, home = (rows_out, keys_out) if keys_travel else (keys_out, rows_out)
    lengths = job.key_lengths if keys_travel else job.query_lengths
    clock = StepClock("backward", job.schedule)
    traffic = Traffic(channel, job.schedule, travelling, lengths, job.flipped)
    clock.handed_out()

    def absorb(tile: Tile, visiting: Tensors, part: Tensors) -> None:
        rows, keys = (staying, visiting) if keys_travel else (visiting, staying)
        rows_part, keys_part = (sums, part) if keys_travel else (part, sums)
        _absorb_gradient(job, tile, rows, keys, rows_part, keys_part)

    with channel.computing():
        _run_with_rides(job.schedule, clock, traffic, home, absorb)
    traffic.finish()
    (dq,), (dk, dv) = rows_out, keys_out
    return dq, dk, dv


def _run_with_rides(
    schedule: Schedule,
    clock: StepClock,
    traffic: Traffic,
    home: Tensors,
    absorb: Callable[[Tile, Tensors, Tensors], None],
) -> None:
    """The loop where results for the travelling shards ride along. home: those for this rank's own shard.

    absorb: computes a tile with what is visiting, into this rank's part of the result for it.
    """
    for step in schedule.steps:
        visiting = traffic.visiting()
        arriving, riding = traffic.post_step(step, home)
        clock.posted()
        part = traffic.begin_part(home) if step.index and step.tiles else home
        for tile in step.tiles:
            absorb(tile, visiting, part)
        clock.computed((step.shard,) if step.tiles else ())
        traffic.receive_rides(step, riding, part, home)
        traffic.send_ride(step)
        traffic.receive_shard(arriving)
        clock.finish(step, arriving, riding)


class _Absorbing:
    """Hands tiles to the kernel: at once, or some steps' tiles together (docs/decisions/0011-small-shards.md)."""

    def __init__(self, job: Job, state: SoftmaxState, q: Tensor, in_place: bool) -> None:
        self._job, self._state, self._q = job, state, q
        self._enough_keys = job.kernel.enough_keys if in_place else 0
        self._runs: list[tuple[slice, list[KeyRun]]] = []  # by rows, in the order of the steps
        self._shards: list[int] = []  # whose tiles these are
        self._num_keys = 0

    @property
    def is_waiting(self) -> bool:
        """Whether tiles of earlier steps are still to be computed, on shards that must not be released."""
        return bool(self._shards)

    def take(self, step: Step, k: Tensor, v: Tensor) -> tuple[int, ...]:
        """The shards whose tiles have been computed now."""
        if step.tiles:
            self._shards.append(step.shard)
        for tile in step.tiles:
            run = _rows_of(k, tile.columns), _rows_of(v, tile.columns), self._job.visible(tile)
            if not self._runs or self._runs[-1][0] != tile.rows:
                self._runs.append((tile.rows, []))
            self._runs[-1][1].append(run)
            self._num_keys += len(tile.keys)
        if self._num_keys < self._enough_keys and step is not self._job.schedule.steps[-1]:
            return ()
        for rows, runs in self._runs:
            self._job.kernel.absorb_runs(self._state.select(rows), _rows_of(self._q, rows), runs, self._job.scale)
        computed = tuple(self._shards)
        self._runs.clear()
        self._shards.clear()
        self._num_keys = 0
        return computed


def _rows_of(x: Tensor, part: slice) -> Tensor:
    """x[:, :, part] of [B, H, T, ...]; taking a view that is all of x costs as much as a small step."""
    return x if part == slice(0, x.shape[2]) else x[:, :, part]


def _absorb_gradient(
    job: Job, tile: Tile, rows: Tensors, keys: Tensors, rows_part: Tensors, keys_part: Tensors
) -> None:
    q, do, lse, delta = (_rows_of(x, tile.rows) for x in rows)
    k, v = (_rows_of(x, tile.columns) for x in keys)
    (dq,) = (_rows_of(x, tile.rows) for x in rows_part)
    dk, dv = (_rows_of(x, tile.columns) for x in keys_part)
    job.kernel.absorb_gradient(dq, dk, dv, q, k, v, do, lse, delta, job.visible(tile), job.scale)


def _zeros(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(x.shape, dtype=dtype, device=x.device)
