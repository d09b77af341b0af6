"""Whether a contender computes attention: its out and gradients against float64, on a short sequence.

Wrong is an error above the larger of the dtype's bound and twice that of torch's attention in the same dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from benchmarks.peers.contract import Peer, Problem
from torch.nn.functional import scaled_dot_product_attention

NAMES = ("out", "dq", "dk", "dv")
BOUNDS = {"float32": 2e-6, "bfloat16": 2.5e-3}
TOKENS = 2048


def short(problem: Problem) -> Problem:
    """The problem that stands for it: same heads, dtype and mask, at most 2,048 tokens."""
    return replace(problem, tokens=min(TOKENS, problem.tokens))


def whole(peer: Peer, problem: Problem, workers: int, shown: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """The results of all processes in the order of the sequence."""
    places = [np.concatenate(peer.ranges(problem, rank, workers)) for rank in range(len(shown))]
    order = np.argsort(np.concatenate(places))
    return [np.concatenate(parts, 1)[:, order] for parts in zip(*shown, strict=True)]


def errors(problem: Problem, found: Sequence[np.ndarray]) -> dict[str, float]:
    """Relative error of each result, in the Frobenius norm."""
    exact = definition(problem, torch.float64)
    return {
        name: relative(torch.from_numpy(x).double(), wanted)
        for name, x, wanted in zip(NAMES, found, exact, strict=False)
    }


def verdict(problem: Problem, found: dict[str, float]) -> str:
    """Empty, or what is wrong."""
    limits = bounds(problem)
    return ", ".join(
        f"{name} off by {error:.1e} (bound {limits[name]:.1e})"
        for name, error in found.items()
        if not error <= limits[name]  # a NaN is wrong too
    )


@cache
def bounds(problem: Problem) -> dict[str, float]:
    plain = definition(problem, getattr(torch, problem.dtype))
    exact = definition(problem, torch.float64)
    return {
        name: max(BOUNDS[problem.dtype], 2 * relative(x.double(), wanted))
        for name, x, wanted in zip(NAMES, plain, exact, strict=False)
    }


@cache
def definition(problem: Problem, dtype: torch.dtype) -> list[torch.Tensor]:
    """out, dq, dk, dv by torch's attention in that dtype, on the inputs as the problem's dtype rounds them."""
    tensors = torch.from_numpy(problem.arrays()).to(getattr(torch, problem.dtype)).to(dtype)
    q, k, v, dout = tensors[:, None].unbind()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = scaled_dot_product_attention(*leaves, is_causal=problem.causal)
    results = [out.detach()]
    if problem.backward:
        results += torch.autograd.grad(out, leaves, dout)
    return [x[0] for x in results]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
