"""What `attend` shows: progress while it works, a table at the end, and what went wrong."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ringspan.commands.check import NUM_ROWS, Verdict
from ringspan.kernels.contract import SCRATCH_BYTES
from ringspan.observe import StepRecord

if TYPE_CHECKING:
    from ringspan.commands.finish import Plain
    from ringspan.commands.job import Job, Spent

_WIDTH = 100  # where the output is no terminal
_LINES = 20  # of progress there


def console(stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, width=None if stream.isatty() else _WIDTH)


def complain(text: str) -> None:
    """A message on stderr, as it is: no markup, no wrapping."""
    out = console(stderr=True)
    out.print(Text("ringspan: ", style="bold red") + Text(text), soft_wrap=True)


class Bars:
    """Progress on stderr: bars on a terminal, else a line for every twentieth of the steps."""

    def __init__(self, progress: Progress | None, whose: str, num_steps: int) -> None:
        self._progress = progress
        self._whose, self._num_steps, self._num_done = whose, num_steps, 0
        self._ring = None if progress is None else progress.add_task(f"ring steps of {whose}", total=num_steps)
        self._rows: TaskID | None = None
        self._lock = threading.Lock()
        self._begin_ns: int | None = None

    def step(self, record: StepRecord) -> None:
        with self._lock:  # workers that are threads all call this
            self._begin_ns = self._begin_ns or record.begin_ns
            self._num_done += 1
            if self._progress is not None and self._ring is not None:
                self._progress.advance(self._ring)
            elif self._num_done * _LINES // self._num_steps > (self._num_done - 1) * _LINES // self._num_steps:
                left_s = (record.end_ns - self._begin_ns) * 1e-9 * (self._num_steps / self._num_done - 1)
                told = f"step {self._num_done} of {self._num_steps} of {self._whose}, about {left_s:.0f} s left"
                print(told, file=sys.stderr, flush=True)

    def checking(self, share: float) -> None:
        """Told of the share of the keys that another block of the check is."""
        if self._progress is None:
            return
        if self._rows is None:
            self._rows = self._progress.add_task("check in float64, % of keys", total=100)
        self._progress.advance(self._rows, 100 * share)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


@contextmanager
def progress(whose: str, num_steps: int) -> Iterator[Bars]:
    """whose: the workers whose steps are counted; num_steps: of all of them."""
    out = console(stderr=True)
    if not out.is_terminal:
        yield Bars(None, whose, num_steps)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out) as bars:
        yield Bars(bars, whose, num_steps)


def show(
    job: Job, spent: Sequence[Spent], verdict: Verdict, plain: Plain | None = None, peak_bytes: int | None = None
) -> None:
    """The table on stdout. peak_bytes: of all workers together, where they share one process."""
    seconds = max(one.seconds for one in spent)
    table = Table(box=box.ROUNDED, show_header=False, title="exact attention, in a ring", title_justify="left")
    table.title_style, table.caption_justify = "bold", "left"
    if job.num_workers > 1:
        table.caption = (
            "a / b / c: the least, the median and the most of the workers; in the rest of the time they agree,\n"
            "wait for a core, or are done and wait for the others"
        )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, value in (
        ("input", f"{job.source.label}, {_dtype(job)}"),
        ("tokens", _tokens(job)),
        ("workers", _workers(job)),
        ("layout", job.asked.layout),
        ("mask", job.asked.mask_in_words()),
        ("time", _time(job, seconds)),
        ("computing", _shares([one.compute_s / seconds for one in spent])),
        ("waiting", _shares([one.wait_s / seconds for one in spent]) + " for transfers"),
        ("transfers", _transfers(spent)),
        ("peak memory", _memory(job, spent, peak_bytes)),
        ("error", _error(verdict, min(NUM_ROWS, job.source.shapes["q"][2]))),
        *((("plain torch", _plain(plain, seconds)),) if plain else ()),
        *((("trace", f"{job.trace}: opens in ui.perfetto.dev"),) if job.trace else ()),
        *((("written", _written(job) if verdict.passed else Text("nothing", style="red")),) if job.out else ()),
    ):
        table.add_row(name, value)
    console().print(table)


def _dtype(job: Job) -> str:
    return str(job.source.dtype).removeprefix("torch.")


def _tokens(job: Job) -> str:
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = job.source.shapes["q"], job.source.shapes["k"]
    tokens = f"{queries:,}" if queries == keys else f"{queries:,} queries, {keys:,} keys"
    grouped = "" if heads == kv_heads else f" on {kv_heads} key/value heads"
    batched = f"batch {batch}, " if batch > 1 else ""
    of_values = job.source.shapes["v"][3]
    dims = f"head_dim {dim}" if dim == of_values else f"head_dim {dim}, of v {of_values}"
    return f"{tokens} ({batched}{count(heads, 'head')}{grouped}, {dims})"


def _workers(job: Job) -> str:
    if not job.processes:
        return f"{count(job.num_workers, 'thread')} of one process"
    return count(job.num_workers, "process", "processes")


def count(number: int, what: str, several: str | None = None) -> str:
    return f"{number} {what if number == 1 else several or what + 's'}"


def _time(job: Job, seconds: float) -> str:
    rate = job.problem.forward_flops() / seconds / 1e9
    pairs = job.mask.num_visible_pairs()
    return f"{_seconds(seconds)}, {rate:,.{0 if rate >= 10 else 1}f} GFLOP/s ({pairs:,} visible pairs a head)"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"


def _shares(shares: list[float]) -> str:
    return f"{_spread([f'{share:.0%}' for share in sorted(shares)])} of the time"


def _transfers(spent: Sequence[Spent]) -> str:
    """Hidden is what a worker did not wait for, of the time that shards were on their way to it."""
    hidden = sorted(_hidden(one.wait_s, one.flight_s) for one in spent if one.flight_s is not None)
    if len(spent) == 1:
        return "none: there is one worker"
    if not hidden:
        return "none: shards are read in place"
    return f"{_spread([f'{share:.0%}' for share in hidden])} of their time hidden behind computing"


def _hidden(wait_s: float, flight_s: float) -> float:
    return max(0.0, 1 - wait_s / flight_s) if flight_s else 1.0  # all had arrived before its posting was over


def _spread(ascending: list[str]) -> str:
    """Least, median (the lower one of two) and most; of one worker its own."""
    if len(ascending) == 1:
        return ascending[0]
    return " / ".join((ascending[0], ascending[(len(ascending) - 1) // 2], ascending[-1]))


def _memory(job: Job, spent: Sequence[Spent], peak_bytes: int | None) -> str:
    peaks = sorted(one.peak_bytes for one in spent if one.peak_bytes is not None)
    if not peaks:
        return "not measured" if peak_bytes is None else f"{_mib(peak_bytes)} MiB beyond inputs, all workers together"
    state, scratch = _mib(_state_bytes(job)), _mib(SCRATCH_BYTES)
    if job.travels == "queries":
        shards = f"2 query shards and 3 states on their way, at most {_mib(3 * _state_bytes(job))}"
    elif job.num_workers == 1 or any(one.flight_s is not None for one in spent):
        shards = f"2 K/V shards {_mib(2 * _kv_bytes(job))}"
    else:  # mapped pages count for every process that maps them
        shards = f"{job.num_workers} K/V shards, one copy for all, {_mib(job.num_workers * _kv_bytes(job))}"
    parts = f"{shards}, state and out {state}, scratch <= {scratch}"
    return f"{_spread([_mib(peak) for peak in peaks])} MiB beyond inputs ({parts})"


def _kv_bytes(job: Job) -> int:
    batch, kv_heads, _, _ = job.source.shapes["k"]
    return batch * kv_heads * max(job.layout("k").lengths) * sum(job.problem.dims) * job.source.dtype.itemsize


def _state_bytes(job: Job) -> int:
    (batch, heads, _, _), (_, dim) = job.source.shapes["q"], job.problem.dims
    row = (dim + 2) * job.problem.state_itemsize_bytes + dim * job.source.dtype.itemsize
    return batch * heads * max(job.layout("q").lengths) * row


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f}"


def _error(verdict: Verdict, num_rows: int) -> Text:
    mark = Text("✓ ", style="bold green") if verdict.passed else Text("✗ ", style="bold red")
    why = "" if verdict.plain is None else f": twice plain attention's {verdict.plain:.1e}"
    rows = count(num_rows, "row")
    told = f"{verdict.out_error:.1e} on {rows} against float64 attention (bound {verdict.bound:.1e}{why})"
    told += f", worst row {verdict.row_error:.1e}"
    if not verdict.row_error <= verdict.row_bound:
        told += f" (bound {verdict.row_bound:.1e})"
    if not verdict.lse_error <= verdict.lse_bound:
        told += f"; lse {verdict.lse_error:.1e} (bound {verdict.lse_bound:.1e})"
    return mark + Text(told)


def _plain(plain: Plain, seconds: float) -> str:
    ratio = plain.seconds / seconds
    than = f"{ratio:.2f} times the ring's time"
    return f"{_seconds(plain.seconds)}, {than}, error {plain.error:.1e} ({count(plain.num_threads, 'thread')})"


def _written(job: Job) -> str:
    assert job.out is not None
    return f"{job.out}: out{' and lse' if job.with_lse else ''}, {_mib(job.out.stat().st_size)} MiB"
