"""What every command owes its user: streams, files, exit codes, errors, options, settings."""

from __future__ import annotations

import gzip
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from commands_table import (
    ACCEPT,
    AGAINST,
    BOTH,
    COMMANDS,
    CORPUS,
    CRITERIA,
    ECHO,
    EVIDENCE,
    GEN_PROMPTS,
    GROUP,
    HEAD_TO_HEAD,
    HEALTH,
    HINDSIGHT,
    JUDGE,
    JUDGES,
    JURY,
    KEPT,
    MAKE_PAIRS,
    META,
    OWN,
    PAGES,
    PAIRWISE,
    PROBE,
    PROMPTS,
    RESPONSES,
    REWARD,
    ROW_COMMANDS,
    RULES,
    SAMPLE,
    SETTLE,
    STAGES,
    Command,
)
from helpers import MORTAL, PROGRAM, Record, Result, Srlm, as_lines, read_json, read_rows, write_rows
from srlm_cli.cli import command as build_command
from srlm_cli.evidence.documents import Document
from srlm_cli.evidence.index import open_index


def each(commands: list[Command]) -> pytest.MarkDecorator:
    """Run a test once for each command."""
    return pytest.mark.parametrize("command", commands, ids=str)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / CORPUS
    with open_index(str(path), 120, 20) as made:
        for at, text in enumerate(("The sky is blue.", "A river of Europe.", "Boil an egg.", "A lighthouse warns.")):
            made.add(Document(str(at), "", text))
        made.finish()
    return path


@pytest.fixture(autouse=True)
def against(tmp_path: Path, corpus: Path) -> None:
    """The other side of `eval head-to-head`, and an index of passages."""
    shutil.copy(corpus, tmp_path / CORPUS)
    write_rows(tmp_path / AGAINST, [{**row, "response": "Another answer."} for row in RESPONSES])


def one_error_line(result: Result, command: Command) -> str:
    """Return the only line on stderr, an error of this command."""
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert re.match(rf"srlm {command.name.split()[0]}( \S+)?: error: ", lines[0])
    return lines[0]


WHOLE: dict[tuple[str, ...], str] = {}


def whole(srlm: Srlm, command: Command, *more: str) -> str:
    """Return what an uninterrupted run over all rows prints; each is run once."""
    key = (*command.argv(*more), as_lines(command.rows))
    if key not in WHOLE:
        result = srlm(*key[:-1], stdin=key[-1])
        assert result.code == 0, result.err
        WHOLE[key] = result.out
    return WHOLE[key]


def whole_rows(srlm: Srlm, command: Command, *more: str) -> list[Record]:
    """Return the rows of an uninterrupted run."""
    return Result(0, whole(srlm, command, *more), "").rows


# --- input -----------------------------------------------------------------------------------


@each(STAGES)
def test_empty_input_makes_an_empty_complete_file(srlm: Srlm, command: Command) -> None:
    result = srlm(*command.argv("--in", "-", "--out", "out.jsonl", "--quiet"), stdin="")
    assert (result.code, result.out, result.err) == (0, "", "")
    assert (srlm.folder / "out.jsonl").read_bytes() == b""


@each([REWARD, HEAD_TO_HEAD, HEALTH, KEPT, JUDGES])
def test_metrics_of_empty_input_are_null_of_n_0(srlm: Srlm, command: Command) -> None:
    result = srlm(*command.argv())
    assert result.code == 0
    assert result.rows and all((row["value"], row["n"]) == (None, 0) for row in result.rows)


def test_gen_prompts_without_seeds_says_so(srlm: Srlm) -> None:
    result = srlm(*GEN_PROMPTS.argv())
    assert result.code == 2 and "no seed prompts" in one_error_line(result, GEN_PROMPTS)


@each([c for c in COMMANDS if c.trains])
def test_training_on_nothing_is_bad_data(srlm: Srlm, command: Command) -> None:
    result = srlm(*command.argv())
    assert result.code == 3 and re.search(r"no (rows|pairs) to train on", result.err), result.err
    assert not (srlm.folder / "model").exists()


@each(ROW_COMMANDS)
def test_blank_lines_are_no_rows_but_count_as_lines(srlm: Srlm, command: Command) -> None:
    lines = [json.dumps(row) for row in command.rows]
    spaced = "\n \t\n" + "\r\n\n".join(lines) + "\n\n\n"
    assert srlm(*command.argv(), stdin=spaced).out == whole(srlm, command) != ""
    broken = srlm(*command.argv("--quiet"), stdin=spaced + "{\n")
    assert f"<stdin>:{spaced.count(chr(10)) + 1}: not JSON" in one_error_line(broken, command)


@each(ROW_COMMANDS)
def test_a_path_and_a_dash_and_stdin_are_the_same(srlm: Srlm, command: Command) -> None:
    write_rows(srlm.folder / "in.jsonl.gz", command.rows)
    from_gz = srlm(*command.argv("--in", "in.jsonl.gz", "--out", "out.jsonl.gz"))
    piped = whole_rows(srlm, command, "--in", "-", "--out", "-")
    assert from_gz.code == 0 and from_gz.out == ""
    assert read_rows(srlm.folder / "out.jsonl.gz") == piped == whole_rows(srlm, command) != []


@each(COMMANDS)
def test_a_missing_input_file_is_named(srlm: Srlm, command: Command) -> None:
    result = srlm(*command.argv("--in", "nowhere.jsonl"))
    assert result.code == 2 and "nowhere.jsonl" in one_error_line(result, command)


def test_an_unfinished_input_says_which_command_to_run_again(srlm: Srlm) -> None:
    write_rows(srlm.folder / "in.jsonl.part", PROMPTS)
    result = srlm(*SAMPLE.argv("--in", "in.jsonl"))
    assert result.code == 2 and "in.jsonl.part" in result.err and "not finished" in result.err


