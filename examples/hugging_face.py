"""A Hugging Face model whose sequence is spread over a ring.

    pip install transformers
    torchrun --nproc-per-node 4 examples/hugging_face.py gpt_oss        # sinks, sliding windows, grouped heads
    torchrun --nproc-per-node 4 examples/hugging_face.py deepseek_v3    # latent attention: values shorter than keys

The weights are random and small. The sequence is packed: two documents that do not see each other. Every rank computes
the loss of its own tokens; its sum over ranks, and that of the gradients, are those of one process, which rank 0
computes too: each document by itself, with the model's own attention.
"""

import argparse
import copy
import itertools

import torch
import torch.distributed as dist
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
)

import ringspan

LAYOUT = "zigzag"
DOCUMENTS = (0, 389, 1024)
# What models pass along that changes nothing here; all else is refused.
HARMLESS = {"position_ids", "use_cache", "output_router_logits", "shift_labels", "num_items_in_batch"}

SMALL = dict(vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, attn_implementation="eager")
CONFIGS = {
    "gpt_oss": GptOssConfig(
        num_attention_heads=8, num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"], sliding_window=100, **SMALL,
    ),
    "deepseek_v3": DeepseekV3Config(
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
        moe_intermediate_size=32, first_k_dense_replace=1, **SMALL,
    ),
}  # fmt: skip


def ring_attention(
    module,
    q,
    k,
    v,
    attention_mask,
    *,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    s_aux=None,
    cu_seqlens=None,
    key_ranges=None,
    **others,
):
    """What transformers asks of an attention function: q, k, v are [B, H, T, D], out is [B, T, H, D].

    A model hands on what it is called with: cu_seqlens and key_ranges come so.
    """
    unknown = sorted(name for name, x in others.items() if name not in HARMLESS and x is not None and x is not False)
    if attention_mask is not None or dropout or unknown:
        raise NotImplementedError(f"no masks but causal ones and windows, no dropout, and not {unknown}")
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)  # theirs counts the query's own key
    masks = dict(causal=module.is_causal, window_size=window, cu_seqlens=cu_seqlens, key_ranges=key_ranges)
    out = ringspan.ring_attention(q, k, v, **masks, softmax_scale=scaling, sinks=s_aux, layout=LAYOUT)
    return out.transpose(1, 2).contiguous(), None


def no_mask(*_, attention_mask=None, **__):
    """What transformers asks for a mask, and without which it would drop one of padded tokens silently."""
    if attention_mask is not None and not attention_mask.all():
        raise NotImplementedError("no attention_mask: pack documents and pass cu_seqlens, or pass key_ranges")


def loss_of(model, tokens, labels, positions, **masks):
    """These tokens' part of the mean over all, by the model's own loss, which would shift labels within a shard."""
    own = dict(labels=labels, shift_labels=labels, num_items_in_batch=DOCUMENTS[-1])
    return model(input_ids=tokens, position_ids=positions, use_cache=False, **own, **masks).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=CONFIGS, nargs="?", default="gpt_oss")
    chosen = parser.parse_args().model
    dist.init_process_group("gloo")
    AttentionInterface.register("ringspan", ring_attention)
    AttentionMaskInterface.register("ringspan", no_mask)
    torch.manual_seed(0)  # the same weights and the same text on every rank
    model = AutoModelForCausalLM.from_config(CONFIGS[chosen])
    text = torch.randint(256, (1, 1025))
    tokens, labels = text[:, :-1], text[:, 1:]  # shifted before they are spread: a neighbour may be elsewhere
    positions = torch.cat([torch.arange(stop - start) for start, stop in itertools.pairwise(DOCUMENTS)]).unsqueeze(0)

    whole = copy.deepcopy(model)
    model.set_attn_implementation("ringspan")
    mine = [ringspan.shard(x, 1, layout=LAYOUT) for x in (tokens, labels, positions)]
    loss = loss_of(model, *mine, cu_seqlens=DOCUMENTS)
    loss.backward()
    used = [x for x in model.parameters() if x.requires_grad]
    for parameter in used:
        if parameter.grad is None:  # an expert that no token of this rank was sent to
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    dist.all_reduce(loss)

    if dist.get_rank() == 0:
        documents = [slice(*ends) for ends in itertools.pairwise(DOCUMENTS)]
        expected = sum(loss_of(whole, *(x[:, one] for x in (tokens, labels, positions))) for one in documents)
        expected.backward()
        pairs = zip(used, (x for x in whole.parameters() if x.requires_grad), strict=True)
        furthest = max(float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in pairs)
        print(f"loss {loss:.6f} over {dist.get_world_size()} ranks, {expected:.6f} in one process")
        print(f"gradients of {len(used)} parameters differ by {furthest:.1e} at most")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
