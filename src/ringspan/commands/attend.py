"""The main job: q, k and v are cut up, a ring of workers attends to them, the parts are put together again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ringspan import observe, ring_attention, run_local, trace
from ringspan.commands import check, report
from ringspan.commands.asked import Exit
from ringspan.commands.finish import finish
from ringspan.commands.job import Job, Spent
from ringspan.commands.memory import PeakMemory
from ringspan.state import state_dtype
from ringspan.transport.cores import num_cores

_PARTS = ("compute", "wait", "flight")


def run_in_threads(job: Job) -> Exit:
    """The whole job in this process, its workers threads."""
    with report.progress("all workers", sum(map(job.num_steps, range(job.num_workers)))) as bars:

        def prepare(group: Any) -> tuple[Tensor, Tensor, Tensor]:
            shard = load(job, group.rank())
            warm_up(group, job, shard)  # here too, or what is loaded once a process would count as the ring's memory
            return shard

        shards = run_local(prepare, job.num_workers, timeout=job.timeout_s)
        memory = PeakMemory()

        def work(group: Any) -> tuple[Tensor, Tensor, Spent]:
            return attend_shard(group, job, shards[group.rank()], bars.step)

        results = run_local(work, job.num_workers, timeout=job.timeout_s)
        peak_bytes = memory.beyond_bytes()
        shards.clear()
        parts = (
            (rank, wanted_part(job, rank, out), wanted_part(job, rank, lse))
            for rank, (out, lse, _) in enumerate(results)
        )
        out, lse = put_together(job, parts)
        return finish(job, wanted_positions(job), out, lse, [spent for _, _, spent in results], bars, peak_bytes)


def run_as_rank(job: Job) -> Exit:
    """This process's part of the job, in the default process group; rank 0 puts it together and finishes it."""
    rank = dist.get_rank()
    if rank:
        _send(job, rank, *attend_shard(None, job, load(job, rank), _nothing))
        return Exit.OK
    with report.progress("worker 0", job.num_steps(0)) as bars:
        out, lse, spent = attend_shard(None, job, load(job, rank), bars.step)
        every_spent: list[Any] = [None] * job.num_workers
        dist.gather_object(spent, every_spent)
        out, lse = put_together(job, _received(job, out, lse))
        torch.set_num_threads(num_cores())  # the other workers are done
        return finish(job, wanted_positions(job), out, lse, every_spent, bars)


# What each worker does.


def load(job: Job, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """This worker's rows of q, k and v."""
    q, k, v = (job.source.take(name, job.layout(name).ranges(rank)) for name in ("q", "k", "v"))
    return q, k, v


def warm_up(group: Any, job: Job, shard: tuple[Tensor, Tensor, Tensor]) -> None:
    """One token each: connects the workers, and lets all of them start the clock together."""
    ring_attention(*(x[:, :, :1] for x in shard), group=group, kernel=job.asked.kernel, transport=job.transport)


def attend_shard(
    group: Any, job: Job, shard: tuple[Tensor, Tensor, Tensor], watch: Callable[[observe.StepRecord], object]
) -> tuple[Tensor, Tensor, Spent]:
    """out and lse of this worker's queries, and what they took."""
    warm_up(group, job, shard)
    records: list[observe.StepRecord] = []

    def note(record: observe.StepRecord) -> None:
        records.append(record)
        watch(record)

    traced = nullcontext() if job.trace is None else trace(job.trace, group=group)
    memory, begin = PeakMemory() if job.processes else None, time.perf_counter()
    with traced, observe.steps(note):
        out, lse = ring_attention(*shard, group=group, transport=job.transport, return_lse=True, **vars(job.asked))
        seconds = time.perf_counter() - begin
        peak_bytes = memory.beyond_bytes() if memory else None
    compute_s, wait_s, flight_s = (sum(getattr(one, f"{what}_s") for one in records) for what in _PARTS)
    copied = any(record.flights for record in records)
    return out, lse, Spent(seconds, compute_s, wait_s, flight_s if copied else None, peak_bytes)


def _nothing(_: object) -> None:
    pass


# From the workers' parts to one result.


def wanted_positions(job: Job) -> np.ndarray:
    """Queries whose results are gathered: all, or, where nothing is written, those that are checked."""
    num_queries = job.source.shapes["q"][2]
    return check.sampled_positions(num_queries) if job.out is None else np.arange(num_queries)


def wanted_part(job: Job, rank: int, x: Tensor) -> Tensor:
    """What a worker gives of its out or lse."""
    slots, _ = _chosen(job, rank)
    return x[:, :, torch.from_numpy(slots)]


def put_together(job: Job, parts: Iterable[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """out and lse of the wanted positions, in their order, from each rank's part."""
    (batch, heads, _, _), dim = job.source.shapes["q"], job.source.shapes["v"][3]
    num_wanted = len(wanted_positions(job))
    out = torch.empty(batch, heads, num_wanted, dim, dtype=job.source.dtype)
    lse = torch.empty(batch, heads, num_wanted, dtype=state_dtype(job.source.dtype))
    for rank, out_part, lse_part in parts:
        places = torch.from_numpy(_chosen(job, rank)[1])
        out[:, :, places], lse[:, :, places] = out_part, lse_part
    return out, lse


def _chosen(job: Job, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a rank's wanted queries sit in its shard, and where among all wanted positions."""
    wanted = wanted_positions(job)
    held = np.concatenate([np.arange(0), *(np.arange(x.start, x.stop, x.step) for x in job.layout("q").ranges(rank))])
    slots = np.flatnonzero(np.isin(held, wanted))
    return slots, np.searchsorted(wanted, held[slots])


def _send(job: Job, rank: int, out: Tensor, lse: Tensor, spent: Spent) -> None:
    dist.gather_object(spent)
    for x in (out, lse):
        part = wanted_part(job, rank, x)
        if part.numel():
            dist.send(part, 0)


def _received(job: Job, out: Tensor, lse: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Rank 0's own part, then the others' as they come."""
    yield 0, wanted_part(job, 0, out), wanted_part(job, 0, lse)
    for rank in range(1, job.num_workers):
        num_rows = len(_chosen(job, rank)[0])
        parts = [x.new_empty((*x.shape[:2], num_rows, *x.shape[3:])) for x in (out, lse)]
        for part in parts:
            if part.numel():
                dist.recv(part, rank)
        yield rank, parts[0], parts[1]