@each(STAGES)
def test_limit_reads_so_many_rows(srlm: Srlm, command: Command) -> None:
    write_rows(srlm.folder / "some.jsonl", command.rows[:3])
    limited = srlm(*command.argv("--limit", "3"), stdin=as_lines(command.rows) + "not JSON\n")
    assert limited.code == 0
    assert limited.out == srlm(*command.argv("--in", "some.jsonl")).out
    assert "3 read" in limited.err or "6 read" in limited.err  # a ranked row holds two replies


def test_limit_0_reads_nothing(srlm: Srlm) -> None:
    result = srlm(*SAMPLE.argv("--limit", "0"), stdin="not JSON\n")
    assert (result.code, result.out) == (0, "")


# --- bad rows --------------------------------------------------------------------------------

BROKEN = '{"prompt": "cut of'


@each(COMMANDS)
def test_bad_json_is_one_line_that_names_file_and_line(srlm: Srlm, command: Command) -> None:
    write_rows(srlm.folder / "in.jsonl", [*command.rows, BROKEN, *command.rows])
    result = srlm(*command.argv("--in", "in.jsonl", "--quiet"))
    assert result.code == 3
    assert f"in.jsonl:{len(command.rows) + 1}: not JSON" in one_error_line(result, command)
    assert all(isinstance(row, dict) for row in result.rows)


@each(STAGES)
def test_rows_before_a_bad_one_are_kept_and_the_mended_file_goes_on(srlm: Srlm, command: Command) -> None:
    write_rows(srlm.folder / "in.jsonl", [*command.rows[:-2], BROKEN, *command.rows[-2:]])
    stopped = srlm(*command.argv("--in", "in.jsonl", "--out", "out.jsonl"))
    assert stopped.code == 3 and stopped.out == ""
    assert not (srlm.folder / "out.jsonl").exists()
    rows = whole_rows(srlm, command)
    kept = read_rows(srlm.folder / "out.jsonl.part")
    assert kept == rows[: len(kept)] and (kept or command is ACCEPT)
    write_rows(srlm.folder / "in.jsonl", command.rows)
    again = srlm(*command.argv("--in", "in.jsonl", "--out", "out.jsonl"))
    # make-pairs and jury are quick, and know more than their last rows tell: they begin again
    assert again.code == 0 and ("resuming after" in again.err) == (command not in (JURY, MAKE_PAIRS))
    assert read_rows(srlm.folder / "out.jsonl") == rows


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.lazy], ids=str)
def test_without_all_its_rows_a_command_leaves_no_file(srlm: Srlm, command: Command) -> None:
    result = srlm(*command.argv("--out", "out"), stdin=as_lines([*command.rows, BROKEN]))
    assert result.code == 3 and result.out == ""
    assert not (srlm.folder / "out").exists()


def faults(command: Command) -> dict[str, str]:
    """Return bad lines of each kind, with what has to be said of them."""
    good = command.rows[0]
    without = {key: value for key, value in good.items() if key != command.field}
    return {
        BROKEN: "not JSON",
        json.dumps({**good, "weight": float("nan")}): "NaN",
        json.dumps({**good, "weight": float("-inf")}): "Infinity",
        json.dumps([good]): "expected a JSON object",
        '"a text"': "expected a JSON object",
        json.dumps(without): f"`{command.field}`",
        **({json.dumps({**good, "prompt": 3}): "`prompt`"} if "prompt" in good else {}),
    }


@each(ROW_COMMANDS)
def test_skipped_rows_are_kept_with_reasons_and_counted(srlm: Srlm, command: Command) -> None:
    bad = faults(command)
    write_rows(srlm.folder / "in.jsonl", [*bad, *command.rows])
    result = srlm(
        *command.argv("--in", "in.jsonl", "--out", "out.jsonl", "--on-error", "skip", "--rejects", "bad.jsonl")
    )
    assert result.code == 0, result.err
    assert read_rows(srlm.folder / "out.jsonl") == whole_rows(srlm, command)
    rejects = read_rows(srlm.folder / "bad.jsonl")
    assert [row["line"] for row in rejects] == list(bad)
    assert [row["at"] for row in rejects] == [f"in.jsonl:{number}" for number in range(1, len(bad) + 1)]
    for row, words in zip(rejects, bad.values(), strict=True):
        assert words in row["reason"]
    counts = read_json(srlm.folder / "out.jsonl.meta.json")["counts"]
    assert counts["dropped"].get("bad row") == len(bad)
    assert f"{len(bad)} dropped: bad row" in result.err


@each([c for c in COMMANDS if c.trains])
@pytest.mark.parametrize("kind", [1, 3, 5], ids=["NaN", "list", "field missing"])
def test_training_stops_at_a_bad_row(srlm: Srlm, command: Command, kind: int) -> None:
    line, words = list(faults(command).items())[kind]
    result = srlm(*command.argv("--in", "-"), stdin=as_lines([*command.rows, line]))
    message = one_error_line(result, command)
    assert result.code == 3 and f"<stdin>:{len(command.rows) + 1}: " in message and words in message


@each(STAGES)
def test_rows_in_are_rows_out_and_drops(srlm: Srlm, command: Command) -> None:
    write_rows(srlm.folder / "in.jsonl", [BROKEN, *command.rows, "[]"])
    srlm(*command.argv("--in", "in.jsonl", "--out", "out.jsonl", "--on-error", "skip"))
    counts = read_json(srlm.folder / "out.jsonl.meta.json")["counts"]
    assert counts["read"] == len(command.rows) and counts["dropped"].pop("bad row") == 2
    assert counts["kept"] == len(read_rows(srlm.folder / "out.jsonl"))
    made = {
        SAMPLE: 4 * counts["read"],
        JUDGE: counts["read"],
        RULES: counts["read"],
        BOTH: counts["read"],
        PAIRWISE: counts["read"],
        GROUP: counts["read"],
        SETTLE: counts["read"],
        CRITERIA: counts["read"],
        META: counts["read"],
        JURY: counts["read"],
        MAKE_PAIRS: counts["counts"].get("prompts"),
        ACCEPT: counts["counts"].get("judgements"),
        HINDSIGHT: counts["counts"].get("targets"),
        OWN: counts["counts"].get("targets"),
    }
    assert counts["kept"] + sum(counts["dropped"].values()) == made[command]


