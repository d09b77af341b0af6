"""The plain ring: an autograd function over torch.distributed and torch's flash attention for CPUs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class RingOfFlash(torch.autograd.Function):
    """Zigzag shards [1, heads, tokens, dim] if causal, else contiguous ones."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        rank, size = dist.get_rank(), dist.get_world_size()
        kv = torch.stack([k, v])
        out, lse = torch.zeros_like(q, dtype=torch.float32), torch.full(q.shape[:3], -torch.inf)
        for step in range(size):
            coming, requests = _pass_on(kv) if step + 1 < size else (kv, [])
            rows, keys = _visible(causal, step, rank, q.shape[2])
            part, part_lse = _forward(q[:, :, rows], *kv[:, :, :, keys], 0.0, causal and step == 0)
            new_lse = torch.logaddexp(lse[:, :, rows], part_lse)
            out[:, :, rows] *= (lse[:, :, rows] - new_lse).exp().unsqueeze(-1)
            out[:, :, rows] += part * (part_lse - new_lse).exp().unsqueeze(-1)
            lse[:, :, rows] = new_lse
            _finish(requests)
            kv = coming
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        rank, size = dist.get_rank(), dist.get_world_size()
        kv, dq = torch.stack([k, v]), torch.zeros_like(q, dtype=torch.float32)
        dkv = torch.zeros_like(kv, dtype=torch.float32)
        for step in range(size):
            coming, requests = _pass_on(kv) if step + 1 < size else (kv, [])
            rows, keys = _visible(ctx.causal, step, rank, q.shape[2])
            mine = (x[:, :, rows] for x in (q, out, lse.unsqueeze(-1), dout))
            q_rows, out_rows, lse_rows, dout_rows = mine
            lse_rows = lse_rows.squeeze(-1).contiguous()
            diagonal = ctx.causal and step == 0
            grads = _backward(dout_rows, q_rows, *kv[:, :, :, keys], out_rows, lse_rows, 0.0, diagonal)
            dq[:, :, rows] += grads[0]
            dkv[0, :, :, keys] += grads[1]
            dkv[1, :, :, keys] += grads[2]
            dkv, dkv_requests = _pass_on(dkv)  # after the last step they are back at their owner
            _finish(requests + dkv_requests)
            kv = coming
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype), None


def _visible(causal: bool, step: int, rank: int, length: int) -> tuple[slice, slice]:
    """Rows and keys of this step's tile: of zigzag shards all rows see the first half, or the last rows see all."""
    if not causal or step == 0:
        return slice(length), slice(length)
    if step <= rank:
        return slice(length), slice(length // 2)
    return slice(length // 2, length), slice(length)


def _pass_on(x: Tensor) -> tuple[Tensor, list]:
    rank, size = dist.get_rank(), dist.get_world_size()
    coming = torch.empty_like(x)
    send = dist.P2POp(dist.isend, x, (rank + 1) % size)
    receive = dist.P2POp(dist.irecv, coming, (rank - 1) % size)
    return coming, dist.batch_isend_irecv([send, receive])


def _finish(requests: list) -> None:
    for request in requests:
        request.wait()
