"""The reference kernel, and the definition that it and all others are measured by."""

import math

import pytest
import torch
from definition import attention, gradients, relative_error, seen_by_mask
from kernel_behaviour import FLOATS, KernelBehaviour, assert_forward_exact, backward, forward, make_tile, peak_bytes

from ringspan.kernels import reference
from ringspan.kernels.reference import Reference
from ringspan.problem import Mask
from ringspan.tile import Band, RowIntervals


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


@pytest.fixture
def tf32(monkeypatch):
    """As on a GPU where the user allows TF32. Gives the dtypes of all products."""
    dtypes, matmul = set(), torch.matmul
    monkeypatch.setattr(reference, "_rounds", lambda dtype, device: dtype == torch.float32)
    monkeypatch.setattr(torch, "matmul", lambda a, b: dtypes.update((a.dtype, b.dtype)) or matmul(a, b))
    return dtypes


@pytest.mark.parametrize("bad", [None, math.nan])
def test_products_are_exact_where_the_user_allows_tf32(tf32, bad):
    tile = make_tile(RowIntervals(63, 129, Band(upper=40)), heads=4, kv_heads=2, dim=320)
    if bad is not None:
        tile.v[0, 1, 128, 3] = bad  # which no row sees
    out, lse = forward(Reference(), tile)
    found = backward(Reference(), tile)
    assert tf32 == {torch.float64}
    assert_forward_exact(tile._replace(v=tile.v.nan_to_num()), out, lse)
    TestReference().check_gradients(tile._replace(v=tile.v.nan_to_num()), found)
    assert all(x.dtype == torch.float32 for x in (out, lse, *found))


@pytest.mark.parametrize("shape", [(2048, 2048, 8, 8, 64), (1024, 512, 64, 1, 128), (512, 512, 4, 4, 512)])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_scratch_stays_within_the_bound_where_the_user_allows_tf32(tf32, kind, shape):
    TestReference().test_scratch_stays_within_the_bound(kind, shape)
    assert tf32 == {torch.float64}


def test_whether_tf32_is_allowed_is_asked_of_every_way_to_allow_it():
    matmul, gpu = torch.backends.cuda.matmul, torch.device("cuda")
    rounds, before = lambda: reference._rounds(torch.float32, gpu), matmul.fp32_precision
    try:
        for precision in ("high", "highest"):
            torch.set_float32_matmul_precision(precision)
            assert rounds() == (precision == "high")
        for allowed in (True, False):
            matmul.allow_tf32 = allowed
            assert rounds() == allowed
        matmul.fp32_precision = "tf32"  # torch refuses to tell the older settings then
        assert rounds()
        assert not reference._rounds(torch.float64, gpu)
        assert not reference._rounds(torch.float32, torch.device("cpu"))
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before
