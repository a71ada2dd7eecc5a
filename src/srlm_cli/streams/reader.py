"""Read JSONL from a path or stdin, plain or gzip; a bad row is named by file:line."""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from bisect import bisect_left
from codecs import BOM_UTF8
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b, file_digest
from io import BytesIO
from itertools import islice, takewhile
from math import isfinite
from pathlib import Path
from typing import IO, Any

import msgspec

from srlm_cli.dataset_formats import unused_columns
from srlm_cli.errors import BadRow, DataError, OptionError
from srlm_cli.records import Record, encodable_value
from srlm_cli.streams.writer import Rejects

FIX = "fix the row, or use --on-error skip to continue without it"
Origin = tuple[tuple[str, int], bytes]  # path and line number of a row, and its text


@dataclass(frozen=True)
class Shard:
    """Part `number` of `of` parts of an input, from 1; they are contiguous and differ by one line at most."""

    number: int
    of: int

    def span(self, lines: int) -> tuple[int, int]:
        """Return the number of lines before this part, and up to its end, of a file with `lines` lines."""
        return (self.number - 1) * lines // self.of, self.number * lines // self.of

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


class Reader:
    """Iterate over the checked rows of one or more JSONL inputs.

    `check` returns a record or a list of records for a raw row, or raises `BadRow`. With `on_error="stop"` the first
    bad row ends the iteration and is stored in `error`, so that earlier rows can still be finished; with `"skip"` it
    goes to `rejects` and is counted in `skipped`. `expands` is True if a row became several records. `unfinished`
    counts the records that were returned and not yet reported with `finish`.

    Unless `traced` is False, `digest` is a running hash up to the last finished record, by which a resumed run detects
    changed input. A returned record can still be refused as bad (`refuse`); `refused` has the reasons by record number,
    for a resumed run.

    With a `shard` only its lines of one file are read, of those with the first `limit` rows. With `group_of`, the key
    of a record, the ends of a shard are moved to where the next group of consecutive records with one key begins.
    `source` is the path that is being read. `noted` counts rows that were changed or read in part, by the kind of
    change.
    """

    def __init__(
        self,
        paths: list[str],
        check: Callable[[Record], Record | list[Record]],
        *,
        on_error: str = "stop",
        limit: int | None = None,
        rejects: Rejects | None = None,
        traced: bool = True,
        shard: Shard | None = None,
        group_of: Callable[[Record], Hashable] | None = None,
    ) -> None:
        self.paths = paths
        self.check = check
        self.on_error = on_error
        self.limit = limit
        self.rejects = rejects
        self.traced = traced
        self.shard = shard
        self.span = self._span(shard, group_of) if shard else (0, None)
        self.rewind()

    def rewind(self) -> None:
        """Begin again with the first row; stdin cannot."""
        self.skipped = 0
        self.noted: Counter[str] = Counter()
        self.expands = False
        self.error: DataError | None = None
        self.source = ""
        self._place, self._line = ("", 0), b""
        self.unfinished = 0
        self._passed = (0, 0)
        self.digest = b""
        self.refused: dict[str, str] = {}
        self._finished = 0
        self._given: deque[tuple[bytes, tuple[str, int], bytes]] = deque()  # digest, place and line of a record
        if self.rejects:
            self.rejects.clear()
        self._records = self._read()
        self._first: list[Record] = []

    @property
    def part(self) -> str | None:
        """The lines of the shard, as text; None without a shard."""
        if not self.shard:
            return None
        before, end = self.span
        return f"{self.shard}, lines {before + 1} to {end}" if before < end else f"{self.shard}, no lines"

    @property
    def at(self) -> str:
        """Where the last row was read: file:line."""
        return named(self._place)

    def __iter__(self) -> Iterator[Record]:
        while (row := self.take()) is not None:
            yield row

    def take(self) -> Record | None:
        """Return the next record, or None at the end."""
        return self._first.pop() if self._first else next(self._records, None)

    def peek(self) -> Record | None:
        """Return the next record and leave it to be read."""
        if not self._first and (row := next(self._records, None)) is not None:
            self._first.append(row)
        return self._first[0] if self._first else None

    def finish(self, count: int) -> None:
        """Mark the next `count` records as finished by the stage."""
        self.unfinished -= count
        self._finished += count
        for _ in range(count if self.traced else 0):
            self.digest, *_ = self._given.popleft()

    def refuse(self, reason: str) -> None:
        """Take the next record to be finished as a bad row, which the stage has found it to be."""
        _, place, line = self._given[0]
        self._refuse(place, line, reason)
        self.refused[str(self._finished)] = reason

    @property
    def origin(self) -> Origin:
        """Where the last row was read, and its text where rejects are kept."""
        return self._place, self._line if self.rejects else b""

    def refuse_row(self, origin: Origin, reason: str) -> None:
        """Take a row that was read and finished as a bad row; raise the error that it is without `--on-error skip`."""
        self._refuse(*origin, reason)
        if self.error:
            raise self.error

    def skip(self, count: int, refused: Mapping[str, str] | None = None) -> str:
        """Skip `count` records that an earlier run has finished; return the digest of the skipped input.

        `refused` has the reasons of those that were refused, by record number as a string.
        """
        for place in map(str, range(count)):
            if self.take() is None:
                return ""
            if refused and place in refused:
                self.refuse(refused[place])
            self.finish(1)
        return self.digest.hex()

    def pass_over(self, size: int, lines: int, records: int) -> None:
        """Skip bytes of a plain file, with their lines and records, which another process has read.

        Must be called before anything is read. The stage still has to `finish` the records.
        """
        self._passed = self._passed[0] + size, self._passed[1] + lines
        self.unfinished += records

    def _read(self) -> Iterator[Record]:
        running = blake2b(digest_size=16)
        lines_left = None if self.shard else self.limit
        for path in self.paths:
            self.source = path
            with open_lines(path) as lines:
                for number, line, raw in self._rows(path, lines):
                    if lines_left == 0:
                        return
                    self._place, self._line = (path, number), line
                    try:
                        checked = checked_record(raw, self.check)
                    except BadRow as reason:
                        self._refuse(self._place, line, str(reason))
                        if self.error:
                            return
                        continue
                    lines_left = lines_left if lines_left is None else lines_left - 1
                    self.expands = isinstance(checked, list)
                    for name in unused_columns(checked[0] if self.expands and checked else checked):
                        self.noted[f"rows with an unused `{name}` column"] += 1
                    for record in checked if self.expands else (checked,):
                        self.unfinished += 1
                        if self.traced:
                            running.update(line)
                            self._given.append((running.digest(), self._place, line))
                        yield record

    def _rows(self, path: str, lines: IO[bytes]) -> Iterator[tuple[int, bytes, Any]]:
        """Yield (line number, text, row or the JSONLinesError) for each line that is not blank."""
        before, end = self.span
        offset, passed = self._passed
        if offset:
            lines.seek(offset)
        for number, line in numbered(path, islice(lines, before, end), before + passed + 1):
            row = parsed_row(line, self.noted)
            if row is not BLANK:
                yield number, line, row

    def _span(self, shard: Shard, group_of: Callable[[Record], Hashable] | None) -> tuple[int, int]:
        """Return the number of lines before a shard, and up to its end; with `group_of` no group is cut."""
        lines = self._lines()
        span = shard.span(lines)
        if group_of is None:
            return span
        begins = [0, *takewhile(lines.__gt__, self._begins(group_of)), lines]
        before, end = (begins[bisect_left(begins, end)] for end in span)
        return before, end

    def _begins(self, group_of: Callable[[Record], Hashable]) -> Iterator[int]:
        """Yield the number of lines before each group of a file; bad rows and blank lines are of no group."""
        [path] = self.paths
        before = None
        with open_lines(path) as lines:
            for number, line in numbered(path, lines):
                try:
                    checked = [] if (row := parsed_row(line)) is BLANK else checked_record(row, self.check)
                except BadRow:
                    continue
                for record in checked if isinstance(checked, list) else [checked]:
                    if (group := group_of(record)) != before:
                        yield number - 1
                    before = group

    def _lines(self) -> int:
        """Return the number of lines of a file, or of its first `limit` rows; stdin can be read only once."""
        [path] = self.paths
        if path == "-" or (Path(path).exists() and not Path(path).is_file()):
            raise OptionError(
                f"--shard cannot divide {shown(path)}: the number of its rows is not known",
                "write them to a file, and give it as --in FILE",
            )
        if self.limit is None:
            with open_lines(path) as lines:
                return sum(1 for _ in numbered(path, lines))
        wanted = Reader(self.paths, self.check, on_error=self.on_error, limit=self.limit, traced=False)
        for _ in wanted:
            pass
        return wanted._place[1]

    def _refuse(self, place: tuple[str, int], line: bytes, reason: str) -> None:
        at = named(place)
        if self.on_error == "skip":
            self.skipped += 1
            if self.rejects:
                self.rejects.add({"at": at, "reason": reason, "line": line.decode(errors="replace").rstrip("\n")})
        else:
            self.error = DataError(f"{at}: {reason}", FIX)


