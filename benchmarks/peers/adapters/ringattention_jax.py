"""The JAX package ringattention: blockwise attention in a ring under shard_map."""

from __future__ import annotations

from functools import partial
from itertools import chain

from benchmarks.peers.contract import Peer, contiguous

CHUNK = 512


class RingattentionJax(Peer):
    name = "ringattention (JAX)"
    environment = "jax"
    packages = ("ringattention",)
    note = "one process, a CPU device for each worker, all cores; contiguous: it has no balanced layout"
    bridge = "jax.lib.xla_bridge, which its import needs and JAX 0.10 lacks, put back"
    one_process = True

    def ranges(self, problem, rank, workers):
        return list(chain.from_iterable(contiguous(problem.tokens, worker, workers) for worker in range(workers)))

    def calls(self, problem, shards, rank, workers):
        import types

        import jax
        import jax.extend.backend
        import jax.numpy as jnp
        from benchmarks.peers import jax_side

        jax.lib.xla_bridge = types.SimpleNamespace(get_backend=jax.extend.backend.get_backend)
        from ringattention import ringattention

        chunk = min(CHUNK, problem.tokens // workers)
        blockwise = dict(
            causal_block_size=1 if problem.causal else None,
            deterministic=True,
            dropout_rng=None,
            attn_pdrop=0.0,
            query_chunk_size=chunk,
            key_chunk_size=chunk,
            dtype=jnp.float32,
            policy=jax.checkpoint_policies.nothing_saveable,
            precision=None,
            prevent_cse=False,
        )
        # By place: custom_vjp takes its static arguments so.
        static = dict(axis_name=jax_side.AXIS, float32_logits=True, blockwise_kwargs=blockwise)
        attend = partial(_attend, ringattention, tuple(static.values()))
        return jax_side.calls(problem, shards, workers, jax_side.over_devices(attend, workers))


def _attend(function, static, q, k, v):
    return function(q, k, v, None, None, None, *static)
