"""What a peer is to this bench: where it lives, which tokens each of its processes holds, what one timed call is.

Nothing here imports torch or JAX: the driver, the workers of both environments and the adapters share it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class Problem:
    """Self-attention of one sequence, batch 1: the work that all contenders do."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str  # "float32" or "bfloat16"
    causal: bool
    backward: bool  # forward and backward, else forward alone

    def arrays(self) -> np.ndarray:
        """q, k, v and the gradient of out, [4, heads, tokens, head_dim] float32: the same in every process."""
        shape = (4, self.heads, self.tokens, self.head_dim)
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    def __str__(self) -> str:
        mask, passes = "causal" if self.causal else "full", "forward + backward" if self.backward else "forward"
        return f"{self.tokens} tokens x {self.heads} heads x d {self.head_dim}, {self.dtype}, {mask}, {passes}"


@dataclass(frozen=True)
class Calls:
    """What a process calls. forward() -> out; both() -> (out, dq, dk, dv); each complete when it returns.

    read: one of those results as a NumPy array [heads, tokens of this process, head_dim] float32.
    """

    forward: Callable[[], Any]
    both: Callable[[], Sequence[Any]]
    read: Callable[[Any], np.ndarray]


class Peer(ABC):
    """One way to attend over a sequence that is spread over workers."""

    name: ClassVar[str]
    environment: ClassVar[str] = "torch"  # or "jax"
    packages: ClassVar[tuple[str, ...]] = ()  # beside torch or JAX, from PyPI
    note: ClassVar[str] = ""  # how it runs, where that needs saying
    bridge: ClassVar[str] = ""  # what had to be put in the place of a missing GPU kernel, or repaired
    one_process: ClassVar[bool] = False  # its workers are threads or devices of one process, with all cores

    def ranges(self, problem: Problem, rank: int, workers: int) -> list[range]:
        """Positions of the tokens of process `rank`, in its order."""
        return contiguous(problem.tokens, rank, workers)

    @abstractmethod
    def calls(self, problem: Problem, shards: np.ndarray, rank: int, workers: int) -> Calls:
        """Ready to be timed: what is done here (conversion, compilation) is not."""

    def num_processes(self, workers: int) -> int:
        return 1 if self.one_process else workers

    def num_threads(self) -> int:
        return os.cpu_count() or 1 if self.one_process else 1


def contiguous(tokens: int, rank: int, workers: int) -> list[range]:
    return [range(tokens * rank // workers, tokens * (rank + 1) // workers)]


def zigzag(tokens: int, rank: int, workers: int) -> list[range]:
    """Of 2P chunks the one with this rank's number from the front, then the one with it from the back."""
    front, back = (contiguous(tokens, chunk, 2 * workers) for chunk in (rank, 2 * workers - 1 - rank))
    return front + back
