"""`--shard K/N`: what the parts make, joined in their order, is byte for byte what one run over the file makes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from typer import BadParameter

from commands_table import ECHO, GROUP, HINDSIGHT, JUDGE, PAIRWISE, RANKED, SAMPLE, SETTLE, Command
from helpers import Srlm, as_lines, read_json, read_rows, write_rows
from srlm_cli.errors import OptionError
from srlm_cli.options.common import shard_of
from srlm_cli.streams.reader import Reader, Shard

ACCEPT = Command("make-eft", RANKED, (*ECHO, "--num-judgements", "6", "--ties", "--max-share", "1"), field="responses")
TARGETS = Command("make-eft", RANKED, (*HINDSIGHT.options, "--max-share", "1"), field="responses")
HELD_OUT = Command(
    "make-eft", RANKED, (*HINDSIGHT.options, "--eval-share", "0.5", "--split", "eval"), field="responses"
)
JUDGE_RANKED = Command("judge", RANKED, field="responses")
SHARDED = [SAMPLE, JUDGE, JUDGE_RANKED, ACCEPT, TARGETS, HELD_OUT, PAIRWISE, GROUP, SETTLE]


def seven(command: Command) -> list:
    """Return seven rows that a command takes."""
    return [{**row, "prompt": f"{row['prompt']} ({n})"} for n in (1, 2) for row in command.rows[:4]][:7]


def joined(srlm: Srlm, command: Command, of: int, *more: str, name: str = "in.jsonl") -> bytes:
    """Return what `of` shards write, joined in their order."""
    made = b""
    for number in range(1, of + 1):
        out = srlm.folder / f"part-{number}.jsonl"
        done = srlm(*command.argv("--in", name, "--out", out.name, "--shard", f"{number}/{of}", "--quiet", *more))
        assert done.code == 0, done.err
        made += out.read_bytes()
    return made


def whole(srlm: Srlm, command: Command, *more: str, name: str = "in.jsonl") -> bytes:
    """Return what a run over the whole file writes."""
    assert srlm(*command.argv("--in", name, "--out", "whole.jsonl", "--quiet", *more)).code == 0
    return (srlm.folder / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("command", "of"),
    [*((command, 3) for command in SHARDED), (SAMPLE, 1), (SAMPLE, 7), (PAIRWISE, 4), (GROUP, 4)],
    ids=lambda value: f"{value}-{SHARDED.index(value)}" if isinstance(value, Command) else str(value),
)
def test_the_parts_joined_are_the_whole(srlm: Srlm, command: Command, of: int) -> None:
    write_rows(srlm.folder / "in.jsonl", seven(command))
    assert joined(srlm, command, of) == whole(srlm, command) != b""


def test_more_parts_than_rows_leave_empty_files_that_are_there(srlm: Srlm) -> None:
    write_rows(srlm.folder / "in.jsonl", SAMPLE.rows)
    assert joined(srlm, SAMPLE, 6) == whole(srlm, SAMPLE)
    sizes = [(srlm.folder / f"part-{number}.jsonl").stat().st_size for number in range(1, 7)]
    assert sizes.count(0) == 2
    write_rows(srlm.folder / "none.jsonl", [])
    assert joined(srlm, JUDGE, 2, name="none.jsonl") == b""


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_bad_rows_blank_lines_and_no_last_newline(srlm: Srlm, name: str) -> None:
    lines = ["", "{", *seven(SAMPLE)[:3], "", "[1]", *seven(SAMPLE)[3:], "{"]
    write_rows(srlm.folder / name, lines)
    if name.endswith("jsonl"):
        (srlm.folder / name).write_bytes((srlm.folder / name).read_bytes()[:-1])
    skip = ("--on-error", "skip", "--rejects", "bad.jsonl")
    assert joined(srlm, SAMPLE, 4, *skip, name=name) == whole(srlm, SAMPLE, *skip, name=name) != b""
    places = []
    for number in range(1, 5):
        srlm(*SAMPLE.argv("--in", name, "--out", "o.jsonl", "--shard", f"{number}/4", *skip))
        places += [int(row["at"].split(":")[1]) for row in read_rows(srlm.folder / "bad.jsonl")]
    assert places == [2, 7, 12]


@pytest.mark.parametrize("limit", [1, 5])
def test_the_limit_is_of_the_file_and_not_of_the_part(srlm: Srlm, limit: int) -> None:
    write_rows(srlm.folder / "in.jsonl", ["{", *seven(SAMPLE)])
    more = ("--limit", str(limit), "--on-error", "skip")
    rows = joined(srlm, SAMPLE, 3, *more)
    assert rows == whole(srlm, SAMPLE, *more) and rows.count(b"\n") == 4 * min(limit, 7)


def test_a_bad_row_stops_only_the_part_that_has_it_and_is_named_by_its_line(srlm: Srlm) -> None:
    write_rows(srlm.folder / "in.jsonl", [*SAMPLE.rows[:3], "{"])
    assert srlm(*SAMPLE.argv("--in", "in.jsonl", "--shard", "1/2")).code == 0
    stopped = srlm(*SAMPLE.argv("--in", "in.jsonl", "--shard", "2/2"))
    assert stopped.code == 3 and "in.jsonl:4: not JSON" in stopped.err


def test_a_killed_part_goes_on_within_itself(srlm: Srlm) -> None:
    rows = [{"prompt": f"Question {n}?"} for n in range(61)]
    write_rows(srlm.folder / "in.jsonl", rows)
    for number in (1, 2, 3):
        argv = SAMPLE.argv("--in", "in.jsonl", "--out", f"part-{number}.jsonl", "--shard", f"{number}/3")
        assert srlm.mortal(14, signal.SIGKILL, *argv).code == -signal.SIGKILL
        resumed = srlm(*argv)
        assert resumed.code == 0 and "resuming after" in resumed.err
    made = b"".join((srlm.folder / f"part-{number}.jsonl").read_bytes() for number in (1, 2, 3))
    assert made == whole(srlm, SAMPLE)


def test_another_shard_or_a_grown_file_is_another_run(srlm: Srlm) -> None:
    write_rows(srlm.folder / "in.jsonl", [*SAMPLE.rows, "{"])
    argv = SAMPLE.argv("--in", "in.jsonl", "--out", "out.jsonl", "--shard")
    assert srlm(*argv, "2/2").code == 3
    other = srlm(*argv, "2/3")
    assert other.code == 2 and "2/2, lines 3 to 5" in other.err and "2/3, lines 2 to 3" in other.err
    write_rows(srlm.folder / "in.jsonl", [*SAMPLE.rows, *SAMPLE.rows])
    assert srlm(*argv, "2/2").code == 2


def test_the_meta_tells_the_part(srlm: Srlm) -> None:
    write_rows(srlm.folder / "in.jsonl", SAMPLE.rows)
    srlm(*SAMPLE.argv("--in", "in.jsonl", "--out", "out.jsonl", "--shard", "2/3"))
    meta = read_json(srlm.folder / "out.jsonl.meta.json")
    assert meta["shard"] == meta["fingerprint"]["shard"] == "2/3, lines 2 to 2"


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "1/", "/4", "a/b", "-1/4", "1/0", "1/2/3", ""])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(BadParameter, match="expected K/N"):
        shard_of(text)


def test_a_part_that_is_none_is_a_usage_error(srlm: Srlm) -> None:
    result = srlm(*SAMPLE.argv("--in", "in.jsonl", "--shard", "5/4"))
    assert result.code == 2 and "'--shard'" in result.err and "expected K/N" in result.err


def test_stdin_cannot_be_divided(srlm: Srlm) -> None:
    for more in (("--limit", "2"), ("--in", "/dev/stdin")):
        result = srlm(*SAMPLE.argv("--shard", "1/2", *more), stdin=as_lines(SAMPLE.rows))
        assert result.code == 2 and "--shard cannot divide" in result.err and "--in FILE" in result.err


def test_what_depends_on_all_rows_before_is_not_divided(srlm: Srlm) -> None:
    write_rows(srlm.folder / "in.jsonl", RANKED)
    for command in ("make-eft", "gen-prompts"):
        result = srlm(command, *ECHO, "--in", "in.jsonl", "--shard", "1/2")
        assert result.code == 2 and "--shard cannot" in result.err


def test_parts_that_are_thinned_when_joined_are_one_run(srlm: Srlm) -> None:
    rows = [{**row, "prompt": f"{row['prompt']} ({n})"} for n in range(12) for row in RANKED]
    write_rows(srlm.folder / "in.jsonl", rows)
    (srlm.folder / "joined.jsonl").write_bytes(joined(srlm, ACCEPT, 3))
    options = ACCEPT.options[:-2]
    thinned = srlm("make-eft", "--thin", "--max-share", "0.3", "--in", "joined.jsonl")
    at_once = srlm("make-eft", *options, "--max-share", "0.3", "--in", "in.jsonl")
    assert thinned.code == at_once.code == 0 and thinned.out == at_once.out
    assert 20 < len(thinned.rows) < len(read_rows(srlm.folder / "joined.jsonl"))


# --- the lines of a part ---------------------------------------------------------------------


@pytest.mark.parametrize("lines", range(30))
@pytest.mark.parametrize("of", [1, 2, 3, 7, 29])
def test_parts_follow_each_other_and_leave_nothing_out(lines: int, of: int) -> None:
    spans = [Shard(number, of).span(lines) for number in range(1, of + 1)]
    assert [span[0] for span in spans] + [lines] == [0] + [span[1] for span in spans]
    sizes = [end - start for start, end in spans]
    assert max(sizes) - min(sizes) <= 1


def test_a_part_of_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nowhere"):
        Reader([str(tmp_path / "nowhere")], lambda row: row, shard=Shard(1, 2))


def test_a_shard_in_the_settings_is_a_text(srlm: Srlm) -> None:
    (srlm.folder / "srlm.toml").write_text("[sample]\nshard = 1\n")
    result = srlm("sample", *ECHO, "--in", "in.jsonl")
    assert result.code == 2 and "expected K/N" in result.err


def test_what_looks_at_all_rows_is_not_sharded(srlm: Srlm) -> None:
    (srlm.folder / "in.jsonl").write_text("")
    for argv in (["judge", "--meta"], ["make-eft", "--thin"]):
        result = srlm(*argv, "--in", "in.jsonl", "--shard", "1/2", "--model", "m")
        assert result.code == 2 and "shard" in result.err
