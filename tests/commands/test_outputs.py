"""Where `--out` may write: links are followed, devices are not replaced, inputs and foreign folders are spared."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import threading
from pathlib import Path

import pytest

from commands_table import ECHO, PROMPTS
from helpers import PROGRAM, Srlm, as_lines, read_rows, write_rows

SAMPLE = ("sample", *ECHO, "--in", "in.jsonl")


@pytest.fixture(autouse=True)
def prompts(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", PROMPTS)


def test_a_link_is_followed(srlm: Srlm) -> None:
    (srlm.folder / "far").mkdir()
    (srlm.folder / "link.jsonl").symlink_to("far/real.jsonl")
    assert srlm(*SAMPLE, "--out", "link.jsonl").code == 0
    assert (srlm.folder / "link.jsonl").is_symlink()
    assert len(read_rows(srlm.folder / "far" / "real.jsonl")) == 4 * len(PROMPTS)


def test_a_named_pipe_is_written_and_stays_one(srlm: Srlm) -> None:
    pipe = srlm.folder / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.extend(pipe.read_text().splitlines()))
    reader.start()
    assert srlm(*SAMPLE, "--out", "pipe").code == 0
    reader.join(10)
    assert pipe.is_fifo() and len(got) == 4 * len(PROMPTS)


def test_a_device_is_written_and_stays_one(srlm: Srlm) -> None:
    assert srlm(*SAMPLE, "--out", "/dev/stderr", "--quiet").code == 0
    assert not Path("/dev/stderr").is_file() or Path("/dev/stderr").is_symlink()


def test_a_full_device_is_named(srlm: Srlm) -> None:
    result = srlm(*SAMPLE, "--out", "/dev/full", "--quiet")
    assert result.code == 1 and "error: /dev/full: No space left" in result.err and "stdout" not in result.err
    assert "a run whose --out is a regular file can be resumed" in result.err


def test_the_input_is_not_written_over(srlm: Srlm) -> None:
    before = (srlm.folder / "in.jsonl").read_bytes()
    result = srlm(*SAMPLE, "--out", "./in.jsonl")
    assert result.code == 2 and "is the input" in result.err
    assert (srlm.folder / "in.jsonl").read_bytes() == before


def test_a_folder_is_no_file(srlm: Srlm) -> None:
    (srlm.folder / "folder").mkdir()
    result = srlm(*SAMPLE, "--out", "folder")
    assert result.code == 2 and "is a folder" in result.err and not list(srlm.folder.glob("folder.*"))


@pytest.mark.parametrize("name", ["folder", "file"])
def test_training_spares_what_it_did_not_make(srlm: Srlm, name: str) -> None:
    (srlm.folder / "folder").mkdir()
    (srlm.folder / "folder" / "important.txt").write_text("x")
    (srlm.folder / "file").write_text("x")
    row = json.dumps({"prompt": "a", "completion": "b"})
    result = srlm("sft", "--model", "./nowhere", "--out", name, stdin=row)
    assert result.code == 2 and "not a model made by srlm" in result.err
    assert (srlm.folder / "folder" / "important.txt").exists() and (srlm.folder / "file").is_file()


def test_settings_of_a_wrong_kind_are_found_before_any_work(srlm: Srlm) -> None:
    (srlm.folder / "bad.toml").write_text('[gen-prompts]\ncount = "x"\n')
    result = srlm("settings", "--config", "bad.toml")
    assert result.code == 2 and "bad.toml: `count` in [gen-prompts]" in result.err


def test_stamps_are_kept_and_a_dry_run_writes_nothing(srlm: Srlm) -> None:
    assert srlm("settings", "--stamps", "st", "--also", "M0=a").code == 0
    before = {file: file.stat().st_mtime_ns for file in (srlm.folder / "st").iterdir()}
    result = srlm("settings", "--stamps", "st", "--also", "M0=b", "--dry-run")
    assert result.out == "st/M0.json\n"
    assert srlm("settings", "--stamps", "st", "--also", "M0=a").out == ""
    assert {file: file.stat().st_mtime_ns for file in (srlm.folder / "st").iterdir()} == before


BAD = '{"no": "prompt"}'
SKIP = ("sample", *ECHO, "-n", "1", "--on-error", "skip")


@pytest.mark.parametrize("rejects", ["in.jsonl", "./in.jsonl", "out.jsonl"])
def test_rejects_are_no_file_of_the_command(srlm: Srlm, rejects: str) -> None:
    before = (srlm.folder / "in.jsonl").read_text()
    result = srlm(*SKIP, "--in", "in.jsonl", "--out", "out.jsonl", "--rejects", rejects)
    assert result.code == 2 and "is a file of this command already" in result.err
    assert (srlm.folder / "in.jsonl").read_text() == before and not (srlm.folder / "out.jsonl").exists()


def test_rejects_are_not_the_held_out_file(srlm: Srlm) -> None:
    write_rows(srlm.folder / "held.jsonl", PROMPTS)
    argv = ["make-eft", "--thin", "--held-out", "held.jsonl", "--on-error", "skip", "--rejects", "held.jsonl"]
    assert srlm(*argv, stdin="").code == 2
    assert len(read_rows(srlm.folder / "held.jsonl")) == len(PROMPTS)


def test_a_refused_command_leaves_an_older_file_of_rejects(srlm: Srlm) -> None:
    (srlm.folder / "bad.jsonl").write_text("older\n")
    (srlm.folder / "folder").mkdir()
    assert srlm(*SKIP, "--in", "in.jsonl", "--out", "folder", "--rejects", "bad.jsonl").code == 2
    assert (srlm.folder / "bad.jsonl").read_text() == "older\n"
    assert srlm(*SKIP, "--in", "in.jsonl", "--rejects", "bad.jsonl").code == 0
    assert (srlm.folder / "bad.jsonl").read_text() == ""


@pytest.mark.parametrize("rejects", ["/dev/null", "/dev/stderr", "bad.jsonl.gz"])
def test_rejects_go_to_devices_and_compressed(srlm: Srlm, rejects: str) -> None:
    result = srlm(*SKIP, "--rejects", rejects, "--quiet", stdin=as_lines([BAD, *PROMPTS, BAD]))
    assert result.code == 0 and len(result.rows) == len(PROMPTS)
    if rejects.endswith(".gz"):
        kept = [json.loads(line) for line in gzip.open(srlm.folder / rejects, "rt")]
        assert [row["at"] for row in kept] == ["<stdin>:1", f"<stdin>:{len(PROMPTS) + 2}"]
    elif rejects == "/dev/stderr":
        assert result.err.count("expected `prompt`") == 2


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1"])
def test_the_device_of_stdout_is_stdout(srlm: Srlm, name: str) -> None:
    result = srlm(*SAMPLE, "--out", name)
    assert result.code == 0 and len(result.rows) == 4 * len(PROMPTS)


def test_a_part_that_lost_its_end_begins_anew(srlm: Srlm) -> None:
    """After a power cut the disk may have the checkpoint and not the rows."""
    whole = srlm(*SAMPLE, "--out", "whole.jsonl")
    assert whole.code == 0
    (srlm.folder / "bad.jsonl").write_text((srlm.folder / "in.jsonl").read_text() + BAD + "\n")
    argv = ("sample", *ECHO, "--in", "bad.jsonl", "--out", "out.jsonl")
    assert srlm(*argv).code == 3
    part = srlm.folder / "out.jsonl.part"
    os.truncate(part, part.stat().st_size // 2)
    assert srlm(*argv).code == 3
    assert part.read_bytes() == (srlm.folder / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_closed_stream_is_nowhere(srlm: Srlm, closed: str) -> None:
    words = shlex.join([*PROGRAM, *SAMPLE, "--out", "out.jsonl"])
    assert srlm.run(["sh", "-c", f"exec {words} {closed}>&-"]).code == 0
    assert len(read_rows(srlm.folder / "out.jsonl")) == 4 * len(PROMPTS)


def test_a_name_that_is_not_utf_8(srlm: Srlm) -> None:
    odd = os.fsencode(srlm.folder) + b"/caf\xe9.jsonl"
    os.rename(srlm.folder / "in.jsonl", odd)
    assert srlm.run([*PROGRAM, "sample", *ECHO, "--in", odd, "--out", "out.jsonl"]).code == 0
    assert json.loads((srlm.folder / "out.jsonl.meta.json").read_text())["inputs"]


NO_INPUT = (
    ("make-eft", "--method", "hindsight", "--reason", "none"), ("judge", "--rescore", *ECHO), ("make-pairs",),
    ("make-pairs", "--unsorted"), ("jury",),
)  # fmt: skip


@pytest.mark.parametrize("command", NO_INPUT, ids=" ".join)
def test_an_input_that_is_not_there_leaves_no_part(srlm: Srlm, command: tuple[str, ...]) -> None:
    result = srlm(*command, "--in", "not-here.jsonl", "--out", "out.jsonl")
    assert result.code == 2 and "cannot open not-here.jsonl" in result.err
    assert {path.name for path in srlm.folder.iterdir()} == {"in.jsonl"}
