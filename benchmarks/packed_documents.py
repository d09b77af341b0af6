"""Packed documents of very different lengths, as those of texts: layout "packed" against the others, over processes.

    python benchmarks/packed_documents.py [--tokens 32768] [--processes 4] [--pairs 15]

Causal. Lengths are drawn from a log-normal distribution. The same library in all; what a layout costs a ring is the
work of its busiest rank, and the hops.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from pairs import interleaved, machine

import ringspan
from ringspan.layout import LAYOUTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the documents' lengths")
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()
    cu_seqlens = long_tailed(args.tokens, args.seed)
    longest = max(np.diff(cu_seqlens))
    print(machine())
    print(f"{args.processes} processes of one thread, {args.heads} heads, {args.kv_heads} of keys, d {args.head_dim}")
    print(f"{args.tokens} tokens in {len(cu_seqlens) - 1} documents, the longest of {longest}, {args.dtype}, causal")
    print("speed of packed against the other layouts: median (quartiles), their times")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_of, (args, cu_seqlens, f"{folder}/store"), args.processes)


def long_tailed(num_tokens: int, seed: int = 0, typical: float = 7.0, spread: float = 1.3) -> tuple[int, ...]:
    """cu_seqlens of documents most of which are short (e ** typical), and a few are most of the tokens."""
    random, lengths = np.random.default_rng(seed), []
    while sum(lengths) < num_tokens:
        lengths.append(min(int(random.lognormal(typical, spread)) + 1, num_tokens - sum(lengths)))
    return tuple(np.cumsum([0, *random.permutation(lengths)]).tolist())


def rank_of(rank: int, args: argparse.Namespace, cu_seqlens: tuple[int, ...], store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.processes)
    for transport in ("torch_dist", "shared_memory"):
        for backward in (False, True):
            packed = call_of("packed", args, cu_seqlens, transport, backward)
            for layout in LAYOUTS:
                found = interleaved(packed, call_of(layout, args, cu_seqlens, transport, backward), args.pairs)
                if rank == 0:
                    what = "forward + backward" if backward else "forward"
                    times = f"{found.ours_s * 1e3:9.1f} ms {found.theirs_s * 1e3:9.1f} ms"
                    print(f"{transport:13} {what:18} {layout:10} {found!s:28} {times}", flush=True)
    dist.destroy_process_group()


def call_of(
    layout: str, args: argparse.Namespace, cu_seqlens: tuple[int, ...], transport: str, backward: bool
) -> Callable[[], None]:
    """One call of this rank on its shard, till all ranks are done."""
    place = dict(layout=layout, cu_seqlens=cu_seqlens)
    num_tokens = len(ringspan.positions(args.tokens, **place))
    q, k, v = (
        torch.randn(1, heads, num_tokens, args.head_dim, dtype=getattr(torch, args.dtype), requires_grad=backward)
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    )

    def call() -> None:
        out = ringspan.ring_attention(q, k, v, causal=True, transport=transport, **place)
        if backward:
            out.sum().backward()
        dist.barrier()

    return call


if __name__ == "__main__":
    main()
