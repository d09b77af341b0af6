"""The CPU kernel. Arrays are whatever exports DLPack from CPU memory without a copy: torch tensors, NumPy arrays."""

from collections.abc import Sequence
from typing import Any, TypedDict

class Info(TypedDict):
    isas: list[str]
    isa: str
    rounds_weights: bool
    default_threads: int
    helper_threads: int

def absorb(
    acc: Any,
    row_max: Any,
    row_sum: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float,
    lower: int | None = None,
    upper: int | None = None,
    lo: Any = None,
    hi: Any = None,
    num_threads: int = 0,
    rounds_weights: bool = False,
) -> None:
    """Add sum_j e^(s_ij) v_j and sum_j e^(s_ij), s_ij = scale q_i . k_j, to the state acc e^row_max, row_sum
    e^row_max, in place.

    acc [B, H, T, E], row_max and row_sum [B, H, T] are float32; (0, -inf, 0) has seen nothing. q [B, H, T, D], k
    [B, K, S, D] and v [B, K, S, E] are float32, bfloat16 or float16 with any strides; query head h reads head
    h // (H / K). Row i sees the keys i + lower <= j < i + upper, or lo[i] <= j < hi[i] from int32 arrays [T],
    [B, H, T] or [B, 1, T]; a row that sees none keeps its bits. row_max is near the largest score, not necessarily
    equal to it. num_threads 0 means every processor. The result does not depend on num_threads. rounds_weights:
    e^(s_ij - row_max) may be rounded to bfloat16 before it meets v_j; needs bfloat16 inputs and an instruction set
    that offers it (info()).
    """

def absorb_runs(
    acc: Any,
    row_max: Any,
    row_sum: Any,
    q: Any,
    runs: Sequence[tuple[Any, Any, int | None, int | None, Any, Any]],
    *,
    scale: float,
    num_threads: int = 0,
    rounds_weights: bool = False,
) -> None:
    """The same for several runs of keys and values, in their order: a list of (k, v, lower, upper, lo, hi), with
    indices counted in each run. Queries are read, and the state is read and written, once for all; the bits are those
    of one call after the other.
    """

def absorb_gradient(
    dq: Any,
    dk: Any,
    dv: Any,
    q: Any,
    k: Any,
    v: Any,
    do: Any,
    lse: Any,
    delta: Any,
    *,
    scale: float,
    lower: int | None = None,
    upper: int | None = None,
    lo: Any = None,
    hi: Any = None,
    num_threads: int = 0,
    rounds_weights: bool = False,
) -> None:
    """Add the tile's gradients to dq [B, H, T, D], dk [B, K, S, D] and dv [B, K, S, E], float32; dq may be None, or dk
    and dv may be. do [B, H, T, E].

    p_ij = e^(s_ij - lse_i), ds_ij = p_ij (do_i . v_j - delta_i). lse and delta [B, H, T] are float32; a row with
    lse = -inf has no gradient. rounds_weights: p and ds may be rounded to bfloat16, as in absorb.
    """

def info() -> Info:
    """The instruction sets available and the one chosen (RINGSPAN_ISA), whether that one offers rounds_weights, the
    default number of threads, the helpers started.
    """
