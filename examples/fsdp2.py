"""A decoder trained with FSDP2: its weights are spread over all ranks, each sequence over the ring of its replica.

    torchrun --nproc-per-node 4 examples/fsdp2.py    # on CPUs: 2 replicas, each a ring of 2

The weights are random and small. Each replica packs documents of its own, in each step others. Rank 0 does the same in
one process, each document by itself with torch's attention, and compares losses and gradients.
"""

import copy
import functools
import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import ringspan

LAYOUT, NOTHING = "zigzag", -100  # NOTHING: the label of a token after which nothing is predicted
WIDTH, HEADS, KV_HEADS, HEAD_DIM = 64, 8, 2, 16
PACKS = [[(0, 389, 1000), (0, 5, 700, 701)], [(0, 611), (0, 300, 512, 1023)]]  # cu_seqlens by step and replica
# The backward computes a block once more, but for its attention: the ring's forward runs once.
KEEP_ATTENTION = functools.partial(create_selective_checkpoint_contexts, [torch.ops.ringspan.attend.default])


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = torch.nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(WIDTH, 128), torch.nn.SiLU(), torch.nn.Linear(128, WIDTH))

    def forward(self, x, positions, attend):
        qkv = self.qkv(F.rms_norm(x, (WIDTH,))).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], 1)
        x = x + self.out(attend(rotated(q, positions), rotated(k, positions), v).transpose(1, 2).flatten(2))
        return x + self.mlp(F.rms_norm(x, (WIDTH,)))


class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(256, WIDTH), torch.nn.Linear(WIDTH, 256, bias=False)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))

    def forward(self, tokens, positions, attend):
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, positions, attend, use_reentrant=False, context_fn=KEEP_ATTENTION)
        return self.head(x)


def rotated(x, positions):
    angles = positions[:, None] / 10_000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    (a, b), cos, sin = x.chunk(2, -1), angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def labels_of(tokens, cu_seqlens):
    """The next token of the whole sequence; in a shard the neighbour may be missing."""
    labels = tokens.roll(-1, 1)
    labels[:, torch.tensor(cu_seqlens[1:]) - 1] = NOTHING  # the last of each document
    return labels


def sum_of_losses(model, tokens, labels, positions, attend):
    logits = model(tokens, positions, attend)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NOTHING, reduction="sum")


def loss_over_ring(model, tokens, cu_seqlens, mesh):
    """This rank's part of the mean over the tokens of all replicas."""
    ring = ringspan.Ring(LAYOUT, mesh["context"], torch.tensor(cu_seqlens))
    labels = labels_of(tokens, cu_seqlens)
    num_predicted = (labels != NOTHING).sum()
    dist.all_reduce(num_predicted, group=mesh.get_group("data"))
    mine = (ring.shard(x, 1) for x in (tokens, labels))
    attend = functools.partial(ring.attention, causal=True)
    # Positions begin at 0 in each document.
    return sum_of_losses(model, *mine, ring.positions(tokens.shape[1]), attend) / num_predicted


def loss_in_one_process(model, texts, packs):
    attend = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    documents = [x[:, slice(*ends)] for x, pack in zip(texts, packs, strict=True) for ends in itertools.pairwise(pack)]
    each = [(x, labels_of(x, (0, x.shape[1])), torch.arange(x.shape[1])) for x in documents]
    return sum(sum_of_losses(model, *one, attend) for one in each) / sum(x.shape[1] - 1 for x in documents)


def main() -> None:
    dist.init_process_group("gloo")
    num_ranks = dist.get_world_size()
    replicas = 2 if num_ranks % 2 == 0 else 1
    mesh = init_device_mesh("cpu", (replicas, num_ranks // replicas), mesh_dim_names=("data", "context"))
    everybody = init_device_mesh("cpu", (num_ranks,))
    torch.manual_seed(0)  # the same weights on every rank
    whole = Decoder()
    model = copy.deepcopy(whole)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=everybody)
    optimizers = [torch.optim.AdamW(x.parameters(), lr=1e-3) for x in (model, whole)]

    for packs in (step[:replicas] for step in PACKS):
        texts = [torch.randint(256, (1, pack[-1])) for pack in packs]  # of these a replica needs its own only
        mine = mesh.get_local_rank("data")
        loss = loss_over_ring(model, texts[mine], packs[mine], mesh)
        (loss * num_ranks).backward()  # FSDP2 averages gradients over all ranks; they are to be summed
        dist.all_reduce(loss)
        gradients = [x.grad.full_tensor() for x in model.parameters()]
        if dist.get_rank() == 0:
            expected = loss_in_one_process(whole, texts, packs)
            expected.backward()
            pairs = zip(gradients, (x.grad for x in whole.parameters()), strict=True)
            furthest = max(float((a - b).norm() / b.norm()) for a, b in pairs)
            print(f"loss {loss:.6f} over {replicas} x {num_ranks // replicas} ranks, {expected:.6f} in one process")
            print(f"gradients of {len(gradients)} parameters differ by {furthest:.1e} at most")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
