"""Times the native kernel beside torch's attention and torch's matrix multiply.

Every round runs all three one after the other, so that a busy neighbour or a changing clock meets them alike; a row
reports the median of the rounds' ratios and, in brackets, their quartiles. Rates count visible pairs only.

    python benchmarks/native.py                  # the whole table
    python benchmarks/native.py --only d128      # rows whose name contains the text
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from pairs import machine

from ringspan import _native

MATMUL_SIZE = 2048


@dataclass(frozen=True)
class Case:
    name: str
    heads: int
    length: int
    dim: int
    dtype: torch.dtype = torch.float32
    causal: bool = False
    backward: bool = False
    against_float32: bool = False  # compare with our own float32 instead of torch
    rounds_weights: bool = False


def table():
    for dim in (128, 64):
        for length in (4096, 8192):
            for causal in (False, True):
                yield Case(
                    f"forward float32 d{dim} s{length} {'causal' if causal else 'full'}", 4, length, dim, causal=causal
                )
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for dim in (128, 64):
            for causal in (False, True):
                yield Case(f"forward {name} d{dim} s4096 {'causal' if causal else 'full'}", 4, 4096, dim, dtype, causal)
        yield Case(f"forward {name} d128 s4096 full, against our float32", 4, 4096, 128, dtype, against_float32=True)
    for dim in (128, 64):
        for causal in (False, True):
            yield Case(
                f"forward+backward float32 d{dim} s4096 {'causal' if causal else 'full'}",
                4,
                4096,
                dim,
                causal=causal,
                backward=True,
            )
    for causal in (False, True):
        yield Case(
            f"forward+backward bfloat16 d128 s4096 {'causal' if causal else 'full'}",
            4,
            4096,
            128,
            torch.bfloat16,
            causal,
            True,
        )
    for backward in (False, True) if _native.info()["rounds_weights"] else ():
        for causal in (False, True):
            passes, mask = "forward+backward" if backward else "forward", "causal" if causal else "full"
            name = f"{passes} bfloat16, weights rounded, d128 s4096 {mask}"
            yield Case(name, 4, 4096, 128, torch.bfloat16, causal, backward, rounds_weights=True)
    for dim in (128, 64):
        for causal in (False, True):
            yield Case(
                f"short tiles float32 d{dim} 512 x 512, 8 heads {'causal' if causal else 'full'}",
                8,
                512,
                dim,
                causal=causal,
            )


def native_forward(q, k, v, **options):
    """The tile into an empty state, and the state to (out, lse)."""
    batch, heads, length, dim = q.shape
    acc = torch.zeros(batch, heads, length, v.shape[-1])
    row_max = torch.full((batch, heads, length), -math.inf)
    row_sum = torch.zeros(batch, heads, length)
    _native.absorb(acc, row_max, row_sum, q, k, v, scale=dim**-0.5, **options)
    lse = row_max + row_sum.log()
    return acc.div_(row_sum[..., None]).to(q.dtype), lse


def native_forward_backward(q, k, v, dout, **options):
    out, lse = native_forward(q, k, v, **options)
    delta = (out.float() * dout.float()).sum(-1)
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    _native.absorb_gradient(dq, dk, dv, q, k, v, dout, lse, delta, scale=q.shape[-1] ** -0.5, **options)
    return [g.to(q.dtype) for g in (dq, dk, dv)]


def torch_forward_backward(q, k, v, dout, causal):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves, is_causal=causal)
    return torch.autograd.grad(out, leaves, dout)


clock = time.perf_counter


def seconds(function, repeats):
    start = clock()
    for _ in range(repeats):
        function()
    return (clock() - start) / repeats


def rounds(functions, num_rounds):
    """num_rounds lists of seconds, one number for each function."""
    repeats = []
    for f in functions:
        f()
        repeats.append(max(1, round(0.02 / seconds(f, 1))))
    return [[seconds(f, n) for f, n in zip(functions, repeats, strict=True)] for _ in range(num_rounds)]


def spread(ratios):
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:5.2f} ({low:.2f} .. {high:.2f})"


def measure(case, args, matmul):
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, case.heads, case.length, case.dim).to(case.dtype) for _ in range(4))
    options = {"num_threads": args.threads, "upper": 1 if case.causal else None}
    rounding = {"rounds_weights": case.rounds_weights}
    if case.backward:
        ours = partial(native_forward_backward, q, k, v, dout, **options, **rounding)
        theirs = partial(torch_forward_backward, q, k, v, dout, case.causal)
    else:
        ours = partial(native_forward, q, k, v, **options, **rounding)
        theirs = partial(F.scaled_dot_product_attention, q, k, v, is_causal=case.causal)
    if case.against_float32:
        theirs = partial(native_forward, q.float(), k.float(), v.float(), **options)
    times = rounds([ours, theirs, matmul], args.rounds)
    pairs = case.length * (case.length + 1) // 2 if case.causal else case.length**2
    operations = case.heads * pairs * case.dim * (14 if case.backward else 4)
    rate = [operations / t[0] / 1e9 for t in times]
    matmul_rate = [2 * MATMUL_SIZE**3 / t[2] / 1e9 for t in times]
    to_matmul = [r / m for r, m in zip(rate, matmul_rate, strict=True)]
    print(
        f"{case.name:62} {spread([t[1] / t[0] for t in times])}  {spread(to_matmul)}  "
        f"{statistics.median(rate):6.0f} GFLOP/s",
        flush=True,
    )


def document_bounds(lengths):
    ends = torch.tensor(lengths).cumsum(0)
    starts = ends - torch.tensor(lengths)
    n = torch.tensor(lengths)
    rows = torch.arange(int(ends[-1]))
    return torch.repeat_interleave(starts, n).int(), (rows + 1).int()


def measure_masks(args):
    """Time of sparse causal masks against causal attention of the same length, by visible pairs."""
    torch.manual_seed(0)
    length = 8192
    q, k, v = (torch.randn(1, 4, length, 128) for _ in range(3))
    lo, hi = document_bounds([300, 2500, 77, 1200, 900, 15, 2000, 1200])
    rows = torch.arange(length)
    frames = {"lo": (rows // 256 - 3).clamp(min=0).int() * 256, "hi": (rows // 256 + 1).int() * 256}
    masks = {
        "packed documents, 8 of unequal length": ({"lo": lo, "hi": hi}, int((hi - lo).sum())),
        "window 512 of 8192": ({"lower": -511, "upper": 1}, int(torch.clamp(rows + 1, max=512).sum())),
        "frames of 256 tokens, each sees 3 before": (frames, int((frames["hi"] - frames["lo"]).sum())),
    }
    causal_pairs = length * (length + 1) // 2
    for name, (mask, pairs) in masks.items():
        times = rounds(
            [
                partial(native_forward, q, k, v, num_threads=args.threads, **mask),
                partial(native_forward, q, k, v, num_threads=args.threads, upper=1),
            ],
            args.rounds,
        )
        print(
            f"{name:62} {spread([(t[0] / pairs) / (t[1] / causal_pairs) for t in times])}  of causal's time a pair",
            flush=True,
        )


def measure_values(args):
    """Keys of 192 and values of 128 numbers, causal, against the same with values padded to 192, and against torch."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 4, 4096, 192) for _ in range(2))
    v, dout = (torch.randn(1, 4, 4096, 128) for _ in range(2))
    padded_v, padded_dout = (F.pad(x, (0, 64)) for x in (v, dout))
    options = {"num_threads": args.threads, "upper": 1}
    ways = {
        "forward": [
            partial(native_forward, q, k, v, **options),
            partial(native_forward, q, k, padded_v, **options),
            partial(F.scaled_dot_product_attention, q, k, v, is_causal=True),
        ],
        "forward+backward": [
            partial(native_forward_backward, q, k, v, dout, **options),
            partial(native_forward_backward, q, k, padded_v, padded_dout, **options),
            partial(torch_forward_backward, q, k, v, dout, True),
        ],
    }
    for name, functions in ways.items():
        times = rounds(functions, args.rounds)
        padded, of_torch = (spread([t[i] / t[0] for t in times]) for i in (1, 2))
        print(
            f"{name + ' values of 128, keys of 192, causal':62} {padded} of padded, {of_torch} of torch's", flush=True
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count this thread's processor time: for one thread on a busy machine"
    )
    args = parser.parse_args()
    if args.cpu_time:
        if args.threads != 1:
            parser.error("--cpu-time needs --threads 1")
        global clock
        clock = time.thread_time
    torch.set_num_threads(args.threads)
    x, y = torch.randn(MATMUL_SIZE, MATMUL_SIZE), torch.randn(MATMUL_SIZE, MATMUL_SIZE)
    result = torch.empty(MATMUL_SIZE, MATMUL_SIZE)
    matmul = partial(torch.mm, x, y, out=result)
    print(machine())
    print(f"{args.threads} threads, {args.rounds} rounds, instruction set {_native.info()['isa']}")
    print(f"{'':62} {'torch time / ours':22}  {'of matmul rate':22}")
    for case in table():
        if args.only in case.name:
            measure(case, args, matmul)
    if args.only in "masks":
        measure_masks(args)
    if args.only in "values":
        measure_values(args)


if __name__ == "__main__":
    main()
