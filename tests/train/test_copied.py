"""`dpo --on-empty copy`: a training without pairs writes the model as it is, as a model of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import Srlm, read_json, write_rows
from srlm_cli.models.fingerprint import fingerprint
from srlm_cli.train import reference
from tiny import pairs, tiny_adapter, tiny_model

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "m")


def test_no_pairs_stop_the_training_unless_the_model_is_copied(srlm: Srlm, base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "none.jsonl", [])
    command = ["dpo", "--in", "none.jsonl", "--model", str(base), "--out", "next"]
    assert srlm(*command).code == 3 and not (tmp_path / "next").exists()
    assert srlm(*command, "--on-empty", "copy", "--dry-run").code == 3
    done = srlm(*command, "--on-empty", "copy")
    assert done.code == 0 and f"no pairs to train on: next is a copy of {base}" in done.err
    assert done.rows[0]["steps"] == 0 and done.rows[0]["data"]["rows"] == 0
    made, about = tmp_path / "next", read_json(tmp_path / "next" / "provenance.json")
    for file in base.iterdir():
        assert (made / file.name).read_bytes() == file.read_bytes(), file.name
    assert about["command"] == "dpo" and about["from"] == {"model": str(base), "fingerprint": fingerprint(str(base))}
    assert about["steps"] == 0 and (made / "metrics.jsonl").read_text() == ""
    assert reference.parent(str(made)) == str(base) and not made.with_name("next.part").exists()


def test_pairs_that_all_were_dropped_are_named(srlm: Srlm, base: Path, tmp_path: Path) -> None:
    same = [{**row, "rejected": row["chosen"]} for row in pairs(2)]
    write_rows(tmp_path / "same.jsonl", same)
    done = srlm("dpo", "--in", "same.jsonl", "--model", str(base), "--out", "next", "--on-empty", "copy")
    assert done.code == 0 and "2 dropped: chosen and rejected are the same tokens" in done.err


def test_a_training_with_pairs_is_not_a_copy(srlm: Srlm, base: Path, tmp_path: Path) -> None:
    """It takes the place of a copy that was made before; with no pairs again, the copy takes its place."""
    write_rows(tmp_path / "none.jsonl", [])
    write_rows(tmp_path / "some.jsonl", pairs(2))
    command = ["dpo", "--model", str(base), "--out", "next", "--on-empty", "copy", "--learning-rate", "0.01"]
    assert srlm(*command, "--in", "none.jsonl").code == 0
    copy = fingerprint(str(tmp_path / "next"))
    assert srlm(*command, "--in", "some.jsonl").code == 0
    assert read_json(tmp_path / "next" / "provenance.json")["steps"] == 1
    assert srlm(*command, "--in", "none.jsonl").code == 0
    assert fingerprint(str(tmp_path / "next")) == copy


def test_a_copied_adapter_keeps_what_it_was_trained_on(srlm: Srlm, base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "none.jsonl", [])
    write_rows(tmp_path / "some.jsonl", pairs(2))
    start = tiny_adapter(tmp_path / "a", base)
    assert srlm("dpo", "--in", "some.jsonl", "--model", str(start), "--out", "b").code == 0
    assert srlm("dpo", "--in", "none.jsonl", "--model", "b", "--out", "c", "--on-empty", "copy").code == 0
    about = [read_json(tmp_path / name / "provenance.json") for name in ("b", "c")]
    assert about[0]["base"] == about[1]["base"] and about[1]["from"]["model"] == "b"
