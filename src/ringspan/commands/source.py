"""Where q, k and v of the whole sequence come from: a safetensors file, or random numbers.

Either way a worker reads, or makes, the rows of its own shard and no others, and the check reads the whole
sequence in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ringspan.arguments import check_tensors
from ringspan.errors import ArgumentError, ArgumentTypeError, RingspanError, explain

NAMES = ("q", "k", "v")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_MADE_AT_ONCE = 1 << 20  # pairs of random numbers


class Source(Protocol):
    """q [B, H, T, D], k [B, K, S, D] and v [B, K, S, E] of the whole sequence, readable in any process."""

    @property
    def label(self) -> str:
        """What it is, for the table at the end."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def take(self, name: str, ranges: Sequence[range]) -> Tensor:
        """A contiguous copy of some positions of one tensor."""


@dataclass(frozen=True)
class FileSource:
    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return str(self.path)

    def take(self, name: str, ranges: Sequence[range]) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            tensor = file.get_slice(name)
            parts = [tensor[:, :, piece.start : piece.stop : piece.step] for piece in ranges if piece]
        if not parts:
            batch, heads, _, dim = self.shapes[name]
            return torch.empty(batch, heads, 0, dim, dtype=self.dtype)
        # A copy: what safetensors returns may be a view of the file.
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)


def open_file(path: Path) -> FileSource:
    """The source that a file is; every refusal names the file, and the tensor where it is one."""
    try:
        path.open("rb").close()  # its error says why, that of safe_open does not
        with safe_open(path, framework="pt") as file:
            held = file.keys()
            slices = {name: file.get_slice(name) for name in NAMES if name in held}
    except OSError as error:
        raise ArgumentError(explain("INPUT cannot be read.", got=f"{path}: {error.strerror or error}")) from None
    except SafetensorError as error:
        raise ArgumentError(
            explain(
                "INPUT is not a whole safetensors file.",
                got=f"{path}: {error}",
                fix="write it with safetensors.torch.save_file",
            )
        ) from None
    _refuse_missing(path, held)
    source = FileSource(path, {name: tuple(x.get_shape()) for name, x in slices.items()}, _common_dtype(path, slices))
    _refuse_shapes(source)
    return source


def _refuse_missing(path: Path, held: Sequence[str]) -> None:
    missing = [name for name in NAMES if name not in held]
    if missing:
        found = ", ".join(sorted(held)[:8]) or "no tensor at all"
        raise ArgumentError(
            explain(
                f"INPUT lacks the tensor {' and '.join(missing)}.",
                got=f"{path} holds {found}",
                fix="a file with q, k and v, each [batch, heads, tokens, head_dim]",
            )
        )


def _common_dtype(path: Path, slices: dict) -> torch.dtype:
    dtypes = {name: x.get_dtype() for name, x in slices.items()}
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise ArgumentTypeError(
                explain("INPUT has a tensor of an unsupported dtype.", got=f"{path}: {name} is {dtype}", fix=known)
            )
    if len(set(dtypes.values())) > 1:
        told = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise ArgumentTypeError(explain("q, k and v of INPUT must share one dtype.", got=f"{path}: {told}"))
    return DTYPES[dtypes["q"]]


def _refuse_shapes(source: FileSource) -> None:
    tensors = (torch.empty(source.shapes[name], dtype=source.dtype, device="meta") for name in NAMES)
    try:
        check_tensors(*tensors)
    except RingspanError as refusal:
        raise type(refusal)(f"{source.path}: {refusal}") from None
    for name, shape in source.shapes.items():
        if not all(shape):
            raise ArgumentError(explain(f"{name} of INPUT is empty.", got=f"{source.path}: shape {list(shape)}"))


@dataclass(frozen=True)
class RandomSource:
    """Normal random numbers, each of them decided by seed, tensor, position, head and dim alone.

    So every layout and every number of workers sees the same sequence, and nobody makes more than his share.
    """

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    seed: int

    @property
    def label(self) -> str:
        return f"random, seed {self.seed}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        queries = (1, self.heads, self.tokens, self.head_dim)
        keys = (1, self.kv_heads, self.tokens, self.head_dim)
        return {"q": queries, "k": keys, "v": keys}

    def take(self, name: str, ranges: Sequence[range]) -> Tensor:
        _, heads, _, dim = self.shapes[name]
        made = torch.empty(1, heads, sum(map(len, ranges)), dim, dtype=self.dtype)
        at_once = max(1, _MADE_AT_ONCE // (heads * dim))
        start = 0
        for piece in ranges:
            for first in range(0, len(piece), at_once):
                part = piece[first : first + at_once]
                positions = np.arange(part.start, part.stop, part.step, dtype=np.uint64)
                numbers = _normal(self.seed, NAMES.index(name), positions, heads, dim)
                made[0, :, start : start + len(part)] = torch.from_numpy(numbers).to(self.dtype)
                start += len(part)
        return made


def _normal(seed: int, stream: int, positions: np.ndarray, heads: int, dim: int) -> np.ndarray:
    """[heads, positions, dim] float32: a counter through splitmix64, then Box and Muller's transform."""
    pairs = (dim + 1) // 2
    head, pair = (np.arange(count, dtype=np.uint64) for count in (heads, pairs))
    counter = (positions[None, :, None] * np.uint64(heads) + head[:, None, None]) * np.uint64(pairs) + pair
    key = _mixed(np.array([seed * len(NAMES) + stream], dtype=np.uint64))
    bits = _mixed(counter + key)
    radius = np.sqrt(-2 * np.log(((bits >> np.uint64(32)) + np.uint64(1)).astype(np.float32) / np.float32(2**32)))
    angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float32) * np.float32(2 * np.pi / 2**32)
    return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)), axis=-1)[..., :dim]


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood 2014): a bijection of 64 bits that leaves no pattern behind."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
