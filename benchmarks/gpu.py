"""Everything that is to be measured on a GPU, in one command of less than 8 minutes; prints one table and keeps it.

    python benchmarks/gpu.py                        # writes benchmarks/results/<date>-gpu-<name>.txt
    python benchmarks/gpu.py --write-table          # and lets kernel="auto" decide by what was measured
    python benchmarks/gpu.py --device cpu --quick   # the same lines on tiny sizes, to know that they run

Ways of doing the same are timed in turns: every round times each of them once, beginning with another one, and a row
reports medians. TFLOP/s count visible pairs only: 4 D operations a pair and head forward, 10 D backward. A way whose
result is wrong is told and not timed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from pairs import machine
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import ringspan
from ringspan.kernels import measured, table, torch_cuda
from ringspan.kernels.contract import Kernel
from ringspan.kernels.torch_cuda import LIBRARIES, Library, TorchCuda
from ringspan.state import SoftmaxState
from ringspan.tile import Band, RowIntervals

Way = Callable[[], object]
Seconds = dict[str, float]


@dataclass(frozen=True)
class Size:
    """What is measured at which size; repeat_s: how long one timing of a way takes at least."""

    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    head_dims: tuple[int, ...] = (128, 64)
    heads: int = 16
    rounds: int = 7
    matmul: int = 8192
    ring_tokens: int = 65536
    ranks: tuple[int, ...] = (4, 8)
    documents: tuple[int, ...] = (2, 16)
    repeat_s: float = 5e-3
    target_length: int = 32768


QUICK = Size((96, 160), (64,), 2, 3, 64, 320, (2, 4), (2, 4), 0.0, 160)


@dataclass(frozen=True)
class Device:
    """Where it runs, and what there is to measure there."""

    type: str
    own: Kernel
    libraries: tuple[Library, ...]
    backends: dict[str, SDPBackend]
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.type == "cuda" else "CPU"

    @property
    def capability(self) -> measured.Capability:
        return torch.cuda.get_device_capability() if self.type == "cuda" else (0, 0)

    def synchronize(self) -> None:
        if self.type == "cuda":
            torch.cuda.synchronize()

    def library(self, library: Library) -> TorchCuda:
        """The kernel that takes this library for every full tile."""
        return TorchCuda(self.own, [library], lambda *_: library.name, self.type, lambda _: self.capability, fewest=1)


def gpu() -> Device:
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    return Device("cuda", table.TRITON, LIBRARIES, backends)


def cpu() -> Device:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)

    own = table.choose("auto", torch.bfloat16, torch.device("cpu"), 64)
    return Device("cpu", own, (Library("flash", 256, attend),), {"flash": SDPBackend.FLASH_ATTENTION})


@dataclass
class Report:
    """What was found, line by line, and the figures that the targets are held against."""

    deadline: float
    lines: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    measurements: list[measured.Measurement] = field(default_factory=list)

    def print(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)

    def out_of_time(self, what: str) -> bool:
        late = time.monotonic() > self.deadline
        if late:
            self.print(f"{what:46} not measured: out of time")
        return late


# Timing


def timed(device: Device, ways: dict[str, Way], size: Size) -> dict[str, Seconds | str]:
    """Per way its median seconds, by rounds in turns; or why it did not run."""
    repeats: dict[str, int] = {}
    found: dict[str, Seconds | str] = {}
    for name, way in ways.items():
        try:
            way()  # compiles
            repeats[name] = max(1, math.ceil(size.repeat_s / max(seconds(device, way, 1), 1e-6)))
        except Exception as error:  # whatever a library cannot do is a row of the table, not the end of it
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:70] if str(error) else ''}"
    times: dict[str, list[float]] = {name: [] for name in repeats}
    names = list(repeats)
    for turn in range(size.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(seconds(device, ways[name], repeats[name]))
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[name] = {"median": middle, "low": low, "high": high}
    return found


def seconds(device: Device, way: Way, repeats: int) -> float:
    """Of one call, by the device's own clock."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            way()
        return (time.perf_counter() - begin) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        way()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def wall_clock(device: Device, way: Way) -> Way:
    """A way that is finished when it returns: what other threads and streams do is seen by the host's clock only."""

    def finished() -> None:
        way()
        device.synchronize()

    return finished


