"""What the masks of docs/masks.md cost a ring in each layout: work of the busiest rank, and hops.

Counted from schedules, in integers; nothing is timed.

    python benchmarks/mask_balance.py                  # 8 ranks, 32,768 tokens
    python benchmarks/mask_balance.py --ranks 64
"""

import argparse

import numpy as np
import torch
from packed_documents import long_tailed

from ringspan import masks
from ringspan.layout import NAMES, split
from ringspan.problem import UNBOUNDED, KeyRanges, Mask
from ringspan.schedule.ring import ring_schedule


def by_name(tokens: int) -> dict[str, Mask]:
    images = [(start, start + tokens // 32) for start in range(tokens // 16, tokens, tokens // 8)]
    answers = [tokens // 8] * 6
    ranges = {
        "padding, four entries": (masks.padding(torch.tensor([1, 2, 3, 4]) * tokens // 4, tokens), UNBOUNDED),
        "a prefix of a quarter": (masks.prefix(tokens // 4, tokens), UNBOUNDED),
        "8 images in text": (masks.images_in_text(images, tokens), UNBOUNDED),
        "64 frames, 3 before": (masks.frames(tokens // 64, 3, tokens), UNBOUNDED),
        "a window of 1,024 and the first 64": (masks.window_and_first(1024, 64, tokens), 0),
        "a prompt of a quarter, 6 answers": (masks.shared_prompt(tokens - sum(answers), answers), 0),
    }
    found = {"causal": Mask(tokens, tokens, right=0)}
    for name, (parts, right) in ranges.items():
        parts = parts if isinstance(parts, list) else [parts]
        found[name] = Mask(tokens, tokens, right=right, key_ranges=tuple(KeyRanges.of(x.numpy()) for x in parts))
    for seed in range(2):
        documents = long_tailed(tokens, seed)
        longest = max(map(int, np.diff(documents)))
        name = f"{len(documents) - 1} packed documents, the longest of {longest:,}"
        found[name] = Mask(tokens, tokens, right=0, cu_seqlens=documents)
    return found


def cost(mask: Mask, layout: str, ranks: int) -> tuple[float, int]:
    """(pairs of the busiest rank / mean, hops of K and V)."""
    held = split(layout, mask.num_queries, ranks, mask.cu_seqlens)
    plans = [ring_schedule(mask, held, held, rank) for rank in range(ranks)]
    pairs = []
    for plan in plans:
        tiles = (tile.intervals() for step in plan.steps for tile in step.tiles)
        # An interval that holds for all batch entries counts for each.
        pairs.append(sum(x.num_visible_pairs() * (1 if x.arrays()[0].ndim > 1 else mask.num_entries) for x in tiles))
    return max(pairs) * ranks / sum(pairs), sum(len(step.send) for plan in plans for step in plan.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32768)
    args = parser.parse_args()
    most = args.ranks * (args.ranks - 1)
    print(f"{args.ranks} ranks, {args.tokens:,} tokens: work of the busiest rank / mean, hops (of at most {most})")
    print(f"| | {' | '.join(NAMES)} |\n|---|{'---|' * len(NAMES)}")
    for name, mask in by_name(args.tokens).items():
        cells = (
            ""
            if layout == "packed" and mask.cu_seqlens is None
            else "{:.2f}, {}".format(*cost(mask, layout, args.ranks))
            for layout in NAMES
        )
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
