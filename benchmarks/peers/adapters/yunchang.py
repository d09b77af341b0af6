"""yunchang (long-context-attention) with its torch attention type: over a ring, and over heads (Ulysses)."""

from __future__ import annotations

from typing import ClassVar

from benchmarks.peers.contract import Peer


class _Yunchang(Peer):
    packages = ("yunchang",)
    bridge = "torch's CPU flash op registered as the CPU kernel of aten::_scaled_dot_product_flash_attention"
    over_heads: ClassVar[bool]

    def calls(self, problem, shards, rank, workers):
        from benchmarks.peers import cpu_flash, torch_side
        from yunchang import LongContextAttention, set_seq_parallel_pg
        from yunchang.kernels import AttnType

        cpu_flash.register()
        set_seq_parallel_pg(*((workers, 1) if self.over_heads else (1, workers)), rank, workers)
        attention = LongContextAttention(ring_impl_type="basic_pytorch", attn_type=AttnType.TORCH_FLASH)
        return torch_side.calls(
            problem, shards, lambda q, k, v: attention(q, k, v, causal=problem.causal), heads_last=True
        )


class YunchangRing(_Yunchang):
    name = "yunchang, ring"
    note = "contiguous: its torch type has no balanced layout"
    over_heads = False


class YunchangUlysses(_Yunchang):
    name = "yunchang, ulysses"
    note = "all-to-all over heads"
    over_heads = True
