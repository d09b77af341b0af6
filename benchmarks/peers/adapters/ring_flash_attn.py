"""ring-flash-attn: its ring loops, zigzag if causal."""

from __future__ import annotations

from benchmarks.peers.contract import Peer, contiguous, zigzag


class RingFlashAttn(Peer):
    name = "ring-flash-attn"
    packages = ("ring-flash-attn",)
    note = "zigzag if causal"
    bridge = (
        "torch's CPU flash op behind a stand-in for the module flash_attn; its adapters for transformers, which "
        "transformers 5 fails to import, left out. flash_attn takes no float32: there its backward counts on "
        ".to(float32) making copies"
    )

    def ranges(self, problem, rank, workers):
        return (zigzag if problem.causal else contiguous)(problem.tokens, rank, workers)

    def calls(self, problem, shards, rank, workers):
        from benchmarks.peers import cpu_flash, torch_side

        cpu_flash.flash_attn_stand_in()
        cpu_flash.stand_in(
            "ring_flash_attn.adapters", substitute_hf_flash_attn=None, update_ring_flash_attn_params=None
        )
        from ring_flash_attn import ring_flash_attn_func, zigzag_ring_flash_attn_func

        function = zigzag_ring_flash_attn_func if problem.causal else ring_flash_attn_func
        return torch_side.calls(
            problem, shards, lambda q, k, v: function(q, k, v, causal=problem.causal), heads_last=True
        )
