"""Runs the command line: in this process, or as the command that a user types, never longer than a limit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from definition import attention, seen_by_mask
from safetensors.torch import load_file, save_file
from torch import Tensor

from ringspan import cli
from ringspan.problem import Mask

LIMIT_S = 100


@dataclass
class Ended:
    status: int
    out: str
    err: str


class CommandLine:
    """`ringspan(...)` in this process."""

    def __init__(self, monkeypatch, capsys) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: object) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["ringspan", *map(str, words)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        return Ended(int(left.value.code or 0), *self._capsys.readouterr())


def command(*words: object, program: tuple[str, ...] = ("-m", "ringspan")) -> Ended:
    """`python -m ringspan ...` in a process of its own."""
    line = [sys.executable, *program, *map(str, words)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def write_input(
    path: Path, num_queries=61, num_keys=61, heads=4, kv_heads=2, dim=8, value_dim=8, dtype=torch.float32
) -> Path:
    """A file of random q, k and v, two batch entries."""
    made = torch.Generator().manual_seed(0)
    keys = (2, kv_heads, num_keys)
    shapes = {"q": (2, heads, num_queries, dim), "k": (*keys, dim), "v": (*keys, value_dim)}
    save_file({name: torch.randn(shape, generator=made).to(dtype) for name, shape in shapes.items()}, path)
    return path


def expected(path: Path, **mask) -> tuple[Tensor, Tensor]:
    """(out, lse) of a file's q, k and v by the definition, in float64."""
    tensors = load_file(path)
    q, k, v = (tensors[name] for name in "qkv")
    return attention(q, k, v, seen_by_mask(Mask(q.shape[2], k.shape[2], **mask)), q.shape[-1] ** -0.5)


def relative(found: Tensor, truth: Tensor) -> float:
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(found), finite)
    return float((found.double() - truth)[finite].norm() / truth[finite].norm())
