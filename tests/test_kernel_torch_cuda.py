"""torch's attention on GPUs: its ops as the schemas have them, and around stand-ins that round as they do, on a CPU."""

import warnings

import kernel_behaviour
import pytest
import torch
from definition import attention, bound_of_out, relative_error
from kernel_behaviour import KernelBehaviour, assert_forward_exact, forward, make_tile, peak_bytes
from torch._subclasses import FakeTensorMode

import ringspan
from ringspan.kernels import measured, table, torch_cuda
from ringspan.kernels.contract import SCRATCH_BYTES
from ringspan.kernels.measured import OWN, Measurement
from ringspan.kernels.reference import Reference
from ringspan.kernels.torch_cuda import LIBRARIES, Library, TorchCuda, serving
from ringspan.state import SoftmaxState
from ringspan.tile import Band, RowIntervals

HOPPER, AMPERE, BLACKWELL = (9, 0), (8, 0), (10, 0)
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # Many small operations: threads that wait for each other would cost more than they save.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class StandIn:
    """Attention on a CPU that returns what the op on a GPU would: weights and out rounded, out as [B, T, H, D] lies."""

    def __init__(self) -> None:
        self.shapes: list[tuple[torch.Size, torch.Size]] = []

    def __call__(self, q, k, v, scale):
        assert scale > 0 and all(torch_cuda._is_ready(x) for x in (q, k, v))
        assert q.shape[2] and k.shape[2] and k.shape[1] == v.shape[1]
        self.shapes.append((q.shape, k.shape))
        group = q.shape[1] // k.shape[1]
        grouped = q.float().unflatten(1, (-1, group))
        scores = grouped @ k.float().unsqueeze(2).mT * scale
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        out = weights.to(q.dtype).float() @ v.float().unsqueeze(2) / weights.sum(-1, keepdim=True)
        out = out.flatten(1, 2).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        return out, scores.logsumexp(-1).flatten(1, 2)


def make_kernel(attend=None, chosen="cudnn", fewest=1, own=None, capability=HOPPER) -> TorchCuda:
    """The kernel for GPUs, over CPU tensors. chosen: what the table of measurements says."""
    return TorchCuda(
        own or Reference(),
        (Library("cudnn", 128, attend or StandIn()), Library("flash", 256, attend or StandIn())),
        choose=lambda capability, dtype, head_dim, num_keys, able: chosen if chosen in able else OWN,
        device_type="cpu",
        capability=lambda device: capability,
        fewest=fewest,
    )


class TestTorchCuda(KernelBehaviour):
    kernel = make_kernel(chosen="flash")
    dtypes = HALVES
    rows_of_minus_infinity_are_nan = True
    head_dims = (8, 16, 64, 128, 256)
    refuses = (
        (torch.float32, "cpu", 64),
        (torch.bfloat16, "meta", 64),
        (torch.bfloat16, "cpu", 100),
        (torch.bfloat16, "cpu", 264),
    )

    @pytest.fixture(autouse=True)
    def only_where_a_library_may_serve(self, request):
        # All other kinds are our own kernel's, which has a suite of its own.
        kind = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind", "full")
        if kind not in (None, "full", "diagonal"):
            pytest.skip("never a library's")

    def check(self, tile) -> None:  # backward is our own kernel's
        assert_forward_exact(tile, *forward(self.kernel, tile))

    @pytest.fixture(autouse=True)
    def row_constants_of_the_ring(self, monkeypatch):
        # The suite wants delta from an `out` that was not rounded; this kernel's partial results are.
        of = kernel_behaviour.row_constants
        monkeypatch.setattr(kernel_behaviour, "row_constants", lambda kernel, tile: of(Reference(), tile))

    def test_it_serves_what_it_declares_and_refuses_the_rest(self):
        cpu = torch.device("cpu")
        assert all(self.kernel.declines(dtype, cpu, dim) is None for dtype in HALVES for dim in self.head_dims)
        for dtype, device, dim in self.refuses:
            assert self.kernel.declines(dtype, torch.device(device), dim), (dtype, device, dim)

    def test_scratch_stays_within_the_bound(self):
        # The stand-in's own scratch is not that of the op on a GPU: see the parts below.
        pytest.skip("measured by parts")


