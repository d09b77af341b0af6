"""What can go wrong around shared memory: systems without it, limits, interruptions, failures while others read."""

import contextlib
import errno
import fcntl
import functools
import gc
import os
import pathlib
import resource
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from one_process import ends
from processes import results, run_processes
from torch.distributed.device_mesh import init_device_mesh

import ringspan
from ringspan import call
from ringspan.transport import inbox, segments, shared_memory
from ringspan.transport.contract import Parcel, Spec, spec_of
from ringspan.transport.process_group import transport_of

MIB, CPU = 1 << 20, torch.device("cpu")


def shards(rank, tokens=64, make=torch.empty):
    generator = torch.Generator().manual_seed(rank)
    q, k, v = (make((1, 2, tokens, 16), dtype=torch.float32) for _ in range(3))
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape, generator=generator))
    return q, k, v


def plain(num_ranks, **options):
    full = [torch.cat([shards(rank)[i] for rank in range(num_ranks)], 2) for i in range(3)]
    return torch.nn.functional.scaled_dot_product_attention(*full, **options).chunk(num_ranks, 2)


def store():
    return dist.group.WORLD.get_group_store()


def open_files():
    return len(os.listdir("/proc/self/fd"))


def mappings():
    """Segments that this process has mapped, its own and those of others."""
    with open("/proc/self/maps") as lines:
        return sum("memfd:ringspan" in line for line in lines)


def ours():
    """What shared memory holds open here: segments, mappings, and the ways to other ranks."""
    names = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return [name for name in names if "memfd:ringspan" in name or "pidfd" in name] + ["mapping"] * mappings()


# What one rank of a host may lack, each by the call that then fails.
LACKS = {
    "no memfd": lambda patch: patch.delattr(os, "memfd_create"),
    "memfd forbidden": lambda patch: patch.setattr(os, "memfd_create", refused(errno.ENOSYS)),
    "no pidfd": lambda patch: patch.setattr(os, "pidfd_open", refused(errno.EPERM)),
    "no files left": lambda patch: patch.setattr(os, "pipe2", refused(errno.EMFILE)),
    "many words about it": lambda patch: patch.setattr(os, "pipe2", refused(errno.EMFILE, "ü" * 2000)),
    "no boot id": lambda patch: boot_id(patch, refused(errno.ENOENT)),
    "no room": lambda patch: patch.setattr(os, "posix_fallocate", refused(errno.ENOSPC)),
    "another host": lambda patch: boot_id(patch, lambda: "elsewhere"),
    "another pid namespace": lambda patch: patch.setattr(os, "getpid", os.getppid),
}


def refused(number, words=None):
    def refuse(*_):
        raise OSError(number, words or os.strerror(number))

    return refuse


def boot_id(patch, read):
    read_text = pathlib.Path.read_text
    patch.setattr(pathlib.Path, "read_text", lambda path: read() if path.name == "boot_id" else read_text(path))


def without(rank):
    found = {}
    for name, lack in LACKS.items():
        group = dist.new_group([0, 1, 2])
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                lack(patch)
            out = ringspan.ring_attention(*shards(rank), group=group)
        transport = transport_of(group)
        found[name] = out, transport.shared_memory is None, transport.why_not_shared
    gc.collect()
    return found, ours()


def test_what_one_rank_lacks_sends_all_to_torch_dist_and_leaves_nothing_open():
    expected = plain(3)
    for rank, (found, left) in enumerate(results(run_processes(without, 3, group_timeout_s=20))):
        for name, (out, declined, reason) in found.items():
            torch.testing.assert_close(out, expected[rank])
            assert declined and "rank 1" in reason, (name, reason)
        assert not left, left


def modes(rank):
    """Memory that a call in inference mode made is used again by one that is differentiated."""
    q, k, v = shards(rank)
    with torch.inference_mode():
        outs = [ringspan.ring_attention(q, k, v)]
        whole = ringspan.unshard(q, 2)
    assert torch.equal(ringspan.unshard(q, 2), whole)
    for x in (q, k, v):
        x.requires_grad_()
    outs.append(ringspan.ring_attention(q, k, v))
    outs[-1].sum().backward()
    with torch.device("meta"):
        outs.append(ringspan.ring_attention(q, k, v))
    return [out.detach() for out in outs]


def test_calls_in_inference_mode_and_others_share_memory():
    expected = plain(2)
    for rank, outs in enumerate(results(run_processes(modes, 2))):
        for out in outs:
            torch.testing.assert_close(out, expected[rank])


