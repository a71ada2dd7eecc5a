"""Process a large file in several processes, with the results in the order of the file.

A range has whole groups: consecutive rows with the same key. The processes are forked, so they share the memory of
this one, and each takes every N-th range. They are independent. A range with a bad row, or with a row that a warning
counts, is left to the caller, which reads from there, so messages are the same as with one process.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, pairwise
from typing import IO, Generic, NoReturn, TypeVar

from srlm_cli.errors import BadRow
from srlm_cli.records import Record
from srlm_cli.streams.reader import BLANK, begins_array, checked_record, parsed_row

T = TypeVar("T")
Check = Callable[[Record], Record | list[Record]]
SIZE = 4 << 20
PIECE = 64 << 10
WORTHWHILE = 32 << 20  # a smaller file takes about a second
MOST_PROCESSES = 2  # at this many all of them and this one are within 150 MB


@dataclass(frozen=True)
class RangeResult(Generic[T]):
    """The result of a range, and its size in bytes and lines."""

    made: T
    size: int
    lines: int


class Lines:
    """The lines of a file up to a place where one ends, counted; read by pieces that stay in a processor's cache."""

    def __init__(self, file: IO[bytes], end: int) -> None:
        self.file, self.end, self.count = file, end, 0

    def __iter__(self) -> Iterator[bytes]:
        return chain.from_iterable(self._pieces())

    def _pieces(self) -> Iterator[list[bytes]]:
        while (left := self.end - self.file.tell()) > 0 and (piece := self.file.read(min(left, PIECE))):
            lines = BytesIO(piece + self.file.readline() if len(piece) < left else piece).readlines()
            self.count += len(lines)
            yield lines


class Ranges(Generic[T]):
    """The parts of a file in their order, as often as all is well with a range; then they end.

    `work` returns the result of the records of a range; if it or `check` raises, the results end before this range.
    """

    def __init__(
        self, path: str, check: Check, key: Callable[[Record], Hashable], work: Callable[[Iterable[Record]], T]
    ):
        self.path, self.check, self.key, self.work = path, check, key, work
        self.ranges = list(pairwise(self._cuts()))
        self.workers: list[tuple[int, IO[bytes]]] = []
        gc.freeze()  # objects that exist now stay: no collection copies their pages, and the one at exit took 30 ms
        for first in range(processes()):
            self._fork(self.ranges[first :: processes()])

    def __enter__(self) -> Ranges[T]:
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for the processes; those whose results are not read end immediately."""
        for _, made in self.workers:
            made.close()
        for process, _ in self.workers:
            os.waitpid(process, 0)

    def __iter__(self) -> Iterator[RangeResult[T]]:
        for number in range(len(self.ranges)):
            try:
                yield pickle.load(self.workers[number % len(self.workers)][1])
            except (EOFError, pickle.UnpicklingError):  # it met something that is not plain, or was killed
                return

    def _cuts(self) -> Iterator[int]:
        """Yield where ranges begin, and where the last one ends."""
        size = os.path.getsize(self.path)
        yield 0
        with open(self.path, "rb") as file:
            for start in range(SIZE, size, SIZE):
                if (found := self._group_from(file, start, start + SIZE)) is not None:
                    yield found
        yield size

    def _group_from(self, file: IO[bytes], start: int, end: int) -> int | None:
        """Return where the first group begins that is sure to begin between two places; None if there is none."""
        file.seek(start - 1)
        at = start - 1 + len(file.readline())
        before = None
        while at < end and (line := file.readline()):
            key = self._key_of(line)
            if before is not None and key not in (None, before):
                return at
            before = before if key is None else key
            at += len(line)
        return None

    def _key_of(self, line: bytes) -> Hashable:
        try:
            return next((self.key(row) for row in self._records([line])), None)
        except BadRow:
            return None

    def _records(self, lines: Iterable[bytes]) -> Iterator[Record]:
        """Yield the records of lines; a row that a warning counts is left to the caller, which counts all of them."""
        noted: Counter[str] = Counter()
        for line in lines:
            if (row := parsed_row(line, noted)) is not BLANK:
                record = checked_record(row, self.check)
                if noted:
                    raise BadRow("a row that a warning counts")
                if type(record) is list:
                    yield from record
                else:
                    yield record

    def _fork(self, ranges: list[tuple[int, int]]) -> None:
        from fcntl import F_SETPIPE_SZ, fcntl  # Linux only, as all this

        read, write = os.pipe()
        with suppress(OSError):  # what one range makes goes in, so that a process need not wait for the one before it
            fcntl(write, F_SETPIPE_SZ, 1 << 20)
        if process := os.fork():
            os.close(write)
            self.workers.append((process, os.fdopen(read, "rb")))
        else:
            for _, of_others in self.workers:
                of_others.close()
            os.close(read)
            self._serve(ranges, write)

    def _serve(self, ranges: list[tuple[int, int]], write: int) -> NoReturn:
        """Work on ranges in a process of its own, which ends here whatever happens."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends all
        gc.disable()  # rows have no cycles, and a collection would copy shared pages
        try:
            with open(self.path, "rb", buffering=PIECE) as file, os.fdopen(write, "wb") as out:
                for start, end in ranges:
                    file.seek(start)
                    lines = Lines(file, end)
                    made = self.work(self._records(lines))
                    pickle.dump(RangeResult(made, end - start, lines.count), out)
                    out.flush()
        except BaseException:  # noqa: BLE001 - the first process meets it too, and says so
            os._exit(1)
        os._exit(0)


def processes() -> int:
    """Return how many processes a large file is worth: as many as processors that this one may use, within bounds."""
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else 1


def worthwhile(path: str) -> bool:
    """Return whether a path is a plain file of lines that several processes are quicker with."""
    plain = path != "-" and not path.endswith(".gz") and os.path.isfile(path)
    if not plain or processes() == 1 or os.path.getsize(path) < WORTHWHILE:
        return False
    with open(path, "rb") as file:
        return not begins_array(file.read(PIECE))
