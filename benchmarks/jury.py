"""`srlm jury` against DuckDB on the same judged rows of two jurors, in turn: rates, peak memory, the same scores.

python benchmarks/jury.py [--rows N] [--runs R] [--duckdb PYTHON] [--folder FOLDER] [--order same|other]

Makes two files of N rows (3.4 kB each): the same replies with the scores of two jurors. 20,000 rows have texts of their
own. With --order other the second file has its prompts in a random order, so srlm joins on disk. PYTHON is an
interpreter that has duckdb; without one srlm runs alone. DuckDB uses all processors, reads without the judgements, and
compares no texts. Memory is that of all processes of a contender.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from random import Random

import judged_rows
from make_pairs import Run, duckdb_version, ratio, run
from paths import made_folder, program

HERE = Path(__file__).parent
DIFFERENT = 20_000  # rows
RUN_SQL = """
import duckdb, sys
sql = open(sys.argv[1]).read()
for name, path in zip(("$first", "$second", "$out"), sys.argv[2:]):
    sql = sql.replace(name, "'" + path.replace("'", "''") + "'")
duckdb.sql(sql)
"""


def write(rows: int, first: Path, second: Path, order: str) -> None:
    """Write the judged rows of two jurors; the texts repeat after `DIFFERENT` rows, under other ids."""
    text, draw = judged_rows.prose(Random(0)), Random(1)
    made: list[tuple[str, str, str]] = []
    for at in range(min(rows, DIFFERENT)):
        row = judged_rows.judged_row(*divmod(at, judged_rows.N), text, 0)
        scores = [round(5 * draw.random(), 9) for _ in row["scores"]]
        other = {**row, "score": statistics.fmean(scores), "scores": scores, "judge": {**row["judge"], "model": "M2"}}
        made.append((row["prompt_id"], *(json.dumps(one, ensure_ascii=False) + "\n" for one in (row, other))))
    places: list[int] = []
    with open(first, "wb") as one, open(second, "wb") as two:
        for at in range(rows):
            name, *lines = made[at % DIFFERENT]
            if at % judged_rows.N == 0:
                places.append(two.tell())
                new = f"{Random(at).getrandbits(64):016x}"
            for file, line in zip((one, two), lines, strict=True):
                file.write(line.replace(name, new).encode())
        places.append(two.tell())
    if order == "other":
        shuffle(second, places)


def shuffle(path: Path, places: list[int]) -> None:
    """Put the parts of a file between these places into a random order."""
    spans = list(zip(places, places[1:], strict=False))
    Random(2).shuffle(spans)
    other = path.with_suffix(".other")
    with open(path, "rb") as source, open(other, "wb") as target:
        for start, end in spans:
            source.seek(start)
            target.write(source.read(end - start))
    os.replace(other, path)


def digest(path: Path) -> tuple[int, int]:
    """Return how many rows a file holds, and a number that is the same for the same scores in any order."""
    total = count = 0
    with open(path, "rb") as file:
        for line in file:
            row = json.loads(line)
            score = None if row["score"] is None else round(row["score"], 6)
            total = (total + hash((row["id"], row["response"], score, *row["scores"]))) % (1 << 61)
            count += 1
    return count, total


def main() -> None:
    """Run both contenders in turn and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--duckdb", type=program, default=sys.executable)
    parser.add_argument("--folder", type=made_folder)
    parser.add_argument("--order", choices=("same", "other"), default="same")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        first, second, out = (Path(scratch) / f"{name}.jsonl" for name in ("first", "second", "jury"))
        write(options.rows, first, second, options.order)
        srlm = [sys.executable, "-m", "srlm_cli", "jury", "--quiet", "--out", str(out)]
        commands = {
            "srlm": [*srlm, "--in", str(first), "--in", str(second)],
            "duckdb": [options.duckdb, "-c", RUN_SQL, str(HERE / "jury.sql"), str(first), str(second), str(out)],
        }
        version = duckdb_version(options.duckdb)
        if not version:
            print(f"{options.duckdb} has no duckdb: srlm alone")
            del commands["duckdb"]
        size = (first.stat().st_size + second.stat().st_size) / 1e9
        print(
            f"2 x {options.rows} rows, {size:.2f} GB; {os.cpu_count()} processors, Python {platform.python_version()}"
        )
        runs: dict[str, list[Run]] = {name: [] for name in commands}
        made = {}
        for _ in range(options.runs):
            for name, command in commands.items():
                runs[name].append(run(command, out))
                made[name] = made.get(name) or digest(out)
                print(name, runs[name][-1], flush=True)
        for name in commands:
            wall, cpu = (statistics.median(getattr(one, of) for one in runs[name]) for of in ("wall", "cpu"))
            print(
                f"{name}{f' {version}' if name == 'duckdb' else ''}: {wall:.1f} s, {cpu:.1f} s cpu, "
                f"{options.rows / cpu:.0f} replies per second of processor time, "
                f"peak {max(one.peak for one in runs[name])} MiB, {made[name][0]} rows"
            )
        if len(commands) == 1:
            return
        print(ratio("duckdb", runs["srlm"], runs["duckdb"]))
        same = len(set(made.values())) == 1
        print("both made the same scores" if same else f"THE SCORES DIFFER: {made}")
        sys.exit(not same)


if __name__ == "__main__":
    main()
