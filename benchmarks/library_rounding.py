"""What it does to the error of `out` when every partial result of a ring is rounded to 16 bits before it is merged.

Library attention on GPUs returns `out` in the inputs' dtype; a kernel of our own keeps float32. Computed here on a CPU,
with the roundings of a GPU's tensor cores: weights in 16 bits (both), partial results in 16 bits (library only).

    python benchmarks/library_rounding.py

The figures of docs/decisions/0008-library-kernels-on-gpus.md.
"""

from __future__ import annotations

import torch
from pairs import machine
from torch import Tensor

ROWS, TOKENS, DIM, HEADS = 128, 8192, 128, 2
RINGS = (1, 2, 8, 64)
VALUES = {
    "independent": lambda v, shard_of: v,
    "with a mean of 1": lambda v, shard_of: v + 1,
    "of opposite sign in every other shard": lambda v, shard_of: 0.1 * v + torch.where(shard_of % 2 == 0, 1.0, -1.0),
}


def ring_out(q: Tensor, k: Tensor, v: Tensor, num_ranks: int, library: bool, weights_in_16_bits: bool = True) -> Tensor:
    """out of q's dtype, of a ring whose shards of keys are absorbed one by one into a float32 state."""
    acc, lse = torch.zeros(q.shape), torch.full(q.shape[:-1], -torch.inf)
    for part_k, part_v in zip(k.chunk(num_ranks, 2), v.chunk(num_ranks, 2), strict=True):
        out, part_lse = part(q, part_k, part_v, weights_in_16_bits)
        out = out.to(q.dtype).float() if library else out
        merged = torch.logaddexp(lse, part_lse)
        acc = acc * (lse - merged).exp()[..., None] + out * (part_lse - merged).exp()[..., None]
        lse = merged
    return acc.to(q.dtype)


def part(q: Tensor, k: Tensor, v: Tensor, weights_in_16_bits: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) in float32 of one shard; the weights are rounded as they are before the second matrix multiply."""
    scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = weights.to(q.dtype).float() if weights_in_16_bits else weights
    return rounded @ v.float() / weights.sum(-1, keepdim=True), scores.logsumexp(-1)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.double() for x in (q, k, v))
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def main() -> None:
    print(machine())
    print(f"{HEADS} heads, {ROWS} queries, {TOKENS} keys, d {DIM}; relative error of out against float64")
    for dtype in (torch.bfloat16, torch.float16):
        for name, change in VALUES.items():
            torch.manual_seed(0)
            q, k, v = (torch.randn(1, HEADS, n, DIM) for n in (ROWS, TOKENS, TOKENS))
            print(f"{str(dtype).removeprefix('torch.')}, values {name}")
            print("  ring    own kernel    library + merge    one rounding at the end")
            for num_ranks in RINGS:
                shard_of = torch.arange(TOKENS) * max(num_ranks, 2) // TOKENS
                inputs = [x.to(dtype) for x in (q, k, change(v, shard_of[:, None]))]
                truth = exact(*inputs)
                own, library = (error(ring_out(*inputs, num_ranks, way), truth) for way in (False, True))
                print(f"  {num_ranks:4}    {own:10.2e}    {library:15.2e}    {error(truth.to(dtype), truth):12.2e}")


def deltas() -> None:
    """delta = do . out is all that a library's backward takes from out, which it wants in 16 bits."""
    print("relative error of delta in a library's backward, by the out that it is given; d 128")
    print("  dtype       out, rounded    do * delta / |do|^2, rounded")
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        out, do = torch.randn(4096, DIM).double(), torch.randn(4096, DIM).to(dtype).double()
        delta = (do * out).sum(-1)
        stand_in = do * (delta / do.square().sum(-1))[:, None]
        found = [float(((do * x.to(dtype).double()).sum(-1) - delta).norm() / delta.norm()) for x in (out, stand_in)]
        print(f"  {str(dtype).removeprefix('torch.'):10}  {found[0]:12.2e}    {found[1]:28.2e}")


if __name__ == "__main__":
    main()
    deltas()
