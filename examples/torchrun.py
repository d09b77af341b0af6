import torch
import torch.distributed as dist

import ringspan

dist.init_process_group("gloo")  # every rank of the default group is a rank of the ring
tokens, layout = 8192, "zigzag"

torch.manual_seed(0)  # here every rank makes the same sequence and keeps its own shard
x = ringspan.shard(torch.randn(1, tokens, 256), dim=1, layout=layout)
where = ringspan.positions(tokens, layout=layout)  # global positions of this rank's tokens, for RoPE and the like
to_qkv = torch.nn.Linear(256, 3 * 256)

q, k, v = to_qkv(x).unflatten(-1, (3, 4, 64)).permute(2, 0, 3, 1, 4)  # each [batch, heads, tokens of this rank, 64]
out = ringspan.ring_attention(q, k, v, causal=True, layout=layout)
out.square().mean().backward()  # every rank calls backward; then reduce weight gradients over ranks as usual
print(f"rank {dist.get_rank()}: positions {where[0]}..{where[-1]}, out {tuple(out.shape)}")
