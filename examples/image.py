"""An image model of diffusers whose tokens are spread over a ring: Flux, where text and image attend to each other.

    pip install diffusers
    torchrun --nproc-per-node 4 examples/image.py

The weights are random and small. A hook cuts up the text, the image and the positions of both, another puts the image
together in the end; between them every rank has a part of each. Without a mask the order of keys does not matter, so
a rank's text beside its image is its shard. Nothing is patched, and nothing has to divide: 21 tokens of text, 9 x 7 of
an image. Rank 0 compares the result with that of the model in one process.
"""

import copy

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb

import ringspan


class RingAttention:
    """What diffusers asks of an attention processor. States are [B, T, C]; the first blocks have the text apart."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        if attention_mask is not None:
            raise NotImplementedError("no mask")
        text, image = encoder_hidden_states, hidden_states
        parts = [in_heads(attn, image, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)]
        if text is not None:
            own = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
            parts.insert(0, in_heads(attn, text, *own))
        q, k, v = (torch.cat(x, 2) for x in zip(*parts, strict=True))
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=2) for x in (q, k))
        out = ringspan.ring_attention(q, k, v).transpose(1, 2).flatten(2)
        if text is None:
            return out
        text, image = out.split([text.shape[1], image.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def in_heads(attn, x, to_q, to_k, to_v, norm_q, norm_k):
    q, k, v = (to(x).unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for to in (to_q, to_k, to_v))
    return norm_q(q), norm_k(k), v


def cut(model, args, inputs):
    """What has a value for each token, by name and dimension."""
    dims = dict(hidden_states=1, encoder_hidden_states=1, img_ids=0, txt_ids=0)
    return args, inputs | {name: ringspan.shard(inputs[name], dim) for name, dim in dims.items()}


def spread(model):
    """The same model over the ranks of the default group; its inputs are passed by name."""
    model.set_attn_processor(RingAttention())
    model.register_forward_pre_hook(cut, with_kwargs=True)
    model.proj_out.register_forward_hook(lambda _, __, out: ringspan.unshard(out, 1))
    return model


@torch.no_grad()
def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same weights, image and text on every rank
    whole = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    ).eval()
    height, width, num_words = 9, 7, 21
    where = torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
    inputs = dict(
        hidden_states=torch.randn(1, height * width, 16),
        encoder_hidden_states=torch.randn(1, num_words, 64),
        pooled_projections=torch.randn(1, 32),
        timestep=torch.tensor([0.5]),
        img_ids=where,
        txt_ids=torch.zeros(num_words, 3),
    )
    found = spread(copy.deepcopy(whole))(**inputs).sample
    if dist.get_rank() == 0:
        expected = whole(**inputs).sample
        error = (found - expected).norm() / expected.norm()
        print(f"{tuple(found.shape)} over {dist.get_world_size()} ranks, differs from one process by {error:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
