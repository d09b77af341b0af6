"""One message or two for the two tensors of a hop: where a copy is cheaper than one more round of gloo's handshake.

    python benchmarks/messages.py

Two processes swap a parcel of two equal tensors through the library's own channel, packed and not, in turn.
"""

from __future__ import annotations

import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pairs import machine

from ringspan.transport import torch_dist
from ringspan.transport.contract import Parcel, Spec

SIZES_KIB = (1, 16, 64, 256, 1024, 4096)
ROUNDS = 101


def main() -> None:
    print(machine())
    print("time of two messages over time of one, packed: median (quartiles) of the pairs")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (folder + "/store",), 2)


def measure(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    transport = torch_dist.transport_of(dist.group.WORLD)
    for size in SIZES_KIB:
        channel = transport.channel(transport.begin_call(), range(2))
        parcel = Parcel(tuple(torch.zeros(size * 512 // 4) for _ in range(2)))
        spec = Spec(tuple(tuple(x.shape) for x in parcel.tensors), (torch.float32,) * 2, torch.device("cpu"))
        ratios = []
        for index in range(ROUNDS):
            spent = []
            for bound in (0, 1 << 40):
                torch_dist.PACK_BYTES = bound
                dist.barrier()
                begin = time.perf_counter()
                (arrived,) = channel.post(index, 0, [(1 - rank, parcel)], [(1 - rank, spec)]).wait()
                spent.append(time.perf_counter() - begin)
                channel.release(arrived)
            ratios.append(spent[0] / spent[1])
        low, median, high = statistics.quantiles(ratios[1:], n=4)
        if rank == 0:
            print(f"{size:6} KiB  {median:.2f} ({low:.2f} to {high:.2f})", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