# The cases


@dataclass(frozen=True)
class Case:
    length: int
    head_dim: int
    heads: int
    causal: bool

    def __str__(self) -> str:
        return f"s {self.length:6,} d {self.head_dim:3} {'causal' if self.causal else 'full  '}"

    @property
    def pairs(self) -> int:
        return self.length * (self.length + 1) // 2 if self.causal else self.length**2

    @property
    def visible(self) -> RowIntervals:
        return RowIntervals(self.length, self.length, Band(upper=1) if self.causal else Band())

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def tflops(self, seconds: float, operations: int) -> float:
        return operations * self.head_dim * self.heads * self.pairs / seconds / 1e12

    def tensors(self, device: Device, count: int) -> list[Tensor]:
        torch.manual_seed(0)
        shape = (1, self.heads, self.length, self.head_dim)
        return [torch.randn(shape, device=device.type, dtype=device.dtype) for _ in range(count)]


def cases(size: Size) -> Iterator[Case]:
    for head_dim in size.head_dims:
        for causal in (False, True):
            for length in size.lengths:
                yield Case(length, head_dim, size.heads, causal)


def absorbed(kernel: Kernel, case: Case, q: Tensor, k: Tensor, v: Tensor) -> SoftmaxState:
    state = SoftmaxState.empty(q)
    kernel.absorb(state, q, k, v, case.visible, case.scale)
    return state


def whole(backend: SDPBackend, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)


