import torch
import torch.distributed as dist

import ringspan

dist.init_process_group("gloo")  # every rank of the default group is a rank of the ring
ring, tokens = ringspan.Ring("zigzag"), 8192

torch.manual_seed(0)  # here every rank makes the same sequence and keeps its own shard
x = ring.shard(torch.randn(1, tokens, 256), dim=1)
where = ring.positions(tokens)  # global positions of this rank's tokens, for RoPE and the like
to_qkv = torch.nn.Linear(256, 3 * 256)

q, k, v = to_qkv(x).unflatten(-1, (3, 4, 64)).permute(2, 0, 3, 1, 4)  # each [batch, heads, tokens of this rank, 64]
out = ring.attention(q, k, v, causal=True)
(out.square().sum() / tokens).backward()  # every rank: a sum over its tokens / the number of tokens of all ranks
for weight in to_qkv.parameters():
    dist.all_reduce(weight.grad)  # gradients of weights are summed over the ranks
print(f"rank {dist.get_rank()}: positions {where[0]}..{where[-1]}, out {tuple(out.shape)}\n", end="")  # in one write
