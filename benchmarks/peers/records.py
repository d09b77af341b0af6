"""Cells on disk, one JSON line each, so that several runs make one table."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.pairs import machine
from benchmarks.peers.contract import Problem
from benchmarks.peers.measure import Outcome, outcome_of


@dataclass(frozen=True)
class Record:
    """part: "grid" or "targets"; processes: of the ring, in the grid."""

    part: str
    problem: Problem
    processes: int
    machine: str
    outcomes: list[Outcome]

    @property
    def key(self) -> tuple[str, Problem, int]:
        return self.part, self.problem, self.processes


def save(file: Path, records: Iterable[Record]) -> None:
    lines = [json.dumps(asdict(record)) for record in records]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(line + "\n" for line in lines))


def load(file: Path) -> list[Record]:
    if not file.exists():
        return []
    return [_record(json.loads(line)) for line in file.read_text().splitlines()]


def _record(x: dict) -> Record:
    outcomes = [outcome_of(outcome) for outcome in x["outcomes"]]
    return Record(x["part"], Problem(**x["problem"]), x["processes"], x["machine"], outcomes)


def replaced(records: list[Record], new: Record) -> list[Record]:
    return [record for record in records if record.key != new.key] + [new]


def described() -> str:
    return f"{machine()}\nflags     {processor_flags()}\ntime      {time.strftime('%H:%M')}"


def processor_flags() -> str:
    """The vector instructions that decide which kernels run."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return " ".join(flag for flag in flags if flag.startswith(("avx", "amx", "fma"))) or "none of AVX"
