"""A judge by criteria: answers in JSON and their values, piece by piece where nothing constrains a model."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

import tiny_models
from helpers import ListEngine, Record, Srlm, as_lines, write_rows
from srlm_cli import records, templates
from srlm_cli.engines import open_engine
from srlm_cli.engines.base import EngineSpec, Sampling
from srlm_cli.evaluate.reward import judge_metrics
from srlm_cli.stages import Outcome
from srlm_cli.stages.judge import JudgeOptions, judge
from srlm_cli.stages.jury import of_all_judges
from srlm_cli.stages.rescore import rescore

SOURCE = """
high = 10
text = "$prompt $response $criteria $form"
[[criteria]]
name = "right"
description = "It is right."
scale = 4
not_applicable = true
[[criteria]]
name = "kind"
description = "It is kind."
scale = "yes/no"
"""
RIGHT = ("0", "1", "2", "3", "4", "n/a")


@pytest.fixture
def form(tmp_path: Path) -> templates.Template:
    (tmp_path / "own.toml").write_text(SOURCE)
    return templates.load_judge(str(tmp_path / "own.toml"))


def answer(right: object, kind: object) -> str:
    return json.dumps({"right": {"reason": "R.", "value": right}, "kind": {"reason": "K.", "value": kind}})


def outcomes(form: templates.Template, engine: ListEngine, count: int = 1, **more) -> list[Outcome]:
    """Return what a judge makes of one response."""
    rows = [records.response_record({"prompt": "Why?", "response": "So.", "k": 0})]
    return list(judge(rows, engine, JudgeOptions(form, count, Sampling(), seed=0, **more)))


def values(row: Record) -> list[dict | None]:
    return [part and {name: one and one["value"] for name, one in part.items()} for part in row["criteria"]]


# --- answers in JSON ---------------------------------------------------------------------------


def test_an_answer_in_json_is_asked_for_by_its_schema_and_read(form: templates.Template) -> None:
    engine = ListEngine([[answer("3", "yes"), "I like it.", answer("n/a", "no")]])
    [outcome] = outcomes(form, engine, 3)
    [row] = outcome.rows
    assert row["scores"] == [8.75, None, 0.0] and row["score"] == 4.375
    assert values(row) == [{"right": 3, "kind": "yes"}, None, {"right": None, "kind": "no"}]
    assert row["criteria"][0]["right"] == {"value": 3, "reason": "R.", "score": 0.75, "probability": None}
    assert row["judgements"][0] == answer("3", "yes") and row["score_from"] == ["text", None, "text"]
    assert outcome.counts["unparsed"] == 1
    [request] = engine.asked
    assert list(request.schema["properties"]) == ["right", "kind"] and request.follow_up is None


def test_a_value_that_is_missing_makes_no_score_of_the_others(form: templates.Template) -> None:
    [outcome] = outcomes(form, ListEngine([[answer("9", "yes")]]))
    assert outcome.rows[0]["score"] is None and values(outcome.rows[0]) == [{"right": None, "kind": "yes"}]
    assert outcome.rows[0]["criteria"][0]["right"] is None
    assert outcome.counts["unparsed"] == 1 and "no criterion applies" not in outcome.counts


def test_where_no_criterion_applies_it_is_counted(form: templates.Template) -> None:
    alone = replace(form, criteria=form.criteria[:1])
    [outcome] = outcomes(alone, ListEngine([['{"right": "n/a"}'], [0.1, 0.0, 0.0, 0.0, 0.0, 0.9]]), score="expected")
    assert outcome.rows[0]["score"] is None
    assert outcome.counts["no criterion applies"] == 1 and outcome.counts["low score mass"] == 0


def test_expected_asks_for_each_value_after_what_comes_before_it(form: templates.Template) -> None:
    engine = ListEngine([[answer("3", "yes")], [0.0, 0.0, 0.1, 0.2, 0.1, 0.0], [0.3, 0.7]])
    [outcome] = outcomes(form, engine, score="expected")
    [row] = outcome.rows
    assert [request.choices for request in engine.asked[1:]] == [RIGHT, ("no", "yes")]
    assert engine.asked[1].prefix == '{"right": {"reason": "R.", "value": "'
    assert engine.asked[2].prefix == '{"right": {"reason": "R.", "value": "3"}, "kind": {"reason": "K.", "value": "'
    right, kind = row["criteria"][0].values()
    assert right["score"] == pytest.approx(0.75) and right["probability"] == pytest.approx(0.5)
    assert kind == {"value": "yes", "reason": "K.", "score": 0.7, "probability": 0.7}
    assert row["score"] == pytest.approx(7.25) and row["score_from"] == ["expected"]
    assert row["score_mass"] == [pytest.approx(0.4)]
    assert outcome.tokens_in == 30


def test_a_value_below_the_least_mass_is_not_read(form: templates.Template) -> None:
    engine = ListEngine([[answer("3", "yes")], [0.0, 0.0, 0.1, 0.0, 0.0, 0.0], [0.3, 0.7]])
    [outcome] = outcomes(form, engine, score="expected", min_score_mass=0.2)
    assert outcome.rows[0]["score"] is None and outcome.counts["low score mass"] == 1


def test_force_score_asks_for_the_missing_values_only(form: templates.Template) -> None:
    engine = ListEngine([[answer("9", "yes")], ["2"]])
    [outcome] = outcomes(form, engine, force_score=True)
    [row] = outcome.rows
    assert engine.asked[1].prefix == '{"right": {"reason": "", "value": "' and len(engine.asked) == 2
    assert row["score"] == 7.5 and row["score_from"] == ["finish"] and outcome.counts["forced scores"] == 1
    assert row["judgements"] == [answer("9", "yes")]


def test_all_of_the_best_by_expectation_is_a_probability(form: templates.Template) -> None:
    engine = ListEngine([[answer("4", "yes")], [0.0, 0.0, 0.0, 0.5, 0.5, 0.0], [0.2, 0.8]])
    [outcome] = outcomes(replace(form, aggregate="all"), engine, score="expected")
    assert outcome.rows[0]["score"] == pytest.approx(4.0)


# --- piece by piece ----------------------------------------------------------------------------


def local(answers: list[list]) -> ListEngine:
    """Return an engine that no schema constrains."""
    engine = ListEngine(answers)
    engine.name = "hf"
    return engine


def test_piece_by_piece_a_value_is_chosen_after_each_reason(form: templates.Template) -> None:
    engine = local([["Right.", 'He said \\"no\\" to it.", "value": "0"'], ["3"], ["1"], ["Kind."], ["Rude."], ["yes"],
                    ["no"]])  # fmt: skip
    [outcome] = outcomes(form, engine, 2)
    [row] = outcome.rows
    first, second = row["judgements"]
    assert json.loads(first) == {"right": {"reason": "Right.", "value": "3"}, "kind": {"reason": "Kind.", "value": "yes"}}  # fmt: skip  # noqa: E501
    assert json.loads(second)["right"] == {"reason": 'He said "no" to it.', "value": "1"}
    assert row["scores"] == [8.75, 1.25] and row["score_from"] == ["text", "text"]
    reasons, *rest = engine.asked
    assert len(reasons.seeds) == 2 and reasons.prefix == '{"right": {"reason": "' and not reasons.schema
    assert reasons.sampling.max_new_tokens == 256  # its share of 512
    assert rest[0].prefix == '{"right": {"reason": "Right.", "value": "' and rest[0].choices == RIGHT
    assert rest[2].prefix == '{"right": {"reason": "Right.", "value": "3"}, "kind": {"reason": "'
    assert len({seed for request in engine.asked for seed in request.seeds}) == 8
    assert [*rescore([row], form)][0].rows[0] == row  # its texts say the same


def test_without_reasons_only_values_are_chosen(form: templates.Template) -> None:
    direct = replace(form, direct=True)
    engine = local([[0.0, 0.0, 0.0, 0.0, 0.4, 0.0], [0.1, 0.3]])
    [outcome] = outcomes(direct, engine, 3, score="expected")
    [row] = outcome.rows
    assert row["judgements"] == ['{"right": {"value": "4"}, "kind": {"value": "yes"}}']
    assert row["score"] == pytest.approx(8.75) and row["score_from"] == ["direct"]
    assert row["score_mass"] == [pytest.approx(0.4)]


def test_a_judge_that_is_told_to_think_writes_its_answer_at_once(form: templates.Template) -> None:
    engine = local([["<think>Hm.</think>" + answer("4", "yes")]])
    [outcome] = outcomes(form, engine, template_kwargs={"enable_thinking": True})
    assert outcome.rows[0]["score"] == 10 and outcome.rows[0]["judge_thoughts"] == ["Hm."]


def test_a_prompt_that_is_too_long_is_no_judgement(form: templates.Template) -> None:
    engine = local([[""]])
    engine.reasons = "prompt-too-long"
    [outcome] = outcomes(form, engine)
    [row] = outcome.rows
    assert (row["score"], row["judgements"], row["criteria"]) == (None, [""], [None])
    assert row["judgement_finish_reasons"] == ["prompt-too-long"]


def test_a_row_without_a_reply_is_not_judged(form: templates.Template) -> None:
    rows = [
        records.response_record({"prompt": "Why?", "response": text, "finish_reason": reason})
        for text, reason in ((None, "prompt-too-long"), ("So.", "stop"))
    ]
    made = list(judge(rows, local([["R."], ["4"], ["K."], ["yes"]]), JudgeOptions(form, 1, Sampling(), 0)))
    assert [outcome.rows[0]["score"] for outcome in made] == [None, 10]


@pytest.mark.parametrize("score", ["text", "expected"])
def test_a_real_model_answers_by_the_scale(tmp_path: Path, form: templates.Template, score: str) -> None:
    engine = open_engine(EngineSpec("hf", str(tiny_models.save(tmp_path / "tiny")), device="cpu", dtype="float32"))
    rows = [records.response_record({"prompt": "Why?", "response": word, "k": 0}) for word in ("So.", "Because.")]
    options = JudgeOptions(form, 2, Sampling(max_new_tokens=8), seed=0, score=score)
    together = [row for outcome in judge(rows, engine, options) for row in outcome.rows]
    for row, alone in zip(together, rows, strict=True):
        assert all(set(json.loads(text)) == {"right", "kind"} for text in row["judgements"])
        assert row["score"] is not None
        [apart] = [made for outcome in judge([alone], engine, options) for made in outcome.rows]
        assert apart["judgements"] == row["judgements"]


# --- rows --------------------------------------------------------------------------------------


def test_another_judge_takes_the_criteria_away_and_leaves_those_of_the_user(form: templates.Template) -> None:
    [made] = outcomes(form, ListEngine([[answer("3", "yes")]]))[0].rows
    additive = templates.load_judge("additive")
    options = JudgeOptions(additive, 1, Sampling(), 0)
    for field, kept in ((made["criteria"], False), (["be kind"], True), ({"a": 1}, True), ([], True)):
        row = records.response_record({**made, "criteria": field})
        [again] = next(judge([row], ListEngine([["Score: 1"]]), options)).rows
        assert ("criteria" in again) is kept
        assert ("criteria" in of_all_judges(row)) is kept


def test_resumed_rescored_and_sharded(srlm: Srlm) -> None:
    rows = write_rows(srlm.folder / "rows.jsonl", [{"prompt": f"Why {n}?", "response": "So."} for n in range(4)])
    (srlm.folder / "own.toml").write_text(SOURCE)
    judged = ("judge", "--in", str(rows), "--engine", "echo", "--template", "own.toml")
    whole = srlm(*judged).rows
    halves = [row for shard in ("1/2", "2/2") for row in srlm(*judged, "--shard", shard).rows]
    assert halves == whole
    write_rows(srlm.folder / "judged.jsonl", whole)
    done = srlm("judge", "--in", "judged.jsonl", "--rescore", "--template", "own.toml")
    probable = [[{**one, "probability": None} for one in part.values()] for row in whole for part in row["criteria"]]
    assert [[*part.values()] for row in done.rows for part in row["criteria"]] == probable
    assert [row["scores"] for row in done.rows] == [row["scores"] for row in whole]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_rows_of_a_whole_one(srlm: Srlm) -> None:
    write_rows(srlm.folder / "rows.jsonl", [{"prompt": f"Why {n}?", "response": "So."} for n in range(70)])
    (srlm.folder / "own.toml").write_text(SOURCE)
    judged = ("judge", "--in", "rows.jsonl", "--engine", "echo", "--template", "own.toml", "--out")
    assert srlm.mortal(660, signal.SIGKILL, *judged, "out.jsonl").code == -signal.SIGKILL  # 10 requests a row
    done = srlm(*judged, "out.jsonl")
    assert done.code == 0 and "resuming after 64 " in done.err
    assert srlm(*judged, "whole.jsonl").code == 0
    assert (srlm.folder / "out.jsonl").read_text() == (srlm.folder / "whole.jsonl").read_text()


# --- against people ----------------------------------------------------------------------------


def human(prompt: str, people: float, right: float | None, kind: float | None, readable: bool = True) -> Record:
    found = {"right": {"value": 1, "score": right}, "kind": kind if kind is None else {"value": "x", "score": kind}}
    row = {"prompt": prompt, "response": f"{people}", "score": 1.0, "human": people}
    return records.response_record(row) | {"score": 1.0, "criteria": [found if readable else None]}


def test_each_criterion_is_measured_against_people() -> None:
    prompts = [
        [human("a", 2, 0.9, 0.1), human("a", 1, 0.2, 0.3)],
        [human("b", 2, 0.9, 0.3), human("b", 1, None, 0.2)],  # `right` does not apply to the second
        [human("c", 2, 0.5, None), human("c", 1, 0.5, 0.2)],  # `kind` was not read of the first
        [human("d", 2, 0.1, 0.9), human("d", 1, 0.2, 0.2, readable=False)],
    ]
    rows = judge_metrics(prompts)
    found = {(row.get("criterion"), row["metric"]): (row["value"], row["n"]) for row in rows if "criterion" in row}
    assert found["right", "pairwise_accuracy"] == (pytest.approx(1 / 3), 3)
    assert found["kind", "pairwise_accuracy"] == (0.25, 4)
    assert found["right", "scored_rate"] == (pytest.approx(6 / 7), 7) and found["kind", "scored_rate"] == (0.75, 8)
    assert [row for row in rows if row["metric"] == "pairwise_accuracy"][-1].keys().isdisjoint({"criterion"})


def test_a_field_of_the_user_named_criteria_is_not_measured(srlm: Srlm) -> None:
    rows = [{"prompt": "p", "response": str(n), "score": n, "human": n, "criteria": ["be kind"]} for n in range(2)]
    done = srlm("eval", "reward", stdin=as_lines(rows))
    assert done.code == 0 and not any("criterion" in row for row in done.rows)
