"""An option that takes one file is refused with two; an option that takes several, or no file, is not."""

from __future__ import annotations

import pytest

from helpers import Srlm, as_lines, write_rows

PROMPTS = [{"prompt": "Ask?"}]


@pytest.mark.parametrize(
    "twice",
    [("--in", "a.jsonl", "--in", "a.jsonl"), ("-i", "a.jsonl", "--in=b.jsonl"), ("-ia.jsonl", "-i", "b.jsonl")],
)
def test_a_second_file_is_refused(srlm: Srlm, twice: tuple[str, ...]) -> None:
    for name in "ab":
        write_rows(srlm.folder / f"{name}.jsonl", PROMPTS)
    done = srlm("sample", "--engine", "echo", *twice)
    assert done.code == 2 and not done.out
    assert "--in takes one file, and is given twice" in done.err and "cat A B" in done.err


def test_so_is_a_second_output_and_one_by_an_old_name(srlm: Srlm) -> None:
    done = srlm("sample", "--engine", "echo", "-o", "a.jsonl", "--out", "b.jsonl", stdin=as_lines(PROMPTS))
    assert done.code == 2 and "--out takes one file" in done.err
    done = srlm("make-pairs", "--rejected-from", "a.jsonl", "--rejected-pool", "b.jsonl")
    assert done.code == 2 and "--rejected-pool takes one file" in done.err


def test_other_options_may_be_given_again(srlm: Srlm) -> None:
    write_rows(srlm.folder / "a.jsonl", PROMPTS)
    done = srlm("sample", "--engine", "echo", "-n", "4", "-n", "2", "--in", "a.jsonl", "--quiet", "--quiet")
    assert done.code == 0 and len(done.rows) == 2  # the last counts, as in other tools


def test_an_option_that_takes_several_files_reads_them_all(srlm: Srlm) -> None:
    for name in "ab":
        write_rows(srlm.folder / f"{name}.jsonl", [{"id": "x", "prompt": "Ask?", "response": "So.", "score": 3.0}])
    done = srlm("jury", "--in", "a.jsonl", "--in", "b.jsonl")
    assert done.code == 0, done.err
    assert done.rows[0]["score"] == 3.0 and len(done.rows[0]["scores"]) == 2
