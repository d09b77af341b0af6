"""A schedule as an SVG drawing: ranks down, steps across, the hops between them as lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from ringspan.commands.picture import compact
from ringspan.commands.report import count

if TYPE_CHECKING:
    from ringspan.commands.schedule import Cell, Scene

_COLOURS = ("#2563eb", "#16a34a", "#d97706", "#9333ea", "#0891b2", "#dc2626", "#4f46e5", "#65a30d")
_INK, _FAINT, _PAPER = "#1f2937", "#9ca3af", "#fdfdfb"
_TOP, _LEFT, _MARGIN = 92, 84, 24
_TOTALS = 176  # to the right of the grid


@dataclass(frozen=True)
class _Grid:
    """Where the cells are. Many ranks make small cells, without words in them."""

    num_ranks: int
    num_steps: int

    @property
    def wordy(self) -> bool:
        return self.num_ranks <= 12

    @property
    def cell(self) -> tuple[int, int]:
        return (92, 46) if self.wordy else (16, 12)

    @property
    def gap(self) -> tuple[int, int]:
        return (56, 18) if self.wordy else (10, 3)

    def at(self, rank: int, step: int) -> tuple[int, int]:
        return _LEFT + step * (self.cell[0] + self.gap[0]), _TOP + rank * (self.cell[1] + self.gap[1])

    @property
    def right(self) -> int:
        return self.at(0, self.num_steps)[0] - self.gap[0]

    @property
    def bottom(self) -> int:
        return self.at(self.num_ranks, 0)[1] - self.gap[1]


def svg(shown: Scene) -> str:
    grid = _Grid(shown.num_ranks, shown.num_steps)
    width, height = max(grid.right + _TOTALS, 860), grid.bottom + 120
    attributes = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {height}"}
    attributes |= {"width": str(width), "height": str(height), "font-family": "Helvetica, Arial, sans-serif"}
    root = ElementTree.Element("svg", attributes)
    _rect(root, 0, 0, width, height, fill=_PAPER)
    _text(root, _MARGIN, 32, shown.title, size=18, weight="bold")
    _text(root, _MARGIN, 54, shown.travelling, size=13, fill=_FAINT)
    _axes(root, shown, grid)
    for (rank, step), cell in shown.cells.items():  # lines first: cells lie over their ends
        _hops(root, grid, rank, step, cell)
    for rank in range(shown.num_ranks):
        for step in range(shown.num_steps):
            _cell(root, grid, rank, step, shown.cells.get((rank, step)))
    _totals(root, shown, grid)
    _legend(root, shown, grid)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _axes(root: ElementTree.Element, shown: Scene, grid: _Grid) -> None:
    every = 1 if grid.wordy else 8
    for step in range(0, shown.num_steps, every):
        x, _ = grid.at(0, step)
        _text(root, x + grid.cell[0] / 2, _TOP - 12, f"step {step}", anchor="middle")
    for rank in range(0, shown.num_ranks, every):
        _, y = grid.at(rank, 0)
        _text(root, _LEFT - 12, y + grid.cell[1] / 2 + 4, f"rank {rank}", anchor="end")


def _cell(root: ElementTree.Element, grid: _Grid, rank: int, step: int, cell: Cell | None) -> None:
    (x, y), (width, height) = grid.at(rank, step), grid.cell
    if cell is None or not cell.pairs:
        _rect(root, x, y, width, height, fill=_PAPER, stroke=_FAINT, stroke_dasharray="3 3", rx=4)
        return
    colour = _COLOURS[cell.shard % len(_COLOURS)]
    _rect(root, x, y, width, height, fill=_PAPER, rx=4)
    _rect(root, x, y, width, height, fill=colour, fill_opacity=0.08 + 0.8 * cell.share, stroke=colour, rx=4)
    if grid.wordy:
        ink = "white" if cell.share > 0.8 else _INK
        _text(root, x + width / 2, y + height / 2 - 2, f"shard {cell.shard}", anchor="middle", fill=ink, weight="bold")
        _text(root, x + width / 2, y + height / 2 + 14, f"{cell.share:.0%}", size=11, anchor="middle", fill=ink)


def _hops(root: ElementTree.Element, grid: _Grid, rank: int, step: int, cell: Cell) -> None:
    """A line from the sender, in this step, to the receiver, in the next, in the colour of the shard."""
    rides = [] if cell.ride is None else [(cell.ride, "4 4")]
    for hop, dash in [*((hop, "none") for hop in cell.sends), *rides]:
        (x, y), (to_x, to_y) = grid.at(rank, step), grid.at(hop.peer, step + 1)
        shift = grid.cell[1] / 2 + (0 if dash == "none" else grid.cell[1] / 5)
        start_x, start_y, end_x, end_y = x + grid.cell[0], y + shift, to_x, to_y + shift
        middle = (start_x + end_x) / 2
        path = f"M{start_x} {start_y:g} C{middle:g} {start_y:g} {middle:g} {end_y:g} {end_x} {end_y:g}"
        colour = _COLOURS[hop.shard % len(_COLOURS)]
        style = {"d": path, "fill": "none", "stroke": colour, "stroke-width": "1.6" if grid.wordy else "0.8"}
        ElementTree.SubElement(root, "path", style | {"stroke-dasharray": dash})
        if grid.wordy:
            tip = f"M{end_x} {end_y:g} l-7 -3.5 v7 z"
            ElementTree.SubElement(root, "path", {"d": tip, "fill": colour})


def _totals(root: ElementTree.Element, shown: Scene, grid: _Grid) -> None:
    """Each rank's visible pairs, as a bar against the most."""
    most = max(max(map(shown.pairs, range(shown.num_ranks))), 1)
    left = grid.right + 28
    _text(root, left, _TOP - 12, "visible pairs a head")
    for rank in range(shown.num_ranks):
        _, y = grid.at(rank, 0)
        pairs = shown.pairs(rank)
        _rect(root, left, y + grid.cell[1] / 4, max(1, 70 * pairs / most), grid.cell[1] / 2, fill=_FAINT, rx=2)
        if grid.wordy:
            _text(root, left + 76, y + grid.cell[1] / 2 + 4, compact(pairs))


