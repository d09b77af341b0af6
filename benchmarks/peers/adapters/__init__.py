"""The contenders, by name: one file each."""

from __future__ import annotations

from benchmarks.peers.adapters.deepspeed_ulysses import DeepSpeedUlysses
from benchmarks.peers.adapters.diffusers_ring import DiffusersRing
from benchmarks.peers.adapters.jax_shard_map import JaxShardMap
from benchmarks.peers.adapters.plain_ring import PlainRing
from benchmarks.peers.adapters.ring_attention_pytorch import RingAttentionPytorch
from benchmarks.peers.adapters.ring_flash_attn import RingFlashAttn
from benchmarks.peers.adapters.ringattention_jax import RingattentionJax
from benchmarks.peers.adapters.ringspan_local import RingspanLocal
from benchmarks.peers.adapters.ringspan_native import RingspanNative
from benchmarks.peers.adapters.ringspan_processes import RingspanFloat32Weights, RingspanProcesses
from benchmarks.peers.adapters.torch_context_parallel import TorchContextParallel
from benchmarks.peers.adapters.torch_single import TorchSingle
from benchmarks.peers.adapters.yunchang import YunchangRing, YunchangUlysses
from benchmarks.peers.contract import Peer

BASELINE, NATIVE, RING, LOCAL = TorchSingle(), RingspanNative(), RingspanProcesses(), RingspanLocal()
FLOAT32_WEIGHTS = RingspanFloat32Weights()  # bfloat16 alone
OTHERS: tuple[Peer, ...] = (
    PlainRing(),
    TorchContextParallel(),
    RingAttentionPytorch(),
    YunchangRing(),
    YunchangUlysses(),
    RingFlashAttn(),
    DiffusersRing(),
    DeepSpeedUlysses(),
    RingattentionJax(),
    JaxShardMap(),
)
PEERS = {peer.name: peer for peer in (BASELINE, NATIVE, RING, FLOAT32_WEIGHTS, LOCAL, *OTHERS)}
