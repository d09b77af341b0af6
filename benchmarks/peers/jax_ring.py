"""A ring in JAX: in every step the blocks of the local queries meet the blocks of the shard that is here."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from benchmarks.peers.jax_side import AXIS
from jax import lax


def attention(workers: int, block: int, causal: bool):
    """attend(q, k, v) -> out, of one device: [1, tokens, heads, dim], zigzag if causal."""

    def attend(q, k, v):
        queries, keys, values = (_blocks(x, block) for x in (q, k, v))
        rank, num = lax.axis_index(AXIS), len(queries)
        state = jax.vmap(_empty)(queries)
        onward = [(r, (r + 1) % workers) for r in range(workers)]

        def step(carry, i):
            state, keys, values = carry
            starts = _starts(rank, num, block, workers, causal)
            key_starts = _starts((rank - i) % workers, num, block, workers, causal)
            state = lax.map(lambda row: _row(row, keys, values, key_starts, block, causal), (queries, starts, state))
            keys, values = (lax.ppermute(x, AXIS, onward) for x in (keys, values))
            return (state, keys, values), None

        (state, _, _), _ = lax.scan(step, (state, keys, values), jnp.arange(workers))
        acc, _, total = state
        out = (acc / total[..., None]).astype(q.dtype)
        return jnp.moveaxis(out, 1, 2).reshape(q.shape)

    return attend


def _blocks(x, block):
    """[blocks, heads, block, dim]"""
    _, tokens, heads, dim = x.shape
    return jnp.moveaxis(x[0].reshape(tokens // block, block, heads, dim), 2, 1)


def _empty(queries):
    heads, block, dim = queries.shape
    return jnp.zeros((heads, block, dim)), jnp.full((heads, block), -jnp.inf), jnp.zeros((heads, block))


def _starts(rank, num, block, workers, causal):
    """Position of the first token of each block of that rank."""
    if not causal:
        return (rank * num + jnp.arange(num)) * block
    half = num // 2
    front, back = rank * half, (2 * workers - 1 - rank) * half
    return (jnp.concatenate([front + jnp.arange(half), back + jnp.arange(half)])) * block


def _row(row, keys, values, key_starts, block, causal):
    """One block of queries over all blocks of the shard that is here."""
    queries, start, state = row

    def tile(state, here):
        k, v, key_start = here
        # Recomputed in backward: its scores are not kept.
        compute = jax.checkpoint(partial(_absorb, block=block, causal=causal), prevent_cse=False)
        if not causal:
            return compute(state, queries, k, v, start, key_start), None
        seen = key_start <= start
        return lax.cond(seen, compute, lambda state, *_: state, state, queries, k, v, start, key_start), None

    state, _ = lax.scan(tile, state, (keys, values, key_starts))
    return state


def _absorb(state, q, k, v, start, key_start, *, block, causal):
    acc, row_max, total = state
    scores = jnp.einsum("hqd,hkd->hqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if causal:
        places = jnp.arange(block)
        scores = jnp.where(start + places[:, None] >= key_start + places, scores, -jnp.inf)
    new_max = lax.stop_gradient(jnp.maximum(row_max, scores.max(-1)))
    weights, old = jnp.exp(scores - new_max[..., None]), jnp.exp(row_max - new_max)
    part = jnp.einsum("hqk,hkd->hqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return acc * old[..., None] + part, new_max, total * old + weights.sum(-1)
