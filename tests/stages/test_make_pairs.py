"""Pairs: the highest against the lowest score, ties dropped, an unreadable score never ranked."""

from __future__ import annotations

import os
from random import Random

import pytest

from helpers import Srlm, as_lines, write_rows
from srlm_cli.errors import BadRow, SrlmError
from srlm_cli.records import judged_record
from srlm_cli.stages.make_pairs import PairOptions, make_pairs, scored_record
from srlm_cli.streams import spill


def rows_of(prompt: str, scores: list[float | None]) -> list[dict]:
    """Return the judged responses of one prompt."""
    return [
        judged_record({"prompt": prompt, "response": f"{prompt} {k}", "k": k, "score": score})
        for k, score in enumerate(scores)
    ]


def pairs_of(rows: list[dict], **options) -> list[dict]:
    return [row for outcome in make_pairs(rows, PairOptions(**options)) for row in outcome.rows]


@pytest.mark.parametrize("unsorted", [False, True])
@pytest.mark.parametrize(("option", "sides"), [("keep", (0, 3)), ("rejected-only", (1, 3)), ("drop", (1, 2))])
def test_responses_that_were_cut_off_can_be_kept_out_of_pairs(option: str, sides: tuple, unsorted: bool) -> None:
    rows = rows_of("Why?", [5, 4, 2, 1])
    for at in (0, 3):
        rows[at]["finish_reason"] = "length"
    [pair] = pairs_of(rows, cut_off=option, unsorted=unsorted)
    chosen, rejected = sides
    assert (pair["chosen_id"], pair["rejected_id"]) == (rows[chosen]["id"], rows[rejected]["id"])
    [outcome] = make_pairs(rows, PairOptions(cut_off=option, unsorted=unsorted))
    assert outcome.counts.get("cut off") == (None if option == "keep" else 2)


@pytest.mark.parametrize("more", [[], ["--unsorted"]])
def test_a_pair_has_the_thoughts_of_its_replies(srlm: Srlm, more: list[str]) -> None:
    rows = [{**row, "thought": said} for row, said in zip(rows_of("Why?", [5, 1]), ("Hm.", None), strict=True)]
    write_rows(srlm.folder / "judged.jsonl", rows)
    [pair] = srlm("make-pairs", "--in", "judged.jsonl", *more).rows
    assert pair["chosen"][0]["reasoning_content"] == "Hm." and "reasoning_content" not in pair["rejected"][0]


def test_a_prompt_with_one_finished_response_has_a_pair_only_with_one_cut_off() -> None:
    rows = rows_of("Why?", [5, 4])
    rows[1]["finish_reason"] = "max_tokens"
    assert reasons_of(rows, cut_off="drop") == ["fewer than two scored responses"]
    assert len(pairs_of(rows, cut_off="rejected-only")) == 1
    rows[0]["finish_reason"] = "length"
    assert reasons_of(rows, cut_off="rejected-only") == ["fewer than two scored responses"]


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


def test_a_pair_has_its_fields_in_one_order_whatever_that_of_its_rows_is() -> None:
    rows = [{"source": "s", **row, "judge": "M1"} for row in rows_of("Why?", [2, 4])]
    turned = [dict(reversed(row.items())) for row in rows]
    [one], [other] = pairs_of(rows), pairs_of([scored_record(row) for row in turned])
    assert one == other
    assert list(one)[:3] == ["prompt_id", "prompt", "source"] and list(other)[:3] == ["prompt_id", "prompt", "judge"]


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


# --- ranked rows -----------------------------------------------------------------------------


def ranked(prompt: str, opinions: list[float], key: str = "score", **more) -> dict:
    return {
        "prompt": prompt,
        "responses": [{"text": f"{prompt} {at}", key: n} for at, n in enumerate(opinions)],
        **more,
    }


