"""What the ring itself costs: run_local with 2 workers against one torch call over the whole sequence.

python benchmarks/ring_cost.py [--kernel torch_ops] [--tokens 8192] [--pairs 15]
"""

from __future__ import annotations

import argparse

import torch
from pairs import interleaved, machine

import ringspan
from ringspan import run_local


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="torch_ops")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    print(machine())
    size = f"{args.tokens} tokens x {args.heads} x {args.head_dim}"
    print(f"{args.workers} workers, {args.threads} threads in all, {size}")
    print("float32, forward; speed against one scaled_dot_product_attention call: median (quartiles)")
    for causal, layout in ((False, "contiguous"), (True, "contiguous"), (True, "striped"), (True, "zigzag")):
        print(f"{'causal' if causal else 'full':7} {layout:11} {compare(args, causal, layout)}", flush=True)


def compare(args: argparse.Namespace, causal: bool, layout: str):
    q, k, v = torch.randn(3, 1, args.heads, args.tokens, args.head_dim).unbind(0)
    places = [run_local(lambda group, x=x: ringspan.shard(x, 2, layout=layout), args.workers) for x in (q, k, v)]

    def ring():
        def work(group):
            mine = (shards[group.rank()] for shards in places)
            return ringspan.ring_attention(*mine, causal=causal, layout=layout, kernel=args.kernel)

        return run_local(work, args.workers)

    def whole():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    found = torch.cat(ring(), 2)
    order = torch.cat(run_local(lambda group: ringspan.positions(args.tokens, layout=layout), args.workers))
    torch.testing.assert_close(found, whole()[:, :, order], rtol=1e-4, atol=1e-5)
    return interleaved(ring, whole, args.pairs)


if __name__ == "__main__":
    main()
