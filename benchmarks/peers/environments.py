"""The two environments that peers are installed into, from PyPI, by the bench itself."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers.contract import Peer
from benchmarks.peers.group import ROOT

FOLDER = Path(__file__).parent / ".envs"
BASE = {"torch": ("torch==2.13.0", "numpy==2.4.6"), "jax": ("jax==0.10.2", "jaxlib==0.10.2", "numpy==2.4.6")}
# Packages that are built on the spot find these and torch installed: they are built without isolation.
BUILD = ("setuptools", "wheel", "packaging", "ninja", "py-cpuinfo")
PINS = {
    "ring-attention-pytorch": "0.5.20",
    "yunchang": "0.6.4",
    "ring-flash-attn": "0.1.8",
    "diffusers": "0.42.1",
    "deepspeed": "0.19.8",
    "ringattention": "0.1.2",
}
LIMIT_S = 900


class Environments:
    """Pythons to start peers with. What could not be installed is remembered, with pip's last line."""

    def __init__(self, own: bool, say: Callable[[str], None]):
        """own: use the project's own environment alone and install nothing."""
        self._own, self._say = own, say
        self._states: dict[str, dict[str, str]] = {}

    def python(self, peer: Peer) -> str:
        return sys.executable if self._own else str(FOLDER / peer.environment / "bin/python")

    def why_not(self, peer: Peer) -> str | None:
        """Installs what the peer needs, unless it is there; what pip said where that failed."""
        if self._own:
            return None
        state = self._state(peer.environment)
        for package in ("base", *peer.packages):
            wanted = _fingerprint() if package == "ringspan" else PINS.get(package, " ".join(BASE[peer.environment]))
            if state.get(package) != wanted:
                self._say(f"installing {package} into {FOLDER.name}/{peer.environment}")
                failure = self._install(peer.environment, package)
                if failure is not None:
                    return f"cannot be installed: {failure}"
                state[package] = wanted
                (FOLDER / peer.environment / "state.json").write_text(json.dumps(state))
        return None

    def _state(self, name: str) -> dict[str, str]:
        if name not in self._states:
            file = FOLDER / name / "state.json"
            self._states[name] = json.loads(file.read_text()) if file.exists() else {}
        return self._states[name]

    def _install(self, name: str, package: str) -> str | None:
        if package == "base":
            FOLDER.mkdir(exist_ok=True)
            (FOLDER / f"{name}-constraints.txt").write_text("\n".join(BASE[name]))
            made = _run(sys.executable, "-m", "venv", str(FOLDER / name))
            return made or self._pip(name, *BASE[name]) or self._pip(name, *BUILD)
        if package == "ringspan":
            return self._pip(name, "--no-deps", "--force-reinstall", str(ROOT))
        constraints = str(FOLDER / f"{name}-constraints.txt")
        return self._pip(name, "--no-build-isolation", "-c", constraints, f"{package}=={PINS[package]}")

    def _pip(self, name: str, *arguments: str) -> str | None:
        extra = shlex.split(os.environ.get("PIP_ARGS", ""))
        return _run(str(FOLDER / name / "bin/python"), "-m", "pip", "install", "--quiet", *extra, *arguments)


def _run(*command: str) -> str | None:
    """The last line of what it said if it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"not done within {LIMIT_S} s"
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    return next((line for line in reversed(errors) if "error" in line.lower()), (errors or ["no output"])[-1])


def _fingerprint() -> str:
    """Of what ringspan is built from."""
    files = sorted(p for folder in ("src", "csrc") for p in (ROOT / folder).rglob("*") if p.suffix in _SOURCES)
    files += [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


_SOURCES = (".py", ".pyi", ".cpp", ".h")
