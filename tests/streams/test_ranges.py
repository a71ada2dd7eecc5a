"""Several processes over ranges of a file: the bytes, the counts, the errors and the exit code of one process."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from random import Random

import pytest

from helpers import Result, Srlm, read_json
from srlm_cli.stages.make_pairs import group_of, scored_record
from srlm_cli.streams import ranges

if not hasattr(os, "sched_getaffinity"):
    pytest.skip("processes are forked on Linux only", allow_module_level=True)

# The same program, which thinks any file large and notes in a file how many ranges came from other processes.
IN_RANGES = """
import sys
from srlm_cli.streams import ranges
ranges.SIZE, ranges.PIECE, ranges.WORTHWHILE, ranges.processes = 700, 90, 0, lambda: 3
parts = ranges.Ranges.__iter__
def counted(self):
    for part in parts(self):
        print("part", file=open("parts", "a"))
        yield part
ranges.Ranges.__iter__ = counted
from srlm_cli.cli import main
main()
"""

# The first process that is forked ends itself as it begins with its third range.
MORTAL = """
import os, signal
from srlm_cli.streams import ranges
serve = ranges.Ranges._serve
def short(self, mine, write):
    work, left = self.work, [1, 1]
    if not self.workers:
        self.work = lambda rows: left.pop() and work(rows) if left else os.kill(os.getpid(), signal.SIGKILL)
    serve(self, mine, write)
