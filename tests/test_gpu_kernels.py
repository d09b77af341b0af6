"""The kernels that serve GPUs, on one: the behaviour suite for Triton's, torch's cuDNN and flash, and the reference."""

from itertools import product

import pytest
import torch
from gpu_at_hand import DEVICE, counting

pytest.importorskip("triton", reason="triton is not installed")

import kernel_behaviour
from definition import attention, relative_error, seen_by_intervals
from kernel_behaviour import FLOATS, VISIBLE, KernelBehaviour, assert_forward_exact, backward, forward, make_tile
from triton_tiles import SMALL, state_of

from ringspan.kernels import hopper_kernel, table
from ringspan.kernels.measured import OWN
from ringspan.kernels.reference import Reference
from ringspan.kernels.torch_cuda import LIBRARIES, Library, TorchCuda
from ringspan.kernels.triton_kernel import Triton
from ringspan.kernels.triton_merge import merge_normalised_
from ringspan.state import SoftmaxState
from ringspan.tile import RowIntervals

pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")

HALVES = (torch.bfloat16, torch.float16)
CUDNN, FLASH = LIBRARIES


def needs(library: Library) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not library.is_there(), reason=f"this torch has no {library.name} that may serve")


each_library = pytest.mark.parametrize("library", [pytest.param(x, marks=needs(x), id=x.name) for x in LIBRARIES])


@pytest.fixture(autouse=True)
def on_the_gpu():
    with torch.device(DEVICE):
        yield


class TestTriton(KernelBehaviour):
    """The general kernels, also where those for Hopper would serve."""

    kernel = Triton()
    dtypes = (torch.float32, *HALVES)
    # Every head_dim, storage and length that is new is compiled anew, for seconds.
    head_dims = (3, 64, 128, 256)
    refuses = ((torch.float64, DEVICE, 64), (torch.float32, "meta", 64), (torch.float32, DEVICE, 257))
    rounds_weights = True
    one_in = 7
    device = DEVICE

    @pytest.fixture(autouse=True)
    def not_those_for_hopper(self, monkeypatch):
        monkeypatch.setattr(hopper_kernel, "why_not_there", lambda: "not in this test")

    @pytest.mark.slow
    def test_it_is_exact_for_whatever_comes(self):
        super().test_it_is_exact_for_whatever_comes()


@pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of the Hopper kind")
class TestHopper(KernelBehaviour):
    """Those for Hopper wherever the copy engine can read, few rows and small heads too; the general ones elsewhere."""

    kernel = Triton()
    dtypes = HALVES
    head_dims = (8, 64, 104, 128)
    rounds_weights = True
    steadiness = (2**-8, 2**-8)  # the careful kernels take other blocks, so that weights round to other neighbours
    one_in = 5
    device = DEVICE

    @pytest.fixture(autouse=True)
    def for_every_tile_they_can_take(self, monkeypatch):
        assert hopper_kernel.why_not_there() is None
        monkeypatch.setattr(hopper_kernel, "_FEWEST", 1)
        monkeypatch.setattr(hopper_kernel, "_SMALLEST_HEAD_DIM", 1)

    def test_it_serves_what_it_declares_and_refuses_the_rest(self):
        for dtype, dim in product(FLOATS, (*self.head_dims, 100)):
            x = torch.randn(1, 2, 70, dim).to(dtype)
            assert hopper_kernel.serves(x, x, x, x) == (dtype in HALVES and dim != 100), (dtype, dim)
            assert not hopper_kernel.serves(x, x.mT.contiguous().mT, x), "the copy engine reads whole rows"
        wide = torch.randn(1, 1, 70, 256).to(torch.bfloat16)
        assert hopper_kernel.serves(wide, wide, wide) and not hopper_kernel.serves(wide, wide, wide, wide)

    @pytest.mark.slow
    def test_it_is_exact_for_whatever_comes(self):
        super().test_it_is_exact_for_whatever_comes()


class TestReference(KernelBehaviour):
    """What serves float64 on GPUs, and all that the others decline."""

    kernel = Reference()
    dtypes = FLOATS
    one_in = 13
    device = DEVICE

    @pytest.mark.slow
    def test_it_is_exact_for_whatever_comes(self):
        super().test_it_is_exact_for_whatever_comes()


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning", "ignore:Please use the new:UserWarning")
def test_products_of_the_reference_are_exact_where_the_user_allows_tf32():
    tile = make_tile(RowIntervals(300, 500), heads=4, kv_heads=2, dim=320)
    torch.set_float32_matmul_precision("high")
    try:
        found, grads = forward(Reference(), tile), backward(Reference(), tile)
    finally:
        torch.set_float32_matmul_precision("highest")
    # Only now: the plain formulas that it is measured against would have used TF32 too.
    assert_forward_exact(tile, *found)
    kernel_behaviour.assert_backward_exact(tile, grads)