def fail_and_overwrite(rank):
    """Rank 0 fails when rank 1 has begun to read its keys, and overwrites them before rank 1 has finished."""
    from ringspan.kernels.table import KERNELS

    q, k, v = shards(rank, make=ringspan.empty_shared)
    ringspan.ring_attention(q, k, v, causal=True)
    tiles = []

    def fail(*_):
        store().wait(["reading"])
        raise MemoryError("no room for this tile")

    def held(*args, absorb):
        tiles.append(args)
        if len(tiles) == 2:
            store().set("reading", "")
            store().wait(["overwritten"])
        absorb(*args)

    for kernel in KERNELS:
        kernel.enough_keys = 0  # or the small shards would be one call
        kernel.absorb_runs = fail if rank == 0 else functools.partial(held, absorb=kernel.absorb_runs)
    try:
        return ringspan.ring_attention(q, k, v, causal=True)
    except MemoryError:
        k.fill_(float("nan"))
        v.fill_(float("nan"))
        store().set("overwritten", "")
    except ringspan.RankFailedError as error:
        return str(error)


def test_what_was_read_of_a_rank_that_failed_meanwhile_is_no_result():
    _, told = results(run_processes(fail_and_overwrite, 2, limit_s=60))
    assert isinstance(told, str) and "rank 0 failed first: MemoryError: no room for this tile" in told, told


