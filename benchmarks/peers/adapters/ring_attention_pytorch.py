"""ring-attention-pytorch: its ring in plain torch, which is what it runs without CUDA."""

from __future__ import annotations

from benchmarks.peers.contract import Peer, contiguous

BUCKET = 1024  # its default


class RingAttentionPytorch(Peer):
    name = "ring-attention-pytorch"
    packages = ("ring-attention-pytorch",)
    note = "plain torch in buckets, striped by bucket if causal"

    def ranges(self, problem, rank, workers):
        mine = contiguous(problem.tokens, rank, workers)
        if not problem.causal:
            return mine
        bucket = _bucket(problem, workers)
        num_buckets = problem.tokens // bucket
        return [range(i, problem.tokens, num_buckets) for i in range(mine[0].start // bucket, mine[0].stop // bucket)]

    def calls(self, problem, shards, rank, workers):
        from benchmarks.peers import torch_side
        from ring_attention_pytorch import ring_flash_attn

        def attend(q, k, v):
            return ring_flash_attn(
                q,
                k,
                v,
                causal=problem.causal,
                bucket_size=_bucket(problem, workers),
                ring_reduce_col=True,
                striped_ring_attn=problem.causal,
                ring_size=workers,
            )

        return torch_side.calls(problem, shards, attend, heads_last=True)


def _bucket(problem, workers) -> int:
    return min(BUCKET, problem.tokens // workers)
