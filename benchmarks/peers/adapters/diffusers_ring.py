"""diffusers' ring (context parallelism of its attention dispatcher)."""

from __future__ import annotations

from benchmarks.peers.contract import Peer


class DiffusersRing(Peer):
    name = "diffusers"
    packages = ("diffusers",)
    note = "dispatch_attention_fn, backend _native_flash, ring_degree = processes"
    bridge = "torch's CPU flash op registered as the CPU kernel of aten::_scaled_dot_product_flash_attention"

    def calls(self, problem, shards, rank, workers):
        import torch
        from benchmarks.peers import cpu_flash, torch_side
        from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
        from diffusers.models.attention_dispatch import dispatch_attention_fn
        from torch.distributed.device_mesh import init_device_mesh

        cpu_flash.register()
        parallel = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=workers))
        mesh = init_device_mesh("cpu", (workers, 1), mesh_dim_names=("ring", "ulysses"))
        parallel.setup(rank, workers, torch.device("cpu"), mesh=mesh)
        options = dict(is_causal=problem.causal, backend="_native_flash", parallel_config=parallel)
        return torch_side.calls(
            problem, shards, lambda q, k, v: dispatch_attention_fn(q, k, v, **options), heads_last=True
        )
