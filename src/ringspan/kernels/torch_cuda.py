"""torch's cuDNN and flash attention on NVIDIA GPUs, for a full tile that is all its rows see.

The libraries return `out` in 16 bits. Where it is the only partial result of a row, that costs nothing beyond the one
rounding at the end; merged with others it can cost any number of digits, since partial results may cancel. They
multiply the weights of hidden pairs, 0, by V, where 0 * NaN reaches rows that do not see the NaN; and their backward
gives other bits each time. So full tiles forward are theirs, and all else goes to a kernel of our own.
docs/decisions/0008-library-kernels-on-gpus.md has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ringspan.kernels import measured
from ringspan.kernels.contract import SCRATCH_BYTES, Kernel, TileByTile, captures
from ringspan.kernels.measured import Capability, Choose
from ringspan.state import SoftmaxState
from ringspan.tile import Kind, RowIntervals

_OLDEST_CAPABILITY = (8, 0)
_FEWEST = 256  # rows and keys; below, a launch and a merge cost more than any library saves
_ALIGNMENT_BYTES = 16  # of every row: the libraries load that much at once

Attend = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
Merge = Callable[[SoftmaxState, Tensor, Tensor], None]


@dataclass(frozen=True)
class Library:
    """One of torch's ops. attend(q, k, v, scale): (out [B, H, T, D] in q's dtype, lse [B, H, T] float32).

    is_there: whether this torch has it. fewest_rows: of all heads together, in one call.
    """

    name: str
    largest_head_dim: int
    attend: Attend
    is_there: Callable[[], bool] = lambda: True
    fewest_rows: int = 0


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, False, False, scale=scale)
    return out, lse


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    out, lse, *_ = op(q, k, v, None, True, 0.0, False, False, scale=scale)
    return out, lse.reshape(q.shape[:3])  # it comes as [B, H, T, 1]


@cache
def _has_cudnn() -> bool:
    """One that torch's own choice takes too: older ones fail where 128 does not divide the rows (pytorch 169849)."""
    return (torch.backends.cudnn.version() or 0) >= 91501


LIBRARIES = (
    Library("cudnn", 128, _cudnn, _has_cudnn),
    # Where rows do not fill the GPU it splits the keys, and takes memory for that: 128 blocks of 128 rows fill any.
    Library("flash", 256, _flash, torch.backends.cuda.is_flash_attention_available, 1 << 14),
)


def serving(libraries: Iterable[Library], head_dim: int) -> list[str]:
    """Names of those that serve this head_dim."""
    return [x.name for x in libraries if head_dim % 8 == 0 and head_dim <= x.largest_head_dim]


def cuda_capability(device: torch.device) -> Capability:
    return torch.cuda.get_device_capability(device)


def merge(state: SoftmaxState, out: Tensor, lse: Tensor) -> None:
    """state.merge_(out, lse), in one pass where Triton is there."""
    if out.is_cuda and find_spec("triton") is not None:
        from ringspan.kernels.triton_merge import merge_normalised_

        merge_normalised_(state, out, lse)
    else:
        state.merge_(out, lse)