def test_a_number_too_large_for_json_is_a_bad_row(srlm: Srlm) -> None:
    result = srlm(*SAMPLE.argv("--quiet"), stdin='{"prompt": "Why?", "weight": 1e999}\n')
    assert result.code == 3 and "<stdin>:1" in result.err, result.err


def test_json_nested_too_deep_is_a_bad_row(srlm: Srlm) -> None:
    deep = '{"prompt": "Why?", "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
    result = srlm(*SAMPLE.argv("--quiet"), stdin=deep)
    assert result.code == 3 and "<stdin>:1" in result.err, result.err


def test_bytes_that_are_no_utf8_are_named_by_their_line_and_lose_no_row_before(srlm: Srlm) -> None:
    (srlm.folder / "in.jsonl").write_bytes(as_lines(PROMPTS[:2]).encode() + b'{"prompt": "caf\xe9 au lait"}\n')
    result = srlm(*SAMPLE.argv("--in", "in.jsonl", "--out", "out.jsonl", "--quiet"))
    assert result.code == 3 and "in.jsonl:3: not UTF-8" in one_error_line(result, SAMPLE)
    assert len(read_rows(srlm.folder / "out.jsonl.part")) == 8


def test_bytes_that_are_no_utf8_can_be_skipped(srlm: Srlm) -> None:
    data = b'{"prompt": "caf\xe9 au lait"}\n' + as_lines(PROMPTS[:1]).encode()
    result = srlm(*SAMPLE.argv("--on-error", "skip"), stdin=data)
    assert result.code == 0 and len(result.rows) == 4, result.err


def test_a_torn_gzip_is_bad_data_and_loses_no_row_before(srlm: Srlm) -> None:
    whole = gzip.compress(as_lines(PROMPTS[:2]).encode()) + gzip.compress(as_lines(PROMPTS[2:]).encode())
    (srlm.folder / "in.jsonl.gz").write_bytes(whole[:-12])
    result = srlm(*SAMPLE.argv("--in", "in.jsonl.gz", "--out", "out.jsonl", "--quiet"))
    assert result.code == 3 and "in.jsonl.gz" in one_error_line(result, SAMPLE)
    assert len(read_rows(srlm.folder / "out.jsonl.part")) >= 8
    assert not (srlm.folder / "out.jsonl").exists()


def test_a_line_separator_inside_a_text_ends_no_row(srlm: Srlm) -> None:
    odd = "one\u2028two\u0085three\x0bfour"
    result = srlm(*SAMPLE.argv("-n", "1"), stdin=as_lines([{"prompt": odd}]))
    assert [row["prompt"] for row in result.rows] == [odd]


HALF = "a lone surrogate), replaced by U+FFFD"


@each(ROW_COMMANDS)
def test_half_a_character_is_replaced_and_counted(srlm: Srlm, command: Command) -> None:
    """UTF-8 has no bytes for it: one rule for all stages, so that none meets a text that it cannot hand on."""
    rows = [{**row, "note": "half \ud83d of it \ud83d\ude00"} for row in command.rows]
    result = srlm(*command.argv("--quiet"), stdin="".join(json.dumps(row) + "\n" for row in rows))
    assert result.code == 0, result.err
    assert f"srlm {command.name}: warning: {len(rows)} rows with half a character ({HALF}" in result.err
    assert result.rows and "\\ud83d" not in result.out
    assert all(row.get("note", "half \ufffd of it \U0001f600") == "half \ufffd of it \U0001f600" for row in result.rows)


def test_rejects_without_skip_is_refused(srlm: Srlm) -> None:
    result = srlm(*SAMPLE.argv("--rejects", "bad.jsonl"))
    assert result.code == 2 and "--on-error skip" in result.err


# --- rows ------------------------------------------------------------------------------------


@each([SAMPLE, JUDGE, GROUP, META, ACCEPT, GEN_PROMPTS, HEAD_TO_HEAD, PROBE, JUDGES])
def test_the_seed_decides_the_rows(srlm: Srlm, command: Command) -> None:
    text = as_lines(command.rows)
    assert srlm(*command.argv("--seed", "0"), stdin=text).out == whole(srlm, command)
    assert srlm(*command.argv("--seed", "4"), stdin=text).rows != whole_rows(srlm, command)


EXTRA = {"source_url": "https://example.org/ä", "meta": {"tags": ["a", None, 1.5]}, "weight": 0}


@each(STAGES)
def test_unknown_fields_pass_through(srlm: Srlm, command: Command) -> None:
    result = srlm(*command.argv(), stdin=as_lines({**row, **EXTRA} for row in command.rows))
    assert result.rows
    for row in result.rows:
        assert {key: row.get(key) for key in EXTRA} == EXTRA


@each([*STAGES, GEN_PROMPTS])
def test_every_row_has_an_id_of_its_own(srlm: Srlm, command: Command) -> None:
    ids = [row["id"] for row in whole_rows(srlm, command)]
    assert ids and len(set(ids)) == len(ids)


@each(STAGES)
def test_a_second_run_writes_the_same_file_not_a_longer_one(srlm: Srlm, command: Command) -> None:
    write_rows(srlm.folder / "in.jsonl", command.rows)
    for _ in range(2):
        assert srlm(*command.argv("--in", "in.jsonl", "--out", "out.jsonl")).code == 0
    assert (srlm.folder / "out.jsonl").read_text() == whole(srlm, command) != ""
    left = {path.name for path in srlm.folder.iterdir()} - {AGAINST, CORPUS}
    assert left == {"in.jsonl", "out.jsonl", "out.jsonl.meta.json"}


@each(ROW_COMMANDS)
def test_meta_tells_how_a_file_was_made(srlm: Srlm, command: Command) -> None:
    write_rows(srlm.folder / "in.jsonl", command.rows)
    srlm(*command.argv("--in", "in.jsonl", "--out", "deep/er/out.jsonl"))
    meta = read_json(srlm.folder / "deep/er/out.jsonl.meta.json")
    assert meta["command"] == command.name
    assert meta["argv"] == command.argv("--in", "in.jsonl", "--out", "deep/er/out.jsonl")
    assert meta["inputs"] == ["in.jsonl"]
    assert {"srlm", "python"} <= set(meta["versions"])
    assert meta["counts"]["read"] > 0 and meta["counts"]["kept"] > 0


