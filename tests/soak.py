"""make soak: thousands of small calls in four processes, of mixed shapes, layouts and dtypes, forward and backward.

Some keys lie in shared memory already, and some calls are not checked for agreement.

Every result is checked against float64, and nothing may pile up: memory, open files, threads, segments. It is not
a pytest file: its length is an argument, and it shows how far it is.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import threading
import time
from functools import cache

import torch
from definition import attention, bound_of_out, relative_error
from processes import results, run_processes
from whole import Case, check, ring

import ringspan
from ringspan.transport import segments

NUM_RANKS = 4
NUM_CASES = 120
WARM_UP = 0.25  # share of the calls after which nothing may grow any more
MIB = 1 << 20


@cache
def cases() -> list[Case]:
    """The same on every rank. Lengths from 1 up, most of them small."""
    pick = random.Random(0)
    found = []
    for number in range(NUM_CASES):
        kv_heads = pick.choice((1, 2))
        tokens = pick.choice((1, 3, 7, 16, 33, 64, 100, 129, 200))
        options: dict = pick.choice(({}, {"causal": True}, {"causal": True, "window_size": (tokens // 3, 0)}))
        if pick.random() < 0.25:
            cuts = sorted(pick.randint(0, tokens) for _ in range(3))
            options = options | {"cu_seqlens": [0, *cuts, tokens]}
        if pick.random() < 0.25:
            options = options | {"key_ranges": torch.tensor([[pick.randint(0, i), i + 1] for i in range(tokens)])}
        if tokens % NUM_RANKS == 0 and pick.random() < 0.5:  # unchecked: all ranks must hold equally many tokens
            options = options | {"agreement": False}
        if pick.random() < 0.3:
            options = options | {"transport": pick.choice(("shared_memory", "torch_dist"))}
        masked = bool({"causal", "cu_seqlens", "key_ranges"} & set(options))
        keys = None if masked or "agreement" in options else pick.choice((None, 1, 50, 1000))
        found.append(
            Case(
                tokens,
                kv_heads * pick.choice((1, 3)),
                kv_heads,
                pick.choice((8, 16, 40)),
                batch=pick.choice((1, 2)),
                dtype=pick.choice((torch.float32, torch.float64, torch.bfloat16, torch.float16)),
                layout=pick.choice(("contiguous", "striped", "zigzag")) if keys is None else "contiguous",
                options=options,
                keys=keys,
                seed=number,
                value_dim=pick.choice((None, None, 5, 24)),
                shared=pick.random() < 0.3,
            )
        )
    return found


def held() -> dict[str, int]:
    """What this process holds that could pile up."""
    gc.collect()
    with open("/proc/self/status") as lines:
        status = dict(line.split(":", 1) for line in lines)
    with open("/proc/self/maps") as lines:
        mapped = sum("memfd:ringspan" in line for line in lines)
    return {
        "memory": int(status["RssAnon"].split()[0]) << 10,
        "shared memory": int(status["RssShmem"].split()[0]) << 10,
        "mappings": mapped,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "segments": len(segments._segments),
    }


# How much more than after the warm-up each may be: allocators and gloo let go late, leaks of thousands of calls show.
ALLOWED = {
    "memory": 24 * MIB,
    "shared memory": 4 * MIB,
    "mappings": 32,
    "open files": 8,
    "threads": 1,
    "segments": 8,
}


def soak(rank: int, num_rounds: int) -> list[dict[str, int]]:
    """Forward and backward of one case a round, the whole compared on the rank whose turn it is."""
    seen, begin = [], time.monotonic()
    for number in range(num_rounds):
        case = cases()[number % NUM_CASES]
        found = ring(None, case)
        if number % NUM_RANKS == rank:
            check(case, found)
        decode(case)
        if number % max(1, num_rounds // 40) == 0:
            seen.append(held() | {"round": number})
            if rank == 0:
                minutes = (time.monotonic() - begin) / 60
                print(f"round {number} of {num_rounds}, {minutes:.1f} min, {seen[-1]}", flush=True)
    return [*seen, held() | {"round": num_rounds}]


def decode(case: Case) -> None:
    """Of the first queries of a case, over its keys without a mask."""
    q, k, v, *_ = case.tensors()
    q, scale = q[:, :, :2], case.head_dim**-0.5
    mine = (ringspan.shard(x, 2) for x in (k, v))
    transport = case.options.get("transport", "auto")
    out = ringspan.decode_attention(q, *mine, transport=transport)
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    exact, _ = attention(q, k, v, seen, scale)
    assert relative_error(out, exact) <= bound_of_out(q, k, v, seen, scale, case.dtype == torch.bfloat16)


def grown(seen: list[dict[str, int]], num_rounds: int) -> list[str]:
    """What the end holds more of than it may, beyond the most that was held until the warm-up was over."""
    settled = [record for record in seen if record["round"] <= WARM_UP * num_rounds]
    return [
        f"{what} grew from {most} to {seen[-1][what]}"
        for what, allowed in ALLOWED.items()
        if seen[-1][what] > (most := max(record[what] for record in settled)) + allowed
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    # Each round makes 8 calls on every rank: forward, backward, five of unshard, and one of decoding.
    parser.add_argument("--rounds", type=int, default=10_000 // 2, help="default: 10,000 passes over a ring")
    num_rounds = parser.parse_args().rounds
    endings = run_processes(soak, NUM_RANKS, num_rounds, limit_s=30 + 2.0 * num_rounds)
    faults = [f"rank {rank}: {text}" for rank, seen in enumerate(results(endings)) for text in grown(seen, num_rounds)]
    if faults:
        sys.exit("\n".join(faults))
    print(f"{2 * num_rounds} passes over a ring of {NUM_RANKS}: all results right, nothing grew")


if __name__ == "__main__":
    main()
