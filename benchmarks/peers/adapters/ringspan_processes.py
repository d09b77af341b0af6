"""ringspan over processes: zigzag for causal attention, contiguous for full."""

from __future__ import annotations

from benchmarks.peers.contract import Peer, contiguous, zigzag


class RingspanProcesses(Peer):
    name = "ringspan"
    packages = ("ringspan",)
    note = "zigzag if causal"
    kernel = "auto"

    def ranges(self, problem, rank, workers):
        return (zigzag if problem.causal else contiguous)(problem.tokens, rank, workers)

    def calls(self, problem, shards, rank, workers):
        from benchmarks.peers import torch_side

        import ringspan

        layout = "zigzag" if problem.causal else "contiguous"
        options = dict(causal=problem.causal, layout=layout, kernel=self.kernel)
        return torch_side.calls(problem, shards, lambda q, k, v: ringspan.ring_attention(q, k, v, **options))


class RingspanFloat32Weights(RingspanProcesses):
    name = "ringspan, f32 weights"
    note = "zigzag if causal; kernel native, which keeps the weights of bfloat16 calls in float32"
    kernel = "native"
