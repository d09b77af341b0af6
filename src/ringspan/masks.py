"""Masks as key ranges: common ones, MagiAttention's slices, and any that a function or a dense tensor says.

Each function returns what `ring_attention(key_ranges=...)` takes: (start, stop) of the keys that a query sees, int64
[T, 2] on the CPU, or [B, T, 2] where batch entries differ; a list of several where a query sees several runs of keys.
All count in positions of the whole sequence, so every rank makes the same, whatever the layout. docs/masks.md shows
them with what they cost. Errors: ArgumentTypeError, ArgumentError for what is no such mask.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ringspan.arguments import check_dense
from ringspan.errors import ArgumentError, ArgumentTypeError, UnsupportedError, explain, shown

SLICE_TYPES = ("full", "causal", "inverse_causal", "bidirectional_causal")  # MagiAttention's 0, 1, 2, 3
_MOST_RUNS = 64
_PAIRS_AT_ONCE = 1 << 24
_LARGEST = 1 << 62  # with room for a sum in 64 bits


def padding(
    lengths: Tensor | Sequence[int], num_tokens: int, *, left: bool = False, num_queries: int | None = None
) -> Tensor:
    """[B, T, 2]: batch entry b has lengths[b] tokens of num_tokens, the rest is filled up.

    left: filled up on the left, as for generation. num_queries: T, if the queries are another sequence than the keys.
    What comes of a query in the filling is nobody's concern.
    """
    num_tokens = _count("num_tokens", num_tokens)
    stop = _lengths("lengths", lengths, num_tokens)
    if stop.ndim != 1:
        raise ArgumentTypeError(explain("lengths must have a number for each batch entry.", got=shown(lengths)))
    start = num_tokens - stop if left else torch.zeros_like(stop)
    stop = torch.full_like(stop, num_tokens) if left else stop
    num_queries = num_tokens if num_queries is None else _count("num_queries", num_queries)
    return torch.stack([start, stop], -1)[:, None].repeat(1, num_queries, 1)


def prefix(length: int | Tensor | Sequence[int], num_tokens: int) -> Tensor:
    """The first `length` tokens are seen by all, what follows is causal (prefix-LM). One length, or [B]."""
    num_tokens = _count("num_tokens", num_tokens)
    stop = torch.maximum(_count_up(1, num_tokens + 1), _lengths("length", length, num_tokens)[..., None])
    return torch.stack([torch.zeros_like(stop), stop], -1)


def images_in_text(images: Sequence[tuple[int, int]], num_tokens: int) -> Tensor:
    """[T, 2]: causal, but the tokens of an image see each other. images: (start, stop) of each, none in another."""
    num_tokens = _count("num_tokens", num_tokens)
    stop = _count_up(1, num_tokens + 1)
    before = 0
    for first, last in sorted(_pair("images", image) for image in _entries("images", images)):
        if not before <= first <= last <= num_tokens:
            raise ArgumentError(
                explain(
                    "images must be (start, stop) within the sequence, and not overlap.",
                    got=f"({first}, {last}) after {before}, of {num_tokens} tokens",
                )
            )
        stop[first:last] = before = last
    return torch.stack([torch.zeros_like(stop), stop], -1)


def frames(tokens_each: int, before: int, num_tokens: int) -> Tensor:
    """[T, 2]: a token sees its own frame and the `before` frames before it (0: chunks, each by itself)."""
    tokens_each, before = _count("tokens_each", tokens_each, least=1), _count("before", before)
    num_tokens = _count("num_tokens", num_tokens)
    frame = _count_up(0, num_tokens) // tokens_each
    start, stop = (frame - before).clamp(min=0) * tokens_each, (frame + 1) * tokens_each
    return torch.stack([start, stop.clamp(max=num_tokens)], -1)


def window_and_first(left: int, first: int, num_tokens: int) -> list[Tensor]:
    """Causal: a query sees itself, the `left` tokens before it, and the `first` of the sequence (StreamingLLM)."""
    left, first = _count("left", left), _count("first", first)
    position = _count_up(0, _count("num_tokens", num_tokens))
    start = (position - left).clamp(min=0)
    beginning = torch.stack([torch.zeros_like(position), start.clamp(max=first)], -1)
    return [beginning, torch.stack([start, position + 1], -1)]


def shared_prompt(prompt: int, answers: Sequence[int]) -> list[Tensor]:
    """Causal: tokens of one prompt, then of several answers to it, which do not see each other; lengths of all."""
    lengths = _count("prompt", prompt), *(_count("answers", answer) for answer in _entries("answers", answers))
    length = torch.tensor(lengths, device="cpu")
    starts = (length.cumsum(0) - length).repeat_interleave(length)
    position = _count_up(0, len(starts))
    is_answer = position >= length[0]
    to_prompt = torch.stack([torch.zeros_like(position), torch.where(is_answer, length[0], 0)], -1)
    return [to_prompt, torch.stack([starts, position + 1], -1)]


def continued(num_before: int, num_queries: int) -> Tensor:
    """[T, 2]: causal for the last num_queries tokens of a longer sequence, num_before tokens after its beginning."""
    stop = _count("num_before", num_before) + _count_up(1, _count("num_queries", num_queries) + 1)
    return torch.stack([torch.zeros_like(stop), stop], -1)


def from_slices(
    q_ranges: Sequence[Sequence[int]] | Tensor,
    k_ranges: Sequence[Sequence[int]] | Tensor,
    types: Sequence[str | int] | Tensor,
    num_queries: int,
) -> list[Tensor]:
    """MagiAttention's slices: queries [start, stop) see keys [start, stop), each slice of a type of its own.

    types: "full"; "causal": the last query sees all keys, each before it one less at the end; "inverse_causal": the
    first sees all, each after it one less at the beginning; "bidirectional_causal": what both show; or 0 to 3 for
    these, as in attn_type_map. Queries may be in several slices, whose keys must not overlap; in none they see nothing.
    """
    num_queries = _count("num_queries", num_queries)
    named = dict(q_ranges=q_ranges, k_ranges=k_ranges, types=types)
    lists = [_entries(name, x) for name, x in named.items()]
    if len(set(map(len, lists))) > 1:
        got = f"{len(lists[0])}, {len(lists[1])} and {len(lists[2])}"
        raise ArgumentError(explain("q_ranges, k_ranges and types must have one entry for each slice.", got=got))
    layers: list[Tensor] = []
    for queries, keys, kind in zip(*lists, strict=True):
        first, last = _pair("q_ranges", queries)
        start, stop = _pair("k_ranges", keys)
        if not 0 <= first <= last <= num_queries or not 0 <= start <= stop <= _LARGEST:
            got = f"queries [{first}, {last}) of {num_queries}, keys [{start}, {stop})"
            raise ArgumentError(explain("a slice must be within the sequence.", got=got))
        _lay(layers, first, _slice(last - first, start, stop, _slice_type(kind)), num_queries)
    return layers or [_nothing(num_queries)]


def _slice(num_queries: int, start: int, stop: int, kind: str) -> Tensor:
    row = _count_up(0, num_queries)
    ranges = torch.tensor([start, stop], device="cpu").repeat(num_queries, 1)
    if kind in ("causal", "bidirectional_causal"):
        ranges[:, 1] += row + 1 - num_queries
    if kind in ("inverse_causal", "bidirectional_causal"):
        ranges[:, 0] += row
    ranges[ranges[:, 1] <= ranges[:, 0]] = 0
    return ranges


def _slice_type(kind: str | int) -> str:
    if isinstance(kind, (int, np.integer)) and not isinstance(kind, bool) and 0 <= kind < len(SLICE_TYPES):
        return SLICE_TYPES[int(kind)]
    if not isinstance(kind, str) or kind not in SLICE_TYPES:
        known = ", ".join(f'"{name}" ({number})' for number, name in enumerate(SLICE_TYPES))
        raise ArgumentError(explain("types must name how the slices are cut.", got=shown(kind), fix=f"one of {known}"))
    return kind


def _lay(layers: list[Tensor], first: int, ranges: Tensor, num_queries: int) -> None:
    """Put ranges where the first layer has room at all of these rows."""
    rows = slice(first, first + len(ranges))
    for layer in layers:
        if not layer[rows].any():
            break
    else:
        layer = _nothing(num_queries)
        layers.append(layer)
    layer[rows] = ranges


def from_mask(mask: Tensor) -> list[Tensor]:
    """Of a dense mask, True where a query sees a key: bool [T, S], [B, T, S], or [B, 1, T, S] as torch's attn_mask.

    Exact: runs of True are the ranges, of which there may be 64 in a row. Memory and time of T * S.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim not in (2, 3, 4):
        got = f"{mask.dtype}, {mask.ndim} dimensions" if isinstance(mask, Tensor) else str(type(mask))
        fix = "mask.bool() if 0 hides; mask == 0 if -inf hides, as where it is added to scores"
        raise ArgumentTypeError(explain("mask must be a bool tensor [T, S] or [B, T, S].", got=got, fix=fix))
    check_dense("mask", mask)
    if mask.ndim == 4:
        if mask.shape[1] != 1:
            got = f"shape {list(mask.shape)}"
            raise ArgumentError(explain("mask must be the same for all heads.", got=got, fix="shape [B, 1, T, S]"))
        mask = mask[:, 0]
    rows = max(1, _PAIRS_AT_ONCE // max(mask.shape[-1], 1))
    return _ranges_of(mask.shape[:-1], mask.flatten(0, -2).split(rows))


def from_mask_mod(
    mask_mod: Callable[..., Tensor], num_queries: int, num_keys: int, *, batch: int | None = None, device: str = "cpu"
) -> list[Tensor]:
    """Of a mask_mod of FlexAttention: mask_mod(b, h, q_idx, kv_idx) is True where query q_idx sees key kv_idx.

    Called once for every pair, under torch.vmap as by FlexAttention, at most 2**24 pairs at a time (a second for
    8,192 x 8,192). batch: how many entries, None if it does not look at b. device: where the tensors are that it reads.
    Masks that differ by head are refused, and those of more than 64 runs of keys in a row.
    """
    num_queries, num_keys = _count("num_queries", num_queries), _count("num_keys", num_keys)
    entries = 1 if batch is None else _count("batch", batch)
    keys = torch.arange(num_keys, device=device)
    over_keys = torch.vmap(_returning_a_tensor(mask_mod), in_dims=(None, None, None, 0))
    over_queries = torch.vmap(over_keys, in_dims=(None, None, 0, None))
    rows = max(1, _PAIRS_AT_ONCE // max(num_keys, 1))
    any_entry = _Unknown("batch entry", "batch=, how many there are")
    any_head = _Unknown("head", "one call of ring_attention for the heads of each mask")

    def blocks() -> Iterator[Tensor]:
        for b in range(entries):
            entry = any_entry if batch is None else torch.tensor(b, device=device)
            for block in torch.arange(num_queries, device=device).split(rows):
                with _indexing_by_batched_tensors():
                    yield over_queries(entry, any_head, block, keys)

    shape = (num_queries,) if batch is None else (entries, num_queries)
    if not entries * num_queries * num_keys:
        return [_nothing(*shape)]
    return _ranges_of(shape, blocks())


def _returning_a_tensor(mask_mod: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if not callable(mask_mod):
        raise ArgumentTypeError(explain("mask_mod must be a function of (b, h, q_idx, kv_idx).", got=shown(mask_mod)))

    def checked(*place: Any) -> Tensor:
        seen = mask_mod(*place)
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
            got = str(seen.dtype) if isinstance(seen, Tensor) else shown(seen)
            raise ArgumentTypeError(explain("mask_mod must return a bool tensor.", got=got))
        if seen.ndim:  # of one pair, as it sees it under torch.vmap
            got = f"shape {list(seen.shape)}"
            raise ArgumentTypeError(explain("mask_mod must return one bool for a query and a key.", got=got))
        return seen

    return checked


def _indexing_by_batched_tensors() -> AbstractContextManager:
    """As FlexAttention does: older torch (2.9) reads the number of an index like document[q], which vmap forbids."""
    try:
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    except ImportError:
        return nullcontext()
    return TransformGetItemToIndex()


class _Unknown:
    """Stands for what a mask may not depend on: whatever is done with it is refused."""

    def __init__(self, what: str, fix: str) -> None:
        self.what, self.fix = what, fix

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise UnsupportedError(
            explain(f"mask_mod must not depend on the {self.what}.", got=f"it looks at the {self.what}", fix=self.fix)
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        next(x for x in _flat([args, *(kwargs or {}).values()]) if isinstance(x, cls))._refuse()

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse  # type: ignore[assignment]
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __pow__ = __rpow__ = __lshift__ = __rlshift__ = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __rshift__ = __rrshift__ = _refuse
    __getitem__ = __bool__ = __index__ = __int__ = __float__ = __neg__ = __pos__ = __abs__ = __invert__ = _refuse
    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what torch.vmap asks of any argument
            raise AttributeError(name)
        self._refuse()


def _flat(x: Any) -> Iterator[Any]:
    if isinstance(x, (list, tuple)):
        for part in x:
            yield from _flat(part)
    else:
        yield x


def _ranges_of(shape: Sequence[int], blocks: Iterable[Tensor]) -> list[Tensor]:
    """The runs of True of rows [rows, S], given in blocks: the i-th of each in the i-th tensor [*shape, 2]."""
    done, found = 0, []
    for block in blocks:
        edges = torch.nn.functional.pad(block.to("cpu", torch.int8), (1, 1)).diff(dim=1)
        (row, start), stop = (edges > 0).nonzero(as_tuple=True), (edges < 0).nonzero(as_tuple=True)[1]
        found.append((row + done, start, stop))
        done += len(block)
    row, start, stop = (torch.cat(x) for x in zip(*found, strict=True))
    num_runs = torch.bincount(row, minlength=done)
    most = int(num_runs.max()) if done else 0
    if most > _MOST_RUNS:
        raise UnsupportedError(
            explain(
                f"mask must show a query at most {_MOST_RUNS} runs of keys.",
                got=f"{most} runs for row {int(num_runs.argmax())}",
                fix="another order of the tokens may bring together what a query sees",
            )
        )
    place = _count_up(0, len(row)) - (num_runs.cumsum(0) - num_runs)[row]
    ranges = _nothing(max(most, 1), done)
    ranges[place, row, 0], ranges[place, row, 1] = start, stop
    return list(ranges.view(len(ranges), *shape, 2))


def _count_up(start: int, stop: int) -> Tensor:
    """On the CPU, whatever the default device is; so are all tensors here."""
    return torch.arange(start, stop, device="cpu")


def _nothing(*shape: int) -> Tensor:
    """Ranges in which there is no key."""
    return torch.zeros(*shape, 2, dtype=torch.int64, device="cpu")


def _count(name: str, value: int, least: int = 0) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(explain(f"{name} must be a whole number.", got=shown(value))) from None
    if count < least:
        raise ArgumentError(explain(f"{name} must be at least {least}.", got=str(count)[:80]))
    if count > _LARGEST:
        raise ArgumentError(explain(f"{name} must be at most 2**62.", got=str(count)[:80]))
    return count


def _entries(name: str, value: Any) -> list:
    try:
        return value.tolist() if isinstance(value, Tensor) and value.ndim else list(value)
    except TypeError:
        raise ArgumentTypeError(explain(f"{name} must be a sequence.", got=shown(value))) from None


def _pair(name: str, value: Sequence[int]) -> tuple[int, int]:
    try:
        first, last = map(operator.index, value)
    except (TypeError, ValueError):
        raise ArgumentTypeError(
            explain(f"{name} must hold pairs (start, stop) of whole numbers.", got=shown(value))
        ) from None
    return first, last


def _lengths(name: str, value: int | Tensor | Sequence[int], most: int) -> Tensor:
    """One number or several, int64 on the CPU, each from 0 to `most`."""
    try:
        lengths = torch.as_tensor(value, device="cpu")
        if not lengths.numel():
            lengths = lengths.long()  # torch makes a float of an empty list
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool or lengths.ndim > 1:
            raise TypeError
        lengths = lengths.to_dense().long()
    except (TypeError, ValueError, RuntimeError):  # also of what torch makes no tensor of
        raise ArgumentTypeError(explain(f"{name} must hold whole numbers.", got=shown(value))) from None
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= most:
        wrong = next(x for x in lengths.flatten().tolist() if not 0 <= x <= most)
        raise ArgumentError(explain(f"{name} must be from 0 to num_tokens.", got=f"{wrong}, num_tokens {most}"))
    return lengths
