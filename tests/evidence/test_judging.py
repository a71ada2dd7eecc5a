"""Judging with passages: what is searched for, what the judge reads, what the rows say, and what is refused."""

from __future__ import annotations

import re
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from helpers import ROOT, ListEngine, Record, Srlm, as_lines, asked_text, read_json, read_rows, write_rows
from srlm_cli import templates
from srlm_cli.engines.base import Sampling
from srlm_cli.errors import OptionError, SrlmError
from srlm_cli.evidence import program as programs
from srlm_cli.evidence.documents import Document
from srlm_cli.evidence.index import open_index
from srlm_cli.evidence.program import Program
from srlm_cli.evidence.search import Corpus
from srlm_cli.records import ranked_record, response_record
from srlm_cli.stages.evidence import EvidenceOptions
from srlm_cli.stages.judge import JudgeOptions, judge
from srlm_cli.stages.make_eft import EftOptions, accept, hindsight
from srlm_cli.stages.rank_scores import RankScores
from srlm_cli.stages.settle import SettleOptions, judge_until_settled

FACTS = {
    "france": ("France", "The capital of France is Paris."),
    "spain": ("", "The capital of Spain is Madrid."),
    "iron": ("Iron", "Iron has the number 26. Its $response is $evidence."),
}
ROWS = [
    {"prompt": "What is the capital of France?", "response": "Paris.", "k": 0},
    {"prompt": "What is the capital of France?", "response": "Madrid.", "k": 1},
    {"prompt": "Which number has iron?", "response": "26.", "k": 0},
    {"prompt": "Zzz?", "response": "Qqq.", "k": 0},
    {"prompt": "What of Spain?", "response": "", "k": 0},
]
EVIDENCE, SHORT = templates.load_judge("evidence"), templates.load_judge("evidence_score_only")
QUERY = templates.load("query", fields={"prompt", "response"})
ECHO = ("judge", "--engine", "echo", "--template", "evidence", "--quiet")


def fill(path: Path, facts: dict[str, tuple[str, str]] = FACTS) -> Path:
    """Make an index, or add to it."""
    with open_index(str(path), 120, 20) as made:
        for source, (title, text) in facts.items():
            made.add(Document(source, title, text))
        made.finish()
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return fill(tmp_path / "corpus.db")


def rows(*some: Record) -> list[Record]:
    return [response_record(row) for row in some or ROWS]


def judged(path: Path, answers: list[list[str]], some: list[Record], **more) -> tuple[list[Record], ListEngine]:
    """Return the rows that a judge with passages of an index makes, and the engine that was asked."""
    engine = ListEngine(answers)
    found = EvidenceOptions(Corpus(str(path)), {"index": "it"}, **more)
    options = JudgeOptions(EVIDENCE, 1, Sampling(), seed=0, evidence=found)
    return [row for outcome in judge(some, engine, options) for row in outcome.rows], engine


# --- what is found, shown and written ---------------------------------------------------------


def test_the_judge_reads_what_the_row_then_has(corpus: Path) -> None:
    [row], engine = judged(corpus, [["Right. Score: 5"]], rows(ROWS[0]), passages=2)
    assert row["evidence"] == [
        {"id": 1, "source": "france", "title": "France", "text": FACTS["france"][1], "rank": 1},
        {"id": 2, "source": "spain", "text": FACTS["spain"][1], "rank": 2},
    ]
    shown = f"<passages>\n1. France: {FACTS['france'][1]}\n2. {FACTS['spain'][1]}\n</passages>"
    assert shown in asked_text(engine.asked[0])
    assert row["score"] == 5 and row["judge"]["evidence"] == {"index": "it"} and "evidence_query" not in row


def test_a_passage_is_data_and_no_template(corpus: Path) -> None:
    [row], engine = judged(corpus, [["Score: 1"]], rows(ROWS[2]), passages=1)
    assert "Its $response is $evidence." in asked_text(engine.asked[0]) and row["evidence"][0]["source"] == "iron"


