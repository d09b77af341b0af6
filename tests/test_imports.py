"""Imports point down the house, the integer half knows no torch, and `import ringspan` loads no optional package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ringspan

SOURCE = Path(ringspan.__file__).parent
# From the ground up. Rooms of one line are peers: they do not import each other. "" is ringspan/__init__.py.
FLOORS = """
    _native / errors / problem packing / layout / tile / tiling / schedule / state / kernels / transport / observe
    / traffic / execute / agreement / arguments / options / terms / decide / call / autograd reshard arrays
    / spmd_arguments / api masks sharding spmd trace / ring / ""
    / commands / cli / __main__
"""
FLOOR = {room.strip('"'): height for height, rooms in enumerate(FLOORS.split("/")) for room in rooms.split()}
INTEGERS = {"errors", "problem", "packing", "layout", "tile", "tiling", "schedule"}
STRANGERS = {("kernels", "transport"), ("transport", "kernels")}
EXTRAS = ("rich", "typer", "safetensors", "tokenizers", "ml_dtypes", "triton", "matplotlib")


def room_of(module: str) -> str:
    """ringspan.kernels.table -> kernels; ringspan -> ''."""
    return [*module.split("."), ""][1]


def imported(source: str, module: str, is_package: bool = False) -> set[str]:
    """Every module that the source names in an import, wherever in it: `from a import b` is a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level + is_package or None] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            # From ringspan itself come its rooms; a name that is no room is what ringspan/__init__.py offers.
            found |= {f"{base}.{a.name}" if base == "ringspan" and a.name in FLOOR else base for a in node.names}
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    room, found = room_of(module), []
    if room not in FLOOR:
        return [f"{module} has no floor"]
    for other in sorted(imported(source, module, is_package)):
        if other.split(".")[0] == "torch" and room in INTEGERS:
            found.append(f"{module} is of the integer half and imports {other}")
        if other.split(".")[0] != "ringspan" or room_of(other) == room:
            continue
        if (room, room_of(other)) in STRANGERS:
            found.append(f"{module} and {other} must not know each other")
        elif FLOOR.get(room_of(other), len(FLOOR)) >= FLOOR[room]:
            found.append(f"{module} imports {other}, which is not below it")
    return found


def test_imports_point_down_and_the_integer_half_has_no_torch():
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        found += violations(path.read_text(), module, is_package)
    assert found == []


def test_every_floor_has_its_room():
    # The compiled module is seen by its stub, since it is not built everywhere.
    files = {path.stem for path in SOURCE.iterdir() if path.suffix in (".py", ".pyi")}
    rooms = files | {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(FLOOR) - {""} | {"__init__"}


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("ringspan.layout", "import torch", "ringspan.layout is of the integer half and imports torch"),
        ("ringspan.schedule.x", "from torch.nn import Module", "integer half and imports torch.nn"),
        ("ringspan.problem", "def f():\n    import torch.fft as fft", "integer half and imports torch.fft"),
        ("ringspan.tile", "from ringspan.state import NEVER", "ringspan.state, which is not below it"),
        ("ringspan.state", "from ringspan import execute", "ringspan.execute, which is not below it"),
        ("ringspan.state", "from . import execute", "ringspan.execute, which is not below it"),
        ("ringspan.state", "from .call import x", "ringspan.call, which is not below it"),
        ("ringspan.schedule.x", "from ..kernels.table import x", "ringspan.kernels.table, which is not below it"),
        ("ringspan.call", "from ringspan import ring_attention", "imports ringspan, which is not below it"),
        ("ringspan.autograd", "from ringspan.reshard import x", "ringspan.reshard, which is not below it"),
        ("ringspan.kernels.x", "from ringspan.transport.local import x", "must not know each other"),
        ("ringspan.transport.x", "from ringspan.kernels.table import x", "must not know each other"),
        ("ringspan.layout", "from ringspan.attic import x", "ringspan.attic, which is not below it"),
        ("ringspan.attic", "", "ringspan.attic has no floor"),
    ],
)
def test_the_checker_of_imports_reports_a_violation(module, source, message):
    (found,) = violations(source, module)
    assert message in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ringspan.layout", "import numpy\nfrom ringspan.errors import ArgumentError"),
        ("ringspan.kernels.x", "import torch\nfrom ringspan.kernels.contract import Kernel\nfrom .table import x"),
        ("ringspan.api", "from ringspan import call, reshard"),
        ("ringspan.commands.x", "import ringspan\nfrom ringspan import observe, ring_attention"),
    ],
)
def test_the_checker_of_imports_lets_good_ones_pass(module, source):
    assert violations(source, module) == []


def test_import_of_ringspan_loads_no_optional_package():
    loaded = f"import sys, ringspan; print(*sorted(set({EXTRAS}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout.split()) == (0, []), result.stderr
