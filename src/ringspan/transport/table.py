"""From a user's `group` to this rank's end of it, and back from a name, which is what graphs can store."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringspan.errors import ArgumentError, ArgumentTypeError, explain, shown
from ringspan.transport.contract import Transport
from ringspan.transport.local import LocalGroup, alone, current_group, resolve_local
from ringspan.transport.process_group import transport_of

TRANSPORTS = ("auto", "local", "shared_memory", "torch_dist", "peer_memory")
ALONE = "alone"


def group_name(group: Any) -> str:
    """The name under which `resolve` finds the group again, in this process and thread.

    group: a LocalGroup, a ProcessGroup, a 1-D DeviceMesh, or None: the worker's own group inside run_local,
    else the default process group, else a ring of one.
    """
    return _name_of(_group_of(group))


def place_in(group: Any) -> tuple[int, int]:
    """(rank, size) of this rank in a group that a user passed, without its transport: graphs hold the numbers."""
    found = _group_of(group)
    if _name_of(found) == ALONE:
        _refuse_unjoined()
        return 0, 1
    if isinstance(found, LocalGroup):
        return found.rank(), found.size()
    try:
        return dist.get_rank(found), dist.get_world_size(found)
    except ValueError as error:
        raise _gone(found.group_name) from error


def _group_of(group: Any) -> Any:
    if group is None:
        group = current_group()
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    return _group_of_mesh(group) if isinstance(group, DeviceMesh) else group


def _name_of(group: Any) -> str:
    if group is None:
        return ALONE
    if isinstance(group, LocalGroup):
        return group.name
    if isinstance(group, dist.ProcessGroup):
        return f"dist:{group.group_name}"
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise _outside("what torch.distributed.new_group returns to ranks outside of the group")
    raise ArgumentTypeError(
        explain(
            "group is not a group.",
            got=repr(type(group)),
            fix="a torch.distributed ProcessGroup, a 1-D DeviceMesh, the group that run_local hands out, or None",
        )
    )


def _outside(got: str) -> ArgumentError:
    fix = "call only on the ranks of the group"
    return ArgumentError(explain("group does not contain this rank.", got=got, fix=fix))


def _refuse_unjoined() -> None:
    """A ring of one would be silently wrong in a process that was started as one of several."""
    size = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and size != "1":
        raise ArgumentError(
            explain(
                "there is no process group, and this process is one of several.",
                got=f"RANK={os.environ['RANK']} and WORLD_SIZE={size}",
                fix="torch.distributed.init_process_group() first, or pass group=; shard and positions also take rank= "
                "and num_ranks=, for processes without a group, as a data loader's",
            )
        )


def _group_of_mesh(mesh: DeviceMesh) -> dist.ProcessGroup:
    if mesh.ndim != 1:
        raise ArgumentError(
            explain(
                "group must be a 1-D DeviceMesh: a ring has one axis.",
                got=f"{mesh.ndim} axes {mesh.mesh_dim_names or tuple(mesh.shape)}",
                fix='pass one axis of it, e.g. mesh["cp"]',
            )
        )
    if mesh.get_coordinate() is None:
        raise _outside("a DeviceMesh of other ranks")
    group = mesh.get_group()
    if not torch.compiler.is_compiling() and mesh not in _ascending:
        _check_ascends(mesh, group)
        _ascending.add(mesh)
    return group


# Asking a mesh for its ranks takes a fifth of a millisecond.
_ascending: weakref.WeakSet[DeviceMesh] = weakref.WeakSet()


def _check_ascends(mesh: DeviceMesh, group: dist.ProcessGroup) -> None:
    """Refuse a mesh whose first rank is not the first of its group: each has another idea of who holds which token."""
    ranks, order = mesh.mesh.tolist(), dist.get_process_group_ranks(group)
    if ranks != order:
        raise ArgumentError(
            explain(
                "group must be a DeviceMesh whose ranks ascend, as those of its process group do.",
                got=f"ranks {_shown(ranks)}",
                fix=f"a mesh of ranks {_shown(order)}, or mesh.get_group(), whose shards lie in that order",
            )
        )


def _shown(ranks: list[int]) -> str:
    return f"{', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"


def check_transport(name: str, transport: str) -> None:
    """Refuse a transport that is unknown or cannot serve the group of that name."""
    if transport not in TRANSPORTS:
        known = ", ".join(map(repr, TRANSPORTS))
        raise ArgumentError(explain("transport is unknown.", got=shown(transport), fix=f"one of {known}"))
    of_processes = name.startswith("dist:")
    if transport != "auto" and of_processes == (transport == "local"):
        raise ArgumentError(
            explain(
                f"transport={transport!r} cannot serve this group.",
                got=f"a group of {'processes (torch.distributed)' if of_processes else 'threads (run_local)'}",
                fix='transport="auto"',
            )
        )


def resolve(name: str) -> Transport:
    """This rank's end of the group of that name."""
    if name == ALONE:
        _refuse_unjoined()
        return alone().transport
    kind, _, rest = name.partition(":")
    if kind == "local":
        return resolve_local(name).transport
    try:
        group = dist.distributed_c10d._resolve_process_group(rest)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise _gone(rest) from error
    return transport_of(group)


def _gone(name: str) -> ArgumentError:
    return ArgumentError(
        explain(
            "the process group is gone.",
            got=f"torch.distributed knows no group {name!r}",
            fix="keep it until the last call and backward that use it are done, or make a new one",
        )
    )
