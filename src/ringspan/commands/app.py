"""The options of the command line, and how they go to the commands."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

import ringspan
from ringspan.commands import attend as attend_job
from ringspan.commands import doctor as doctor_report
from ringspan.commands import schedule as schedule_report
from ringspan.commands import workers as worker_processes
from ringspan.commands.asked import Asked, Exit, parse_documents, parse_window
from ringspan.commands.job import Job, plan, refuse_unwritable
from ringspan.commands.report import complain
from ringspan.commands.source import DTYPES, RandomSource, Source, open_file
from ringspan.errors import ArgumentError, RingspanError, explain
from ringspan.layout import NAMES
from ringspan.transport import table as transport_table

app = typer.Typer(
    help="Exact attention over a sequence that is spread over many workers (ring attention).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
_SHORT_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
_ATTEND = """Attend over one long sequence with a ring of workers, check the result, and write it.

Try it: [bold]ringspan attend --tokens 8192 --causal --layout striped[/]

Exit status: 0 if the result is within the error bound of its dtype, against float64 attention on 64 sampled \
queries; 1 if it is not; 2 for bad input; 3 if a worker failed. Unless it is 0, nothing is written.

Several machines: torchrun --nnodes ... --nproc-per-node N -m ringspan attend ..., the same on each; INPUT must be \
readable on all of them, and the first one writes.
"""
# Workers of this command have their tensors on CPUs.
_TRANSPORTS = tuple(name for name in transport_table.TRANSPORTS if name != "peer_memory")
_MASK, _RANDOM, _RUN, _RESULT = "Which attention", "Random input, instead of INPUT", "How it runs", "Result"

Layout = Annotated[
    str,
    typer.Option(
        metavar="|".join(NAMES),
        help="Which tokens a worker holds: one run; every P-th; two runs, one from each end; or parts of --documents. "
        "All but the first share causal work out evenly.",
        rich_help_panel=_MASK,
    ),
]
Causal = Annotated[
    bool, typer.Option("--causal", help="A query sees its own position and those before.", rich_help_panel=_MASK)
]
Window = Annotated[
    str | None,
    typer.Option(
        metavar="L,R", help="A query sees L keys to its left and R to its right; -1: all.", rich_help_panel=_MASK
    ),
]
Documents = Annotated[
    str | None,
    typer.Option(
        metavar="0,...,TOTAL",
        help="Boundaries of packed documents: a query sees its own document only.",
        rich_help_panel=_MASK,
    ),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ringspan {ringspan.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(help=_ATTEND)
def attend(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="INPUT.safetensors",
            help="q, k and v of the whole sequence, each \\[batch, heads, tokens, head_dim] (that of v may differ); "
            "k and v may have fewer heads.",
        ),
    ] = None,
    causal: Causal = False,
    window: Window = None,
    documents: Documents = None,
    layout: Layout = "contiguous",
    scale: Annotated[
        float | None,
        typer.Option(metavar="X", help="Factor of the scores (default: head_dim ** -0.5).", rich_help_panel=_MASK),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="How many (default: 4; under torchrun: all).", rich_help_panel=_RUN),
    ] = None,
    transport: Annotated[
        str,
        typer.Option(
            metavar="|".join(_TRANSPORTS),
            help="local: workers are threads of this process. Else processes, which read each other's shards in "
            "shared_memory or send them by torch_dist (gloo); auto: the first of the two that works.",
            rich_help_panel=_RUN,
        ),
    ] = "auto",
    kernel: Annotated[
        str, typer.Option(metavar="NAME", help="What computes; see ringspan doctor.", rich_help_panel=_RUN)
    ] = "auto",
    timeout: Annotated[
        float,
        typer.Option(min=1.0, metavar="SECONDS", help="How long a worker waits for another.", rich_help_panel=_RUN),
    ] = 1800.0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="OUTPUT.safetensors", help="Where the result goes.", rich_help_panel=_RESULT),
    ] = None,
    lse: Annotated[
        bool,
        typer.Option("--lse", help="Also write lse, the logarithm of each row's sum.", rich_help_panel=_RESULT),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also time torch's own attention over the whole sequence, in one process.",
            rich_help_panel=_RESULT,
        ),
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write who computed and moved what, when: opens in ui.perfetto.dev.",
            rich_help_panel=_RESULT,
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How long the sequence is.", rich_help_panel=_RANDOM)
    ] = None,
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="Query heads.", rich_help_panel=_RANDOM)] = 8,
    kv_heads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Key/value heads (default: --heads).", rich_help_panel=_RANDOM),
    ] = None,
    head_dim: Annotated[
        int, typer.Option(min=1, metavar="N", help="Length of one head's vectors.", rich_help_panel=_RANDOM)
    ] = 64,
    dtype: Annotated[
        str, typer.Option(metavar="|".join(_DTYPE_NAMES), help="Of q, k and v.", rich_help_panel=_RANDOM)
    ] = "float32",
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Same seed, same numbers.", rich_help_panel=_RANDOM)
    ] = 0,
) -> None:
    def source() -> Source:
        if file is not None and tokens is None:
            return open_file(file)
        if file is not None or tokens is None:
            got = "both" if file is not None else "neither"
            raise ArgumentError(explain("give INPUT, or --tokens for random input.", got=got))
        return RandomSource(tokens, heads, _kv_heads(heads, kv_heads), head_dim, _dtype(dtype), seed)

    def planned(num_workers: int, processes: bool) -> Job:
        asked = Asked(causal, parse_window(window), parse_documents(documents), layout, scale, kernel)
        rest = {"transport": transport, "with_lse": lse, "compare": compare, "trace": trace, "timeout_s": timeout}
        return plan(source(), asked, num_workers, processes, out, **rest)

    _end(lambda: _attend(planned, workers, transport, timeout))


def _attend(planned: Callable[[int, bool], Job], workers: int | None, transport: str, timeout_s: float) -> Exit:
    if transport not in _TRANSPORTS:
        known = ", ".join(_TRANSPORTS)
        raise ArgumentError(explain("--transport is unknown.", got=repr(transport), fix=f"one of {known}"))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _refuse_against_torchrun(workers, transport, int(os.environ["WORLD_SIZE"]))
        return worker_processes.run_under_torchrun(lambda size: planned(size, True), timeout_s)
    job = planned(workers or 4, transport != "local")
    refuse_unwritable(job)
    return worker_processes.run_local_processes(job) if job.processes else attend_job.run_in_threads(job)


def _refuse_against_torchrun(workers: int | None, transport: str, size: int) -> None:
    if workers not in (None, size):
        raise ArgumentError(
            explain("--workers must be what torchrun started.", got=f"{workers}, not {size}", fix="leave it out")
        )
    if transport == "local":
        raise ArgumentError("--transport local makes threads of one process: start it without torchrun.")


def _kv_heads(heads: int, kv_heads: int | None) -> int:
    if kv_heads is None:
        return heads
    if heads % kv_heads:
        raise ArgumentError(explain("--heads must be a multiple of --kv-heads.", got=f"{heads} and {kv_heads}"))
    return kv_heads


def _dtype(name: str):
    name = _SHORT_NAMES.get(name, name)
    if name not in _DTYPE_NAMES:
        raise ArgumentError(explain("--dtype is unknown.", got=repr(name), fix=f"one of {', '.join(_DTYPE_NAMES)}"))
    return _DTYPE_NAMES[name]


@app.command()
def schedule(
    workers: Annotated[int, typer.Option(min=1, max=256, metavar="N", help="How many.")] = 4,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="How long the sequence is (default: 16384, or the documents' total)."),
    ] = None,
    causal: Causal = False,
    window: Window = None,
    documents: Documents = None,
    layout: Layout = "contiguous",
    backward: Annotated[
        str | None,
        typer.Option(
            metavar="keys|queries",
            help="Show the backward instead, in the form where keys and values travel, or queries.",
        ),
    ] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it there.")] = None,
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="Query heads, for the bytes.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Key/value heads (default: as many).")
    ] = None,
    head_dim: Annotated[int, typer.Option(min=1, metavar="N", help="Length of one head's vectors.")] = 128,
    dtype: Annotated[str, typer.Option(metavar="|".join(_DTYPE_NAMES), help="Of q, k and v.")] = "bfloat16",
) -> None:
    """Show who computes and sends what, step by step. Computes nothing."""

    def run() -> Exit:
        cu_seqlens = parse_documents(documents)
        asked = Asked(causal, parse_window(window), cu_seqlens, layout)
        num_tokens = tokens or (cu_seqlens[-1] if cu_seqlens else 16384)
        sizes = schedule_report.Sizes(num_tokens, heads, _kv_heads(heads, kv_heads), head_dim, _dtype(dtype))
        return schedule_report.run(asked, workers, sizes, backward, svg)

    _end(run)


@app.command()
def doctor() -> None:
    """Say which kernels and transports this machine can use, why not the others, and try a small ring."""
    _end(doctor_report.run)


def _end(run: Callable[[], Exit]) -> None:
    """Run a command and end with its exit status; what goes wrong becomes one message."""
    try:
        code = run()
    except RingspanError as error:
        complain(str(error))
        code = worker_processes.exit_of(error)
    except KeyboardInterrupt:
        complain("interrupted; nothing was written")
        code = Exit.INTERRUPTED
    except Exception:
        complain(f"failed, which it should not.\n{traceback.format_exc().rstrip()}")
        code = Exit.FAILED
    raise typer.Exit(code)
