"""A picture of a ring at work: every rank's computing and transfers on one clock, as a Chrome/Perfetto trace."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ringspan import call, observe, reshard
from ringspan.errors import ArgumentError, explain
from ringspan.transport.table import group_name, resolve

_COMPUTING, _TRANSFERS = 0, 1  # rows of a rank


@contextmanager
def trace(file: str | os.PathLike[str], *, group: Any = None) -> Iterator[None]:
    """Record the steps of this rank's calls inside the block; at its end rank 0 writes those of all ranks to `file`.

    Every rank of the group must enter and leave it; on a rank where the block raises, nothing is exchanged or
    written. The file opens in ui.perfetto.dev or chrome://tracing: a row of each rank shows its computing, another
    its transfers: in flight (from posting to arrival), and where shards are read in place what handing them out took
    and how long was waited for them. Times are those of the host: what a GPU does in them is for torch.profiler.

    Args:
        file: where rank 0 writes the trace (JSON, times in microseconds).
        group: as in `ring_attention`.

    Raises:
        ArgumentError: on rank 0, where the file cannot be written; PeerRefusedError from the next call of the others,
            unless it is one with agreement=False.
        OSError: on rank 0, where it cannot be written any more at the end.
        RankFailedError: another rank did not leave its block.
    """
    name = group_name(group)
    rank = resolve(name).rank
    if rank == 0:
        try:
            check_writable(Path(file))
        except OSError as error:
            call.refuse(resolve(name), unwritable("the trace", Path(file), error))
    events = _rows_of(rank)
    with observe.steps(lambda record: events.extend(_events(rank, record))):
        yield
    everyone = _gathered(name, [{"host": platform.node(), "ahead_ns": _wall_clock_ahead_ns()}, *events])
    if rank == 0:
        if not any(event.get("ph") == "X" for lines in everyone for event in lines):
            fix = "enter it on every rank, within the function that run_local runs"
            warnings.warn(
                explain(f"the trace {file} holds no call: none was made in its block.", fix=fix), stacklevel=3
            )
        Path(file).write_text(json.dumps({"traceEvents": _on_one_clock(everyone), "displayTimeUnit": "ms"}))


def check_writable(file: Path) -> None:
    """Raise OSError unless the file can be written; leaves everything as it was."""
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    was_there = file.exists()
    with file.open("ab"):
        pass
    if not was_there:
        file.unlink()


def unwritable(what: str, file: Path, error: Exception) -> ArgumentError:
    reason = getattr(error, "strerror", None) or str(error)
    return ArgumentError(
        explain(f"{what} cannot be written.", got=f"{file}: {reason}", fix="a file in a folder that you may write to")
    )


def _rows_of(rank: int) -> list[dict[str, Any]]:
    names = [("process_name", 0, f"rank {rank}"), ("thread_name", 0, "computing"), ("thread_name", 1, "transfers")]
    return [{"ph": "M", "name": what, "pid": rank, "tid": row, "args": {"name": name}} for what, row, name in names]


def _events(rank: int, record: observe.StepRecord) -> Iterator[dict[str, Any]]:
    step = record.step
    told = {"phase": record.phase, "step": step.index, "shard": step.shard, "tiles": len(step.tiles)}
    if record.computed:
        name = f"shard{'s' if len(record.computed) > 1 else ''} {', '.join(map(str, record.computed))}"
        yield _event(rank, _COMPUTING, name, record.posted_ns, record.computed_ns, told)
    for flight in record.flights:
        name = f"{flight.what} {flight.hop.shard} from rank {flight.hop.peer}"
        told_of_flight = {"phase": record.phase, "step": step.index, "bytes": flight.num_bytes}
        yield _event(rank, _TRANSFERS, name, flight.begin_ns, flight.end_ns, told_of_flight)
    if not record.flights:
        yield _event(rank, _TRANSFERS, "hand out", record.begin_ns, record.handed_ns, told)
        yield _event(rank, _TRANSFERS, "wait for a core", record.handed_ns, record.posted_ns, told)
        yield _event(rank, _TRANSFERS, "wait", record.computed_ns, record.end_ns, told)


def _event(rank: int, row: int, name: str, begin_ns: int, end_ns: int, told: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": rank, "tid": row, "ts": begin_ns, "dur": end_ns - begin_ns, "args": told}


def _wall_clock_ahead_ns() -> int:
    """Of perf_counter, which starts anywhere: for hosts that share no other clock. The tightest of a few readings."""
    readings = []
    for _ in range(5):
        before, wall, after = time.perf_counter_ns(), time.time_ns(), time.perf_counter_ns()
        readings.append((after - before, wall - (before + after) // 2))
    return min(readings)[1]


def _gathered(name: str, lines: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Every rank's lines, by rank: each rank's begin with the one that has its host."""
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    mine = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    every: list[list[dict[str, Any]]] = []
    for line in reshard.unshard(mine, 0, "contiguous", name).numpy().tobytes().splitlines():
        found = json.loads(line)
        if "host" in found:
            every.append([])
        every[-1].append(found)
    return every


def _on_one_clock(everyone: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """In microseconds on rank 0's clock. Ranks of its host share that clock; others go by the wall clock."""
    first = everyone[0][0]
    events = []
    for about, *lines in everyone:
        shift_ns = 0 if about["host"] == first["host"] else about["ahead_ns"] - first["ahead_ns"]
        for line in lines:
            if "ts" in line:
                line |= {"ts": (line["ts"] + shift_ns) / 1000, "dur": line["dur"] / 1000}
            events.append(line)
    return events
