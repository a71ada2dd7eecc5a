"""Stored judgements read again with another template: the texts stay, the scores are new."""

from __future__ import annotations

import pytest

from helpers import ListEngine
from srlm_cli import records, templates
from srlm_cli.engines.base import Sampling
from srlm_cli.errors import BadRow
from srlm_cli.stages.judge import JudgeOptions, judge
from srlm_cli.stages.rescore import rescore, stored_record

FIELDS = {"prompt", "response"}
ADDITIVE = templates.load("additive", fields=FIELDS)
RATING = templates.load("rating", fields=FIELDS)
ROW = {
    "id": "p/0", "prompt_id": "p", "prompt": "Why?", "response": "Because.", "k": 0, "tag": ["x"],
    "score": 1.0, "scores": [1.0, None], "score_from": ["finish", None],
    "judgements": ["Good. Rating: [[8]]", "Fair.\nRating: [[7]] or so"], "judgement_finish_reasons": ["stop", "length"],
    "judge": {"model": "M1", "template": "additive", "template_hash": "0", "note": "kept"},
}  # fmt: skip


def again(*rows: dict, template: templates.Template = RATING) -> list[dict]:
    return [row for outcome in rescore(rows, template) for row in outcome.rows]


def test_the_scores_are_new_and_all_else_stays() -> None:
    [row] = again(ROW)
    judge = {"model": "M1", "template": "rating", "template_hash": RATING.hash, "note": "kept"}
    assert row == {**ROW, "score": 7.5, "scores": [8.0, 7.0], "score_from": ["text", "text"], "judge": judge}


def test_what_the_new_pattern_cannot_read_is_null() -> None:
    [row] = again({**ROW, "judgements": ["Rating: [[8]]", "Score: 3"]})
    assert (row["score"], row["scores"], row["score_from"]) == (8.0, [8.0, None], ["text", None])
    [row] = again({**ROW, "judgements": ["Fine.", "Rating: [[12]]"]})
    assert (row["score"], row["scores"]) == (None, [None, None])


def test_rows_in_are_rows_out_and_all_is_counted() -> None:
    rows = [ROW, {**ROW, "id": "p/1", "judgements": [], "judgement_finish_reasons": []}, {**ROW, "id": "p/2"}]
    outcomes = list(rescore(rows, ADDITIVE))
    assert [[row["id"] for row in outcome.rows] for outcome in outcomes] == [["p/0"], ["p/1"], ["p/2"]]
    assert outcomes[0].counts == {"judgements": 2, "unparsed": 2, "forced scores": 0, "low score mass": 0, "cut off": 1}
    assert outcomes[1].rows[0]["score"] is None and outcomes[1].counts["judgements"] == 0


def test_the_same_template_reads_what_the_judge_read() -> None:
    texts = [["Score: 3", "Hm.", "Score: 4/5"], ["Score: 0", "Score: 6", "**Score:** 2"]]
    rows = [records.response_record({"prompt": "Why?", "response": f"r{k}", "k": k}) for k in range(2)]
    options = JudgeOptions(ADDITIVE, 3, Sampling(), seed=0)
    judged = [row for outcome in judge(rows, ListEngine(texts), options) for row in outcome.rows]
    assert again(*judged, template=ADDITIVE) == judged


def test_rows_of_other_tools_need_no_more_than_their_texts() -> None:
    [row] = again({"prompt": "Why?", "response": "Because.", "judgements": ["[[4]]"], "judge": "gpt"})
    assert row["score"] == 4 and row["judge"]["model"] == "gpt" and "judgement_finish_reasons" not in row
    [row] = again({"prompt": "Why?", "response": "Because.", "judgements": ["[[4]]"]})
    assert row["judge"]["model"] is None


@pytest.mark.parametrize("texts", [None, "Score: 3", [3], ["Score: 3", None]])
def test_a_row_without_judgements_is_a_bad_row(texts: object) -> None:
    with pytest.raises(BadRow, match="`judgements`.*srlm judge"):
        list(rescore([{**ROW, "judgements": texts}], RATING))
    with pytest.raises(BadRow, match="judgements"):
        stored_record({key: value for key, value in ROW.items() if key != "judgements"})


def test_a_reason_for_each_judgement() -> None:
    with pytest.raises(BadRow, match="2 `judgement_finish_reasons`"):
        list(rescore([{**ROW, "judgement_finish_reasons": ["stop"]}], RATING))
