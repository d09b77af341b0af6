"""Which way is the faster one for a full tile on a GPU: as measured there, or as estimated where nothing was.

`python benchmarks/gpu.py --write-table` measures and writes the table of this user. A choice is a function of the
table, the GPU's kind and the tile's shape alone, and the table is read once: no clock decides, so that the same call
gives the same bits. Ranks may choose differently.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

Capability = tuple[int, int]
Choose = Callable[[Capability, torch.dtype, int, int, Collection[str]], str]

OWN = "triton"
TABLE_VARIABLE = "RINGSPAN_GPU_TABLE"

# By major capability, fastest first; our own where nothing is said. Hopper: measured on an H100, where our own kernel
# is as fast as cuDNN's and needs no merge (docs/gpus.md). Ampere and Ada: an estimate from published rates, until
# someone measures: torch's flash attention is FlashAttention-2, written for them. Blackwell: cuDNN should be faster,
# but may have no plan there (pytorch 192843) or be wrong without a word (193893), and no one here has seen it run.
_ESTIMATES = {8: ("flash",)}
_FEWEST_KEYS = 1024  # below, the estimate is our own kernel: it needs no merge


@dataclass(frozen=True)
class Measurement:
    """TFLOP/s of each way, by name, for full tiles of num_keys keys."""

    capability: Capability
    dtype: str
    head_dim: int
    num_keys: int
    tflops: dict[str, float]


def choose(capability: Capability, dtype: torch.dtype, head_dim: int, num_keys: int, able: Collection[str]) -> str:
    """OWN or one of `able`, the libraries that can serve such a tile."""
    return decide(_table(table_path()), capability, dtype, head_dim, num_keys, able)


def decide(
    table: tuple[Measurement, ...],
    capability: Capability,
    dtype: torch.dtype,
    head_dim: int,
    num_keys: int,
    able: Collection[str],
) -> str:
    """The same from a given table: by the longest measured tile that is no longer than this one, else the shortest."""
    wanted = {OWN, *able}
    kind = (capability, short(dtype), head_dim)
    alike = [m for m in table if (m.capability, m.dtype, m.head_dim) == kind and wanted & m.tflops.keys()]
    if alike:
        below = [m for m in alike if m.num_keys <= num_keys]
        nearest = max(below, key=_length) if below else min(alike, key=_length)
        # By rate, then by name: ties must not depend on an order of a dict.
        return max((rate, name) for name, rate in nearest.tflops.items() if name in wanted)[1]
    if num_keys < _FEWEST_KEYS:
        return OWN
    return next(name for name in (*_ESTIMATES.get(capability[0], ()), OWN) if name in wanted)


def _length(measurement: Measurement) -> int:
    return measurement.num_keys


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table_path() -> Path:
    """Where this user's table is, or would be."""
    given = os.environ.get(TABLE_VARIABLE)
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ringspan" / "gpu.json"


@cache
def _table(path: Path) -> tuple[Measurement, ...]:
    return read(path)


def read(path: Path) -> tuple[Measurement, ...]:
    """The table in a file; empty where there is no file, and, with a warning, where it is none of ours."""
    try:
        text = path.expanduser().read_text()
    except OSError:
        return ()
    try:
        return tuple(_measurement(entry) for entry in json.loads(text)["measurements"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # Not an exception: ranks are past their agreement here, and the others would wait for this one.
        warnings.warn(
            f"{path} is not a table of measured kernels ({type(error).__name__}: {error}); estimates decide. "
            "Delete it, or write it anew with benchmarks/gpu.py --write-table.",
            stacklevel=2,
        )
        return ()


def _measurement(entry: dict) -> Measurement:
    major, minor = entry["capability"]
    tflops = {str(name): float(rate) for name, rate in entry["tflops"].items()}
    return Measurement(
        (int(major), int(minor)), str(entry["dtype"]), int(entry["head_dim"]), int(entry["num_keys"]), tflops
    )


def write(path: Path, measurements: Collection[Measurement]) -> None:
    """Put measurements into the file, beside what it holds of other kinds of GPU; whole or not at all."""
    path = path.expanduser()
    new = {_kind(m): m for m in (*read(path), *measurements)}
    entries = [vars(m) for _, m in sorted(new.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps({"measurements": entries}, indent=1) + "\n")
    draft.replace(path)


def _kind(m: Measurement) -> tuple[Capability, str, int, int]:
    return m.capability, m.dtype, m.head_dim, m.num_keys
