"""The end of the main job, in one process: the result is checked, written and told."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ringspan import __version__
from ringspan.commands import check, report
from ringspan.commands.asked import Exit
from ringspan.commands.job import Job, Spent
from ringspan.trace import unwritable


@dataclass(frozen=True)
class Plain:
    """What torch's own attention over the whole sequence took, in one process, and its error on the same rows."""

    seconds: float
    error: float
    num_threads: int


def finish(
    job: Job,
    positions: np.ndarray,
    out: Tensor,
    lse: Tensor,
    spent: list[Spent],
    bars: report.Bars,
    peak_bytes: int | None = None,
) -> Exit:
    """out and lse are those of the queries at `positions`. peak_bytes: of all workers, where they are threads."""
    sample = check.sampled_positions(job.source.shapes["q"][2])
    places = torch.from_numpy(np.searchsorted(positions, sample))
    rows = check.Rows(sample, out[:, :, places], lse[:, :, places])
    truth = check.exact_rows(sample, job.source, job.mask, job.scale, bars.checking)
    verdict = check.judge(rows, truth, job.source, job.mask, job.scale)
    plain = _plain(job, truth) if job.compare else None
    if verdict.passed:
        _write(job, out, lse)
    bars.close()
    report.show(job, spent, verdict, plain, peak_bytes)
    return Exit.OK if verdict.passed else Exit.BEYOND_BOUND


def _write(job: Job, out: Tensor, lse: Tensor) -> None:
    """All of the file or nothing: under another name first, then renamed."""
    if job.out is None or job.part is None:
        return
    tensors = {"out": out, "lse": lse} if job.with_lse else {"out": out}
    told = {
        "made_by": f"ringspan {__version__}",
        "input": job.source.label,
        "mask": job.asked.mask_in_words(),
        "softmax_scale": repr(job.scale),
    }
    try:
        save_file(tensors, job.part, told)
        job.part.replace(job.out)
    except (OSError, SafetensorError) as error:
        raise unwritable("--out", job.out, error) from None
    finally:
        job.part.unlink(missing_ok=True)


def _plain(job: Job, truth: check.Rows) -> Plain:
    q, k, v = (job.source.take(name, [range(job.source.shapes[name][2])]) for name in ("q", "k", "v"))
    causal, grouped = job.mask.right == 0, q.shape[1] != k.shape[1]

    def attend(num_tokens: int) -> Tensor:
        few = slice(0, num_tokens)
        return torch.nn.functional.scaled_dot_product_attention(
            q[:, :, few], k[:, :, few], v[:, :, few], is_causal=causal, scale=job.scale, enable_gqa=grouped
        )

    attend(256)  # starts torch's threads
    begin = time.perf_counter()
    out = attend(max(q.shape[2], k.shape[2]))
    seconds = time.perf_counter() - begin
    error = check.relative_error(out[:, :, torch.from_numpy(truth.positions)], truth.out)
    return Plain(seconds, error, torch.get_num_threads())