def forced(library: Library, own=None, fewest: int = 64) -> TorchCuda:
    """That library for every tile it can serve, whatever was measured; small ones too."""
    return TorchCuda(
        own or Reference(),
        (library,),
        choose=lambda capability, dtype, head_dim, num_keys, able: library.name if able else OWN,
        fewest=fewest,
    )


class OfALibrary(KernelBehaviour):
    dtypes = HALVES
    rows_of_minus_infinity_are_nan = True
    head_dims = (8, 64, 128)
    refuses = ((torch.float32, DEVICE, 64), (torch.bfloat16, "cpu", 64), (torch.bfloat16, DEVICE, 100))
    rounds_weights = True
    device = DEVICE

    @pytest.fixture(autouse=True)
    def only_where_a_library_may_serve(self, request):
        # All other kinds are our own kernel's, which has a suite of its own.
        kind = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind", "full")
        if kind not in (None, "full"):
            pytest.skip("never a library's")

    def check(self, tile) -> None:  # backward is our own kernel's
        assert_forward_exact(tile, *forward(self.kernel, tile), self.rounds_weights)

    @pytest.fixture(autouse=True)
    def row_constants_of_the_ring(self, monkeypatch):
        # The suite wants delta from an `out` that was not rounded; this kernel's partial results are.
        of = kernel_behaviour.row_constants
        monkeypatch.setattr(kernel_behaviour, "row_constants", lambda kernel, tile: of(Reference(), tile))

    def test_it_serves_what_it_declares_and_refuses_the_rest(self):
        here = torch.device(DEVICE)
        assert all(self.kernel.declines(dtype, here, dim) is None for dtype in HALVES for dim in self.head_dims)
        for dtype, device, dim in self.refuses:
            assert self.kernel.declines(dtype, torch.device(device), dim), (dtype, device, dim)


@needs(CUDNN)
class TestCudnn(OfALibrary):
    kernel = forced(CUDNN)


@needs(FLASH)
class TestFlash(OfALibrary):
    kernel = forced(FLASH)
    head_dims = (8, 64, 128, 256)


