"""The command line's door. Its options are in `ringspan.commands.app`, which needs the extra ringspan[cli]."""

from __future__ import annotations

import sys

_EXTRA = ("rich", "safetensors", "typer")


def main() -> None:
    """The command `ringspan`."""
    try:
        from ringspan.commands.app import app
    except ModuleNotFoundError as missing:
        if missing.name not in _EXTRA:
            raise
        print(f"ringspan: the command line needs {missing.name}; pip install {' '.join(_EXTRA)}", file=sys.stderr)
        raise SystemExit(2) from None
    app(prog_name="ringspan")
