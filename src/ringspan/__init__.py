"""ringspan: exact attention over a sequence that is spread over many workers.

The data's way through a call:
  api        checks what the caller passed, and names the group
  call       every rank's check, one exchange of all ranks (agreement), and the decisions, in integers:
             problem (what is asked), layout (who holds which token), schedule (who does what, when)
  execute    runs the schedule; in each step, while a transport moves the next shard,
             a kernel absorbs the present one into the float32 softmax state
  state      is divided out, once: out, lse
"""

from ringspan import masks
from ringspan.api import decode_attention, ring_attention
from ringspan.errors import (
    ArgumentError,
    ArgumentTypeError,
    DisagreementError,
    LayoutError,
    PeerRefusedError,
    RankFailedError,
    RingspanError,
    SharedMemoryFullError,
    UnsupportedError,
    WorkerError,
)
from ringspan.ring import Ring
from ringspan.sharding import positions, shard, unshard
from ringspan.spmd import ring_attention_spmd_bwd, ring_attention_spmd_fwd
from ringspan.trace import trace
from ringspan.transport.local import LocalGroup
from ringspan.transport.run_local import run_local
from ringspan.transport.segments import empty_shared

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "DisagreementError",
    "LayoutError",
    "LocalGroup",
    "PeerRefusedError",
    "RankFailedError",
    "Ring",
    "RingspanError",
    "SharedMemoryFullError",
    "UnsupportedError",
    "WorkerError",
    "decode_attention",
    "empty_shared",
    "masks",
    "positions",
    "ring_attention",
    "ring_attention_spmd_bwd",
    "ring_attention_spmd_fwd",
    "run_local",
    "shard",
    "trace",
    "unshard",
]
