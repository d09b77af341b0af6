"""ringspan over threads of one process: run_local, striped."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from benchmarks.peers.contract import Calls, Peer


class RingspanLocal(Peer):
    name = "ringspan, run_local"
    packages = ("ringspan",)
    note = "threads of one process, striped; starting the threads is timed"
    one_process = True

    def ranges(self, problem, rank, workers):
        return [range(worker, problem.tokens, workers) for worker in range(workers)]

    def calls(self, problem, shards, rank, workers):
        import torch
        from benchmarks.peers import torch_side

        import ringspan

        ends = np.cumsum([0, *map(len, self.ranges(problem, rank, workers))])
        options = dict(causal=problem.causal, layout="striped")
        of_workers = [
            torch_side.calls(
                problem,
                np.ascontiguousarray(shards[:, :, begin:end]),
                lambda q, k, v: ringspan.ring_attention(q, k, v, **options),
            )
            for begin, end in pairwise(ends)
        ]

        def forward():
            return ringspan.run_local(lambda group: of_workers[group.rank()].forward(), workers)

        def both():
            return list(zip(*ringspan.run_local(lambda group: of_workers[group.rank()].both(), workers), strict=True))

        def read(parts):
            return torch.cat(list(parts), 2)[0].float().numpy()

        return Calls(forward, both, read)
