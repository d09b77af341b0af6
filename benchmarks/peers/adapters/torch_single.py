"""The baseline: torch's attention over the whole sequence, one process with all cores."""

from __future__ import annotations

from benchmarks.peers.contract import Peer, contiguous


class TorchSingle(Peer):
    name = "torch, one process"
    note = "scaled_dot_product_attention, all cores"
    one_process = True

    def ranges(self, problem, rank, workers):
        return contiguous(problem.tokens, 0, 1)

    def calls(self, problem, shards, rank, workers):
        from benchmarks.peers import torch_side
        from torch.nn.functional import scaled_dot_product_attention

        return torch_side.calls(
            problem, shards, lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=problem.causal)
        )