def give_up_and_overwrite(rank):
    """Rank 2 is interrupted in the call after. So rank 0 gives this one up, while rank 1 reads its keys, and overwrites
    them."""
    from ringspan.kernels.table import KERNELS

    q, k, v = shards(rank, make=ringspan.empty_shared)
    ringspan.ring_attention(q, k, v, causal=True)
    tiles = []

    def held(*args, absorb):
        tiles.append(args)
        if rank == 1 and len(tiles) == 2:
            store().set("reading", "")
            store().wait(["overwritten"])
        absorb(*args)

    for kernel in KERNELS:
        kernel.enough_keys = 0  # or the small shards would be one call
        kernel.absorb_runs = functools.partial(held, absorb=kernel.absorb_runs)
    if rank == 2:
        ringspan.ring_attention(q, k, v, causal=True)
        store().wait(["reading"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sleep = inbox.Inbox.sleep
        inbox.Inbox.sleep = lambda *args: (os.kill(os.getpid(), signal.SIGINT), sleep(*args))[1]
        with pytest.raises(KeyboardInterrupt):
            ringspan.ring_attention(q, k, v, causal=True)
        store().wait(["told"])
        return None
    try:
        return ringspan.ring_attention(q, k, v, causal=True)
    except ringspan.RankFailedError as error:
        if rank == 0:
            k.fill_(float("nan"))
            v.fill_(float("nan"))
            store().set("overwritten", "")
            store().wait(["told"])
        else:
            store().set("told", "")
        return str(error)


def test_what_was_read_of_a_rank_that_gave_up_because_of_a_later_call_is_no_result():
    for told in results(run_processes(give_up_and_overwrite, 3, group_timeout_s=20, limit_s=60))[:2]:
        assert isinstance(told, str) and "rank 2 failed first: KeyboardInterrupt" in told, told


def interrupt(rank, at=(inbox.Inbox, "sleep"), **refused):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ringspan.ring_attention(*shards(rank))
    store().set(f"done/{rank}", "")
    store().wait([f"done/{other}" for other in range(3)])  # or the first call would be the one that is given up
    if rank == 1 and at[0] is inbox.Inbox:  # so that rank 0 has to wait for it
        store().wait(["interrupted"])
    if rank == 0:
        place, name = at
        plain = getattr(place, name)
        setattr(place, name, lambda *args, **kw: (os.kill(os.getpid(), signal.SIGINT), plain(*args, **kw))[1])
        with pytest.raises(KeyboardInterrupt):
            ringspan.ring_attention(*shards(rank), **refused)
        setattr(place, name, plain)
        store().set("interrupted", "")
    try:
        ringspan.ring_attention(*shards(rank))
    except ringspan.RankFailedError as error:
        return str(error)


def interrupt_refusal(rank):
    return interrupt(rank, layout="nonsense")


def interrupt_decision(rank):
    """All have agreed, and the others may be computing already."""
    return interrupt(rank, at=(call, "decide"))


@pytest.mark.parametrize("work", [interrupt, interrupt_refusal, interrupt_decision])
def test_a_rank_that_is_interrupted_while_it_waits_is_named_to_the_others(work):
    first, *others = results(run_processes(work, 3, group_timeout_s=600, limit_s=60))
    assert "this process group is done for" in first and "KeyboardInterrupt" in first
    for told in others:
        assert "rank 0 failed first: KeyboardInterrupt" in told


def interrupt_first_meeting(rank):
    """When the others have all answers already, and go on by pipes."""
    exchange, answers = shared_memory.exchange, []

    def exchange_and_interrupt(*args):
        answers.append(exchange(*args))
        if len(answers) == 2:
            raise KeyboardInterrupt
        return answers[-1]

    if rank == 0:
        shared_memory.exchange = exchange_and_interrupt
        with pytest.raises(KeyboardInterrupt):
            ringspan.ring_attention(*shards(rank))
        store().wait(["told/1", "told/2"])
        return None
    try:
        ringspan.ring_attention(*shards(rank))
    except ringspan.RankFailedError as error:
        store().set(f"told/{rank}", "")
        return str(error)


def test_a_rank_that_is_interrupted_when_the_ranks_first_meet_is_named_to_the_others():
    _, *others = results(run_processes(interrupt_first_meeting, 3, group_timeout_s=600, limit_s=60))
    for told in others:
        assert isinstance(told, str) and "rank 0 failed first: KeyboardInterrupt" in told, told


def fail_towards_a_full_pipe(rank):
    """Rank 0 fails in its first tile, when rank 1's pipe is full and rank 1, in a tile of its own, does not read it."""
    from ringspan.kernels.table import KERNELS

    ringspan.ring_attention(*shards(rank))

    def fail(*_):
        store().wait(["computing"])
        link = transport_of(dist.group.WORLD).shared_memory.links[1]
        while link.send(inbox.Record(0, 0, -1, bytes(inbox.LARGEST_BODY))):  # an agreement that nobody asks for
            pass
        raise MemoryError("no room for this tile")

    def held(*args, absorb):
        store().set("computing", "")
        store().wait(["failed"])
        absorb(*args)

    for kernel in KERNELS:
        kernel.enough_keys = 0  # or the small shards would be one call
        kernel.absorb_runs = fail if rank == 0 else functools.partial(held, absorb=kernel.absorb_runs)
    try:
        return ringspan.ring_attention(*shards(rank))
    except MemoryError:
        store().set("failed", "")
        store().wait(["told"])
    except ringspan.RankFailedError as error:
        store().set("told", "")
        return str(error)


def test_a_failure_is_known_to_a_rank_whose_pipe_was_full():
    _, told = results(run_processes(fail_towards_a_full_pipe, 2, group_timeout_s=600, limit_s=60))
    assert isinstance(told, str) and "rank 0 failed first: MemoryError: no room for this tile" in told, told


def leave_while_others_wait(rank, held_by):
    mesh = init_device_mesh("cpu", (1, 3), mesh_dim_names=("data", "context"))["context"]
    group = mesh.get_group() if held_by == "mesh" else dist.new_group([0, 1, 2])
    ringspan.ring_attention(*shards(rank), group=group)
    board = store().clone()  # its own goes with the group, which here may be that of all
    if rank == 0:
        board.wait(["waits/1", "waits/2"])
        dist.destroy_process_group(group)
        if held_by != "variable":
            del group
            gc.collect()
        board.wait(["told/1", "told/2"])
        dist.destroy_process_group = lambda: None  # which `run_processes` would call
        return None
    sleep = inbox.Inbox.sleep
    inbox.Inbox.sleep = lambda *args: (board.set(f"waits/{rank}", ""), sleep(*args))[1]
    with pytest.raises(ringspan.RankFailedError) as told:
        ringspan.ring_attention(*shards(rank), group=group)
    board.set(f"told/{rank}", "")
    return str(told.value)


@pytest.mark.parametrize("held_by", ["nobody", "variable", "mesh"])
def test_a_rank_that_destroys_the_group_is_not_waited_for(held_by):
    _, *others = results(run_processes(leave_while_others_wait, 3, held_by, group_timeout_s=600, limit_s=60))
    for told in others:  # one notices, and the other may hear of it from there
        assert "gave up waiting for rank 0 to begin call" in told and "the process group was destroyed there" in told


def come(transport, call):
    """A rank's part of an agreement, without its wait for the others."""
    while transport._call < call:
        transport.begin_call()
    for rank in transport.links:
        transport._send(rank, shared_memory._AGREEMENT, call, bytes([transport.rank]))


def meet(transport, call=1):
    while transport._call < call:
        transport.begin_call()
    return transport.agree(call, bytes([transport.rank]))


def test_what_a_rank_sent_before_it_left_counts_though_both_come_to_light_at_once():
    mine, other = ends(2)
    read, answers = mine._inbox.read, iter([True])

    def read_before_it_comes():
        found = read()
        if next(answers, False):
            come(other, 1)
            shared_memory._say_left(1, os.getpid(), other._page, ())
        return found

    mine._inbox.read = read_before_it_comes
    assert meet(mine) == [b"\0", b"\1"]


def test_what_a_rank_sent_before_its_process_went_counts():
    mine, other = ends(2)
    mine._inbox.sleep = lambda *_: (come(other, 1), mine.links[1])[1]
    assert meet(mine) == [b"\0", b"\1"]
    mine._inbox.sleep = lambda *_: mine.links[1]
    with pytest.raises(ringspan.RankFailedError, match=r"waiting for rank 1 (.|\n)*its process .* is gone"):
        meet(mine, 2)


def test_a_rank_that_ends_well_while_another_is_still_waited_for_is_not_missed():
    """Its last record and its end may be seen in one moment, by a rank that was not on a core meanwhile."""
    mine, second, third = ends(3)
    happens = iter([lambda: (come(second, 1), mine.links[1])[1], lambda: come(third, 1)])
    mine._inbox.sleep = lambda *_: next(happens)()
    assert meet(mine) == [b"\0", b"\1", b"\2"]


def test_a_call_that_a_rank_has_done_its_part_of_is_not_spoiled_by_its_next_one():
    mine, other = ends(2)
    come(other, 1)
    come(other, 2)
    other.fail(ValueError("out of luck"))
    assert meet(mine) == [b"\0", b"\1"]
    with pytest.raises(ringspan.RankFailedError, match="rank 1 failed first: ValueError: out of luck"):
        meet(mine, 2)


def test_of_the_calls_that_were_given_up_the_earliest_counts():
    mine, second, third = ends(3)
    for transport, number in ((second, 1), (third, 1), (third, 2)):
        come(transport, number)
    second.fail(ValueError("in the first call"))  # all its answers are there, and its tensors may be overwritten
    third.fail(ValueError("in the second call"))
    with pytest.raises(ringspan.RankFailedError, match="rank 1 failed first: ValueError: in the first call"):
        meet(mine)


def test_a_rank_that_gave_up_because_of_another_tells_of_that_one_and_not_of_itself():
    mine, second, third = ends(3)
    come(third, 1)
    third.begin_call()
    third.fail(ValueError("out of luck"))
    with pytest.raises(ringspan.RankFailedError):
        meet(second)  # still in the first call, which it thereby gives up
    with pytest.raises(ringspan.RankFailedError, match="rank 2 failed first: ValueError: out of luck") as told:
        meet(mine)  # which looks at what its second says first
    assert "rank 1 failed first" not in str(told.value)


def test_a_rank_that_is_gone_is_not_waited_for_as_a_reader():
    mine, _other = ends(2)
    channel = mine.channel(mine.begin_call(), (0, 1))
    channel.post(0, 0, [(1, Parcel((torch.zeros(4),)))])
    mine._inbox.sleep = lambda seconds, watched, until_room_in: next(iter(watched), None)
    with pytest.raises(ringspan.RankFailedError, match=r"rank 1 to read rank 0's tensors(.|\n)*its process .* is gone"):
        channel.close()


def test_a_failure_is_told_however_long_its_reason_is_and_outlasts_its_rank():
    mine, other = ends(2)
    come(other, 1)
    while other.links[0].send(inbox.Record(shared_memory._AGREEMENT, 1, -1, bytes(inbox.LARGEST_BODY))):
        pass  # the last words of a failure and of an end have no room in the pipe, and one page for both
    other.fail(ValueError("ü" * 5000 + "\udcff"))  # a letter that UTF-8 does not have, as in a name of a file
    del other
    gc.collect()
    with pytest.raises(ringspan.RankFailedError, match="rank 1 failed first: ValueError: üü"):
        meet(mine)


def test_last_words_of_which_a_part_is_not_there_yet_are_looked_for_again():
    mine, other = ends(2)
    other._page.say(inbox.Record(shared_memory._LEFT, 1, 0, b""))
    other._page._bytes[20] ^= 1
    mine._collect()
    other._page._bytes[20] ^= 1
    with pytest.raises(ringspan.RankFailedError, match="the process group was destroyed there"):
        meet(mine)


def test_a_forked_child_that_lets_go_of_a_group_does_not_say_that_its_parent_left(monkeypatch):
    mine, other = ends(2)
    come(other, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        del other
        gc.collect()
    assert meet(mine) == [b"\0", b"\1"] and not mine._left


def test_what_is_no_pipe_is_no_way_to_a_rank_and_leaves_nothing_open():
    memory, before = segments.create(100), open_files()
    for number in (segments.Whereabouts.of(memory).fd, 1 << 20):
        with pytest.raises(OSError):  # noqa: PT011 (of several kinds)
            inbox.Link(1, os.getpid(), number)
    assert open_files() == before


def test_a_pipe_takes_records_over_a_users_quota_too_and_after_its_reader_went(monkeypatch):
    monkeypatch.setattr(fcntl, "fcntl", refused(errno.EPERM))
    box, record = inbox.Inbox(), inbox.Record(3, 1, 5, b"words")
    link = inbox.Link(1, os.getpid(), box.write_end)
    assert link.send(record) and link.send(record) and box.read() == [record, record]
    box.close()
    assert link.send(record)
    link.close()


def test_last_words_are_read_whole_or_not_at_all():
    page = inbox.Page(segments.create(inbox.Page.SIZE))
    page.nonce = 7
    assert not page.said
    record = inbox.Record(3, 1, 5, "zu spät".encode())
    page.say(record)
    assert page.said and page.nonce == 7 and page.read() == record
    page._bytes[40] ^= 1
    assert page.read() is None


def wide_shards(rank):
    """Shards that are views of segments of 16 MiB."""
    wide = [ringspan.empty_shared((1, 2, 1 << 17, 16)) for _ in range(3)]
    for x, y in zip(wide, shards(rank), strict=True):
        x[:, :, :64] = y
    return [x[:, :, :64] for x in wide]


def take_all_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with contextlib.suppress(OSError):
        while True:
            os.open("/dev/null", os.O_RDONLY)


def take_all_addresses():
    with open("/proc/self/statm") as words:
        taken = int(words.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 8 * MIB, resource.RLIM_INFINITY))


@pytest.mark.parametrize("take_all", [take_all_files, take_all_addresses])
def test_a_rank_that_has_no_room_to_map_another_says_so_on_every_rank(take_all):
    for rank, error in enumerate(results(run_processes(limited, 3, take_all))):
        if rank == 1:
            assert isinstance(error, ringspan.SharedMemoryFullError), error
            assert "no room to map the memory of rank" in str(error)
        else:
            assert isinstance(error, ringspan.RankFailedError), error
            assert "rank 1 failed first: SharedMemoryFullError" in str(error)


def limited(rank, take_all):
    ringspan.ring_attention(*shards(rank))
    tensors = wide_shards(rank)
    if rank == 1:
        take_all()
    try:
        ringspan.ring_attention(*tensors)
    except ringspan.RingspanError as error:
        for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS):
            most = resource.getrlimit(limit)[1]
            resource.setrlimit(limit, (most, most))
        return error


def die_while_all_wait(rank, victim):
    ringspan.ring_attention(*shards(rank))
    if rank == victim:
        store().wait([f"waits/{other}" for other in range(4) if other != victim])
        store().set("died", str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    sleep = inbox.Inbox.sleep

    def tell(*args):
        store().set(f"waits/{rank}", "")
        return sleep(*args)

    inbox.Inbox.sleep = tell
    try:
        ringspan.ring_attention(*shards(rank))
    except ringspan.RankFailedError as error:
        return time.monotonic() - float(store().get("died")), str(error)


def test_a_rank_that_is_killed_while_others_wait_is_noticed_within_a_second_and_named():
    endings = run_processes(die_while_all_wait, 4, 0, group_timeout_s=600)
    seconds, told = zip(*(endings[rank].value for rank in (1, 2, 3)), strict=True)
    assert min(seconds) < 1.0, seconds
    assert all("rank 0" in text and "is gone" in text for text in told), told


def stop_for_two_seconds(rank):
    ringspan.ring_attention(*shards(rank))
    store().set(f"pid/{rank}", str(os.getpid()))
    if rank == 0:
        pid = int(store().get("pid/1"))
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(2.0, os.kill, (pid, signal.SIGCONT)).start()
    wall, used = time.monotonic(), time.process_time()
    out = ringspan.ring_attention(*shards(rank))
    return out, time.monotonic() - wall, time.process_time() - used


def test_a_rank_that_is_stopped_is_waited_for_without_using_the_processor():
    """In a group with a timeout of more milliseconds than poll can count."""
    endings = run_processes(stop_for_two_seconds, 3, group_timeout_s=40 * 86_400.0)
    for rank, ((out, wall_s, used_s), expected) in enumerate(zip(results(endings), plain(3), strict=True)):
        torch.testing.assert_close(out, expected)
        if rank != 1:
            assert wall_s > 1.5 and used_s < 0.3


def make_groups(rank):
    left = []
    for _ in range(3):
        group = dist.new_group([0, 1, 2])
        q, k, v = (x.requires_grad_() for x in shards(rank))
        ringspan.ring_attention(q, k, v, group=group, causal=True).sum().backward()
        held = ours()
        dist.destroy_process_group(group)
        del group
        gc.collect()
        left.append((held, ours()))
    return left


def test_a_group_takes_its_memory_and_files_with_it():
    for left in results(run_processes(make_groups, 3)):
        for held, after in left:
            assert held and not after, after


def call_beside_a_child(rank):
    """As a DataLoader does it: a forked process holds everything that the group has open."""
    q, k, v = shards(rank, make=ringspan.empty_shared)
    ringspan.ring_attention(q, k, v)
    stay, end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end)
        os.read(stay, 1)
        os._exit(0)
    os.close(stay)
    outs = [ringspan.ring_attention(q, k, v) for _ in range(20)]
    os.close(end)
    os.waitpid(child, 0)
    return [*outs, ringspan.ring_attention(q, k, v)]


def test_a_forked_child_does_not_disturb():
    expected = plain(3)
    for rank, outs in enumerate(results(run_processes(call_beside_a_child, 3))):
        for out in outs:
            torch.testing.assert_close(out, expected[rank])


def call_in_a_child(rank, called_before):
    expected = ringspan.ring_attention(*shards(rank)) if called_before else plain(3)[rank]
    told = ""
    if rank == 0:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                ringspan.ring_attention(*(x + 1 for x in shards(rank)))
            except BaseException as error:
                os.write(write, repr(error).encode())
            os._exit(0)
        os.close(write)
        told = os.read(read, 1000).decode()
        os.waitpid(child, 0)
    return told, torch.allclose(ringspan.ring_attention(*shards(rank)), expected, atol=1e-5)


@pytest.mark.parametrize("called_before", [True, False])
def test_a_forked_child_is_not_taken_for_its_parent(called_before):
    found = results(run_processes(call_in_a_child, 3, called_before, group_timeout_s=20))
    assert "UnsupportedError" in found[0][0] and "a forked process cannot call on a group of its parent" in found[0][0]
    assert all(is_right for _, is_right in found)


NUM_CALLS = 40


def shards_of_call(rank, number):
    return torch.randn(3, 1, 2, 8, 16, generator=torch.Generator().manual_seed(100 * number + rank)).unbind(0)


def run_ahead(rank):
    """Without agreement a rank that nobody waits for is calls ahead. Each overwrites its shards after each call."""
    tensors = [ringspan.empty_shared((1, 2, 8, 16)) for _ in range(3)]
    outs = []
    for number in range(NUM_CALLS):
        for x, y in zip(tensors, shards_of_call(rank, number), strict=True):
            x.copy_(y)
        if rank == number // 8 % 3:
            threading.Event().wait(0.005)
        outs.append(ringspan.ring_attention(*tensors, causal=True, agreement=number == 0))
    return outs


def test_ranks_that_run_ahead_of_each_other_do_not_mix_their_calls():
    found = results(run_processes(run_ahead, 3))
    for number in range(NUM_CALLS):
        full = [torch.cat([shards_of_call(rank, number)[i] for rank in range(3)], 2) for i in range(3)]
        expected = torch.nn.functional.scaled_dot_product_attention(*full, is_causal=True)
        torch.testing.assert_close(torch.cat([outs[number] for outs in found], 2), expected)


def test_a_segment_is_reserved_in_pieces_that_a_timer_does_not_interrupt(monkeypatch):
    pieces = []
    monkeypatch.setattr(
        os, "posix_fallocate", lambda fd, at, size: (pieces.append((at, size)), os.truncate(fd, at + size))
    )
    memory = segments.create(9 * MIB)
    assert memory.numel() == 9 * MIB
    assert pieces == [(0, 4 * MIB), (4 * MIB, 4 * MIB), (8 * MIB, MIB)]


def test_more_than_there_is_is_refused_and_nobody_killed(monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("the kernel would end processes of this host"))
    before = open_files()
    for shape in ((1 << 50,), (1 << 80, 3)):
        with pytest.raises(ringspan.SharedMemoryFullError, match="bytes are left on this host or in this container"):
            ringspan.empty_shared(shape)
    assert open_files() == before
    with pytest.raises(ringspan.ArgumentError, match="sequence of integers"):
        ringspan.empty_shared(5)


def test_what_is_left_is_the_least_of_the_host_and_its_containers(tmp_path):
    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert segments.memory_left(tmp_path) == float("inf")
    write("proc/meminfo", "MemTotal: 999 kB\nMemAvailable: 100 kB\nSwapFree: 20 kB\n")
    assert segments.memory_left(tmp_path) == 120 << 10
    write("proc/self/cgroup", "4:memory:/old\n0::/outer/inner\n")
    write("sys/fs/cgroup/outer/memory.max", "90000\n")
    write("sys/fs/cgroup/outer/memory.current", "50000\n")
    write("sys/fs/cgroup/outer/memory.stat", "anon 40000\ninactive_file 6000\nactive_file 700\n")
    write("sys/fs/cgroup/outer/inner/memory.max", "max\n")
    assert segments.memory_left(tmp_path) == 46_700
    # Version 1, beside it or alone.
    write("sys/fs/cgroup/memory/old/memory.limit_in_bytes", "80000\n")
    write("sys/fs/cgroup/memory/old/memory.usage_in_bytes", "50000\n")
    write("sys/fs/cgroup/memory/old/memory.stat", "active_file 9\ntotal_inactive_file 1000\ntotal_active_file 200\n")
    assert segments.memory_left(tmp_path) == 31_200
    write("proc/self/cgroup", "12:cpu,cpuacct:/old\n4:hugetlb,memory:/a/b:c/old\n0::/\n")
    assert segments.memory_left(tmp_path) == 120 << 10
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")  # none
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "50000\n")
    write("sys/fs/cgroup/memory/memory.stat", "total_inactive_file 0\ntotal_active_file 0\n")
    assert segments.memory_left(tmp_path) == 120 << 10
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "60000\n")  # a container's own, under the path of the host
    assert segments.memory_left(tmp_path) == 10_000
    write("sys/fs/cgroup/memory/memory.stat", "cache 7\n")  # of a sandbox that tells less
    assert segments.memory_left(tmp_path) == 10_000
    (tmp_path / "sys/fs/cgroup/memory/memory.usage_in_bytes").unlink()
    (tmp_path / "sys/fs/cgroup/memory/memory.usage_in_bytes").mkdir()  # not to be read, for whatever reason
    assert segments.memory_left(tmp_path) == 120 << 10
    write("sys/fs/cgroup/memory.max", "70000\n")
    write("sys/fs/cgroup/memory.current", "65000\n")
    write("sys/fs/cgroup/memory.stat", "anon 65000\n")
    assert segments.memory_left(tmp_path) == 5000, "the other groups count"


