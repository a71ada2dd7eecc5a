"""The contenders of `passages.py`; each indexes passages, or answers queries, in a process of its own.

python benchmarks/retrievers.py srlm|sqlite3|bm25s|tantivy index|search CORPUS INDEX QUERIES

CORPUS has a passage per line, QUERIES is a JSON list. `sqlite3` is the bare floor of srlm: `executemany` of the texts
into an FTS5 table with the settings of srlm, and nothing else. bm25s (with PyStemmer) and tantivy stem words, too.
Prints one JSON line: processor time, peak memory, and for `search` the times of the queries and how many were right.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from paths import existing_file

COUNT = 3  # passages per query
Search = Callable[[str], list[str]]


def texts(corpus: Path) -> Iterator[str]:
    """Yield the passages of a file."""
    with open(corpus, "rb") as file:
        for line in file:
            yield json.loads(line)["text"]


class Srlm:
    """The command `srlm index`, and `Corpus`, by which `srlm judge --evidence` searches."""

    package = "srlm-cli"

    @staticmethod
    def index(corpus: Path, place: Path) -> None:
        from srlm_cli.cli import main

        sys.argv = ["srlm", "index", "--quiet", "--in", str(corpus), "--out", str(place)]
        kept = os.dup(1)
        with open(os.devnull, "w") as nowhere, suppress(SystemExit):
            os.dup2(nowhere.fileno(), 1)  # for the line that the command prints
            main()
        os.dup2(kept, 1)

    @staticmethod
    def open(place: Path) -> Search:
        from srlm_cli.evidence.search import Corpus

        corpus = Corpus(str(place))
        return lambda query: [found.text for found in corpus.search(query, COUNT)]


class Sqlite3:
    """An FTS5 table and nothing else, as the table of srlm is; all words of a query are searched for."""

    package = ""

    @staticmethod
    def index(corpus: Path, place: Path) -> None:
        from srlm_cli.evidence import index

        database = sqlite3.connect(place, isolation_level=None)
        for line in index.NEW:
            database.execute(line)
        database.execute("BEGIN")
        database.execute(index.TABLES[0])
        for line in index.BULK:
            database.execute(line)
        database.executemany("INSERT INTO passage (text) VALUES (?)", ((text,) for text in texts(corpus)))
        database.execute("COMMIT")

    @staticmethod
    def open(place: Path) -> Search:
        database = sqlite3.connect(place)
        line = f"SELECT text FROM passage WHERE passage MATCH ? ORDER BY rank LIMIT {COUNT}"

        def search(query: str) -> list[str]:
            return [text for (text,) in database.execute(line, (" OR ".join(f'"{word}"' for word in query.split()),))]

        return search


class Bm25s:
    """bm25s with its default method and back end; the index and the texts are mapped, not read, for a search."""

    package = "bm25s"

    @staticmethod
    def index(corpus: Path, place: Path) -> None:
        import bm25s
        import Stemmer

        held = list(texts(corpus))
        tokens = bm25s.tokenize(held, stopwords=None, stemmer=Stemmer.Stemmer("english"), show_progress=False)
        made = bm25s.BM25()
        made.index(tokens, show_progress=False)
        made.save(place, corpus=held, show_progress=False)

    @staticmethod
    def open(place: Path) -> Search:
        import bm25s
        import Stemmer

        made, stemmer = bm25s.BM25.load(place, mmap=True, load_corpus=True), Stemmer.Stemmer("english")

        def search(query: str) -> list[str]:
            tokens = bm25s.tokenize([query], stopwords=None, stemmer=stemmer, show_progress=False)
            found, _ = made.retrieve(tokens, k=COUNT, show_progress=False)
            return [one["text"] for one in found[0]]

        return search


class Tantivy:
    """tantivy with its default threads and memory for writing."""

    package = "tantivy"

    @staticmethod
    def index(corpus: Path, place: Path) -> None:
        import tantivy

        place.mkdir()
        schema = tantivy.SchemaBuilder().add_text_field("text", stored=True, tokenizer_name="en_stem").build()
        writer = tantivy.Index(schema, path=str(place)).writer()
        for text in texts(corpus):
            writer.add_document(tantivy.Document(text=text))
        writer.commit()
        writer.wait_merging_threads()

    @staticmethod
    def open(place: Path) -> Search:
        import tantivy

        index = tantivy.Index.open(str(place))
        searcher = index.searcher()

        def search(query: str) -> list[str]:
            hits = searcher.search(index.parse_query(query, ["text"]), COUNT).hits
            return [searcher.doc(at)["text"][0] for _, at in hits]

        return search


CONTENDERS = {"srlm": Srlm, "sqlite3": Sqlite3, "bm25s": Bm25s, "tantivy": Tantivy}


def name_of(contender: str) -> str:
    """Return the name and the version of a contender."""
    package = CONTENDERS[contender].package
    return f"{contender} {version(package) if package else sqlite3.sqlite_version}"


def peak() -> int:
    """Return the most memory that this process has held, in MiB, with the pages of mapped files that it has read."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) >> 10


def timed(search: Search, queries: list[str]) -> dict:
    """Return the times of queries in milliseconds, and for how many of them the first passage has all of the query."""
    cpu, wall, right = [], [], 0
    for query in queries:
        begun = time.process_time(), time.perf_counter()
        found = search(query)
        cpu.append(1000 * (time.process_time() - begun[0]))
        wall.append(1000 * (time.perf_counter() - begun[1]))
        right += bool(found) and query in found[0]
    return {"query_cpu": cpu, "query_wall": wall, "right": right}


def main() -> None:
    """Do one step of one contender."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("step", choices=("index", "search"))
    parser.add_argument("corpus", type=existing_file)
    parser.add_argument("index")
    parser.add_argument("queries", type=existing_file)
    options = parser.parse_args()
    contender, place, found = CONTENDERS[options.contender], Path(options.index), {}
    if options.step == "index":
        contender.index(options.corpus, place)
    else:
        found = timed(contender.open(place), json.loads(options.queries.read_text(encoding="utf-8")))
    print(json.dumps({"name": name_of(options.contender), "cpu": time.process_time(), "peak": peak(), **found}))


if __name__ == "__main__":
    main()
