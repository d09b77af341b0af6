"""Tables of ratios, as text, and the bar chart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.peers.adapters import BASELINE, FLOAT32_WEIGHTS, LOCAL, NATIVE, RING
from benchmarks.peers.measure import Outcome, ratios, spread
from benchmarks.peers.records import Record

OURS = (RING.name, FLOAT32_WEIGHTS.name, NATIVE.name, LOCAL.name)


def text(records: Sequence[Record]) -> str:
    grid = [record for record in records if record.part == "grid"]
    return "\n".join([_head(records), *(cell(record) for record in grid), "", *_versions(records), *_notes(records)])


def _head(records: Sequence[Record]) -> str:
    machines = dict.fromkeys(record.machine for record in records)
    what = (
        "Speed against torch's attention in one process with all cores, same work, interleaved in one run:\n"
        "medians of paired ratios (quartiles), above 1 is faster; rounds; median time; error against float64\n"
        "on at most 2,048 tokens: of out, and the largest of dq, dk, dv. A wrong one is timed all the same."
    )
    return "\n\n".join([*machines, what])


def cell(record: Record) -> str:
    lines = [f"\n{record.problem}, {record.processes} processes"]
    lines += (row(outcome, record.outcomes) for outcome in record.outcomes)
    return "\n".join(lines)


def row(outcome: Outcome, outcomes: Sequence[Outcome]) -> str:
    name = f"  {label(outcome):29}"
    baseline = next(x for x in outcomes if x.name == BASELINE.name)
    values = ratios(outcome, baseline)
    if not values:
        return f"{name} does not run: {outcome.error or baseline.error}"
    low, middle, high = spread(values)
    milliseconds = spread(list(outcome.seconds.values()))[1] * 1e3
    gradient = max((error for name, error in outcome.errors.items() if name != "out"), default=None)
    accuracy = f"{outcome.errors['out']:.1e}" + ("" if gradient is None else f" {gradient:.1e}")
    remarks = "".join(
        f"  {word}: {said}" for word, said in (("WRONG", outcome.wrong), ("FAILED", outcome.error)) if said
    )
    figures = f"{middle:6.2f} ({low:.2f} to {high:.2f})"
    bridged = " *" if outcome.bridge else "  "
    return f"{name}{bridged} {figures:24} {len(outcome.seconds):3} {milliseconds:9.1f} ms  {accuracy}{remarks}"


def label(outcome: Outcome) -> str:
    return outcome.name if outcome.name in (BASELINE.name, NATIVE.name) else f"{outcome.name} x {outcome.workers}"


def _versions(records: Iterable[Record]) -> list[str]:
    found = {name: version for x in _outcomes(records) for name, version in x.versions.items()}
    return ["versions  " + ", ".join(f"{name} {version}" for name, version in sorted(found.items()))]


def _notes(records: Iterable[Record]) -> list[str]:
    notes = dict.fromkeys((x.name, x.note, x.bridge) for x in _outcomes(records))
    lines = []
    for name, note, bridge in notes:
        lines.append(f"  {name:27} {note}")
        if bridge:
            lines.append(f"  {'':25} * bridged: {bridge}")
    return ["how they run (* bridged: not as it comes)", *lines]


def _outcomes(records: Iterable[Record]) -> list[Outcome]:
    return [outcome for record in records for outcome in record.outcomes]


def chart(records: Sequence[Record], file: Path) -> None:
    """A panel for each cell of the grid, a bar for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [record for record in records if record.part == "grid"]
    if not cells:
        return
    columns = min(4, len(cells))
    num_rows = -(-len(cells) // columns)
    size = (1.5 + 4.2 * columns, 0.6 + 3.4 * num_rows)
    figure, panels = plt.subplots(num_rows, columns, figsize=size, squeeze=False, sharey=True)
    found = {x.name: bool(x.bridge) for record in cells for x in record.outcomes if x.name != BASELINE.name}
    names = sorted(found, key=lambda name: OURS.index(name) if name in OURS else len(OURS))
    for panel in panels.flat[len(cells) :]:
        panel.set_visible(False)
    for panel, record in zip(panels.flat, cells, strict=False):
        _panel(panel, record, names)
    for panel in panels[:, 0]:  # the axis is shared, the size of its words is not
        panel.set_yticks(range(len(names)), [name + " *" * found[name] for name in names], fontsize=8)
    panels[0][0].invert_yaxis()
    figure.suptitle(
        "Speed against torch's attention in one process with all cores\n"
        "(hatched: wrong result; *: torch's CPU kernel in the place of a GPU's, or the like)",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def _panel(panel, record: Record, names: list[str]) -> None:
    baseline = next(x for x in record.outcomes if x.name == BASELINE.name)
    for outcome in record.outcomes:
        if outcome is baseline:
            continue
        place = names.index(outcome.name)
        values = ratios(outcome, baseline)
        if not values:
            panel.text(0.02, place, "does not run", va="center", fontsize=7, color="0.4")
            continue
        low, middle, high = spread(values)
        color = "#d1495b" if outcome.name in OURS else "#8d99ae"
        panel.barh(place, middle, color=color, hatch="///" if outcome.wrong else None, edgecolor="white")
        panel.plot([low, high], [place, place], color="black", linewidth=1)
        background = dict(facecolor="white", edgecolor="none", pad=0.5)
        panel.annotate(
            f"{middle:.2f}", (high, place), (3, 0), textcoords="offset points", va="center", fontsize=7, bbox=background
        )
    panel.margins(x=0.12)
    panel.axvline(1, color="black", linewidth=0.8)
    problem = record.problem
    mask, passes = "causal" if problem.causal else "full", "fwd + bwd" if problem.backward else "fwd"
    title = f"{problem.tokens} x {problem.heads} x {problem.head_dim}, {problem.dtype}, {mask}\n{passes}"
    panel.set_title(f"{title}, {record.processes} processes", fontsize=8)
