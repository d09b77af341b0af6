"""A model of Hugging Face that generates from a long prompt whose keys and values stay spread over a ring.

    pip install transformers
    torchrun --nproc-per-node 4 examples/generate.py

The weights are random and small. The prompt goes over the ring once, and each rank keeps the keys and values that it
made of its own tokens. Then `generate` runs as ever, on every rank alike: each asks the keys that it has, and one
exchange a layer puts the answers together. The ranks take turns to keep the new key. Nothing is patched. Rank 0
compares with one process.

A prompt needs more tokens than there are ranks, for these models do not run on none.
"""

import copy
import functools

import torch
import torch.distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig, LlamaForCausalLM

import ringspan

NUM_TOKENS, NUM_NEW = 1001, 24
HARMLESS = {"position_ids", "use_cache"}  # what models pass along that changes nothing here; all else is refused
CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, initializer_range=0.2, eos_token_id=None,
)  # fmt: skip


def over_prompt(q, k, v, **options):
    return ringspan.ring_attention(q, k, v, causal=True, layout="zigzag", **options)


def over_cache(q, k, v, **options):
    """Of one new token, which every rank has. It sees every key, so which rank has which does not matter."""
    if q.shape[2] != 1:
        raise NotImplementedError("one new token at a time")
    return ringspan.decode_attention(q, k, v, **options)


def attention(over, module, q, k, v, attention_mask, *, scaling=None, dropout=0.0, **others):
    """What transformers asks of an attention function: q, k, v are [B, H, T, D], out is [B, T, H, D]."""
    unknown = sorted(name for name, x in others.items() if name not in HARMLESS and x is not None and x is not False)
    if attention_mask is not None or dropout or unknown:
        raise NotImplementedError(f"no mask, no dropout, and not {unknown}")
    return over(q, k, v, softmax_scale=scaling).transpose(1, 2), None


def no_mask(*_, attention_mask=None, **__):
    if attention_mask is not None and not attention_mask.all():
        raise NotImplementedError("no attention_mask: prompts of one length")


class SpreadCache(DynamicCache):
    """The keys and values that this rank keeps. Its length, by which new tokens are numbered, is that of all ranks."""

    num_tokens = 0  # until the prompt is through: of that, a rank keeps all that it makes

    def get_seq_length(self, layer_idx=0):
        return self.num_tokens

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.num_tokens:
            self.num_tokens += layer_idx == 0
            kept = int(self.num_tokens % dist.get_world_size() == dist.get_rank())
            key_states, value_states = key_states[:, :, :kept], value_states[:, :, :kept]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def generate(model, prompt, cache=None):
    return model.generate(
        prompt, cache=cache, max_new_tokens=NUM_NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
    )


@torch.no_grad()
def main() -> None:
    dist.init_process_group("gloo")
    for over in (over_prompt, over_cache):
        AttentionInterface.register(over.__name__, functools.partial(attention, over))
        AttentionMaskInterface.register(over.__name__, no_mask)
    torch.manual_seed(0)  # the same weights and the same prompts on every rank
    whole = LlamaForCausalLM(CONFIG).eval()
    prompts = torch.randint(256, (2, NUM_TOKENS))

    model, cache = copy.deepcopy(whole), SpreadCache()
    model.set_attn_implementation("over_prompt")
    before = prompts[:, :-1]  # `generate` begins with the last token
    tokens, positions = (ringspan.shard(x, 1, layout="zigzag") for x in (before, torch.arange(before.shape[1])[None]))
    model(tokens, position_ids=positions, cache=cache, logits_to_keep=1)
    cache.num_tokens = before.shape[1]
    model.set_attn_implementation("over_cache")
    found = generate(model, prompts, cache)

    kept = ringspan.unshard(torch.tensor([cache.layers[0].keys.shape[2]]), 0).tolist()  # one after another
    logits = ringspan.unshard(torch.stack(found.logits)[None], 0)
    if dist.get_rank() == 0:
        expected = generate(whole, prompts)
        same, exact = (found.sequences == expected.sequences)[:, NUM_TOKENS:], torch.stack(expected.logits)
        error = max((one - exact).norm() / exact.norm() for one in logits)
        print(f"{same.sum()} of {same.numel()} tokens over {len(kept)} ranks are those of one process")
        print(f"keys kept {kept}, logits differ by {error:.1e} at most")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
