"""What the adapters of torch's world share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from benchmarks.peers.contract import Calls, Problem
from torch import Tensor


def calls(problem: Problem, shards: np.ndarray, attend: Callable[..., Tensor], *, heads_last: bool = False) -> Calls:
    """attend(q, k, v) -> out, differentiable, on [1, heads, tokens, dim], or [1, tokens, heads, dim] if heads_last."""

    def tensor(x: np.ndarray) -> Tensor:
        x = torch.from_numpy(x).to(getattr(torch, problem.dtype))[None]
        return x.transpose(1, 2).contiguous() if heads_last else x

    q, k, v, dout = map(tensor, shards)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v)

    def both() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    def read(x: Tensor) -> np.ndarray:
        return (x.transpose(1, 2) if heads_last else x)[0].float().contiguous().numpy()

    return Calls(forward, both, read)
