"""Write an index of passages: one SQLite file with an FTS5 table, which appears or changes as a whole."""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srlm_cli.errors import BadRow, OptionError, SrlmError
from srlm_cli.evidence.documents import Document, passages
from srlm_cli.records import short_hash

APPLICATION = 0x73726C6D  # "srlm", by which the file is known
TOKENIZER = "porter unicode61"
CACHE_KIB = 32 << 10
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


@dataclass
class Index:
    """An index that documents are added to, in one transaction."""

    database: sqlite3.Connection
    words: int
    overlap: int
    counts: Counter[str] = field(default_factory=Counter)
    run: int = 0
    next: int = 1

    def add(self, document: Document) -> None:
        """Add a document, or replace that of the same source if its text has changed; count what was done.

        Raises BadRow if a document of the same source and another text was added before by this run.
        """
        found = self.database.execute(
            "SELECT number, hash, first, last, run FROM document WHERE source = ?", (document.source,)
        ).fetchone()
        number, old, first, last, run = found or (None, None, 0, -1, None)
        if old == document.hash:
            self.counts["unchanged"] += 1
            self.database.execute("UPDATE document SET run = ? WHERE number = ?", (self.run, number))
            return
        if run == self.run:
            raise BadRow(f"two documents are named {document.source}: give each an `id`")
        if found:
            self.database.execute("DELETE FROM passage WHERE rowid BETWEEN ? AND ?", (first, last))
        number = number or self.next  # the number of its first passage
        begin = self.next
        for text in passages(document.text, self.words, self.overlap):
            self.database.execute(
                "INSERT INTO passage (rowid, title, text, document) VALUES (?, ?, ?, ?)",
                (self.next, document.title, text, number),
            )
            self.next += 1
        self.database.execute(
            "INSERT OR REPLACE INTO document VALUES (?, ?, ?, ?, ?, ?, ?)",
            (number, document.source, document.title, document.hash, begin, self.next - 1, self.run),
        )
        self.counts["replaced" if found else "added"] += 1

    def finish(self) -> dict[str, Any]:
        """Write the settings and how common the common words are, and return what the index holds."""
        self.database.execute("DELETE FROM common")
        self.database.execute("INSERT INTO common SELECT term, doc FROM vocabulary WHERE doc > ?", (RARE,))
        hashes = self.database.execute("SELECT source || ' ' || hash FROM document ORDER BY source")
        total = short_hash("\n".join((f"{self.words} {self.overlap}", *(one for (one,) in hashes))))
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


@contextmanager
def open_index(path: str, words: int, overlap: int) -> Iterator[Index]:
    """Open an index to add documents, a new one if there is none; all that is added appears at the end, or nothing.

    A new index is made in FILE.part. Raises OptionError for another kind of file, or other sizes of passages than the
    index has.
    """
    old = os.path.exists(path)
    place = path if old else f"{path}.part"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if not old:
        Path(place).unlink(missing_ok=True)
    with failures(path):
        database = connect(place)
        try:
            if old:
                refuse_sizes(path, settings(database, path), words, overlap)
            else:
                for line in ("journal_mode = off", "synchronous = off", f"application_id = {APPLICATION}"):
                    database.execute(f"PRAGMA {line}")
            database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            if old:
                database.execute("BEGIN IMMEDIATE")
                saved = settings(database, path)
                index = Index(database, words, overlap, run=saved["run"] + 1, next=saved["next"])
            else:
                database.execute("BEGIN")
                for table in TABLES:
                    database.execute(table)
                index = Index(database, words, overlap)
            yield index
            database.execute("COMMIT")
        finally:
            database.close()  # a transaction that has not ended is rolled back
        if not old:
            with open(place, "rb") as file:
                os.fsync(file.fileno())
            os.replace(place, path)


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