def test_what_people_thought_of_replies_makes_a_pair() -> None:
    [pair] = pairs_of(scored_record(ranked("Why?", [0.5, 0.9, 0.25], id="w", source="oasst")))
    assert pair == {
        "source": "oasst",
        "id": "w",
        "prompt": [{"role": "user", "content": "Why?"}],
        "chosen": [{"role": "assistant", "content": "Why? 1"}],
        "rejected": [{"role": "assistant", "content": "Why? 2"}],
        "prompt_id": "w",
        "score_chosen": 0.9,
        "score_rejected": 0.25,
        "chosen_id": "w/1",
        "rejected_id": "w/2",
        "score_from": "human",
    }


def test_of_ranks_alone_the_scores_are_minus_the_ranks() -> None:
    [pair] = pairs_of(scored_record(ranked("Why?", [2, 0, 1], "rank")))
    assert (pair["score_chosen"], pair["score_rejected"]) == (0, -2)
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("Why? 1", "Why? 0")


def test_ties_and_gaps_of_people_are_those_of_a_judge() -> None:
    assert reasons_of(scored_record(ranked("Why?", [0.5, 0.5]))) == ["tie"]
    assert reasons_of(scored_record(ranked("Why?", [0.5]))) == ["fewer than two scored responses"]
    assert reasons_of(scored_record(ranked("Why?", [0, 1], "rank")), min_gap=1.5) == ["gap too small"]
    assert len(pairs_of(scored_record(ranked("Why?", [0, 2], "rank")), min_gap=1.5)) == 1


def test_a_judged_ranked_row_is_paired_by_the_judge() -> None:
    rows = [scored_record({**row, "human": -row["k"]}) for row in rows_of("Why?", [1, 4])]
    [pair] = pairs_of(rows)
    assert (pair["score_chosen"], pair["score_rejected"]) == (4, 1) and "score_from" not in pair


@pytest.mark.parametrize("unsorted", [False, True])
def test_scores_of_people_and_of_a_judge_are_never_compared(unsorted: bool) -> None:
    rows = [*rows_of("Why?", [3, 5]), *scored_record(ranked("Why?", [0.2, 0.1])), *rows_of("How?", [2, 1])]
    found = [(pair["score_chosen"], pair["score_rejected"], pair.get("score_from")) for pair in pairs_of(rows)]
    assert found == [(5, 3, None), (0.2, 0.1, "human"), (2, 1, None)]
    assert pairs_of(rows, unsorted=unsorted) == pairs_of(rows)


def test_a_ranked_row_that_is_bad_is_a_bad_row() -> None:
    with pytest.raises(BadRow, match="rank"):
        scored_record({"prompt": "Why?", "responses": [{"text": "a"}, {"text": "b", "rank": 1}]})


def test_make_pairs_reads_ranked_and_judged_rows(srlm: Srlm) -> None:
    rows = [ranked("One?", [0, 1], "rank"), *rows_of("Two?", [2, 3]), ranked("Three?", [7, 7.5])]
    result = srlm("make-pairs", stdin=as_lines(rows))
    assert result.code == 0 and "6 read, 3 written" in result.err
    assert [row.get("score_from") for row in result.rows] == ["human", None, "human"]
    assert [row["chosen"][0]["content"] for row in result.rows] == ["One? 0", "Two? 1", "Three? 1"]
    skipped = srlm("make-pairs", "--on-error", "skip", stdin=as_lines([*rows, {"prompt": "x", "responses": []}]))
    assert skipped.code == 0 and skipped.rows == result.rows and "1 dropped: bad row" in skipped.err


# --- with other tools ------------------------------------------------------------------------


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


# --- files larger than memory ----------------------------------------------------------------


def peak(srlm: Srlm, *args: str) -> int:
    """Return the most memory, in MiB, that a run of the program held, as the system counts it."""
    process = srlm.start(*args, forks=False)
    process.stdin.close()
    _, status, used = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, process.stderr.read()
    return used.ru_maxrss // 1024