# Options that change how a command works, or how far it goes, but not what it makes of a row.
NOT_IN_A_FINGERPRINT = {
    "in", "out", "config", "quiet", "restart", "on-stale", "on-limit", "on-error", "rejects", "limit", "help",
    "batch-size", "device", "model", "prompt-model", "dtype", "today",  # these count with a real model
    "thinking", "template-kwargs", "think-markers", "extra-body",
    "base-url", "concurrency", "retries", "timeout", "check-sampling", "route", "tokenizer",  # of a server
    "tensor-parallel-size", "data-parallel-size", "max-model-len", "gpu-memory-utilization", "quantization",
    "engine-arg", "revision", "trust-remote-code", "attn-implementation",
    "count", "max-tries", "max-unparsed", "matches", "show", "probed", "judged", "max-probe-wins",
    "implicit", "ref", "beta",  # of a scorer, which has a fingerprint of its own
    "run-code",  # without it no row is made
}  # fmt: skip


# Commands that measure, and the option for the rows from which they do.
ROWS_BESIDE = {HEAD_TO_HEAD: "--matches", PROBE: "--probed", JUDGES: "--judged"}


@each([SAMPLE, JUDGE, JURY, MAKE_PAIRS, ACCEPT, GEN_PROMPTS, HEAD_TO_HEAD, PROBE, JUDGES])
def test_every_option_that_decides_rows_is_in_the_fingerprint(srlm: Srlm, command: Command) -> None:
    out = ROWS_BESIDE.get(command, "--out")
    srlm(*command.argv(out, "out.jsonl"), stdin=as_lines(command.rows))
    known = {key.replace("_", "-") for key in read_json(srlm.folder / "out.jsonl.meta.json")["fingerprint"]}
    offered = {name_of(option) for option in options_of(command.name)} - NOT_IN_A_FINGERPRINT
    assert offered <= known


# --- files, resume ---------------------------------------------------------------------------


def kill_and_resume(srlm: Srlm, command: Command, after: int, out: str, *, torn: bytes = b"") -> Result:
    """Kill a run behind so many completions, check that nothing is called complete, and run it again."""
    source = "in.jsonl"
    write_rows(srlm.folder / source, command.rows)
    flag = ROWS_BESIDE.get(command, "--out")
    argv = command.argv("--in", source, flag, out)
    assert srlm.mortal(after, signal.SIGKILL, *argv).code == -signal.SIGKILL
    part = srlm.folder / f"{out}.part"
    assert part.exists() and not (srlm.folder / out).exists()
    with open(part, "ab") as file:
        file.write(torn)
    return srlm(*argv)


def many(command: Command, count: int = 12) -> Command:
    """Return a command with more rows."""
    rows = [{**row, "prompt": f"{row['prompt']} ({n})"} for n in range(count) for row in command.rows[:2]]
    options = tuple("40" if option == "5" else option for option in command.options)
    return Command(command.name, rows, options, command.field, command.lazy)


MANY = [many(command) for command in (SAMPLE, JUDGE, EVIDENCE, ACCEPT, GEN_PROMPTS, META, PAIRWISE, GROUP)]


@pytest.mark.parametrize("command", MANY, ids=str)
@pytest.mark.parametrize(("after", "torn"), [(1, b""), (11, b'{"id": "torn", "pro'), (20, b""), (23, b'{"a": 1}\n')])
def test_killed_and_resumed_equals_uninterrupted(srlm: Srlm, command: Command, after: int, torn: bytes) -> None:
    resumed = kill_and_resume(srlm, command, after, "out.jsonl", torn=torn)
    assert resumed.code == 0, resumed.err
    if after > 10:
        assert "resuming after" in resumed.err
    assert (srlm.folder / "out.jsonl").read_text() == whole(srlm, command) != ""
    assert not list(srlm.folder.glob("*.part*"))


@pytest.mark.parametrize("command", MANY, ids=str)
def test_killed_and_resumed_gzip_equals_uninterrupted(srlm: Srlm, command: Command) -> None:
    resumed = kill_and_resume(srlm, command, 14, "out.jsonl.gz", torn=b"\x1f\x8b\x08\x00torn")
    assert resumed.code == 0 and "resuming after" in resumed.err
    assert read_rows(srlm.folder / "out.jsonl.gz") == whole_rows(srlm, command)


def test_counts_of_a_resumed_run_are_those_of_the_whole(srlm: Srlm) -> None:
    command = MANY[1]
    kill_and_resume(srlm, command, 11, "out.jsonl")
    counts = read_json(srlm.folder / "out.jsonl.meta.json")["counts"]
    srlm(*command.argv("--in", "in.jsonl", "--out", "whole.jsonl"))
    of_whole = read_json(srlm.folder / "whole.jsonl.meta.json")["counts"]
    assert {**counts, "seconds": 0} == {**of_whole, "seconds": 0}


def test_killed_from_outside_at_any_moment_and_resumed_many_times(srlm: Srlm) -> None:
    command = many(SAMPLE, 200)
    write_rows(srlm.folder / "in.jsonl", command.rows)
    argv = command.argv("--in", "in.jsonl", "--out", "out.jsonl")
    for pause in (0.03, 0.11, 0.07):
        process = srlm.start(*argv, command=[*MORTAL, "0", "0"])
        part = srlm.folder / "out.jsonl.part"
        before = part.stat().st_size if part.exists() else 0
        wait_until(lambda before=before, part=part: part.exists() and part.stat().st_size > before)
        time.sleep(pause)
        process.kill()
        process.communicate()
        assert not (srlm.folder / "out.jsonl").exists()
    assert srlm(*argv).code == 0
    assert (srlm.folder / "out.jsonl").read_text() == whole(srlm, command)


