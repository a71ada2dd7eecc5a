"""Write rows so that FILE exists if and only if it is complete, and a killed run can be resumed.

Rows go to FILE.part; FILE.part.meta.json has the last checkpoint, up to which they are complete. On success FILE.part
is synced and renamed, and FILE.meta.json says how FILE was made. One process at a time has FILE.part.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from threading import Event, Lock, Thread
from typing import IO, Any

import msgspec

from srlm_cli.errors import ClosedPipe, OptionError
from srlm_cli.records import Record
from srlm_cli.streams.locked import open_locked

SECONDS_BETWEEN_CHECKPOINTS = 0.5


def dumps(row: Any) -> str:
    """Return a row as one line of strict JSON, text kept as it is; NaN raises ValueError."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


class StreamWriter:
    """Write rows to a pipe or a device and flush each line; it cannot be resumed. `name` is for messages."""

    def __init__(self, fd: int, name: str = "stdout") -> None:
        self.file, self.name = os.fdopen(fd, "wb"), name

    def write(self, rows: list[Record]) -> None:
        """Write and flush; raise ClosedPipe when the other end has gone."""
        try:
            self.file.write(encode(rows))
            self.file.flush()
        except BrokenPipeError:
            raise ClosedPipe from None

    def mark(self, state: dict[str, Any]) -> None:
        """Do nothing: a pipe keeps no state."""

    def close(self) -> None:
        """Close the stream."""
        try:
            self.file.close()
        except BrokenPipeError:
            raise ClosedPipe from None

    def commit(self, meta: dict[str, Any], state: dict[str, Any]) -> None:
        """Close the stream, so that a late write error is seen."""
        self.close()


