"""Find the passages of an index that fit a text best, by bm25."""

from __future__ import annotations

import os
import re
import sqlite3
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import log

from srlm_cli.errors import OptionError, SrlmError
from srlm_cli.evidence.index import TOKENIZER, connect, failures, settings

WORD = re.compile(r"[^\W_]+")
MOST_WORDS = 256
MOST_ROWS = 1_500  # that a query ranks, so that its time is bounded, however common its words are
CANDIDATES = 256  # passages that are ranked again by more common words
MOST_COMMON = 4  # such words


@dataclass(frozen=True)
class Passage:
    """A passage that was found: its number in the index, the source and title of its document, its text.

    A larger `score` (bm25) fits better. A passage of another program can lack `id` and `source`; its score is 0.
    """

    id: int | str | None
    source: str | None
    title: str
    text: str
    score: float


class Corpus:
    """An index of `srlm index`, to be searched; it is never written. Raises OptionError for another file.

    `fingerprint` changes with any document and with the sizes of the passages. All passages are of this state: if a
    document is added while the index is searched, `search` raises SrlmError.
    """

    def __init__(self, path: str) -> None:
        if not os.path.isfile(path):
            raise OptionError(f"cannot open {path}: no such file", "`srlm index` makes an index")
        self.path = path
        with failures(path):
            self.database = connect(path, made=True)
            settings(self.database, path)  # refuses another kind of file
            self.version = self._version()
            self.fingerprint: str = settings(self.database, path)["fingerprint"]
            self.database.execute(f"CREATE VIRTUAL TABLE temp.asked USING fts5(word, tokenize = '{TOKENIZER}')")
            self.database.execute("CREATE VIRTUAL TABLE temp.terms USING fts5vocab(temp, asked, instance)")

    def search(self, query: str, count: int) -> list[Passage]:
        """Return at most `count` passages that share a word with a text, best first; ties are in order of their ids.

        Any text is a query: it has no syntax. Words count by their stem, once each. Of the words of the text the rarest
        are searched for, as long as their passages are `MOST_ROWS` at most, and always the rarest one. The best
        `CANDIDATES` passages are ranked again if there are more common words.
        """
        with failures(self.path):
            words = self._known_words(query)
            rare = rarest(words)
            if not rare or count < 1:
                return []
            match = " OR ".join(f'"{word}"' for word, _ in words[:rare])
            most = count if rare == len(words) else max(count, CANDIDATES)
            found = self.database.execute(
                "SELECT rowid, -rank FROM passage WHERE passage MATCH ? ORDER BY rank, rowid LIMIT ?", (match, most)
            ).fetchall()
            if rare < len(words):
                found = self._ranked_again(found, match, words[rare : rare + MOST_COMMON])
            passages = [self._passage(number, score) for number, score in found[:count]]
            self._refuse_changes()
        return passages

    def close(self) -> str:
        """Close the file."""
        self.database.close()
        return ""

    def _version(self) -> int:
        """Return a number that changes when another process changes the file."""
        return self.database.execute("PRAGMA data_version").fetchone()[0]

    def _refuse_changes(self) -> None:
        """Raise SrlmError if the index has other documents than when it was opened; after a search."""
        if (version := self._version()) == self.version:
            return
        if settings(self.database, self.path)["fingerprint"] != self.fingerprint:
            raise SrlmError(f"{self.path} was changed while it was searched", "--restart judges by the new passages")
        self.version = version

    def _known_words(self, query: str) -> list[tuple[str, int]]:
        """Return the words of a text that the index has, each with the number of its passages, the rarest first."""
        words = list(dict.fromkeys(WORD.findall(query)))[:MOST_WORDS]
        self.database.execute("DELETE FROM asked")
        self.database.executemany("INSERT INTO asked (rowid, word) VALUES (?, ?)", enumerate(words))
        found = self.database.execute(
            """SELECT number, held FROM (
                SELECT min(terms.doc) AS number, coalesce(common.passages,
                    (SELECT doc FROM vocabulary WHERE vocabulary.term = terms.term)) AS held
                FROM terms LEFT JOIN common USING (term) GROUP BY term
            ) WHERE held ORDER BY held, number"""
        )
        return [(words[number], held) for number, held in found]

    def _ranked_again(
        self, found: list[tuple[int, float]], match: str, words: list[tuple[str, int]]
    ) -> list[tuple[int, float]]:
        """Return (number, score) of passages of `match`, best first, with the weight of each common word that one has.

        The weight is that of bm25 for a word that a passage of the usual length has once.
        """
        scores = dict(found)
        for word, held in words:
            if 2 * held >= self.size:  # bm25 gives it no weight
                continue
            weight = log((self.size - held + 0.5) / (held + 0.5))
            both = f'"{word}" AND ({match})'  # much faster than to look up each candidate
            for (number,) in self.database.execute("SELECT rowid FROM passage WHERE passage MATCH ?", (both,)):
                if number in scores:
                    scores[number] += weight
        return sorted(scores.items(), key=lambda one: (-one[1], one[0]))

    @cached_property
    def size(self) -> int:
        """The number of passages."""
        return self.database.execute("SELECT coalesce(sum(last - first + 1), 0) FROM document").fetchone()[0]

    def _passage(self, number: int, score: float) -> Passage:
        found = self.database.execute(
            """SELECT passage.text, document.source, document.title FROM passage JOIN document
            ON document.number = passage.document WHERE passage.rowid = ?""",
            (number,),
        ).fetchone()
        if not found or None in found:
            raise sqlite3.DatabaseError("database disk image is malformed")
        text, source, title = found
        return Passage(number, source, title, text, score)


def rarest(words: list[tuple[str, int]]) -> int:
    """Return how many of the rarest words are searched for: those with `MOST_ROWS` passages together, at least one."""
    total = list(accumulate(held for _, held in words))
    return max(bisect_right(total, MOST_ROWS), min(1, len(words)))


def search(path: str, query: str, count: int) -> list[Passage]:
    """Return the passages of an index that fit a text best; to search often, keep a `Corpus`."""
    return Corpus(path).search(query, count)
