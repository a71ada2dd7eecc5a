"""Find the rows of a prompt in another file, whatever the order of the two."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack
from itertools import takewhile
from typing import IO

from srlm_cli.errors import BadRow, DataError, OptionError
from srlm_cli.records import Record
from srlm_cli.streams.reader import BLANK, checked_record, numbered, open_lines, parsed_row, shown

Check = Callable[[Record], Record | list[Record]]


class Lookup:
    """The records of a JSONL file by key, such as their prompt; records with the same key are consecutive.

    `asked` is whether any key was asked for, `found` whether the file had one of them.
    In memory is a number a key, where its lines begin; the rows are read from the file when they are
    asked for. In a file of the same order that is reading on (a .gz of another order is slow). A bad row,
    or a key that comes back, raises DataError with file:line; stdin, OptionError.
    """

    def __init__(self, path: str, check: Check, key: Callable[[Record], Hashable]) -> None:
        if path == "-" or (os.path.exists(path) and not os.path.isfile(path)):
            raise OptionError(f"{shown(path)} cannot be read twice", "name a file")
        self.path, self.check, self.key = path, check, key
        self.files = ExitStack()
        self.file: IO[bytes] = self.files.enter_context(open_lines(path))
        self.starts: dict[int, int] = {}
        self.numbers: dict[int, int] = {}
        self.asked = self.found = False
        last = None
        for number, start, rows in self._rows(0, 1):
            found = hash(key(rows[0]))
            if found != last and found in self.starts:
                raise DataError(f"{path}:{number}: the rows of its prompt are not grouped", "sort the file")
            if found != last:
                self.starts[found], self.numbers[found] = start, number
            last = found

    def __call__(self, wanted: Hashable) -> list[Record]:
        """Return the records of a key, none where the file has none."""
        start = self.starts.get(hash(wanted))
        self.asked = True
        if start is None:
            return []
        self.found = True
        self.file.seek(start)
        lines = self._rows(start, self.numbers[hash(wanted)])
        same = takewhile(lambda line: self.key(line[2][0]) == wanted, lines)
        return [row for _, _, rows in same for row in rows]

    def _rows(self, start: int, number: int) -> Iterator[tuple[int, int, list[Record]]]:
        """Yield (line number, where the line begins, its records) from a place in the file on."""
        for at, line in numbered(self.path, self.file, number):
            here, start = start, start + len(line)
            if (row := parsed_row(line)) is BLANK:
                continue
            try:
                checked = checked_record(row, self.check)
            except BadRow as error:
                raise DataError(f"{self.path}:{at}: {error}") from None
            yield at, here, checked if isinstance(checked, list) else [checked]
