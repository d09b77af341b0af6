"""Attention straight from its formulas, over the whole score matrix: what every test here compares with.

    s_ij = scale * q_i . k_j       lse_i = log sum_j e^s_ij       p_ij = e^(s_ij - lse_i)       out_i = sum_j p_ij v_j
    delta_i = do_i . out_i - dlse_i   ds_ij = p_ij (do_i . v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j      dk_j = scale sum_i ds_ij q_i      dv_j = sum_i p_ij do_i

over the pairs that `seen`, [T, S] or [B, H, T, S], shows; on the device of the tensors. In float64 it is the
definition; the same in float32 is "plain attention", whose error the library may at most double.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ringspan.problem import Mask
from ringspan.schedule.check import visible_pairs
from ringspan.state import state_dtype
from ringspan.tile import RowIntervals

# design.md, "Numerics": the error of `out` that is always allowed, whatever plain attention makes of the inputs.
OUT_BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float64: 1e-12}


def seen_by_mask(mask: Mask) -> Tensor:
    """[num_queries, num_keys] bool, or [B, 1, ..], by brute force."""
    return torch.from_numpy(visible_pairs(mask))


def seen_by_intervals(visible: RowIntervals) -> Tensor:
    """[T, S], [B, H, T, S] or [B, 1, T, S] bool, from the words of Band and RowIntervals and none of their methods.

    On the default device, as what kernel_behaviour.py makes.
    """
    row, key = np.arange(visible.num_rows)[:, None], np.arange(visible.num_keys)
    if visible.band is None:
        seen = (visible.lo[..., None] <= key) & (key < visible.hi[..., None])
        return torch.from_numpy(seen).to(torch.get_default_device())
    lower, upper = visible.band.lower, visible.band.upper
    seen = np.ones((visible.num_rows, visible.num_keys), dtype=bool)
    if lower is not None:
        seen &= row + lower <= key
    if upper is not None:
        seen &= key < row + upper
    return torch.from_numpy(seen).to(torch.get_default_device())


def attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, dtype=torch.float64, rounded=None
) -> tuple[Tensor, Tensor]:
    """(out [B, H, T, D], lse [B, H, T]). rounded: the dtype that weights are rounded to before they meet v."""
    q, k, v = (x.to(dtype) for x in _expanded(q, k, v))
    weights, lse = _weights(q, k, seen, scale)
    return _over_seen(_rounded(weights, rounded), v, seen), lse


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dlse: Tensor,
    seen: Tensor,
    scale: float,
    dtype=torch.float64,
    rounded=None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of sum(out * do) + sum(lse * dlse). rounded: the dtype that p and ds are rounded to."""
    out, lse = attention(q, k, v, seen, scale, dtype)
    delta = (out * do.to(dtype)).sum(-1) - dlse.to(dtype)
    return gradients_given(q, k, v, do, lse, delta, seen, scale, dtype, rounded)


