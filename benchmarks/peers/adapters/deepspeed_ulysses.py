"""DeepSpeed's Ulysses: all-to-all over heads around torch's attention."""

from __future__ import annotations

from benchmarks.peers.contract import Peer


class DeepSpeedUlysses(Peer):
    name = "DeepSpeed Ulysses"
    packages = ("deepspeed",)
    note = "DistributedAttention around scaled_dot_product_attention"

    def calls(self, problem, shards, rank, workers):
        import deepspeed.comm
        import torch.distributed as dist
        from benchmarks.peers import torch_side
        from deepspeed.sequence.layer import DistributedAttention
        from torch.nn.functional import scaled_dot_product_attention

        deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)

        def local(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(q, k, v, is_causal=problem.causal).transpose(1, 2)

        attention = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)
        return torch_side.calls(problem, shards, lambda q, k, v: attention(q, k, v, 0), heads_last=True)
