"""What one tile of attention is, in float64 and plain torch: slow, short, no 0 * NaN between pairs that do not meet."""

import math

import torch


def visible_pairs(lo, hi, num_keys):
    """[..., T] intervals -> [..., T, S] booleans."""
    j = torch.arange(num_keys)
    return (lo[..., None] <= j) & (j < hi[..., None])


def expand_heads(x, num_heads):
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def sum_pairs(weights, values, visible):
    """sum_j weights[.., i, j] values[.., j, :] over visible pairs only, whatever the hidden ones hold."""
    if bool(torch.isfinite(weights).all() and torch.isfinite(values).all()):
        return torch.where(visible, weights, 0.0) @ values
    products = weights[..., None] * values[..., None, :, :]
    return torch.where(visible[..., None], products, 0.0).sum(-2)


def attention(q, k, v, scale, visible):
    """(out, lse) in float64; a row that sees nothing has out 0, lse -inf."""
    q, k, v = q.double(), expand_heads(k, q.shape[1]).double(), expand_heads(v, q.shape[1]).double()
    scores = torch.where(visible, scale * (q @ k.mT), -math.inf)
    lse = torch.logsumexp(scores, -1)
    p = torch.softmax(scores, -1)
    out = sum_pairs(p, v, visible)
    return torch.where(visible.any(-1, keepdim=True), out, 0.0), lse


def gradients(q, k, v, dout, lse, delta, scale, visible):
    """(dq, dk, dv) in float64 from the given lse and delta."""
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    q, k, v = q.double(), expand_heads(k, num_heads).double(), expand_heads(v, num_heads).double()
    dout, lse, delta = dout.double(), lse.double(), delta.double()
    visible = visible & (lse > -math.inf).logical_or(lse.isnan())[..., None]
    p = torch.where(visible, torch.exp(scale * (q @ k.mT) - lse[..., None]), 0.0)
    ds = torch.where(visible, p * (dout @ v.mT - delta[..., None]), 0.0)
    dq = scale * sum_pairs(ds, k, visible)
    dk = scale * sum_pairs(ds.mT, q, visible.mT)
    dv = sum_pairs(p.mT, dout, visible.mT)
    return dq, dk.unflatten(1, (num_kv_heads, -1)).sum(2), dv.unflatten(1, (num_kv_heads, -1)).sum(2)


def relative_error(x, reference):
    norm = reference.norm().item()
    return (x.double() - reference).norm().item() / norm if norm else x.double().norm().item()
