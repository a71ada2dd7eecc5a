"""Judgements drawn until the best and the worst reply are settled: the same draws, fewer of them."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist, fmean

import pytest

from commands_table import RESPONSES
from helpers import Record, Srlm, as_lines, read_rows, write_rows
from simulated_judge import SimulatedJudge, accuracy, ends, replies, rows_of
from srlm_cli import templates
from srlm_cli.engines.base import Sampling
from srlm_cli.stages.judge import JudgeOptions, judge
from srlm_cli.stages.settle import SettleOptions, chance_to_differ, contenders, judge_until_settled
from tiny import tiny_model

ADDITIVE = templates.load_judge("additive")
MOST = 9


def options(**more) -> SettleOptions:
    return SettleOptions(ADDITIVE, more.pop("num_judgements", MOST), Sampling(), 0, **more)


def settled(rows: list[Record], engine, **more) -> list[Record]:
    return [row for outcome in judge_until_settled(rows, engine, options(**more)) for row in outcome.rows]


def with_all(rows: list[Record], engine) -> list[Record]:
    """Return the rows with all judgements."""
    return [row for outcome in judge(rows, engine, JudgeOptions(ADDITIVE, MOST, Sampling(), 0)) for row in outcome.rows]


def test_what_is_drawn_is_the_beginning_of_what_more_would_have_been() -> None:
    quality = {f"r{n}": n % 5 + 0.3 for n in range(8)}
    rows = rows_of(quality)
    fixed = with_all(rows, SimulatedJudge(quality))
    found = settled(rows, SimulatedJudge(quality))
    assert len({len(row["scores"]) for row in found}) > 1
    for one, whole in zip(found, fixed, strict=True):
        drawn = len(one["scores"])
        assert 2 <= drawn <= MOST and one["scores"] == whole["scores"][:drawn]
        assert one["judgements"] == whole["judgements"][:drawn] and one["score"] == fmean(one["scores"])
    assert found[0]["judge"]["settle"] == 0.9


def test_a_clear_order_needs_two_judgements_and_a_tie_more() -> None:
    clear = {"a": 0.0, "b": 2.5, "c": 5.0}
    [outcome] = judge_until_settled(rows_of(clear), SimulatedJudge(clear, noise=0.0), options())
    assert [len(row["scores"]) for row in outcome.rows] == [2, 2, 2]
    assert outcome.counts["judgements saved"] == 21 and outcome.counts["prompts settled early"] == 1
    same = {"a": 3.0, "b": 3.0}
    [outcome] = judge_until_settled(rows_of(same), SimulatedJudge(same, noise=0.0), options())
    assert [len(row["scores"]) for row in outcome.rows] == [6, 6] and outcome.counts["judgements saved"] == 6


def test_replies_in_the_middle_and_lone_replies_get_no_more_judgements() -> None:
    quality = {"low": 0.0, "low too": 0.0, "middle": 2.5, "high": 5.0}
    found = settled(rows_of(quality), SimulatedJudge(quality, noise=0.0))
    assert [len(row["scores"]) for row in found] == [6, 6, 2, 2]
    alone = {"alone": 3.0}
    assert [len(row["scores"]) for row in settled(rows_of(alone), SimulatedJudge(alone))] == [2]


def test_a_reply_that_cannot_be_read_gets_all_its_judgements_and_no_score() -> None:
    quality = {"a": 0.0, "mute": None, "c": 5.0}
    [outcome] = judge_until_settled(rows_of(quality), SimulatedJudge(quality, noise=0.0), options())
    assert [len(row["scores"]) for row in outcome.rows] == [2, 9, 2]
    assert outcome.rows[1]["score"] is None and outcome.counts["unparsed"] == 9


def test_the_probability_that_the_worst_overtakes_is_that_of_the_means_at_the_end() -> None:
    scores = [[1.0, 3.0, 2.0], [3.0, 4.0, 5.0]]
    # squares 2 + 2, prior 1 with the weight of one judgement, 4 degrees of freedom; a third of 9 judgements is drawn
    variance = (4 + 1) / (4 + 1)
    change = NormalDist(0, (2 * variance * (1 - 3 / 9) / 3) ** 0.5).cdf(-2)
    assert contenders(scores, [3, 3], options(settle=1 - change * 1.01)) == set()
    assert contenders(scores, [3, 3], options(settle=1 - change * 0.99)) == {0, 1}


@pytest.mark.parametrize(
    ("tied", "inwards"), [(5.0, 1.0), (3.0, 0.6)], ids=["at the limit of the scale", "within the scale"]
)
def test_equal_means_are_settled_when_no_score_will_probably_differ(tied: float, inwards: float) -> None:
    scores, drawn = [[tied] * 4, [tied] * 4, [tied] * 4, [0.0] * 2], [4, 4, 4, 2]
    # no one of 10 repeated judgements differs; 5 are left for each of the tied replies
    change = inwards * at_worst(10, 5) + (1 - inwards) * at_worst(10, 2 * 5)
    [needed, enough] = [contenders(scores, drawn, options(settle=1 - change * by)) for by in (0.99, 1.01)]
    assert (needed, enough) == ({0, 1, 2}, set())


def at_worst(repeated: int, left: int) -> float:
    """Return how often, at the worst rate, a judge that never differed in the repeated judgements then does."""
    return max(same**repeated * (1 - same**left) for same in (rate / 10_000 for rate in range(1, 10_000)))


@pytest.mark.parametrize(("repeated", "left"), [(1, 1), (10, 5), (72, 22), (5, 60)])
def test_a_judge_that_never_differed_is_trusted_as_the_worst_rate_allows(repeated: int, left: int) -> None:
    assert chance_to_differ(repeated, 0, left) == pytest.approx(at_worst(repeated, left), abs=1e-6)


def test_a_judge_that_differed_does_so_at_its_rate_and_never_without_judgements_left() -> None:
    assert chance_to_differ(9, 2, 3) == pytest.approx(1 - 0.75**3)
    assert chance_to_differ(0, 0, 7) == 1 and chance_to_differ(9, 2, 0) == chance_to_differ(9, 0, 0) == 0


def test_equal_means_of_scores_that_differ_stay_open() -> None:
    for one, other in (([4.0, 5.0], [5.0, 4.0]), ([3.1, 3.9], [3.9, 3.1])):
        for times in (1, 2, 4):
            scores = [one * times, other * times, [0.0] * 2 * times]
            assert contenders(scores, [2 * times] * 3, options()) == {0, 1}


def test_a_sure_judge_makes_the_same_pairs_of_fewer_judgements() -> None:
    """12 replies with 0 or 5 points each, as a trained judge gives them; all 12 are equal for half of the prompts."""
    qualities = [[5.0] * right + [0.0] * (12 - right) for right in (0, 2, 10, 12)]
    quality = {f"r{n}.{k}": one for n, some in enumerate(qualities) for k, one in enumerate(some)}
    rows = [row for n in range(4) for row in rows_of({f"r{n}.{k}": 0 for k in range(12)}, prompt=f"Ask {n}?")]
    found, fixed = (make(rows, SimulatedJudge(quality, noise=0.0)) for make in (settled, with_all))
    assert ends(found) == ends(fixed) and [row["score"] for row in found] == [row["score"] for row in fixed]
    assert sum(len(row["scores"]) for row in found) <= 0.6 * MOST * len(rows)


def test_a_higher_confidence_takes_more_judgements_and_a_range_is_kept_to() -> None:
    quality = {f"r{n}": 2 + 0.4 * n for n in range(4)}
    counts = []
    for settle in (0.6, 0.9, 0.99):
        found = settled(rows_of(quality), SimulatedJudge(quality), settle=settle, first=3, num_judgements=7)
        counts.append(sum(len(row["scores"]) for row in found))
        assert all(3 <= len(row["scores"]) <= 7 for row in found)
    assert counts == sorted(counts) and counts[0] < counts[2]


def test_a_simulated_judge_needs_six_tenths_of_the_judgements_at_the_same_agreement() -> None:
    """300 prompts, 4 replies, quality and noise of one point each: share, same pairs as K = 9, agreement."""
    rows, quality = replies(300, 1.0)
    fixed = with_all(rows, SimulatedJudge(quality))
    found = settled(rows, SimulatedJudge(quality))
    assert sum(len(row["scores"]) for row in found) <= 0.6 * 9 * len(rows)
    assert abs(accuracy(found, quality) - accuracy(fixed, quality)) < 0.02
    assert fmean(one == other for one, other in zip(ends(found), ends(fixed), strict=True)) > 0.85


def test_prompts_take_turns_and_settled_ones_leave() -> None:
    clear, same = {"a": 0.0, "b": 5.0}, {"c": 3.0, "d": 3.0}
    judge_of_both = SimulatedJudge(clear | same, noise=0.0)
    outcomes = list(judge_until_settled([*rows_of(clear), *rows_of(same, prompt="How?")], judge_of_both, options()))
    assert judge_of_both.rounds == [4, *[2] * 4]
    assert [outcome.tokens_out for outcome in outcomes] == [4, 12]


# --- the command -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--num-judgements", "9:2"), "expected a number from 1 to 65536, or LOW:HIGH such as 2:9, got '9:2'"),
        (("--num-judgements", "0"), "expected a number from 1"),
        (("--num-judgements", "2:9", "--template", "criteria"), "which has criteria"),
        (("--settle", "0.9"), "--settle needs a range of judgements"),
        (("--num-judgements", "2:9", "--by", "group"), "--num-judgements 2:9 is for --by pointwise"),
        (("--num-judgements", "2:9", "--meta"), "--num-judgements 2:9 cannot be used with --meta"),
        (("--num-judgements", "2:9", "--template", "score_only", "--score", "expected"), "draws nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_does_not_fit_a_range_is_refused(srlm: Srlm, more: tuple[str, ...], said: str) -> None:
    result = srlm("judge", "--engine", "echo", *more, stdin=as_lines(RESPONSES))
    assert result.code == 2 and said in result.err and len(result.err.splitlines()) == 1


def test_settings_take_a_range(srlm: Srlm) -> None:
    (srlm.folder / "srlm.toml").write_text('[judge]\nnum-judgements = "2:4"\nsettle = 0.8\n')
    result = srlm("judge", "--engine", "echo", stdin=as_lines(RESPONSES))
    assert result.code == 0 and {2, 4} >= {min(len(row["scores"]) for row in result.rows)}
    assert all(2 <= len(row["scores"]) <= 4 for row in result.rows)


@pytest.mark.model
@pytest.mark.parametrize("score", [("--force-score",), ("--score", "expected")], ids=" ".join)
def test_a_model_draws_the_beginning_of_what_more_judgements_are(
    srlm: Srlm, score: tuple[str, ...], tmp_path: Path
) -> None:
    tiny_model(tmp_path / "tiny")
    write_rows(srlm.folder / "in.jsonl", RESPONSES)
    argv = ("judge", "--in", "in.jsonl", "--model", "./tiny", "--max-new-tokens", "8", *score, "--dtype", "float32")
    assert srlm(*argv, "--num-judgements", "5", "--out", "all.jsonl").code == 0
    assert srlm(*argv, "--num-judgements", "2:5", "--settle", "0.7", "--out", "some.jsonl").code == 0
    every, some = read_rows(srlm.folder / "all.jsonl"), read_rows(srlm.folder / "some.jsonl")
    for whole, begun in zip(every, some, strict=True):
        drawn = len(begun["scores"])
        for name in ("judgements", "score_from", "judgement_finish_reasons"):
            assert begun[name] == whole[name][:drawn], name
        for name in ("scores", "score_mass"):  # probabilities of other batches are rounded otherwise
            for one, other in zip(begun[name], whole[name], strict=False):
                assert one == other or one == pytest.approx(other, rel=1e-5), name