def checked_record(row: Any, check: Callable[[Record], Record | list[Record]]) -> Record | list[Record]:
    """Return the result of `check` for a parsed line; raise BadRow if it is not a valid row."""
    if type(row) is dict:
        return check(row)
    if isinstance(row, ValueError):
        cause = row.__cause__ or row
        raise BadRow(f"not UTF-8 text: {cause}" if isinstance(cause, UnicodeError) else f"not JSON: {cause}")
    raise BadRow(f"expected a JSON object, got {type(row).__name__}")


@contextmanager
def open_lines(path: str) -> Iterator[IO[bytes]]:
    """Open a path, `-` for stdin, or a `.gz` file as lines of bytes, which end at `\\n` only.

    A file that is one JSON array has one line for each element, at the line number where it begins.
    """
    if path == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise OptionError("no input: stdin is a terminal", "give --in FILE, or pipe rows in")
        yield lines_of(path, sys.stdin.buffer)
        return
    try:
        opened = gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb", buffering=1 << 20)
    except OSError as error:
        raise OptionError(f"cannot open {path}: {error.strerror or error}", _unfinished(path)) from None
    with opened:
        yield lines_of(path, opened)


def begins_array(head: bytes) -> bool:
    """Return whether a file begins as a JSON array does, which no row does."""
    return head.removeprefix(BOM_UTF8).lstrip().startswith(b"[")


