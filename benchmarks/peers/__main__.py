"""ringspan and its peers on the same work, interleaved.

    python -m benchmarks.peers                                   # the whole grid: hours on 2 cores
    python -m benchmarks.peers --tokens 8192 --processes 2 --dtype float32 --causal --pass forward    # one cell
    python -m benchmarks.peers --targets                         # the rows that ringspan must show
    python -m benchmarks.peers --quick                           # seconds, installs nothing: for CI

Run it from the repository's root. --record NAME keeps the cells in NAME.jsonl, where later runs add theirs, and writes
NAME.txt and NAME.png of all of them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers import records, report, targets
from benchmarks.peers.adapters import BASELINE, FLOAT32_WEIGHTS, NATIVE, OTHERS, PEERS, RING, PlainRing
from benchmarks.peers.contract import Problem
from benchmarks.peers.environments import Environments
from benchmarks.peers.measure import Bench, Contender
from benchmarks.peers.records import Record

SIZES = {8192: (4, 128), 16384: (8, 64)}  # heads and head_dim by tokens
QUICK_TOKENS = 512
Cell = tuple[str, Problem, int, list[Contender]]


def main() -> None:
    sys.argv[0] = "-m benchmarks.peers"  # as the command is told in results
    args = arguments()
    cells = quick_cells() if args.quick else targets_cells(args) if args.targets else grid_cells(args)
    file = Path(f"{args.record}.jsonl") if args.record else None
    kept = records.load(file) if file else []
    if args.missing:
        have = {record.key for record in kept}
        cells = [cell for cell in cells if cell[:3] not in have]
    new = run(cells, args, kept, file)
    found = kept if file else []
    for record in new:
        found = records.replaced(found, record)
    say_all(found, file)
    if args.quick:
        sys.exit(any(x.error or x.wrong for record in new for x in record.outcomes))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", help="8192: 4 x 128, 16384: 8 x 64")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, help="one mask; both if left out")
    parser.add_argument("--pass", dest="passes", choices=["forward", "both"], help="one of the two; both if left out")
    parser.add_argument("--only", nargs="+", default=[], metavar="PEER", help=f"beside ringspan: {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="begin no cell after so long")
    parser.add_argument("--record", metavar="NAME", help="keep cells in NAME.jsonl, write NAME.txt and NAME.png")
    parser.add_argument("--missing", action="store_true", help="leave out cells that NAME.jsonl has")
    parser.add_argument("--targets", action="store_true", help="measure the rows that ringspan must show")
    parser.add_argument("--quick", action="store_true", help="torch, the plain ring and ringspan alone, tiny")
    args = parser.parse_args()
    unknown = set(args.only) - set(PEERS)
    if unknown:
        parser.error(f"--only: no peer {sorted(unknown)}; there are {', '.join(map(repr, PEERS))}")
    if args.missing and not args.record:
        parser.error("--missing needs --record")
    if args.quick:
        args.rounds = 3
    return args


def grid_cells(args: argparse.Namespace) -> list[Cell]:
    """Those of fewer processes first: groups live as long as their number stays."""
    masks = [True, False] if args.causal is None else [args.causal]
    passes = [False, True] if args.passes is None else [args.passes == "both"]
    axes = (args.processes, args.tokens or list(SIZES), args.dtype, masks, passes)
    return [
        (
            "grid",
            Problem(tokens, *SIZES.get(tokens, (4, 128)), dtype, causal, backward),
            processes,
            grid_contenders(args, dtype, processes),
        )
        for processes, tokens, dtype, causal, backward in itertools.product(*axes)
    ]


def grid_contenders(args: argparse.Namespace, dtype: str, processes: int) -> list[Contender]:
    ours = (RING, FLOAT32_WEIGHTS) if dtype == "bfloat16" else (RING,)
    others = [peer for peer in OTHERS if not args.only or peer.name in args.only]
    return [(BASELINE, 1), (NATIVE, 1), *((peer, processes) for peer in (*ours, *others))]


def targets_cells(args: argparse.Namespace) -> list[Cell]:
    def wanted(contender: Contender) -> bool:
        return contender[0] not in OTHERS or not args.only or contender[0].name in args.only

    problems = [x for x in targets.problems() if not args.tokens or x.tokens in args.tokens]
    return [("targets", x, 0, [c for c in targets.contenders(x) if wanted(c)]) for x in problems]


def quick_cells() -> list[Cell]:
    contenders = [(BASELINE, 1), (NATIVE, 1), (RING, 2), (PlainRing(), 2)]
    return [("grid", Problem(QUICK_TOKENS, 2, 64, "float32", causal, True), 2, contenders) for causal in (True, False)]


def run(cells: Sequence[Cell], args: argparse.Namespace, kept: list[Record], file: Path | None) -> list[Record]:
    """Measures cell by cell, and keeps each as soon as it is there."""
    bench = Bench(Environments(own=args.quick, say=say), say)
    begin, described, new = time.monotonic(), records.described(), []
    try:
        for part, problem, processes, contenders in cells:
            if time.monotonic() - begin > args.budget:
                say(f"left out, the time is spent: {problem}, {processes} processes")
                continue
            say(f"{problem}, {processes or 'several numbers of'} processes")
            started = time.monotonic()
            outcomes = bench.cell(problem, contenders, args.rounds)
            new.append(Record(part, problem, processes, described, outcomes))
            say(f"  {time.monotonic() - started:.0f} s")
            if file:
                kept[:] = records.replaced(kept, new[-1])
                records.save(file, kept)
    finally:
        bench.close()
    return new


def say_all(found: list[Record], file: Path | None) -> None:
    told = report.text(found)
    if any(record.part == "targets" for record in found):
        told += "\n\n" + targets.text(found)
    print(told)
    if file:
        file.with_suffix(".txt").write_text(told + "\n")
        try:
            report.chart(found, file.with_suffix(".png"))
        except ImportError as error:
            say(f"no chart: {error} (pip install matplotlib)")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