class FileWriter:
    """Write rows to FILE.part, and rename it to FILE when all rows are written; FILE can end in `.gz`.

    `mark` says that the rows so far belong to finished work. A thread saves the last mark within half a second,
    because the next rows can take minutes to generate.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any]) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.part_meta = path.with_name(self.part.name + ".meta.json")
        self.meta = path.with_name(path.name + ".meta.json")
        self.fingerprint = fingerprint
        self.zipped = path.name.endswith(".gz")
        self.lock = Lock()
        self.closed = Event()

    def begun_with(self) -> dict[str, Any]:
        """Return the fingerprint of an unfinished run with any settings, {} if there is none."""
        try:
            return json.loads(self.part_meta.read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError):
            return {}

    def left_over(self) -> dict[str, Any] | None:
        """Return the last checkpoint of an unfinished run, or None; raise OptionError if it was another run's."""
        if not self.part.exists():
            return None
        try:
            saved = json.loads(self.part_meta.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        refuse_other(self.part, saved["fingerprint"], json.loads(json.dumps(self.fingerprint)))
        if self.part.stat().st_size < saved["checkpoint"]["bytes"]:  # a power cut: the disk does not have the rows
            return None
        return saved["checkpoint"]

    def start(self, resume: dict[str, Any] | None) -> None:
        """Open FILE.part, cut back to a checkpoint (a torn last line goes), or empty without one.

        Raises OptionError if another process writes it, or has completed it since the checkpoint was read.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open_locked(self.part)
        self.bytes = resume["bytes"] if resume else 0
        if os.fstat(self.file.fileno()).st_size < self.bytes:
            self.part.unlink()
            raise OptionError(f"another process has written {self.path}", "run the same command again to replace it")
        self.file.truncate(self.bytes)
        self.file.seek(self.bytes)
        self.member: gzip.GzipFile | None = None
        self.unmarked = b""
        self.state = {key: value for key, value in (resume or {}).items() if key != "bytes"}
        self.unsaved = True
        self._save()
        Thread(target=self._save_now_and_then, daemon=True).start()

    def previous(self) -> Iterator[Record]:
        """Iterate over the rows that FILE.part held when it was opened."""
        left = self.bytes
        with open(self.part, "rb") as file:
            lines = gzip.GzipFile(fileobj=BytesIO(file.read(left))) if self.zipped and left else file
            for line in lines:
                left -= len(line)
                if left < 0 and not self.zipped:  # written since
                    return
                yield json.loads(line)

    def write(self, rows: list[Record]) -> None:
        """Append rows; a plain file is flushed at the next mark or save, a `.gz` when its mark is saved."""
        data = encode(rows)
        with self.lock:
            if self.zipped:  # a save closes the open member, which must hold marked rows only
                self.unmarked += data
            else:
                self.file.write(data)

    def mark(self, state: dict[str, Any]) -> None:
        """Note that all rows written so far are those of `state`."""
        with self.lock:
            if not self.zipped:
                self.file.flush()  # first: rows that the disk does not accept are not part of the state
                self.bytes = self.file.tell()
            self.state, self.unsaved = state, True
            if self.unmarked:
                self.member = self.member or gzip.GzipFile(fileobj=self.file, mode="ab", filename="", mtime=0)
                self.member.write(self.unmarked)
                self.unmarked = b""

    def close(self) -> None:
        """Save the last mark and leave FILE.part to a later run."""
        self.closed.set()
        with self.lock:
            self._save()
            self.file.close()

    def commit(self, meta: dict[str, Any], state: dict[str, Any]) -> None:
        """Sync the rows, write FILE.meta.json, and only then let FILE appear under its name."""
        self.mark(state)
        self.closed.set()
        with self.lock:
            self._end_member()
            self.file.flush()
            os.fsync(self.file.fileno())
            self.bytes = self.file.tell()
            replace_text(self.meta, json.dumps({**meta, **self._checkpoint()}, indent=1) + "\n")
            os.replace(self.part, self.path)
            self.part_meta.unlink(missing_ok=True)
            self.file.close()  # last: until then no other process has FILE.part

    def _save_now_and_then(self) -> None:
        while not self.closed.wait(SECONDS_BETWEEN_CHECKPOINTS):
            with self.lock:
                if not self.closed.is_set():
                    try:
                        self.file.flush()
                        self._save()
                    except OSError:  # a full disk: the main thread meets it too, and says so
                        return

    def _save(self) -> None:
        if self.unsaved:
            if self.zipped:
                self._end_member()
                self.file.flush()
                self.bytes = self.file.tell()
            replace_text(self.part_meta, json.dumps(self._checkpoint(), indent=1))
            self.unsaved = False

    def _checkpoint(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "checkpoint": {"bytes": self.bytes, **self.state}}

    def _end_member(self) -> None:
        if self.member:
            self.member.close()
            self.member = None


class Rejects:
    """A file of the rows that were skipped: file and line, the reason, and the text."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file: IO[bytes] | None = None

    def add(self, row: Record) -> None:
        """Keep one row."""
        self.open()
        line = encode([row])
        self.file.write(gzip.compress(line, mtime=0) if self.path.endswith(".gz") else line)

    def open(self) -> None:
        """Begin the file, if that has not been done: a command that is refused leaves an older one as it is."""
        try:
            self.file = self.file or open(self.path, "wb", buffering=0)
        except OSError as error:
            raise OptionError(f"cannot write {self.path}: {error.strerror}") from None

    def clear(self) -> None:
        """Empty the file, because the input is read again."""
        if self.file:
            self.file.close()
            self.file = None
            self.open()


def refuse_other(part: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise OptionError unless a part was left by a run of the same fingerprint."""
    if differing := sorted(key for key in {*old, *new} if old.get(key) != new.get(key)):
        changes = ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in differing)
        raise OptionError(f"{part} is from a run with other settings: {changes}", "--restart deletes it")


def encode(rows: Iterable[Record | bytes]) -> bytes:
    """Return rows as UTF-8 lines; a lone surrogate, which UTF-8 cannot encode, is escaped."""
    return b"".join(map(encode_row, rows))


def encode_row(row: Record | bytes) -> bytes:
    """Return one row as the line that `dumps` writes; by msgspec if both write the same.

    A row that is a line already (bytes, from another process) is unchanged.
    """
    if type(row) is bytes:
        return row
    if is_plain(row):
        try:
            return msgspec.json.format(fast_dumps(row), indent=0) + b"\n"
        except (UnicodeEncodeError, OverflowError, TypeError):  # a lone surrogate, an int over 64 bits, an odd key
            pass
    try:
        return (dumps(row) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row, allow_nan=False) + "\n").encode()


fast_dumps = msgspec.json.Encoder().encode
PLAIN = {str, int, bool, type(None)}


def is_plain(value: Any) -> bool:
    """Return whether msgspec and json write a value alike.

    They differ in floats that json writes with an exponent, and in NaN and Infinity, which msgspec writes as null.
    """
    kind = type(value)
    if kind is dict:
        for key, inner in value.items():  # for, not all(): most of a row is texts, and a call takes longer than they do
            if type(key) is not str or not (type(inner) in PLAIN or is_plain(inner)):
                return False
        return True
    if kind is list:
        return PLAIN.issuperset(map(type, value)) or all(map(is_plain, value))
    if kind is float:
        return value == 0 or 1e-3 <= value < 1e15 or -1e15 < value <= -1e-3
    return kind in PLAIN


def replace_text(path: Path, text: str) -> None:
    """Write a small file in one step: a reader sees the old text or the new, never half."""
    draft = path.with_name(path.name + ".new")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
