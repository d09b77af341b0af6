"""The SPMD entries at the sizes that their contract names, checked on sampled rows against float64 attention.

python benchmarks/spmd_sizes.py [--only TEXT]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import torch
from pairs import machine

from ringspan import ring_attention_spmd_bwd, ring_attention_spmd_fwd, run_local

NUM_ROWS = 16  # sampled rows of each worker


@dataclass(frozen=True)
class Size:
    b: int
    h: int
    seqlen: int
    d: int
    workers: int
    lnc: int = 1
    causal: bool = False
    striped: bool = False
    documents: tuple[int, ...] = ()
    rings: int = 1
    tp: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        mask = "documents" if self.documents else "striped" if self.striped else "causal" if self.causal else "full"
        rings = f", {self.rings} rings" if self.rings > 1 else ""
        shape = f"b {self.b} h {self.h} seqlen {self.seqlen} d {self.d}"
        return f"{shape} x {self.workers} workers, LNC {self.lnc}, {mask}{rings}"


MASKS = (dict(), dict(causal=True), dict(causal=True, striped=True))
SIZES = [
    *(Size(1, 2, seqlen, 128, workers, **mask) for workers in (2, 4) for seqlen in (256, 4160, 576) for mask in MASKS),
    *(Size(1, 1, 10240, 128, workers, 2, **mask) for workers in (2, 4) for mask in MASKS),
    *(Size(1, 3, 1024, d, 4, 2, **mask) for d in (16, 128) for mask in MASKS),
    Size(1, 1, 4096, 128, 4, causal=True, striped=True, documents=(1024, 7168, 64, 4096, 4032)),
    Size(1, 2, 8192, 128, 4, causal=True, striped=True, documents=(16384, 256, 12032, 4096)),
    *(Size(1, 6, 2304, 128, 2, rings=4, tp=True, **mask) for mask in MASKS),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose description contains this")
    args = parser.parse_args()
    print(machine())
    for size in SIZES:
        if args.only in str(size):
            begin = time.perf_counter()
            errors = run(size)
            told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
            print(f"{size}: errors {told}; {time.perf_counter() - begin:.1f} s", flush=True)
            assert errors["o"] <= 2.5e-3 and max(errors.values()) <= 1e-2, "beyond the bound of the dtype"


def run(size: Size) -> dict[str, float]:
    total = size.seqlen * size.workers
    scale = 1.0 if size.causal else size.d**-0.5
    rings = [[torch.randn(size.b, size.h, total, size.d) for _ in range(4)] for _ in range(size.rings)]
    for tensors in rings:
        tensors[0] *= size.d**-0.5 if size.causal else 1.0
        tensors[:] = [x.to(size.dtype) for x in tensors]
    groups = tuple(tuple(ring + size.rings * worker for worker in range(size.workers)) for ring in range(size.rings))
    low, high = bounds(size)

    def work(group):
        ring, worker = group.rank() % size.rings, group.rank() // size.rings
        q, k, v, dy = (cut(size, x, worker) for x in rings[ring])
        options = dict(num_workers=size.workers, replica_groups=groups, use_causal_mask=size.causal)
        options["softmax_scale"] = 1.0 if size.causal else None
        if low is not None:
            options.update(bound_min=low, bound_max=high)
        qk = (q, k) if size.tp else (q.mT.contiguous(), k.mT.contiguous())
        o, lse = ring_attention_spmd_fwd[size.lnc](
            *qk, v, striped_input=size.striped, training=True, tp_q=size.tp, tp_k=size.tp, **options
        )
        flipped = (x.mT.contiguous() for x in (q, k, v, o, dy))
        grads = ring_attention_spmd_bwd[size.lnc](*flipped, lse, striped_attention=size.striped, **options)
        return o, grads[0].mT

    results = run_local(work, size.workers * size.rings)
    squares = {"o": [0.0, 0.0], "dq": [0.0, 0.0]}
    for rank, (o, dq) in enumerate(results):
        ring, worker = rank % size.rings, rank // size.rings
        rows = torch.randperm(size.seqlen)[:NUM_ROWS]
        exact = definition(size, rings[ring], positions(size, worker)[rows], scale)
        for name, found, wanted in zip(squares, (o, dq), exact, strict=True):
            squares[name][0] += float((found[:, :, rows].double() - wanted).square().sum())
            squares[name][1] += float(wanted.square().sum())
    return {name: (error / norm) ** 0.5 for name, (error, norm) in squares.items()}


def cut(size: Size, x: torch.Tensor, worker: int) -> torch.Tensor:
    return x[:, :, worker :: size.workers] if size.striped else x.chunk(size.workers, 2)[worker]


def positions(size: Size, worker: int) -> torch.Tensor:
    return cut(size, torch.arange(size.seqlen * size.workers)[None, None], worker)[0, 0]


def bounds(size: Size) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Local key ranges of each local query's document: under striping the same on every worker."""
    if not size.documents:
        return None, None
    ends = np.cumsum([0, *(length // size.workers for length in size.documents)])
    which = np.repeat(np.arange(len(size.documents)), np.diff(ends))
    low, high = (torch.from_numpy(ends[which + i].astype(np.float32)) for i in (0, 1))
    return tuple(x[None, :, None].expand(size.b * size.h, -1, 1).contiguous() for x in (low, high))


def definition(size: Size, tensors: list[torch.Tensor], rows: torch.Tensor, scale: float):
    """(o, dq) of some global positions, float64."""
    q, k, v, dy = (x.double() for x in tensors)
    key = torch.arange(k.shape[2])
    seen = (key <= rows[:, None]) if size.causal else torch.ones(len(rows), len(key), dtype=torch.bool)
    if size.documents:
        document = torch.repeat_interleave(torch.arange(len(size.documents)), torch.tensor(size.documents))
        seen &= document[rows][:, None] == document
    q, dy = q[:, :, rows], dy[:, :, rows]
    weights = (q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1)
    o = weights @ v
    d_scores = weights * (dy @ v.mT - (o * dy).sum(-1, keepdim=True))
    return o, d_scores @ k * scale


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
