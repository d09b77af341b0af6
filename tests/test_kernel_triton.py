"""The Triton kernels, on CPU tensors in Triton's interpreter (conftest.py turns it on)."""

import os
from itertools import product

import numpy as np
import pytest
import torch
from kernel_behaviour import (
    BATCH,
    HEADS,
    STORAGES,
    VISIBLE,
    KernelBehaviour,
    backward,
    empty_gradients,
    forward,
    make_tile,
    peak_bytes,
    row_constants,
)

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these are run in Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

import interpreter
import triton
import triton.language as tl
from triton_tiles import SMALL, state_of

from ringspan.kernels.reference import Reference
from ringspan.kernels.table import choose
from ringspan.kernels.triton_bounds import bounds
from ringspan.kernels.triton_kernel import Triton
from ringspan.kernels.triton_merge import merge_normalised_
from ringspan.kernels.triton_ranges import row_ranges
from ringspan.state import SoftmaxState

# NumPy warns of what the interpreter computes with NaN and inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    interpreter.hurry(monkeypatch)


class TestTriton(KernelBehaviour):
    kernel = Triton()
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    refuses = ((torch.float64, "cpu", 64), (torch.float32, "meta", 64), (torch.float32, "cpu", 257))
    rounds_weights = True
    one_in = 47

    @pytest.mark.slow
    def test_it_is_exact_for_whatever_comes(self):
        super().test_it_is_exact_for_whatever_comes()

    @pytest.mark.slow
    def test_the_error_does_not_grow_with_the_number_of_pieces(self):
        super().test_the_error_does_not_grow_with_the_number_of_pieces()

    @pytest.mark.parametrize("kind", ["full", "diagonal", "any intervals"])
    def test_scratch_stays_within_the_bound(self, kind):
        """The interpreter's own memory is not the kernel's; of the kernel's there is none but bounds on their way."""
        tile = make_tile(VISIBLE[kind](300, 200), dim=64, dtype=torch.bfloat16)
        state = SoftmaxState.empty(tile.q)
        call = lambda: self.kernel.absorb(state, tile.q, tile.k, tile.v, tile.visible, tile.scale)  # noqa: E731
        assert peak_bytes(call) <= 300 * 2 * 4 + 64


FAST = {("wide", "window"), ("wide", "any intervals of each head"), ("tall", "diagonal"), ("tall", "causal documents")}


@pytest.mark.parametrize(
    ("blocks", "kind"),
    [
        pytest.param(blocks, kind, marks=() if (blocks, kind) in FAST else pytest.mark.slow)
        for blocks, kind in product(SMALL, VISIBLE)
    ],
)
def test_blocks_of_any_shape_find_the_same_pairs(blocks, kind):
    """With many small blocks most are whole or skipped, which the large ones of the interpreter never are."""
    tile = make_tile(VISIBLE[kind](70, 90), heads=4, kv_heads=2, dim=16)
    tile = tile._replace(visible=tile.visible.heads(slice(0, 1), slice(0, 4)))
    out, lse = forward(Reference(), tile)
    for mine, exact in zip(forward(SMALL[blocks], tile), (out, lse), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)
    for mine, exact in zip(backward(SMALL[blocks], tile), backward(Reference(), tile), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["k", "v", "q", "do"])
@pytest.mark.parametrize("kind", ["diagonal", "documents with a window"])
def test_nan_in_one_block_of_many_reaches_only_what_sees_it(kind, where):
    tile = make_tile(VISIBLE[kind](70, 90), heads=2, dim=16)
    getattr(tile, where)[0, 0, 41, 3] = np.nan
    kernel, exact = SMALL["wide"], Reference()
    lse, delta = torch.zeros(1, 2, 70), torch.zeros(1, 2, 70)
    for mine, expected in zip(forward(kernel, tile), forward(exact, tile), strict=True):
        assert torch.equal(mine.isnan().view(1, 2, 70, -1).any(-1), expected.isnan().view(1, 2, 70, -1).any(-1))
    for mine, expected in zip(backward(kernel, tile, lse, delta), backward(exact, tile, lse, delta), strict=True):
        assert torch.equal(mine.isnan().any(-1), expected.isnan().any(-1))


