"""Where `--out` may write: links are followed, devices are not replaced, inputs and foreign folders are spared."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from commands_table import ECHO, PROMPTS
from helpers import Srlm, read_rows, write_rows

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
    assert result.code == 2 and "no model that srlm made" in result.err
    assert (srlm.folder / "folder" / "important.txt").exists() and (srlm.folder / "file").is_file()


def test_settings_of_a_wrong_kind_are_found_before_any_work(srlm: Srlm) -> None:
    (srlm.folder / "bad.toml").write_text('[gen-prompts]\ncount = "x"\n')
    result = srlm("settings", "--config", "bad.toml")
    assert result.code == 2 and "--count" in result.err


def test_stamps_are_kept_and_a_dry_run_writes_nothing(srlm: Srlm) -> None:
    assert srlm("settings", "--stamps", "st", "--also", "M0=a").code == 0
    before = {file: file.stat().st_mtime_ns for file in (srlm.folder / "st").iterdir()}
    result = srlm("settings", "--stamps", "st", "--also", "M0=b", "--dry-run")
    assert result.out == "st/M0.json\n"
    assert srlm("settings", "--stamps", "st", "--also", "M0=a").out == ""
    assert {file: file.stat().st_mtime_ns for file in (srlm.folder / "st").iterdir()} == before
