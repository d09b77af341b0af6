"""Transfers run beside the work: posted before a step's tiles are computed, awaited after; results leave at once."""

import threading

import pytest
import torch

from ringspan import call, run_local
from ringspan.kernels.reference import Reference
from ringspan.options import Options
from ringspan.transport.local import _LocalChannel


@pytest.fixture
def orders(monkeypatch):
    """By thread, as it happened: p, posted to be received; c, computed; w, waited for; s, sent; f, gone."""
    found: dict[int, str] = {}
    post = _LocalChannel.post

    def note(letter):
        mine = threading.get_ident()
        found[mine] = found.get(mine, "") + letter

    def noted_post(self, index, lane, sends=(), receives=()):
        pending = post(self, index, lane, sends, receives)
        if receives or sends:
            note("p" if receives else "s")
            wait = pending.wait
            pending.wait = lambda: (note("w" if receives else "f"), wait())[1]
        return pending

    def noted(name):
        inner = getattr(Reference, name)
        return lambda self, *args: (note("c"), inner(self, *args))[1]

    monkeypatch.setattr(_LocalChannel, "in_place", False)  # where hops take time
    monkeypatch.setattr(_LocalChannel, "post", noted_post)
    for name in ("absorb_runs", "absorb_gradient"):
        monkeypatch.setattr(Reference, name, noted(name))
    return found


# Step 0, 1, 2 and 3, and what comes home after them. Results ride from step 1 on, beside the shards.
WITH_RIDES = "pcw pcsw ppcwfsw pcwfs pwf"


@pytest.mark.parametrize(("num_queries", "forward"), [(40, "pcw pcw pcw c"), (4, WITH_RIDES)])  # 4 travel
def test_a_step_computes_while_it_receives_and_waits_for_nothing_before_its_result_leaves(num_queries, forward, orders):
    def work(group):
        q, k = torch.randn(1, 2, num_queries // 4, 8), torch.randn(1, 2, 10, 8)
        options = Options(kernel="reference")
        out, lse = call.forward(group.transport, q, k, k, options)
        call.backward(group.transport, out, None, (q, k, k, out, lse), options)

    run_local(work, 4, timeout=60)
    assert list(orders.values()) == [(forward + WITH_RIDES).replace(" ", "")] * 4


def test_every_result_that_is_sent_is_waited_for(orders):
    """Of a causal mask the last rank sends its last one in its last step."""

    def work(group):
        q = torch.randn(1, 2, 10, 8)
        options = Options(right=0, kernel="reference")
        out, lse = call.forward(group.transport, q, q, q, options)
        call.backward(group.transport, out, None, (q, q, q, out, lse), options)

    run_local(work, 4, timeout=60)
    assert all(order.count("s") == order.count("f") > 0 for order in orders.values())
