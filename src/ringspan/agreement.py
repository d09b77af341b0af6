"""The one exchange that begins every call: each rank says whether it can, and what it was asked.

It has a fixed size, every rank takes part whatever its own arguments are, and it is never skipped by a cache of
one rank's own (a hit here and a miss there would leave ranks waiting). So a bad argument on one rank, or
arguments that do not belong together, come out as the same kind of error on every rank, and no rank hangs.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from ringspan.errors import DisagreementError, PeerRefusedError, RingspanError, UnsupportedError, explain
from ringspan.transport.contract import Transport
from ringspan.transport.streams import threads_are_not_captured

MESSAGE_BYTES = 1536
_HEADER = struct.Struct("<8q")  # refused, call, query length, key length, flipped, forward, place, bytes of text
_TEXT_BYTES = MESSAGE_BYTES - _HEADER.size

# Names of terms that the comparison itself looks at.
CALL = "the function that is called"
RINGS = "replica_groups and num_workers"
DEVICE_TYPE = "device type"
_OF_THE_GROUP = (RINGS, DEVICE_TYPE)  # what rings side by side share: NCCL's first operation is one of all ranks


@dataclass(frozen=True)
class Terms:
    """What one rank tells the others.

    common: what must be the same on every rank of a ring, by the name that an error gives it.
    num_queries, num_keys: this rank's lengths, which may differ. flipped: which of its tensors lie as
    [.., D, T] in memory, a bit each. transport, device_type: by which means the tensors are to go; in common too.
    forward: of a backward the number of the call that it belongs to. place: of a compiled call, its place in its graph.
    Both are 0 where this rank does not know.
    """

    common: dict[str, Any] = field(default_factory=dict)
    num_queries: int = 0
    num_keys: int = 0
    flipped: int = 0
    transport: str = "auto"
    device_type: str = "cpu"
    forward: int = 0
    place: int = 0


@dataclass(frozen=True)
class Agreed:
    """What the ranks of this rank's ring told, by their place in the ring."""

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    flipped: int


def agree(
    transport: Transport, call: int, terms: Terms | RingspanError, rings: Sequence[Sequence[int]] | None = None
) -> Agreed:
    """Exchange terms, or this rank's own refusal, with every rank of the group.

    rings: the rings that run side by side in the group, as lists of ranks; None: one ring of all.
    Raises the own refusal, PeerRefusedError, DisagreementError, or RankFailedError.
    """
    if transport.is_alone:
        return _with_itself(terms)
    messages = transport.agree(call, _pack(call, terms))
    unpacked = {message: _unpack(message) for message in set(messages)}  # most often all are equal
    answers = [unpacked[message] for message in messages]
    if isinstance(terms, RingspanError):
        raise terms
    refusals = {rank: answer.text for rank, answer in enumerate(answers) if answer.refused}
    if refusals:
        raise PeerRefusedError(_tell_refusals(refusals))
    calls = [answer.call for answer in answers]
    if len(set(calls)) > 1:
        raise DisagreementError(_tell("the number of the call", calls, range(len(calls))))
    _compare_order(answers)
    if rings is None:
        rings = [range(transport.size)]
    else:  # every rank must have the same rings in mind before anything is compared within them
        _compare(answers, range(transport.size), only=_OF_THE_GROUP)
    for ring in rings:
        _compare([answers[rank] for rank in ring], ring)
    mine = [answers[rank] for rank in next(ring for ring in rings if transport.rank in ring)]
    return Agreed(
        tuple(answer.num_queries for answer in mine),
        tuple(answer.num_keys for answer in mine),
        mine[0].flipped if _one({answer.flipped for answer in mine}) else 0,
    )


def _with_itself(terms: Terms | RingspanError) -> Agreed:
    if isinstance(terms, RingspanError):
        raise terms
    return Agreed((terms.num_queries,), (terms.num_keys,), terms.flipped)


def unchecked(terms: Terms | RingspanError, size: int) -> Agreed:
    """What agreement=False takes for granted: the other ranks have the same arguments and lengths."""
    if isinstance(terms, RingspanError):
        raise terms
    # How tensors lie in memory is not an argument, so it may differ: they are sent as [.., T, D].
    return Agreed((terms.num_queries,) * size, (terms.num_keys,) * size, flipped=0)


_REMEMBERED = 64  # different calls of one group
_memory: WeakKeyDictionary[Transport, dict[bytes, Agreed | None]] = WeakKeyDictionary()


def remember(transport: Transport, terms: Terms, agreed: Agreed | None) -> None:
    """Keep what was agreed on for `agreed_before`; None where the same terms met others on other ranks before.

    agreed None: nothing was, but the ranks have met.
    """
    known = _memory.setdefault(transport, {})
    if agreed is None:
        return
    key = _key(terms)
    known[key] = agreed if known.pop(key, agreed) == agreed else None
    while len(known) > _REMEMBERED:
        del known[next(iter(known))]


