"""`srlm make-pairs` against jq and DuckDB on the same judged rows, in turn: rates, peak memory, the same pairs.

python benchmarks/make_pairs.py [--rows N] [--runs R] [--file JUDGED] [--duckdb PYTHON] [--folder FOLDER]

Makes a file of N rows (3.4 kB each) unless one is given. PYTHON is an interpreter that has duckdb; contenders that are
not installed are left out. jq keeps one prompt in memory and uses one processor; srlm keeps one prompt and uses two;
DuckDB uses all processors and reads five columns only. Memory is that of all processes of a contender, shared pages
counted once. `cpu` is what a run took of all processors: on a machine with other work it says more than the wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import judged_rows
from memory import held
from paths import existing_file, made_folder, program

HERE = Path(__file__).parent
SHARED = ("id", "prompt", "chosen", "rejected", "score_chosen", "score_rejected", "chosen_id", "rejected_id")
RUN_SQL = """
import duckdb, sys
sql = open(sys.argv[1]).read()
for name, path in zip(("$judged", "$pairs"), sys.argv[2:]):
    sql = sql.replace(name, "'" + path.replace("'", "''") + "'")
duckdb.sql(sql)
"""


@dataclass(frozen=True)
class Run:
    """What one run took: wall seconds, processor seconds, and the most memory it held, in MiB, of all its processes."""

    wall: float
    cpu: float
    peak: int


def duckdb_version(python: str) -> str:
    """Return the version of DuckDB that an interpreter has, "" if it has none."""
    asked = [python, "-c", "import duckdb; print(duckdb.__version__)"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def contenders(judged: Path, pairs: Path, duckdb: str) -> dict[str, tuple[str, list[str]]]:
    """Return for each contender that is there its version and its command; jq writes to stdout."""
    found = {
        "srlm": (
            f"Python {platform.python_version()}",
            [sys.executable, "-m", "srlm_cli", "make-pairs", "--quiet", "--in", str(judged), "--out", str(pairs)],
        )
    }
    if shutil.which("jq"):
        version = subprocess.run(["jq", "--version"], capture_output=True, text=True).stdout.strip()
        found["jq"] = version, ["jq", "-nc", "-f", str(HERE / "make_pairs.jq"), str(judged)]
    if version := duckdb_version(duckdb):
        command = [duckdb, "-c", RUN_SQL, str(HERE / "make_pairs.sql"), str(judged), str(pairs)]
        found["duckdb"] = f"duckdb {version}", command
    return found


def run(command: list[str], out: Path) -> Run:
    """Run a command to its end, its stdout into a file."""
    with open(out, "wb") if command[0] == "jq" else open(os.devnull, "wb") as stdout:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=stdout)
        peak, ended = 0, (0, 0, None)
        while not ended[0]:
            peak = max(peak, held(process.pid))
            time.sleep(0.01)
            ended = os.wait4(process.pid, os.WNOHANG)
    _, status, used = ended
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{command[0]} failed")
    return Run(time.perf_counter() - started, used.ru_utime + used.ru_stime, peak >> 20)


def digest(path: Path) -> tuple[int, int]:
    """Return how many pairs a file holds, and a number that is the same for the same pairs in any order."""
    total = count = 0
    with open(path, "rb") as file:
        for line in file:
            pair = json.loads(line)
            text = json.dumps([pair[name] for name in SHARED])
            total ^= int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
            count += 1
    return count, total


def ratio(name: str, ours: list[Run], theirs: list[Run]) -> str:
    """Return how many times the rows per second of another contender srlm has, by wall and by processor time."""
    wall = sorted(b.wall / a.wall for a, b in zip(ours, theirs, strict=True))
    cpu = sorted(b.cpu / a.cpu for a, b in zip(ours, theirs, strict=True))
    return (
        f"srlm has {statistics.median(wall):.2f} times the rows per second of {name} "
        f"(from {wall[0]:.2f} to {wall[-1]:.2f}); by processor time {statistics.median(cpu):.2f} "
        f"(from {cpu[0]:.2f} to {cpu[-1]:.2f})"
    )


def main() -> None:
    """Run all contenders in turn and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--file", type=existing_file)
    parser.add_argument("--duckdb", type=program, default=sys.executable)
    parser.add_argument("--folder", type=made_folder)
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed is compiled, for all contenders
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        judged, pairs = options.file or Path(scratch) / "judged.jsonl", Path(scratch) / "pairs.jsonl"
        if not options.file:
            judged_rows.write(options.rows, judged)
        with open(judged, "rb") as file:
            rows = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        found = contenders(judged, pairs, options.duckdb)
        print(f"{rows} rows, {judged.stat().st_size / 1e9:.2f} GB; {os.cpu_count()} processors, {platform.machine()}")
        runs: dict[str, list[Run]] = {name: [] for name in found}
        made = {}
        for _ in range(options.runs):
            for name, (_, command) in found.items():
                runs[name].append(run(command, pairs))
                made[name] = made.get(name) or digest(pairs)
        for name, (version, command) in found.items():
            wall, cpu = (statistics.median(getattr(one, of) for one in runs[name]) for of in ("wall", "cpu"))
            print(
                f"{name} ({version}): {wall:.1f} s, {cpu:.1f} s cpu, {rows / wall:.0f} rows/s, "
                f"peak {max(one.peak for one in runs[name])} MiB, {made[name][0]} pairs"
            )
            print(f"  {' '.join(command) if name != 'duckdb' else 'duckdb < benchmarks/make_pairs.sql'}")
        for name in list(found)[1:]:
            print(ratio(name, runs["srlm"], runs[name]))
        same = len(set(made.values())) == 1
        print("all made the same pairs" if same else f"THE PAIRS DIFFER: {made}")
        sys.exit(not same)


if __name__ == "__main__":
    main()
