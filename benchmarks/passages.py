"""`srlm index` and searches: passages per second of processor time, the median time of a query, peak memory.

python benchmarks/passages.py [--passages N] [--queries N] [--folder FOLDER]

Makes N documents of one passage each: 110 words, drawn from 60,000 that are as unequally frequent as those of a
language. A query has 10 words that are together in one of the documents; in large corpora others can share them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from paths import made_folder

WORDS, KINDS = 110, 60_000


def write(count: int, path: Path) -> list[str]:
    """Write documents, and return a query for each of some of them."""
    draw = Random(1)
    kinds = ["".join(draw.choices("aeioubcdfghlmnprst", k=draw.randint(2, 9))) for _ in range(KINDS)]
    pool = draw.choices(kinds, [1 / (rank + 3) for rank in range(KINDS)], k=2_000_000)
    queries = []
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            at = draw.randrange(len(pool) - WORDS)
            file.write(json.dumps({"id": str(number), "text": " ".join(pool[at : at + WORDS])}) + "\n")
            if number % 997 == 0:
                queries.append(" ".join(pool[at + 20 : at + 30]))
    return queries


def main() -> None:
    """Index, search, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--folder", type=made_folder)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        corpus, made = Path(scratch) / "corpus.jsonl", Path(scratch) / "corpus.db"
        queries = write(options.passages, corpus)[: options.queries]
        command = [sys.executable, "-m", "srlm_cli", "index", "--quiet", "--in", str(corpus), "--out", str(made)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        cpu = used.ru_utime + used.ru_stime
        print(
            f"{options.passages} passages ({corpus.stat().st_size / 1e6:.0f} MB, index {made.stat().st_size / 1e6:.0f} "
            f"MB): {cpu:.1f} s cpu, {options.passages / cpu:.0f} a second, peak {used.ru_maxrss >> 10} MiB"
        )
        from srlm_cli.evidence.search import Corpus

        index = Corpus(str(made))
        times, right = [], 0
        for query in queries:
            started = time.process_time()
            found = index.search(query, 3)
            times.append(time.process_time() - started)
            right += bool(found) and query in found[0].text
        median, most = 1000 * statistics.median(times), 1000 * max(times)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(
            f"{len(queries)} queries: median {median:.2f} ms cpu, most {most:.2f}, {right} found first; peak {peak} MiB"
        )
        sys.exit(status != 0)


if __name__ == "__main__":
    main()