# The ops themselves


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (3, 1)])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_ops_take_such_calls_and_return_out_and_lse_in_the_shapes_we_merge(library, heads, kv_heads, dtype):
    with FakeTensorMode(), warnings.catch_warnings():
        q = torch.empty(2, heads, 300, 128, device="cuda", dtype=dtype)
        k = torch.empty(2, kv_heads, 500, 128, device="cuda", dtype=dtype)
        out, lse = library.attend(q, k, torch.empty_like(k), 0.3)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, dtype, "cuda")
    assert (lse.shape, lse.dtype) == ((2, heads, 300), torch.float32)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_the_ops_get_all_rows_of_a_long_tile_in_parts_and_return_what_the_merge_takes(library, monkeypatch):
    """On meta tensors, which have shapes and no values to look at."""
    monkeypatch.setattr(torch_cuda, "_is_ready", lambda x: True)  # there are no addresses
    rows = []

    def attend(q, k, v, scale):
        rows.append(q.shape[0] * q.shape[1] * q.shape[2])
        return library.attend(q, k, v, scale)

    real = Library(library.name, 256, attend)
    kernel = TorchCuda(Reference(), [real], lambda *_: library.name, "meta", lambda _: HOPPER)
    q = torch.empty(2, 8, 20_000, 128, device="meta", dtype=torch.bfloat16)
    k = torch.empty(2, 2, 3_000, 128, device="meta", dtype=torch.bfloat16)
    state = SoftmaxState.empty(q)
    kernel.absorb(state, q, k, torch.empty_like(k), RowIntervals(20_000, 3_000), 0.1)
    out, lse = state.finalize(q.dtype)
    assert (out.shape, out.dtype, out.device.type, lse.shape) == (q.shape, q.dtype, "meta", q.shape[:3])
    assert sum(rows) == 2 * 8 * 20_000 and len(rows) > 1


def test_no_op_takes_a_head_dim_that_its_row_excludes():
    for library in LIBRARIES:
        assert library.largest_head_dim % 8 == 0
    assert serving(LIBRARIES, 128) == ["cudnn", "flash"]
    assert serving(LIBRARIES, 136) == ["flash"]
    assert serving(LIBRARIES, 100) == serving(LIBRARIES, 264) == []


# What the libraries are given


FULL = RowIntervals(70, 90)


@pytest.mark.parametrize(
    ("visible", "scale"),
    [
        (RowIntervals(70, 90, Band(upper=1)), 0.125),  # hidden pairs: 0 * NaN
        (RowIntervals(70, 90, Band(-9, 9)), 0.125),
        (FULL, 0.0),
        (FULL, -0.125),
    ],
)
def test_tiles_with_hidden_pairs_and_scales_that_turn_the_order_go_to_our_own_kernel(visible, scale):
    attend = StandIn()
    tile = make_tile(visible, dtype=torch.bfloat16, dim=64, scale=scale)
    assert_forward_exact(tile, *forward(make_kernel(attend), tile))
    assert not attend.shapes


def test_small_tiles_go_to_our_own_kernel():
    attend = StandIn()
    kernel = make_kernel(attend, fewest=64)
    for rows, keys, library in ((64, 64, True), (63, 64, False), (64, 63, False)):
        attend.shapes.clear()
        forward(kernel, make_tile(RowIntervals(rows, keys), dtype=torch.float16))
        assert bool(attend.shapes) is library


