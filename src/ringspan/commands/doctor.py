"""What this machine can use, and why not the rest; and a small ring, as proof."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from importlib.util import find_spec

import numpy as np
import torch
import torch.distributed as dist
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import ringspan
from ringspan.commands import check
from ringspan.commands.asked import Asked, Exit
from ringspan.commands.report import console
from ringspan.commands.source import RandomSource
from ringspan.kernels import hopper_kernel, measured, native
from ringspan.kernels.table import KERNELS, TRITON
from ringspan.kernels.torch_cuda import LIBRARIES, serving
from ringspan.transport import segments
from ringspan.transport.cores import num_cores

_HEAD_DIM = 64
_WIDE = 84  # columns; a terminal of fewer has no room for sentences in tables
_PACKAGES = ("torch", "numpy", "rich", "typer", "safetensors", "ml_dtypes")
_NUM_WORKERS, _NUM_TOKENS = 3, 301


def run() -> Exit:
    out = console()
    for table in (_machine(), _kernels(), _on_gpus(), _transports()):
        out.print(_fitted(table, out.width))
    error, bound = _small_ring()
    passed = error <= bound
    told = f"a ring of {_NUM_WORKERS} threads over {_NUM_TOKENS} tokens, causal and striped: "
    out.print(_mark(passed), f"{told}error {error:.1e} (bound {bound:.1e})")
    return Exit.OK if passed else Exit.BEYOND_BOUND


def _table(title: str, *headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", min_width=_WIDE)
    for header in headers:
        table.add_column(header, no_wrap=header != headers[-1])
    table.show_header = bool(headers[0])
    return table


def _fitted(table: Table, width: int) -> RenderableType:
    """The table; where that would squeeze its last column, this one's words below it, a line for each row."""
    if width >= _WIDE or not table.show_header:
        return table
    names, seconds, words = (tuple(table.columns[place].cells) for place in (0, 1, -1))
    if table.columns[1].header == "":
        names = tuple(f"{name} {second}".strip() for name, second in zip(names, seconds, strict=True))
    del table.columns[-1]
    table.min_width = None
    return Group(table, *(Text(f"  {name}: {told}") for name, told in zip(names, words, strict=True) if told), "")