def wait_until(happened, seconds: float = 30.0) -> None:
    """Wait for something, and fail when it never comes."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


@each(list(ROWS_BESIDE))
def test_what_is_measured_is_killed_and_resumed_to_the_same(srlm: Srlm, command: Command) -> None:
    uninterrupted = srlm(*command.argv(ROWS_BESIDE[command], "whole.jsonl"), stdin=as_lines(command.rows))
    for after in (2, 5):
        resumed = kill_and_resume(srlm, command, after, "beside.jsonl")
        assert resumed.code == 0
        assert read_rows(srlm.folder / "beside.jsonl") == read_rows(srlm.folder / "whole.jsonl")
        assert resumed.out == uninterrupted.out
        (srlm.folder / "beside.jsonl").unlink()


def test_a_prompt_whose_last_rows_are_bad_is_not_paired_before_they_are_mended(srlm: Srlm) -> None:
    rows = [{"prompt": text, "response": f"r{k}", "score": k} for text in ("First?", "Second?") for k in (1, 2, 3)]
    write_rows(srlm.folder / "in.jsonl", [*rows[:5], BROKEN])
    argv = ["make-pairs", "--in", "in.jsonl", "--out", "out.jsonl"]
    assert srlm(*argv).code == 3
    write_rows(srlm.folder / "in.jsonl", rows)
    assert srlm(*argv).code == 0
    assert read_rows(srlm.folder / "out.jsonl") == srlm("make-pairs", stdin=as_lines(rows)).rows


def test_a_resumed_make_pairs_still_knows_the_prompts_before(srlm: Srlm) -> None:
    rows = [{"prompt": text, "response": f"r{k}", "score": k} for text in ("First?", "Second?") for k in (1, 2)]
    argv = ["make-pairs", "--in", "in.jsonl", "--out", "out.jsonl"]
    write_rows(srlm.folder / "in.jsonl", [*rows, BROKEN])
    assert srlm(*argv).code == 3
    apart = [{"prompt": "First?", "response": f"r{k}", "score": k} for k in (3, 4)]
    write_rows(srlm.folder / "in.jsonl", [*rows, *apart])
    result = srlm(*argv)
    assert result.code == 3 and "are not grouped" in result.err, read_rows(srlm.folder / "out.jsonl")


@pytest.mark.parametrize("unsorted", [(), ("--unsorted",)], ids=["sorted", "unsorted"])
def test_make_pairs_stopped_by_a_full_disk_goes_on_to_the_same_pairs(srlm: Srlm, unsorted: tuple[str, ...]) -> None:
    prompts = [f"Question number {n}?" for n in range(8)]
    rows = [{"prompt": p, "response": f"r{k}" * 60, "score": k} for k in (1, 2) for p in prompts]
    rows = rows if unsorted else sorted(rows, key=lambda row: row["prompt"])
    write_rows(srlm.folder / "in.jsonl", rows)
    argv = ["make-pairs", "--in", "in.jsonl", "--out", "out.jsonl", *unsorted]
    stopped = srlm(*argv, file_size=(2500, 2500))
    assert stopped.code == 1 and "out.jsonl.part" in stopped.err
    assert 0 < len((srlm.folder / "out.jsonl.part").read_bytes()) <= 2500
    assert srlm(*argv).code == 0
    assert read_rows(srlm.folder / "out.jsonl") == srlm("make-pairs", *unsorted, stdin=as_lines(rows)).rows


def test_a_file_that_cannot_grow_fails_and_loses_no_finished_row(srlm: Srlm) -> None:
    command = MANY[0]
    write_rows(srlm.folder / "in.jsonl", command.rows)
    argv = command.argv("--in", "in.jsonl", "--out", "out.jsonl", "--quiet")
    stopped = srlm(*argv, file_size=(4000, 4000))
    assert stopped.code == 1 and "out.jsonl.part" in one_error_line(stopped, command)
    assert not (srlm.folder / "out.jsonl").exists()
    assert srlm(*argv).code == 0
    assert (srlm.folder / "out.jsonl").read_text() == whole(srlm, command)


@each(ROW_COMMANDS)
def test_a_full_disk_behind_stdout_is_a_failure(srlm: Srlm, command: Command) -> None:
    with open("/dev/full", "wb") as full:
        result = srlm(*command.argv("--quiet"), stdin=as_lines(command.rows), stdout=full)
    assert result.code == 1 and "No space left" in one_error_line(result, command)


def left_by(srlm: Srlm, command: Command) -> list[str]:
    """Leave a FILE.part behind and return the arguments that made it."""
    argv = command.argv("--in", "in.jsonl", "--out", "out.jsonl")
    if command is GEN_PROMPTS:
        write_rows(srlm.folder / "in.jsonl", command.rows)
        assert srlm(*argv, "--max-tries", "3", "--on-limit", "hold").code == 4
    else:
        write_rows(srlm.folder / "in.jsonl", [*command.rows, BROKEN])
        assert srlm(*argv).code == 3
        write_rows(srlm.folder / "in.jsonl", command.rows)
    return argv


@each([command for command in (*STAGES, GEN_PROMPTS) if command is not JURY])  # which has no seed
def test_a_part_of_other_settings_is_refused_and_stays(srlm: Srlm, command: Command) -> None:
    argv = left_by(srlm, command)
    before = (srlm.folder / "out.jsonl.part").read_bytes()
    result = srlm(*argv, "--seed", "7", "--quiet")
    message = one_error_line(result, command)
    assert result.code == 2 and "seed 0 -> 7" in message and "--restart" in message
    assert (srlm.folder / "out.jsonl.part").read_bytes() == before
    assert not (srlm.folder / "out.jsonl").exists()


@pytest.mark.parametrize("way", [("--restart",), ("--on-stale", "restart")], ids=" ".join)
def test_a_part_of_other_settings_can_be_thrown_away(srlm: Srlm, way: tuple[str, ...]) -> None:
    argv = left_by(srlm, SAMPLE)
    assert srlm(*argv, "--seed", "7", *way).code == 0
    assert read_rows(srlm.folder / "out.jsonl") == whole_rows(srlm, SAMPLE, "--seed", "7")


def test_on_stale_restart_goes_on_when_nothing_changed(srlm: Srlm) -> None:
    argv = left_by(srlm, SAMPLE)
    result = srlm(*argv, "--on-stale", "restart")
    assert result.code == 0 and "resuming after 4 completed inputs" in result.err


def test_restart_throws_a_fitting_part_away_too(srlm: Srlm) -> None:
    argv = left_by(srlm, SAMPLE)
    result = srlm(*argv, "--restart")
    assert result.code == 0 and "going on" not in result.err
    assert len(read_rows(srlm.folder / "out.jsonl")) == 16


@pytest.mark.parametrize("way", [(), ("--on-stale", "restart")], ids=["stop", "restart"])
def test_a_changed_input_is_not_gone_on_with(srlm: Srlm, way: tuple[str, ...]) -> None:
    argv = left_by(srlm, SAMPLE)
    changed = [{"prompt": "Another question?"}, *PROMPTS[1:]]
    write_rows(srlm.folder / "in.jsonl", changed)
    result = srlm(*argv, *way)
    if not way:
        assert result.code == 2 and "other input" in result.err
        assert not (srlm.folder / "out.jsonl").exists()
    else:
        assert result.code == 0
        assert read_rows(srlm.folder / "out.jsonl") == srlm(*SAMPLE.argv(), stdin=as_lines(changed)).rows


def test_an_input_grown_shorter_is_not_gone_on_with(srlm: Srlm) -> None:
    argv = left_by(srlm, SAMPLE)
    write_rows(srlm.folder / "in.jsonl", PROMPTS[:2])
    result = srlm(*argv)
    assert result.code == 2 and "other input" in result.err


@each([SAMPLE, JUDGE, GEN_PROMPTS])
def test_ctrl_c_keeps_the_rows_and_the_run_goes_on(srlm: Srlm, command: Command) -> None:
    command = many(command)
    write_rows(srlm.folder / "in.jsonl", command.rows)
    argv = command.argv("--in", "in.jsonl", "--out", "out.jsonl", "--quiet")
    stopped = srlm.mortal(13, signal.SIGINT, *argv)
    assert stopped.code == 130
    message = one_error_line(stopped, command)
    assert "interrupted" in message and "out.jsonl.part" in message
    kept = read_rows(srlm.folder / "out.jsonl.part")
    assert kept and not (srlm.folder / "out.jsonl").exists()
    assert srlm(*argv).code == 0
    assert (srlm.folder / "out.jsonl").read_text() == whole(srlm, command)


def feed(process: subprocess.Popen, rows: list[Record]) -> None:
    """Write rows to a process's stdin, which stays open."""
    data = memoryview(as_lines(rows).encode())
    while data:
        data = data[process.stdin.write(data) :]