ranges.Ranges._serve = short
"""


def judged(seed: int = 0, prompts: int = 120) -> list[str]:
    """Return lines of judged rows, most of them as `srlm judge` writes them: ties, no scores, odd texts, one long."""
    ranked = {"prompt": "Ranked?", "responses": [{"text": "one", "rank": 1}, {"text": "two", "rank": 0}]}
    long = [{"prompt": "Long?", "response": f"{k}" * 50, "score": k} for k in range(40)]  # of several ranges
    middle = [json.dumps(row) for row in [*long, ranked, {**long[0], "prompt": "Last?"}]]
    draw, lines = Random(seed), []
    for n in range(prompts):
        for k in range(draw.choice([1, 2, 4, 4, 4])):
            text = draw.choice(["a", "é", "\u2028", '"', "\r", "🙂"]) * draw.randint(1, 40)
            score = draw.choice([None, 1, 2.5, 2.5, 4, 1e-7])
            row = {
                "prompt": f"Question {n}?",
                "response": f"{text}{k}",
                "k": k,
                "score": score,
                "judgements": ["x" * 30],
            }
            lines.append(json.dumps(row, ensure_ascii=n % 2 == 0))
        lines += [""] if n % 17 == 0 else []
        lines += middle if n == prompts // 2 else []
    return lines


def both(srlm: Srlm, *options: str) -> tuple[Result, Result, int]:
    """Return how one process ends on `judged.jsonl`, how several end, and how many ranges these did."""
    command = ["make-pairs", "--in", "judged.jsonl", *options]
    one, several = srlm(*command), srlm.code(IN_RANGES, *command)
    parts = srlm.folder / "parts"
    done = len(parts.read_text().splitlines()) if parts.exists() else 0
    parts.unlink(missing_ok=True)
    for result in (one, several):
        result.err = re.sub(r"; \d+s$", "", result.err, flags=re.M)
    return one, several, done


def write(srlm: Srlm, lines: list[str], end: str = "\n") -> None:
    (srlm.folder / "judged.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + end.encode())


@pytest.mark.parametrize(
    "options", [[], ["--rho", "0.3", "--seed", "3"], ["--length-penalty", "auto", "--min-gap", "1"]]
)
def test_several_processes_make_the_pairs_of_one(srlm: Srlm, options: list[str]) -> None:
    for seed, end in ((0, "\n"), (1, "")):
        write(srlm, judged(seed), end)
        one, several, done = both(srlm, *options)
        assert (one.code, several.code) == (0, 0) and one.rows
        assert (several.out, several.err) == (one.out, one.err)
        assert done > 20


def test_the_file_tells_the_same_counts(srlm: Srlm) -> None:
    write(srlm, judged())
    assert both(srlm, "--out", "one.jsonl")[2] > 20
    several = read_json(srlm.folder / "one.jsonl.meta.json")["counts"]
    srlm("make-pairs", "--in", "judged.jsonl", "--out", "one.jsonl")
    alone = read_json(srlm.folder / "one.jsonl.meta.json")["counts"]
    assert {**several, "seconds": 0} == {**alone, "seconds": 0}
    assert several["read"] > 300 and several["counts"]["prompts"] == 123


NO_ROW = '{"prompt": "Why?"}'
NO_UTF8 = '{"prompt": "Why?", "response": "\ud800", "score": 1}'


# What is wrong with them stands in a field that no pair has.
BROKEN = [
    f'{{"prompt": "Why?", "response": "a", "score": 1, "judgements": ["fine", {value}]}}'
    for value in ('"\\u12g4"', '"\\x"', '"\x01"', "NaN", "-Infinity", "1e400", "01", "tru", '"\ud800"', '{"a": 1,}')
]


@pytest.mark.parametrize("bad", BROKEN, ids=repr)
def test_what_no_pair_has_must_be_json_too(srlm: Srlm, bad: str) -> None:
    lines = judged()
    write(srlm, [*lines[:200], bad, *lines[200:]])
    one, several, done = both(srlm)
    assert one.code == several.code == 3 and "judged.jsonl:201: not " in one.err and done
    assert (several.out, several.err) == (one.out, one.err)


@pytest.mark.parametrize(("bad", "at"), [("{", 0), (NO_ROW, 1), (NO_UTF8, 150), ("[]", 300), ("{", 301), (NO_ROW, -1)])
def test_a_bad_row_is_named_by_its_line_and_nothing_before_it_is_lost(srlm: Srlm, bad: str, at: int) -> None:
    lines = judged()
    lines.insert(at if at >= 0 else len(lines), bad)
    write(srlm, lines)
    one, several, done = both(srlm)
    assert f"judged.jsonl:{lines.index(bad) + 1}: " in one.err
    assert one.code == several.code == 3
    assert (several.out, several.err) == (one.out, one.err)
    assert (done > 0) == (at not in (0, 1))


def test_bad_rows_are_skipped_counted_and_kept(srlm: Srlm) -> None:
    lines = judged()
    for at in (250, 251, 320):
        lines.insert(at, '{"score": true}')
    write(srlm, lines)
    one, several, done = both(srlm, "--on-error", "skip")
    assert one.code == several.code == 0 and "3 dropped: bad row" in one.err and done
    assert (several.out, several.err) == (one.out, one.err)
    rejects, kept = srlm.folder / "rejects.jsonl", []
    for run in (srlm, lambda *args: srlm.code(IN_RANGES, *args)):
        run("make-pairs", "--in", "judged.jsonl", "--on-error", "skip", "--rejects", "rejects.jsonl")
        kept.append(rejects.read_text())
        rejects.unlink()
    assert kept[0] == kept[1] and kept[0].count("\n") == 3


@pytest.mark.parametrize("again", [0, 100, 200])
def test_a_prompt_that_comes_back_is_found_where_it_comes_back(srlm: Srlm, again: int) -> None:
    lines = [line for line in judged() if line]
    lines.insert(280, lines[again])
    write(srlm, lines)
    one, several, done = both(srlm)
    assert one.code == several.code == 3 and "are not grouped" in one.err and done
    assert (several.out, several.err) == (one.out, one.err)


def test_what_has_to_be_read_by_one_process_is(srlm: Srlm) -> None:
    write(srlm, judged())
    for options in (["--unsorted"], ["--limit", "200"], ["--rejected-pool", "judged.jsonl"]):
        one, several, done = both(srlm, *options)
        assert (several.code, several.out, several.err, done) == (one.code, one.out, one.err, 0)
    piped = srlm.code(IN_RANGES, "make-pairs", stdin="\n".join(judged()))
    assert piped.out == srlm("make-pairs", "--in", "judged.jsonl").out


def test_a_process_that_is_killed_is_gone_on_without(srlm: Srlm) -> None:
    write(srlm, judged())
    found = srlm.code(MORTAL + IN_RANGES, "make-pairs", "--in", "judged.jsonl")
    assert found.code == 0 and found.out == srlm("make-pairs", "--in", "judged.jsonl").out
    assert (srlm.folder / "parts").read_text().count("part") == 2 * 3  # those before its third


@pytest.mark.parametrize("size", [2, 3, 7, 90, 1000])
def test_lines_read_by_pieces_are_those_of_the_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(ranges, "PIECE", size)
    path = tmp_path / "lines"
    path.write_bytes(b"a\n\n\nlonger\r\n\nb\n\xe2\x80\xa8c\n\nno end")
    lines = path.open("rb").readlines()
    ends = [sum(map(len, lines[:n])) for n in range(len(lines) + 1)]
    with open(path, "rb", buffering=size) as file:
        for first in range(len(ends)):
            for last in range(first, len(ends)):
                file.seek(ends[first])
                found = ranges.Lines(file, ends[last])
                assert list(found) == lines[first:last] and found.count == last - first


def test_ranges_are_whole_groups_and_all_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "SIZE", 700)
    monkeypatch.setattr(ranges, "processes", lambda: 0)
    path = tmp_path / "judged.jsonl"
    path.write_text("\n".join(judged()), encoding="utf-8")
    whole = path.read_bytes()
    found = ranges.Ranges(str(path), scored_record, group_of, list).ranges
    assert found[0][0] == 0 and found[-1][1] == len(whole)
    assert all(end == start for (_, end), (start, _) in zip(found, found[1:], strict=False))
    prompts = [
        {json.loads(line)["prompt"] for line in whole[start:end].split(b"\n") if line.strip()} for start, end in found
    ]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 123
    assert len(found) > 20
