"""docs/training.md and docs/coming-from.md do what they say: their code is run, beside one process."""

import copy
import functools
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from definition import relative_error, seen_by_mask
from processes import results, run_processes
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ringspan
from ringspan import RankFailedError, execute, run_local
from ringspan.problem import Mask

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "examples"))
from fsdp2 import Block, Decoder, loss_in_one_process  # noqa: E402

LAYOUTS = ["contiguous", "striped", "zigzag"]


def code_of(page: str) -> dict:
    """The functions of a page, by name."""
    found: dict = {"torch": torch, "ringspan": ringspan}
    for code in re.findall(r"```python\n(.*?)```", (HERE.parent / "docs" / page).read_text(), re.DOTALL):
        exec(code, found)
    return found


TRAINING = code_of("training.md")


def batch(cu_seqlens):
    """A decoder in float64, and tokens."""
    torch.manual_seed(0)
    return Decoder().double(), torch.randint(256, (1, cu_seqlens[-1]))


def distance(found, expected) -> float:
    """Of all parameters' gradients, as one vector."""
    return relative_error(*(torch.cat([x.flatten() for x in grads]) for grads in (found, expected)))


def gradients(model) -> list[torch.Tensor]:
    return [x.grad for x in model.parameters()]


def of_one_process(model, texts, packs):
    model = copy.deepcopy(model)
    loss_in_one_process(model, texts, packs).backward()
    return gradients(model)


def attention_of(cu_seqlens, layout, group=None):
    return functools.partial(ringspan.ring_attention, causal=True, cu_seqlens=cu_seqlens, layout=layout, group=group)


def of_a_rank(group, model, text, cu_seqlens, layout, loss_of):
    """loss_of(logits, this rank's labels, labels of the whole sequence) -> the loss of this rank; its gradients."""
    model = copy.deepcopy(model)
    labels = TRAINING["labels_of"](text, cu_seqlens)
    tokens, mine = (ringspan.shard(x, 1, layout=layout) for x in (text, labels))
    positions = ringspan.positions(cu_seqlens[-1], cu_seqlens=cu_seqlens, layout=layout, group=group)
    loss_of(model(tokens, positions, attention_of(cu_seqlens, layout)), mine, labels).backward()
    return gradients(model)


def by_the_rule(logits, mine, labels):
    return TRAINING["loss_of"](logits, mine, (labels != -100).sum())


def by_means(logits, mine, labels):
    return F.cross_entropy(logits.flatten(0, 1), mine.flatten())


# The loss


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "cu_seqlens", [(0, 7), (0, 3, 3, 7), (0, 2), (0, 1, 40, 41)]
)  # over 3 ranks: (0, 2) leaves one empty
def test_summed_gradients_of_unequal_shards_are_those_of_one_process(cu_seqlens, layout):
    model, text = batch(cu_seqlens)
    by_rank = run_local(of_a_rank, 3, model, text, cu_seqlens, layout, by_the_rule, timeout=60)
    expected = of_one_process(model, [text], [tuple(sorted(set(cu_seqlens)))])
    assert distance([sum(x) for x in zip(*by_rank, strict=True)], expected) < 1e-12


def test_averaged_means_of_ranks_are_off_by_what_the_page_says():
    cu_seqlens = (0, 3, 7)
    model, text = batch(cu_seqlens)
    by_rank = run_local(of_a_rank, 3, model, text, cu_seqlens, "zigzag", by_means, timeout=60)
    off = distance([sum(x) / 3 for x in zip(*by_rank, strict=True)], of_one_process(model, [text], [cu_seqlens]))
    assert abs(off - 0.30) < 0.02
    nothing = torch.empty(1, 0, 5), torch.empty(1, 0, dtype=torch.int64)
    assert by_means(*nothing, None).isnan() and TRAINING["loss_of"](*nothing, 4) == 0


def after_unshard(logits, mine, labels):
    return by_the_rule(ringspan.unshard(logits, 1, layout="zigzag"), labels, labels)


def test_gradients_of_a_loss_after_unshard_are_averaged_over_the_ring():
    cu_seqlens = (0, 3, 7)
    model, text = batch(cu_seqlens)
    by_rank = run_local(of_a_rank, 3, model, text, cu_seqlens, "zigzag", after_unshard, timeout=60)
    expected = of_one_process(model, [text], [cu_seqlens])
    assert distance([sum(x) / 3 for x in zip(*by_rank, strict=True)], expected) < 1e-12


