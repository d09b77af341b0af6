"""Who computes and sends what at each step, counted from the schedule that the executor runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ringspan.commands import drawing, picture
from ringspan.commands.asked import Asked, Exit
from ringspan.commands.report import console, count
from ringspan.errors import ArgumentError, explain
from ringspan.layout import Layout, split
from ringspan.problem import Mask, Problem
from ringspan.schedule.contract import Hop, Schedule, Travels
from ringspan.schedule.ring import backward_hop_bytes, forward_hop_bytes, ring_schedule, travelling_side
from ringspan.state import state_dtype


@dataclass(frozen=True)
class Sizes:
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Cell:
    """One rank in one step.

    pairs: visible ones that it computes; share: of all pairs of the two shards. ride: where the gradient of the
    visiting shard goes. comes_home: a gradient of its own shard arrives.
    """

    shard: int
    pairs: int
    share: float
    num_tiles: int
    sends: tuple[Hop, ...]
    ride: Hop | None
    comes_home: bool


@dataclass(frozen=True)
class Scene:
    """What the pictures show. cells: by (rank, step); a rank with nothing to do in a step has none."""

    title: str
    travelling: str
    num_ranks: int
    num_steps: int
    cells: dict[tuple[int, int], Cell]

    def pairs(self, rank: int) -> int:
        return sum(cell.pairs for (who, _), cell in self.cells.items() if who == rank)

    def num_sends(self, rank: int) -> int:
        mine = (cell for (who, _), cell in self.cells.items() if who == rank)
        return sum(len(cell.sends) + (cell.ride is not None) for cell in mine)

    def load(self, rank: int) -> float:
        """A rank's visible pairs, as a multiple of the mean."""
        return self.pairs(rank) / self.mean_pairs if self.mean_pairs else 0.0

    @property
    def mean_pairs(self) -> float:
        return sum(cell.pairs for cell in self.cells.values()) / self.num_ranks

    @property
    def num_hops(self) -> int:
        return sum(map(self.num_sends, range(self.num_ranks)))

    @property
    def num_tiles(self) -> int:
        return sum(cell.num_tiles for cell in self.cells.values())

    @property
    def busiest_load(self) -> float:
        """How many times as long the ring takes as with even work, if its busiest rank never waits."""
        return max(map(self.load, range(self.num_ranks)))


def scene(asked: Asked, num_workers: int, num_tokens: int, backward: Travels | None = None) -> Scene:
    mask, layout = asked.mask(num_tokens, num_tokens), split(asked.layout, num_tokens, num_workers, asked.cu_seqlens)
    travels: Travels = backward or "keys"
    schedules = [
        ring_schedule(mask, layout, layout, rank, travels, backward is not None) for rank in range(num_workers)
    ]
    cells = {(plan.rank, index): cell for plan in schedules for index, cell in _cells(plan, layout)}
    title = f"{asked.layout}, {_short(mask, asked)}, {num_tokens:,} tokens, {count(num_workers, 'worker')}"
    travelling = "keys and values travel" if travels == "keys" else "queries travel"
    if backward:
        title, travelling = f"{title}, backward", f"{travelling}, with their gradients"
    return Scene(title, travelling, num_workers, num_workers + (backward is not None), cells)


def _short(mask: Mask, asked: Asked) -> str:
    return "no mask" if mask.sees_all else asked.mask_in_words()


def _cells(plan: Schedule, layout: Layout):
    for step in plan.steps:
        pairs = sum(tile.intervals().num_visible_pairs() for tile in step.tiles)
        area = layout.lengths[plan.rank] * layout.lengths[step.shard]
        share = pairs / area if area else 0.0
        comes_home = any(hop.shard == plan.rank for hop in step.ride_receive)
        yield step.index, Cell(step.shard, pairs, share, len(step.tiles), step.send, step.ride_send, comes_home)


def run(asked: Asked, num_workers: int, sizes: Sizes, backward: str | None, svg: Path | None) -> Exit:
    if backward not in (None, "keys", "queries"):
        raise ArgumentError(explain("--backward is unknown.", got=repr(backward), fix="keys or queries"))
    shown = scene(asked, num_workers, sizes.tokens, backward)  # type: ignore[arg-type]
    out = console()
    out.print(picture.terminal(shown, out))
    itemsizes = sizes.dtype.itemsize, state_dtype(sizes.dtype).itemsize
    problem = Problem(
        asked.mask(sizes.tokens, sizes.tokens), 1, sizes.heads, sizes.kv_heads, sizes.head_dim, *itemsizes
    )
    out.print(*(_backward_bytes if backward else _forward_bytes)(problem, shown), sep="\n", soft_wrap=True)
    if svg is not None:
        _save(svg, drawing.svg(shown))
        out.print(f"drawn   {svg}")
    return Exit.OK


def _forward_bytes(problem: Problem, shown: Scene) -> list[str]:
    shard = forward_hop_bytes(problem, "keys") // shown.num_ranks
    hops, total = count(shown.num_hops, "hop"), _bytes(shown.num_hops * shard)
    return [f"bytes   {hops} of one K/V shard of {_bytes(shard)}, {total} in all"]


def _backward_bytes(problem: Problem, shown: Scene) -> list[str]:
    """Both forms side by side: what one hop of a shard and one of its gradient weigh together."""
    chosen = travelling_side(problem, backward=True)
    contents = {"keys": "k, v, dk, dv", "queries": "q, do, lse, delta, dq"}
    lines = []
    for travels, what in contents.items():
        weight = backward_hop_bytes(problem, travels) // shown.num_ranks  # type: ignore[arg-type]
        mark = ", what the library takes" if travels == chosen else ""
        lines.append(f"bytes   {travels} travel: {_bytes(weight)} a hop ({what}){mark}")
    return lines


def _bytes(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB" if number >= 2**20 or not number else f"{number / 2**10:,.1f} KiB"


_FOLDER = "a file in a folder that you may write to"


def _save(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(explain("--svg cannot be written.", got=f"{path}: {error.strerror}", fix=_FOLDER)) from None
