"""An index of passages: what is read, cut, added, found and refused, and that it is whole at any moment."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

from helpers import Srlm, as_lines, read_rows, write_rows
from srlm_cli.errors import BadRow, OptionError, SrlmError
from srlm_cli.evidence import index as writing
from srlm_cli.evidence import search as searching
from srlm_cli.evidence.documents import Document, document_of_file, passages
from srlm_cli.evidence.index import open_index
from srlm_cli.evidence.search import Corpus, search
from srlm_cli.records import short_hash

RIVERS = [
    {"id": "danube", "title": "Danube", "text": "The Danube flows through ten countries to the Black Sea."},
    {"url": "https://example.org/rhine", "text": "The Rhine rises in the Alps and flows north."},
    {"text": "Iron has the number 26; its symbol is Fe."},
]


def build(path: Path, *documents: Document, words: int = 120, overlap: int = 20) -> dict:
    with open_index(str(path), words, overlap) as made:
        for document in documents:
            made.add(document)
        return made.finish()


def doc(source: str, text: str, title: str = "") -> Document:
    return Document(source, title, text)


def sources(path: Path, query: str, count: int = 5) -> list[str]:
    return [found.source for found in search(str(path), query, count)]


# --- passages --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words", "overlap", "cut"),
    [
        ("a b c d e", 3, 1, ["a b c", "c d e"]),
        ("a b c d e f", 3, 1, ["a b c", "c d e", "e f"]),
        ("a b", 3, 1, ["a b"]),
        ("a b c d", 2, 0, ["a b", "c d"]),
        ("  a\n\nb  c ", 2, 1, ["a\n\nb", "b  c"]),
        ("a", 1, 0, ["a"]),
    ],
)
def test_passages_overlap_and_are_the_text_as_it_is(text: str, words: int, overlap: int, cut: list[str]) -> None:
    assert list(passages(text, words, overlap)) == cut


def test_any_white_space_divides_words() -> None:
    spaces = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
    assert len(spaces) > 20
    for space in spaces:
        assert list(passages(f"a{space}b", 1, 0)) == ["a", "b"]


def test_every_word_is_in_a_passage_and_no_passage_is_in_another() -> None:
    text = " ".join(f"w{n}" for n in range(100))
    for words in range(1, 12):
        for overlap in range(words):
            cut = [one.split() for one in passages(text, words, overlap)]
            assert {word for one in cut for word in one} == set(text.split())
            assert all(one[len(one) - overlap :] == two[:overlap] for one, two in zip(cut, cut[1:], strict=False))
            assert len(cut[-1]) > overlap or len(cut) == 1


# --- search ----------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.db"
    many = [doc(f"filler {n}", f"A sentence about subject {n} and nothing else.") for n in range(20)]
    build(path, doc("danube", RIVERS[0]["text"], "Danube"), doc("rhine", RIVERS[1]["text"]), *many)
    return path


def test_the_passage_that_shares_rare_words_comes_first(corpus: Path) -> None:
    [first, second, *_] = search(str(corpus), "Which river flowed through the countries?", 3)
    assert (first.source, first.title, first.text) == ("danube", "Danube", RIVERS[0]["text"])  # by stem
    assert second.source == "rhine" and first.score > second.score > 0


@pytest.mark.parametrize(
    "query",
    [
        '"Danube" AND NOT (',
        "danube* OR",
        "text:danube",
        "what's the U.S. Danube-19 at $5?",
        "DANUBE",
        "danube_NEAR/3",
        "dänube",
    ],
)
def test_any_text_is_a_query_without_syntax(corpus: Path, query: str) -> None:
    assert sources(corpus, query)[0] == "danube"


@pytest.mark.parametrize("query", ["", "?!", "zebra", "\x00", "🙂"])
def test_a_query_that_shares_no_word_finds_nothing(corpus: Path, query: str) -> None:
    assert search(str(corpus), query, 5) == [] == search(str(corpus), "danube", 0)


def test_ties_are_in_the_order_of_the_index(tmp_path: Path) -> None:
    build(
        tmp_path / "c.db", *(doc(str(n), "the same words") for n in range(9)), *(doc(f"o{n}", "x") for n in range(30))
    )
    assert sources(tmp_path / "c.db", "same words", 4) == ["0", "1", "2", "3"]


def test_common_words_do_not_decide_and_do_not_cost(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "MOST_ROWS", 3)
    found = Corpus(str(corpus))

    def searched_for(query: str) -> list[str]:
        words = found._known_words(query)
        return [word for word, _ in words[: searching.rarest(words)]]

    assert searched_for("sentence about the subject of the danube") == ["danube", "the"]
    assert searched_for("sentence") == ["sentence"]  # the rarest one always
    assert searched_for("flows FLOWING flowed") == ["flows"]
    assert searched_for("zebra") == []


def test_common_words_order_the_passages_that_have_the_rare_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ["capital", "river", "founder", "crop", "year"]
    texts = [f"The {kind} of place{number} is named so." for number in range(40) for kind in kinds]
    build(tmp_path / "c.db", *(doc(text, text) for text in texts))
    asked = [f"What is the {kind} of place{number}?" for number in (0, 7, 39) for kind in kinds]
    plain = [sources(tmp_path / "c.db", query, 2) for query in asked]
    monkeypatch.setattr(searching, "MOST_ROWS", 10)  # fewer than have the word of a kind
    ranked_again = [sources(tmp_path / "c.db", query, 2) for query in asked]
    assert (
        [found[0] for found in ranked_again]
        == [found[0] for found in plain]
        == [f"The {kind} of place{number} is named so." for number in (0, 7, 39) for kind in kinds]
    )
    monkeypatch.setattr(searching, "MOST_COMMON", 0)
    assert [sources(tmp_path / "c.db", query, 1)[0] for query in asked] != [found[0] for found in plain]


def test_the_weight_of_a_common_word_is_that_of_bm25(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{'red' if number % 3 else 'blue'} thing{number} stands here" for number in range(30)]
    build(tmp_path / "c.db", *(doc(str(number), text) for number, text in enumerate(texts)))
    [whole] = search(str(tmp_path / "c.db"), "blue thing9", 1)
    monkeypatch.setattr(searching, "MOST_ROWS", 5)
    [again] = search(str(tmp_path / "c.db"), "blue thing9", 1)
    assert (again.source, again.score) == ("9", pytest.approx(whole.score, rel=1e-9))


# --- added to --------------------------------------------------------------------------------


def test_an_index_is_added_to_and_a_changed_document_replaced(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    one = build(path, doc("a", "alpha words"), doc("b", "beta words"))
    with open_index(str(path), 120, 20) as made:
        for document in (doc("a", "alpha words"), doc("b", "gamma words"), doc("c", "delta words")):
            made.add(document)
        two = made.finish()
    assert dict(made.counts) == {"unchanged": 1, "replaced": 1, "added": 1}
    assert (two["documents"], two["passages"]) == (3, 3) and one["fingerprint"] != two["fingerprint"]
    assert (sources(path, "beta"), sources(path, "gamma"), sources(path, "alpha")) == ([], ["b"], ["a"])
    assert Corpus(str(path)).fingerprint == two["fingerprint"]
    assert build(path, doc("a", "alpha words")) == two


def test_the_fingerprint_is_of_what_is_held_not_of_how_it_came(tmp_path: Path) -> None:
    whole = build(tmp_path / "one.db", doc("a", "alpha"), doc("b", "beta"))
    build(tmp_path / "two.db", doc("b", "old"))
    assert build(tmp_path / "two.db", doc("b", "beta"), doc("a", "alpha"))["fingerprint"] == whole["fingerprint"]
    assert build(tmp_path / "three.db", doc("a", "alpha"), doc("b", "beta"), words=5, overlap=0) != whole
    held = [f"{one.source} {one.hash}" for one in (doc("a", "alpha"), doc("b", "beta"))]
    assert whole["fingerprint"] == short_hash("\n".join(["120 20", *held]))  # as in indexes that were made before


def test_documents_that_wait_to_be_written_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(f"w{n}x{at}" for at in range(50)) for n in range(9)]
    for at_once in (1, 4, 1000):  # passages; a document has three
        monkeypatch.setattr(writing, "AT_ONCE", at_once)
        path = tmp_path / f"{at_once}.db"
        one = build(path, *(doc(str(n), text) for n, text in enumerate(texts)), words=20, overlap=5)
        with open_index(str(path), 20, 5) as made:
            for name, text in [("0", texts[0]), ("3", "new words"), ("3", "new words"), ("9", "last words")]:
                made.add(doc(name, text))
            with pytest.raises(BadRow, match="two documents are named 3"):
                made.add(doc("3", "other words"))
            two = made.finish()
        assert dict(made.counts) == {"unchanged": 2, "replaced": 1, "added": 1}
        assert (one["passages"], two["documents"], two["passages"]) == (27, 10, 26)
        assert sources(path, "w3x0") == [] and sources(path, "new") == ["3"] and sources(path, "last") == ["9"]
        assert [found.text.split()[0] for found in search(str(path), "w8x22", 5)] == ["w8x15"]
        database = sqlite3.connect(path)
        database.execute("INSERT INTO passage(passage) VALUES('integrity-check')")
        assert database.execute("SELECT count(*), max(rowid) FROM passage").fetchone() == (26, 29)


def test_two_texts_of_one_name_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(BadRow, match="two documents are named a"):
        build(tmp_path / "c.db", doc("a", "alpha"), doc("a", "beta"))
    assert not (tmp_path / "c.db").exists()
    assert build(tmp_path / "c.db", doc("a", "alpha"), doc("a", "alpha"))["documents"] == 1


@pytest.mark.parametrize(
    "ends", [OSError("full"), KeyboardInterrupt(), sqlite3.OperationalError("disk is full")], ids=repr
)
def test_a_new_index_that_fails_leaves_nothing(tmp_path: Path, ends: BaseException) -> None:
    with pytest.raises((type(ends), SrlmError)), open_index(str(tmp_path / "c.db"), 120, 20) as made:
        made.add(doc("a", "alpha"))
        raise ends
    assert list(tmp_path.iterdir()) == []


def test_a_new_index_is_made_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srlm_cli.streams.locked.WAIT", 0.0)
    with open_index(str(tmp_path / "c.db"), 120, 20) as made:
        made.add(doc("a", "alpha"))
        with pytest.raises(OptionError, match="another process is writing .*c.db.part"):
            build(tmp_path / "c.db", doc("b", "beta"))
        made.finish()
    assert sources(tmp_path / "c.db", "alpha") == ["a"]


def test_a_process_that_waited_for_a_new_index_adds_to_it(tmp_path: Path) -> None:
    other = Thread(target=build, args=(tmp_path / "c.db", doc("b", "beta")))
    with open_index(str(tmp_path / "c.db"), 120, 20) as made:
        made.add(doc("a", "alpha"))
        other.start()
        time.sleep(0.2)
        made.finish()
    other.join()
    assert sources(tmp_path / "c.db", "alpha beta") == ["a", "b"]


def test_what_a_killed_run_wrote_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "BULK", ["PRAGMA cache_size = -8"])  # so that pages are on disk before the end
    monkeypatch.setattr(writing, "AT_ONCE", 1000)  # and passages, too
    path, torn = tmp_path / "c.db", tmp_path / "torn.db"
    before = build(path, *(doc(f"a{n}", f"alpha {n} " * 50) for n in range(40)))
    with open_index(str(path), 120, 20) as made:
        for n in range(400):
            made.add(doc(f"b{n}", f"beta {n} " * 300))
        shutil.copy(path, torn)
        shutil.copy(f"{path}-journal", f"{torn}-journal")  # as the disk is when the power fails
        monkeypatch.setattr(writing, "WAIT", 0.0)
        with pytest.raises(SrlmError, match="another command is adding to it"):
            sources(path, "beta")
        made.finish()
    assert torn.stat().st_size > 0 and sources(torn, "beta") == [] and len(sources(torn, "alpha")) == 5
    assert Corpus(str(torn)).fingerprint == before["fingerprint"]
    database = sqlite3.connect(torn)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.execute("INSERT INTO passage(passage) VALUES('integrity-check')")
    assert len(sources(path, "beta")) == 5


# --- the command -----------------------------------------------------------------------------


def test_a_folder_of_texts_and_rows(srlm: Srlm) -> None:
    notes = srlm.folder / "notes"
    (notes / "deep").mkdir(parents=True)
    (notes / "a.md").write_text("Some words.\n\n## Small\n\n# The Rhine #\n\nIt rises in the Alps.", encoding="utf-8")
    (notes / "deep" / "moon.txt").write_text("\ufeffThe Moon has no air.", encoding="utf-8")
    (notes / "picture.png").write_bytes(b"\x89PNG")
    write_rows(notes / "rows.jsonl.gz", RIVERS)
    result = srlm("index", "--in", "notes", "--out", "c.db")
    assert result.code == 0 and result.err == "srlm index: 5 added\n"
    [row] = result.rows
    assert (row["index"], row["documents"], row["passages"], row["added"], row["bad"]) == ("c.db", 5, 5, 5, 0)
    path = srlm.folder / "c.db"
    [alps] = search(str(path), "small words", 9)
    assert (alps.source, alps.title) == ("notes/a.md", "The Rhine") and alps.text.startswith("Some words.\n\n## Small")
    assert [(found.source, found.title) for found in search(str(path), "moon air", 1)] == [
        ("notes/deep/moon.txt", "moon")
    ]
    assert sources(path, "rhine north")[0] == "https://example.org/rhine"
    assert sources(path, "iron") == ["notes/rows.jsonl.gz:3"]
    again = srlm("index", "--in", "notes", "--out", "c.db")
    assert again.err == "srlm index: 5 unchanged\n" and again.rows[0]["fingerprint"] == row["fingerprint"]


def test_a_file_name_that_is_not_utf_8_is_read(srlm: Srlm) -> None:
    (srlm.folder / "in").mkdir()
    (Path(os.fsdecode(os.fsencode(srlm.folder / "in") + b"/caf\xe9.txt"))).write_text("The Moon has no air.")
    assert srlm("index", "--in", "in", "--out", "c.db").err == "srlm index: 1 added\n"
    [found] = search(str(srlm.folder / "c.db"), "moon", 2)
    assert (found.source, found.title) == ("in/caf\ufffd.txt", "caf\ufffd")


def test_fields_and_sizes_and_stdin(srlm: Srlm) -> None:
    rows = [{"id": 7, "body": "one two three four five", "name": "Numbers"}]
    sizes = ["--passage-words", "3", "--overlap-words", "1", "--text-field", "body", "--title-field", "name"]
    assert srlm("index", *sizes, "--out", "deep/c.db", stdin=as_lines(rows)).rows[0]["passages"] == 2
    [found] = search(str(srlm.folder / "deep/c.db"), "five", 3)
    assert (found.source, found.title, found.text) == ("7", "Numbers", "three four five")
    other = srlm("index", "--out", "deep/c.db", "--text-field", "body", stdin=as_lines(rows))
    assert other.code == 2 and "--passage-words 3 --overlap-words 1" in other.err


BAD = ["{", '{"title": "no text"}', '{"text": "  "}', '{"text": 3}', '{"id": "danube", "text": "Another text."}']


@pytest.mark.parametrize("line", BAD)
def test_a_bad_row_is_named_and_leaves_the_index_as_it_was(srlm: Srlm, line: str) -> None:
    assert srlm("index", "--out", "c.db", stdin=as_lines(RIVERS[1:2])).code == 0
    before = (srlm.folder / "c.db").read_bytes()
    write_rows(srlm.folder / "in.jsonl", [*RIVERS, line])
    for out in ("c.db", "new.db"):
        result = srlm("index", "--in", "in.jsonl", "--out", out)
        assert result.code == 3 and result.out == "" and len(result.err.splitlines()) == 1
        assert result.err.startswith("srlm index: error: in.jsonl:4: ") and "--on-error skip" in result.err
    assert (srlm.folder / "c.db").read_bytes() == before and not (srlm.folder / "new.db").exists()


def test_bad_rows_and_files_can_be_skipped_and_are_kept(srlm: Srlm) -> None:
    (srlm.folder / "in").mkdir()
    (srlm.folder / "in" / "odd.txt").write_bytes(b"caf\xe9")
    write_rows(srlm.folder / "in" / "rows.jsonl", [*RIVERS, *BAD])
    stopped = srlm("index", "--in", "in", "--out", "c.db")
    assert stopped.code == 3 and "in/odd.txt:1: not UTF-8 text" in stopped.err
    result = srlm("index", "--in", "in", "--out", "c.db", "--on-error", "skip", "--rejects", "bad.jsonl")
    assert result.code == 0 and result.err == "srlm index: 3 added, 6 bad\n"
    assert [row["at"] for row in read_rows(srlm.folder / "bad.jsonl")] == ["in/odd.txt:1"] + [
        f"in/rows.jsonl:{n}" for n in range(4, 9)
    ]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "no --out FILE"),
        (["--out", "-"], "no --out FILE"),
        (["--in", "nowhere", "--out", "c.db"], "cannot open nowhere"),
        (["--in", "empty", "--out", "c.db"], "empty has no file that ends in .txt, .md, .jsonl"),
        (["--in", "rows.jsonl", "--out", "rows.jsonl"], "--out rows.jsonl is the input"),
        (["--in", "rows.jsonl", "--out", "empty"], "empty is a folder"),
        (["--in", "rows.jsonl", "--out", "text.db"], "text.db is not an index"),
        (["--in", "rows.jsonl", "--out", "other.db"], "other.db is not an index"),
        (["--in", "rows.jsonl", "--out", "c.db", "--passage-words", "5", "--overlap-words", "5"], "is not below"),
    ],
)
def test_options_that_do_not_fit_are_refused(srlm: Srlm, args: list[str], said: str) -> None:
    write_rows(srlm.folder / "rows.jsonl", RIVERS)
    (srlm.folder / "empty").mkdir()
    (srlm.folder / "text.db").write_text("words " * 400)
    sqlite3.connect(srlm.folder / "other.db").execute("CREATE TABLE t (x)")
    result = srlm("index", *args)
    assert result.code == 2 and said in result.err and len(result.err.splitlines()) == 1, result.err
    assert not (srlm.folder / "c.db").exists() and (srlm.folder / "text.db").read_text() == "words " * 400


def test_a_killed_first_run_leaves_no_index_and_can_be_run_again(srlm: Srlm) -> None:
    process = srlm.start("index", "--out", "c.db")
    process.stdin.write(as_lines(RIVERS).encode())
    end = time.monotonic() + 30
    while not (srlm.folder / "c.db.part").exists():
        assert time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not (srlm.folder / "c.db").exists()
    assert srlm("index", "--out", "c.db", stdin=as_lines(RIVERS)).rows[0]["documents"] == 3
    assert {path.name for path in srlm.folder.iterdir()} == {"c.db"}


def test_a_file_that_is_no_index_is_not_searched(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("words " * 400)
    for path, said in ((tmp_path / "text.db", "not an index"), (tmp_path / "nowhere.db", "no such file")):
        with pytest.raises(OptionError, match=said):
            Corpus(str(path))
    assert not (tmp_path / "nowhere.db").exists()


def test_an_index_without_documents_finds_nothing(srlm: Srlm) -> None:
    result = srlm("index", "--out", "c.db", "--quiet")
    assert result.code == 0 and result.err == "" and result.rows[0]["documents"] == 0
    assert search(str(srlm.folder / "c.db"), "anything", 3) == []


def test_a_file_without_a_heading_is_titled_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "plain.md").write_text("#hashtag words")
    assert document_of_file(str(tmp_path / "plain.md")).title == "plain"