def test_nothing_found_is_said_and_counted_and_no_reply_is_not_looked_up(corpus: Path) -> None:
    engine = ListEngine([["Score: 1"]])
    found = EvidenceOptions(Corpus(str(corpus)), {})
    outcomes = list(judge(rows(*ROWS[3:]), engine, JudgeOptions(EVIDENCE, 1, Sampling(), 0, evidence=found)))
    assert [outcome.rows[0]["evidence"] for outcome in outcomes] == [[], []]
    assert [outcome.counts.get("without evidence") for outcome in outcomes] == [1, 0]
    assert "<passages>\n(nothing was found)\n</passages>" in asked_text(engine.asked[0]) and len(engine.asked) == 1


@pytest.mark.parametrize(
    ("query", "sources"), [("prompt", ["france"]), ("response", ["spain"]), ("both", ["france", "spain"])]
)
def test_what_is_searched_for(corpus: Path, query: str, sources: list[str]) -> None:
    row = {
        "prompt": [{"role": "system", "content": "iron"}, {"role": "user", "content": "France?"}],
        "response": "Madrid",
    }
    [made], _ = judged(corpus, [["Score: 1"]], rows(row), query=query)
    assert [found["source"] for found in made["evidence"]] == sources


def test_the_judge_can_write_the_query(corpus: Path) -> None:
    answers = [['\n "Spain"\nand more'], [" "], ["Score: 2"], ["Score: 3"]]
    made, engine = judged(corpus, answers, rows(ROWS[2], ROWS[0], ROWS[4]), query="model", query_template=QUERY)
    assert [row.get("evidence_query") for row in made] == ["Spain", ROWS[0]["prompt"], None]
    assert [row["evidence"][0]["source"] for row in made[:2]] == ["spain", "france"]
    assert [row["score"] for row in made] == [2, 3, None]
    first, _, third, _ = engine.asked  # all queries come first
    assert "the words to search for" in asked_text(first) and first.sampling.temperature == 0
    assert FACTS["spain"][1] in asked_text(third)


def test_tokens_of_queries_are_counted(corpus: Path) -> None:
    engine = ListEngine([["Spain"], ["Score: 2"]])
    found = EvidenceOptions(Corpus(str(corpus)), {}, query="model", query_template=QUERY)
    [outcome] = judge(rows(ROWS[0]), engine, JudgeOptions(EVIDENCE, 1, Sampling(), 0, evidence=found))
    assert (outcome.tokens_in, outcome.tokens_out) == (20, 2)


def test_replies_to_one_prompt_are_looked_up_once() -> None:
    class Counting:
        asked: list[str] = []

        def search(self, query: str, count: int) -> list:
            self.asked.append(query)
            return []

    found = EvidenceOptions(Counting(), {})
    options = JudgeOptions(EVIDENCE, 1, Sampling(), 0, evidence=found)
    assert len(list(judge(rows(*ROWS[:3]), ListEngine([["Score: 1"]] * 3), options))) == 3
    assert found.retriever.asked == [ROWS[0]["prompt"], ROWS[2]["prompt"]]


def test_force_score_and_expected_ask_about_the_same_passages(corpus: Path) -> None:
    engine = ListEngine([["Hm."], [0.0, 0.0, 0.0, 0.5, 0.5, 0.0]])
    found = EvidenceOptions(Corpus(str(corpus)), {}, 1)
    options = JudgeOptions(EVIDENCE, 1, Sampling(), 0, True, "expected", evidence=found)
    [outcome] = judge(rows(ROWS[0]), engine, options)
    assert outcome.rows[0]["score"] == 3.5 and FACTS["france"][1] in asked_text(engine.asked[1])
    assert engine.asked[0].follow_up.options.evidence is None  # it goes to other processes


# --- training rows ----------------------------------------------------------------------------

RANKED = ranked_record(
    {"prompt": ROWS[0]["prompt"], "responses": [{"text": "Paris.", "rank": 0}, {"text": "Madrid.", "rank": 1}]}
)


def eft(path: Path, **more) -> EftOptions:
    options = {"rank_scores": RankScores(0, 5, [0, 1], (0, 1)), **more}
    found = EvidenceOptions(Corpus(str(path)), {}, 1, options.pop("query", "prompt"), QUERY)
    return EftOptions(EVIDENCE, Sampling(), 0, evidence=found, **options)