def lines_of(path: str, opened: Any) -> IO[bytes]:
    """Return an open file as lines, those of a JSON array taken apart; raise DataError for a broken array.

    Each element is one line, at the line number where it begins. The whole file is in memory.
    """
    try:
        if not begins_array(opened.peek(1)):
            return opened
        data = opened.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{shown(path)}:1: cannot be read further: {error}") from None
    try:
        lines, end = elements(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also for invalid UTF-8
        if isinstance(parsed(data.partition(b"\n")[0]), list):  # a row that is none, with others after it
            return BytesIO(data)
        where = getattr(error, "lineno", 1)
        raise DataError(f"{shown(path)}:{where}: not a JSON array: {error}", "one row per line, or one array") from None
    return BytesIO("".join(lines).encode()) if end else BytesIO(data)


def elements(text: str) -> tuple[list[str], bool]:
    """Return the elements of a JSON array, each a line of its own, and whether nothing comes after the array.

    Empty lines keep each element on the line where it begins. Raises ValueError if the text is not an array.
    """
    decoder, lines, counted, written = json.JSONDecoder(), [], 0, 0
    skip = re.compile(r"[ \t\r\n]*").match
    at = skip(text, skip(text).end() + 1).end()
    number = 0
    while text[at : at + 1] != "]":
        _, end = decoder.raw_decode(text, at)
        number, counted = number + text.count("\n", counted, at), at
        lines += ["\n"] * (number - written) + [text[at:end].replace("\n", " "), "\n"]
        written = max(written, number) + 1
        at = skip(text, end).end()
        if text[at : at + 1] == ",":
            at = skip(text, at + 1).end()
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    return lines, skip(text, at + 1).end() == len(text)


def numbered(path: str, lines: Iterable[bytes], first: int = 1) -> Iterator[tuple[int, bytes]]:
    """Yield lines with their numbers; raise DataError where a file, a `.gz` above all, cannot be read on."""
    number = first - 1
    try:
        for number, line in enumerate(lines, first):
            yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{shown(path)}:{number + 1}: cannot be read further: {error}") from None


def count_lines(paths: list[str]) -> int | None:
    """Return how many lines plain files hold, for a progress bar; None where that is not known cheaply."""
    total = 0
    for path in paths:
        if path == "-" or path.endswith(".gz") or not Path(path).is_file():
            return None
        with open(path, "rb") as file:
            if begins_array(file.peek(1)):
                return None
            total += sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    return total


def read_all(path: str, check: Callable[[Record], Record]) -> list[Record]:
    """Return all rows of one input; the first bad row raises `DataError`."""
    reader = Reader([path], check)
    rows = list(reader)
    if reader.error:
        raise reader.error
    return rows


def file_hash(path: str) -> str:
    """Return the first 16 hex digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()[:16]


BLANK = object()
fast_loads = msgspec.json.Decoder().decode


def parsed(line: bytes) -> Any:
    """Return the JSON value of a line, `BLANK` for an empty line, or the error of jsonlines."""
    value = fast_parsed(line)
    return strictly_parsed(line) if value is None else value


def fast_parsed(line: bytes) -> Any:
    """Return the value that msgspec reads; None for `null` and for lines that it refuses.

    It refuses lone surrogates and byte order marks. Lines that both parsers accept have the same value
    (`tests/streams/test_parsing.py`).
    """
    try:
        return fast_loads(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def strictly_parsed(line: bytes) -> Any:
    """Return the value that jsonlines reads, `BLANK` for an empty line, or the error."""
    import jsonlines  # late: it takes 9 ms, and few files have such a line

    try:
        return jsonlines.Reader([line], loads=strict_loads).read(skip_empty=True)
    except EOFError:
        return BLANK
    except jsonlines.InvalidLineError as error:
        return error


ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parsed_row(line: bytes, noted: Counter[str] | None = None) -> Any:
    """Return the value of `parsed` with all texts `encodable`; a row that this changes is noted."""
    if (row := fast_parsed(line)) is not None:  # msgspec refuses lone surrogates
        return row
    row = strictly_parsed(line)
    return encodable_value(row, noted) if type(row) is dict and ESCAPED_SURROGATE.search(line) else row


def strict_loads(text: str) -> Any:
    """Parse JSON as the standard has it: no NaN, no Infinity, nothing that Python cannot write again."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    def finite(digits: str) -> float:
        number = float(digits)
        return number if isfinite(number) else refuse(digits)

    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deep") from None


def named(place: tuple[str, int]) -> str:
    """Return a path and a line number as file:line, an empty string before the first line."""
    path, number = place
    return f"{shown(path)}:{number}" if number else ""


def shown(path: str) -> str:
    """Return the name of an input as messages give it."""
    return "<stdin>" if path == "-" else path


def _unfinished(path: str) -> str:
    part = Path(path + ".part")
    return f"{part} exists: the command that writes it has not finished, run it again" if part.exists() else ""