def gradients_given(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    seen: Tensor,
    scale: float,
    dtype=torch.float64,
    rounded=None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from rows' lse and delta, which may be of more keys than these."""
    num_kv_heads = k.shape[1]
    q, k, v, do, lse, delta = (x.to(dtype) for x in (*_expanded(q, k, v), do, lse, delta))
    seen = seen & ~lse.isneginf().unsqueeze(-1)  # such a row has no weights
    scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    weights = torch.where(seen, torch.exp(scores - lse.unsqueeze(-1)), 0.0)
    d_scores = torch.where(seen, weights * (do @ v.mT - delta.unsqueeze(-1)), 0.0)
    weights, d_scores = _rounded(weights, rounded), _rounded(d_scores, rounded)
    dk, dv = (
        _summed(x, num_kv_heads)
        for x in (_over_seen(d_scores.mT, q, seen.mT) * scale, _over_seen(weights.mT, do, seen.mT))
    )
    return _over_seen(d_scores, k, seen) * scale, dk, dv


def rounding_of_gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor, seen: Tensor, scale: float, of_weights_only=False
) -> tuple[float, float, float]:
    """Norm of what one rounding of every term leaves in dq, dk, dv, in units of the rounding.

    The terms of a gradient cancel (do . v against delta; entirely so where a row sees one key), so its error cannot
    be measured against its own size. Independent errors add up as squares: hence the formulas above on squares. A
    weight e^(s - lse) has, besides its own rounding, that of s (and of its products) and of lse; of_weights_only
    counts one rounding of p and of ds and nothing else.
    """
    num_kv_heads = k.shape[1]
    out, _ = attention(q, k, v, seen, scale)
    q, k, v, do = (x.double() for x in (*_expanded(q, k, v), do))
    weights, lse = _weights(q, k, seen, scale)
    delta = (out * do).sum(-1) - dlse.double()
    q2, k2, v2, do2 = (x.square() for x in (q, k, v, do))
    of_scores = scale**2 * (q2 @ k2.mT + (q @ k.mT).square()) + lse.nan_to_num(neginf=0.0).square().unsqueeze(-1)
    if of_weights_only:
        d_scores = (weights * (do @ v.mT - delta.unsqueeze(-1))).square()
        weights = weights.square()
    else:
        weights = weights.square() * (1 + of_scores)
        d_scores = weights * (do2 @ v2.mT + delta.square().unsqueeze(-1))
    dk, dv = (_summed(x, num_kv_heads) for x in (d_scores.mT @ q2 * scale**2, weights.mT @ do2))
    return tuple(float(x.sum().sqrt()) for x in (d_scores @ k2 * scale**2, dk, dv))


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||; 0 where they agree exactly, b = 0 included."""
    distance = torch.linalg.vector_norm(a.double() - b.double())
    return 0.0 if distance == 0 else float(distance / torch.linalg.vector_norm(b.double()))


def plain_error_of_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, rounded=None) -> float:
    """Error of plain attention in the dtype's state dtype, rounded once at the end.

    For bfloat16 and float16 that is a harder yardstick than plain attention in the dtype itself, unless its weights
    are rounded too.
    """
    out, _ = attention(q, k, v, seen, scale, state_dtype(q.dtype), rounded)
    return relative_error(out.to(q.dtype), attention(q, k, v, seen, scale)[0])


def bound_of_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, rounds_weights=False) -> float:
    """rounds_weights: the kernel multiplies v by weights of its dtype."""
    rounded = q.dtype if rounds_weights else None
    bound = max(OUT_BOUNDS[q.dtype], 2 * plain_error_of_out(q, k, v, seen, scale, rounded))
    if not rounds_weights:
        return bound
    # Half a unit for each of the two roundings, of terms and of out, for sums so short that the plain one was lucky.
    exact, _ = attention(q, k, v, seen, scale)
    _, k2, v2 = _expanded(q, k, v.double().square())
    terms = _over_seen(_weights(q.double(), k2.double(), seen, scale)[0].square(), v2, seen).sum()
    size = exact.square().sum()
    return max(bound, torch.finfo(q.dtype).eps / 2 * float((1 + terms / size).sqrt())) if size > 0 else bound


def bound_of_lse(q: Tensor, k: Tensor, scale: float) -> float:
    """Largest absolute error of an lse: an lse may be near 0, so it is measured against the scores it is made of.

    |s| <= |scale| |q| |k|; a dot product's rounding stays within a few units of that, and the log adds one.
    """
    largest = [torch.linalg.vector_norm(x.double(), dim=-1).max() if x.numel() else 0.0 for x in (q, k)]
    return 4 * torch.finfo(state_dtype(q.dtype)).eps * float(1 + abs(scale) * largest[0] * largest[1])


def bounds_of_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dlse: Tensor,
    seen: Tensor,
    scale: float,
    rounds_weights=False,
    weight_error=0.0,
) -> tuple[float, float, float]:
    """Largest ||error|| of dq, dk, dv: twice that of the plain formulas in the state's dtype, with two floors.

    Two units of rounding of every term, for sums so short that the plain formulas may round luckily; and 1e-12 of the
    terms for float64, where the plain formulas are the definition itself. rounds_weights: the kernel multiplies by
    p and ds of its dtype; then the plain formulas do too, and half a unit of that dtype is the third floor.
    weight_error: what else a p or ds may be wrong by, as a part of it.
    """
    dtype = state_dtype(q.dtype)
    inputs = (q, k, v, do, dlse, seen, scale)
    exact = gradients(*inputs)
    plain = gradients(*inputs, dtype, q.dtype if rounds_weights else None)
    floor = max(2 * torch.finfo(dtype).eps, 1e-12) * torch.tensor(rounding_of_gradients(*inputs), device=q.device)
    if rounds_weights or weight_error:
        of_weights = torch.tensor(rounding_of_gradients(*inputs, of_weights_only=True), device=q.device)
        floor += (weight_error or torch.finfo(q.dtype).eps / 2) * of_weights
    errors = torch.stack([torch.linalg.vector_norm(a.double() - b) for a, b in zip(plain, exact, strict=True)])
    return tuple(torch.maximum(2 * errors, floor).tolist())


def _expanded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


def _summed(x: Tensor, num_kv_heads: int) -> Tensor:
    return x.unflatten(1, (num_kv_heads, -1)).sum(2)


def _rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype).to(x.dtype)


def _over_seen(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """weights @ values over the pairs that are seen, whatever the hidden ones hold: there is no 0 * NaN in it."""
    if bool(weights.isfinite().all() and values.isfinite().all()):
        return weights @ values
    products = weights.unsqueeze(-1) * values.unsqueeze(-3)
    return torch.where(seen.unsqueeze(-1), products, 0.0).sum(-2)


def _weights(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    # A row that sees nothing, or nothing but scores of -inf, has lse -inf and would make e^nan; it has no weights.
    base = lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)
    return torch.where(seen, torch.exp(scores - base), 0.0), lse
