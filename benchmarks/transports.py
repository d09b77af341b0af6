"""Two transports of one host side by side: of GPUs peer_memory against NCCL, of CPUs shared_memory against gloo.

    torchrun --nproc-per-node 8 benchmarks/transports.py [--tokens 65536] [--pairs 15]

Each rank takes the GPU of its number; without GPUs (or with --device cpu) it works with CPU tensors. The same calls in
both, forward alone and forward with backward, causal over a zigzag layout and full. Results must be the same bits. A
time is the slowest rank's, from a barrier until its GPU is done.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
from pairs import Paired, machine
from torch import Tensor

import ringspan

MASKS = {"causal": dict(causal=True, layout="zigzag"), "full": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536, help="of all ranks together")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    ours = "peer_memory" if on_gpu else "shared_memory"
    if dist.get_rank() == 0:
        print(machine(f"torchrun --nproc-per-node {dist.get_world_size()}"))
        where = torch.cuda.get_device_name() if on_gpu else "one thread each"
        heads = f"{args.heads} heads, {args.kv_heads} of keys, d {args.head_dim}"
        print(f"{dist.get_world_size()} processes, {where}; {args.tokens} tokens, {heads}, bfloat16")
        print(f"speed of {ours} against torch_dist ({'NCCL' if on_gpu else 'gloo'}): median (quartiles), their times")
    for name, mask in MASKS.items():
        for backward in (False, True):
            found = compare(args, mask, backward, (ours, "torch_dist"))
            if dist.get_rank() == 0:
                what = f"{name:6} forward{' + backward' if backward else '':11}"
                print(f"{what} {found!s:28} {found.ours_s * 1e3:9.2f} ms {found.theirs_s * 1e3:9.2f} ms", flush=True)
    dist.destroy_process_group()


def compare(args: argparse.Namespace, mask: dict, backward: bool, transports: tuple[str, str]) -> Paired:
    torch.manual_seed(dist.get_rank())
    num_tokens = args.tokens // dist.get_world_size()
    options = dict(dtype=torch.bfloat16, device=args.device, requires_grad=backward)
    heads = args.heads, args.kv_heads, args.kv_heads
    q, k, v = (torch.randn(1, n, num_tokens, args.head_dim, **options) for n in heads)
    do = torch.randn_like(q)

    def call(transport: str) -> list[Tensor]:
        out = ringspan.ring_attention(q, k, v, transport=transport, **mask)
        return [out, *torch.autograd.grad(out, (q, k, v), do)] if backward else [out]

    for mine, other in zip(*map(call, transports), strict=True):
        assert torch.equal(mine, other), "the two transports differ"
    times: list[list[float]] = [[], []]
    for pair in range(args.pairs):
        for place in (0, 1) if pair % 2 else (1, 0):
            times[place].append(slowest(lambda place=place: call(transports[place]), args.device))
    mine, other = times
    middle = args.pairs // 2
    ratios = tuple(b / a for a, b in zip(mine, other, strict=True))
    return Paired(ratios, sorted(mine)[middle], sorted(other)[middle])


def slowest(work, device: str) -> float:
    """Seconds of the rank that takes longest."""
    dist.barrier()
    begin = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    taken = torch.tensor(time.perf_counter() - begin)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


if __name__ == "__main__":
    main()
