"""Judges to compare with, of the echo engine: constant, random, longest, shortest."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from helpers import SHARED, Srlm, as_lines
from srlm_cli.engines import LazyEngine, open_engine
from srlm_cli.engines.base import Completion, EngineSpec, Request, Sampling
from srlm_cli.engines.echo import echo_name, probabilities
from srlm_cli.errors import OptionError

SCORES = ("0", "1", "2", "3", "4", "5")
OASST = SHARED / "oasst2" / "ranked_eval.jsonl"


def ask(model: str | None, text: str = "Why?", seeds: tuple[int, ...] = (1,), **more) -> Completion:
    """Return what the echo engine answers to one message."""
    request = Request([{"role": "user", "content": text}], **{"sampling": Sampling(), "seeds": seeds, **more})
    [completion] = open_engine(EngineSpec("echo", model)).generate([request])
    return completion


def score_of(completion: Completion) -> float:
    [text] = completion.texts
    assert text.startswith("Score: ")
    return float(text.removeprefix("Score: "))


@pytest.mark.parametrize(
    ("model", "text"), [("constant:3", "Score: 3"), ("constant:2.5", "Score: 2.5"), ("constant:0", "Score: 0")]
)
def test_constant_says_one_score(model: str, text: str) -> None:
    assert {text} == set(ask(model, seeds=(1, 2, 3)).texts) == set(ask(model, "What?" * 99).texts)


def test_longest_and_shortest_order_by_length_to_the_character() -> None:
    lengths = [1, 2, 100, 101, 5000, 5001, 100_000, 100_001]
    longest = [score_of(ask("longest", "x" * length)) for length in lengths]
    shortest = [score_of(ask("shortest", "x" * length)) for length in lengths]
    assert all(a < b for a, b in pairwise(longest)) and all(a > b for a, b in pairwise(shortest))
    assert all(0 <= score <= 5 for score in longest + shortest)
    assert score_of(ask("longest", "x" * 1000)) == 2.5  # 5 (1 - 1 / (1 + 1000 / 1000))
    assert score_of(ask("shortest", "x" * 4000)) == 1  # 5 / (1 + 4000 / 1000)


def test_what_the_judge_has_written_does_not_count_as_length() -> None:
    asked = {"choices": SCORES, "text": "x" * 1000}
    assert ask("longest", prefix="Well." * 99, **asked).probabilities == ask("longest", **asked).probabilities


def test_random_draws_each_whole_score_alike_by_seed() -> None:
    texts = ask("random", seeds=tuple(range(6000))).texts
    counts = Counter(texts)
    assert set(counts) == {f"Score: {score}" for score in SCORES}
    assert all(880 < count < 1120 for count in counts.values())  # 1,000 each, 4 standard deviations
    assert ask("random", seeds=(7,)).texts == [texts[7]]


@pytest.mark.parametrize(
    ("model", "text", "likely", "chosen"),
    [
        ("constant:3", "x", [0, 0, 0, 1, 0, 0], "3"),
        ("constant:2.25", "x", [0, 0, 0.75, 0.25, 0, 0], "2"),
        ("constant:9", "x", [0, 0, 0, 0, 0, 1], "5"),
        ("longest", "x" * 1000, [0, 0, 0.5, 0.5, 0, 0], "2"),  # 2.5
        ("shortest", "x" * 4000, [0, 1, 0, 0, 0, 0], "1"),
    ],
)
def test_choices_have_the_score_as_their_mean(model: str, text: str, likely: list[float], chosen: str) -> None:
    completion = ask(model, text, choices=SCORES, seeds=(1, 2))
    assert completion.probabilities == pytest.approx(likely) and completion.texts == [chosen] * 2


def test_choices_that_are_no_scores_or_drawn_are_even() -> None:
    assert probabilities(("A", "B"), 3.0) == [0.5, 0.5] and probabilities(SCORES, None) == [1 / 6] * 6
    assert set(ask("random", choices=SCORES, seeds=tuple(range(99))).texts) == set(SCORES)
    assert set(ask("longest", choices=("A", "B"), seeds=tuple(range(20))).texts) == {"A", "B"}


def test_rows_tell_which_judge_it_was() -> None:
    names = ["constant:3", "random", "longest", "shortest"]
    assert [LazyEngine(EngineSpec("echo", name)).model for name in names] == [f"echo:{name}" for name in names]
    assert [open_engine(EngineSpec("echo", name)).model for name in names] == [f"echo:{name}" for name in names]


@pytest.mark.parametrize("name", [None, "", "runs/first/M1/model", "Qwen/Qwen2.5-0.5B", "smollm2-135m-instruct"])
def test_the_name_of_a_model_does_not_matter(name: str | None) -> None:
    assert echo_name(name) == "echo" and ask(name).texts == ask(None).texts


@pytest.mark.parametrize("name", ["longst", "constant", "constant:", "constant:x", "constant:nan", "random:3"])
def test_an_unknown_judge_names_those_there_are(name: str) -> None:
    with pytest.raises(OptionError, match="random, longest, shortest, constant:N"):
        LazyEngine(EngineSpec("echo", name))


# As written by version 0.1 (commit d7a968f).
WRITTEN = [
    "Pocket rabbit breeze mosaic tunnel needle lantern beacon velvet harbor.\nScore: 1",
    "Willow shadow fabric spring dragon nickel timber pillow thunder spring lizard oasis cotton breeze garnet ivory "
    "bottle daisy.\nScore: 2",
]

# --- the commands ----------------------------------------------------------------------------

# People like the longer reply in 3 of 5 pairs: 2 of 3 of the first prompt, all of the second, none of the third.
RANKED = [
    {"prompt": "One?", "responses": [{"text": "x" * n, "rank": r} for r, n in enumerate([40, 41, 7])]},
    {"prompt": "Two?", "responses": [{"text": "long indeed", "rank": 0}, {"text": "short", "rank": 1}]},
    {"prompt": "Three?", "responses": [{"text": "no", "rank": 0}, {"text": "not at all", "rank": 1}]},
]


def metrics(srlm: Srlm, model: str, rows: str, *more: str) -> dict[str, float]:
    judged = srlm("judge", "--engine", "echo", "--model", model, "--quiet", *more, stdin=rows)
    assert judged.code == 0, judged.err
    assert {row["judge"]["model"] for row in judged.rows} == {f"echo:{model}"}
    measured = srlm("eval", "reward", stdin=judged.out)
    return {row["metric"]: row["value"] for row in measured.rows if "replies" not in row}


@pytest.mark.parametrize("more", [(), ("--template", "score_only", "--score", "expected")], ids=["text", "expected"])
def test_the_longest_judge_is_the_longest_wins_baseline(srlm: Srlm, more: tuple[str, ...]) -> None:
    longest = metrics(srlm, "longest", as_lines(RANKED), *more)
    assert longest["pairwise_accuracy"] == longest["longest_wins"] == pytest.approx(3 / 5)
    shortest = metrics(srlm, "shortest", as_lines(RANKED), *more)
    assert shortest["pairwise_accuracy"] == pytest.approx(2 / 5) and shortest["tie_rate"] == 0


def test_a_constant_judge_is_all_ties(srlm: Srlm) -> None:
    constant = metrics(srlm, "constant:3", as_lines(RANKED))
    assert (constant["pairwise_accuracy"], constant["tie_rate"], constant["scored_rate"]) == (0, 1, 1)


@pytest.mark.skipif(not OASST.is_file(), reason="the shared ranked replies are not here")
def test_baselines_on_real_replies(srlm: Srlm) -> None:
    rows = OASST.read_text(encoding="utf-8")
    longest = metrics(srlm, "longest", rows)
    assert longest["pairwise_accuracy"] == longest["longest_wins"] and longest["scored_rate"] == 1
    assert metrics(srlm, "random", rows)["pairwise_accuracy_without_ties"] == pytest.approx(0.5, abs=0.1)


def test_an_unknown_judge_is_a_usage_error_before_anything_is_written(srlm: Srlm) -> None:
    result = srlm("judge", "--engine", "echo", "--model", "longst", "--out", "out.jsonl", stdin=as_lines(RANKED))
    assert result.code == 2 and "longest" in result.err and not list(srlm.folder.iterdir())


def test_sample_writes_what_it_always_wrote(srlm: Srlm) -> None:
    result = srlm("sample", "--engine", "echo", "-n", "2", stdin=as_lines([{"prompt": "Why is the sky blue at noon?"}]))
    assert [row["model"] for row in result.rows] == ["echo"] * 2
    assert [row["response"] for row in result.rows] == WRITTEN
