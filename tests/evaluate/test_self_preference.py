"""Self-preference: own replies against replies of other models that people find equally good."""

from __future__ import annotations

import pytest

from helpers import Srlm, as_lines
from srlm_cli.evaluate.reward import judge_metrics
from srlm_cli.evaluate.self_preference import is_own


def reply(k: int, model: str | None, human: float, score: float | None, judge: str | None = "M1/model") -> dict:
    return {
        "id": f"a/{k}", "prompt_id": "a", "response": "so", "model": model, "human": human, "score": score,
        "judge": {"model": judge},
    }  # fmt: skip


def preference(group: list[dict]) -> list[tuple[float, int]]:
    rows = judge_metrics([group])
    return [(row["value"], row["n"]) for row in rows if row["metric"] == "self_preference"]


def test_only_equally_good_replies_of_another_model_count() -> None:
    group = [
        reply(0, "M1/model", 2, 4.0),
        reply(1, "other", 2, 3.0),  # the own one wins
        reply(2, "other", 2, 4.0),  # a tie
        reply(3, "other", 2, 4.5),  # the other one wins
        reply(4, "other", 1, 1.0),  # not equally good
        reply(5, None, 2, 1.0),  # nobody knows whose
        reply(6, "other", 2, None),  # no score
        reply(7, "M1/model", 2, None),
    ]
    assert preference(group) == [(0.5, 3)]
    assert preference(group[:3]) == [(0.75, 2)]


def test_without_such_pairs_there_is_no_row() -> None:
    assert preference([reply(0, "M1/model", 2, 4.0), reply(1, "other", 1, 3.0)]) == []
    assert preference([reply(0, "M1/model", 2, 4.0, None), reply(1, "other", 2, 3.0, None)]) == []


@pytest.mark.parametrize(
    ("writer", "judge", "own"),
    [("./M1/model/", "M1/model", True), ("M2/model", "M1/model", False), (None, "M1", None), ("M1", None, None)],
)
def test_a_folder_is_one_model_in_every_spelling(writer: str | None, judge: str | None, own: bool | None) -> None:
    assert is_own({"model": writer}, judge) is own


def test_a_ranked_response_names_its_model(srlm: Srlm) -> None:
    ranked = [
        {"prompt": f"Ask {n}?", "responses": [
            {"text": "Long and longer.", "score": 3, "model": "echo:longest"},
            {"text": "Short.", "score": 3, "model": "M9"},
        ]}
        for n in range(3)
    ]  # fmt: skip
    judged = srlm("judge", "--engine", "echo", "--model", "longest", stdin=as_lines(ranked))
    assert [row["model"] for row in judged.rows] == ["echo:longest", "M9"] * 3
    found = {row["metric"]: row for row in srlm("eval", "reward", stdin=judged.out).rows}
    assert (found["self_preference"]["value"], found["self_preference"]["n"]) == (1.0, 3)
