"""A ring's results put together again, beside the definition's on the whole sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from definition import attention, bound_of_lse, bound_of_out, bounds_of_gradients, gradients, seen_by_mask
from torch import Tensor

import ringspan
from ringspan.problem import KeyRanges, Mask


@dataclass
class Case:
    """A whole problem: shapes, mask and layout. window and documents in global positions."""

    tokens: int = 64
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    batch: int = 1
    keys: int | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    options: dict = field(default_factory=dict)
    seed: int = 0
    shared: bool = False  # keys and values lie in memory that other processes read
    device: str = "cpu"
    rounds_weights: bool = False  # the kernel multiplies by weights of the dtype
    value_dim: int | None = None  # head_dim of v and out, if it is another

    def tensors(self) -> list[Tensor]:
        """q, k, v, do, dlse of the whole sequence."""
        generator = torch.Generator().manual_seed(self.seed)
        keys = self.tokens if self.keys is None else self.keys

        def normal(*shape):
            return torch.randn(*shape, generator=generator, device="cpu").to(self.device, self.dtype)

        rows = (self.batch, self.heads, self.tokens)
        columns = (self.batch, self.kv_heads, keys)
        dim, value_dim = self.head_dim, self.value_dim or self.head_dim
        dlse = torch.randn(rows, generator=generator, device="cpu").to(self.device)
        q, k, v = normal(*rows, dim), normal(*columns, dim), normal(*columns, value_dim)
        return [q, k, v, normal(*rows, value_dim), dlse]

    @property
    def mask(self) -> Mask:
        left, right = self.options.get("window_size", (-1, -1))
        documents, ranges = self.options.get("cu_seqlens"), self.options.get("key_ranges")
        parts = [ranges] if isinstance(ranges, Tensor) else ranges
        return Mask(
            self.tokens,
            self.tokens if self.keys is None else self.keys,
            left,
            0 if self.options.get("causal") else right,
            None if documents is None else tuple(documents),
            None if parts is None else tuple(KeyRanges.of(part.numpy()) for part in parts),
        )

    def seen(self) -> Tensor:
        return seen_by_mask(self.mask).to(self.device)

    @property
    def scale(self) -> float:
        return self.options.get("softmax_scale", self.head_dim**-0.5)


def ring(group, case: Case) -> dict[str, Tensor]:
    """Run by every rank: forward and backward on its shards; whole out, lse, dq, dk, dv on every rank."""
    place = dict(layout=case.layout, group=group, cu_seqlens=case.options.get("cu_seqlens"))
    q, k, v, do, dlse = (ringspan.shard(x, 2, **place) for x in case.tensors())
    if case.shared:
        k, v = (ringspan.empty_shared(x.shape, dtype=x.dtype).copy_(x) for x in (k, v))
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = ringspan.ring_attention(q, k, v, layout=case.layout, group=group, return_lse=True, **case.options)
    # A row that sees nothing has lse -inf, whose gradient means nothing.
    loss = (out.double() * do.double()).sum() + (torch.where(lse.isinf(), 0.0, lse).double() * dlse).sum()
    loss.backward()
    parts = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return {name: ringspan.unshard(x.detach(), 2, **place) for name, x in parts.items()}


def check(case: Case, found: dict[str, Tensor]) -> None:
    """Compare a ring's whole results with float64 attention on the same rounded inputs."""
    q, k, v, do, dlse = case.tensors()
    seen, scale = case.seen(), case.scale
    dlse = torch.where(seen.any(-1), dlse, 0.0)
    out, lse = attention(q, k, v, seen, scale)
    assert found["out"].dtype == case.dtype
    bound = bound_of_out(q, k, v, seen, scale, case.rounds_weights)
    close("out", found["out"], out, bound * float(torch.linalg.vector_norm(out)))
    assert torch.equal(found["lse"].isneginf(), lse.isneginf())
    finite = ~lse.isneginf()
    assert torch.allclose(found["lse"][finite].double(), lse[finite], rtol=0, atol=bound_of_lse(q, k, scale))
    exact = gradients(q, k, v, do, dlse, seen, scale)
    bounds = bounds_of_gradients(q, k, v, do, dlse, seen, scale, case.rounds_weights)
    for name, grad, bound in zip(("dq", "dk", "dv"), exact, bounds, strict=True):
        assert found[name].dtype == case.dtype
        # The output's own rounding; and delta is made from the rounded out, as in every fused backward.
        rounding = torch.finfo(case.dtype).eps * float(torch.linalg.vector_norm(grad))
        close(name, found[name], grad, 2 * bound + 2 * rounding)


def close(name: str, found: Tensor, exact: Tensor, bound: float) -> None:
    distance = float(torch.linalg.vector_norm(found.double() - exact))
    assert distance <= bound, f"{name}: distance {distance:.3g}, bound {bound:.3g}"
