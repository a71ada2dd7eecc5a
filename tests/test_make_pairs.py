"""Pairs: the highest against the lowest score, ties dropped, an unreadable score never ranked."""

from __future__ import annotations

import pytest

from helpers import Srlm, as_lines
from srlm_cli.errors import BadRow
from srlm_cli.records import judged_record
from srlm_cli.stages.make_pairs import PairOptions, make_pairs


def rows_of(prompt: str, scores: list[float | None]) -> list[dict]:
    """Return the judged responses of one prompt."""
    return [
        judged_record({"prompt": prompt, "response": f"{prompt} {k}", "k": k, "score": score})
        for k, score in enumerate(scores)
    ]


def pairs_of(rows: list[dict], **options) -> list[dict]:
    return [row for outcome in make_pairs(rows, PairOptions(**options)) for row in outcome.rows]


def reasons_of(rows: list[dict], **options) -> list[str]:
    return [reason for outcome in make_pairs(rows, PairOptions(**options)) for reason in outcome.dropped]


def test_the_highest_is_chosen_and_the_lowest_rejected() -> None:
    [pair] = pairs_of(rows_of("Why?", [2, 4.5, 1, 3]))
    group = judged_record({"prompt": "Why?", "response": "", "score": 0})["prompt_id"]
    assert pair == {
        "id": group,
        "prompt": [{"role": "user", "content": "Why?"}],
        "chosen": [{"role": "assistant", "content": "Why? 1"}],
        "rejected": [{"role": "assistant", "content": "Why? 2"}],
        "prompt_id": group,
        "score_chosen": 4.5,
        "score_rejected": 1,
        "chosen_id": f"{group}/1",
        "rejected_id": f"{group}/2",
    }


def test_a_tie_is_dropped_and_does_not_end_the_batch() -> None:
    rows = rows_of("One?", [1, 1, 1]) + rows_of("Two?", [0, 3]) + rows_of("Three?", [5, 5]) + rows_of("Four?", [2, 4])
    assert [pair["score_chosen"] for pair in pairs_of(rows)] == [3, 4]
    assert reasons_of(rows) == ["tie", "tie"]


def test_a_response_without_a_score_is_never_ranked() -> None:
    [pair] = pairs_of(rows_of("Why?", [None, 2, None, 3]))
    assert (pair["score_chosen"], pair["score_rejected"]) == (3, 2)
    rows = rows_of("One?", [None, 2]) + rows_of("Two?", [None, None]) + rows_of("Three?", [1])
    assert pairs_of(rows) == [] and reasons_of(rows) == ["fewer than two scored responses"] * 3


def test_a_score_of_zero_is_a_score() -> None:
    [pair] = pairs_of(rows_of("Why?", [0, 0.5]))
    assert (pair["score_chosen"], pair["score_rejected"]) == (0.5, 0)


def test_prompts_in_are_pairs_and_drops_and_rows_in_are_rows_read() -> None:
    rows = rows_of("One?", [1, 1]) + rows_of("Two?", [0, 3, None]) + rows_of("Three?", [2])
    outcomes = list(make_pairs(rows, PairOptions()))
    assert [outcome.read for outcome in outcomes] == [2, 3, 1]
    assert [len(outcome.rows) + sum(outcome.dropped.values()) for outcome in outcomes] == [1, 1, 1]
    assert sum(outcome.counts["unscored"] for outcome in outcomes) == 1


def test_the_least_gap() -> None:
    rows = rows_of("Why?", [2, 3])
    assert len(pairs_of(rows, min_gap=1.0)) == 1
    assert reasons_of(rows, min_gap=1.1) == ["gap too small"]
    assert reasons_of(rows_of("Why?", [2, 2]), min_gap=0.0) == ["tie"]


def test_two_equal_texts_are_no_preference() -> None:
    rows = [{**row, "response": "same"} for row in rows_of("Why?", [1, 2])]
    assert reasons_of(rows) == ["same text"]


def test_the_seed_decides_among_equal_scores_and_nothing_else() -> None:
    rows = rows_of("Why?", [4, 4, 4, 4, 1, 1, 1, 1])
    chosen = {pairs_of(rows, seed=seed)[0]["chosen_id"] for seed in range(30)}
    rejected = {pairs_of(rows, seed=seed)[0]["rejected_id"] for seed in range(30)}
    assert len(chosen) == len(rejected) == 4
    assert pairs_of(rows, seed=3) == pairs_of(rows, seed=3)
    assert pairs_of(rows_of("Why?", [1, 5, 3]), seed=1) == pairs_of(rows_of("Why?", [1, 5, 3]), seed=2)


def test_what_the_responses_share_stays_and_what_differs_goes() -> None:
    same = {"source": "seed", "judge": {"model": "M1"}, "judgements": ["x"], "scores": [1], "finish_reason": "stop"}
    rows = [{**row, **same} for row in rows_of("Why?", [1, 2])]
    rows[0]["of_one"], rows[0]["differs"], rows[1]["differs"] = 1, "a", "b"
    [pair] = pairs_of(rows)
    assert pair["source"] == "seed" and pair["judge"] == {"model": "M1"}
    assert not {"k", "response", "score", "scores", "judgements", "finish_reason", "of_one", "differs"} & set(pair)


def test_a_prompt_of_several_turns_stays_as_it_is() -> None:
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    rows = [judged_record({"prompt": turns, "response": f"r{k}", "k": k, "score": k}) for k in (0, 1)]
    assert pairs_of(rows)[0]["prompt"] == turns


def test_responses_that_do_not_stand_together_are_an_error_or_are_gathered() -> None:
    one, two = rows_of("One?", [1, 3]), rows_of("Two?", [2, 5])
    mixed = [one[0], two[0], one[1], two[1]]
    with pytest.raises(BadRow, match="--unsorted"):
        pairs_of(mixed)
    assert pairs_of(mixed, unsorted=True) == pairs_of(one + two)


def test_the_same_prompt_as_text_and_as_a_message_is_one_prompt() -> None:
    rows = rows_of("Why?", [1])
    rows += [judged_record({"prompt": [{"role": "user", "content": "Why?"}], "response": "b", "k": 1, "score": 2})]
    assert len(pairs_of(rows)) == 1


def test_datasets_and_trl_take_the_rows_as_they_are(srlm: Srlm) -> None:
    datasets = pytest.importorskip("datasets")
    judged = [
        {"prompt": f"Question {n}?", "response": f"r{k}", "k": k, "score": float(k + n)}
        for n in range(5)
        for k in range(3)
    ]
    assert srlm("make-pairs", "--out", "pairs.jsonl", stdin=as_lines(judged)).code == 0
    loaded = datasets.load_dataset(
        "json", data_files=str(srlm.folder / "pairs.jsonl"), split="train", cache_dir=str(srlm.folder / "cache")
    )
    assert len(loaded) == 5 and {"prompt", "chosen", "rejected"} <= set(loaded.column_names)
    assert loaded[0]["chosen"] == [{"role": "assistant", "content": "r2"}]
    assert loaded[0]["prompt"] == [{"role": "user", "content": "Question 0?"}]
