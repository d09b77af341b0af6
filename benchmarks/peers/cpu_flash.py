"""Bridges from the GPU kernels that peers call to torch's flash attention for CPUs.

`register` makes it the CPU kernel of the aten ops that torch has for CUDA alone; `flash_attn_stand_in` gives
`import flash_attn` the two functions that ring loops call. Tensors and results are those of the originals.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_library: torch.library.Library | None = None  # registrations last as long as it


def register() -> None:
    global _library
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
        _library.impl("_scaled_dot_product_flash_attention", _aten_forward, "CPU")
        _library.impl("_scaled_dot_product_flash_attention_backward", _aten_backward, "CPU")


def _aten_forward(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    out, lse = _forward(query, key, value, dropout_p, is_causal, scale=scale)
    nothing = torch.empty(0, dtype=torch.int64)
    return out, lse, nothing, nothing, query.shape[2], key.shape[2], nothing, nothing, nothing


def _aten_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed,
    philox_offset, *, scale=None,
):  # fmt: skip
    return _backward(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, scale=scale)


def flash_attn_stand_in() -> None:
    interface = stand_in(
        "flash_attn.flash_attn_interface",
        _flash_attn_forward=_flash_attn_forward,
        _flash_attn_backward=_flash_attn_backward,
        _flash_attn_varlen_forward=None,
        _flash_attn_varlen_backward=None,
    )
    stand_in("flash_attn", flash_attn_interface=interface)


def stand_in(name: str, **contents: Any) -> types.ModuleType:
    """What `import name` finds from now on."""
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    return module


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
    alibi_slopes, return_softmax,
):  # fmt: skip
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = _forward(q, k, v, dropout_p, causal, scale=softmax_scale)
    return out.transpose(1, 2), lse, None, None


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
    softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    grads = _backward(dout, q, k, v, out, softmax_lse, dropout_p, causal, scale=softmax_scale)
    for given, found in zip((dq, dk, dv), grads, strict=True):
        given.copy_(found.transpose(1, 2))