@pytest.mark.parametrize("size", [0, 1 << 16])
def test_whoever_opens_a_segment_cannot_change_its_size(size):
    """Or a rank that has it mapped would be killed by its next read."""
    memory = segments.create(100)
    with pytest.raises(PermissionError):
        os.ftruncate(segments.segment_of(memory).fd, size)


def test_a_program_that_is_started_inherits_nothing_of_a_group():
    """It may outlive the group, and would hold its memory."""
    end, memory = ends(2)[0], segments.create(100)
    numbers = [segments.segment_of(memory).fd, end._inbox.read_end, end._inbox.write_end]
    numbers += [end.links[1].pidfd, end.links[1].pipe]
    assert not any(map(os.get_inheritable, numbers))


def test_the_ends_of_a_group_take_their_files_with_them():
    before = open_files()
    transports = ends(3)
    assert open_files() > before
    del transports
    gc.collect()
    assert open_files() == before


def test_a_rank_that_could_share_memory_with_one_that_cannot_leaves_nothing_open():
    before = open_files()
    beside = SimpleNamespace(rank=0, size=2, begin_call=lambda: 1)
    beside.agree = lambda call, message: [message, b'{"no": "this system has no memfd_create"}']
    assert shared_memory.connect(beside, 10) == "rank 1: this system has no memfd_create"
    gc.collect()
    assert open_files() == before


