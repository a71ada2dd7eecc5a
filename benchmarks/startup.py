"""How long `srlm --help` takes against an interpreter that only imports typer and rich, in turn.

python benchmarks/startup.py [RUNS]
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time

HELP = [sys.executable, "-m", "srlm_cli", "--help"]
IMPORT = [sys.executable, "-c", "import typer, rich"]


def seconds(command: list[str]) -> float:
    """Return the wall time of one run."""
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def main() -> None:
    """Time both commands in turn and print the ratio of each pair."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    for command in (HELP, IMPORT):
        seconds(command)  # not counted: fills the caches
    pairs = [(seconds(HELP), seconds(IMPORT)) for _ in range(runs)]
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    print(f"{' '.join(HELP[1:])}  against  python -c 'import typer, rich'  ({runs} runs each, in turn)")
    print(f"python {platform.python_version()}, {platform.machine()}")
    ours, theirs = (statistics.median(pair[at] for pair in pairs) for at in (0, 1))
    print(f"median {ours:.3f} s against {theirs:.3f} s")
    print(f"ratio {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
