"""What a competent user writes in an afternoon: a ring over torch.distributed, torch's flash op, merging by lse."""

from __future__ import annotations

from benchmarks.peers.contract import Peer, contiguous, zigzag


class PlainRing(Peer):
    name = "plain ring"
    note = "torch's CPU flash op, isend/irecv during the step, zigzag if causal"

    def ranges(self, problem, rank, workers):
        return (zigzag if problem.causal else contiguous)(problem.tokens, rank, workers)

    def calls(self, problem, shards, rank, workers):
        from benchmarks.peers import torch_side
        from benchmarks.peers.ring_of_flash import RingOfFlash

        return torch_side.calls(problem, shards, lambda q, k, v: RingOfFlash.apply(q, k, v, problem.causal))
