"""What a GPU did in a ring of threads: a picture of its streams, and the trace behind it.

    python benchmarks/gpu_picture.py             # docs/gpu-ring.png, for docs/gpus.md
    python benchmarks/gpu_picture.py --draw FILE # the same from a trace that is there

A ring of four ranks on one GPU, striped and causal, forward and backward: each stream's kernels on a row of their own,
as torch.profiler saw them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ringspan

HERE = Path(__file__).parent
RANKS, TOKENS, HEADS, HEAD_DIM = 4, 16384, 16, 128
# By what a kernel's name holds: the first that fits. The rest is torch's own: zeros, sums, copies.
KINDS = (
    ("absorb_dkdv", "gradients of keys and values", "tab:orange"),
    ("absorb_dq", "gradients of queries", "tab:red"),
    ("absorb", "a tile into the state", "tab:blue"),
    ("", "torch's: zeros, delta, the last division", "tab:gray"),
)


def profile(file: Path) -> None:
    """One forward and backward of the ring, once all is compiled."""
    q, k, v, do = torch.randn(4, 1, HEADS, TOKENS, HEAD_DIM, device="cuda", dtype=torch.bfloat16).unbind()

    def work(group: Any) -> None:
        mine = [ringspan.shard(x, 2, layout="striped", group=group).contiguous() for x in (q, k, v, do)]
        leaves = [x.requires_grad_() for x in mine[:3]]
        out = ringspan.ring_attention(*leaves, causal=True, layout="striped", group=group)
        out.backward(mine[3])

    for _ in range(3):
        ringspan.run_local(work, RANKS)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        ringspan.run_local(work, RANKS)
        torch.cuda.synchronize()
    found.export_chrome_trace(str(file))


def draw(file: Path, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows: dict[int, list[tuple[float, float, str]]] = defaultdict(list)
    for event in json.loads(file.read_text())["traceEvents"]:
        if event.get("cat") == "kernel":
            rows[event["args"]["stream"]].append((event["ts"], event["dur"], event["name"]))
    # The streams of the ranks are those that run our kernels; which rank has which, the trace does not say.
    ours = sorted(stream for stream in rows if any("absorb" in name for *_, name in rows[stream]))
    begin = min(start for stream in ours for start, _, _ in rows[stream])
    figure, axes = plt.subplots(figsize=(11, 0.55 * len(ours) + 1.4), constrained_layout=True)
    for place, stream in enumerate(ours):
        for color, spans in _by_color(rows[stream], begin).items():
            axes.broken_barh(spans, (place - 0.4, 0.8), color=color, linewidth=0.3, edgecolor="white")
    axes.set_yticks(range(len(ours)), [f"stream {stream}" for stream in ours])
    axes.invert_yaxis()
    axes.set_xlabel("ms on the GPU")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for _, _, color in KINDS]
    figure.legend(handles, [meaning for _, meaning, _ in KINDS], loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(picture, dpi=110)
    print(f"{picture}: {len(ours)} streams")


def _by_color(kernels: Sequence[tuple[float, float, str]], begin: float) -> dict[str, list[tuple[float, float]]]:
    """Spans (start, length) in ms."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for start, length, name in kernels:
        color = next(color for part, _, color in KINDS if part in name)
        found[color].append(((start - begin) / 1e3, length / 1e3))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", type=Path, help="a trace of torch.profiler, instead of making one")
    parser.add_argument("--trace", type=Path, help="where the trace is kept (default: nowhere)")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "gpu-ring.png")
    args = parser.parse_args()
    if args.draw:
        draw(args.draw, args.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = args.trace or Path(folder) / "trace.json"
        profile(file)
        draw(file, args.out)


if __name__ == "__main__":
    main()
