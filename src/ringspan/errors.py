"""The exceptions of ringspan: one tree, so that ``except RingspanError`` catches them all.

Each class is also the built-in a Python user would expect (ValueError, TypeError, ...). Messages name the
argument, the rule, what came, and the way out, in the form that `explain` gives them.
"""


class RingspanError(Exception):
    """Everything that ringspan raises on purpose."""


class ArgumentError(RingspanError, ValueError):
    """An argument has the right type but breaks a rule."""


class ArgumentTypeError(RingspanError, TypeError):
    """An argument has the wrong type or dtype."""


class UnsupportedError(RingspanError, NotImplementedError):
    """A legal request that nothing installed here can serve."""


class LayoutError(ArgumentError):
    """Lengths or masks that the asked layout cannot express."""


class DisagreementError(ArgumentError):
    """The ranks of one call passed arguments that do not belong together; raised on every rank."""


class PeerRefusedError(ArgumentError):
    """Another rank refused its own arguments, so the call was given up on every rank."""


class RankFailedError(RingspanError, RuntimeError):
    """A rank died, raised in the middle of a call, or did not answer within the group's timeout."""


class SharedMemoryFullError(RingspanError, MemoryError):
    """Memory that several processes can map could not be reserved."""


class WorkerError(RingspanError, RuntimeError):
    """A worker of `run_local` raised an exception of its own; that exception is the ``__cause__``."""


def explain(headline: str, *, got: str | None = None, fix: str | None = None) -> str:
    """The house's message: what rule is broken, what came, the way out."""
    lines = [headline]
    if got is not None:
        lines.append(f"  got  {got}")
    if fix is not None:
        lines.append(f"  fix  {fix}")
    return "\n".join(lines)


def shown(value: object) -> str:
    """What was passed in place of something else, for `got`; not all that a tensor holds."""
    return repr(value)[:200]
