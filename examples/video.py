"""A video model of diffusers whose tokens are spread over a ring: Wan, one step of denoising.

    pip install diffusers
    torchrun --nproc-per-node 4 examples/video.py

The weights are random and small. Hooks cut the tokens up before the first block and put them together after the last;
self-attention goes over the ring, and every rank holds the prompt whole. Nothing is patched, and nothing has to divide:
5 frames of 9 x 7 patches are 315 tokens. Rank 0 compares the result with that of the model in one process.
"""

import copy

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel

import ringspan


class RingAttention:
    """What diffusers asks of an attention processor: states are [B, T, C], rotary_emb (cos, sin) [1, T, 1, D]."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if attention_mask is not None or attn.add_k_proj is not None:
            raise NotImplementedError("no mask, and no image beside the prompt")
        prompt = encoder_hidden_states is not None
        source = encoder_hidden_states if prompt else hidden_states
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        if rotary_emb is not None:
            q, k = (rotated(x, *rotary_emb) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention if prompt else ringspan.ring_attention
        out = attend(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def rotated(x, cos, sin):
    """Neighbouring numbers are a pair; each angle stands twice."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., ::2], sin[..., ::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2).type_as(x)


def spread(model):
    """The same model over the ranks of the default group."""
    model.set_attn_processor(RingAttention())
    model.rope.register_forward_hook(lambda _, __, found: tuple(ringspan.shard(x, 1) for x in found))
    model.blocks[0].register_forward_pre_hook(lambda _, args: (ringspan.shard(args[0], 1), *args[1:]))
    model.blocks[-1].register_forward_hook(lambda _, __, out: ringspan.unshard(out, 1))
    return model


@torch.no_grad()
def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same weights, video and prompt on every rank
    whole = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        ffn_dim=256,
        num_layers=2,
    ).eval()
    video, prompt = torch.randn(1, 4, 5, 18, 14), torch.randn(1, 20, 16)
    model = spread(copy.deepcopy(whole))
    found = model(video, torch.tensor([500]), prompt).sample
    if dist.get_rank() == 0:
        expected = whole(video, torch.tensor([500]), prompt).sample
        error = (found - expected).norm() / expected.norm()
        print(f"{tuple(found.shape)} over {dist.get_world_size()} ranks, differs from one process by {error:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
