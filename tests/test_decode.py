"""decode_attention: queries that every rank has, over keys that are spread.

Its order on streams is in test_streams.py and test_nccl.py.
"""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from definition import OUT_BOUNDS, attention, bound_of_out, relative_error
from processes import run_processes
from torch._subclasses.fake_tensor import FakeTensorMode

import ringspan
from ringspan import masks, run_local
from ringspan.kernels.reference import Reference
from ringspan.kernels.table import choose
from ringspan.state import state_dtype


def tensors(queries, lengths, heads=4, kv_heads=2, dim=16, value_dim=24, dtype=torch.float32, batch=2):
    """q, and k and v of all ranks."""
    torch.manual_seed(sum(lengths))
    shapes = (heads, queries, dim), (kv_heads, sum(lengths), dim), (kv_heads, sum(lengths), value_dim)
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


def decoded(q, k, v, lengths, **options):
    """What every rank gets: (out, lse). Fresh memory is NaN."""

    def work(group):
        rank = group.rank()
        mine = [x.split(lengths, 2)[rank].clone() for x in (k, v)]
        with torch.no_grad():
            return ringspan.decode_attention(q.clone(), *mine, return_lse=True, **options)

    return run_local(work, len(lengths), timeout=60)


def check(q, k, v, lengths, seen=None, sinks=None, **options):
    found = decoded(q, k, v, lengths, sinks=sinks, **options)
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0]) and torch.equal(lse, found[0][1]), "ranks differ"
    (out, lse), dtype = found[0], q.dtype
    assert out.dtype == dtype and lse.dtype == state_dtype(dtype)
    if seen is None:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    scale, kernel = q.shape[3] ** -0.5, options.get("kernel", "auto")
    exact, exact_lse = attention(q, k, v, seen, scale)
    name = choose(kernel, dtype, q.device, max(q.shape[3], v.shape[3])).name
    rounds_weights = name == "native_rounded" or (name == "triton" and dtype.itemsize == 2)
    bound = bound_of_out(q, k, v, seen, scale, rounds_weights)
    if sinks is not None:
        with_sink = torch.logaddexp(exact_lse, sinks.double()[:, None])
        exact, exact_lse = exact * (exact_lse - with_sink).exp()[..., None], with_sink
    assert relative_error(out, exact) <= bound
    seen_rows = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen_rows) and not out[~seen_rows].any()
    eps = torch.finfo(state_dtype(dtype)).eps
    torch.testing.assert_close(lse[seen_rows].double(), exact_lse[seen_rows], rtol=16 * eps, atol=64 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("lengths", [[129], [1, 0], [63, 5, 1000], [0, 129, 1, 33], [7, 7, 7, 7, 7]])
def test_every_rank_has_the_exact_result_in_the_same_bits(lengths, dtype):
    for queries in (1, 3):
        check(*tensors(queries, lengths, dtype=dtype), lengths)


@pytest.mark.parametrize("kernel", ["native", "torch_ops", "reference"])
def test_any_kernel_serves(kernel):
    check(*tensors(5, [40, 23], value_dim=16), [40, 23], kernel=kernel)


def test_no_queries_and_no_keys_are_legal():
    assert decoded(*tensors(0, [3, 4]), [3, 4])[0][0].shape == (2, 4, 0, 24)
    out, lse = decoded(*tensors(2, [0, 0]), [0, 0])[1]
    assert not out.any() and lse.isneginf().all()


def test_key_ranges_count_through_the_keys_of_all_ranks():
    lengths, queries = [30, 0, 41, 29], 6
    q, k, v = tensors(queries, lengths)
    row, key = torch.arange(queries)[:, None], torch.arange(sum(lengths))
    seen = key <= row + sum(lengths) - queries
    check(q, k, v, lengths, seen, key_ranges=masks.continued(sum(lengths) - queries, queries))

    where = torch.randperm(sum(lengths))  # positions of keys that ranks hold in some order of their own
    new = torch.tensor([3, 50, 51, 52, 98, 99])
    check(q, k, v, lengths, where <= new[:, None], key_ranges=masks.from_mask(where <= new[:, None]))

    filled = torch.tensor([sum(lengths), 55])  # a padded batch
    check(q, k, v, lengths, (key < filled[:, None])[:, None, None].expand(-1, 4, queries, -1),
          key_ranges=masks.padding(filled, sum(lengths), num_queries=queries))  # fmt: skip


def test_a_row_that_sees_nothing_is_0_and_what_nobody_sees_reaches_nobody():
    q, k, v = tensors(2, [10, 10])
    k[:, :, 3], v[:, :, 3] = float("nan"), float("inf")
    seen = torch.zeros(2, 20, dtype=torch.bool)
    seen[0, 4:19] = True
    check(q, k, v, [10, 10], seen, key_ranges=torch.tensor([[4, 19], [0, 0]]))


def test_sinks_join_once():
    check(*tensors(3, [9, 50, 4]), [9, 50, 4], sinks=torch.tensor([0.5, -30.0, 4.0, float("-inf")]))


def test_it_is_what_ring_attention_of_one_rank_s_queries_is():
    lengths = [20, 31]
    q, k, v = tensors(3, lengths)

    def work(group):
        mine = [x.split(lengths, 2)[group.rank()] for x in (k, v)]
        return ringspan.ring_attention(q[:, :, : 3 * (group.rank() == 0)], *mine)

    there = run_local(work, 2, timeout=60)[0]
    assert relative_error(decoded(q, k, v, lengths)[1][0], there.double()) <= 2 * OUT_BOUNDS[q.dtype]


def test_agreement_may_be_left_out():
    check(*tensors(2, [8, 8, 8]), [8, 8, 8], agreement=False)


def refused(change, num_ranks=3, **options):
    """What each rank raises if rank 1 calls otherwise. change: of its q, k, v, options."""
    q, k, v = tensors(2, [5, 5, 5])

    def work(group):
        mine = {"q": q, "k": k, "v": v, "sinks": None, **options}
        if group.rank() == 1:
            mine |= change
        with pytest.raises(ringspan.RingspanError) as caught:
            ringspan.decode_attention(mine.pop("q"), mine.pop("k"), mine.pop("v"), **mine)
        return caught.value

    return run_local(work, num_ranks, timeout=60)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(q=torch.randn(2, 4, 3, 16)), "the number of queries"),
        (dict(sinks=torch.zeros(4)), "whether there are sinks"),
        (dict(softmax_scale=1.0), "softmax_scale"),
        (dict(key_ranges=torch.tensor([[0, 1], [0, 2]])), "key_ranges"),
    ],
)
def test_ranks_that_call_it_otherwise_all_hear_of_it(change, words):
    for error in refused(change):
        assert isinstance(error, ringspan.DisagreementError) and words in str(error)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (dict(q=torch.randn(2, 4, 2, 16, requires_grad=True)), ringspan.UnsupportedError, "not differentiable"),
        (dict(q=torch.randn(2, 4, 2)), ringspan.ArgumentError, "4 dimensions"),
        (dict(kernel="fast"), ringspan.ArgumentError, "kernel is unknown"),
        (dict(key_ranges=[[0, 1]]), ringspan.ArgumentTypeError, "key_ranges must be a torch.Tensor"),
    ],
)
def test_what_one_rank_refuses_the_others_hear(change, kind, words):
    mine = refused(change)
    assert isinstance(mine[1], kind) and words in str(mine[1])
    assert all(isinstance(mine[rank], ringspan.PeerRefusedError) and words in str(mine[rank]) for rank in (0, 2))