def test_training_rows_show_the_passages_that_the_judge_is_shown(corpus: Path) -> None:
    made, engine = judged(corpus, [["Score: 5"], ["Score: 0"]], rows(*ROWS[:2]), passages=1)
    asked = [[dict(turn) for turn in request.messages] for request in engine.asked]
    [by_rank] = hindsight([RANKED], None, eft(corpus))
    [accepted] = accept([RANKED], ListEngine([["Right. Score: 5"], ["Wrong. Score: 0"]]), eft(corpus, num_judgements=1))
    for outcome in (by_rank, accepted):
        assert [row["prompt"] for row in outcome.rows] == asked
        assert [row["evidence"] for row in outcome.rows] == [row["evidence"] for row in made]
        assert outcome.counts["without evidence"] == 0


@pytest.mark.parametrize("query", ["prompt", "model"])
def test_reasons_of_hindsight_are_written_with_the_passages(corpus: Path, query: str) -> None:
    reasons = templates.load("hindsight_evidence", fields={"prompt", "response", "score", "high", "evidence"})
    answers = [["Paris France"], ["Madrid Spain"]] * (query == "model") + [["It is so."], ["It is not so."]]
    engine = ListEngine(answers)
    [outcome] = hindsight([RANKED], engine, eft(corpus, query=query, reason_template=reasons))
    assert [row["completion"][0]["content"].split("\n")[0] for row in outcome.rows] == ["It is so.", "It is not so."]
    shown = [FACTS["france"][1], FACTS["spain" if query == "model" else "france"][1]]
    assert all(text in asked_text(request) for text, request in zip(shown, engine.asked[-2:], strict=True))
    assert [row["evidence"][0]["text"] for row in outcome.rows] == shown


# --- a program of the user's own --------------------------------------------------------------

SEARCH = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    found = [{"text": f"About {asked['query']} ({n})", "source": "s", "id": n} for n in range(9)]
    print(json.dumps({"id": asked["id"], "passages": found}), flush=True)
