"""torch's own ring template of context parallelism (torch.distributed.tensor.experimental)."""

from __future__ import annotations

from benchmarks.peers.contract import Peer, contiguous, zigzag


class TorchContextParallel(Peer):
    name = "torch context parallel"
    note = "_scaled_dot_product_ring_flash_attention, head-tail balance if causal"
    bridge = (
        "torch's CPU flash op registered as the CPU kernel of aten::_scaled_dot_product_flash_attention, the ring "
        "called directly: context_parallel dispatches the CUDA ops alone"
    )

    def ranges(self, problem, rank, workers):
        return (zigzag if problem.causal else contiguous)(problem.tokens, rank, workers)

    def calls(self, problem, shards, rank, workers):
        import torch
        from benchmarks.peers import cpu_flash, torch_side
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.experimental._context_parallel import _attention as template

        cpu_flash.register()
        mesh = init_device_mesh("cpu", (workers,))
        template._cp_options.enable_load_balance = problem.causal

        class Ring(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q, k, v):
                out, lse, *rest = template._scaled_dot_product_ring_flash_attention(
                    mesh, q, k, v, is_causal=problem.causal
                )
                ctx.save_for_backward(q, k, v, out, lse)
                ctx.rest = rest
                return out

            @staticmethod
            def backward(ctx, dout):
                cum_q, cum_k, max_q, max_k, seed, offset, _ = ctx.rest
                return template._scaled_dot_product_ring_flash_attention_backward(
                    mesh, dout, *ctx.saved_tensors, cum_q, cum_k, max_q, max_k, 0.0, problem.causal, seed, offset
                )[:3]

        return torch_side.calls(problem, shards, Ring.apply)