def test_the_table_decides_between_the_ways():
    tile = make_tile(FULL, dtype=torch.bfloat16, dim=64)
    for chosen in ("cudnn", "flash", OWN):
        ways = {name: StandIn() for name in ("cudnn", "flash")}
        libraries = [Library(name, 256, attend) for name, attend in ways.items()]
        kernel = TorchCuda(Reference(), libraries, lambda *_, c=chosen: c, "cpu", lambda _: HOPPER, 1)
        forward(kernel, tile)
        assert [name for name, attend in ways.items() if attend.shapes] == [chosen] * (chosen != OWN)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_tensors_that_the_libraries_cannot_read_in_place_go_to_our_own_kernel(which):
    memory = torch.randn(1, 2, 91, 136).to(torch.bfloat16)
    views = {
        "a row at an odd address": memory[:, :, :90, 1:65],
        "rows of an odd stride": memory.flatten()[: 2 * 90 * 68].view(1, 2, 90, 68)[..., :64],
        "dims apart": memory[:, :, :90, :128:2],
        "one key for all rows": memory[:, :, :1, :64].expand(1, 2, 90, 64),
    }
    for name, view in views.items():
        attend = StandIn()
        tile = make_tile(RowIntervals(90, 90), dtype=torch.bfloat16, dim=64, kv_heads=2)
        tile = tile._replace(**{which: view})
        assert_forward_exact(tile, *forward(make_kernel(attend), tile))
        assert not attend.shapes, name


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "rows"), [(1, 2, 2, 200), (3, 4, 2, 130), (1, 8, 1, 300), (5, 1, 1, 7), (2, 6, 3, 1)]
)
@pytest.mark.parametrize("budget", [1, 40_000, 1 << 20])
def test_parts_cover_every_row_once_and_stay_within_the_scratch(batch, heads, kv_heads, rows, budget, monkeypatch):
    monkeypatch.setattr(torch_cuda, "SCRATCH_BYTES", budget)
    q, k = torch.zeros(batch, heads, rows, 16, dtype=torch.bfloat16), torch.zeros(batch, kv_heads, 50, 16)
    group = heads // kv_heads
    for batches, kv, of_query, part in torch_cuda._parts(q, k):
        assert (of_query.start, of_query.stop) == (kv.start * group, kv.stop * group)
        piece = q[batches, of_query, part]
        piece += 1
        assert piece.numel() // 16 * (2 * 16 + 4) <= max(budget, group * (2 * 16 + 4))
    assert (q == 1).all()


def test_a_tile_of_the_usual_size_is_cut_into_few_even_parts():
    q, k = (torch.empty(1, 16, 65536, 128, dtype=torch.bfloat16, device="meta") for _ in range(2))
    parts = list(torch_cuda._parts(q, k))
    assert len(parts) == 32 and {rows.stop - rows.start for *_, rows in parts} == {32768}
    assert SCRATCH_BYTES // 2 < 32768 * (128 * 2 + 4) <= SCRATCH_BYTES


def test_without_triton_the_merge_is_that_of_the_state():
    state, other = (SoftmaxState.empty(torch.zeros(1, 1, 4, 8)) for _ in range(2))
    out, lse = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4)
    torch_cuda.merge(state, out, lse)
    other.merge_(out, lse)
    assert torch.equal(state.acc, other.acc) and torch.equal(state.row_max, other.row_max)
    assert peak_bytes(lambda: torch_cuda.merge(state, out, lse)) < SCRATCH_BYTES


# Why only for an only tile


def test_partial_results_in_16_bits_lose_digits_where_they_cancel():
    """Not a feature: the reason. Should it ever fail, the libraries may serve rings too."""
    torch.manual_seed(0)
    tile = make_tile(RowIntervals(64, 512), dim=64, dtype=torch.bfloat16)
    tile.v[:, :, :256] += 8
    tile.v[:, :, 256:] -= 8
    seen = torch.ones(64, 512, dtype=torch.bool)
    exact, _ = attention(tile.q, tile.k, tile.v, seen, tile.scale)

    def error(kernel) -> float:
        state = SoftmaxState.empty(tile.q)
        for keys in (slice(0, 256), slice(256, 512)):
            kernel.absorb(state, tile.q, tile.k[:, :, keys], tile.v[:, :, keys], RowIntervals(64, 256), tile.scale)
        return relative_error(state.finalize(tile.q.dtype)[0], exact)

    bound = bound_of_out(tile.q, tile.k, tile.v, seen, tile.scale)
    assert error(Reference()) <= bound
    assert error(make_kernel()) > 3 * bound


@pytest.fixture
def counted(monkeypatch) -> StandIn:
    attend = StandIn()
    monkeypatch.setattr(table, "FOR_AN_ONLY_TILE", (make_kernel(attend),))
    return attend


