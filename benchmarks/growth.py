"""How the time of a ring grows: with the tokens at a fixed number of workers, and with the workers at fixed tokens.

    python benchmarks/growth.py --out benchmarks/results/DATE-growth     # table and picture; a quarter of an hour
    python benchmarks/growth.py --quick                                  # seconds, table only: for CI

Causal, striped, float32, forward, over threads of this process (run_local). Beside each time stands the line that
visible pairs draw: through the longest sequence, and through one worker.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pairs import machine

import ringspan
from ringspan import run_local

LAYOUT, HEADS, HEAD_DIM = "striped", 1, 128
LONG_S = 10.0  # a call that takes longer is timed once


@dataclass(frozen=True)
class Point:
    tokens: int
    workers: int

    @property
    def pairs(self) -> int:
        return self.tokens * (self.tokens + 1) // 2


@dataclass(frozen=True)
class Curve:
    """One of its points' two numbers varies. anchor: the place of the point where the line of pairs begins."""

    title: str
    axis: str
    points: tuple[Point, ...]
    anchor: int


def main() -> None:
    args = arguments()
    lines = [machine(), f"{torch.get_num_threads()} threads, {HEADS} head, d {HEAD_DIM}, causal, {LAYOUT}, float32"]
    results = []
    for curve in curves(args):
        seconds = measure(curve.points, args.rounds)
        results.append((curve, seconds))
        lines += ["", *table(curve, seconds)]
    text = "\n".join(lines)
    print(text)
    if args.out:
        Path(f"{args.out}.txt").write_text(text + "\n")
        draw(results, Path(f"{args.out}.png"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="for the curve over tokens")
    parser.add_argument("--tokens", type=int, default=16384, help="for the curve over workers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="writes OUT.txt and OUT.png (pip install matplotlib)")
    parser.add_argument("--quick", action="store_true", help="short sequences, few rounds")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.tokens = 2, 1024
    return args


def curves(args: argparse.Namespace) -> list[Curve]:
    tokens = (256, 512, 1024) if args.quick else tuple(2048 << i for i in range(7))
    workers = (1, 2, 4) if args.quick else (1, 2, 4, 8, 16, 32, 64)
    return [
        Curve(
            f"time against tokens, {args.workers} workers",
            "tokens",
            tuple(Point(n, args.workers) for n in tokens),
            len(tokens) - 1,
        ),
        Curve(
            f"time against workers, {args.tokens} tokens",
            "workers",
            tuple(Point(args.tokens, n) for n in workers),
            0,
        ),
    ]


def measure(points: Sequence[Point], rounds: int) -> list[float]:
    """Median seconds of a call at each point. Every round goes over all points: what drifts, drifts for all."""
    calls = [call(point) for point in points]
    times = [[timed(one)] for one in calls]
    long = [first > LONG_S for (first,) in times]
    for _ in range(rounds):
        for one, found, once in zip(calls, times, long, strict=True):
            if not once:
                found.append(timed(one))
    return [statistics.median(found[1:] or found) for found in times]


def call(point: Point) -> Callable[[], object]:
    q, k, v = torch.randn(3, 1, HEADS, point.tokens, HEAD_DIM).unbind()
    shards = run_local(lambda group: [ringspan.shard(x, 2, layout=LAYOUT) for x in (q, k, v)], point.workers)

    def work(group):
        return ringspan.ring_attention(*shards[group.rank()], causal=True, layout=LAYOUT)

    return lambda: run_local(work, point.workers)


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def line_of_pairs(curve: Curve, seconds: Sequence[float]) -> list[float]:
    """Seconds at each point if time went with the visible pairs alone."""
    at = curve.anchor
    return [seconds[at] * point.pairs / curve.points[at].pairs for point in curve.points]


def table(curve: Curve, seconds: Sequence[float]) -> list[str]:
    lines = [
        curve.title,
        f"{curve.axis:>9} {'visible pairs':>15} {'time':>11} {'by pairs':>11} {'time / by pairs':>16}",
    ]
    for point, found, line in zip(curve.points, seconds, line_of_pairs(curve, seconds), strict=True):
        place = getattr(point, curve.axis)
        lines.append(
            f"{place:>9,} {HEADS * point.pairs:>15,} {found * 1e3:>8.1f} ms {line * 1e3:>8.1f} ms {found / line:>16.2f}"
        )
    return lines


def draw(results: Sequence[tuple[Curve, Sequence[float]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(11, 4.2))
    for panel, (curve, seconds) in zip(panels, results, strict=True):
        places = [getattr(point, curve.axis) for point in curve.points]
        panel.plot(places, line_of_pairs(curve, seconds), "--", color="0.5", label="visible pairs")
        panel.plot(places, seconds, "o-", color="#d1495b", label="ringspan")
        panel.set_xscale("log", base=2)
        panel.set_xticks(places, [f"{n // 1024}k" if n >= 1024 else str(n) for n in places])
        panel.set(xlabel=curve.axis, ylabel="seconds", title=curve.title)
        if curve.axis == "tokens":
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