# Positions


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cu_seqlens", [(0, 5), (0, 0, 2, 2, 5, 11), torch.tensor([0, 4, 11])])
def test_positions_begin_at_0_in_each_document(cu_seqlens, layout):
    def work(group):
        return ringspan.unshard(
            ringspan.positions(cu_seqlens[-1], cu_seqlens=cu_seqlens, layout=layout, group=group), 0, layout=layout
        )

    bounds = torch.as_tensor(cu_seqlens)
    for found in run_local(work, 3, timeout=60):
        assert found.tolist() == [i for length in bounds.diff() for i in range(length)]


# Replicas, rings and reducers


def whole_loss(model, tokens, cu_seqlens, mesh):
    """After unshard."""
    ring = mesh["context"]
    labels = TRAINING["labels_of"](tokens, cu_seqlens)
    num_predicted = (labels != -100).sum()
    dist.all_reduce(num_predicted, group=mesh.get_group("data"))
    mine = ringspan.shard(tokens, 1, layout="zigzag", group=ring)
    where = ringspan.positions(cu_seqlens[-1], cu_seqlens=cu_seqlens, layout="zigzag", group=ring)
    logits = ringspan.unshard(
        model(mine, where, attention_of(cu_seqlens, "zigzag", ring)), 1, layout="zigzag", group=ring
    )
    (TRAINING["loss_of"](logits, labels, num_predicted) * mesh.shape[0]).backward()


def train_with_reducers(rank, packs):
    """Distances of the gradients to those of one process, by reducer."""
    mesh, everybody = TRAINING["meshes"]("cpu", 2)
    replica = mesh.get_local_rank("data")
    model, _ = batch(packs[0])
    texts = [torch.randint(256, (1, pack[-1])) for pack in packs]
    batch_of_mine = texts[replica], packs[replica]
    expected = of_one_process(model, texts, packs)
    found = {}

    def made(how):
        changed = copy.deepcopy(model)
        return changed, how(changed) or changed

    ways = {
        "DDP": DistributedDataParallel,
        "FSDP2": lambda model: TRAINING["spread_weights"](model, everybody),
        "FSDP2, each replica whole": lambda model: TRAINING["spread_weights"](model, mesh),
    }
    for name, how in ways.items():
        changed, called = made(how)
        loss = TRAINING["backward"](called, *batch_of_mine, mesh)
        grads = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in gradients(changed)]
        found[name] = distance(grads, expected) + abs(float(loss - loss_in_one_process(model, texts, packs)))

    changed, called = made(DistributedDataParallel)
    whole_loss(called, *batch_of_mine, mesh)
    found["DDP after unshard"] = distance(gradients(changed), expected)

    changed, called = made(lambda model: TRAINING["spread_weights"](model, everybody))
    out_of_text = [(texts[0], packs[0]), (torch.zeros(1, 1, dtype=torch.int64), (0, 1))]
    TRAINING["backward"](called, *out_of_text[replica], mesh)
    alone = of_one_process(model, texts[:1], packs[:1])
    found["a replica without text"] = distance([x.grad.full_tensor() for x in changed.parameters()], alone)
    return found


def test_reducers_give_the_gradients_of_one_process_over_replicas_and_rings():
    for found in results(run_processes(train_with_reducers, 4, [(0, 3, 23), (0, 6)])):
        assert len(found) == 5 and max(found.values()) < 1e-12, found


def sum_with_fsdp2(rank):
    """In float32, for which gloo can do less. The page's loss is multiplied for a reducer that averages."""
    mesh, everybody = TRAINING["meshes"]("cpu", 1)
    model, text = batch((0, 3, 7))
    expected = of_one_process(model, [text], [(0, 3, 7)])
    model.float()
    TRAINING["spread_weights"](model, everybody)
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_gradient_divide_factor(1)
    with pytest.raises(RuntimeError, match=r"Cannot use ReduceOp\.PREMUL_SUM with Gloo"):
        TRAINING["backward"](model, text, (0, 3, 7), mesh)
    model, _ = batch((0, 3, 7))
    model.float()
    TRAINING["spread_weights"](model, everybody)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1)
            module.set_force_sum_reduction_for_comms(True)
    TRAINING["backward"](model, text, (0, 3, 7), mesh)
    return distance([x.grad.full_tensor() / mesh.size() for x in model.parameters()], expected)