@pytest.mark.parametrize(("num_workers", "causal", "taken"), [(1, False, 1), (2, False, 0), (1, True, 0)])
def test_auto_takes_the_libraries_only_where_one_full_tile_is_all_that_rows_see(num_workers, causal, taken, counted):
    q, k, v = torch.randn(3, 1, 2, 320, 64).bfloat16().unbind()

    def work(group):
        mine = (ringspan.shard(x, 2, group=group, layout="contiguous") for x in (q, k, v))
        return ringspan.ring_attention(*mine, group=group, causal=causal)

    out = torch.cat(ringspan.run_local(work, num_workers), 2)
    seen = torch.ones(320, 320, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    assert relative_error(out, attention(q, k, v, seen, 64**-0.5)[0]) <= 2.5e-3
    assert len(counted.shapes) == taken


def test_auto_takes_no_library_for_tiles_whose_rows_something_joins(counted):
    q, k, v = torch.randn(3, 1, 2, 3000, 64).bfloat16().unbind()
    ringspan.ring_attention(q, k, v, sinks=torch.zeros(2))

    def work(group):  # one query shard for all ranks' keys, so one tile each
        return ringspan.ring_attention(q[:, :, : 300 * (group.rank() == 0)], k, v, group=group)

    ringspan.run_local(work, 2)
    assert not counted.shapes


def test_a_kernel_asked_for_by_name_is_the_one_that_serves(counted):
    x = torch.randn(1, 2, 320, 64).bfloat16()
    ringspan.ring_attention(x, x, x, kernel="reference")
    assert not counted.shapes


# Refusals


def test_an_old_gpu_and_a_build_for_other_gpus_are_refused_with_the_reason(monkeypatch):
    cpu = torch.device("cpu")
    reason = make_kernel(capability=(7, 5)).declines(torch.float16, cpu, 64)
    assert reason == "the libraries need compute capability 8.0 (Ampere) or later, this GPU has 7.5"
    assert "not 100" in make_kernel().declines(torch.float16, cpu, 100)
    assert "not torch.float32" in make_kernel().declines(torch.float32, cpu, 64)

    class Absent(Reference):
        name = "absent"

        def declines(self, dtype, device, head_dim):
            return "it is not installed"

    assert "goes to absent, and it is not installed" in make_kernel(own=Absent()).declines(torch.float16, cpu, 64)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "NVIDIA" in make_kernel().declines(torch.float16, cpu, 64)


def test_on_a_machine_without_gpu_cpu_tensors_are_declined_without_asking_a_driver():
    (kernel,) = table.FOR_AN_ONLY_TILE
    assert "these tensors are on cpu" in kernel.declines(torch.bfloat16, torch.device("cpu"), 64)


def test_without_triton_the_libraries_decline_and_say_why(monkeypatch):
    monkeypatch.setattr("ringspan.kernels.triton_kernel.find_spec", lambda name: None)
    kernel = TorchCuda(table.TRITON, (Library("flash", 256, StandIn()),), capability=lambda device: HOPPER)
    reason = kernel.declines(torch.bfloat16, torch.device("cuda"), 64)
    assert reason == "what the libraries leave goes to triton, and triton is not installed"
    monkeypatch.setattr(table, "FOR_AN_ONLY_TILE", (kernel,))
    # "auto" is then served by the definition.
    assert table.choose("auto", torch.bfloat16, torch.device("cuda"), 64, only_tile=True).name == "reference"
    with pytest.raises(ringspan.UnsupportedError, match="triton: triton is not installed"):
        table.choose("triton", torch.bfloat16, torch.device("cuda"), 64)


@pytest.mark.parametrize(("version", "there"), [(None, False), (91002, False), (91500, False), (91501, True)])
def test_a_cudnn_that_torch_itself_would_not_choose_is_not_there(monkeypatch, version, there):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert torch_cuda._has_cudnn.__wrapped__() is there


def test_a_torch_without_the_ops_is_declined_and_one_of_them_is_enough():
    def kernel(*there: bool) -> TorchCuda:
        libraries = [
            Library(name, most, StandIn(), lambda x=x: x)
            for name, most, x in zip(("cudnn", "flash"), (128, 256), there, strict=True)
        ]
        return TorchCuda(Reference(), libraries, device_type="cpu", capability=lambda device: HOPPER, fewest=1)

    cpu = torch.device("cpu")
    assert "built without" in kernel(False, False).declines(torch.float16, cpu, 64)
    assert kernel(True, False).declines(torch.float16, cpu, 64) is None
    assert "up to 128, not 256" in kernel(True, False).declines(torch.float16, cpu, 256)
    # What is not there is not chosen, whatever the estimates say.
    assert kernel(False, True)._able(64) == ["flash"]


# The table of measurements


def entry(num_keys=4096, head_dim=128, capability=HOPPER, dtype="bfloat16", **tflops) -> Measurement:
    return Measurement(capability, dtype, head_dim, num_keys, tflops)


def decide(table, num_keys=4096, capability=HOPPER, able=("cudnn", "flash"), dtype=torch.bfloat16, head_dim=128):
    return measured.decide(tuple(table), capability, dtype, head_dim, num_keys, able)


def test_the_fastest_measured_way_that_can_serve_is_taken():
    rows = [entry(cudnn=600, flash=400, triton=500)]
    assert decide(rows) == "cudnn"
    assert decide(rows, able=("flash",)) == "triton"
    assert decide([entry(cudnn=1, triton=2)]) == "triton"


def test_the_nearest_shorter_measured_tile_counts():
    rows = [entry(1024, cudnn=1, triton=2), entry(8192, cudnn=2, triton=1)]
    assert [decide(rows, n) for n in (256, 1024, 8191, 8192, 1 << 20)] == ["triton"] * 3 + ["cudnn"] * 2


def test_measurements_of_another_gpu_dtype_or_head_dim_do_not_count():
    rows = [entry(triton=1, cudnn=9)]
    assert decide(rows) == "cudnn"
    assert decide(rows, capability=(9, 1)) == decide(rows, head_dim=64) == decide(rows, dtype=torch.float16) == OWN


def test_where_nothing_was_measured_estimates_decide():
    assert decide([]) == OWN
    assert decide([], capability=BLACKWELL) == OWN, "nobody has seen that cuDNN is right there"
    assert decide([], capability=AMPERE) == "flash"
    for capability in ((7, 5), (42, 0)):
        assert decide([], capability=capability) == OWN
    assert decide([], capability=AMPERE, num_keys=1023) == OWN


def test_equal_rates_are_decided_by_name_and_not_by_order():
    rows = [{"cudnn": 5.0, "triton": 5.0}, {"triton": 5.0, "cudnn": 5.0}]
    assert decide([entry(**rows[0])]) == decide([entry(**rows[1])])


def test_a_table_comes_back_from_its_file_and_keeps_what_is_there_of_others(tmp_path):
    path = tmp_path / "somewhere" / "gpu.json"
    assert measured.read(path) == ()
    first, second = entry(cudnn=1.5), entry(capability=AMPERE, flash=2.5)
    measured.write(path, [first])
    measured.write(path, [second])
    assert set(map(repr, measured.read(path))) == {repr(first), repr(second)}
    measured.write(path, [entry(cudnn=7.0)])
    assert sorted(m.tflops.popitem() for m in measured.read(path)) == [("cudnn", 7.0), ("flash", 2.5)]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[]", '{"measurements": [1]}', '{"measurements": [{"capability": [9]}]}'])
def test_a_file_that_is_no_table_is_told_and_left_aside(tmp_path, text):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="is not a table of measured kernels"):
        assert measured.read(path) == ()


def test_the_file_of_the_environment_decides(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    measured.write(path, [entry(cudnn=1, triton=2)])
    monkeypatch.setenv(measured.TABLE_VARIABLE, str(path))
    assert measured.choose(HOPPER, torch.bfloat16, 128, 4096, ("cudnn", "flash")) == "triton"
    monkeypatch.delenv(measured.TABLE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measured.table_path() == tmp_path / "ringspan" / "gpu.json"