@each([JURY, MAKE_PAIRS, REWARD])
def test_ctrl_c_while_waiting_for_input(srlm: Srlm, command: Command) -> None:
    process = srlm.start(*command.argv("--out", "out.jsonl"))
    long = {**command.rows[-1], "response": "x" * 300_000}  # more than a pipe holds: written when it is being read
    feed(process, [*command.rows[:-1], long])
    if command is MAKE_PAIRS:
        part = srlm.folder / "out.jsonl.part"
        wait_until(lambda: part.exists() and part.read_bytes().count(b"\n") == 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == b"" and b"Traceback" not in err
    assert len(err.splitlines()) == 1 and b": error: interrupted" in err and b"run the same command again" in err
    assert not (srlm.folder / "out.jsonl").exists()


def test_ctrl_c_in_index_leaves_no_index(srlm: Srlm) -> None:
    process = srlm.start("index", "--out", "out.db")
    feed(process, [{"text": "x " * 150_000}])
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    said = b"srlm index: error: interrupted before its output was written (run the same command again)\n"
    assert process.returncode == 130 and err == said
    assert not list(srlm.folder.glob("out.db*"))


# --- pipes -----------------------------------------------------------------------------------


@each(ROW_COMMANDS)
def test_a_reader_that_has_gone_ends_it_in_silence(srlm: Srlm, command: Command) -> None:
    reader, gone = os.pipe()
    os.close(reader)
    quiet = ["--quiet"] if command in ROWS_BESIDE else []  # its summary stands before its metrics
    result = srlm(*command.argv(*quiet), stdin=as_lines(command.rows), stdout=gone)
    os.close(gone)
    assert (result.code, result.err) == (141, "")


@pytest.mark.parametrize("args", [["doctor"], ["settings"], ["--help"], ["judge", "--help"], ["--version"]], ids=str)
def test_words_into_a_closed_pipe_end_in_silence(srlm: Srlm, args: list[str]) -> None:
    reader, gone = os.pipe()
    os.close(reader)
    result = srlm(*args, stdout=gone)
    os.close(gone)
    assert (result.code, result.err) == (141, "")


@each([SAMPLE, JUDGE, JURY, MAKE_PAIRS])
def test_a_row_comes_out_before_the_input_ends(srlm: Srlm, command: Command) -> None:
    process = srlm.start(*command.argv("--quiet"))
    process.stdin.write(as_lines(command.rows[:3]).encode())
    process.stdin.flush()
    first = process.stdout.readline()  # would wait for ever if the rows were held back
    assert json.loads(first)
    process.stdin.write(as_lines(command.rows[3:]).encode())
    rest, err = process.communicate(timeout=30)
    assert process.returncode == 0 and err == b""
    assert (first + rest).decode() == whole(srlm, command)


def test_the_loop_in_one_shell_pipe(srlm: Srlm) -> None:
    write_rows(srlm.folder / "seeds.jsonl", PROMPTS)
    srlm_ = " ".join(PROGRAM)
    line = (
        f"set -o pipefail; {srlm_} gen-prompts --in seeds.jsonl --engine echo --count 6"
        f" | {srlm_} sample --engine echo | {srlm_} judge --engine echo | {srlm_} make-pairs --out pairs.jsonl"
    )
    done = srlm.run(["bash", "-c", line])
    assert done.code == 0 and done.out == "" and done.err.count("srlm ") == 4
    pairs = read_rows(srlm.folder / "pairs.jsonl")
    assert 3 <= len(pairs) <= 6
    assert all(row["score_chosen"] > row["score_rejected"] for row in pairs)


# --- options and settings --------------------------------------------------------------------


@each(COMMANDS)
def test_an_unknown_flag_is_a_usage_error(srlm: Srlm, command: Command) -> None:
    result = srlm(*command.argv("--no-such-thing", "1"))
    assert result.code == 2 and result.out == ""
    assert "--no-such-thing" in one_error_line(result, command)


def test_an_unknown_command_is_a_usage_error(srlm: Srlm) -> None:
    result = srlm("smaple")
    assert (result.code, result.out) == (2, "") and "smaple" in result.err


@pytest.mark.parametrize(
    "args",
    [("-n", "0"), ("-n", "four"), ("--temperature", "-1"), ("--top-p", "1.5"), ("--engine", "gpt"), ("--limit", "-1")],
    ids=" ".join,
)
def test_a_value_out_of_range_is_a_usage_error(srlm: Srlm, args: tuple[str, ...]) -> None:
    result = srlm("sample", *args)
    assert result.code == 2 and args[0] in one_error_line(result, SAMPLE)


@each(COMMANDS)
def test_an_unknown_setting_is_refused_with_a_suggestion(srlm: Srlm, command: Command) -> None:
    (srlm.folder / "srlm.toml").write_text(f'["{command.name}"]\nquit = true\n')
    result = srlm(*command.argv())
    message = one_error_line(result, command)
    assert result.code == 2 and "srlm.toml" in message and "did you mean `quiet`" in message


@pytest.mark.parametrize(
    ("text", "meant"), [("[defaults]\nlimt = 1\n", "`limit`"), ("[make-pear]\nseed = 1\n", "`make-pairs`")]
)
def test_unknown_defaults_and_sections_are_refused_with_a_suggestion(srlm: Srlm, text: str, meant: str) -> None:
    (srlm.folder / "srlm.toml").write_text(text)
    result = srlm(*SAMPLE.argv())
    assert result.code == 2 and f"did you mean {meant}" in one_error_line(result, SAMPLE)


@pytest.mark.parametrize(
    "text",
    ['["eval rewards"]\nseed = 1\n', '["sample twice"]\nn = 1\n', "[eval]\nsed = 1\n", "seed = 1\n", "[sample\n"],
)
def test_settings_that_no_command_would_read_are_refused(srlm: Srlm, text: str) -> None:
    (srlm.folder / "srlm.toml").write_text(text)
    result = srlm(*REWARD.argv())
    assert result.code == 2 and "srlm.toml" in result.err


def test_a_setting_of_the_wrong_kind_is_refused(srlm: Srlm) -> None:
    (srlm.folder / "srlm.toml").write_text('[sample]\nnum-responses = "four"\n')
    result = srlm(*SAMPLE.argv())
    assert result.code == 2 and "srlm.toml: `num-responses` in [sample]" in one_error_line(result, SAMPLE)


def test_a_settings_file_that_is_not_there_is_refused(srlm: Srlm) -> None:
    result = srlm(*SAMPLE.argv("--config", "nowhere.toml"))
    assert result.code == 2 and "nowhere.toml" in result.err


def per_prompt(result: Result) -> int:
    """Return how many responses a prompt has."""
    assert result.code == 0, result.err
    return len(result.rows) // len({row["prompt_id"] for row in result.rows})


def test_precedence_is_flag_then_environment_then_section_then_defaults(srlm: Srlm) -> None:
    def seed_of(*args: str, **env: str) -> int:
        srlm(*SAMPLE.argv("--out", "out.jsonl", "--restart", *args), stdin=as_lines(PROMPTS), env=env)
        return read_json(srlm.folder / "out.jsonl.meta.json")["fingerprint"]["seed"]

    assert seed_of() == 0
    settings = srlm.folder / "srlm.toml"
    settings.write_text("[defaults]\nseed = 1\n[judge]\nseed = 9\n")
    assert seed_of() == 1
    settings.write_text("[defaults]\nseed = 1\n[sample]\nseed = 2\n")
    assert seed_of() == 2
    assert seed_of(SRLM_SEED="3") == 3
    assert seed_of(SRLM_SEED="3", SRLM_SAMPLE_SEED="5", SRLM_JUDGE_SEED="6") == 5
    assert seed_of("--seed", "4", SRLM_SEED="3", SRLM_SAMPLE_SEED="5") == 4


@pytest.mark.parametrize("name", ["SRLM_SAMPLE_NUM_RESPONSES", "SRLM_CONFIG"])
def test_the_environment_sets_options(srlm: Srlm, name: str) -> None:
    (srlm.folder / "own.toml").write_text("[sample]\nnum-responses = 3\n")
    value = {"SRLM_SAMPLE_NUM_RESPONSES": "3", "SRLM_CONFIG": "own.toml"}[name]
    assert per_prompt(srlm(*SAMPLE.argv(), stdin=as_lines(PROMPTS), env={name: value})) == 3


def test_the_engine_and_quiet_can_come_from_the_environment(srlm: Srlm) -> None:
    result = srlm("sample", stdin=as_lines(PROMPTS), env={"SRLM_ENGINE": "echo", "SRLM_QUIET": "1"})
    assert (result.code, result.err) == (0, "") and len(result.rows) == 16


@pytest.mark.parametrize("key", ["max-new-tokens", "max_new_tokens"])
def test_settings_take_both_spellings(srlm: Srlm, key: str) -> None:
    (srlm.folder / "my.toml").write_text(f"[sample]\n{key} = 2\n")
    result = srlm(*SAMPLE.argv("--config", "my.toml"), stdin=as_lines(PROMPTS))
    assert {len(row["response"].split()) for row in result.rows} == {2}


def test_settings_of_a_command_of_a_group(srlm: Srlm) -> None:
    (srlm.folder / "srlm.toml").write_text('["eval reward"]\nout = "metrics.jsonl"\n')
    result = srlm(*REWARD.argv())
    assert (result.code, result.out) == (0, "") and read_rows(srlm.folder / "metrics.jsonl")


def test_a_setting_of_other_commands_in_defaults_does_no_harm(srlm: Srlm) -> None:
    (srlm.folder / "srlm.toml").write_text("[defaults]\ntemperature = 0.5\nlimit = 2\n")
    result = srlm(*MAKE_PAIRS.argv(), stdin=as_lines(MAKE_PAIRS.rows))
    assert result.code == 0 and "2 read" in result.err


def test_quiet_says_nothing_and_loud_says_the_counts(srlm: Srlm) -> None:
    loud = srlm(*SAMPLE.argv(), stdin=as_lines(PROMPTS))
    quiet = srlm(*SAMPLE.argv("--quiet"), stdin=as_lines(PROMPTS))
    assert quiet.err == "" and quiet.out == loud.out
    assert loud.err.startswith("srlm sample: 4 read, 16 written")


@pytest.mark.parametrize("no_color", [True, False], ids=["NO_COLOR", "colour"])
def test_no_color_is_honoured_on_a_terminal(srlm: Srlm, no_color: bool) -> None:
    screen, terminal = pty.openpty()
    env = {"TERM": "xterm-256color", **({"NO_COLOR": "1"} if no_color else {})}
    result = srlm(*SAMPLE.argv(), stdin=as_lines(PROMPTS), env=env, stderr=terminal)
    os.close(terminal)
    shown = os.read(screen, 65536).decode()
    os.close(screen)
    assert result.code == 0 and len(result.rows) == 16 and "srlm sample" in shown
    assert bool(re.search(r"\x1b\[(?:\d+;)*[34]\d[;m]", shown)) is not no_color


def test_stdin_on_a_terminal_is_not_waited_for(srlm: Srlm) -> None:
    screen, terminal = pty.openpty()
    result = srlm("make-pairs", stdin=terminal)
    os.close(terminal)
    os.close(screen)
    assert result.code == 2 and "stdin is a terminal" in one_error_line(result, MAKE_PAIRS)


# --- help ------------------------------------------------------------------------------------


def options_of(name: str) -> list:
    """Return the options of a command as typer has them."""
    first, *rest = name.split()
    made = build_command(first)
    return [p for p in (made.commands[rest[0]] if rest else made).params if p.param_type_name == "option"]


def name_of(option) -> str:
    """Return an option's name as srlm.toml spells it."""
    return option.name.strip("_").replace("_", "-")


@pytest.mark.parametrize("name", PAGES)
def test_help_opens_with_a_line_and_examples_and_each_option_has_both_spellings(srlm: Srlm, name: str) -> None:
    result = srlm(*name.split(), "--help")
    assert (result.code, result.err) == (0, "")
    page = re.match(
        rf"Usage: srlm {name} [^\n]*\n\n  ([A-Z][^\n]*)\n(?:  [^\n]+\n)?\n  Examples:\n((?:    .*\n)+)", result.out
    )
    assert page, result.out[:400]
    assert f"srlm {name}" in page[2]
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", result.out.split("Input and output:")[-1]))
    takes_value = {opt: not option.is_flag for option in options_of(name) for opt in option.opts}
    (srlm.folder / "1").write_text("")  # for --config
    for between in "-_":
        spelled = []
        for option in sorted(shown & (takes_value.keys() | secondary(name)) - {"--help"}):
            spelling = "--" + option[2:].replace("-", between)
            spelled += [spelling, "1"] if takes_value.get(option) else [spelling]
        with_all = srlm(*name.split(), *spelled, "--help")
        assert (with_all.code, with_all.out) == (0, result.out), with_all.err
    assert {"--" + name_of(option) for option in options_of(name)} - {"--help"} <= shown | {"--checkpointing"}


def secondary(name: str) -> set[str]:
    """Return the `--no-...` names of a command's flags."""
    return {opt for option in options_of(name) for opt in option.secondary_opts}


def test_the_command_itself_has_both_spellings(srlm: Srlm) -> None:
    text = as_lines(MAKE_PAIRS.rows)
    assert srlm("make_pairs", stdin=text).out == srlm("make-pairs", stdin=text).out != ""
    other = srlm("eval", "head_to_head", *ECHO, "--against", AGAINST, stdin=as_lines(RESPONSES))
    assert other.code == 0 and other.rows


def test_without_arguments_the_help_is_the_answer(srlm: Srlm) -> None:
    result = srlm()
    assert result.code == 2 and result.out == "" and "Commands:" in result.err


def test_version(srlm: Srlm) -> None:
    from srlm_cli import __version__

    assert srlm("--version").out == f"srlm {__version__}\n"


def test_a_stray_version_variable_does_not_stop_the_program(srlm: Srlm) -> None:
    result = srlm(*SAMPLE.argv(), stdin=as_lines(PROMPTS), env={"SRLM_VERSION": "1"})
    assert result.code == 0 and len(result.rows) == 16


def test_every_command_of_the_group_is_in_its_help(srlm: Srlm) -> None:
    page = srlm("--help").out
    assert all(re.search(rf"^  {name.split()[0]} ", page, re.MULTILINE) for name in PAGES)


def test_a_model_that_cannot_be_found_is_a_failure_not_a_success(srlm: Srlm) -> None:
    result = srlm("sample", "--model", "./nowhere", "--quiet", stdin=as_lines(PROMPTS))
    assert result.code in (1, 2) and "./nowhere" in one_error_line(result, SAMPLE)


@pytest.mark.parametrize("name", ["sample", "make-eft", "gen-prompts"])
def test_no_model_is_a_usage_error(srlm: Srlm, name: str) -> None:
    result = srlm(name, stdin=as_lines(HINDSIGHT.rows))
    assert result.code == 2 and "--model" in result.err


def test_a_judge_of_the_echo_engine_is_not_looked_for_as_a_model(srlm: Srlm) -> None:
    done = srlm("judge", "--model", "rules", stdin=as_lines([{"prompt": "p", "response": "r"}]))
    assert done.code == 2 and "there is no folder rules (--engine echo has the judge `rules`)" in done.err, done
