"""Read JSONL from a path or stdin, plain or gzip; a bad row is named by file:line."""

from __future__ import annotations

import gzip
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b, file_digest
from math import isfinite
from pathlib import Path
from typing import IO, Any

import jsonlines

from srlm_cli.errors import BadRow, DataError, OptionError
from srlm_cli.records import Row
from srlm_cli.streams.writer import Rejects


class Reader:
    """Iterate over the checked rows of one or more JSONL inputs.

    `check` turns a raw row into a record, or into a list of them, or raises `BadRow`. With
    `on_error="stop"` the first bad row ends the iteration and waits in `error`, so that what was read
    before it can still be finished; with `"skip"` it goes to `rejects` and is counted in `skipped`.
    `expands` says that a row became several records. `digests` has a running hash for each record,
    from which a resumed run sees a changed input. `source` is the path that is being read.
    """

    def __init__(
        self,
        paths: list[str],
        check: Callable[[Row], Row | list[Row]],
        *,
        on_error: str = "stop",
        limit: int | None = None,
        rejects: Rejects | None = None,
    ) -> None:
        self.paths = paths
        self.check = check
        self.on_error = on_error
        self.limit = limit
        self.rejects = rejects
        self.rewind()

    def rewind(self) -> None:
        """Begin again with the first row; stdin cannot."""
        self.skipped = 0
        self.expands = False
        self.error: DataError | None = None
        self.at = self.source = ""
        self.digests: deque[bytes] = deque()
        if self.rejects:
            self.rejects.clear()
        self._records = self._read()
        self._first: list[Row] = []

    def __iter__(self) -> Iterator[Row]:
        while (row := self.take()) is not None:
            yield row

    def take(self) -> Row | None:
        """Return the next record, or None at the end."""
        return self._first.pop() if self._first else next(self._records, None)

    def peek(self) -> Row | None:
        """Return the next record and leave it to be read."""
        if not self._first and (row := next(self._records, None)) is not None:
            self._first.append(row)
        return self._first[0] if self._first else None

    def skip(self, count: int) -> str:
        """Read past `count` records, those that are done already; return the digest of what was read."""
        digest = b""
        for _ in range(count):
            if self.take() is None:
                return ""
            digest = self.digests.popleft()
        return digest.hex()

    def _read(self) -> Iterator[Row]:
        running = blake2b(digest_size=16)
        lines_left = self.limit
        for path in self.paths:
            self.source = path
            with open_lines(path) as lines:
                for number, line, raw in self._rows(path, lines):
                    if lines_left == 0:
                        return
                    self.at = f"{shown(path)}:{number}"
                    try:
                        checked = self._record(raw)
                    except BadRow as reason:
                        self._refuse(line, str(reason))
                        if self.error:
                            return
                        continue
                    lines_left = lines_left if lines_left is None else lines_left - 1
                    self.expands = isinstance(checked, list)
                    for record in checked if isinstance(checked, list) else [checked]:
                        running.update(line)
                        self.digests.append(running.digest())
                        yield record

    def _rows(self, path: str, lines: IO[bytes]) -> Iterator[tuple[int, bytes, Any]]:
        """Yield (line number, text, row or the JSONLinesError) for each line that is not blank."""
        here = {"number": 0, "line": b""}

        def counted() -> Iterator[bytes]:
            try:
                for here["number"], here["line"] in enumerate(lines, 1):  # noqa: B020 - kept for the caller to see
                    yield here["line"]
            except (OSError, EOFError) as error:
                raise DataError(f"{shown(path)}:{here['number'] + 1}: cannot be read on: {error}") from None

        with jsonlines.Reader(counted(), loads=strict_loads) as reader:
            while True:
                try:
                    row = reader.read(skip_empty=True)
                except EOFError:
                    return
                except jsonlines.InvalidLineError as error:
                    row = error
                yield here["number"], here["line"], row

    def _record(self, row: Any) -> Row | list[Row]:
        if isinstance(row, jsonlines.InvalidLineError):
            cause = row.__cause__ or row
            raise BadRow(f"not UTF-8 text: {cause}" if isinstance(cause, UnicodeError) else f"not JSON: {cause}")
        if not isinstance(row, dict):
            raise BadRow(f"expected a JSON object, got {type(row).__name__}")
        return self.check(row)

    def _refuse(self, line: bytes, reason: str) -> None:
        if self.on_error == "skip":
            self.skipped += 1
            if self.rejects:
                self.rejects.add({"at": self.at, "reason": reason, "line": line.decode(errors="replace").rstrip("\n")})
        else:
            self.error = DataError(f"{self.at}: {reason}", "mend the row, or --on-error skip goes on without it")


@contextmanager
def open_lines(path: str) -> Iterator[IO[bytes]]:
    """Open a path, `-` for stdin, or a `.gz` file as lines of bytes, which end at `\\n` only."""
    if path == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise OptionError("no input: stdin is a terminal", "give --in FILE, or pipe rows in")
        yield sys.stdin.buffer
        return
    try:
        opened = gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")
    except OSError as error:
        raise OptionError(f"cannot open {path}: {error.strerror or error}", _unfinished(path)) from None
    with opened:
        yield opened


def count_lines(paths: list[str]) -> int | None:
    """Return how many lines plain files hold, for a progress bar; None where that is not known cheaply."""
    total = 0
    for path in paths:
        if path == "-" or path.endswith(".gz") or not Path(path).is_file():
            return None
        with open(path, "rb") as file:
            total += sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    return total


def read_all(path: str, check: Callable[[Row], Row]) -> list[Row]:
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


def shown(path: str) -> str:
    """Return the name of an input as messages give it."""
    return "<stdin>" if path == "-" else path


def _unfinished(path: str) -> str:
    part = Path(path + ".part")
    return f"{part} stands there: the command that writes it has not finished, run it again" if part.exists() else ""