@each_library
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (8, 2, 128), (6, 1, 128)])
def test_each_library_serves_full_tiles_that_are_large_enough(library, dtype, heads, kv_heads, dim):
    tile = make_tile(RowIntervals(2100, 1100), batch=2, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    calls: list[str] = []
    out, lse = forward(forced(counting(library, calls), fewest=256), tile)
    assert_forward_exact(tile, out, lse, rounds_weights=True)
    assert calls == [library.name]


@each_library
def test_heads_that_lie_behind_tokens_are_read_in_place(library):
    """[B, T, H, D] in memory, as most models have it."""
    tile = make_tile(RowIntervals(2100, 300), batch=2, heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16)
    strided = {name: getattr(tile, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v")}
    calls: list[str] = []
    out, lse = forward(forced(counting(library, calls)), tile._replace(**strided))
    assert_forward_exact(tile, out, lse, rounds_weights=True)
    assert calls == [library.name]


# What only a GPU's compiler makes of the kernels


@pytest.mark.parametrize("kind", ["full", "diagonal", "window", "causal documents", "any intervals of each head"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", ["general", "those for this GPU"])
def test_a_tile_of_many_blocks_is_exact(kernels, dtype, dim, kind, monkeypatch):
    """The suite's tiles have few blocks of the size that GPUs take: here the loops over whole ones are long."""
    if kernels == "general":
        monkeypatch.setattr(hopper_kernel, "why_not_there", lambda: "not in this test")
    tile = make_tile(VISIBLE[kind](1300, 1500), batch=2, heads=4, kv_heads=2, dim=dim, dtype=dtype)
    kernel = Triton()
    assert_forward_exact(tile, *forward(kernel, tile), rounds_weights=True)
    kernel_behaviour.assert_backward_exact(tile, backward(kernel, tile), rounds_weights=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", ["diagonal", "documents"])
def test_a_hidden_nan_reaches_nobody(kind, dtype):
    """Of many blocks, as above: those of the GPU's own kernels too, which leave such blocks to the careful ones."""
    tile = make_tile(VISIBLE[kind](700, 700), dim=128, dtype=dtype)
    seen = seen_by_intervals(tile.visible)
    kernel, key, row = Triton(), 500, 100
    clean_out, clean_lse = forward(kernel, tile, torch.float32)
    lse, delta = kernel_behaviour.row_constants(kernel, tile)
    clean = backward(kernel, tile, lse, delta)
    k, v, q, do = (x.clone() for x in (tile.k, tile.v, tile.q, tile.do))
    k[:, :, key], v[:, :, key] = torch.nan, torch.inf
    out, lse_of_nan = forward(kernel, tile._replace(k=k, v=v), torch.float32)
    reached = seen[:, key]
    torch.testing.assert_close(out[:, :, ~reached], clean_out[:, :, ~reached], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(lse_of_nan[:, :, ~reached], clean_lse[:, :, ~reached])
    assert out[:, :, reached].isnan().all() and lse_of_nan[:, :, reached].isnan().all()
    dq, _, _ = backward(kernel, tile._replace(k=k, v=v), lse, delta)
    torch.testing.assert_close(dq[:, :, ~reached], clean[0][:, :, ~reached], rtol=1e-2, atol=1e-3)
    assert dq[:, :, reached].isnan().all()
    q[:, :, row], do[:, :, row] = torch.nan, torch.inf
    _, dk, dv = backward(kernel, tile._replace(q=q, do=do), lse, delta)
    reached = seen[row]
    for mine, expected in ((dk, clean[1]), (dv, clean[2])):
        torch.testing.assert_close(mine[:, :, ~reached], expected[:, :, ~reached], rtol=1e-2, atol=1e-3)
        assert mine[:, :, reached].isnan().all()


@pytest.mark.parametrize(
    ("blocks", "kind"), [("wide", "window"), ("wide", "any intervals of each head"), ("tall", "diagonal")]
)
def test_blocks_of_any_shape_find_the_same_pairs(blocks, kind):
    tile = make_tile(VISIBLE[kind](70, 90), heads=4, kv_heads=2, dim=16)
    tile = tile._replace(visible=tile.visible.heads(slice(0, 1), slice(0, 4)))
    for mine, exact in zip(forward(SMALL[blocks], tile), forward(Reference(), tile), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)
    for mine, exact in zip(backward(SMALL[blocks], tile), backward(Reference(), tile), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


def test_more_than_2_to_the_31_elements_are_addressed():
    num_rows, dim = (1 << 24) + 70, 128  # of q alone, 4 GiB
    q = torch.zeros(1, 1, num_rows, dim, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 1, 40, dim).to(torch.bfloat16).unbind()
    last = slice(num_rows - 64, num_rows)
    q[:, :, last] = torch.randn(1, 1, 64, dim).to(torch.bfloat16)
    state = SoftmaxState.empty(q)
    Triton().absorb(state, q, k, v, RowIntervals(num_rows, 40), dim**-0.5)
    out, _ = state.select(last).finalize(q.dtype)
    exact, _ = attention(q[:, :, last], k, v, seen_by_intervals(RowIntervals(64, 40)), dim**-0.5)
    assert relative_error(out, exact) <= 2.5e-3
    first, _ = state.select(slice(0, 64)).finalize(q.dtype)  # scores of 0: the mean of v
    assert relative_error(first, v.double().mean(2, keepdim=True).expand(1, 1, 64, dim)) <= 2.5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [3, 128])
def test_the_fused_merge_is_the_states_own(dtype, dim):
    mine = state_of(70, dim, blind=slice(0, 20))
    expected = SoftmaxState(mine.acc.clone(), mine.row_max.clone(), mine.row_sum.clone())
    out, lse = torch.randn(2, 3, 70, dim).to(dtype), torch.randn(2, 3, 70)
    out[:, :, 10:30], lse[:, :, 10:30] = 0.0, -torch.inf
    merge_normalised_(mine, out, lse)
    expected.merge_(out, lse)
    for name in ("acc", "row_max", "row_sum"):
        found = getattr(mine, name)
        torch.testing.assert_close(found, getattr(expected, name), rtol=1e-6, atol=1e-6)
        assert not found.isnan().any()


# Which one serves


@pytest.mark.parametrize(
    ("dtype", "head_dim", "name"),
    [
        (torch.bfloat16, 64, "triton"),
        (torch.float16, 100, "triton"),
        (torch.float32, 256, "triton"),
        (torch.float64, 64, "reference"),
        (torch.bfloat16, 257, "reference"),
    ],
)
def test_auto_takes_triton_on_a_gpu_where_it_can(dtype, head_dim, name):
    assert table.choose("auto", dtype, torch.device(DEVICE), head_dim).name == name


@pytest.mark.parametrize(
    ("dtype", "head_dim", "name"),
    [
        (torch.bfloat16, 64, "torch_cuda"),
        (torch.float16, 256, "torch_cuda"),
        (torch.bfloat16, 100, "triton"),
        (torch.float32, 64, "triton"),
        (torch.float64, 64, "reference"),
    ],
)
def test_auto_takes_the_libraries_for_an_only_tile_in_16_bits(dtype, head_dim, name):
    assert table.choose("auto", dtype, torch.device(DEVICE), head_dim, only_tile=True).name == name
