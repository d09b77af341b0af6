"""Few queries over many keys, as in decoding: queries that travel against keys that travel, over processes.

    python benchmarks/few_queries.py [--tokens 65536] [--processes 2] [--pairs 15]

Rank 0 has the queries, every rank a part of the keys. The same library in both, told in one of them that keys travel.
Then every rank has the queries, as in decoding: decode_attention against the same by ring_attention, where rank 0 asks
and all get the answer. And the same in one process, against torch's attention over all keys.
"""

from __future__ import annotations

import argparse
import tempfile
from unittest.mock import patch

import torch
import torch.distributed as dist
from pairs import interleaved, machine
from torch.nn.functional import scaled_dot_product_attention

import ringspan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536, help="keys of all ranks together")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()
    print(machine())
    heads = f"{args.heads} heads, {args.kv_heads} of keys, d {args.head_dim}"
    print(f"{args.processes} processes of one thread, {args.tokens} keys, {heads}, bfloat16, forward")
    print("speed of travelling queries against travelling keys; where all ranks have the queries, of decode_attention")
    print("against ring_attention and unshard; in one process, against scaled_dot_product_attention: median")
    print("(quartiles), their times")
    torch.set_num_threads(1)
    for num_queries in args.queries:
        in_one_process(num_queries, args)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_of, (args, f"{folder}/store"), args.processes)


def rank_of(rank: int, args: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.processes)
    shape = (1, args.kv_heads, args.tokens // args.processes, args.head_dim)
    k, v = torch.randn(2, *shape, dtype=torch.bfloat16).unbind()
    for transport in ("torch_dist", "shared_memory"):
        for num_queries in args.queries:
            decode(rank, num_queries, k, v, transport, args)
            q = torch.randn(1, args.heads, num_queries if rank == 0 else 0, args.head_dim, dtype=torch.bfloat16)

            def queries_travel(q=q, transport=transport):
                return ringspan.ring_attention(q, k, v, transport=transport)

            def keys_travel(call=queries_travel):
                with patch("ringspan.decide.travelling_side", lambda *_: "keys"):
                    return call()

            check(queries_travel(), keys_travel())
            found = interleaved(queries_travel, keys_travel, args.pairs)
            tell(rank, f"{transport:13} {num_queries:6} queries", found)
    dist.destroy_process_group()


@torch.no_grad()
def in_one_process(num_queries: int, args: argparse.Namespace) -> None:
    k, v = torch.randn(2, 1, args.kv_heads, args.tokens, args.head_dim, dtype=torch.bfloat16).unbind()
    q = torch.randn(1, args.heads, num_queries, args.head_dim, dtype=torch.bfloat16)

    def ours():
        return ringspan.decode_attention(q, k, v)

    def torchs():
        return scaled_dot_product_attention(q, k, v, enable_gqa=args.heads != args.kv_heads)

    check(ours(), torchs())
    tell(0, f"{'one process':13} {num_queries:6} on all ", interleaved(ours, torchs, args.pairs))


@torch.no_grad()
def decode(rank: int, num_queries: int, k, v, transport: str, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    q, ring = torch.randn(1, args.heads, num_queries, args.head_dim, dtype=torch.bfloat16), ringspan.Ring()

    def one_exchange():
        return ringspan.decode_attention(q, k, v, transport=transport)

    def asked_by_the_first():
        mine = q if rank == 0 else q[:, :, :0]
        return ring.unshard(ring.attention(mine, k, v, transport=transport), 2)

    check(one_exchange(), asked_by_the_first())
    tell(rank, f"{transport:13} {num_queries:6} on all ", interleaved(one_exchange, asked_by_the_first, args.pairs))


def check(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Each is within 2.5e-3 of the exact result."""
    assert (mine.float() - theirs.float()).norm() <= 2 * 2.5e-3 * theirs.float().norm()


def tell(rank: int, what: str, found) -> None:
    if rank == 0:
        times = f"{found.ours_s * 1e3:9.2f} ms {found.theirs_s * 1e3:9.2f} ms"
        print(f"{what}  {found!s:28} {times}", flush=True)


if __name__ == "__main__":
    main()
