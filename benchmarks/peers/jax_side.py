"""What the adapters of JAX's world share: N CPU devices in one process, one of them for each worker."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.peers.contract import Calls, Problem
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "ring"
SHARDED = PartitionSpec(None, AXIS)


def mesh(workers: int) -> Mesh:
    return Mesh(np.array(jax.devices("cpu")[:workers]), (AXIS,))


def over_devices(function: Callable, workers: int) -> Callable:
    """function on the shards of the devices, as a function of the whole [1, tokens, heads, dim]."""
    return jax.shard_map(function, mesh=mesh(workers), in_specs=(SHARDED,) * 3, out_specs=SHARDED, check_vma=False)


def calls(problem: Problem, shards: np.ndarray, workers: int, attend: Callable) -> Calls:
    """attend(q, k, v) -> out on [1, tokens, heads, dim]: compiled here, outside of the time."""
    placed = NamedSharding(mesh(workers), SHARDED)
    q, k, v, dout = (
        jax.device_put(jnp.asarray(np.swapaxes(x, 0, 1)[None], dtype=problem.dtype), placed) for x in shards
    )

    def out_and_gradients(q, k, v, dout):
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(dout)

    forward, both = jax.jit(attend), jax.jit(out_and_gradients)
    return Calls(
        lambda: jax.block_until_ready(forward(q, k, v)),
        lambda: jax.block_until_ready(both(q, k, v, dout)),
        lambda x: np.ascontiguousarray(np.swapaxes(np.asarray(x, dtype=np.float32)[0], 0, 1)),
    )