@pytest.mark.slow
@pytest.mark.parametrize(("unsorted", "most"), [((), 10), (("--unsorted",), 60)], ids=["sorted", "unsorted"])
def test_memory_does_not_grow_with_the_input(srlm: Srlm, unsorted: tuple[str, ...], most: int) -> None:
    with open(srlm.folder / "judged.jsonl", "w") as file:  # 50 MB
        for prompt in range(5_000):
            file.write(as_lines(rows_of(f"Question {prompt}? " + "why " * 1200, [1, 5])))
    argv = ["make-pairs", "--quiet", "--out", "pairs.jsonl", *unsorted, "--in"]
    assert peak(srlm, *argv, "judged.jsonl") - peak(srlm, *argv, "/dev/null") < most


def test_gathering_on_disk_is_gathering_in_memory() -> None:
    rows = [row for n in range(50) for row in rows_of(f"Question {n}?", [1, n % 3, None, 4])]
    rows += [{**row, "t": "\ud83d", "n": 10**30, "x": 1e-7} for row in rows_of("Odd?", [2, 3])]
    Random(0).shuffle(rows)
    options = PairOptions(unsorted=True)
    assert list(make_pairs(rows, options)) == list(make_pairs(rows, options, group_by_key=spill.group_by_key))


def test_a_full_disk_for_temporary_files_says_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(spill.Spill):
        def __init__(self) -> None:
            super().__init__()
            self.database.execute("PRAGMA max_page_count = 9")

    monkeypatch.setattr(spill, "Spill", Small)
    parts = [(n, rows_of(f"Question {n}? " + "why " * 999, [1])) for n in range(99)]
    with pytest.raises(SrlmError, match="database or disk is full.*TMPDIR"):
        list(spill.group_by_key(parts))


def test_numbers_seen_before_are_known() -> None:
    seen = spill.Seen()
    numbers = [0, -1, 2**63 - 1, -(2**63), 0, -1, 5]
    assert [seen.add(number) for number in numbers] == [True, True, True, True, False, False, True]
    assert seen.add_all(iter([7, 0, 8, 8, 7, 9, -1, 5])) == [True, False, True, False, False, True, False, False]
    assert seen.add_all([]) == []


SAME_ID = [
    {"id": f"1/{n}", "prompt_id": "1", "prompt": prompt, "response": f"r{n}", "score": n}
    for n, prompt in enumerate(["Why is the sky blue?", "How do I boil an egg?"])
]


@pytest.mark.parametrize("more", [[], ["--unsorted"]])
def test_two_prompts_of_one_id_are_no_pair(srlm: Srlm, more: list[str]) -> None:
    result = srlm("make-pairs", *more, stdin=as_lines(SAME_ID))
    assert result.code == 3 and "two prompts have the prompt_id 1" in result.err and not result.out


def test_a_reply_to_another_prompt_of_that_id_is_not_rejected(srlm: Srlm) -> None:
    write_rows(srlm.folder / "earlier.jsonl", SAME_ID[:1])
    result = srlm("make-pairs", "--rejected-pool", "earlier.jsonl", stdin=as_lines(SAME_ID[1:]))
    assert result.code == 3 and "two prompts have the prompt_id 1" in result.err


def test_a_text_and_the_same_text_as_a_message_are_one_prompt() -> None:
    rows = rows_of("a", [1, 3])
    rows[0]["prompt"] = [{"role": "user", "content": "a"}]
    assert len(pairs_of(rows)) == 1


def test_what_pairs_before_had_stays_behind() -> None:
    old = {"agreement": 0.47, "label_smoothing": 0.53, "length_alpha": 0.1, "model_chosen": "m", "topic": "x"}
    [pair] = pairs_of([{**row, **old} for row in rows_of("a", [1, 3])])
    assert pair["topic"] == "x" and not set(old) - {"topic"} & set(pair)
