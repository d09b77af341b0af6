"""What a competent user writes in JAX: shard_map, ppermute and a blockwise online softmax."""

from __future__ import annotations

from itertools import chain

from benchmarks.peers.contract import Peer, contiguous, zigzag

BLOCK = 512


class JaxShardMap(Peer):
    name = "JAX shard_map + ppermute"
    environment = "jax"
    note = "one process, a CPU device for each worker, all cores; zigzag if causal, unseen blocks skipped"
    one_process = True

    def ranges(self, problem, rank, workers):
        layout = zigzag if problem.causal else contiguous
        return list(chain.from_iterable(layout(problem.tokens, worker, workers) for worker in range(workers)))

    def calls(self, problem, shards, rank, workers):
        from benchmarks.peers import jax_ring, jax_side

        block = min(BLOCK, problem.tokens // (2 * workers))
        attend = jax_ring.attention(workers, block, problem.causal)
        return jax_side.calls(problem, shards, workers, jax_side.over_devices(attend, workers))
