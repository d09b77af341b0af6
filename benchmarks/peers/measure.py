"""One cell: the contenders side by side on one problem, checked, then timed in turn, round after round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.peers import check
from benchmarks.peers.adapters import BASELINE
from benchmarks.peers.contract import Peer, Problem
from benchmarks.peers.environments import Environments
from benchmarks.peers.group import Group, PeerFailed

Contender = tuple[Peer, int]  # and its number of workers
LEAST_ROUNDS = 5
SLOW = 3.0  # times the baseline: from here on rounds get fewer
SAMPLE_S = 0.05  # shorter calls are repeated to this


@dataclass
class Outcome:
    """What one contender did. seconds: of a call, by round."""

    name: str
    workers: int
    note: str = ""
    bridge: str = ""
    error: str = ""
    wrong: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def outcome_of(record: dict[str, Any]) -> Outcome:
    seconds = {int(number): value for number, value in record["seconds"].items()}
    return Outcome(**{**record, "seconds": seconds})


def ratios(mine: Outcome, other: Outcome) -> list[float]:
    """Speed of `mine` as a multiple of the other's, from the rounds that both ran."""
    return [other.seconds[number] / mine.seconds[number] for number in mine.seconds if number in other.seconds]


class Bench:
    """Groups stay alive from one cell to the next."""

    def __init__(self, environments: Environments, say: Callable[[str], None]):
        self._environments, self._say = environments, say
        self._groups: dict[tuple[str, int], Group] = {}

    def cell(self, problem: Problem, contenders: Sequence[Contender], rounds: int) -> list[Outcome]:
        """Checks, then times; the baseline must be among the contenders."""
        self._keep({(peer.name, workers) for peer, workers in contenders})
        outcomes = [Outcome(peer.name, workers, peer.note, peer.bridge) for peer, workers in contenders]
        estimates: dict[int, float] = {}
        for i, contender in enumerate(contenders):
            with _failures_in(outcomes[i]):
                estimates[i] = self._check_and_prepare(*contender, problem, outcomes[i])
            told = outcomes[i].error or f"{estimates[i]:.3f} s {outcomes[i].wrong}"
            self._say(f"  {outcomes[i].name} x {outcomes[i].workers}: {told}")
        baseline = next((seconds for i, seconds in estimates.items() if contenders[i][0] is BASELINE), None)
        if baseline is not None:
            shares = {i: share(seconds / baseline, rounds) for i, seconds in estimates.items()}
            self._rounds(contenders, outcomes, shares, rounds, max(1, round(SAMPLE_S / baseline)))
        return outcomes

    def _rounds(
        self,
        contenders: Sequence[Contender],
        outcomes: Sequence[Outcome],
        shares: dict[int, set[int]],
        rounds: int,
        repeats: int,
    ) -> None:
        """Every other round goes backwards, so that nobody always follows the same one."""
        for number in range(rounds):
            running = [i for i in shares if number in shares[i] and not outcomes[i].error]
            for i in running if number % 2 == 0 else reversed(running):
                with _failures_in(outcomes[i]):
                    outcomes[i].seconds[number] = self._group(*contenders[i]).time(repeats)

    def close(self) -> None:
        self._keep(set())

    def _check_and_prepare(self, peer: Peer, workers: int, problem: Problem, outcome: Outcome) -> float:
        why = self._environments.why_not(peer)
        if why is not None:
            raise PeerFailed(why)
        group = self._group(peer, workers)
        outcome.versions = group.versions()
        short = check.short(problem)
        outcome.errors = check.errors(short, check.whole(peer, short, workers, group.show(short)))
        outcome.wrong = check.verdict(short, outcome.errors)
        group.prepare(problem)
        return group.time()

    def _group(self, peer: Peer, workers: int) -> Group:
        key = (peer.name, workers)
        group = self._groups.get(key)
        if group is None or group.closed:
            group = self._groups[key] = Group(peer, workers, self._environments.python(peer))
        return group

    def _keep(self, keys: set[tuple[str, int]]) -> None:
        for key in [key for key in self._groups if key not in keys]:
            self._groups.pop(key).close()


def share(slowness: float, rounds: int) -> set[int]:
    """Which rounds a contender so many times slower than the baseline runs in: spread over all of them."""
    wanted = rounds if slowness <= SLOW else round(rounds * SLOW / slowness)
    wanted = min(rounds, max(LEAST_ROUNDS, wanted))
    return {number * rounds // wanted for number in range(wanted)}


@contextmanager
def _failures_in(outcome: Outcome) -> Iterator[None]:
    """A peer that fails is told of in its outcome, and the others go on."""
    try:
        yield
    except PeerFailed as error:
        outcome.error = str(error)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="exclusive" if len(values) > 3 else "inclusive"))
