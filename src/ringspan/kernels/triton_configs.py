"""How large the Triton kernels' blocks are: a table by architecture, head_dim and width of the elements.

A table and not triton.autotune: what an autotuner finds differs between runs and between ranks, and with it the bits;
and it would try configurations on a state that each trial changes. Chosen so that loops over whole blocks do not spill
registers and every architecture's shared memory holds them: docs/decisions/0007-triton.md.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Rows and keys of a block, warps of a program, and stages of the pipeline that loads what its loop runs over."""

    rows: int
    keys: int
    warps: int
    stages: int


class Configs(NamedTuple):
    forward: Config
    dq: Config
    dkdv: Config


# By head_dim, padded: the first that is not smaller. 16-bit elements on GPUs with 227 KiB of shared memory and wgmma;
# up to 128 the fastest that were tried on an H100, of those that do not spill with any Triton from 3.6 on.
_HOPPER = {
    64: Configs(Config(128, 64, 4, 3), Config(64, 64, 4, 3), Config(32, 64, 4, 3)),
    128: Configs(Config(128, 64, 8, 3), Config(64, 64, 4, 2), Config(32, 128, 8, 3)),
    256: Configs(Config(128, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
}
# The same with as little as 99 KiB.
_AMPERE = {
    64: Configs(Config(128, 64, 8, 3), Config(64, 32, 4, 2), Config(32, 128, 8, 2)),
    128: Configs(Config(128, 32, 8, 3), Config(64, 32, 4, 2), Config(32, 64, 8, 2)),
    256: Configs(Config(64, 32, 8, 2), Config(32, 32, 8, 2), Config(32, 32, 8, 1)),
}
# float32 anywhere: without tensor cores, so operands live in registers.
_FLOAT32 = {
    64: Configs(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    128: Configs(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 32, 8, 1)),
    256: Configs(Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}
# Rows (or keys) of one group of warps of a kernel for Hopper: what its matrix instruction takes.
GROUP_ROWS = 64
# For a group's rows or keys of which such a kernel says that a hidden NaN may have come in: hardly ever run.
FLAGGED = Config(GROUP_ROWS, GROUP_ROWS, 8, 1)
# The interpreter: the fewer blocks the better.
_INTERPRETER = Config(128, 128, 4, 1)


def configs(capability: tuple[int, int] | None, dims: int, element_bytes: int) -> Configs:
    """capability: of the GPU, None in the interpreter; dims: head_dim as blocks have it."""
    if capability is None:
        return Configs(_INTERPRETER, _INTERPRETER, _INTERPRETER)
    # 9.x and 10.x have 227 KiB; 8.6, 8.9 and 12.x have 99 KiB, and 8.0 has wgmma no more than they.
    of_16_bits = _HOPPER if capability[0] in (9, 10) else _AMPERE
    table = _FLOAT32 if element_bytes == 4 else of_16_bits
    return next(chosen for largest, chosen in table.items() if dims <= largest)
