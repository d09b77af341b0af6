"""From the words of a command line to what the library calls them. Refuses in the library's own words."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from ringspan.decide import mask_of
from ringspan.errors import ArgumentError, explain
from ringspan.options import Options, normalised_options
from ringspan.problem import UNBOUNDED, Mask


class Exit(IntEnum):
    """What the exit status says."""

    OK = 0
    BEYOND_BOUND = 1
    BAD_INPUT = 2
    FAILED = 3
    INTERRUPTED = 130


@dataclass(frozen=True)
class Asked:
    """The options that say which attention is meant, as `ring_attention` takes them."""

    causal: bool = False
    window_size: tuple[int, int] = (UNBOUNDED, UNBOUNDED)
    cu_seqlens: tuple[int, ...] | None = None
    layout: str = "contiguous"
    softmax_scale: float | None = None
    kernel: str = "auto"

    def options(self) -> Options:
        return normalised_options(**vars(self), agreement=True, gradients="")

    def mask(self, num_queries: int, num_keys: int, num_workers: int = 1) -> Mask:
        """The mask of the whole sequence, or the refusal of one that has no meaning for its lengths."""
        return mask_of(num_queries, num_keys, num_workers, self.options())

    def mask_in_words(self) -> str:
        left, right = self.window_size
        words = ["causal"] if self.causal else []
        if (left, right) != (UNBOUNDED, UNBOUNDED):
            words.append(f"window {left},{right}")
        if self.cu_seqlens is not None:
            words.append(f"{len(self.cu_seqlens) - 1} documents")
        return ", ".join(words) or "none: every query sees every key"


def parse_window(text: str | None) -> tuple[int, int]:
    if text is None:
        return UNBOUNDED, UNBOUNDED
    try:
        left, right = map(int, text.split(","))
    except ValueError:
        raise ArgumentError(
            explain(
                "--window takes two whole numbers, left and right.",
                got=repr(text),
                fix="--window 1023,0 lets a query see itself and the 1023 keys before it; -1 is unbounded",
            )
        ) from None
    return left, right


def parse_documents(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise ArgumentError(
            explain(
                "--documents takes the boundaries of packed documents, whole numbers with commas between them.",
                got=repr(text[:200]),
                fix="0, the end of each document, ..., the number of tokens: --documents 0,100,250,1000",
            )
        ) from None