def test_fsdp2_sums_where_it_is_told_to():
    assert max(results(run_processes(sum_with_fsdp2, 3))) < 1e-5


def pass_dtensors(rank):
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, _ = TRAINING["meshes"]("cpu", 1)
    q = torch.randn(1, 2, 6, 8)
    spread = distribute_tensor(q, mesh["context"], [Shard(2)])
    mine = spread.to_local()
    with pytest.raises(ringspan.ArgumentTypeError, match=r"\n  fix  pass q.to_local\(\)"):
        ringspan.ring_attention(spread, spread, spread, group=mesh["context"])
    out = ringspan.ring_attention(mine, mine, mine, group=mesh["context"])
    return ringspan.unshard(out, 2, group=mesh["context"]).sub(F.scaled_dot_product_attention(q, q, q)).abs().max()


def test_a_dtensor_is_refused_and_its_local_part_taken():
    assert max(results(run_processes(pass_dtensors, 2))) < 2e-6


def spread_heads(rank):
    """Over two ranks, each of which is a ring of its own: unshard is given what RowwiseParallel returns."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    everybody = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model, x = torch.nn.Linear(8, 8).double(), torch.randn(1, 6, 8, dtype=torch.float64)
    expected = model(x).detach()
    parallelize_module(model, everybody, RowwiseParallel())
    ring = ringspan.Ring("zigzag", everybody)
    found = model(x.chunk(2, -1)[rank])  # all tokens are on both ranks, so each is there twice
    return relative_error(ringspan.unshard(found, 1, group=everybody), torch.cat([expected, expected], 1)) + float(
        (ring.unshard(ring.shard(found, 1), 1) - expected).abs().max()
    )


def test_what_tensor_parallelism_returns_is_unsharded():
    assert max(results(run_processes(spread_heads, 2))) < 1e-12


class Stage(torch.nn.Module):
    """A block of a decoder, with what is before the first and after the last; it is handed x alone."""

    def __init__(self, model, place, *inputs_of_all):
        super().__init__()
        self.before = model.embed if place == 0 else torch.nn.Identity()
        self.after = model.head if place == len(model.blocks) - 1 else torch.nn.Identity()
        self.block, self.inputs_of_all = model.blocks[place], inputs_of_all

    def forward(self, x):
        return self.after(self.block(self.before(x), *self.inputs_of_all))


def train_in_a_pipeline(rank, schedule, places_of_ranks):
    """Two ranks of a pipeline, each a ring of two; four micro-batches of 11 tokens."""
    from torch.distributed import pipelining
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "context"))
    places, num_stages = places_of_ranks[mesh.get_local_rank("pipeline")], sum(map(len, places_of_ranks))
    whole, _ = batch((0, 1))
    whole.blocks = torch.nn.ModuleList(Block().double() for _ in range(num_stages))
    model, tokens = copy.deepcopy(whole), torch.randint(256, (4, 11))
    labels = TRAINING["labels_of"](tokens, (0, 11))
    ring = ringspan.Ring("zigzag", mesh["context"])
    given = ring.positions(11), functools.partial(ring.attention, causal=True)
    parts = torch.nn.ModuleList(Stage(model, place, *given) for place in places)
    pipe = mesh.get_group("pipeline")
    stages = [
        pipelining.PipelineStage(part, place, num_stages, torch.device("cpu"), group=pipe)
        for part, place in zip(parts, places, strict=True)
    ]
    loss_of = functools.partial(TRAINING["loss_of"], num_predicted=(labels != -100).sum())
    run = getattr(pipelining, schedule)(stages if stages[1:] else stages[0], 4, loss_fn=loss_of, scale_grads=False)
    mine, targets = (ring.shard(x, 1) for x in (tokens, labels))
    inputs, wanted = [mine] if 0 in places else [], targets if num_stages - 1 in places else None
    run.step(*inputs, target=wanted)
    for parameter in parts.parameters():
        dist.all_reduce(parameter.grad, group=mesh.get_group("context"))
    loss_in_one_process(whole, tokens.split(1), [(0, 11)] * 4).backward()
    expected = torch.nn.ModuleList(Stage(whole, place, *given) for place in places)
    return distance(gradients(parts), gradients(expected))


@pytest.mark.parametrize(
    ("schedule", "places"), [("Schedule1F1B", [[0], [1]]), ("ScheduleZBVZeroBubble", [[0, 3], [1, 2]])]
)
def test_stages_of_a_pipeline_each_over_a_ring_have_the_gradients_of_one_process(schedule, places):
    assert max(results(run_processes(train_in_a_pipeline, 4, schedule, places))) < 1e-12


# Checkpointing, compiling


@pytest.fixture
def forwards(monkeypatch):
    """A list that grows by one with every forward of a ring on a rank."""
    calls: list[None] = []
    forward = execute.forward

    def counted(*args, **options):
        calls.append(None)
        return forward(*args, **options)

    monkeypatch.setattr(execute, "forward", counted)
    return calls


def through_two_blocks(group, blocks, x, cu_seqlens, through):
    blocks, x = copy.deepcopy(blocks), ringspan.shard(x, 1, layout="zigzag")
    positions = ringspan.positions(cu_seqlens[-1], cu_seqlens=cu_seqlens, layout="zigzag", group=group)
    for block in blocks:
        x = through(block, x, positions, attention_of(cu_seqlens, "zigzag"))
    x.square().sum().backward()
    return gradients(blocks)


def test_selective_checkpointing_runs_the_rings_forward_once_and_gives_the_same_bits(forwards):
    cu_seqlens, ranks, found, counts = (0, 9, 31), 2, {}, {}
    blocks, x = torch.nn.ModuleList([Block(), Block()]), torch.randn(2, 31, 64)
    ways = {
        "plain": lambda block, *inputs: block(*inputs),
        "checkpoint": functools.partial(checkpoint, use_reentrant=False),
        "selective": TRAINING["checkpointed"],
    }
    for name, through in ways.items():
        forwards.clear()
        found[name] = run_local(through_two_blocks, ranks, blocks, x, cu_seqlens, through, timeout=60)
        counts[name] = len(forwards) / (ranks * len(blocks))
    assert counts == {"plain": 1, "checkpoint": 2, "selective": 1}
    for name in ("checkpoint", "selective"):
        for grads, expected in zip(found[name], found["plain"], strict=True):
            assert all(map(torch.equal, grads, expected))


def test_a_block_is_one_graph_and_of_tensors_of_documents_few_are_compiled_anew():
    block, x, graphs = Block(), torch.randn(1, 64, 64), []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    def through(x, cu_seqlens):
        return block(x, torch.arange(64), attention_of(cu_seqlens, "contiguous"))

    packs = [(0, 10, 64), (0, 20, 64), (0, 3, 5, 64), (0, 3, 50, 64), (0, 1, 2, 3, 64), (0, 9, 64)]
    counts = {}
    for kind in (tuple, torch.tensor):
        torch.compiler.reset()
        graphs.clear()
        compiled = torch.compile(through, fullgraph=True, backend=counting)
        for pack in packs:
            assert torch.equal(compiled(x, kind(pack)), through(x, pack))
        counts[kind] = len(graphs)
    torch.compiler.reset()
    assert counts == {tuple: len(packs), torch.tensor: 2}


@pytest.mark.parametrize("outside", [False, True])
def test_selective_checkpointing_goes_with_compiling_in_either_order(forwards, outside):
    block, x, attend = Block(), torch.randn(1, 31, 64), attention_of(torch.tensor((0, 9, 31)), "zigzag")
    compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    once = functools.partial(functools.partial, TRAINING["checkpointed"])
    found = []
    for made in (block, once(compiled(block)) if outside else compiled(once(block))):
        forwards.clear()
        block.zero_grad()
        made(x, torch.arange(31), attend).square().sum().backward()
        found.append((len(forwards), [grad.clone() for grad in gradients(block)]))
    torch.compiler.reset()
    (count, expected), (count_compiled, grads) = found
    assert count == count_compiled == 1 and all(map(torch.equal, grads, expected))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch looks at it where it goes on
def test_a_compiled_model_may_hold_unshard_and_breaks_its_graph_there_alone():
    """Of lengths that torch makes symbols of after the second."""
    weight, seen = torch.randn(8, 8), []

    def counting(graph, _):
        seen.append(graph)
        return graph.forward

    def model(x, ring):
        q = ring.shard(x @ weight, 1).unsqueeze(1)
        return ring.unshard(ring.attention(q, q, q, causal=True).squeeze(1), 1).square()

    def work(group):
        ring, found = ringspan.Ring("zigzag", group), []
        for tokens in (9, 13, 14, 31):
            x = torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(tokens), requires_grad=True)
            found.append([(out := through(x, ring)), *torch.autograd.grad(out.sum(), x)])
        return found

    torch.compiler.reset()
    through = model
    expected = run_local(work, 1, timeout=60)
    through = torch.compile(model, backend=counting)
    for ours, theirs in zip(run_local(work, 1, timeout=60)[0], expected[0], strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert len(seen) == 4  # before and after unshard, of a length and of any
    with pytest.raises(torch._dynamo.exc.Unsupported, match="outside of what is compiled with fullgraph=True"):
        torch.compile(model, backend=counting, fullgraph=True)(torch.randn(1, 9, 8), ringspan.Ring())
    torch.compiler.reset()


# Every rank, every time


@pytest.mark.parametrize("what", ["forward", "backward"])
def test_a_rank_that_does_not_call_is_named_after_the_timeout(what):
    def work(group):
        q = torch.randn(1, 2, 3, 8, requires_grad=True)
        if what == "forward" and group.rank() == 1:
            return
        out = ringspan.ring_attention(q, q, q)
        if group.rank() != 1:
            out.sum().backward()

    with pytest.raises(RankFailedError, match="waited 1 s for rank 1"):
        run_local(work, 3, timeout=1)


# docs/coming-from.md


def heads_first(x):
    return x.transpose(1, 2)


def test_tensors_of_other_layouts_become_ours_without_a_copy():
    q, k, v = (torch.randn(2, 7, heads, 8) for heads in (4, 2, 2))
    out = ringspan.ring_attention(*map(heads_first, (q, k, v)), causal=True)
    exact = F.scaled_dot_product_attention(*map(heads_first, (q, k, v)), is_causal=True, enable_gqa=True)
    assert heads_first(q).data_ptr() == q.data_ptr() and relative_error(out, exact) < 2e-6
    of_sbhd = [x.transpose(0, 1).contiguous().permute(1, 2, 0, 3) for x in (q, k, v)]
    again = ringspan.ring_attention(*of_sbhd, causal=True)
    assert torch.equal(again.permute(2, 0, 1, 3), out.permute(2, 0, 1, 3)) and out.permute(2, 0, 1, 3).shape[:2] == (
        7,
        2,
    )
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    cu_seqlens = (0, 7, 14)
    varlen = ringspan.ring_attention(*(x.transpose(0, 1)[None] for x in packed), causal=True, cu_seqlens=cu_seqlens)
    assert relative_error(varlen[0].transpose(0, 1), heads_first(exact).flatten(0, 1)) < 2e-6
    qkv = torch.randn(2, 7, 3, 4, 8)
    assert [tuple(heads_first(x).shape) for x in qkv.unbind(2)] == [(2, 4, 7, 8)] * 3


def test_tokens_in_the_place_of_heads_are_an_error_only_where_shards_or_heads_are_unequal():
    q, few = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8)
    wrong = ringspan.ring_attention(q, q, q, causal=True)
    right = ringspan.ring_attention(*[heads_first(q)] * 3, causal=True)
    assert wrong.shape == q.shape and relative_error(heads_first(wrong), right) > 0.1
    assert ringspan.ring_attention(q, few, few).shape == q.shape
    with pytest.raises(ringspan.LayoutError, match="unequal lengths"):
        ringspan.ring_attention(q, few, few, causal=True)

    def unequal(group):
        x = ringspan.shard(torch.randn(1, 7, 4, 8), 1)
        ringspan.ring_attention(x, x, x)

    with pytest.raises(ringspan.DisagreementError, match="number of query heads"):
        run_local(unequal, 2, timeout=60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits(dtype):
    q, k, v, do = torch.randn(4, 1, 4, 203, 16, generator=torch.Generator().manual_seed(0)).to(dtype)

    def work(group):
        leaves = [ringspan.shard(x, 2, layout="zigzag").requires_grad_() for x in (q, k, v)]
        out = ringspan.ring_attention(*leaves, causal=True, layout="zigzag")
        return out, *torch.autograd.grad(out, leaves, ringspan.shard(do, 2, layout="zigzag"))

    once, again = (run_local(work, 3, timeout=60) for _ in range(2))
    assert all(
        torch.equal(x, y) for mine, theirs in zip(once, again, strict=True) for x, y in zip(mine, theirs, strict=True)
    )


def test_a_sliding_window_of_hugging_face_counts_the_querys_own_key():
    from transformers.masking_utils import sliding_window_overlay

    sees = sliding_window_overlay(3)
    theirs = [[j <= p and bool(sees(0, 0, torch.tensor(p), torch.tensor(j))) for j in range(8)] for p in range(8)]
    assert seen_by_mask(Mask(8, 8, left=3 - 1, right=0)).tolist() == theirs


def test_layouts_have_the_order_of_other_libraries():
    tokens, ranks = torch.arange(24), 3
    head_tail = pytest.importorskip("torch.distributed.tensor.experimental._context_parallel._load_balancer")
    order = head_tail._HeadTailLoadBalancer(24, ranks, "cpu")._generate_indices()[0].chunk(ranks)
    chunks = tokens.chunk(2 * ranks)

    def held(layout):
        return run_local(lambda group: ringspan.shard(tokens, 0, layout=layout), ranks, timeout=60)

    for rank, found in enumerate(held("zigzag")):
        assert found.tolist() == order[rank].tolist()
        assert found.tolist() == torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]]).tolist()
    assert [x.tolist() for x in held("contiguous")] == [x.tolist() for x in tokens.chunk(ranks)]
    assert [x.tolist() for x in held("striped")] == [tokens[rank::ranks].tolist() for rank in range(ranks)]


def test_joint_attention_hides_the_padding_of_a_text_that_is_spread_as_the_image_is():
    torch.manual_seed(0)
    words, parts = torch.tensor([7, 3]), [7, 15]  # of batch entries; tokens of text and image
    q, k, v = torch.randn(3, 2, 4, sum(parts), 16, dtype=torch.float64).unbind()
    seen = torch.ones(2, sum(parts), dtype=torch.bool)
    seen[:, :7] = torch.arange(7) < words[:, None]
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])

    def work(group):
        def cut(x, dim):
            return torch.cat([ringspan.shard(part, dim) for part in x.split(parts, dim)], dim)

        found = ringspan.unshard(cut(seen, 1), 1)
        ranges = ringspan.masks.from_mask(found[:, None].expand(-1, sum(parts), -1))
        out = ringspan.ring_attention(*(cut(x, 2) for x in (q, k, v)), key_ranges=ranges)
        return relative_error(out, cut(exact, 2))

    assert max(run_local(work, 4, timeout=60)) < 1e-12


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own use of it
def test_what_is_not_there_is_refused():
    q = torch.randn(1, 2, 6, 8)
    absent = ["dropout_p", "attn_mask", "bias", "alibi_slopes", "softcap", "return_attn_probs", "ulysses_degree"]
    for name in absent:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            ringspan.ring_attention(q, q, q, **{name: 1})
    with pytest.raises(ringspan.ArgumentTypeError, match="unsupported dtype"):
        ringspan.ring_attention(*[q.to(torch.float8_e4m3fn)] * 3)
    with pytest.raises(ringspan.ArgumentError, match="must end at the number of tokens"):
        ringspan.ring_attention(q, q, q, cu_seqlens=(0, 3))
    for options in (dict(causal=True), dict(window_size=(2, 0)), dict(cu_seqlens=(0, 6))):
        with pytest.raises(ringspan.LayoutError, match="key_ranges"):
            ringspan.ring_attention(q[:, :, :2], q, q, **options)
    x = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ringspan.ring_attention(x, q, q).sum(), x, create_graph=True)
    with pytest.raises(ringspan.UnsupportedError, match="second derivative"):
        torch.autograd.grad(grad.sum(), x)
    with pytest.raises(ringspan.UnsupportedError, match="forward-mode"):
        torch.func.jvp(lambda x: ringspan.ring_attention(x, q, q), (q,), (q,))
    with pytest.raises(ringspan.UnsupportedError, match=r"torch\.func"):
        torch.func.vmap(lambda x: ringspan.ring_attention(x, x, x))(q[None])
