"""The peak memory of a stretch of this process's work, as Linux counts it; None where it does not."""

from __future__ import annotations

from pathlib import Path


class PeakMemory:
    """Bytes that the process holds at most, beyond what it held when this was made."""

    def __init__(self) -> None:
        self._before = self._reset()

    def beyond_bytes(self) -> int | None:
        return None if self._before is None else max(0, _status_bytes("VmHWM") - self._before)

    @staticmethod
    def _reset() -> int | None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
            return _status_bytes("VmRSS")
        except OSError:
            return None


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status without {name}")