"""


def own_program(folder: Path, code: str = SEARCH) -> str:
    path = folder / "search.py"
    path.write_text(code)
    return f"{sys.executable} {path}"


def test_a_program_finds_passages(tmp_path: Path) -> None:
    search = Program(own_program(tmp_path))
    assert [found.text for found in search.search("x\ny", 2)] == ["About x\ny (0)", "About x\ny (1)"]
    assert (search.search("z", 1)[0].id, search.search("z", 1)[0].source) == (0, "s")
    assert search.close() == ""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit(3)", "exit code 3 before it answered query 0"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9 before it answered query 0"),
        ("print('{', flush=True); input()", "the answer to query 0"),
        ('print(\'{"id": 1, "passages": []}\', flush=True); input()', "expected the id 0"),
        ('print(\'{"id": false, "passages": []}\', flush=True); input()', "expected the id 0"),
        ("print('[]', flush=True); input()", "expected {"),
        ("print('{\"id\": 0}', flush=True); input()", "expected {"),
        ('print(\'{"id": 0, "passages": ["a"]}\', flush=True)', "to have a `text`"),
        ('print(\'{"id": 0, "passages": [{"text": " "}]}\', flush=True)', "to have a `text`"),
        ('print(\'{"id": 0, "passages": [{"text": "a", "title": 1}]}\', flush=True)', "expected `title`"),
        ('print(\'{"id": 0, "passages": [{"text": "a", "id": 1.5}]}\', flush=True)', "expected `id`"),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\n'); sys.stdout.flush(); input()", "the answer to query 0"),
        ("print('Loading the index.', flush=True); input()", "other messages belong on its stderr (got Loading the"),
        ("import sys; print(sys.stdin.read())", "no answer to query 0 in 0.3 seconds (it has to write one line"),
    ],
)
def test_a_program_that_fails_or_answers_wrong_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    monkeypatch.setattr(programs, "TIMEOUT", 0.3 if "read()" in code else 60)
    monkeypatch.setattr(programs, "PATIENCE", 5)
    search = Program(own_program(tmp_path, code))
    with pytest.raises(SrlmError) as error:
        search.search("x", 1)
    assert said in str(error.value) and "\n" not in str(error.value)
    with suppress(SrlmError):  # the answer that came too late is one more than was asked for
        search.close()
    assert search.process.poll() is not None


def test_no_line_is_waited_for_after_the_end_of_a_program(tmp_path: Path) -> None:
    search = Program(own_program(tmp_path, "import sys; sys.exit(3)"))
    with pytest.raises(SrlmError):
        search.search("x", 1)
    assert search.answers.get_nowait() is None  # where it is missing, `close` waits for it as long as for a line


def test_a_program_that_fails_after_its_answers_is_reported(tmp_path: Path) -> None:
    search = Program(own_program(tmp_path, SEARCH + "\nsys.exit(4)"))
    search.search("x", 1)
    assert search.close().endswith("it ended with exit code 4")


@pytest.mark.parametrize("line", ['{"id": 0, "passages": []}', "done"])
def test_a_program_that_answers_more_than_it_is_asked_is_an_error(srlm: Srlm, tmp_path: Path, line: str) -> None:
    command = own_program(tmp_path, SEARCH + f"\nprint({line!r})")
    search = Program(command)
    search.search("x", 1)
    with pytest.raises(SrlmError, match="more answers than queries, which were 1"):
        search.close()
    done = srlm(*ECHO, "--evidence-cmd", command, stdin=as_lines(ROWS[:1]))
    assert done.code == 1 and "search.py: more answers than queries" in done.err
    blank = Program(own_program(tmp_path, SEARCH + "\nprint()"))
    blank.search("x", 1)
    assert blank.close() == ""


@pytest.mark.parametrize("command", ["", "no-such-program-anywhere --x", "'open"])
def test_a_program_that_is_not_there_is_a_usage_error(command: str) -> None:
    with pytest.raises(OptionError, match="--evidence-cmd"):
        Program(command)


def test_a_program_that_answers_more_than_a_pipe_holds_does_not_hang(tmp_path: Path) -> None:
    big = SEARCH.replace("range(9)", "range(1)").replace("About", "About " + "x" * 300_000)
    search = Program(own_program(tmp_path, big))
    assert all(len(search.search("y" * 200_000, 1)[0].text) > 500_000 for _ in range(2))
    assert search.close() == ""


# --- the commands -----------------------------------------------------------------------------


def test_the_program_of_the_docs_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    search = Program(own_program(tmp_path, code))
    assert [found.text for found in search.search("capital of france", 1)] == ["Paris is the capital of France."]
    assert search.close() == ""


def test_judge_with_a_program(srlm: Srlm, tmp_path: Path) -> None:
    made = srlm(*ECHO, "--evidence-cmd", own_program(tmp_path), "--evidence-passages", "2", stdin=as_lines(ROWS[:2]))
    assert made.code == 0, made.err
    assert [[found["rank"] for found in row["evidence"]] for row in made.rows] == [[1, 2]] * 2
    assert made.rows[0]["judge"]["evidence"]["command"].endswith("search.py")
    broken = SEARCH.replace("    found", "    if asked['id'] > 1: sys.exit(7)\n    found")
    argv = (*ECHO, "--evidence-cmd", own_program(tmp_path, broken), "--evidence-query", "both", "--out", "o.jsonl")
    stopped = srlm(*argv, stdin=as_lines(ROWS[:4]))
    assert stopped.code == 1 and "exit code 7 before it answered query 2" in stopped.err
    assert stopped.err.count("\n") == 1 and not (srlm.folder / "o.jsonl").exists()
    assert len(read_rows(srlm.folder / "o.jsonl.part")) == 2


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("--template", "additive", "--evidence", "corpus.db"), 2, "additive has no $evidence"),
        (("--template", "evidence"), 2, "--evidence INDEX, --evidence-cmd COMMAND, or --template additive"),
        (("--template", "evidence", "--evidence", "none.db"), 2, "`srlm index` makes an index"),
        (("--template", "evidence", "--evidence", "rows.jsonl"), 2, "rows.jsonl is not an index"),
        (("--template", "evidence", "--evidence", "corpus.db", "--evidence-cmd", "cat"), 2, "one of the two"),
        (("--template", "evidence", "--evidence", "corpus.db", "--model", "rules"), 2, "--model rules"),
        (("--template", "evidence", "--evidence-cmd", "nothing-here"), 2, "no program 'nothing-here'"),
    ],
)
def test_what_does_not_fit_together_is_refused(srlm: Srlm, corpus: Path, argv: tuple, code: int, said: str) -> None:
    write_rows(srlm.folder / "rows.jsonl", ROWS)
    result = srlm("judge", "--in", "rows.jsonl", "--engine", "echo", *argv)
    assert result.code == code and said in result.err and result.err.count("\n") == 1 and not result.out
    if "rules" not in argv:
        write_rows(srlm.folder / "rows.jsonl", [RANKED])
        result = srlm("make-eft", "--in", "rows.jsonl", "--method", "hindsight", "--reason", "none", *argv)
        assert result.code == code and result.err.count("\n") == 1


def test_another_corpus_is_another_run(srlm: Srlm, corpus: Path) -> None:
    write_rows(srlm.folder / "rows.jsonl", ROWS)
    argv = (*ECHO, "--in", "rows.jsonl", "--evidence", "corpus.db", "--out", "out.jsonl")
    assert srlm.mortal(2, signal.SIGKILL, *argv).code == -signal.SIGKILL
    before = shutil.copy(corpus, srlm.folder / "moved.db")
    fill(corpus, {"new": ("", "Zzz is the capital of France.")})
    changed = srlm(*argv)
    assert changed.code == 2 and "evidence" in changed.err and "--restart" in changed.err
    moved = srlm(*ECHO, "--in", "rows.jsonl", "--evidence", str(before), "--out", "out.jsonl")  # the same content
    assert moved.code == 0 and len(read_rows(srlm.folder / "out.jsonl")) == len(ROWS)
    known = read_json(srlm.folder / "out.jsonl.meta.json")["fingerprint"]
    assert known["evidence"] == Corpus(str(before)).fingerprint and known["evidence_query"] == "prompt"


def test_a_corpus_that_changes_while_it_is_searched_stops_the_run(corpus: Path) -> None:
    searched = Corpus(str(corpus))
    assert searched.search("France", 1)[0].source == "france"
    fill(corpus)  # nothing new
    assert searched.search("France", 1)[0].source == "france"
    fill(corpus, {"new": ("", "France is large.")})
    with pytest.raises(SrlmError, match="changed while it was searched"):
        searched.search("France", 1)
    assert len(Corpus(str(corpus)).search("France", 5)) == 2


def test_shards_are_the_whole(srlm: Srlm, corpus: Path) -> None:
    write_rows(srlm.folder / "rows.jsonl", ROWS)
    argv = (*ECHO, "--in", "rows.jsonl", "--evidence", "corpus.db", "--evidence-query", "model")
    whole = srlm(*argv).out
    assert "".join(srlm(*argv, "--shard", f"{part}/2").out for part in (1, 2)) == whole != ""


@pytest.mark.parametrize("query", ["both", "model"])
def test_a_range_of_judgements_is_the_beginning_of_all_with_the_same_passages(
    srlm: Srlm, corpus: Path, query: str
) -> None:
    prompts = [f"{row['prompt']} {n}" for row in ROWS[1:4] for n in range(24)]  # more than are judged together
    some = [{"prompt": prompt, "response": f"{k}. Iron", "k": k} for prompt in prompts for k in range(2)]
    write_rows(srlm.folder / "rows.jsonl", [*some, ROWS[4]])
    argv = (*ECHO, "--in", "rows.jsonl", "--evidence", "corpus.db", "--evidence-query", query, "--score", "text")
    ranged = (*argv, "--num-judgements", "2:6", "--settle", "0.7", "--out")
    assert srlm(*argv, "--num-judgements", "6", "--out", "all.jsonl").code == 0
    assert srlm(*ranged, "some.jsonl").code == 0
    every, fewer = read_rows(srlm.folder / "all.jsonl"), read_rows(srlm.folder / "some.jsonl")
    assert {len(row["scores"]) for row in fewer[:-1]} >= {2, 6}
    assert every[0]["evidence_query"] if query == "model" else every[0]["evidence"]
    for whole, begun in zip(every, fewer, strict=True):
        drawn = len(begun["scores"])
        assert begun["judgements"] == whole["judgements"][:drawn] and begun["scores"] == whole["scores"][:drawn]
        assert [begun.get(name) for name in ("id", "evidence", "evidence_query")] == [
            whole.get(name) for name in ("id", "evidence", "evidence_query")
        ]
        assert begun["judge"] == whole["judge"] | {"settle": 0.7}
    requests = sum(len(row["scores"]) - 1 + (query == "model") for row in fewer[:-1])
    assert srlm.mortal(requests - 10, signal.SIGKILL, *ranged, "again.jsonl").code == -signal.SIGKILL
    assert 0 < len(read_rows(srlm.folder / "again.jsonl.part")) < len(fewer)
    assert srlm(*ranged, "again.jsonl").code == 0
    assert read_rows(srlm.folder / "again.jsonl") == fewer
    counts, whole = (read_json(srlm.folder / f"{name}.jsonl.meta.json")["counts"] for name in ("some", "all"))
    assert counts["counts"].get("without evidence") == whole["counts"].get("without evidence")


def test_passages_for_a_range_of_judgements_are_looked_up_once_and_queries_counted(corpus: Path) -> None:
    class Counting(Corpus):
        asked: list[str] = []

        def search(self, query: str, count: int) -> list:
            self.asked.append(query)
            return super().search(query, count)

    queries = [["Spain"], ["France"], ["Iron"]]
    engine = ListEngine([*queries, ["Score: 2"], ["Score: 2"], ["Score: 5"], ["Score: 3"], ["Score: 2"]])
    found = EvidenceOptions(Counting(str(corpus)), {"index": "it"}, 1, "model", QUERY)
    options = SettleOptions(EVIDENCE, 2, Sampling(), 0, evidence=found, first=1)
    two, again = rows(*ROWS[:3]), rows({**ROWS[0], "k": 7})  # the first prompt comes back: it is bad
    france, iron, bad = judge_until_settled([*two, *again], engine, options)
    assert found.retriever.asked == [query for [query] in queries] and bad.bad and not bad.rows
    assert [row["evidence"][0]["source"] for row in france.rows] == ["spain", "france"]
    assert [row["scores"] for row in france.rows] == [[2, 3], [2, 2]] and iron.rows[0]["scores"] == [5]
    assert (france.tokens_in, france.tokens_out) == (60, 6) and france.rows[0]["judge"]["evidence"] == {"index": "it"}
    assert france.counts["without evidence"] == 0


def test_rows_with_evidence_are_read_by_what_comes_after(srlm: Srlm, corpus: Path) -> None:
    rated = [{**row, "human": -row["k"]} for row in ROWS[:2]]
    argv = ("judge", "--engine", "echo", "--model", "longest", "--evidence", "corpus.db", "--score", "expected")
    made = srlm(*argv, "--template", "evidence_score_only", "--quiet", "--out", "judged.jsonl", stdin=as_lines(rated))
    assert made.code == 0, made.err
    pairs = srlm("make-pairs", "--in", "judged.jsonl", "--quiet")
    assert [row["prompt"][0]["content"] for row in pairs.rows] == [ROWS[0]["prompt"]]  # without the passages
    assert pairs.rows[0]["judge"]["evidence"]["query"] == "prompt"
    reward = srlm("eval", "reward", "--in", "judged.jsonl", "--quiet")
    assert reward.code == 0 and any(row["metric"].startswith("pairwise") for row in reward.rows)
    assert srlm("eval", "health", "--in", "judged.jsonl", "--quiet").rows[0]["n"] == 2
    again = srlm("judge", "--in", "judged.jsonl", "--rescore", "--template", "evidence_score_only", "--quiet")
    before = read_rows(srlm.folder / "judged.jsonl")
    assert [(row["evidence"], row["judge"]["evidence"]) for row in again.rows] == [
        (row["evidence"], row["judge"]["evidence"]) for row in before
    ]


def test_the_meta_judge_is_shown_the_passages_of_the_rows(srlm: Srlm, corpus: Path) -> None:
    made = srlm(
        *ECHO, "--evidence", "corpus.db", "--out", "judged.jsonl", "--num-judgements", "4", stdin=as_lines(ROWS[:3])
    )
    assert made.code == 0
    corpus.unlink()
    (srlm.folder / "srlm.toml").write_text('[judge]\ntemplate = "evidence"\nevidence = "corpus.db"\n')
    argv = ("judge", "--meta", "--in", "judged.jsonl", "--engine", "echo", "--quiet")
    meta = srlm(*argv)
    assert srlm("judge", "--rescore", "--in", "judged.jsonl", "--quiet").code == 0
    assert "none such" in srlm("judge", "--in", "judged.jsonl", "--evidence", "none such").err
    assert meta.code == 0 and FACTS["france"][1] in meta.rows[0]["judge_prompt"][0]["content"]
    for wrong in (None, "text", [1], [{"id": 1}], [{"text": "a", "title": 3}]):
        write_rows(srlm.folder / "judged.jsonl", [{**meta.rows[0], "evidence": wrong}])
        assert srlm(*argv).code == 3


def test_show_finds_passages_without_a_model(srlm: Srlm, corpus: Path) -> None:
    argv = ("judge", "--template", "evidence", "--evidence", "corpus.db", "--show", "2")
    shown = srlm(*argv, stdin=as_lines(ROWS))
    assert shown.code == 0 and shown.out.count(FACTS["france"][1]) == 2 and shown.out.count("---") == 2
    written = srlm(*argv, "--engine", "echo", "--evidence-query", "model", stdin=as_lines(ROWS))
    assert written.code == 0 and written.out.count(": user\n") == 2 and "(nothing was found)" in written.out


def test_make_eft_with_evidence(srlm: Srlm, corpus: Path) -> None:
    write_rows(srlm.folder / "ranked.jsonl", [RANKED])
    argv = ("make-eft", "--in", "ranked.jsonl", "--evidence", "corpus.db", "--quiet", "--max-share", "1")
    none = srlm(*argv, "--method", "hindsight", "--reason", "none", "--template", "evidence_score_only")
    assert none.code == 0 and all(FACTS["france"][1] in row["prompt"][0]["content"] for row in none.rows)
    assert len(none.rows) == 2 and all(row["evidence"] for row in none.rows)
    drawn = srlm(*argv, "--engine", "echo", "--num-judgements", "8", "--template", "evidence")
    assert drawn.code == 0 and all(row["evidence"] for row in drawn.rows) and drawn.rows


def test_a_damaged_index_is_one_error_and_no_other(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(200)]
    draw, path = Random(0), tmp_path / "corpus.db"
    fill(path, {str(n): ("t", " ".join(draw.choices(words, k=50))) for n in range(200)})
    whole, ends = path.read_bytes(), []
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 5, 50])):
            at = draw.randrange(100, len(data) - 512)
            data[at : at + 512] = draw.randbytes(512)
        path.write_bytes(data)
        try:
            searched = Corpus(str(path))
            ends += [searched.search(f"{word} w5", 3) for word in words[:9]]
        except SrlmError as error:
            ends.append(str(error))
            assert str(path) in ends[-1]
    assert any("the file is damaged" in end for end in ends)


def test_a_damaged_index_stops_the_run(srlm: Srlm, corpus: Path) -> None:
    data = corpus.read_bytes()
    corpus.write_bytes(data[:100] + bytes(len(data) - 100))
    result = srlm(*ECHO, "--evidence", "corpus.db", stdin=as_lines(ROWS))
    assert result.code in (1, 2) and result.err.count("\n") == 1 and "corpus.db" in result.err