def test_tensors_of_several_dtypes_lie_in_one_segment_where_each_may_begin():
    spec = Spec(((3,), (5,), (1, 0), (7,)), (torch.bfloat16, torch.float32, torch.int8, torch.float64), CPU)
    parcel = ends(2)[0].channel(1, (0, 1)).buffer(spec)
    assert spec_of(parcel.tensors) == spec
    assert not any(x.data_ptr() % 64 for x in parcel.tensors)
    for number, x in enumerate(parcel.tensors):
        x.fill_(number)
    assert all((x == number).all() for number, x in enumerate(parcel.tensors))


def test_a_number_that_means_another_segment_by_now_is_not_mapped():
    memory = segments.create(100)
    lies = segments.Whereabouts.of(memory)
    assert segments.open_peer(os.getpid(), lies.fd, lies.size, lies.serial).numel() == lies.size
    del memory
    other = segments.create(100)
    assert segments.Whereabouts.of(other).fd == lies.fd, "this test needs the number to be used again"
    with pytest.raises(OSError, match="segment that was announced"):
        segments.open_peer(os.getpid(), lies.fd, lies.size, lies.serial)


def test_what_is_mapped_of_another_rank_holds_no_file_open():
    memory = segments.create(100)
    lies, before = segments.Whereabouts.of(memory), open_files()
    mapped = segments.open_peer(os.getpid(), lies.fd, lies.size, lies.serial)
    memory[7] = 77
    assert mapped[7] == 77 and open_files() == before


