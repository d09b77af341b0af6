"""Small shards that are read in place are computed several steps at a time: what that changes, and what it must not."""

import threading
from types import SimpleNamespace

import pytest
import torch
from whole import Case, check, ring

from ringspan import run_local
from ringspan.kernels.native import Native
from ringspan.transport.local import _LocalChannel

NUM_RANKS = 5


@pytest.fixture
def calls(monkeypatch):
    """By thread: how many runs each kernel call had, and what it released, which it must not read afterwards."""
    found: dict[int, list[int]] = {}
    released: dict[int, set[int]] = {}
    absorb_runs, release = Native.absorb_runs, _LocalChannel.release

    def spying_absorb_runs(self, state, q, runs, scale):
        mine = threading.get_ident()
        assert not {k.data_ptr() for k, _, _ in runs} & released.get(mine, set())
        found.setdefault(mine, []).append(len(runs))
        absorb_runs(self, state, q, runs, scale)

    def spying_release(self, parcel):
        released.setdefault(threading.get_ident(), set()).add(parcel.tensors[0].data_ptr())
        release(self, parcel)

    monkeypatch.setattr(Native, "absorb_runs", spying_absorb_runs)
    monkeypatch.setattr(_LocalChannel, "release", spying_release)
    return SimpleNamespace(runs=found, released=released)


def results_of(enough_keys, calls, monkeypatch, case):
    calls.released.clear()  # memory may be given out again in the next ring
    monkeypatch.setattr(Native, "enough_keys", enough_keys)
    found = run_local(ring, NUM_RANKS, case, timeout=60)[0]
    check(case, found)
    return found


@pytest.mark.parametrize(
    ("enough_keys", "runs"),
    [(0, [1, 1, 1, 1, 1]), (20, [1, 1, 1, 1, 1]), (21, [2, 2, 1]), (45, [3, 2]), (10**9, [5])],
)
def test_shards_are_gathered_until_there_are_enough_keys(enough_keys, runs, calls, monkeypatch):
    results_of(enough_keys, calls, monkeypatch, Case(100))
    assert list(calls.runs.values()) == [runs] * NUM_RANKS


def test_it_is_keys_that_there_must_be_enough_of_however_many_queries(calls, monkeypatch):
    results_of(21, calls, monkeypatch, Case(50, keys=100))
    assert list(calls.runs.values()) == [[2, 2, 1]] * NUM_RANKS


@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
@pytest.mark.parametrize(
    "options",
    [{}, dict(causal=True), dict(window_size=(30, 5)), dict(causal=True, cu_seqlens=[0, 33, 34, 70, 131])],
    ids=str,
)
def test_every_mask_and_layout_has_the_same_bits_however_many_are_gathered(options, layout, calls, monkeypatch):
    case = Case(131, 4, 2, layout=layout, options=options)
    alone, some, all_at_once = (results_of(enough_keys, calls, monkeypatch, case) for enough_keys in (0, 60, 10**9))
    for name, x in alone.items():
        assert torch.equal(x, some[name]) and torch.equal(x, all_at_once[name]), name


def test_what_is_copied_is_computed_step_by_step(monkeypatch):
    """Its buffers are needed for the next shard."""
    monkeypatch.setattr(_LocalChannel, "in_place", False)
    monkeypatch.setattr(Native, "enough_keys", 10**9)
    seen = []
    absorb_runs = Native.absorb_runs
    monkeypatch.setattr(Native, "absorb_runs", lambda *args: (seen.append(len(args[3])), absorb_runs(*args)))
    case = Case(100)
    check(case, run_local(ring, NUM_RANKS, case, timeout=60)[0])
    assert seen == [1] * NUM_RANKS**2
