"""ringspan's native kernel without a ring: one process with all cores."""

from __future__ import annotations

from benchmarks.peers.contract import Peer, contiguous


class RingspanNative(Peer):
    name = "ringspan, one process"
    packages = ("ringspan",)
    note = "a ring of one, all cores"
    one_process = True

    def ranges(self, problem, rank, workers):
        return contiguous(problem.tokens, 0, 1)

    def calls(self, problem, shards, rank, workers):
        from benchmarks.peers import torch_side

        import ringspan

        return torch_side.calls(
            problem, shards, lambda q, k, v: ringspan.ring_attention(q, k, v, causal=problem.causal)
        )