def flash_attn_ways(causal: bool, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """flash-attention's own packages, as far as they are installed: [B, T, H, D]."""
    ways: dict[str, Callable[[], Tensor]] = {}
    for name, module in (("flash-attn 3", "flash_attn_interface"), ("flash-attn 4", "flash_attn.cute")):
        package = module.split(".")[0]
        if find_spec(package) is None or (module != package and find_spec(module) is None):
            continue

        def way(module: str = module) -> Tensor:
            function = __import__(module, fromlist=["flash_attn_func"]).flash_attn_func
            out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        ways[name] = way
    return ways


def exact_rows(case: Case, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """float64 attention of some rows."""
    scores = q[:, :, rows].double() @ k.double().mT * case.scale
    if case.causal:
        scores.masked_fill_(torch.arange(case.length, device=q.device) > rows[:, None], -math.inf)
    return torch.softmax(scores, -1) @ v.double()


def wrong(case: Case, device: Device, q: Tensor, k: Tensor, v: Tensor, way: Callable[[], Tensor]) -> str | None:
    """What is wrong with a way's out, by 32 of its rows; None where nothing is."""
    rows = torch.linspace(0, case.length - 1, 32, device=q.device).long()
    exact = exact_rows(case, q, k, v, rows)
    try:
        error = float((way()[:, :, rows].double() - exact).norm() / exact.norm())
    except Exception as failure:
        return f"{type(failure).__name__}: {str(failure).splitlines()[0][:70] if str(failure) else ''}"
    return None if error <= 5e-3 else f"WRONG: relative error {error:.1e}"


# The sections


def matmul(device: Device, size: Size, report: Report) -> float:
    """TFLOP/s of torch's matrix multiply, the yardstick of all shares."""
    a, b = (torch.randn(size.matmul, size.matmul, device=device.type, dtype=device.dtype) for _ in range(2))
    found = timed(device, {"matmul": lambda: a @ b}, size)["matmul"]
    assert isinstance(found, dict)
    rate = 2 * size.matmul**3 / found["median"] / 1e12
    report.print(f"matrix multiply {size.matmul}^3 {device.dtype}: {rate:.1f} TFLOP/s, which shares are of")
    return rate


def forward(device: Device, size: Size, peak: float, report: Report) -> None:
    heading(report, "forward: absorb into a float32 state, beside calls that return out only")
    for case in cases(size):
        if report.out_of_time(f"forward {case}"):
            return
        q, k, v = case.tensors(device, 3)
        outs = forward_ways(device, case, q, k, v)
        failures = {name: wrong(case, device, q, k, v, out) for name, (_, out) in outs.items()}
        ways = {name: way for name, (way, _) in outs.items() if failures[name] is None}
        found = {**{n: f for n, f in failures.items() if f is not None}, **timed(device, ways, size)}
        rates = rows(report, f"forward {case}", case, found, 4, peak)
        if not case.causal:
            keep(device, case, rates, report)
        if (case.length, case.head_dim, case.causal) == (size.target_length, size.head_dims[0], False):
            report.figures |= {f"forward {name}": rate for name, rate in rates.items()}


def forward_ways(
    device: Device, case: Case, q: Tensor, k: Tensor, v: Tensor
) -> dict[str, tuple[Way, Callable[[], Tensor]]]:
    """Per way what is timed, and the out of it."""
    ways: dict[str, tuple[Way, Callable[[], Tensor]]] = {}
    kernels = {f"own ({device.own.name})": device.own}
    if not case.causal:  # of a tile with hidden pairs our own kernel takes care
        kernels |= {f"{library.name} + merge": device.library(library) for library in device.libraries}
    for name, kernel in kernels.items():
        timing = partial(kernel.absorb, SoftmaxState.empty(q), q, k, v, case.visible, case.scale)
        ways[name] = timing, lambda kernel=kernel: absorbed(kernel, case, q, k, v).finalize(q.dtype)[0]
    auto = partial(ringspan.ring_attention, q, k, v, causal=case.causal)
    ways["auto, ring of 1"] = auto, auto
    for name, backend in device.backends.items():
        call = partial(whole, backend, case.causal, q, k, v)
        ways[f"torch {name}"] = call, call
    ways |= {name: (way, way) for name, way in flash_attn_ways(case.causal, q, k, v).items()}
    return ways


def keep(device: Device, case: Case, rates: dict[str, float], report: Report) -> None:
    """What kernel="auto" is to decide by."""
    names = {f"own ({device.own.name})": measured.OWN} | {f"{x.name} + merge": x.name for x in device.libraries}
    tflops = {names[name]: round(rate, 1) for name, rate in rates.items() if name in names}
    dtype = measured.short(device.dtype)
    report.measurements.append(measured.Measurement(device.capability, dtype, case.head_dim, case.length, tflops))


def backward(device: Device, size: Size, peak: float, report: Report) -> None:
    heading(report, "backward: absorb_gradient into float32 gradients, beside the backward of calls")
    for case in cases(size):
        if report.out_of_time(f"backward {case}"):
            return
        q, k, v, do = case.tensors(device, 4)
        out, lse = absorbed(device.own, case, q, k, v).finalize(q.dtype)
        delta = (do.float() * out).sum(-1)
        grads = [torch.zeros(x.shape, device=x.device) for x in (q, k, v)]
        own = partial(device.own.absorb_gradient, *grads, q, k, v, do, lse, delta, case.visible, case.scale)
        ways: dict[str, Way] = {f"own ({device.own.name})": own}
        for name, backend in device.backends.items():
            way = torch_backward(backend, case.causal, do, q, k, v)
            if way is not None:
                ways[f"torch {name}"] = way
        rates = rows(report, f"backward {case}", case, timed(device, ways, size), 10, peak)
        if (case.length, case.head_dim, case.causal) == (size.target_length, size.head_dims[0], False):
            report.figures |= {f"backward {name}": rate for name, rate in rates.items()}


def torch_backward(backend: SDPBackend, causal: bool, do: Tensor, *inputs: Tensor) -> Way | None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    try:
        out = whole(backend, causal, *leaves)
    except RuntimeError:  # told in the forward's row
        return None
    return lambda: torch.autograd.grad(out, leaves, do, retain_graph=True)


def documents(device: Device, size: Size, report: Report) -> None:
    heading(report, "packed documents of one length, causal: absorb and absorb_gradient, by visible pairs")
    tokens = size.ring_tokens // 4
    for head_dim in size.head_dims:
        for count in size.documents:
            case = Case(tokens, head_dim, size.heads, True)
            what = f"{case} {count:3} documents"
            if report.out_of_time(what):
                return
            row = np.arange(tokens)
            visible = RowIntervals(tokens, tokens, None, row - row % (tokens // count), row + 1)
            q, k, v, do = case.tensors(device, 4)
            state = SoftmaxState.empty(q)
            device.own.absorb(state, q, k, v, visible, case.scale)
            out, lse = state.finalize(q.dtype)
            delta = (do.float() * out).sum(-1)
            grads = [torch.zeros(x.shape, device=x.device) for x in (q, k, v)]
            ways: dict[str, Way] = {
                "forward": partial(device.own.absorb, state, q, k, v, visible, case.scale),
                "backward": partial(device.own.absorb_gradient, *grads, q, k, v, do, lse, delta, visible, case.scale),
            }
            for name, times in timed(device, ways, size).items():
                if isinstance(times, str):
                    report.print(f"{what:38} {name:10} {times}")
                    continue
                operations = (4 if name == "forward" else 10) * head_dim * size.heads * visible.num_visible_pairs()
                rate = operations / times["median"] / 1e12
                report.print(f"{what:38} {name:10} {times['median'] * 1e3:9.3f} ms  {rate:7.1f} TFLOP/s")


def rings(device: Device, size: Size, report: Report) -> None:
    heading(report, "rings of threads on this one device, beside one call over the same tokens (host's clock)")
    for causal, layout in ((False, "contiguous"), (True, "zigzag"), (True, "striped")):
        case = Case(size.ring_tokens, size.head_dims[0], size.heads, causal)
        what = f"{case} {layout}"
        if report.out_of_time(what):
            return
        full = case.tensors(device, 3)
        ways: dict[str, Way] = {
            f"torch {name}": wall_clock(device, partial(whole, backend, causal, *full))
            for name, backend in device.backends.items()
        }
        ways["ring of 1"] = wall_clock(device, partial(ringspan.ring_attention, *full, causal=causal))
        for ranks in size.ranks:
            ways[f"ring of {ranks}"] = wall_clock(device, ring(full, ranks, causal, layout))
        found = timed(device, ways, size)
        calls = (t["median"] for n, t in found.items() if n.startswith("torch") and not isinstance(t, str))
        base = min(calls, default=math.nan)
        for name, times in found.items():
            if isinstance(times, str):
                report.print(f"{what:34} {name:14} {times}")
                continue
            share = base / times["median"]
            report.print(
                f"{what:34} {name:14} {times['median'] * 1e3:9.2f} ms  {case.tflops(times['median'], 4):7.1f} TFLOP/s"
                f"  {share:5.2f} of torch's best call"
            )
            if not causal:
                report.figures[name] = share


def ring(full: list[Tensor], ranks: int, causal: bool, layout: str) -> Way:
    """A call of all ranks over shards that are already where they belong."""

    def shards(group) -> list[Tensor]:
        return [ringspan.shard(x, 2, layout=layout, group=group).contiguous() for x in full]

    mine = ringspan.run_local(shards, ranks)

    def work(group) -> object:
        return ringspan.ring_attention(*mine[group.rank()], causal=causal, layout=layout, group=group)

    return lambda: ringspan.run_local(work, ranks)


def merges(device: Device, size: Size, report: Report) -> None:
    heading(report, "merge of a library's result into the float32 state")
    case = Case(size.lengths[-1] // 4, size.head_dims[0], size.heads, False)
    (out,) = case.tensors(device, 1)
    lse, state = torch.zeros(out.shape[:3], device=out.device), SoftmaxState.empty(out)
    ways = {"fused": lambda: torch_cuda.merge(state, out, lse), "plain": lambda: state.merge_(out, lse)}
    moved = 2 * state.acc.nbytes + out.nbytes + 5 * lse.nbytes
    for name, times in timed(device, ways, size).items():
        told = (
            times
            if isinstance(times, str)
            else (f"{times['median'] * 1e6:9.1f} us  {moved / times['median'] / 1e9:7.0f} GB/s of what has to move")
        )
        report.print(f"merge {case} {name:8} {told}")


def memory(device: Device, size: Size, report: Report) -> None:
    heading(report, "peak memory beyond inputs and output of a call over all tokens, whole rings")
    case = Case(size.ring_tokens, size.head_dims[0], size.heads, False)
    full = case.tensors(device, 3)
    for ranks in (1, *size.ranks):
        if device.type != "cuda":
            report.print(f"ring of {ranks}: only a GPU's allocator tells")
            continue
        call = ring(full, ranks, False, "contiguous")
        call()
        device.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        device.synchronize()
        beyond = torch.cuda.max_memory_allocated() - before - full[0].nbytes
        state = full[0].numel() * 4 / ranks
        report.print(
            f"{case} ring of {ranks}: {beyond / 2**20 / ranks:8.1f} MiB a rank (its float32 state {state / 2**20:.1f})"
        )


def heading(report: Report, text: str) -> None:
    report.print()
    report.print(text)


def rows(
    report: Report, what: str, case: Case, found: dict[str, Seconds | str], operations: int, peak: float
) -> dict[str, float]:
    """A line a way; their rates."""
    rates = {}
    for name, times in found.items():
        if isinstance(times, str):
            report.print(f"{what:34} {name:18} {times}")
            continue
        rates[name] = rate = case.tflops(times["median"], operations)
        low, high = (case.tflops(times[side], operations) for side in ("high", "low"))
        report.print(
            f"{what:34} {name:18} {times['median'] * 1e3:9.3f} ms  {rate:7.1f} TFLOP/s ({low:.1f} .. {high:.1f})  "
            f"{rate / peak:5.2f} of matmul"
        )
    return rates


def targets(device: Device, size: Size, report: Report) -> None:
    heading(report, "targets (of an H200), and what was measured here")
    figures, own = report.figures, f"own ({device.own.name})"
    best = max((rate for name, rate in figures.items() if name == "forward torch cudnn"), default=math.nan)
    at = f"d {size.head_dims[0]} full, {size.target_length:,} tokens"
    for what, target, got in (
        (f"forward through auto, TFLOP/s, {at}", 600, figures.get("forward auto, ring of 1")),
        (f"backward, TFLOP/s, {at}", 450, figures.get(f"backward {own}")),
        (f"own kernel of cuDNN, forward, {at}", 0.75, figures.get(f"forward {own}", math.nan) / best),
        (f"ring of 8 of one call, full, {size.ring_tokens:,} tokens", 0.93, figures.get("ring of 8")),
    ):
        known = got is not None and not math.isnan(got)
        told = f"{got:8.2f}  {'reached' if got >= target else 'MISSED'}" if known else "not measured"
        report.print(f"{what:60} >= {target:<6} {told}")


def main(arguments: list[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: that it runs, not how fast")
    parser.add_argument("--seconds", type=float, default=420, help="what has not begun by then is left out")
    parser.add_argument("--out", type=Path, help="file to write (default: benchmarks/results/; none with --quick)")
    parser.add_argument("--write-table", action="store_true", help=f'what "auto" decides by: {measured.table_path()}')
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU that this torch can use; --device cpu --quick runs the same lines without one")
    device, size = (gpu() if args.device == "cuda" else cpu()), QUICK if args.quick else Size()
    report = Report(time.monotonic() + args.seconds)
    out = args.out or (None if args.quick else default_file(device))
    report.print(header(device))
    try:
        run(device, size, report)
    finally:  # what was found until then is worth keeping
        if out is not None:
            out.write_text("\n".join(report.lines) + "\n")
            print(f"\nwritten to {out}")
    if args.write_table:
        measured.write(measured.table_path(), report.measurements)
        print(f"table of {len(report.measurements)} measurements written to {measured.table_path()}")
    return report


def run(device: Device, size: Size, report: Report) -> None:
    reason = device.own.declines(device.dtype, torch.device(device.type), size.head_dims[0])
    if reason is not None:
        sys.exit(f"{device.own.name}, the kernel to measure, declines: {reason}")
    with torch.no_grad():
        peak = matmul(device, size, report)
        forward(device, size, peak, report)
        merges(device, size, report)
        rings(device, size, report)
        memory(device, size, report)
        documents(device, size, report)
    backward(device, size, peak, report)
    targets(device, size, report)


def header(device: Device) -> str:
    cuda = f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if device.type == "cuda" else ""
    triton = f", triton {__import__('triton').__version__}" if find_spec("triton") else ""
    capability = ".".join(map(str, device.capability))
    return f"{machine()}\ndevice    {device.name}, capability {capability}{cuda}{triton}"


def default_file(device: Device) -> Path:
    name = "-".join(device.name.lower().replace("nvidia", "").split())
    return Path(__file__).parent / "results" / f"{time.strftime('%Y-%m-%d')}-gpu-{name}.txt"


if __name__ == "__main__":
    main()