def _legend(root: ElementTree.Element, shown: Scene, grid: _Grid) -> None:
    y = grid.bottom + 40
    for place in range(4):
        share = (place + 1) / 4
        _rect(root, _MARGIN + 62 * place, y - 12, 16, 16, fill=_COLOURS[0], fill_opacity=0.08 + 0.8 * share, rx=3)
        _text(root, _MARGIN + 62 * place + 22, y + 1, f"{share:.0%}")
    _text(
        root,
        _MARGIN + 256,
        y + 1,
        "of the pairs of the rank's shard and the visiting one are visible; colour: whose shard",
    )
    riding = ", dashed: its gradient" if any(cell.ride for cell in shown.cells.values()) else ""
    _text(
        root, _MARGIN, y + 28, f"lines: a shard moves while the step computes{riding}; dashed box: nothing to compute"
    )
    told = (
        f"{count(shown.num_hops, 'hop')}, {compact(shown.mean_pairs * shown.num_ranks)} visible pairs in "
        f"{count(shown.num_tiles, 'tile')}"
    )
    _text(root, _MARGIN, y + 54, f"{told}; the busiest rank has {shown.busiest_load:.2f} of the mean", weight="bold")


def _rect(root: ElementTree.Element, x: float, y: float, width: float, height: float, **style: object) -> None:
    place = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{width:g}", "height": f"{height:g}"}
    named = {
        name.replace("_", "-"): f"{value:.3g}" if isinstance(value, float) else str(value)
        for name, value in style.items()
    }
    ElementTree.SubElement(root, "rect", place | named)


def _text(
    root: ElementTree.Element,
    x: float,
    y: float,
    words: str,
    *,
    size: int = 12,
    anchor: str = "start",
    fill: str = _INK,
    weight: str = "normal",
) -> None:
    place = {"x": f"{x:g}", "y": f"{y:g}", "font-size": str(size), "text-anchor": anchor}
    ElementTree.SubElement(root, "text", place | {"fill": fill, "font-weight": weight}).text = words
