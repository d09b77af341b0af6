"""A schedule as a picture in the terminal: a row a rank, a column a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ringspan.commands.schedule import Cell, Scene

_SHADES = "░▒▓█"
_COLOURS = ("blue", "green", "yellow", "magenta", "cyan", "red", "bright_blue", "bright_green")


def terminal(shown: Scene, console: Console) -> Group:
    """The picture, in as much detail as the console is wide."""
    tables = (_table(shown, draw) for draw in (_full, _short, None))
    for table in tables:  # the last one is taken where none fits
        if Measurement.get(console, console.options.update(width=10_000), table).maximum <= console.width:
            break
    return Group(Text(f"{shown.title}: {shown.travelling}", style="bold"), table, *_legend(shown))


def compact(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _table(shown: Scene, draw: Callable[[Cell], Text] | None) -> Table:
    """draw: makes a cell of its own of each step; None: all steps of a rank in one, a character each."""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1) if draw is _full else (0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("rank", justify="right", no_wrap=True)
    headers = [f"step {step}" if draw is _full else str(step) for step in range(shown.num_steps)]
    for header in headers if draw else [f"steps 0 to {shown.num_steps - 1}"]:
        table.add_column(header, no_wrap=True)
    for header in ("pairs", "of mean", "sends"):
        table.add_column(header, justify="right", no_wrap=True)
    for rank in range(shown.num_ranks):
        cells = [shown.cells.get((rank, step)) for step in range(shown.num_steps)]
        drawn = [_idle() if cell is None else (draw or _tiny)(cell) for cell in cells]
        totals = (compact(shown.pairs(rank)), f"{shown.load(rank):.2f}", str(shown.num_sends(rank)))
        table.add_row(str(rank), *(drawn if draw else [Text.assemble(*drawn)]), *totals)
    return table


def _full(cell: Cell) -> Text:
    """▒▒▒ 3 →1: half of the pairs with shard 3 are visible; it goes on to rank 1."""
    text = _bar(cell, 3)
    text.append(f" {cell.shard}" if cell.pairs else "")
    for hop in cell.sends:
        text.append(f" →{hop.peer}" if hop.shard == cell.shard else f" {hop.shard}→{hop.peer}", style="dim")
    if cell.ride is not None:
        text.append(" ⇢home" if cell.ride.peer == cell.ride.shard else f" ⇢{cell.ride.peer}", style="dim")
    if cell.comes_home:
        text.append(" ⇠", style="dim")
    return text


def _short(cell: Cell) -> Text:
    return _bar(cell, 1).append(str(cell.shard) if cell.pairs else "")


def _tiny(cell: Cell) -> Text:
    return _bar(cell, 1)


def _idle() -> Text:
    return Text("·", style="dim")


def _bar(cell: Cell, length: int) -> Text:
    """The visible share of the pairs of two shards, to the nearest quarter, in the colour of the visiting shard."""
    shade = _SHADES[max(1, round(4 * cell.share)) - 1] if cell.pairs else " "
    return Text(shade * length, style=_COLOURS[cell.shard % len(_COLOURS)])


def _legend(shown: Scene) -> Iterator[Text]:
    shares = ("a quarter", "half", "three quarters", "all")
    shades = "  ".join(f"{shade} {share}" for shade, share in zip(_SHADES, shares, strict=True))
    yield Text(f"shade   visible pairs of the rank's shard and the visiting one: {shades}")
    yield Text("number  the visiting shard;  → it goes on to that rank, while the step computes;  · idle")
    if any(cell.ride for cell in shown.cells.values()):
        yield Text("        ⇢ its gradient goes to that rank, or home;  ⇠ a gradient comes home")
    yield Text(
        f"in all  {compact(shown.mean_pairs * shown.num_ranks)} visible pairs a head in {shown.num_tiles} tiles; "
        f"balance {shown.balance:.2f} (mean / most of the ranks)"
    )