def _machine() -> Table:
    table = _table(f"ringspan {ringspan.__version__}, Python {platform.python_version()}", "", "")
    table.add_row("packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    table.add_row("processor", f"{num_cores()} cores, {torch.get_num_threads()} torch threads, {platform.machine()}")
    table.add_row("native kernel", _native())
    table.add_row("memory", _memory())
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    table.add_row("GPUs", ", ".join(gpus) or "none that this torch can use")
    return table


def _native() -> str:
    isa, isas = native.info()["isa"], native.info()["isas"]
    if isa is None:
        return "not compiled"
    return f"{isa} (RINGSPAN_ISA chooses among {', '.join(isas)})"


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # which build it is too: PyPI's file for 2.15.0+cu132 is of version 2.15.0
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _memory() -> str:
    try:
        pages = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    whole, free = (count * os.sysconf("SC_PAGE_SIZE") / 2**30 for count in pages)
    return f"{whole:.1f} GiB, {free:.1f} GiB of it free"


def _kernels() -> Table:
    probes = [(dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16)]
    if torch.cuda.is_available():
        probes += [(dtype, torch.device("cuda")) for dtype in (torch.float32, torch.bfloat16)]
    names = [f"{device.type} {str(dtype).removeprefix('torch.')}" for dtype, device in probes]
    table = _table(
        "kernels, in the order of kernel='auto'; [lnc]: see docs/spmd.md",
        "name",
        *names,
        "[lnc]",
        "why not",
    )
    for kernel in KERNELS:
        reasons = [kernel.declines(dtype, device, _HEAD_DIM) for dtype, device in probes]
        declined = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
        table.add_row(kernel.name, *(_mark(not reason) for reason in reasons), _mark(kernel.sets_threads), declined)
    return table


def _on_gpus() -> Table:
    """What kernel="auto" takes for CUDA tensors: on this machine's GPUs, or without one on the usual kinds."""
    here = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    where = "here" if here else "none is here; by compute capability"
    table = _table(f"kernel='auto' on NVIDIA GPUs ({where})", "tensors", "kernel", "when")
    missing = None if find_spec("triton") else "triton is not installed, the definition serves, slowly"
    general = KERNELS[-1].name
    table.add_row("float64, or head_dim > 256", general, "always")
    table.add_row("all others", general if missing else TRITON.name, missing or "but for these forward tiles:")
    capabilities = () if missing else sorted(here or {(8, 0), (9, 0), (10, 0)})
    for capability in capabilities:
        table.add_row(*_only_tile(capability))
    if hopper_kernel.CAPABILITY in capabilities:
        reason = hopper_kernel.why_not_there()
        told = f"the general kernels, since of those for Hopper: {reason}" if reason else "kernels for Hopper, in Gluon"
        table.add_row("bfloat16, float16 on 9.0", TRITON.name, told)
    return table


def _only_tile(capability: measured.Capability) -> tuple[str, str, str]:
    """(tensors, kernel, when) for a full tile of 8,192 keys that is all its rows see."""
    rows = measured.read(measured.table_path())
    dims = (64, 128)
    ways = [measured.decide(rows, capability, torch.bfloat16, dim, 8192, serving(LIBRARIES, dim)) for dim in dims]
    known = any(m.capability == capability for m in rows)
    told = f"measured: {measured.table_path()}" if known else "an estimate, until benchmarks/gpu.py --write-table"
    name = ".".join(map(str, capability))
    return f"bfloat16 on {name}, d 64 / 128", " / ".join(ways), f"a rank's only tile, nothing in it hidden ({told})"


def _transports() -> Table:
    table = _table("transports", "name", "", "usable", "what it is")
    unshared = segments.why_unsupported()
    no_gloo = None if dist.is_available() and dist.is_gloo_available() else "no gloo"
    no_nccl = None if dist.is_available() and dist.is_nccl_available() else "this torch was built without NCCL"
    no_gpu = None if torch.cuda.is_available() else "no GPU that this torch can use"
    for name, backend, what, missing in (
        ("local", "", "threads of one process (ringspan.run_local)", None),
        ("shared_memory", "", "processes of one host, tensors on CPUs: read where they are", unshared),
        ("torch_dist", "gloo", "processes, tensors on CPUs", no_gloo),
        ("torch_dist", "nccl", "processes, tensors on NVIDIA GPUs", no_nccl or no_gpu),
        (
            "peer_memory",
            "",
            "processes of one host, tensors on NVIDIA GPUs: pulled by the copy engine",
            unshared or no_gpu,
        ),
    ):
        table.add_row(name, backend, _mark(missing is None), what if missing is None else f"{what}: {missing}")
    return table


def _mark(good: bool) -> Text:
    return Text("✓", style="bold green") if good else Text("✗", style="bold red")


def _small_ring() -> tuple[float, float]:
    """(error, bound) of every row of a small call."""
    source, asked = RandomSource(_NUM_TOKENS, 4, 2, 32, torch.float32, seed=0), Asked(causal=True, layout="striped")
    full = [source.take(name, [range(_NUM_TOKENS)]) for name in ("q", "k", "v")]

    def work(group) -> torch.Tensor:
        shards = (ringspan.shard(x, 2, layout="striped", group=group) for x in full)
        out = ringspan.ring_attention(*shards, group=group, causal=True, layout="striped")
        assert isinstance(out, torch.Tensor)
        return ringspan.unshard(out, 2, layout="striped", group=group)

    out = ringspan.run_local(work, _NUM_WORKERS)[0]
    positions, mask = np.arange(_NUM_TOKENS), asked.mask(_NUM_TOKENS, _NUM_TOKENS)
    truth = check.exact_rows(positions, source, mask, 32**-0.5, lambda share: None)
    return check.relative_error(out, truth.out), check.BOUNDS[torch.float32]
