"""Timing two ways of doing the same work side by side: interleaved in one run, as medians of paired ratios.

The machines this runs on are shared and noisy, so an absolute time means little: what drifts, drifts for both.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Paired:
    """Speed of `ours` against `theirs`, by pairs: above 1, ours is faster."""

    ratios: tuple[float, ...]
    ours_s: float
    theirs_s: float

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.ratios, n=4)
        return low, high

    def __str__(self) -> str:
        low, high = self.quartiles
        return f"{self.median:.2f} ({low:.2f} to {high:.2f})"


def interleaved(ours: Callable[[], object], theirs: Callable[[], object], num_pairs: int = 15) -> Paired:
    """num_pairs times one of each, after one of each to warm up; every other pair begins with the other."""
    ours(), theirs()
    times: list[tuple[float, float]] = []
    for pair in range(num_pairs):
        if pair % 2:
            second = _timed(theirs)
            times.append((_timed(ours), second))
        else:
            first = _timed(ours)
            times.append((first, _timed(theirs)))
    mine, other = zip(*times, strict=True)
    ratios = tuple(b / a for a, b in times)
    return Paired(ratios, statistics.median(mine), statistics.median(other))


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def machine(started_by: str = "python") -> str:
    """What a reader needs to know to read the figures, and the command that made them."""
    return "\n".join(
        (
            f"machine   {_processor()}, {os.cpu_count()} cores",
            f"versions  python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
            f"date      {time.strftime('%Y-%m-%d')}",
            f"command   {started_by} {' '.join(sys.argv)}",
        )
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