def test_small_calls_do_not_keep_the_memory_of_a_large_one():
    pool = segments.Pool(segments.create)
    large = pool.take(8 * MIB)
    pool.give_back(large, 1)
    del large
    before = mappings()
    for number in range(2, 12):
        small = pool.take(1000)
        assert small.numel() < MIB
        pool.give_back(small, number)
        pool.end_call(number)
    del small
    assert mappings() == before, "the large one gone, a small one made"
    again = pool.take(2000)
    assert again.numel() == 4096


def test_of_the_memory_that_is_there_the_smallest_that_does_is_taken():
    """Or a small parcel would hold what a large one needs, and another would be made for that."""
    pool, sizes = segments.Pool(segments.create), (3 * MIB, MIB, 2 * MIB)
    for memory in [pool.take(size) for size in sizes]:
        pool.give_back(memory, 1)
    assert [pool.take(MIB).numel() for _ in sizes] == [MIB, 2 * MIB, 3 * MIB]


def test_lengths_that_change_from_call_to_call_do_not_pile_up():
    pool, before = segments.Pool(segments.create), mappings()
    for number, size in enumerate(range(2 * MIB, 4 * MIB, 256 << 10)):
        memory = pool.take(size)
        pool.give_back(memory, number)
        pool.end_call(number)
        del memory
        assert mappings() - before <= 2, "that of this call, and one that is no larger"


