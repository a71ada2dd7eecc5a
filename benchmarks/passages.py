"""`srlm index` and its searches beside bare SQLite, bm25s and tantivy: passages per second, memory, time of a query.

python benchmarks/passages.py [--passages N] [--queries N] [--only NAME,NAME] [--runs N] [--python P] [--folder FOLDER]

Makes N documents of one passage each: 110 words, drawn from 60,000 that are as unequally frequent as those of a
language. A query has 10 words that are together in one of the documents; in large corpora others can share them. Each
contender (see `retrievers.py`) indexes in one process and searches in another. P is an interpreter that has srlm,
bm25s, PyStemmer and tantivy; contenders that are not installed are left out. Rates are by the processor time of all
threads and by the clock, and include the start of the process. The index is on a disk, so that --folder matters.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from paths import made_folder, program

HERE = Path(__file__).parent
CONTENDERS = ("srlm", "sqlite3", "bm25s", "tantivy")
WORDS, KINDS = 110, 60_000


def write(count: int, path: Path, wanted: int) -> list[str]:
    """Write documents, and return a query for each of some of them, spread over the file."""
    draw = Random(1)
    kinds = ["".join(draw.choices("aeioubcdfghlmnprst", k=draw.randint(2, 9))) for _ in range(KINDS)]
    pool = draw.choices(kinds, [1 / (rank + 3) for rank in range(KINDS)], k=2_000_000)
    queries = []
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            at = draw.randrange(len(pool) - WORDS)
            file.write(json.dumps({"id": str(number), "text": " ".join(pool[at : at + WORDS])}) + "\n")
            if number % max(count // wanted, 1) == 0:
                queries.append(" ".join(pool[at + 20 : at + 30]))
    return queries[:wanted]


def run(python: Path, contender: str, step: str, *paths: Path) -> dict[str, Any] | None:
    """Return what a step of a contender took, None if it is not installed; end the benchmark if it failed."""
    command = [python, HERE / "retrievers.py", contender, step, *paths]
    started = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    wall = time.perf_counter() - started
    if done.returncode:
        missing = "No module named" in done.stderr
        print(f"{contender}: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return None if missing else sys.exit(1)
    return {"wall": wall, **json.loads(done.stdout)}


def size(path: Path) -> float:
    """Return the size of a file, or of all files of a folder, in MB."""
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path])) / 1e6


def measured(python: Path, contender: str, corpus: Path, queries: Path, passages: int) -> bool:
    """Index and search once and print a line; return whether the contender is installed."""
    place = corpus.with_name(f"{contender}.index")
    if not (made := run(python, contender, "index", corpus, place, queries)):
        return False
    found = run(python, contender, "search", corpus, place, queries)
    cpu, wall = found["query_cpu"], found["query_wall"]
    print(
        f"{made['name']:14} {passages / made['cpu']:6.0f} passages/s of processor time, {passages / made['wall']:6.0f} "
        f"by the clock, {made['peak']:4} MiB, index {size(place):.0f} MB; {len(cpu)} queries: median "
        f"{statistics.median(cpu):.2f} ms of processor time, {statistics.median(wall):.2f} by the clock, most "
        f"{max(cpu):.2f}, {found['right']} found first, {found['peak']} MiB",
        flush=True,
    )
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    return True


def main() -> None:
    """Make the passages and let the contenders run in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--only", default=",".join(CONTENDERS))
    parser.add_argument("--python", type=program, default=sys.executable)
    parser.add_argument("--folder", type=made_folder)
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(CONTENDERS):
        parser.error(f"--only {','.join(sorted(unknown))}: it takes {', '.join(CONTENDERS)}")
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        corpus, asked = Path(scratch) / "corpus.jsonl", Path(scratch) / "queries.json"
        queries = write(options.passages, corpus, options.queries)
        asked.write_text(json.dumps(queries), encoding="utf-8")
        print(f"{options.passages} passages, {size(corpus):.0f} MB", flush=True)
        for _ in range(options.runs):
            wanted = [one for one in wanted if measured(options.python, one, corpus, asked, options.passages)]


if __name__ == "__main__":
    main()
