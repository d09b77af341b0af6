"""A schedule as a picture in the terminal: a row a rank, a column a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ringspan.commands.report import count

if TYPE_CHECKING:
    from ringspan.commands.schedule import Cell, Scene

_SHADES = "░▒▓█"
_COLOURS = ("blue", "green", "yellow", "magenta", "cyan", "red", "bright_blue", "bright_green")


@dataclass(frozen=True)
class _Detail:
    """How much of a cell is shown: the length of its bar, what stands between its parts, and which parts."""

    bar: int
    space: str = ""
    shard: bool = True
    hops: bool = True
    columns: bool = True  # each step in a column of its own


_DETAILS = (_Detail(3, " "), _Detail(1), _Detail(1, hops=False), _Detail(1, shard=False, hops=False, columns=False))


def terminal(shown: Scene, console: Console) -> Group:
    """The picture, in as much detail as the console is wide."""
    for detail in _DETAILS:  # the last one is taken where none fits
        table = _table(shown, detail)
        if Measurement.get(console, console.options.update(width=10_000), table).maximum <= console.width:
            break
    return Group(Text(f"{shown.title}: {shown.travelling}", style="bold"), table, *_legend(shown, detail))


def compact(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _table(shown: Scene, detail: _Detail) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0) if detail.columns else (0, 1, 0, 0), pad_edge=False)
    table.add_column("rank", justify="right", no_wrap=True)
    headers = [f"step {step}" if detail.space else str(step) for step in range(shown.num_steps)]
    for header in headers if detail.columns else [f"steps 0 to {shown.num_steps - 1}"]:
        table.add_column(header, no_wrap=True)
    for header in ("pairs", "of mean", "sends"):
        table.add_column(header, justify="right", no_wrap=True)
    for rank in range(shown.num_ranks):
        cells = [_drawn(shown.cells.get((rank, step)), detail) for step in range(shown.num_steps)]
        totals = (compact(shown.pairs(rank)), f"{shown.load(rank):.2f}", str(shown.num_sends(rank)))
        table.add_row(str(rank), *(cells if detail.columns else [Text.assemble(*cells)]), *totals)
    return table


def _drawn(cell: Cell | None, detail: _Detail) -> Text:
    """▒▒▒ 3 →1: half of the pairs with shard 3 are visible; it goes on to rank 1."""
    if cell is None:
        return Text("·", style="dim")
    text = _bar(cell, detail.bar)
    if detail.shard and cell.pairs:
        text.append(f"{detail.space}{cell.shard}")
    for arrow in _arrows(cell) if detail.hops else ():
        text.append(detail.space + arrow, style="dim")
    return text


def _arrows(cell: Cell) -> Iterator[str]:
    for hop in cell.sends:
        yield f"→{hop.peer}" if hop.shard == cell.shard else f" {hop.shard}→{hop.peer}"
    if cell.ride is not None:
        yield "⇢home" if cell.ride.peer == cell.ride.shard else f"⇢{cell.ride.peer}"
    if cell.comes_home:
        yield "⇠"


def _bar(cell: Cell, length: int) -> Text:
    """The visible share of the pairs of two shards, to the nearest quarter, in the colour of the visiting shard."""
    shade = _SHADES[max(1, round(4 * cell.share)) - 1] if cell.pairs else " "
    return Text(shade * length, style=_COLOURS[cell.shard % len(_COLOURS)])


def _legend(shown: Scene, detail: _Detail) -> Iterator[Text]:
    shades = "  ".join(f"{shade} {share}" for shade, share in zip(_SHADES, ("1/4", "1/2", "3/4", "all"), strict=True))
    yield Text(f"shade   visible pairs of the rank's shard and the visiting one: {shades}  · idle")
    if not all(cell.pairs for cell in shown.cells.values()):
        yield Text("        blank: nothing to compute, but something arrives or goes on")
    if detail.shard:
        yield Text("number  the visiting shard" + (";  → it is sent on while the step computes" if detail.hops else ""))
    if detail.hops and any(cell.ride for cell in shown.cells.values()):
        yield Text("        ⇢ its gradient goes to that rank, or home;  ⇠ a gradient comes home")
    tiles = count(shown.num_tiles, "tile")
    yield Text(
        f"in all  {compact(shown.mean_pairs * shown.num_ranks)} visible pairs a head in {tiles}; "
        f"the busiest rank has {shown.busiest_load:.2f} of the mean"
    )