def test_memory_that_eight_calls_did_not_use_is_let_go():
    """However little it is beside what they use."""
    pool, before = segments.Pool(segments.create), mappings()
    used, idle = pool.take(8 * MIB), pool.take(4096)
    pool.give_back(idle, 1)
    del idle
    for number in range(1, 10):
        assert mappings() - before == 2
        pool.give_back(used, number)
        pool.end_call(number)
    assert mappings() - before == 1


def grow(rank):
    """Bytes of segments that are mapped here after each call, own and those of others, over those of a shard."""
    found = []
    for tokens in range(4000, 8000, 400):
        q, k, v = shards(rank, tokens)
        ringspan.ring_attention(q, k, v)
        with open("/proc/self/maps") as lines:
            ends = [line.split()[0].split("-") for line in lines if "memfd:ringspan" in line]
        found.append(sum(int(end, 16) - int(begin, 16) for begin, end in ends) / (k.nbytes + v.nbytes))
    return found


def test_lengths_that_change_from_call_to_call_are_mapped_twice_at_most():
    for found in results(run_processes(grow, 2)):
        assert max(found) < 4.2, found  # one's own and the other rank's, each of this call and of the one before


@pytest.mark.parametrize("flip", [lambda x: x.conj(), lambda x: x.conj().imag])
def test_a_view_that_is_not_what_lies_in_memory_is_not_read_as_it_lies(flip):
    pairs = ringspan.empty_shared((4, 2))
    flipped = flip(torch.view_as_complex(pairs))
    assert flipped.is_neg() or flipped.is_conj()
    assert segments.segment_of(flipped) is None
    assert segments.segment_of(pairs) is not None
