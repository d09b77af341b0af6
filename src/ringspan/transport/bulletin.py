"""What ranks leave for each other in the group's store when something has gone wrong."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ringspan.transport.waiter import Waiter, stop_all

WATCH_S = 0.1  # how often a rank that waits looks at the failure key
_ROLL_CALL_S = 1.0  # how long ranks that give up wait for each other's names
_STORE_S = 5.0  # how long a rank waits for an answer of the store


class Bulletin:
    """What ranks leave for each other in the group's store when something has gone wrong."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._store = _store(group)
        self._name = f"ringspan/{group.group_name}"
        self._is_silent = False
        self._waiters: dict[Any, Waiter] = {}
        weakref.finalize(self, stop_all, self._waiters)
        # torch gives names anew after destroy_process_group, and a store of torchrun's agent stays: which life is it?
        self.life = 0
        with contextlib.suppress(RuntimeError):
            self.life = self._ask(lambda store: store.add(f"{self._name}/lives/{group.rank()}", 1))

    @property
    def _prefix(self) -> str:
        return f"{self._name}/{self.life}"

    def _ask(self, what: Callable[[Any], Any]) -> Any:
        """What the store answers; RuntimeError where it is gone. Its host may also have been stopped, and then most of
        its answers would be waited for without a bound."""
        if not self._waiters:
            self._waiters["store"] = Waiter(f"ringspan-asks-the-store-of-{self._name}")
        question, bound_s = _Question(what, self._store), WATCH_S if self._is_silent else _STORE_S
        outcome = self._waiters["store"].wait_for([question])
        try:
            outcome.result(bound_s)
        except FutureTimeout:
            raise RuntimeError("no answer") from None
        finally:
            self._is_silent = not outcome.done()
        return question.answer

    def report(self, rank: int, reason: str) -> None:
        """Leave this rank's failure, unless another rank was first."""
        failure = json.dumps([rank, reason[:2000]])
        with contextlib.suppress(RuntimeError):  # the store's host is gone: then nobody can be told
            self._ask(lambda store: store.compare_set(f"{self._prefix}/failed", "", failure))

    def first_failure(self) -> tuple[int | None, str] | None:
        """(rank, reason) of the first that failed; (None, reason) where the store itself is gone."""
        key = f"{self._prefix}/failed"
        try:
            found = self._ask(lambda store: store.get(key) if store.check([key]) else None)
        except RuntimeError as error:
            return None, f"the process group's store is gone ({str(error).splitlines()[0]})"
        if found is None:
            return None
        rank, reason = json.loads(found)
        return rank, reason

    def roll_call(self, rank: int, size: int, call: int) -> str:
        """Which ranks did not come to a call, as words to add to a message; bounded by _ROLL_CALL_S."""
        keys = [f"{self._prefix}/gave-up/{call}/{other}" for other in range(size)]

        def absent(store: Any) -> list[str]:
            store.set(keys[rank], "here")
            with contextlib.suppress(RuntimeError):  # not everybody came: the usual case
                store.wait(keys, timedelta(seconds=_ROLL_CALL_S))
            return [str(other) for other, key in enumerate(keys) if not store.check([key])]

        try:
            ranks = self._ask(absent)
        except RuntimeError:
            return ""
        return f" (no sign of rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)})" if ranks else ""


class _Question:
    """What a `Waiter` can wait for."""

    answer: Any = None

    def __init__(self, what: Callable[[Any], Any], store: Any) -> None:
        self._what, self._store = what, store

    def wait(self) -> None:
        self.answer = self._what(self._store)


def _store(group: dist.ProcessGroup) -> Any:
    """The group's store, on a connection of its own: gloo may sit in a blocking get on the first one."""
    store = group.get_group_store()
    try:
        return store.clone()  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # a HashStore
        return dist.PrefixStore("", store)  # not itself: that it goes tells that the group was destroyed