def check_met(transport: Transport) -> None:
    """Refuse a capture where the ranks would first have to meet; on every rank alike, and before they try to."""
    if not transport.capturable:
        raise threads_are_not_captured()
    if transport not in _memory:
        raise _not_known("no call with tensors on GPUs before, on this group")


def agreed_before(transport: Transport, terms: Terms) -> Agreed:
    """What a call with these terms agreed on, where no exchange is possible; raises UnsupportedError."""
    known, key = _memory[transport], _key(terms)
    if key not in known:
        raise _not_known("no call with these arguments before")
    found = known[key]
    if found is None:
        raise _not_known("calls with these arguments, which met different lengths or memory layouts on other ranks")
    return found


def _key(terms: Terms) -> bytes:
    return _pack(0, replace(terms, forward=0, place=0))


def _not_known(got: str) -> UnsupportedError:
    headline = "a CUDA graph is being captured, and what the ranks agree on is not known."
    fix = "make this call once, with its backward if it has one, on every rank before the capture"
    return UnsupportedError(explain(headline, got=got, fix=fix))


@dataclass(frozen=True)
class _Answer:
    refused: bool
    call: int
    num_queries: int
    num_keys: int
    flipped: int
    forward: int
    place: int
    text: str


def _pack(call: int, terms: Terms | RingspanError) -> bytes:
    if isinstance(terms, RingspanError):
        head, text = (1, call, 0, 0, 0, 0, 0), f"{type(terms).__name__}: {terms}"
    else:
        head = (0, call, terms.num_queries, terms.num_keys, terms.flipped, terms.forward, terms.place)
        text = json.dumps(terms.common, separators=(",", ":"))
    body = text.encode(errors="replace")  # a path may hold what is no text
    if len(body) > _TEXT_BYTES:
        assert head[0], f"the terms of a call take {len(body)} bytes, {_TEXT_BYTES} are there"
        body = body[: _TEXT_BYTES - 3] + b"..."
    return (_HEADER.pack(*head, len(body)) + body).ljust(MESSAGE_BYTES, b"\0")


def _unpack(message: bytes) -> _Answer:
    refused, call, num_queries, num_keys, flipped, forward, place, length = _HEADER.unpack_from(message)
    text = message[_HEADER.size : _HEADER.size + length].decode(errors="replace")
    return _Answer(bool(refused), call, num_queries, num_keys, flipped, forward, place, text)


def _compare_order(answers: Sequence[_Answer]) -> None:
    """Ranks that make the same calls in another order: shapes and options are equal, and results would be wrong."""
    _compare_known(
        "which call this is the backward of",
        "call {}",
        {rank: answer.forward for rank, answer in enumerate(answers)},
        "the same order of backwards on every rank: one backward() of the sum of all losses has it",
    )
    _compare_known(
        "which call of a compiled graph this is",
        "its call {}",
        {rank: answer.place for rank, answer in enumerate(answers)},
        "torch._inductor.config.reorder_for_peak_memory = False, or shards of equal lengths",
    )


def _compare_known(what: str, each: str, numbers: dict[int, int], fix: str) -> None:
    ranks: dict[int, list[int]] = {}
    for rank, number in numbers.items():
        if number:
            ranks.setdefault(number, []).append(rank)
    if len(ranks) > 1:
        got = "; ".join(f"{each.format(number)} on {_ranks(held)}" for number, held in ranks.items())
        raise DisagreementError(explain(f"the ranks disagree on {what}.", got=got, fix=fix))


def _compare(answers: Sequence[_Answer], ranks: Sequence[int], only: Sequence[str] | None = None) -> None:
    """Raise unless the ranks' common terms are equal: all of them, or those of some names."""
    if _one({answer.text for answer in answers}):
        return
    terms = [json.loads(answer.text) for answer in answers]
    differences = []
    for name in dict.fromkeys(name for term in terms for name in term):
        values = [term.get(name) for term in terms]
        if (only is None or name in only) and not _one({json.dumps(value) for value in values}):
            differences.append(_tell(name, values, ranks, "ring" if only is None else "group"))
        if name == CALL and differences:
            break  # ranks in different functions: everything else differs too, and means nothing
    if differences:
        raise DisagreementError("\n".join(differences))


def _tell(name: str, values: Sequence[Any], ranks: Sequence[int], whose: str = "group") -> str:
    by_value: dict[str, list[int]] = {}
    for rank, value in zip(ranks, values, strict=True):
        by_value.setdefault(repr(value), []).append(rank)
    told = "; ".join(f"{value} on {_ranks(held)}" for value, held in by_value.items())
    return explain(f"the ranks disagree on {name}.", got=told, fix=f"pass the same on every rank of the {whose}")


def _tell_refusals(refusals: dict[int, str]) -> str:
    rank, reason = next(iter(refusals.items()))
    return f"{_ranks(list(refusals))} refused the arguments, so no rank computes. Rank {rank}: {reason}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{', ...' if len(ranks) > 8 else ''}"


def _one(values: set) -> bool:
    return len(values) == 1
