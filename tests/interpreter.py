"""Triton's interpreter, at a third of its price.

It replaces the functions of triton.language anew whenever a kernel calls a device function, which is most of its time;
once a launch is enough. And it recomputes sums and products of integers in 64 bits, to find overflows.
"""

from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter


def hurry(monkeypatch, check_overflow: bool = False) -> None:
    patch, everything = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    launched = []

    def patch_once(fn):
        if launched:
            return None
        launched.append(fn)
        scope = patch(everything)
        restore = scope.restore
        scope.restore = lambda: (launched.clear(), restore())
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    options = interpreter.InterpreterOptions(sanitize_overflow=check_overflow)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
