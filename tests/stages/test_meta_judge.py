"""Judgements of one reply compared, rated and paired: Meta-Rewarding, with answers written by hand."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest

from commands_table import META_JUDGED
from helpers import ListEngine, Record, Srlm, as_lines, asked_text, read_json, read_rows, write_rows
from srlm_cli import templates
from srlm_cli.engines.base import Sampling
from srlm_cli.errors import BadRow
from srlm_cli.records import meta_record, pair_record, prompt_key
from srlm_cli.stages.judge_pairs import judge_pairs
from srlm_cli.stages.meta_judge import MetaOptions, meta_judge, meta_judgeable
from srlm_cli.stages.meta_rating import PositionWeights, battle_matrix, meta_scores, position_weights
from srlm_cli.stages.pair_choice import Choice

ADDITIVE = templates.load("additive", fields={"prompt", "response"})
META = templates.load("meta", fields={"task", "first", "second"}, reads=True)


def judged(*texts: str, prompt: str = "Why?", k: int = 0, **more) -> Record:
    """Return a judged response row with these judgements."""
    scores = [ADDITIVE.score(text) for text in texts]
    row = {
        "prompt": prompt,
        "response": f"Because {k}.",
        "k": k,
        "score": 0.0,
        "scores": scores,
        "judgements": [*texts],
    }
    return meta_judgeable({**row, **more}, ADDITIVE)


def compared(rows: list[Record], answers: list, **more) -> tuple[list, ListEngine]:
    """Return the outcomes of a meta-judge with these answers, and the engine that was asked."""
    engine = ListEngine([answer if isinstance(answer, list) else [answer] for answer in answers])
    return list(meta_judge(rows, engine, MetaOptions(ADDITIVE, META, Sampling(), 0, **more))), engine


GOOD, FAIR, POOR = "It is right.\nScore: 4", "It is fair.\nScore: 2", "No.\nScore: 0"


# --- the battles -----------------------------------------------------------------------------


def test_each_pair_of_judgements_is_asked_in_both_orders() -> None:
    [outcome], engine = compared([judged(GOOD, FAIR, POOR)], ["Verdict: A", "Verdict: B"] * 3)
    [row] = outcome.rows
    assert [(battle["a"], battle["b"]) for battle in row["battles"]] == [(0, 1), (0, 2), (1, 2)]
    assert all(battle["verdicts"] == ["A", "B"] for battle in row["battles"])
    shown = [asked_text(request) for request in engine.asked]
    for first, second, text in zip([0, 1, 0, 2, 1, 2], [1, 0, 2, 0, 2, 1], shown, strict=True):
        texts = (GOOD, FAIR, POOR)
        assert text.index(f"<judgement A>\n{texts[first]}") < text.index(f"<judgement B>\n{texts[second]}")
        assert "User: Why?" in text and "<reply>\nBecause 0.\n</reply>" in text
    seeds = [request.seeds for request in engine.asked]
    assert len(set(seeds)) == 6 and all(len(one) == 1 for one in seeds)


def test_a_row_has_what_pairs_are_made_of() -> None:
    [outcome], _ = compared([judged(GOOD + " Or so.", FAIR, tag="x")], ["Verdict: A", "I cannot tell."])
    [row] = outcome.rows
    assert row["targets"] == [GOOD, FAIR] and row["battles"] == [{"a": 0, "b": 1, "verdicts": ["A", None]}]
    assert row["judge_prompt"][0]["content"].endswith('end with the line "Score: " and the total from 0 to 5.')
    assert row["meta_judge"] == {"model": "fake", "template": "meta", "template_hash": META.hash}
    assert row["tag"] == "x" and row["prompt_key"] == prompt_key("Why?")
    assert outcome.counts == {"verdicts": 2, "unparsed": 1}
    assert (outcome.tokens_in, outcome.tokens_out) == (20, 2)
    assert meta_record(row)["id"] == row["id"]


def test_the_reply_whose_scores_vary_most_is_taken_and_the_others_are_counted() -> None:
    rows = [
        judged("Score: 3", "Good. Score: 3", k=0),  # variance 0
        judged("Score: 5", "Score: 1", k=1),  # 4
        judged("Score: 4", "Score: 2", k=2),  # 1
        judged("Hm.", "Score: 2", k=3),
        judged("Score: 0", "Score: 5", prompt="How?", k=0),
    ]
    outcomes, _ = compared(rows, ["Verdict: A"] * 4)
    assert [[row["k"] for row in outcome.rows] for outcome in outcomes] == [[1], [0]]
    assert [(outcome.read, outcome.at_end) for outcome in outcomes] == [(4, False), (1, True)]
    assert outcomes[0].dropped == {"fewer than two readable judgements": 1, "another reply varies more": 2}
    both, _ = compared(rows, ["Verdict: A"] * 6, replies=2)
    assert [row["k"] for outcome in both for row in outcome.rows] == [1, 2, 0]


def test_prompts_without_a_comparison_keep_their_place_and_are_counted() -> None:
    mute = ("Hm.", "Score: 3")
    rows = [
        judged(*mute, prompt="a"),
        judged(GOOD, POOR, prompt="b"),
        judged(*mute, prompt="c"),
        judged("Score: 1", "Score: 1", prompt="d"),
        judged(GOOD, FAIR, prompt="e"),
        judged(*mute, prompt="f"),
    ]
    outcomes, engine = compared(rows, ["Verdict: A"] * 4)
    assert [len(outcome.rows) for outcome in outcomes] == [0, 1, 0, 0, 1, 0] and len(engine.asked) == 4
    assert [outcome.at_end for outcome in outcomes] == [False] * 5 + [True]
    assert sum(outcome.read for outcome in outcomes) == 6
    assert compared([judged(*mute)], [])[0][0].dropped == {"fewer than two readable judgements": 1}
    assert compared([], [])[0] == []


def test_a_judgement_without_a_score_or_said_before_takes_no_part() -> None:
    [outcome], engine = compared([judged(GOOD, "No score.", GOOD, "Score: 9", POOR)], ["Verdict: A", "Verdict: B"])
    [row] = outcome.rows
    assert row["targets"] == [GOOD, None, None, None, POOR]
    assert [(battle["a"], battle["b"]) for battle in row["battles"]] == [(0, 4)] and len(engine.asked) == 2


def test_a_direct_verdict_is_the_more_probable_one() -> None:
    [outcome], engine = compared([judged(GOOD, POOR)], [[0.7, 0.3], [0.2, 0.8]], direct=True)
    assert outcome.rows[0]["battles"][0]["verdicts"] == ["A", "B"]
    assert all((request.prefix, request.choices) == ("Verdict: ", ("A", "B")) for request in engine.asked)


def test_judgements_of_another_template_are_refused() -> None:
    other = {"model": "M1", "template": "rating", "template_hash": "0"}
    with pytest.raises(BadRow, match="rating"):
        judged(GOOD, POOR, judge=other)
    with pytest.raises(BadRow, match="scores"):
        judged(GOOD, POOR, scores=[1])


def test_a_score_without_reasons_is_refused() -> None:
    with pytest.raises(BadRow, match=r"there is no judgement to compare.*--template additive"):
        judged("Score: 3", score_from=["direct"])


# --- the ratings -----------------------------------------------------------------------------


def battle(a: int, b: int, *verdicts: str | None) -> Record:
    return {"a": a, "b": b, "verdicts": [*verdicts]}


def meta_row(targets: list[str | None], *battles: Record, k: int = 0) -> Record:
    return {
        "id": f"p/{k}", "prompt_id": "p", "prompt": "Why?", "response": "Because.",
        "judge_prompt": [{"role": "user", "content": "Judge!"}], "targets": targets, "battles": [*battles],
    }  # fmt: skip


def test_the_weight_of_a_position_is_the_share_of_wins_in_the_other() -> None:
    # first: 3 wins, second: 1 win
    rows = [meta_row(["x", "y"], battle(0, 1, "A", "A")), meta_row(["x", "y"], battle(0, 1, "A", "B"))]
    assert position_weights(rows) == PositionWeights(0.25, 0.75)
    assert position_weights([meta_row(["x", "y"], battle(0, 1, "tie", None))]) == PositionWeights(0.5, 0.5)


def test_the_battle_matrix_by_hand() -> None:
    weights = PositionWeights(0.25, 0.75)
    row = meta_row(["x", "y", "z"], battle(0, 1, "A", "B"), battle(0, 2, "A", "A"), battle(1, 2, "tie", None))
    # 0 beats 1 shown first (.25) and shown second (.75); 0 beats 2 shown first, 2 beats 0 shown first
    assert battle_matrix(row, weights).tolist() == [[0, 1, 0.25], [0, 0, 0], [0.25, 0, 0]]


def test_two_judgements_in_closed_form() -> None:
    row = meta_row(["x", None, "y"], battle(0, 2, "A", "B"))
    scores = meta_scores(row, PositionWeights(0.4, 0.6))
    gap = 400 * math.log10((1 + 0.5) / 0.5)  # won in both orders, and half a win added each way
    assert scores == [pytest.approx(gap / 2, abs=1e-3), None, pytest.approx(-gap / 2, abs=1e-3)]


def test_the_ratings_against_a_general_optimiser() -> None:
    optimize, numpy = pytest.importorskip("scipy.optimize"), pytest.importorskip("numpy")
    draw = random.Random(5)
    row = meta_row(
        list("abcde"),
        *(battle(a, b, *draw.choices(["A", "B", "tie", None], k=2)) for a, b in combinations(range(5), 2)),
    )
    weights = PositionWeights(0.3, 0.7)
    wins = battle_matrix(row, weights) + 0.5 * (1 - numpy.eye(5))
    loss = lambda e: float((wins * numpy.log1p(numpy.exp(e[None, :] - e[:, None]))).sum())  # noqa: E731
    best = optimize.minimize(loss, numpy.zeros(5), tol=1e-12).x
    expected = 400 / math.log(10) * (best - best.mean())
    assert meta_scores(row, weights) == pytest.approx(expected.tolist(), abs=0.01)


def test_position_bias_cancels() -> None:
    """Likes the first one better in a share of its verdicts, and still ranks as it would without."""
    draw = random.Random(0)
    quality = [0, 3, 1, 4, 2]
    for bias in (0.0, 0.3, 0.6):
        rows = []
        for k in range(200):
            battles = []
            for a, b in combinations(range(5), 2):
                fair = ["A" if quality[first] > quality[second] else "B" for first, second in ((a, b), (b, a))]
                battles.append(battle(a, b, *("A" if draw.random() < bias else verdict for verdict in fair)))
            rows.append(meta_row(list("abcde"), *battles, k=k))
        weights = position_weights(rows)
        assert weights.first == pytest.approx((1 - bias) / 2, abs=0.03)
        total = [sum(column) for column in zip(*(meta_scores(row, weights) for row in rows), strict=True)]
        assert sorted(range(5), key=lambda k: total[k]) == sorted(range(5), key=lambda k: quality[k])


@pytest.mark.parametrize("always", ["A", "B"])
def test_a_meta_judge_that_sees_positions_only_makes_no_pair(always: str) -> None:
    rows = [meta_row(["x", "y", "z"], *(battle(a, b, always, always) for a, b in combinations(range(3), 2)))]
    weights = position_weights(rows)
    assert meta_scores(rows[0], weights) == [0, 0, 0]
    [outcome] = judge_pairs(rows, lambda row: meta_scores(row, weights), Choice())
    assert outcome.rows == [] and outcome.dropped == {"tie": 1}


# --- the pairs -------------------------------------------------------------------------------


def pairs_of(row: Record, ratings: list[float | None], **choice) -> tuple[list[Record], dict]:
    [outcome] = judge_pairs([row], lambda _: ratings, Choice(**choice))
    return outcome.rows, outcome.dropped


def test_the_best_judgement_against_the_worst() -> None:
    row = {**meta_row(["one", None, "three", "four"]), "prompt_key": "key", "judge": {"model": "M1"}}
    [pair], dropped = pairs_of(row, [10.0, None, -30.0, 20.0])
    assert dropped == {} and pair == {
        "prompt_key": "key",
        "judge": {"model": "M1"},
        "id": "p/0",
        "prompt": [{"role": "user", "content": "Judge!"}],
        "chosen": [{"role": "assistant", "content": "four"}],
        "rejected": [{"role": "assistant", "content": "three"}],
        "prompt_id": "p",
        "score_chosen": 20.0,
        "score_rejected": -30.0,
        "chosen_id": "p/0/j3",
        "rejected_id": "p/0/j2",
    }
    assert pair_record(pair) == pair


def test_why_there_is_no_pair_of_judgements() -> None:
    assert pairs_of(meta_row(["x", None]), [0.0, None])[1] == {"fewer than two readable judgements": 1}
    assert pairs_of(meta_row(["x", "y"]), [0.0, 0.0])[1] == {"tie": 1}
    assert pairs_of(meta_row(["xxx", "y"]), [5.0, 0.0], max_chosen_length=2)[1] == {"chosen too long": 1}
    assert pairs_of(meta_row(["x", "y"]), [5.0, 0.0], min_gap=6)[1] == {"gap too small": 1}


def test_length_control_is_that_of_replies() -> None:
    row = meta_row(["a" * 90, "b" * 40, "c" * 10, "d" * 80, "e" * 20])
    [pair], _ = pairs_of(row, [50.0, 40.0, 30.0, 20.0, 10.0], rho=0.25)
    assert (pair["chosen_id"], pair["rejected_id"]) == ("p/0/j1", "p/0/j3")


@pytest.mark.parametrize(
    "wrong",
    [
        {"battles": None},
        {"battles": [{"a": 0, "b": 2, "verdicts": ["A", "B"]}]},
        {"battles": [{"a": 0, "b": 1, "verdicts": ["A"]}]},
        {"battles": ["x"]},
        {"targets": ["x", 3]},
        {"targets": ["x", None], "battles": [{"a": 0, "b": 1, "verdicts": ["A", "B"]}]},
        {"judge_prompt": "Judge!"},
    ],
)
def test_a_row_that_no_meta_judge_wrote_is_bad(wrong: Record) -> None:
    row = meta_row(["x", "y"], battle(0, 1, "A", "B"))
    assert meta_record(row)["targets"] == ["x", "y"]
    with pytest.raises(BadRow):
        meta_record({**row, **wrong})


# --- the commands ----------------------------------------------------------------------------


def test_judged_rows_become_pairs_for_the_judge(srlm: Srlm) -> None:
    write_rows(srlm.folder / "judged.jsonl", META_JUDGED)
    argv = ["judge", "--meta", "--direct", "--engine", "echo", "--in", "judged.jsonl", "--out", "meta.jsonl"]
    assert srlm(*argv).code == 0
    counts = read_json(srlm.folder / "meta.jsonl.meta.json")["counts"]
    assert counts["read"] == len(META_JUDGED)
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["read"]
    rows = read_rows(srlm.folder / "meta.jsonl")
    assert len(rows) == len({row["prompt"] for row in META_JUDGED})
    result = srlm("make-pairs", "--of", "judgements", "--in", "meta.jsonl")
    assert result.code == 0 and result.rows, result.err
    for pair in result.rows:
        assert "<reply>" in pair["prompt"][0]["content"]
        for side in ("chosen", "rejected"):
            assert ADDITIVE.score(pair[side][0]["content"]) is not None
        assert pair["chosen"] != pair["rejected"] and pair["score_chosen"] > pair["score_rejected"]
    balanced = srlm("make-pairs", "--of", "judgements", "--in", "meta.jsonl", "--length-penalty", "auto")
    assert balanced.code == 0 and "mean gap in length" in balanced.err


def test_the_verdicts_that_cannot_be_read_have_a_limit(srlm: Srlm) -> None:
    argv = ["judge", "--meta", "--engine", "echo", "--max-unparsed", "0.5"]
    result = srlm(*argv, stdin=as_lines(META_JUDGED))
    assert result.code == 4 and "verdicts" in result.err and "--direct" in result.err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--rescore"], 2, "--rescore"),
        (["--meta-template", "pairwise"], 2, "$task"),
        (["--template", "rating"], 3, "additive"),
    ],
)
def test_what_does_not_go_with_meta_is_told(srlm: Srlm, args: list[str], code: int, words: str) -> None:
    rows = [{**row, "judge": {"template": "additive", "template_hash": ADDITIVE.hash}} for row in META_JUDGED]
    result = srlm("judge", "--meta", "--engine", "echo", *args, stdin=as_lines(rows))
    assert result.code == code and words in result.err, result.err
