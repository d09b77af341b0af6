"""What `attend` was asked, in a form that every worker process gets, and what a worker's part of it took."""

from __future__ import annotations

import errno
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch

from ringspan.commands.asked import Asked
from ringspan.commands.source import FileSource, Source
from ringspan.errors import ArgumentError, explain
from ringspan.kernels import table as kernel_table
from ringspan.layout import Layout, split
from ringspan.problem import UNBOUNDED, Mask, Problem
from ringspan.schedule.contract import Travels
from ringspan.schedule.ring import ring_schedule, travelling_side
from ringspan.state import state_dtype
from ringspan.trace import check_writable, unwritable


@dataclass(frozen=True)
class Job:
    """Made by `plan`, which refuses what cannot be done.

    processes: workers are the ranks of a process group, else threads of this process. transport: between them.
    part: where the result is written before it gets the name out. trace: where a trace goes, or None.
    timeout_s: bounds every wait of one worker for another.
    """

    source: Source
    asked: Asked
    num_workers: int
    processes: bool
    transport: str = "auto"
    out: Path | None = None
    part: Path | None = None
    trace: Path | None = None
    with_lse: bool = False
    compare: bool = False
    timeout_s: float = 1800.0

    @property
    def mask(self) -> Mask:
        return self.asked.mask(self.source.shapes["q"][2], self.source.shapes["k"][2], self.num_workers)

    @property
    def problem(self) -> Problem:
        (batch, heads, _, dim), (_, kv_heads, _, value_dim) = self.source.shapes["q"], self.source.shapes["v"]
        itemsizes = self.source.dtype.itemsize, state_dtype(self.source.dtype).itemsize
        return Problem(self.mask, batch, heads, kv_heads, dim, *itemsizes, value_dim)

    @property
    def scale(self) -> float:
        asked = self.asked.softmax_scale
        return self.source.shapes["q"][3] ** -0.5 if asked is None else asked

    def layout(self, name: str) -> Layout:
        return split(self.asked.layout, self.source.shapes[name][2], self.num_workers, self.asked.cu_seqlens)

    def num_steps(self, rank: int) -> int:
        """Of a worker's forward."""
        rides = self.travels == "queries"
        return len(ring_schedule(self.mask, self.layout("q"), self.layout("k"), rank, self.travels, rides).steps)

    @property
    def travels(self) -> Travels:
        return travelling_side(self.problem, backward=False)


@dataclass(frozen=True)
class Spent:
    """What one worker's call took.

    flight_s: how long what it received by copy was on its way; None where nothing was. peak_bytes: memory at most,
    beyond its inputs; None where unknown.
    """

    seconds: float
    compute_s: float
    wait_s: float
    flight_s: float | None
    peak_bytes: int | None


def plan(source: Source, asked: Asked, num_workers: int, processes: bool, out: Path | None, **rest) -> Job:
    """The job, once everything that can be refused beforehand has been looked at. Computes nothing."""
    part = None if out is None else out.parent / f".{out.name}.{secrets.token_hex(4)}.part"
    job = Job(source, asked, num_workers, processes, out=out, part=part, **rest)
    largest_dim = max(source.shapes[name][3] for name in "qv")
    kernel_table.choose(asked.kernel, source.dtype, torch.device("cpu"), largest_dim)
    mask = job.mask
    if job.compare and (mask.cu_seqlens is not None or mask.left != UNBOUNDED or mask.right > 0):
        raise ArgumentError(
            explain(
                "--compare runs torch's attention over the whole sequence, which knows no mask but causal.",
                got=asked.mask_in_words(),
                fix="leave out --compare, or --window and --documents",
            )
        )
    return job


def refuse_unwritable(job: Job) -> None:
    """For the process that will write: find out before the work."""
    if job.trace is not None:
        if job.out is not None and job.trace.resolve() == job.out.resolve():
            raise ArgumentError(explain("--trace and --out are one file.", got=str(job.trace), fix="another name"))
        _try_to_write(job, "--trace", job.trace, job.trace)
    if job.out is not None and job.part is not None:
        _try_to_write(job, "--out", job.out, job.part)


def _try_to_write(job: Job, option: str, path: Path, first: Path) -> None:
    """first: the file that is written before it gets the name path, or path itself. Leaves everything as it was."""
    try:
        if isinstance(job.source, FileSource) and path.exists() and path.samefile(job.source.path):
            raise ArgumentError(explain(f"{option} is INPUT itself.", got=str(path), fix="another name"))
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        check_writable(first)
    except OSError as error:
        raise unwritable(option, path, error) from None
