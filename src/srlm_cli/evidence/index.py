"""Write an index of passages: one SQLite file with an FTS5 table, which appears or changes as a whole."""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from srlm_cli.errors import BadRow, OptionError, SrlmError
from srlm_cli.evidence.documents import Document, passages
from srlm_cli.streams.locked import open_locked

APPLICATION = 0x73726C6D  # "srlm", by which the file is known
TOKENIZER = "porter unicode61"
CACHE_KIB = 32 << 10
HASH_BYTES = 16 << 20  # of new words that FTS5 keeps in memory: with its 1 MiB it merges them on disk many times
AT_ONCE = 4000  # passages that are written together: measured a little faster than 1,000
RARE = 500  # passages that have a word; the number is kept of words in more of them
WAIT = 5.0  # seconds, while another process has the file
DAMAGED = "the file is damaged: delete it and make it again with `srlm index`"
HINTS = {
    "no such module": "this Python's SQLite has no FTS5",
    "locked": "another command is adding to it",
    "malformed": DAMAGED,
    "decode": DAMAGED,
}
TABLES = (
    f"CREATE VIRTUAL TABLE passage USING fts5(title, text, document UNINDEXED, tokenize = '{TOKENIZER}')",
    """CREATE TABLE document (number INTEGER PRIMARY KEY, source TEXT UNIQUE, title TEXT, hash TEXT,
        first INTEGER, last INTEGER, run INTEGER)""",
    "CREATE TABLE setting (name TEXT PRIMARY KEY, value)",
    "CREATE VIRTUAL TABLE vocabulary USING fts5vocab(passage, row)",
    "CREATE TABLE common (term TEXT PRIMARY KEY, passages INTEGER)",
)
NEW = ("PRAGMA journal_mode = off", "PRAGMA synchronous = off", f"PRAGMA application_id = {APPLICATION}")
BULK = (f"PRAGMA cache_size = -{CACHE_KIB}", f"INSERT INTO passage (passage, rank) VALUES ('hashsize', {HASH_BYTES})")


@dataclass
class Index:
    """An index that documents are added to, in one transaction."""

    database: sqlite3.Connection
    words: int
    overlap: int
    counts: Counter[str] = field(default_factory=Counter)
    run: int = 0
    next: int = 1
    waiting: list[tuple[int, str, str, int]] = field(default_factory=list)

    def add(self, document: Document) -> None:
        """Add a document, or replace that of the same source if its text has changed; count what was done.

        Raises BadRow if a document of the same source and another text was added before by this run.
        """
        hash_, first = document.hash, self.next
        texts = list(passages(document.text, self.words, self.overlap))
        last = first + len(texts) - 1
        row = (first, document.source, document.title, hash_, first, last, self.run)
        if self.database.execute("INSERT OR IGNORE INTO document VALUES (?, ?, ?, ?, ?, ?, ?)", row).rowcount:
            self.counts["added"] += 1
            number = first  # that of its first passage
        elif (number := self._replaced(document, hash_, first, last)) is None:
            return
        self.waiting += [(at, document.title, text, number) for at, text in enumerate(texts, first)]
        self.next = last + 1
        if len(self.waiting) >= AT_ONCE:
            self.write()

    def _replaced(self, document: Document, hash_: str, first: int, last: int) -> int | None:
        """Return the number of the document of the same source, whose passages are deleted; None if it is the same."""
        number, old, before, until, run = self.database.execute(
            "SELECT number, hash, first, last, run FROM document WHERE source = ?", (document.source,)
        ).fetchone()
        if old != hash_ and run == self.run:
            raise BadRow(f"two documents are named {document.source}: give each an `id`")
        self.counts["unchanged" if old == hash_ else "replaced"] += 1
        if old == hash_:
            self.database.execute("UPDATE document SET run = ? WHERE number = ?", (self.run, number))
            return None
        numbers = ((at,) for at in range(before, until + 1))  # one by one: FTS5 writes all before a larger statement
        self.database.executemany("DELETE FROM passage WHERE rowid = ?", numbers)
        self.database.execute(
            "UPDATE document SET title = ?, hash = ?, first = ?, last = ?, run = ? WHERE number = ?",
            (document.title, hash_, first, last, self.run, number),
        )
        return number

    def write(self) -> None:
        """Write the passages that wait."""
        self.database.executemany(
            "INSERT INTO passage (rowid, title, text, document) VALUES (?, ?, ?, ?)", self.waiting
        )
        self.waiting.clear()

    def finish(self) -> dict[str, Any]:
        """Write what waits, the settings, and how common the common words are; return what the index holds."""
        self.write()
        self.database.execute("DELETE FROM common")
        self.database.execute("INSERT INTO common SELECT term, doc FROM vocabulary WHERE doc > ?", (RARE,))
        total = self._fingerprint()
        values = {
            "words": self.words,
            "overlap": self.overlap,
            "run": self.run,
            "next": self.next,
            "fingerprint": total,
        }
        self.database.executemany("INSERT OR REPLACE INTO setting VALUES (?, ?)", values.items())
        documents, held = self.database.execute(
            "SELECT count(*), coalesce(sum(last - first + 1), 0) FROM document"
        ).fetchone()
        return {"documents": documents, "passages": held, "fingerprint": total}

    def _fingerprint(self) -> str:
        """Return a hash of the sizes of passages and of all documents, read one by one: there can be millions."""
        running = sha256(f"{self.words} {self.overlap}".encode())
        for source, hash_ in self.database.execute("SELECT source, hash FROM document ORDER BY source"):
            running.update(f"\n{source} {hash_}".encode())
        return running.hexdigest()[:16]