def test_no_integer_of_the_kernels_overflows():
    tile = make_tile(VISIBLE["window"](40, 50), heads=2, dim=16)
    with pytest.MonkeyPatch.context() as patch:
        interpreter.hurry(patch, check_overflow=True)
        forward(SMALL["wide"], tile), backward(SMALL["wide"], tile)


def test_auto_never_takes_the_interpreter():
    assert choose("auto", torch.float32, torch.device("cpu"), 64).name != "triton"
    assert choose("triton", torch.float32, torch.device("cpu"), 64).name == "triton"


def test_without_the_interpreter_cpu_tensors_are_declined(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    reason = Triton().declines(torch.float32, torch.device("cpu"), 64)
    assert reason is not None and "TRITON_INTERPRET=1" in reason


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)])
def test_gpus_from_ampere_on_are_served(monkeypatch, capability, served):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reason = Triton().declines(torch.bfloat16, torch.device("cuda"), 64)
    assert reason is None if served else "compute capability 8.0" in reason


# What the kernels work around in Triton's interpreter. When one of these fails, the way around it can go.


@triton.jit
def _product(a, b, out):
    index = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + index, tl.dot(tl.load(a + index), tl.load(b + index)))


@triton.jit
def _narrowed(x, out):
    index = tl.arange(0, 16)
    tl.store(out + index, tl.load(x + index).to(tl.bfloat16).to(tl.float32))


@pytest.mark.parametrize(("dtype", "right"), [(torch.float32, True), (torch.float16, True), (torch.bfloat16, False)])
def test_the_interpreter_multiplies_bfloat16_wrongly(dtype, right):
    a, b, out = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.zeros(16, 16)
    _product[(1,)](a, b, out)
    assert torch.allclose(out, a.float() @ b.float(), rtol=1e-3, atol=1e-3) == right


def test_the_interpreter_cuts_bfloat16_off():
    x, out = torch.full((16,), 1 + 2**-7 - 2**-12), torch.zeros(16)
    _narrowed[(1,)](x, out)
    assert (out == 1.0).all() and (x.bfloat16() == 1 + 2**-7).all()


# The fused merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [3, 64])
@pytest.mark.parametrize("storage", STORAGES)
def test_the_fused_merge_is_the_states_own(dtype, dim, storage):
    mine = state_of(70, dim, blind=slice(0, 20))
    expected = SoftmaxState(mine.acc.clone(), mine.row_max.clone(), mine.row_sum.clone())
    out, lse = torch.randn(2, 3, 70, dim).to(dtype), torch.randn(2, 3, 70)
    out[:, :, 10:30], lse[:, :, 10:30] = 0.0, -torch.inf
    out = STORAGES[storage](out)
    merge_normalised_(mine, out, lse)
    expected.merge_(out, lse)
    for name in ("acc", "row_max", "row_sum"):
        found = getattr(mine, name)
        torch.testing.assert_close(found, getattr(expected, name), rtol=1e-6, atol=1e-6)
        assert not found.isnan().any()
    assert torch.isneginf(mine.row_max[:, :, 10:20]).all() and not mine.row_sum[:, :, 10:20].any()


def test_the_fused_merge_takes_a_part_of_a_state_and_no_rows_at_all():
    whole = state_of(50, 16, blind=slice(0, 0))
    before = whole.acc.clone()
    merge_normalised_(whole.select(slice(10, 20)), torch.randn(2, 3, 10, 16), torch.randn(2, 3, 10))
    merge_normalised_(whole.select(slice(10, 10)), torch.randn(2, 3, 0, 16), torch.randn(2, 3, 0))
    changed = (whole.acc != before).any(-1)
    assert changed[:, :, 10:20].all() and not changed[:, :, :10].any() and not changed[:, :, 20:].any()


