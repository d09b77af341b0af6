"""The rows that ringspan must show on 2 cores: goal and measured side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.peers.adapters import BASELINE, FLOAT32_WEIGHTS, LOCAL, NATIVE, OTHERS, RING
from benchmarks.peers.contract import Problem
from benchmarks.peers.measure import Contender, Outcome, ratios, spread
from benchmarks.peers.records import Record


@dataclass(frozen=True)
class Row:
    text: str
    goal: float | None  # None: none was set
    problem: Problem
    ours: Contender
    theirs: Contender | None  # None: the fastest right one of the peers


def _problem(dtype: str, causal: bool, backward: bool = False, tokens: int = 8192) -> Problem:
    return Problem(tokens, 4, 128, dtype, causal, backward)


F32, BF16, FULL = _problem("float32", True), _problem("bfloat16", True), _problem("float32", False)
TRAIN, SHORT = _problem("bfloat16", True, backward=True), _problem("float32", True, tokens=1024)
LONG = _problem("float32", True, tokens=16384)
TORCH, ALONE, TWO, FOUR = (BASELINE, 1), (NATIVE, 1), (RING, 2), (RING, 4)
TWO_EXACT = FLOAT32_WEIGHTS, 2

ROWS = (
    Row("float32 causal, 2 processes against torch", 1.18, F32, TWO, TORCH),
    Row("bfloat16 causal, 2 processes against torch", 1.7, BF16, TWO, TORCH),
    Row("float32 full, 2 processes against torch", 1.08, FULL, TWO, TORCH),
    Row("float32 causal, 2 processes against our kernel alone", 0.95, F32, TWO, ALONE),
    Row("bfloat16 causal, 2 processes against our kernel alone", 0.95, BF16, TWO, ALONE),
    Row("float32 full, 2 processes against our kernel alone", 0.95, FULL, TWO, ALONE),
    Row("float32 causal, 4 processes against 2", 0.9, F32, FOUR, TWO),
    Row("bfloat16 causal, 4 processes against 2", 0.9, BF16, FOUR, TWO),
    Row("float32 full, 4 processes against 2", 0.9, FULL, FOUR, TWO),
    Row("forward + backward, bfloat16 causal, 2 processes against torch", 1.6, TRAIN, TWO, TORCH),
    Row("float32 causal against the best peer, 2 processes", 1.2, F32, TWO, None),
    Row("bfloat16 causal against the best peer, 2 processes", 1.7, BF16, TWO, None),
    Row("bfloat16 causal, float32 weights, 2 processes against torch", None, BF16, TWO_EXACT, TORCH),
    Row("forward + backward, bfloat16 causal, float32 weights, against torch", None, TRAIN, TWO_EXACT, TORCH),
    Row("bfloat16 causal, float32 weights, against the best peer, 2 processes", None, BF16, TWO_EXACT, None),
    Row("1,024 tokens, float32 causal, 2 processes against torch", 0.85, SHORT, TWO, TORCH),
    Row("1,024 tokens, float32 causal, 4 processes against torch", 0.65, SHORT, FOUR, TORCH),
    Row("64 workers x 256 tokens, run_local, against our kernel alone", 0.7, LONG, (LOCAL, 64), ALONE),
)


def problems() -> list[Problem]:
    return list(dict.fromkeys(row.problem for row in ROWS))


def contenders(problem: Problem) -> list[Contender]:
    """Everything that the rows of this problem compare, and the baseline."""
    found = [TORCH]
    for row in ROWS:
        if row.problem == problem:
            found += [row.ours, *([(peer, 2) for peer in OTHERS] if row.theirs is None else [row.theirs])]
    return list(dict.fromkeys(found))


def text(records: Sequence[Record]) -> str:
    outcomes = {record.problem: record.outcomes for record in records if record.part == "targets"}
    lines = ["must show, on 2 cores (8,192 tokens, 4 heads, d 128 where nothing else is said)   goal  measured"]
    lines += (_line(row, outcomes[row.problem]) for row in ROWS if row.problem in outcomes)
    return "\n".join(lines)


def _line(row: Row, outcomes: Sequence[Outcome]) -> str:
    ours = _of(row.ours, outcomes)
    theirs = _best(outcomes) if row.theirs is None else _of(row.theirs, outcomes)
    start = f"  {row.text:78} {'' if row.goal is None else f'{row.goal:.2f}':>5}"
    if ours is None or theirs is None:
        return f"{start}  not measured"
    values = ratios(ours, theirs)
    low, middle, high = spread(values)
    name = f", {theirs.name}" if row.theirs is None else ""
    word = "" if row.goal is None else "  reached" if middle >= row.goal else "  MISSED"
    return f"{start}  {middle:.2f} ({low:.2f} to {high:.2f}), {len(values)} rounds{name}{word}"


def _of(contender: Contender, outcomes: Sequence[Outcome]) -> Outcome | None:
    wanted = contender[0].name, contender[1]
    return next((x for x in outcomes if (x.name, x.workers) == wanted and x.seconds), None)


def _best(outcomes: Sequence[Outcome]) -> Outcome | None:
    names = {peer.name for peer in OTHERS}
    right = [x for x in outcomes if x.name in names and x.seconds and not x.wrong and not x.error]
    return min(right, key=lambda x: spread(list(x.seconds.values()))[1], default=None)