class TorchCuda(TileByTile):
    """own: serves what the libraries do not. The others are the seams by which tests run this on a CPU."""

    name = "torch_cuda"
    sets_threads = False

    def __init__(
        self,
        own: Kernel,
        libraries: Sequence[Library] = LIBRARIES,
        choose: Choose = measured.choose,
        device_type: str = "cuda",
        capability: Callable[[torch.device], Capability] = cuda_capability,
        fewest: int = _FEWEST,
    ) -> None:
        self._own = own
        self.captures = captures(own)
        self._libraries = {library.name: library for library in libraries}
        self._choose = choose
        self._device_type = device_type
        self._capability = capability
        self._fewest = fewest

    def declines(self, dtype: torch.dtype, device: torch.device, head_dim: int) -> str | None:
        if device.type != self._device_type or torch.version.hip is not None:
            return f"it serves NVIDIA GPUs, these tensors are on {device.type}"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"the libraries serve bfloat16 and float16, not {dtype}"
        capability = self._capability(device)
        if capability < _OLDEST_CAPABILITY:
            needed, got = (".".join(map(str, x)) for x in (_OLDEST_CAPABILITY, capability))
            return f"the libraries need compute capability {needed} (Ampere) or later, this GPU has {got}"
        if not any(library.is_there() for library in self._libraries.values()):
            return "this torch was built without cuDNN 9.15.1 or later and without flash attention"
        if not self._able(head_dim):
            largest = max(library.largest_head_dim for library in self._libraries.values() if library.is_there())
            return f"the libraries serve head_dim in multiples of 8 up to {largest}, not {head_dim}"
        reason = self._own.declines(dtype, device, head_dim)
        return None if reason is None else f"what the libraries leave goes to {self._own.name}, and {reason}"

    def absorb(self, state: SoftmaxState, q: Tensor, k: Tensor, v: Tensor, visible: RowIntervals, scale: float) -> None:
        library = self._library_for(q, k, v, visible, scale)
        if library is None:
            self._own.absorb(state, q, k, v, visible, scale)
            return
        for batch, kv_heads, heads, rows in _parts(q, k):
            part = q[batch, heads, rows], k[batch, kv_heads], v[batch, kv_heads]
            # No name for the result: it would live on beside the next part's.
            merge(state.select(rows, heads, batch), *library.attend(*part, scale))

    def absorb_gradient(
        self,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        do: Tensor,
        lse: Tensor,
        delta: Tensor,
        visible: RowIntervals,
        scale: float,
    ) -> None:
        self._own.absorb_gradient(dq, dk, dv, q, k, v, do, lse, delta, visible, scale)

    def _able(self, head_dim: int) -> list[str]:
        return [name for name in serving(self._libraries.values(), head_dim) if self._libraries[name].is_there()]

    def _library_for(self, q: Tensor, k: Tensor, v: Tensor, visible: RowIntervals, scale: float) -> Library | None:
        """The library that takes this tile, or None for our own kernel."""
        small = min(visible.num_rows, visible.num_keys) < self._fewest or not q.shape[0]
        # They take the row maximum before they scale, which is right for a positive scale only.
        if small or visible.kind is not Kind.FULL or scale <= 0 or not all(map(_is_ready, (q, k, v))):
            return None
        if q.shape[-1] != v.shape[-1]:
            return None
        rows = _rows_of_a_part(q, k)
        able = [name for name in self._able(q.shape[-1]) if rows >= self._libraries[name].fewest_rows]
        name = self._choose(self._capability(q.device), q.dtype, q.shape[-1], visible.num_keys, able)
        return self._libraries.get(name)


def _is_ready(x: Tensor) -> bool:
    """Whether the libraries can read x where it is; a copy would cost what they save."""
    aligned = _ALIGNMENT_BYTES // x.element_size()
    outer = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return (
        x.stride(-1) == 1
        and x.data_ptr() % _ALIGNMENT_BYTES == 0
        and all(size == 1 or (stride > 0 and stride % aligned == 0) for size, stride in outer)
    )


def _parts(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Batch entries, key heads, query heads and rows whose out and lse fit into the scratch; keys are never cut."""
    num_batch, num_heads, num_rows, dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    most = max(SCRATCH_BYTES // (dim * q.element_size() + 4), 1)  # rows of all heads at once
    batch_step = _even(num_batch, most // (num_heads * num_rows))
    kv_step = num_kv_heads if batch_step > 1 else _even(num_kv_heads, most // (group * num_rows))
    row_step = num_rows if kv_step > 1 else _even(num_rows, most // group)
    for batch in _slices(num_batch, batch_step):
        for kv_heads in _slices(num_kv_heads, kv_step):
            heads = slice(kv_heads.start * group, kv_heads.stop * group)
            for rows in _slices(num_rows, row_step):
                yield batch, kv_heads, heads, rows


def _rows_of_a_part(q: Tensor, k: Tensor) -> int:
    """Of all its heads."""
    batch, _, heads, rows = next(_parts(q, k))
    return math.prod(part.stop - part.start for part in (batch, heads, rows))


def _even(length: int, most: int) -> int:
    """The length of parts that are at most `most` (but at least 1) long and as even as can be."""
    num_parts = -(-length // max(most, 1))
    return -(-length // num_parts)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