@pytest.mark.parametrize(
    "kind",
    [
        "causal documents",
        "documents with a window",
        "any intervals",
        "any intervals of each head",
        "any intervals of each batch entry",
    ],
)
@pytest.mark.parametrize(("key_block", "row_block"), [(16, 8), (128, 64)])
def test_row_ranges_hold_all_rows_that_see_a_block_of_keys(kind, key_block, row_block):
    known = bounds(VISIBLE[kind](301, 190), torch.device("cpu"))
    group = 2 if known.lo.ndim == 3 and known.lo.shape[1] > 1 else 1
    found = row_ranges(known.lo, known.hi, 190, group, key_block, row_block)
    lo, hi = (x.numpy().reshape(-1, group, 301) for x in (known.lo, known.hi))
    blocks = np.arange(0, 301, row_block)
    for mine, ranges in enumerate(found.flatten(0, 1).tolist()):
        for key, (begin, full_begin, full_end, end) in zip(range(0, 190, key_block), ranges, strict=True):
            stop = min(key + key_block, 190)
            sees = ((lo[mine] < stop) & (hi[mine] > key) & (lo[mine] < hi[mine])).any(0)
            whole = ((lo[mine] <= key) & (hi[mine] >= stop)).all(0)
            touched = [b for b, first in enumerate(blocks) if sees[first : first + row_block].any()]
            assert (begin, end) == ((touched[0], touched[-1] + 1) if touched else (begin, begin))
            assert begin <= full_begin <= full_end <= end
            assert all(whole[blocks[b] : blocks[b] + row_block].all() for b in range(full_begin, full_end))


def test_row_ranges_find_the_blocks_that_see_all():
    """A document of 10 blocks, causal: what comes after the keys' own block and before the document's last."""
    edges = torch.tensor([0] * 40 + [40] * 160, dtype=torch.int32), torch.arange(1, 201, dtype=torch.int32)
    found = row_ranges(*edges, 200, 1, 16, 16)[0, 0].tolist()
    assert found[0] == [0, 1, 2, 3]
    assert found[4] == [4, 5, 12, 13]


@pytest.mark.parametrize("kind", ["diagonal", "any intervals of each head"])
def test_flagged_blocks_are_taken_in_and_no_others(kind):
    """As the kernels for Hopper leave them: blocks of 64 rows or keys in which a hidden NaN may have come."""
    tile = make_tile(VISIBLE[kind](150, 140), batch=BATCH, heads=HEADS, kv_heads=2, dim=16)
    known, inputs = bounds(tile.visible, torch.device("cpu")), (tile.q, tile.k, tile.v)
    of_rows, of_keys = torch.randint(2, (BATCH, HEADS, 3)).int(), torch.randint(2, (BATCH, 2, 3)).int()
    assert 0 < of_rows.sum() < of_rows.numel() and 0 < of_keys.sum() < of_keys.numel()
    rows = of_rows.bool().repeat_interleave(64, 2)[..., :150, None]
    keys = of_keys.bool().repeat_interleave(64, 2)[..., :140, None]

    full, flagged = SoftmaxState.empty(tile.q), SoftmaxState.empty(tile.q)
    kernel = Triton()
    kernel.absorb(full, *inputs, tile.visible, tile.scale)
    kernel._absorb(flagged, *inputs, known, tile.scale * np.log2(np.e), False, of_rows)
    expected = torch.where(rows, full.finalize(tile.q.dtype)[0], 0.0)
    torch.testing.assert_close(flagged.finalize(tile.q.dtype)[0], expected, rtol=1e-5, atol=1e-5)

    lse, delta = row_constants(kernel, tile)
    found = empty_gradients(tile)
    kernel._absorb_gradient(*found, *inputs, tile.do, lse, delta, known, tile.scale, (of_keys, of_rows))
    for mine, whole, chosen in zip(found, backward(kernel, tile, lse, delta), (rows, keys, keys), strict=True):
        torch.testing.assert_close(mine, torch.where(chosen, whole, 0.0), rtol=1e-4, atol=1e-5)
