"""Tables on disk for data that does not fit in memory; they are deleted with the process."""

from __future__ import annotations

import sqlite3
from collections.abc import Hashable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from itertools import groupby
from operator import itemgetter
from typing import Any, Generic, TypeVar

from srlm_cli.errors import SrlmError
from srlm_cli.records import Record
from srlm_cli.streams.reader import parsed
from srlm_cli.streams.writer import encode

T = TypeVar("T")
CACHE_KIB = 32 << 10
TAKE_IN = "INSERT OR FAIL INTO seen VALUES (?)"


class Spill:
    """A private SQLite database with 32 MiB of memory; the rest is in the folder for temporary files.

    The file has no name, so it disappears with the process.
    """

    def __init__(self) -> None:
        self.database = sqlite3.connect("", isolation_level=None)
        for setting in (f"cache_size = -{CACHE_KIB}", "temp_store = file", "journal_mode = off", "synchronous = off"):
            self.database.execute(f"PRAGMA {setting}")


class Seen(Spill):
    """A set of integers of 64 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.database.execute("CREATE TABLE seen (key INTEGER PRIMARY KEY)")
        self.database.execute("BEGIN")  # never ended: nobody else reads it

    def add(self, key: int) -> bool:
        """Take in a key; return whether it is new."""
        try:
            self.database.execute(TAKE_IN, (key,))
        except sqlite3.IntegrityError:
            return False
        except sqlite3.OperationalError as error:
            raise no_room(error) from None
        return True

    def add_all(self, keys: Iterable[int]) -> list[bool]:
        """Take in keys run them separately; return of each whether it is new."""
        left, new = list(keys), []
        with full_disk():
            while left:
                before = self.database.total_changes
                with suppress(sqlite3.IntegrityError):  # it stops at the first key that is not new
                    self.database.executemany(TAKE_IN, zip(left, strict=False))
                taken = self.database.total_changes - before
                new += [True] * taken + [False] * (taken < len(left))
                del left[: taken + 1]
        return new


class ByKey(Spill, Generic[T]):
    """Dataclasses of lists by a text, on disk, read in the order of the texts as often as one likes.

    What is added to one key at different times becomes one: its lists joined.
    """

    def __init__(self, kind: type[T]) -> None:
        super().__init__()
        self.kind = kind
        self.names = [field.name for field in fields(kind)]
        self.database.execute("CREATE TABLE part (at INTEGER PRIMARY KEY, key BLOB, line BLOB)")

    def add(self, key: str, value: T) -> None:
        """Append to the lists of a key."""
        line = encode([{name: getattr(value, name) for name in self.names}])
        with full_disk():
            self.database.execute("INSERT INTO part (key, line) VALUES (?, ?)", (as_blob(key), line))

    def __iter__(self) -> Iterator[T]:
        with full_disk():
            self.database.execute("CREATE INDEX IF NOT EXISTS by_key ON part (key)")
            found = self.database.execute("SELECT key, line FROM part ORDER BY key, at")
            for _, lines in groupby(found, key=itemgetter(0)):
                parts = [parsed(line) for _, line in lines]
                yield self.kind(**{name: [value for part in parts for value in part[name]] for name in self.names})


class Table(Spill, MutableMapping[str, Any]):
    """JSON values by a text, on disk: a dict in bounded memory."""

    def __init__(self) -> None:
        super().__init__()
        self.database.execute("CREATE TABLE entry (key BLOB PRIMARY KEY, line BLOB)")

    def __setitem__(self, key: str, value: Any) -> None:
        with full_disk():
            self.database.execute("INSERT OR REPLACE INTO entry VALUES (?, ?)", (as_blob(key), encode([value])))

    def setdefault(self, key: str, value: Any) -> None:
        """Take in a value unless its key has one."""
        with full_disk():
            self.database.execute("INSERT OR IGNORE INTO entry VALUES (?, ?)", (as_blob(key), encode([value])))

    def __getitem__(self, key: str) -> Any:
        found = self.database.execute("SELECT line FROM entry WHERE key = ?", (as_blob(key),)).fetchone()
        if found is None:
            raise KeyError(key)
        return parsed(found[0])

    def __contains__(self, key: object) -> bool:
        found = self.database.execute("SELECT 1 FROM entry WHERE key = ?", (as_blob(str(key)),))
        return found.fetchone() is not None

    def __iter__(self) -> Iterator[str]:
        for (key,) in self.database.execute("SELECT key FROM entry ORDER BY rowid"):
            yield key.decode("utf-8", "surrogatepass")

    def __len__(self) -> int:
        return self.database.execute("SELECT count(*) FROM entry").fetchone()[0]

    def __delitem__(self, key: str) -> None:
        with full_disk():
            if not self.database.execute("DELETE FROM entry WHERE key = ?", (as_blob(key),)).rowcount:
                raise KeyError(key)


class Rows(Spill):
    """Rows on disk, read in the order in which they came, as often as one likes."""

    def __init__(self) -> None:
        super().__init__()
        self.database.execute("CREATE TABLE row (at INTEGER PRIMARY KEY, line BLOB)")

    def add(self, row: Record) -> None:
        """Append a row."""
        with full_disk():
            self.database.execute("INSERT INTO row (line) VALUES (?)", (encode([row]),))

    def __iter__(self) -> Iterator[Record]:
        for (line,) in self.database.execute("SELECT line FROM row ORDER BY at"):
            yield parsed(line)


def group_by_key(parts: Iterable[tuple[Hashable, Iterable[Record]]]) -> Iterator[list[Record]]:
    """Yield the rows of each key together, in the order of first appearance of the keys."""
    database = Spill().database
    database.execute("CREATE TABLE part (at INTEGER PRIMARY KEY, key TEXT, lines BLOB)")
    database.execute("BEGIN")  # never ended: no page is written for each part
    with full_disk():
        for key, rows in parts:
            database.execute("INSERT INTO part (key, lines) VALUES (?, ?)", (ascii(key), encode(rows)))
        database.execute("CREATE INDEX by_key ON part (key)")
        for (key,) in database.execute("SELECT key FROM part GROUP BY key ORDER BY min(at)"):
            found = database.execute("SELECT lines FROM part WHERE key = ? ORDER BY at", (key,))
            yield [parsed(line) for (lines,) in found for line in lines.split(b"\n") if line]


def as_blob(text: str) -> bytes:
    """Return a text as bytes that sort in the order of the texts."""
    return text.encode("utf-8", "surrogatepass")


@contextmanager
def full_disk() -> Iterator[None]:
    """Raise SrlmError with a way out where the disk for temporary files cannot hold the table."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise no_room(error) from None


def no_room(error: sqlite3.OperationalError) -> SrlmError:
    """Return a write that failed as one line, with a way out."""
    return SrlmError(f"temporary files: {error}", "set TMPDIR to a folder with room for the input rows")
