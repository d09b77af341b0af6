"""The longest sequences: 1,048,576 tokens causal and 262,144 tokens not, over 64 workers that are threads.

    python benchmarks/longest.py > benchmarks/results/DATE-longest.txt

Half an hour on 2 cores. What it prints is what `ringspan attend` says: time, error against float64 on sampled rows,
peak memory.
"""

from __future__ import annotations

import shlex
import subprocess
import sys

from pairs import machine

COMMON = "--workers 64 --heads 1 --head-dim 128 --dtype bf16 --transport local"
RUNS = (f"--tokens 1048576 --causal --layout striped {COMMON}", f"--tokens 262144 {COMMON}")


def main() -> None:
    print(machine(), flush=True)
    for options in RUNS:
        print(f"\n$ ringspan attend {options}", flush=True)
        subprocess.run([sys.executable, "-m", "ringspan", "attend", *shlex.split(options)], check=True)


if __name__ == "__main__":
    main()
