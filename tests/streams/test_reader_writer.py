"""Reading rows and writing files that are there if and only if they are complete."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from threading import Timer

import pytest

from helpers import read_json, read_rows, write_rows
from srlm_cli.errors import BadRow, ClosedPipe, DataError, OptionError, SrlmError
from srlm_cli.runner.inputs import check_whole
from srlm_cli.streams import reader as reading
from srlm_cli.streams.lookup import Lookup
from srlm_cli.streams.reader import Reader, Shard
from srlm_cli.streams.writer import FileWriter, Rejects, StreamWriter, encode


def known(row: dict) -> dict:
    """Accept rows that have an `n`."""
    if "n" not in row:
        raise BadRow("expected `n`")
    return row


def reader(path: Path, **options) -> Reader:
    return Reader([str(path)], known, **options)


ROWS = [{"n": n} for n in range(5)]


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_rows_come_in_order_with_their_place(tmp_path: Path, name: str) -> None:
    rows = reader(write_rows(tmp_path / name, ROWS))
    assert [(row, rows.at) for row in rows] == [(row, f"{tmp_path / name}:{at}") for at, row in enumerate(ROWS, 1)]


def test_several_inputs_are_one(tmp_path: Path) -> None:
    paths = [str(write_rows(tmp_path / name, rows)) for name, rows in (("a", ROWS[:2]), ("b", []), ("c", ROWS[2:]))]
    assert list(Reader(paths, known)) == ROWS
    assert list(Reader(paths, known, limit=3)) == ROWS[:3]


def test_the_last_line_may_end_without_a_newline(tmp_path: Path) -> None:
    (tmp_path / "in").write_text('{"n": 1}\n{"n": 2}')
    assert len(list(reader(tmp_path / "in"))) == 2


def test_a_bad_row_waits_behind_the_rows_before_it(tmp_path: Path) -> None:
    rows = reader(write_rows(tmp_path / "in", [*ROWS[:2], "{", *ROWS[2:]]))
    assert list(rows) == ROWS[:2]
    assert isinstance(rows.error, DataError) and str(rows.error).startswith(f"{tmp_path / 'in'}:3: not JSON")


@pytest.mark.parametrize(
    "line", ["{", "[1]", "1", "null", '{"n": NaN}', '{"n": -Infinity}', '{"m": 1}', "{'n': 1}", '{"n": 1}}']
)
def test_bad_rows_are_skipped_with_their_text(tmp_path: Path, line: str) -> None:
    rejects = Rejects(str(tmp_path / "bad"))
    rows = reader(write_rows(tmp_path / "in", [ROWS[0], line, ROWS[1]]), on_error="skip", rejects=rejects)
    assert list(rows) == ROWS[:2] and rows.skipped == 1 and rows.error is None
    [kept] = read_rows(tmp_path / "bad")
    assert (kept["at"], kept["line"]) == (f"{tmp_path / 'in'}:2", line) and kept["reason"]


def test_an_input_read_again_rejects_its_rows_once(tmp_path: Path) -> None:
    rows = reader(
        write_rows(tmp_path / "in", ["{", *ROWS]), on_error="skip", rejects=Rejects(str(tmp_path / "bad"))
    )  # fmt: skip
    rows.skip(2)
    rows.rewind()
    assert list(rows) == ROWS and rows.skipped == 1 and rows.unfinished == len(ROWS)
    assert len(read_rows(tmp_path / "bad")) == 1


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbf" + b'{"n": 1}\n{"n": 2}\n')
    assert list(reader(tmp_path / "in")) == [{"n": 1}, {"n": 2}]


def test_skipped_rows_do_not_count_against_the_limit(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in", ["{", *ROWS])
    assert list(reader(path, on_error="skip", limit=2)) == ROWS[:2]


def test_the_limit_reads_not_one_line_more(tmp_path: Path) -> None:
    rows = reader(write_rows(tmp_path / "in", [*ROWS[:2], "{"]), limit=2)
    assert list(rows) == ROWS[:2] and rows.error is None


def test_a_look_ahead_leaves_the_row(tmp_path: Path) -> None:
    rows = reader(write_rows(tmp_path / "in", ROWS))
    assert rows.peek() == rows.peek() == ROWS[0]
    assert list(rows) == ROWS
    assert rows.peek() is None


def test_a_row_can_become_several(tmp_path: Path) -> None:
    rows = Reader([str(write_rows(tmp_path / "in", ROWS[:2]))], lambda row: [row, row], limit=1)
    assert list(rows) == [ROWS[0]] * 2 and rows.unfinished == 2


def digest_of(path: Path, count: int) -> str:
    return reader(path).skip(count)


def test_the_digest_is_of_what_was_skipped(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in", ROWS)
    longer = write_rows(tmp_path / "longer", [*ROWS, {"n": 9}])
    other = write_rows(tmp_path / "other", [{"n": 9}, *ROWS[1:]])
    swapped = write_rows(tmp_path / "swapped", [ROWS[1], ROWS[0], *ROWS[2:]])
    assert digest_of(path, 3) == digest_of(longer, 3) != ""
    assert len({digest_of(p, 3) for p in (path, other, swapped)}) == 3
    assert digest_of(path, 2) != digest_of(path, 3)
    assert digest_of(path, 6) == ""


def test_reading_goes_on_behind_what_was_skipped(tmp_path: Path) -> None:
    rows = reader(write_rows(tmp_path / "in", ROWS))
    rows.skip(2)
    assert list(rows) == ROWS[2:]


def test_no_such_file_and_a_folder_are_usage_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(OptionError, match=str(path)):
            list(reader(path))


def test_what_is_no_gzip_is_bad_data(tmp_path: Path) -> None:
    (tmp_path / "in.gz").write_text('{"n": 1}\n')
    with pytest.raises(DataError, match="in.gz:1"):
        list(reader(tmp_path / "in.gz"))


def test_lines_are_counted_where_that_is_cheap(tmp_path: Path) -> None:
    plain, zipped = write_rows(tmp_path / "a", ROWS), write_rows(tmp_path / "a.gz", ROWS)
    assert reading.count_lines([str(plain), str(plain)]) == 10
    assert reading.count_lines([str(zipped)]) is reading.count_lines(["-"]) is None


def test_read_all_raises_at_the_first_bad_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=":2: "):
        reading.read_all(str(write_rows(tmp_path / "in", [ROWS[0], "{"])), known)


def test_an_input_that_a_stage_leaves_unread_is_a_fault_of_the_program(tmp_path: Path) -> None:
    rows = reader(write_rows(tmp_path / "in", ROWS))
    rows.take()
    rows.finish(1)
    with pytest.raises(SrlmError, match="not all rows were read"):
        check_whole(rows)


# --- writing ---------------------------------------------------------------------------------

PRINT = {"command": "test", "seed": 0}
BOTH = pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])


def begun(path: Path, count: int) -> FileWriter:
    """Return a writer that has written and marked so many rows."""
    writer = FileWriter(path, PRINT)
    writer.start(None)
    for n in range(count):
        writer.write([{"n": n}])
        writer.mark({"read": n + 1})
    return writer


@BOTH
def test_the_file_appears_when_it_is_complete(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    writer = begun(path, 3)
    assert not path.exists() and writer.part.exists()
    writer.commit({"command": "test"}, {"read": 3})
    assert read_rows(path) == [{"n": 0}, {"n": 1}, {"n": 2}]
    meta = read_json(tmp_path / f"{name}.meta.json")
    assert meta["fingerprint"] == PRINT and meta["checkpoint"]["read"] == 3
    assert meta["checkpoint"]["bytes"] == path.stat().st_size
    assert {p.name for p in tmp_path.iterdir()} == {name, f"{name}.meta.json"}


@BOTH
def test_an_older_file_stays_until_the_new_one_is_complete(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, [{"old": True}])
    writer = begun(path, 1)
    assert read_rows(path) == [{"old": True}]
    writer.commit({}, {"read": 1})
    assert read_rows(path) == [{"n": 0}]


@BOTH
@pytest.mark.parametrize("torn", [b"", b'{"n": 3', b'{"n": 7}\n' * 9, b"\x1f\x8b\x08" * 99], ids=len)
def test_an_unfinished_file_goes_on_behind_its_last_mark(tmp_path: Path, name: str, torn: bytes) -> None:
    path = tmp_path / name
    writer = begun(path, 3)
    writer.close()
    with open(writer.part, "ab") as file:
        file.write(torn)
    again = FileWriter(path, PRINT)
    saved = again.left_over()
    assert saved["read"] == 3
    again.start(saved)
    assert list(again.previous()) == [{"n": 0}, {"n": 1}, {"n": 2}]
    again.write([{"n": 3}])
    again.commit({}, {"read": 4})
    assert read_rows(path) == [{"n": n} for n in range(4)]


@BOTH
def test_rows_behind_the_last_mark_are_dropped(tmp_path: Path, name: str) -> None:
    writer = begun(tmp_path / name, 2)
    if not writer.zipped:
        writer.write([{"half": "an outcome"}])
    writer.close()
    again = FileWriter(tmp_path / name, PRINT)
    again.start(again.left_over())
    assert list(again.previous()) == [{"n": 0}, {"n": 1}]
    again.close()


def test_a_gzip_checkpoint_never_covers_rows_behind_the_mark(tmp_path: Path) -> None:
    """A checkpoint may be saved between `write` and `mark`; the rows in between would be made twice."""
    writer = begun(tmp_path / "out.jsonl.gz", 2)
    writer.write([{"n": 2}])
    with writer.lock:
        writer.unsaved = True
        writer._save()
    saved = FileWriter(tmp_path / "out.jsonl.gz", PRINT).left_over()
    held = gzip.decompress((tmp_path / "out.jsonl.gz.part").read_bytes()[: saved["bytes"]])
    writer.close()
    assert held.count(b"\n") == saved["read"] == 2


def test_a_file_of_other_settings_says_what_differs(tmp_path: Path) -> None:
    begun(tmp_path / "out", 1).close()
    with pytest.raises(OptionError) as caught:
        FileWriter(tmp_path / "out", {**PRINT, "seed": 3, "n": 4}).left_over()
    assert (
        "seed 0 -> 3" in str(caught.value) and "n None -> 4" in str(caught.value) and "command" not in str(caught.value)
    )


def test_nothing_left_over(tmp_path: Path) -> None:
    assert FileWriter(tmp_path / "out", PRINT).left_over() is None


def test_a_file_is_written_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srlm_cli.streams.locked.WAIT", 0.0)
    first, second = begun(tmp_path / "out", 3), FileWriter(tmp_path / "out", PRINT)
    for checkpoint in (None, {"bytes": 9, "read": 1}):
        with pytest.raises(OptionError, match="another process is writing .*out.part"):
            second.start(checkpoint)
    first.commit({}, {"read": 3})
    assert read_rows(tmp_path / "out") == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_a_checkpoint_of_a_file_that_another_process_completed_is_refused(tmp_path: Path) -> None:
    first = begun(tmp_path / "out", 3)
    first.close()
    saved = FileWriter(tmp_path / "out", PRINT).left_over()
    first.start(saved)
    first.commit({}, {"read": 3})
    with pytest.raises(OptionError, match="another process has written .*out"):
        FileWriter(tmp_path / "out", PRINT).start(saved)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.meta.json"}


def test_a_file_that_was_completed_while_a_process_waited_is_not_written(tmp_path: Path) -> None:
    first = begun(tmp_path / "out", 2)
    Timer(0.2, first.commit, ({}, {"read": 2})).start()
    second = begun(tmp_path / "out", 1)  # waits, then has a FILE.part of its own
    assert read_rows(tmp_path / "out") == [{"n": 0}, {"n": 1}]
    second.commit({}, {"read": 1})
    assert read_rows(tmp_path / "out") == [{"n": 0}]


def test_folders_are_made(tmp_path: Path) -> None:
    writer = begun(tmp_path / "a" / "b" / "out", 1)
    writer.commit({}, {"read": 1})
    assert read_rows(tmp_path / "a" / "b" / "out") == [{"n": 0}]


def test_the_mark_is_saved_while_the_next_row_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr("srlm_cli.streams.writer.SECONDS_BETWEEN_CHECKPOINTS", 0.01)
    writer = begun(tmp_path / "out", 2)
    end = time.monotonic() + 20
    while read_json(writer.part_meta)["checkpoint"].get("read") != 2:
        assert time.monotonic() < end, "the checkpoint was never saved"
        time.sleep(0.01)
    writer.close()


def test_the_same_rows_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.gz", "b.gz"):
        begun(tmp_path / name, 3).commit({}, {"read": 3})
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def test_rows_are_strict_json_with_their_text_as_it_is() -> None:
    assert encode([{"t": "ä\u2028🙂\n"}]) == '{"t": "ä\u2028🙂\\n"}\n'.encode()
    assert json.loads(encode([{"t": "\ud83d"}])) == {"t": "\ud83d"}
    with pytest.raises(ValueError):
        encode([{"n": float("nan")}])


def test_a_stream_flushes_each_row_and_knows_a_closed_pipe() -> None:
    reader, fd = os.pipe()
    writer = StreamWriter(fd)
    writer.write([{"n": 1}])
    assert os.read(reader, 100) == b'{"n": 1}\n'
    os.close(reader)
    with pytest.raises(ClosedPipe):
        writer.write([{"n": 2}])
    try:
        writer.close()
    except (ClosedPipe, OSError):
        pass


@pytest.mark.parametrize("harm", ["cut", "corrupt"])
@pytest.mark.parametrize("way", ["read", "shard", "lookup"])
def test_a_damaged_gz_is_named(tmp_path: Path, harm: str, way: str) -> None:
    path = tmp_path / "in.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"".join(b'{"n": %d, "x": "%s"}\n' % (n, os.urandom(40).hex().encode()) for n in range(900)))
    data = bytearray(path.read_bytes())
    if harm == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2 : len(data) // 2 + 60] = b"\xff" * 60
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"in.jsonl.gz:\d+: (cannot be read further|not)"):
        if way == "lookup":
            Lookup(str(path), lambda row: row, lambda row: row["n"])
        else:
            rows = reader(path, shard=Shard(1, 2) if way == "shard" else None)
            list(rows)
            raise rows.error


def test_a_lookup_takes_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbf" + b'{"n": 1}\n')
    assert Lookup(str(tmp_path / "in"), lambda row: row, lambda row: row["n"])(1) == [{"n": 1}]
