"""Chat templates in all stages: one that refuses a row, and one that writes the date."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from helpers import ListEngine, Srlm, as_lines, read_json, read_rows, write_rows
from srlm_cli import templates
from srlm_cli.engines import LazyEngine, open_engine
from srlm_cli.engines.base import TEMPLATE_REFUSED, Completion, EngineSpec, Request, Sampling, no_text
from srlm_cli.engines.chat_template import rendered
from srlm_cli.errors import EngineError, OptionError
from srlm_cli.options.common import StreamOptions
from srlm_cli.records import Record, prompt_record, ranked_record, response_record
from srlm_cli.runner.stage import StageRun
from srlm_cli.stages import Outcome, gen_prompts, head_to_head, judge, make_eft, meta_judge, split
from srlm_cli.streams.reader import Reader
from tiny import ALONE, DATE, NO_SYSTEM, TEMPLATE, sequence, tiny_model, with_template

torch.set_num_threads(1)

SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture
def tokenizer(base: Path):
    return AutoTokenizer.from_pretrained(base)


# --- templates that refuse -------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["1", "64"])
def test_sample_keeps_the_rows_before_a_refused_one_and_goes_on_after_it(srlm: Srlm, base: Path, batch: str) -> None:
    model = with_template(base, srlm.folder / "model", NO_SYSTEM + TEMPLATE)
    rows = [{"prompt": f"Ask {n}?"} for n in range(4)]
    argv = [
        "sample",
        "--in",
        "in.jsonl",
        "--model",
        str(model),
        "-n",
        "2",
        "--max-new-tokens",
        "3",
        "--batch-size",
        batch,
    ]
    argv += ["--dtype", "float32"]
    write_rows(srlm.folder / "in.jsonl", [*rows[:2], {"prompt": SYSTEM}, *rows[2:]])
    stopped = srlm(*argv, "--out", "out.jsonl", env=ALONE)
    assert stopped.code == 3 and "in.jsonl:3: the chat template refuses it: no system role" in stopped.err
    assert [row["prompt"] for row in read_rows(srlm.folder / "out.jsonl.part")] == ["Ask 0?"] * 2 + ["Ask 1?"] * 2
    passed = srlm(*argv, "--out", "out.jsonl", "--on-error", "skip", "--rejects", "bad.jsonl", env=ALONE)
    assert passed.code == 0 and "resuming after 2 completed inputs" in passed.err and "1 dropped: bad row" in passed.err
    assert [row["prompt"] for row in read_rows(srlm.folder / "out.jsonl")] == [
        f"Ask {n}?" for n in range(4) for _ in "ab"
    ]
    assert [row["at"] for row in read_rows(srlm.folder / "bad.jsonl")] == ["in.jsonl:3"]


def test_choices_and_texts_that_a_template_refuses_are_no_texts(base: Path, tmp_path: Path) -> None:
    engine = open_engine(
        EngineSpec(model=str(with_template(base, tmp_path / "m", NO_SYSTEM + TEMPLATE)), device="cpu", dtype="float32")
    )
    greedy = Sampling(0.0, 1.0, 2)
    asked = [[SYSTEM[1]], SYSTEM]
    requests = [
        Request(messages, greedy, (0, 1), choices=choices) for messages in asked for choices in ((), ("1", "2"))
    ]
    done = list(engine.generate(requests))
    assert [one.finish_reasons[0] == TEMPLATE_REFUSED for one in done] == [False, False, True, True]
    assert done[2].texts == ["", ""] and done[2].why == "the chat template refuses it: no system role"


FIELDS = {
    "pairwise": {"prompt", "first", "second"},
    "meta": {"task", "first", "second"},
    "hindsight": {"prompt", "response", "score", "high"},
    "new_prompt": {"tasks"},
}


def form(name: str) -> templates.Template:
    """Return a built-in template."""
    return templates.load(
        name, fields=FIELDS.get(name, {"prompt", "response"}), reads=name not in ("hindsight", "new_prompt")
    )


class Refusing(ListEngine):
    """An engine whose template refuses what names a word."""

    def generate(self, requests):
        for request in requests:
            refused = "bad" in request.messages[0]["content"]
            yield no_text(request, TEMPLATE_REFUSED, why="no") if refused else next(super().generate([request]))


def outcomes(stage, rows, answers: list[list[str]], options, **more) -> list[tuple[int, int, str]]:
    """Return rows read, rows made and the refusal of each outcome of a stage."""
    return [(one.read, len(one.rows), one.bad) for one in stage(rows, Refusing(answers), options, **more)]


ASKED = Sampling(0.0, 1.0, 9)


@pytest.mark.parametrize("template", ["additive", "score_only"])
def test_a_judge_whose_template_refuses_finds_a_bad_row(template: str) -> None:
    rows = [response_record({"prompt": "Why?", "response": text}) for text in ("good", "bad", "fine")]
    options = judge.JudgeOptions(form(template), 1, ASKED, 0, score="text" if template == "additive" else "expected")
    answers = [["Score: 3"]] * 2 if template == "additive" else [[0.0, 0.0, 0.0, 1.0, 0.0, 0.0]] * 2
    assert outcomes(judge.judge, rows, answers, options) == [(1, 1, ""), (1, 0, "no"), (1, 1, "")]


@pytest.mark.parametrize("method", ["accept", "hindsight"])
def test_a_ranked_row_with_a_reply_that_a_template_refuses_is_bad(method: str) -> None:
    ranked = [
        ranked_record({"prompt": f"Ask {n}?", "responses": [{"text": "good", "rank": 0}, {"text": text, "rank": 1}]})
        for n, text in enumerate(("fine", "bad", "fine"))
    ]
    options = make_eft.EftOptions(form("additive"), ASKED, 0, num_judgements=1)
    if method == "accept":
        answers, make = [["Score: 4"], ["Score: 2"]] * 3, make_eft.accept
    else:
        from srlm_cli.stages.rank_scores import RankScores

        answers, make = [["It helps a bit."]] * 6, make_eft.hindsight
        options = replace(options, rank_scores=RankScores(0, 5), reason_template=form("hindsight"))
    found = outcomes(make, ranked, answers, options)
    assert [(read, bad) for read, _, bad in found] == [(1, ""), (1, "no"), (1, "")]


def test_rows_that_are_held_out_before_a_bad_one_are_not_bad() -> None:
    rows = [{"prompt": f"Ask {n}?"} for n in range(30)]
    held, bad = (next(row for row in rows if split.held_out(row, 0.5, 0) == out) for out in (True, False))

    def made(rows):
        yield from (Outcome(bad="no") for _ in rows)

    found = list(split.train_part([held, bad], made, 0.5, 0))
    assert [(one.read, one.bad, sum(one.dropped.values())) for one in found] == [(1, "", 1), (1, "no", 0)]


def test_a_match_that_a_template_refuses_is_a_bad_row() -> None:
    sides = [
        [response_record({"prompt": f"Ask {n}?", "response": text}) for n, text in enumerate(texts)]
        for texts in (("a", "bad", "c"), ("d", "e", "f"))
    ]
    entries = [head_to_head.Entry(name, name, rows) for name, rows in zip("AB", sides, strict=True)]
    options = head_to_head.HeadToHeadOptions(form("pairwise"), ASKED, 0)
    found = outcomes(lambda rows, *rest: head_to_head.head_to_head(entries, *rest), None, [["A"]] * 4, options)
    assert [(read, bad) for read, _, bad in found if read] == [(1, ""), (1, "no"), (1, "")]


def test_a_meta_judge_whose_template_refuses_finds_the_rows_of_a_prompt_bad() -> None:
    def judged(n: int, text: str) -> Record:
        said = [f"{text} {k}\nScore: {k}" for k in (1, 2)]
        row = {"prompt": f"Ask {n}?", "response": "r", "score": 1.5, "scores": [1, 2], "judgements": said}
        return response_record(row)

    rows = [judged(0, "good"), judged(1, "bad"), judged(2, "fine")]
    options = meta_judge.MetaOptions(form("additive"), form("meta"), ASKED, 0)
    assert outcomes(meta_judge.meta_judge, rows, [["A"]] * 4, options) == [(1, 1, ""), (1, 0, "no"), (1, 1, "")]


def test_new_prompts_cannot_be_asked_for_by_a_template_that_refuses() -> None:
    seeds = [prompt_record({"prompt": f"A bad seed {n}?"}) for n in range(8)]
    options = gen_prompts.GenPromptsOptions(1, 2, form("new_prompt"), ASKED, 0)
    with pytest.raises(EngineError, match="no"):
        list(gen_prompts.gen_prompts(seeds, Refusing([]), options))


# --- dates -----------------------------------------------------------------------------------

MOMENT = "2026-02-03T04:05:06"


def test_a_date_is_that_of_the_run(tokenizer, base: Path, tmp_path: Path) -> None:
    tokenizer.chat_template = DATE + TEMPLATE
    text = rendered(tokenizer, SYSTEM, today=MOMENT)
    assert text.startswith("<|system|>\nToday is 03 Feb 2026, 04:05:06.<|end|>\n<|system|>\nBe brief.")
    assert "03 Feb 2026" in tokenizer.decode(sequence(tokenizer, "Why?", "So.", MOMENT).ids)
    model = with_template(base, tmp_path / "m", DATE + TEMPLATE)
    engine = open_engine(EngineSpec(model=str(model), device="cpu", dtype="float32", today="2026-02-03"))
    ids = engine._tokens(engine.template.turn(Request(SYSTEM, ASKED, (0,))))
    assert "03 Feb 2026, 00:00:00" in engine.tokenizer.decode(ids)


class Dated(LazyEngine):
    """An engine that answers with the date of its run."""

    def generate(self, requests):
        for request in requests:
            yield Completion([str(self.today)] * len(request.seeds), ["stop"] * len(request.seeds), 1, 1)


def dates(folder: Path, dies: bool = False, **options) -> list[str]:
    """Return the dates of the rows that a stage writes, or has written when it dies after two of four."""
    given = options.pop("today", None)
    path = write_rows(folder / "in", [{"prompt": f"Ask {n}?"} for n in range(4)])
    engine = Dated(EngineSpec("echo", today=given))
    stream = StreamOptions(in_=str(path), out=str(folder / "out"), quiet=True, **options)
    run = StageRun("sample", stream, Reader([str(path)], prompt_record), {"n": 1, "today": given}, engine=engine)

    def make(rows, _):
        for number, row in enumerate(rows):
            if dies and number == 2:
                raise KeyError("it dies")
            [answer] = engine.generate([Request([], ASKED, (0,))])
            yield Outcome(rows=[{**row, "date": answer.texts[0]}])

    try:
        run.run(make)
    except KeyError:
        return [row["date"] for row in read_rows(folder / "out.part")]
    assert read_json(folder / "out.meta.json")["fingerprint"]["today"] == engine.today
    return [row["date"] for row in read_rows(folder / "out")]


def test_a_resumed_run_writes_the_date_that_it_began_with(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("srlm_cli.runner.stage.now", lambda: "2026-02-03T23:59:59")
    assert dates(tmp_path, dies=True) == ["2026-02-03T23:59:59"] * 2
    monkeypatch.setattr("srlm_cli.runner.stage.now", lambda: "2026-02-04T00:00:01")
    with pytest.raises(OptionError, match="today '2026-02-03T23:59:59' -> '2026-02-04T00:00:00'"):
        dates(tmp_path, today="2026-02-04T00:00:00")
    assert dates(tmp_path) == ["2026-02-03T23:59:59"] * 4


@pytest.mark.parametrize("how", ["restart", "other input"])
def test_a_run_that_begins_again_has_its_own_date(tmp_path: Path, monkeypatch, how: str) -> None:
    monkeypatch.setattr("srlm_cli.runner.stage.now", lambda: "2026-02-03T23:59:59")
    dates(tmp_path, dies=True)
    monkeypatch.setattr("srlm_cli.runner.stage.now", lambda: "2026-02-04T00:00:01")
    again = {"restart": True} if how == "restart" else {"on_stale": "restart", "limit": 3}
    if how == "other input":
        part = tmp_path / "out.part.meta.json"
        part.write_text(part.read_text().replace('"n": 1', '"n": 2'))
    assert dates(tmp_path, **again)[0] == "2026-02-04T00:00:01"


@pytest.mark.parametrize("text", ["2026-13-01", "today", ""])
def test_what_is_no_date_is_a_usage_error(srlm: Srlm, text: str) -> None:
    result = srlm("sample", "--engine", "echo", "--today", text, stdin="")
    assert result.code == 2 and "such as 2026-07-01" in result.err


def test_a_date_in_the_settings_is_a_date(srlm: Srlm) -> None:
    (srlm.folder / "srlm.toml").write_text("[defaults]\ntoday = 2026-02-03\n")
    assert srlm("sample", "--engine", "echo", stdin=as_lines([{"prompt": "Why?"}])).code == 0