@contextmanager
def open_index(path: str, words: int, overlap: int) -> Iterator[Index]:
    """Open an index to add documents, a new one if there is none; all that is added appears at the end, or nothing.

    Raises OptionError for another kind of file, or other sizes of passages than the index has.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with place_of(path) as place, failures(path):
        database, old = connect(place), place == path
        try:
            if old:
                refuse_sizes(path, settings(database, path), words, overlap)
            else:
                for line in NEW:
                    database.execute(line)
            if old:
                database.execute("BEGIN IMMEDIATE")
                saved = settings(database, path)
                index = Index(database, words, overlap, run=saved["run"] + 1, next=saved["next"])
            else:
                database.execute("BEGIN")
                for table in TABLES:
                    database.execute(table)
                index = Index(database, words, overlap)
            for line in BULK:
                database.execute(line)
            yield index
            database.execute("COMMIT")
        finally:
            database.close()  # a transaction that has not ended is rolled back


@contextmanager
def place_of(path: str) -> Iterator[str]:
    """Give the file to write: an index that exists, or an empty FILE.part, which becomes FILE or is deleted.

    One process at a time has FILE.part; one that waited for it adds to the index of the other.
    """
    if os.path.exists(path):
        yield path
        return
    part = Path(f"{path}.part")
    with open_locked(part) as file:
        try:
            if os.path.exists(path):
                yield path
                return
            file.truncate(0)
            yield str(part)
            os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def connect(path: str, *, made: bool = False) -> sqlite3.Connection:
    """Open a database without implicit transactions; one that is `made` is there already.

    A reader, too, opens it for writing: SQLite first takes back what a run that was killed had begun to write.
    """
    name = f"{Path(path).absolute().as_uri()}?mode={'rw' if made else 'rwc'}"
    return sqlite3.connect(name, uri=True, isolation_level=None, timeout=WAIT)


def settings(database: sqlite3.Connection, path: str) -> dict[str, Any]:
    """Return the settings of an index; raise OptionError for another kind of file."""
    try:
        if database.execute("PRAGMA application_id").fetchone()[0] == APPLICATION:
            found = dict(database.execute("SELECT name, value FROM setting"))
            if {"words", "overlap", "run", "next", "fingerprint"} <= found.keys():
                return found
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            raise
    raise OptionError(f"{path} is not an index", "`srlm index` makes one: use another file name")


def refuse_sizes(path: str, saved: dict[str, Any], words: int, overlap: int) -> None:
    """Raise OptionError if the passages of an index have other sizes."""
    if (saved["words"], saved["overlap"]) != (words, overlap):
        hint = f"--passage-words {saved['words']} --overlap-words {saved['overlap']}, or another file"
        raise OptionError(f"{path} has passages of other sizes", hint)


@contextmanager
def failures(path: str) -> Iterator[None]:
    """Raise SrlmError in one line for a database that cannot be written."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:  # a damaged file can have a message that is not UTF-8
        hint = next((HINTS[word] for word in HINTS if word in str(error)), "the index is as it was before")
        what = " ".join(str(error).split())[:200]  # it can hold a text of the index
        raise SrlmError(f"{path}: {what}", hint) from None
