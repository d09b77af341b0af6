"""The reference kernel, and the definition that it and all others are measured by."""

import math

import pytest
import torch
from definition import attention, gradients, relative_error, seen_by_mask
from kernel_behaviour import FLOATS, KernelBehaviour, peak_bytes

from ringspan.kernels.reference import Reference
from ringspan.problem import Mask


class TestReference(KernelBehaviour):
    kernel = Reference()
    dtypes = FLOATS


@pytest.mark.parametrize("mask", [Mask(20, 20, right=0), Mask(20, 33), Mask(20, 20, cu_seqlens=(0, 3, 3, 20))], ids=str)
def test_the_definition_agrees_with_torch_and_its_autograd(mask):
    q, k, v = (
        torch.randn(2, heads, tokens, 5, dtype=torch.float64, requires_grad=True)
        for heads, tokens in ((4, mask.num_queries), (2, mask.num_keys), (2, mask.num_keys))
    )
    seen, scale = seen_by_mask(mask), 0.3
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
    lse = (q @ k.repeat_interleave(2, 1).mT * scale).masked_fill(~seen, -math.inf).logsumexp(-1)
    do, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out * do).sum() + (lse * dlse).sum(), (q, k, v))
    q, k, v = (x.detach() for x in (q, k, v))
    found = (*attention(q, k, v, seen, scale), *gradients(q, k, v, do, dlse, seen, scale))
    for mine, theirs in zip(found, (out.detach(), lse.detach(), *expected), strict=True):
        assert relative_error(mine, theirs) < 1e-14


def test_a_row_that_sees_nothing_has_out_0_and_lse_minus_infinity_by_definition():
    q, k = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    out, lse = attention(q, k, k, torch.tensor([[True, True, True], [False, False, False]]), 1.0)
    assert not out[0, 0, 1].any()
    assert lse[0, 0, 1] == -math.inf


def test_fresh_memory_is_nan_in_every_test():
    assert torch.empty(3).isnan().all()
    assert torch.zeros(3).add(1).new_empty(2, dtype=torch.float64).isnan().all()


def test_the_meter_of_scratch_sees_what_is_alive_at_once():
    megabyte = 1 << 18  # float32 elements
    assert peak_bytes(lambda: torch.zeros(megabyte) + 1) == pytest.approx(2 << 20, rel=0.01)
    assert peak_bytes(lambda: [torch.zeros(megabyte).sum() for _ in range(9)]) == pytest.approx(1 << 20, rel=0.01)
