"""Criteria from ranked replies: what is read in an answer, which criteria are kept, and what is written."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from helpers import Record, Srlm, as_lines, read_json, read_rows, write_rows
from srlm_cli import records, templates
from srlm_cli.commands.make_rubric import as_template, told
from srlm_cli.engines.base import Completion, Request, Sampling
from srlm_cli.errors import EngineError
from srlm_cli.evaluate import rubric as measure
from srlm_cli.evaluate.rubric import Prompt
from srlm_cli.stages import make_rubric as stage
from srlm_cli.stages.judge import JudgeOptions
from srlm_cli.templates.criteria import Criterion, as_toml

WRITTEN = """ Right: The reply states only what is right.
2. **Kind**: The reply is kind to the user.
3. Wrong: The reply states something that is wrong.
4. Lucky: The reply has luck on its side.
What else could it be?
5. Right: The reply states only what is right, always.
6. Cut: The reply was"""


def ranked_rows(count: int) -> list[Record]:
    """Rows in which the better reply is right, or, in each third row, kind; the others have one fault more."""
    rows = []
    for n in range(count):
        better, worse = ("It is kind.", "It is.") if n % 3 == 0 else ("It is right.", "It is wrong.")
        texts = [f"{better} {n}", f"{worse} {n}"]
        replies = [{"text": text, "rank": rank} for rank, text in enumerate(texts)]
        rows.append(records.ranked_record({"prompt": f"Question {n}?", "responses": replies[:: 1 - n % 2 * 2]}))
    return rows


class Scripted:
    """A model that writes `WRITTEN`, and a judge that finds a criterion where its name is in the reply."""

    name, model = "hf", "scripted"

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            self.asked.append(request)
            text = request.messages[-1]["content"]
            if request.choices:
                [name] = re.findall(r"\"(\w+)\": \{\"reason", request.prefix)[-1:]
                reply = re.search(r"<reply>\n(.*?)\n</reply>", text)[1]
                likely = 0.9 if name.lower() in reply else 0.1
                likely = Random(reply).random() if name == "Lucky" else likely
                yield Completion(["yes" if likely > 0.5 else "no"], ["stop"], 3, 1, [1 - likely, likely], 1.0)
            elif request.prefix == "1.":
                yield Completion([WRITTEN], ["length"], 50, 40)
            else:
                yield Completion(["So." for _ in request.seeds], ["stop"] * len(request.seeds), 5, 2)


def options(count: int = 4, own: tuple[Criterion, ...] = (), score: str = "expected") -> stage.RubricOptions:
    judging = JudgeOptions(templates.load_judge("criteria"), 1, Sampling(), 0, score=score)
    writing = templates.load("new_criteria", fields={"comparisons", "count"})
    return stage.RubricOptions(count, count, 2, "yes/no", writing, Sampling(), 0, judging, own)


def run(rows: list[Record], engine: Scripted, opts: stage.RubricOptions, kept: list[Record] = (), done: int = 0):
    """Return the parts, the trial, what was chosen, and all outcomes of a run."""
    parts, trial, chosen = stage.parts_of(rows, 0, bool(opts.count)), stage.Trial(), []

    def choose(trial: stage.Trial) -> stage.Rubric:
        prompts = measure.prompts_of(parts.chosen_by, trial.found)
        chosen.append(measure.choose(prompts, tuple(trial.candidates), 5))
        return chosen[0].rubric

    outcomes = list(stage.make_rubric(parts, engine, opts, choose, trial, kept, done))
    return parts, trial, chosen[0], outcomes


# --- which criteria are kept -------------------------------------------------------------------


def test_useful_criteria_are_kept_useless_and_harmful_ones_are_not() -> None:
    parts, trial, chosen, outcomes = run(ranked_rows(90), Scripted(), options())
    assert [one.name for one in trial.candidates] == ["Right", "Kind", "Wrong", "Lucky"]
    assert {one.name: one.weight for one in chosen.rubric} == {"Right": 1, "Kind": 1}
    kinds = sum("kind" in row["responses"][0]["text"] + row["responses"][1]["text"] for row in parts.chosen_by)
    assert chosen.alone["Right"] == pytest.approx((30 - kinds / 2) / 30)
    assert chosen.alone["Kind"] == pytest.approx((30 + kinds) / 60)
    assert chosen.alone["Wrong"] == pytest.approx(kinds / 60) and abs(chosen.alone["Lucky"] - 0.5) < 0.25
    assert chosen.together == 1.0
    found, longer = measure.agreement(trial, parts.measured)
    assert (found["value"], found["n"], found["ci_low"], found["ci_high"]) == (1.0, 30, 1.0, 1.0)
    assert longer["metric"] == "longest_wins" and 0 < longer["value"] < 1
    dropped = sum((Counter(outcome.dropped) for outcome in outcomes), Counter())
    assert dropped == {"lines cut off": 1, "lines without a criterion": 1, "criteria over the number wanted": 1}
    assert len(outcomes) == 1 + 4 * 60 + 60  # an answer with criteria, each reply by each of them, the last part


def test_the_example_of_the_template_is_no_criterion() -> None:
    class Copies(Scripted):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for request in requests:
                example = request.messages[-1]["content"].split("1. ")[-1]
                yield Completion([f"{example}\n2. Right: The reply states only what is right."], ["stop"], 50, 40)

    candidates: list[Criterion] = []
    outcomes = list(stage.write_criteria(ranked_rows(4), Copies(), options(count=1), candidates, 0))
    assert [one.name for one in candidates] == ["Right"]
    assert outcomes[0].dropped == {"near-duplicate criteria": 1}


def test_what_the_model_is_shown_and_what_is_measured_on_are_different_rows() -> None:
    engine, rows = Scripted(), ranked_rows(90)
    parts, _, _, _ = run(rows, engine, options())
    shown = [request.messages[-1]["content"] for request in engine.asked if request.prefix == "1."]
    numbers = {int(n) for text in shown for n in re.findall(r"Question (\d+)\?", text)}
    in_part = [
        {int(row["prompt"].split()[1][:-1]) for row in part} for part in (parts.shown, parts.chosen_by, parts.measured)
    ]
    assert numbers and numbers <= in_part[0]
    assert [len(part) for part in in_part] == [30, 30, 30] and len(set.union(*in_part)) == 90
    better, worse = (re.findall(rf"The {name} reply:\n<reply>\n(.*)\n", shown[0]) for name in ("better", "worse"))
    assert len(better) == 2 and all("kind" in text or "right" in text for text in better)
    assert not any("kind" in text or "right" in text for text in worse)
    judged = [request.messages[-1]["content"] for request in engine.asked if request.choices]
    by_two = {
        int(n)
        for text in judged
        if "- Right:" in text and "- Kind:" in text
        for n in re.findall(r"Question (\d+)", text)
    }
    assert by_two == in_part[2]


def test_a_run_resumes_after_any_outcome() -> None:
    rows, opts = ranked_rows(30), options()
    whole = run(rows, Scripted(), opts)
    for done in (0, 1, 2, 30, 81, len(whole[3])):
        kept = [row for outcome in whole[3][:done] for row in outcome.rows]
        again = run(rows, Scripted(), opts, kept, done)
        assert again[1:3] == whole[1:3]
        assert [outcome.rows for outcome in again[3]] == [outcome.rows for outcome in whole[3][done:]]


def prompts(*kinds: tuple[int, dict[str, float], dict[str, float]]) -> list[Prompt]:
    """Prompts with a better reply and a worse one: how many, and what was found for each."""
    return [Prompt([1.0, 0.0], [better, worse], [1, 1]) for count, better, worse in kinds for _ in range(count)]


def criteria(*names: str) -> tuple[Criterion, ...]:
    return tuple(Criterion(name, "It is so.", ("no", "yes"), weight=7.0) for name in names)


def test_a_criterion_that_counts_more_is_added_again() -> None:
    made = prompts(
        (12, {"a": 1, "b": 0}, {"a": 0, "b": 0}),
        (6, {"a": 1, "b": 0}, {"a": 0, "b": 1}),
        (20, {"a": 0, "b": 1}, {"a": 0, "b": 0}),
    )
    found = measure.choose(made, criteria("b", "a"), 5)
    assert [(one.name, one.weight) for one in found.rubric] == [("a", 2.0), ("b", 1.0)]
    assert found.alone == {"a": 28 / 38, "b": 26 / 38} and found.together == 1.0
    [only] = measure.choose(made, criteria("b", "a"), 1).rubric
    assert only.name == "a"


def test_a_gain_by_chance_is_no_gain() -> None:
    """Ten criteria at random, forty times: the best of them is taken for a useful one in at most one of twenty."""
    names, kept = [f"c{n}" for n in range(10)], 0
    for trial in range(40):
        draw = Random(trial)
        made = [
            Prompt([1.0, 0.0], [{name: draw.random() for name in names} for _ in range(2)], [1, 1]) for _ in range(40)
        ]
        kept += bool(measure.choose(made, criteria(*names), 5).rubric)
    assert kept <= 2


def test_what_does_not_apply_is_left_out_and_what_is_unreadable_is_a_miss() -> None:
    weights = {"a": 2, "b": 1}
    assert measure.mean({"a": 1.0, "b": 0.0}, weights) == pytest.approx(2 / 3)
    assert measure.mean({"b": 0.25}, weights) == 0.25
    assert measure.mean({}, weights) is None and measure.mean({"a": None, "b": 1.0}, weights) is None
    assert measure.right_pairs(prompts((1, {"a": 1.0}, {"a": None}), (1, {"a": 0.5}, {"a": 0.5})), {"a": 1}) == [0, 0.5]


# --- what is read in an answer -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("On topic: The reply is about it.", ("On topic", "The reply is about it.")),
        (" 12) Tone - how friendly it is", ("Tone", "how friendly it is")),
        ("- **Right facts:** What it states is so.", ("Right facts", "What it states is so.")),
        ('* "Short" — it is not long', ("Short", "it is not long")),
        ("1.Clarity: It is well ordered: first things first.", ("Clarity", "It is well ordered: first things first.")),
        ("well-ordered: Its parts follow.", ("well-ordered", "Its parts follow.")),
        ("正確さ: 回答の内容は正しい。", ("正確さ", "回答の内容は正しい。")),
        ("Here are the criteria:", None),
        ("Tone: good", None),
        ("The reply should answer the question that was asked of it: it does so.", None),
        ("The reply is kind.", None),
        ("", None),
        ("a\\b: The reply is kind.", None),
    ],
)
def test_a_line_is_a_criterion_or_none(line: str, wanted: tuple[str, str] | None) -> None:
    found = stage.criterion_in(line, 4)
    assert (found and (found.name, found.description)) == wanted
    assert found is None or found.values == ("0", "1", "2", "3", "4")


def test_a_refused_prompt_ends_the_run() -> None:
    class Refuses(Scripted):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            yield from (Completion([""], ["template-refused"], 0, 0, why="No such role.") for _ in requests)

    with pytest.raises(EngineError, match="No such role"):
        run(ranked_rows(30), Refuses(), options())


def test_rows_without_an_order_are_counted_and_a_prompt_is_in_one_part() -> None:
    rows = ranked_rows(20)
    again = [{**row, "id": f"again {n}"} for n, row in enumerate(rows)]
    odd = [
        {"responses": [{"text": "a", "rank": 0}]},
        {"responses": [{"text": "a", "rank": 1}, {"text": "b", "rank": 1}]},
        {"responses": [{"text": "a", "score": 1}, {"text": " ", "score": 0}]},
    ]
    odd = [records.ranked_record({"prompt": "Odd?", **row}) for row in odd]
    made = stage.parts_of([*rows, *odd, *again], 0, True)
    named = [{row["prompt"] for row in part} for part in (made.shown, made.chosen_by, made.measured)]
    assert sum(map(len, named)) == 20 and sorted(map(len, named)) == [6, 7, 7] and made.unordered == 3
    assert len(made.shown) + len(made.chosen_by) + len(made.measured) + made.unordered == 43
    backwards = stage.parts_of([*again, *rows][::-1], 0, True)
    assert {row["prompt"] for row in backwards.measured} == named[2]
    assert stage.parts_of(rows, 1, True) != stage.parts_of(rows, 0, True)
    assert stage.parts_of(rows, 0, False).shown == []


# --- what is written ---------------------------------------------------------------------------


def test_a_rubric_is_a_template_with_the_same_criteria(tmp_path: Path) -> None:
    made = (
        Criterion("on topic", 'It says "so",\tand C:\\ is \x7f a path.', ("no", "yes")),
        Criterion("型", "Как это читается…", ("0", "1", "2", "3", "4"), 3.0, True),
        Criterion("tone", "How it reads.", ("rude", "neutral", "kind"), 0.5),
    )
    (tmp_path / "own.toml").write_text(as_template(["a\nb = 3\x7f", "c"], "criteria", made))
    found = templates.load_judge(str(tmp_path / "own.toml"))
    assert [one.name for one in found.criteria] == ["on topic", "型", "tone"]
    assert found.criteria[1:] == made[1:]
    assert found.criteria[0].description == 'It says "so", and C:\\ is \x7f a path.'
    assert as_toml(found.criteria[2]).count("not_applicable") == 0 and "weight = 0.5" in as_toml(found.criteria[2])


ECHO = ("--engine", "echo", "--model", "longest", "--num-candidates", "0", "--criteria", "criteria")


def by_length(count: int, better_is_longer: bool = True) -> list[Record]:
    texts = ["A long reply, with more of it.", "Short."][:: 1 if better_is_longer else -1]
    return [
        {"prompt": f"Ask {n}?", "responses": [{"text": text, "rank": rank} for rank, text in enumerate(texts)]}
        for n in range(count)
    ]


def test_a_rubric_says_what_it_was_made_from_and_judges(srlm: Srlm) -> None:
    rows = [*by_length(24), {"prompt": "Tie?", "responses": [{"text": "a", "rank": 0}, {"text": "b", "rank": 0}]}, "{"]
    done = srlm(
        "make-rubric",
        *ECHO,
        "--on-error",
        "skip",
        "--out",
        "rubric.toml",
        "--asked",
        "asked.jsonl",
        stdin=as_lines(rows),
    )
    assert done.code == 0 and done.out == ""
    assert (
        "25 ranked rows: 12 rows to choose by, 12 rows to measure on, 1 dropped: no order by people, 1 dropped: bad row"
        in done.err
    )
    assert "1 of 4 criteria kept: helpfulness (weight 1, alone 1.000)" in done.err
    assert "agreement on 12 rows that were not used before: 1.000 (95% interval 1.000 to 1.000, 12 pairs)" in done.err
    text = (srlm.folder / "rubric.toml").read_text()
    assert "# agreement on 12 rows that were not used before: 1.000" in text and "0 ranked rows" in text
    assert 'name = "helpfulness"' in text and "scale = 4" in text
    counts = read_json(srlm.folder / "rubric.toml.meta.json")["counts"]
    assert counts["read"] == 25 == counts["counts"]["rows to choose by"] + counts["counts"]["rows to measure on"] + 1
    assert counts["dropped"] == {"no order by people": 1, "bad row": 1} and counts["kept"] == 1
    assert len(read_rows(srlm.folder / "asked.jsonl")) == 4 * 24 + 24
    judged = srlm(
        "judge", "--engine", "echo", "--template", "rubric.toml", stdin=as_lines([{"prompt": "p", "response": "r"}])
    )
    assert judged.code == 0 and list(judged.rows[0]["criteria"][0]) == ["helpfulness"]
    printed = srlm("make-rubric", *ECHO, "--quiet", stdin=as_lines(rows[:24]))
    assert (printed.code, printed.err) == (0, "") and 'extends = "criteria"' in printed.out


def test_an_agreement_on_one_prompt_has_no_interval() -> None:
    chosen = SimpleNamespace(rubric=criteria("Right"), alone={"Right": 1.0}, together=1.0)
    trial = SimpleNamespace(candidates=chosen.rubric)
    found = {"value": 1.0, "n": 3, "ci_low": None, "ci_high": None}
    *_, line = told([found, found], chosen, trial, SimpleNamespace(measured=[{}]))
    assert "1.000 (no interval: one prompt, 3 pairs); the longer reply: 1.000; one prompt is not enough" in line


def test_without_a_helpful_criterion_nothing_is_written(srlm: Srlm) -> None:
    (srlm.folder / "rubric.toml").write_text("of before")
    given = ("make-rubric", *ECHO, "--out", "rubric.toml", "--quiet")
    done = srlm(*given, stdin=as_lines(by_length(24, better_is_longer=False)))
    assert done.code == 4 and len(done.err.splitlines()) == 1
    assert (
        "none of 4 criteria raises the agreement with people by more than chance (the best: accuracy, 0.500)"
        in done.err
    )
    assert (srlm.folder / "rubric.toml").read_text() == "of before"
    assert not list(srlm.folder.glob("rubric.toml.*"))
    silent = srlm("make-rubric", "--engine", "echo", "--quiet", stdin=as_lines(by_length(30)))
    assert silent.code == 4 and "no criteria could be read" in silent.err and silent.out == ""


@pytest.mark.parametrize(
    ("more", "count", "code", "said"),
    [
        (ECHO, 19, 3, "<stdin>: 19 prompts with replies that people put in an order, expected at least 20"),
        (("--engine", "echo"), 29, 3, "expected at least 30 (10 for each of 3 parts)"),
        (ECHO, 0, 3, "0 prompts"),
        (("--engine", "echo", "--num-candidates", "0"), 30, 2, "no criteria to try"),
        (("--engine", "echo", "--criteria", "additive"), 30, 2, "template additive has no criteria"),
        (("--engine", "echo", "--scale", "0"), 30, 2, "expected yes/no, or a number from 1 to 100"),
        ((*ECHO, "--asked", "-"), 30, 2, "--asked and --out are both stdout"),
        ((*ECHO, "--write-template", "new_prompt"), 30, 2, "its text has to use the fields $comparisons, $count"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(srlm: Srlm, more: tuple[str, ...], count: int, code: int, said: str) -> None:
    done = srlm("make-rubric", *more, "--quiet", stdin=as_lines(by_length(count)))
    assert done.code == code and said in done.err and len(done.err.splitlines()) == 1, done.err


def test_a_killed_run_resumes_from_the_file_of_what_was_asked(srlm: Srlm) -> None:
    write_rows(srlm.folder / "ranked.jsonl", by_length(24))
    argv = ("make-rubric", *ECHO, "--in", "ranked.jsonl", "--quiet", "--asked", "asked.jsonl", "--out")
    assert srlm(*argv, "whole.toml").code == 0
    whole = (srlm.folder / "asked.jsonl").read_bytes()
    (srlm.folder / "asked.jsonl").unlink()
    # 200 completions take longer than the time between two checkpoints
    srlm.mortal(200, signal.SIGKILL, *argv, "rubric.toml")
    assert (srlm.folder / "asked.jsonl.part").exists() and not (srlm.folder / "rubric.toml").exists()
    other = srlm(*argv, "rubric.toml", "--score", "text")
    assert other.code == 2 and "score 'expected' -> 'text'" in other.err
    again = srlm(*[word for word in argv if word != "--quiet"], "rubric.toml")
    assert again.code == 0 and "resuming after" in again.err
    assert (srlm.folder / "asked.jsonl").read_bytes() == whole
    assert (srlm.folder / "rubric.toml").read_bytes() == (srlm.folder / "whole.toml").read_bytes()