def test_key_ranges_have_one_for_each_query():
    for error in refused({}, key_ranges=torch.tensor([[0, 1]] * 3)):
        assert isinstance(error, ringspan.ArgumentError) and "a range for each query" in str(error)


def test_a_rank_that_fails_in_the_middle_is_named_to_the_others(monkeypatch):
    lengths, absorb_runs = [5, 7, 5], Reference.absorb_runs
    q, *spread = tensors(2, lengths)

    def absorb_or_fail(kernel, state, q, runs, scale):
        if runs[0][0].shape[2] == lengths[1]:
            raise MemoryError("no room")
        absorb_runs(kernel, state, q, runs, scale)

    def work(group):
        try:
            ringspan.decode_attention(q, *(x.split(lengths, 2)[group.rank()] for x in spread), kernel="reference")
        except ringspan.RankFailedError as error:
            stopped.append(str(error))
            raise

    stopped: list[str] = []
    monkeypatch.setattr(Reference, "absorb_runs", absorb_or_fail)
    with pytest.raises(ringspan.WorkerError, match=r"rank 1 .*MemoryError: no room"):
        run_local(work, 3, timeout=30)
    assert len(stopped) == 2 and all("rank 1 failed first: MemoryError('no room')" in told for told in stopped)


@pytest.mark.parametrize("kernel", ["native", "reference"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_views_that_are_negated_when_they_are_read_are(name, kernel):
    q, k, v = tensors(2, [20])
    negated = dict(q=q, k=k, v=v)
    negated[name] = torch.complex(negated[name], -negated[name]).conj().imag
    assert negated[name].is_neg()
    assert torch.equal(
        ringspan.decode_attention(**negated, kernel=kernel), ringspan.decode_attention(q, k, v, kernel=kernel)
    )


def test_fake_tensors_have_fake_results_and_only_among_themselves():
    q, k, v = tensors(2, [20])
    with FakeTensorMode() as mode:
        out, lse = ringspan.decode_attention(*map(mode.from_tensor, (q, k, v)), return_lse=True)
    assert out.shape == (2, 4, 2, 24) and lse.shape == (2, 4, 2) and lse.dtype == torch.float32
    with pytest.raises(Exception, match=r"(?i)fake"):
        ringspan.decode_attention(q, mode.from_tensor(k), v)


@pytest.mark.parametrize("key_ranges", [None, masks.continued(38, 2)])
def test_it_is_one_node_of_a_graph(key_ranges):
    q, k, v = tensors(2, [40])

    def twice(q):
        return 2 * ringspan.decode_attention(q, k, v, key_ranges=key_ranges)

    with torch.no_grad():
        assert torch.equal(torch.compile(twice, fullgraph=True, backend="aot_eager")(q), twice(q))


def test_a_refusal_while_a_graph_is_traced_is_told_when_it_runs():
    q, k, v = tensors(1, [8])
    fn = torch.compile(lambda q: ringspan.decode_attention(q, k, v, kernel="fast"), fullgraph=True, backend="aot_eager")
    with torch.no_grad(), pytest.raises(ringspan.ArgumentError, match="kernel is unknown"):
        fn(q)


def test_the_op_passes_the_checks_of_torch_library():
    q, k, v = tensors(2, [9])
    ranges = [masks.continued(7, 2)]
    torch.library.opcheck(
        torch.ops.ringspan.decode.default, (q, k, v, torch.zeros(4), ranges, "alone", None, "auto", "auto", True, 0)
    )


def in_processes(rank, transport, lengths):
    q, k, v = tensors(2, lengths)
    mine = [x.split(lengths, 2)[rank] for x in (k, v)]
    q = funcol.all_reduce(q / 4 * (rank < 2) * 2, "sum", dist.group.WORLD)  # exact, and what tensor parallelism returns
    assert type(q).__name__ == "AsyncCollectiveTensor"
    found = []
    for _, positions in itertools.product(range(3), (None, masks.continued(sum(lengths) - 2, 2))):
        found.append(ringspan.decode_attention(q, *mine, key_ranges=positions, transport=transport))
    return found


@pytest.mark.parametrize("transport", ["shared_memory", "torch_dist"])
def test_processes_have_it_too(transport):
    lengths = [33, 0, 70]
    endings = run_processes(in_processes, 3, transport, lengths)
    assert [ending.error for ending in endings] == [None] * 3
    expected = decoded(*tensors(2, lengths), lengths)[0][0]
    for ending in endings:
        assert torch.equal(ending.value[0], expected), "one order of merging, whatever the transport"
        assert torch.equal(ending.value[1], ending.value[5]) and not torch.equal(ending.value[1], expected)
