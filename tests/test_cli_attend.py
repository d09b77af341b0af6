import json
import re
import sys

import pytest
import torch
from command_line import CommandLine, command, expected, relative, write_input
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ringspan.commands import check, report
from ringspan.commands.asked import Asked
from ringspan.commands.job import Spent
from ringspan.commands.source import RandomSource
from ringspan.layout import LAYOUTS, split
from ringspan.observe import StepRecord
from ringspan.schedule.contract import Step


@pytest.fixture
def ringspan(monkeypatch, capsys) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


MASKS = {
    "no mask": ((), {}),
    "causal": (("--causal",), {"right": 0}),
    "window": (("--window", "9,3"), {"left": 9, "right": 3}),
    "documents": (("--causal", "--documents", "0,20,20,33,61"), {"right": 0, "cu_seqlens": (0, 20, 20, 33, 61)}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_threads_write_what_the_definition_says(tmp_path, ringspan, layout, mask):
    words, meaning = MASKS[mask]
    path, out = write_input(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    ended = ringspan(
        *("attend", path, "--workers", 4, "--transport", "local", "--layout", layout, "--out", out, "--lse"), *words
    )
    assert ended.status == 0, ended.err
    found, truth = load_file(out), expected(path, **meaning)
    assert relative(found["out"], truth[0]) < 2e-6
    assert relative(found["lse"], truth[1]) < 2e-6
    assert found["out"].dtype == torch.float32 and set(found) == {"out", "lse"}
    assert f"{layout} " in ended.out and "✓" in ended.out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_may_have_a_head_dim_of_their_own(tmp_path, ringspan, dtype):
    path, out = write_input(tmp_path / "in.safetensors", value_dim=5, dtype=dtype), tmp_path / "out.safetensors"
    ended = ringspan("attend", path, "--workers", 2, "--transport", "local", "--causal", "--compare", "--out", out)
    assert ended.status == 0 and "head_dim 8, of v 5" in ended.out, ended.err
    assert relative(load_file(out)["out"], expected(path, right=0)[0]) < (2e-6 if dtype == torch.float32 else 2.5e-3)


def test_processes_write_what_the_definition_says_and_tell_how_it_went(tmp_path):
    path, out = write_input(tmp_path / "in.safetensors", dtype=torch.bfloat16), tmp_path / "out.safetensors"
    words, meaning = MASKS["documents"]
    ended = command("attend", path, "--workers", 3, "--layout", "striped", "--lse", "--out", out, *words)
    assert ended.status == 0, ended.err
    found, truth = load_file(out), expected(path, **meaning)
    assert found["out"].dtype == torch.bfloat16 and found["lse"].dtype == torch.float32
    assert relative(found["out"], truth[0]) < 2.5e-3 and relative(found["lse"], truth[1]) < 2e-6
    for told in ("3 processes", "bfloat16", "61 (batch 2, 4 heads on 2", "causal, 4 documents", "striped"):
        assert told in ended.out
    assert re.search(r"GFLOP/s", ended.out) and re.search(r"waiting +│ \d+% / \d+% / \d+% of the time", ended.out)
    assert re.search(r"peak memory +│ \d+ / \d+ / \d+ MiB beyond inputs", ended.out) or sys.platform != "linux"
    assert [
        line for line in ended.err.splitlines() if re.match(r"step \d+ of 3 of worker 0, about \d+ s left", line)
    ]  # no terminal, so plain lines
    assert set(tmp_path.iterdir()) == {path, out}


@pytest.mark.parametrize(
    ("waits_and_flights", "told"),
    [
        ([(0.0, None), (0.1, None)], "none: shards are read in place"),
        ([(0.0, 0.0), (0.1, None)], "100% of their time hidden behind computing"),
        ([(0.0, 0.0), (1.0, 4.0)], "75% / 75% / 100% of their time hidden behind computing"),
        ([(5.0, 4.0), (9.0, 4.0)], "0% / 0% / 0% of their time hidden behind computing"),
        ([(0.0, None)], "none: there is one worker"),
    ],
)
def test_transfers_that_were_never_waited_for_are_not_taken_for_none(waits_and_flights, told):
    spent = [Spent(9.0, 1.0, wait_s, flight_s, None) for wait_s, flight_s in waits_and_flights]
    assert report._transfers(spent) == told


def test_a_trace_and_the_hidden_share_of_transfers_are_told(tmp_path):
    path, file = write_input(tmp_path / "in.safetensors"), tmp_path / "trace.json"
    ended = command("attend", path, "--workers", 3, "--transport", "torch_dist", "--trace", file)
    assert ended.status == 0, ended.err
    assert re.search(r"transfers +│ \d+% / \d+% / \d+% of their time hidden", ended.out)
    assert {event["pid"] for event in json.loads(file.read_text())["traceEvents"]} == {0, 1, 2}
    assert "(2 K/V shards" in ended.out or sys.platform != "linux"
    ended = command("attend", path, "--workers", 3)
    assert re.search(r"transfers +│ none: shards are read in place", ended.out)
    assert "(3 K/V shards, one copy for all" in ended.out or sys.platform != "linux"


def test_few_queries_travel_and_the_steps_and_the_memory_are_told_so(tmp_path):
    path, file = write_input(tmp_path / "in.safetensors", num_queries=5, num_keys=200), tmp_path / "trace.json"
    ended = command("attend", path, "--workers", 3, "--transport", "torch_dist", "--trace", file)
    assert ended.status == 0, ended.err
    assert "step 4 of 4 of worker 0, about 0 s left" in ended.err  # three with queries, one in which states come home
    assert "(2 query shards and 3 states on their way" in ended.out or sys.platform != "linux"
    names = {event["name"].split()[0] for event in json.loads(file.read_text())["traceEvents"]}
    assert {"shard", "state"} <= names and "gradient" not in names


def test_a_trace_that_cannot_be_written_is_refused_before_the_work_and_destroys_nothing(tmp_path, ringspan):
    path, out = write_input(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    before = path.read_bytes()
    for file, told in (
        (tmp_path / "no folder" / "trace.json", "--trace cannot be written"),
        (tmp_path, "it is a folder"),
        (path, "--trace is INPUT itself"),
        (out, "--trace and --out are one file"),
    ):
        ended = ringspan("attend", path, "--transport", "local", "--out", out, "--trace", file)
        assert ended.status == 2 and told in ended.err
    assert path.read_bytes() == before and set(tmp_path.iterdir()) == {path}
    ended = ringspan("attend", path, "--transport", "local", "--kernel", "nonesuch", "--trace", tmp_path / "trace.json")
    assert ended.status == 2 and set(tmp_path.iterdir()) == {path}


def test_torchrun_uses_the_group_that_it_made(tmp_path):
    path, out = write_input(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ringspan")
    ended = command("attend", path, "--causal", "--layout", "zigzag", "--out", out, program=torchrun)
    assert ended.status == 0, ended.err
    assert relative(load_file(out)["out"], expected(path, right=0)[0]) < 2e-6
    assert ended.out.count("2 processes") == 1


@pytest.mark.slow
def test_under_torchrun_a_refusal_is_told_once_and_no_rank_hangs(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ringspan")
    ended = command("attend", tmp_path / "none.safetensors", program=torchrun)
    assert ended.status != 0
    assert ended.err.count("INPUT cannot be read") == 1 and "exitcode: 2" in re.sub(r" +:", ":", ended.err)


def test_under_torchrun_workers_and_threads_of_ones_own_are_refused(ringspan, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = ringspan("attend", "--tokens", 8, "--workers", 3)
    assert ended.status == 2 and "--workers must be what torchrun started" in ended.err
    ended = ringspan("attend", "--tokens", 8, "--transport", "local")
    assert ended.status == 2 and "without torchrun" in ended.err


def test_queries_and_keys_may_differ_in_number(tmp_path, ringspan):
    path, out = write_input(tmp_path / "in.safetensors", num_queries=10, num_keys=33), tmp_path / "out.safetensors"
    ended = ringspan("attend", path, "--workers", 3, "--transport", "local", "--out", out)
    assert ended.status == 0 and "10 queries, 33 keys" in ended.out
    assert relative(load_file(out)["out"], expected(path)[0]) < 2e-6


def test_few_rows_and_one_worker_are_told_as_such(ringspan):
    ended = ringspan("attend", "--tokens", 10, "--workers", 1, "--transport", "local")
    assert "on 10 rows against" in ended.out and "1 thread of one process" in ended.out
    assert "none: there is one worker" in ended.out and re.search(r"computing +│ \d+% of the time", ended.out)
    assert re.search(r"time +│ [\d.]+ ms, ", ended.out)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is measured on Linux")
def test_what_a_process_loads_once_is_not_the_memory_of_a_ring_of_threads():
    ended = command("attend", "--tokens", 500, "--workers", 3, "--transport", "local", "--causal")
    assert ended.status == 0, ended.err
    assert int(re.search(r"peak memory +│ (\d+) MiB beyond inputs", ended.out).group(1)) < 60


def test_the_time_left_counts_from_the_beginning_of_the_first_step(capsys):
    bars = report.Bars(None, "worker 0", 4)
    times = dict(begin_ns=10**9, handed_ns=10**9, posted_ns=10**9, computed_ns=3 * 10**9, end_ns=3 * 10**9)
    bars.step(StepRecord("forward", Step(0, 0, ()), 1, 4, **times, computed=(0,), flights=()))
    assert capsys.readouterr().err == "step 1 of 4 of worker 0, about 6 s left\n"


def test_more_workers_than_tokens_are_no_trouble(tmp_path, ringspan):
    path, out = write_input(tmp_path / "in.safetensors", 3, 3), tmp_path / "out.safetensors"
    ended = ringspan("attend", path, "--workers", 5, "--transport", "local", "--causal", "--out", out)
    assert ended.status == 0, ended.err
    assert relative(load_file(out)["out"], expected(path, right=0)[0]) < 2e-6


def test_nan_in_the_input_is_right_where_it_is_seen(tmp_path, ringspan):
    path, out = write_input(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    tensors = load_file(path)
    tensors["v"][:, :, 40] = torch.nan
    save_file(tensors, path)
    ended = ringspan("attend", path, "--workers", 3, "--transport", "local", "--causal", "--out", out)
    assert ended.status == 0, ended.out
    nan = load_file(out)["out"].isnan()
    assert nan[:, :, 40:].all() and not nan[:, :, :40].any()


def test_compare_times_plain_attention_too(ringspan):
    ended = ringspan(
        *("attend", "--tokens", 300, "--workers", 2, "--transport", "local", "--causal", "--compare", "--kv-heads", 2)
    )
    assert ended.status == 0
    assert re.search(r"plain torch +│ [\d.]+ m?s, [\d.]+ times the ring's time, error \d", ended.out)


def test_the_output_says_what_it_is(tmp_path, ringspan):
    out = tmp_path / "out.safetensors"
    ringspan("attend", "--tokens", 20, "--transport", "local", "--causal", "--seed", 3, "--out", out)
    with safe_open(out, framework="pt") as file:
        told = file.metadata()
    assert told["input"] == "random, seed 3" and told["mask"] == "causal" and told["made_by"].startswith("ringspan ")


def test_random_input_does_not_depend_on_who_makes_it():
    source = RandomSource(tokens=53, heads=3, kv_heads=1, head_dim=5, dtype=torch.float32, seed=7)
    for name in "qkv":
        whole = source.take(name, [range(53)])
        for layout in LAYOUTS:
            ranges = split(layout, 53, 4).ranges(2)
            positions = [position for piece in ranges for position in piece]
            assert torch.equal(source.take(name, ranges), whole[:, :, positions])


def test_random_input_is_normal_and_differs_by_tensor_and_seed():
    def take(name, seed):
        return RandomSource(4096, 4, 4, 33, torch.float32, seed).take(name, [range(4096)])

    q, k, other = take("q", 0), take("k", 0), take("q", 1)
    assert abs(float(q.mean())) < 5e-3 and abs(float(q.std()) - 1) < 5e-3
    assert abs(float((q**4).mean()) - 3) < 0.05
    for x, y in ((q, k), (q, other), (q[:, 0], q[:, 1]), (q[:, :, :-1], q[:, :, 1:]), (q[..., :-1], q[..., 1:])):
        assert abs(float((x * y).mean())) < 5e-3


def test_the_sample_holds_the_first_and_the_last_row():
    for num_queries in (1, 2, 63, 64, 65, 100_000):
        positions = check.sampled_positions(num_queries).tolist()
        assert positions[0] == 0 and positions[-1] == num_queries - 1
        assert len(positions) == min(num_queries, check.NUM_ROWS) and positions == sorted(set(positions))


def _judged(change) -> check.Verdict:
    source, asked = RandomSource(300, 2, 1, 16, torch.float32, 0), Asked(causal=True)
    mask = asked.mask(300, 300)
    truth = check.exact_rows(check.sampled_positions(300), source, mask, 0.25, lambda share: None)
    out = truth.out.float()
    change(out)
    return check.judge(check.Rows(truth.positions, out, truth.lse), truth, source, mask, 0.25)


def test_the_check_agrees_with_exact_rows_and_sees_a_single_wrong_one():
    assert _judged(lambda out: None).passed
    assert not _judged(lambda out: out[:, :, -1].mul_(1.05)).passed
    assert not _judged(lambda out: out[:, :, 30].fill_(torch.nan)).passed


def test_the_bound_grows_to_twice_the_error_of_plain_attention(monkeypatch):
    monkeypatch.setitem(check.BOUNDS, torch.float32, 1e-9)
    verdict = _judged(lambda out: None)
    assert verdict.plain is not None and verdict.bound == 2 * verdict.plain > verdict.out_error > 1e-9
