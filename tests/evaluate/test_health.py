"""Judge health, against a case worked out by hand, and the guards that end a collapsing loop with exit 4."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections.abc import Iterator

import pytest

from helpers import Srlm, as_lines, read_json, read_rows, write_rows
from srlm_cli.errors import ExitCode
from srlm_cli.evaluate.health import Limits, health_metrics, numbers_of, over_limits, ranks, spearman
from srlm_cli.records import judged_record
from srlm_cli.stats.bootstrap import metrics, resampled_means


def judged(prompt: str, length: int, scores: list | None, sources: list | None = None, reasons: list | None = None):
    """Return a judged row as `srlm judge` writes it: a response of so many characters, K scores."""
    known = [score for score in scores or [] if score is not None]
    return judged_record(
        {
            "prompt": prompt,
            "response": "x" * length,
            "score": sum(known) / len(known) if known else None,
            "scores": scores,
            "score_from": sources or [None if score is None else "text" for score in scores],
            "judgement_finish_reasons": reasons or ["stop"] * len(scores),
            "judge": {"model": "M1"},
        }
    )


# Worked out by hand in the tests: 13 judgements, 9 of them with a score; 5 responses, 4 of them scored.
ROWS = [
    judged("One?", 10, [5.0, 5.0, 4.0]),
    judged("One?", 20, [2.0, None, 3.0], ["text", None, "finish"], ["stop", "length", "stop"]),
    judged("One?", 30, [None, None, None], reasons=["length"] * 3),
    judged("Two?", 40, [4.5, 3.5], ["expected"] * 2),
    judged("Two?", 60, [4.0, 4.0], ["expected"] * 2),
]
BEFORE = [judged("One?", 10, [4.0]), judged("One?", 22, [1.0])]


def by_name(rows: list[dict]) -> dict[str, dict]:
    return {row["metric"]: row for row in rows if row["metric"] != "share_of_score"}


def health(rows: list[dict], before: list[dict] | None = None, *accuracies: dict | None, seed: int = 0) -> list[dict]:
    return health_metrics(numbers_of(rows), numbers_of(before) if before else None, *accuracies, seed=seed)


def shares(rows: list[dict]) -> dict[int, float | None]:
    return {row["score"]: row["value"] for row in rows if row["metric"] == "share_of_score"}


def test_expectations_near_each_other_are_not_one_score() -> None:
    rows = [judged("One?", n, [3.1 + n / 10], ["direct"]) for n in range(4)] + [judged("Two?", 9, [3.14], ["direct"])]
    found = by_name(health(rows))
    assert (found["top_score_share"]["value"], found["top_score_share"]["score"]) == (2 / 5, 3.1)
    assert shares(health(rows))[3] == 1.0


def test_a_score_asked_for_at_once_is_read_and_one_that_failed_does_not_stop_the_loop() -> None:
    rows = [judged(f"{n}?", 10, [n % 5 + 0.5], ["direct"]) for n in range(99)] + [judged("Long?", 10, [None], [None])]
    found = health(rows)
    assert (by_name(found)["parse_rate"]["value"], by_name(found)["parse_rate"]["n"]) == (0.99, 100)
    assert over_limits(found, Limits()) is None


def test_health_by_hand() -> None:
    rows = health(ROWS)
    expected = {
        "parse_rate": (8 / 13, 13),
        "forced_score_rate": (1 / 13, 13),
        "cut_off": (4 / 13, 13),
        "top_score_share": (3 / 9, 9),
        "tie_rate": (1 / 2, 2),
        "tied_prompts": (1 / 2, 2),
        "score_std_within_k": ((math.sqrt(2 / 9) + 0.5 + 0.5 + 0.0) / 4, 4),
        "gap": ((14 / 3 - 2.5 + 0.0) / 2, 2),
        "mean_score": ((14 / 3 + 2.5 + 4.0 + 4.0) / 4, 4),
        "length": (160 / 5, 5),
        "longest_agreement": (0.0, 1),
        "score_length_spearman": (-1.0, 1),  # the other prompt's scores do not vary
        "score_length_spearman_overall": (-1.5 / math.sqrt(4.5 * 5), 4),  # ranks 4 1 2.5 2.5 and 1 2 3 4
    }
    found = by_name(rows)
    assert {name: (row["value"], row["n"]) for name, row in found.items()} == {
        name: (pytest.approx(value), n) for name, (value, n) in expected.items()
    }
    assert {(row["task"], row["model"]) for row in rows} == {("health", "M1")}


def test_the_histogram_rounds_halves_up() -> None:
    rows = health(ROWS)  # 5 5 4, 2 3, 4.5 3.5, 4 4
    assert shares(rows) == {score: pytest.approx(n / 9) for score, n in enumerate([0, 0, 1, 1, 4, 3])}
    assert by_name(rows)["top_score_share"]["score"] == 4
    assert shares(health([judged("One?", 5, [2.5, 0.49])])) == {0: 0.5, 1: 0, 2: 0, 3: 0.5, 4: 0, 5: 0}


def test_scores_off_the_usual_range_have_rows_of_their_own() -> None:
    found = shares(health([judged("One?", 5, [9.6, -1.0, 3.0, 3.0])]))
    assert found == {-1: 0.25, 0: 0, 1: 0, 2: 0, 3: 0.5, 4: 0, 5: 0, 10: 0.25}


def test_against_the_round_before_by_hand() -> None:
    found = by_name(health(ROWS, BEFORE))
    growth, change = found["length_growth"], found["gap_change"]
    assert (growth["value"], growth["n"]) == (2.0, 5)
    assert (change["value"], change["n"]) == (pytest.approx((14 / 3 - 2.5) / 2 - 3.0), 2)
    assert "length_growth" not in by_name(health(ROWS))


def test_nothing_before_has_no_growth() -> None:
    empty = by_name(health(ROWS, [judged("One?", 0, [None])]))
    assert empty["length_growth"]["value"] is empty["gap_change"]["value"] is None


def test_against_people() -> None:
    now = {"metric": "pairwise_accuracy", "value": 0.75, "n": 40, "ci_low": 0.6, "ci_high": 0.9, "model": "M9"}
    found = by_name(health(ROWS, None, now, {**now, "value": 0.5}))
    same = {"task": "health", "n": 40, "model": "M1"}
    assert found["accuracy"] == {**same, "metric": "accuracy", "value": 0.75, "ci_low": 0.6, "ci_high": 0.9}
    assert found["accuracy_change"] == {**same, "metric": "accuracy_change", "value": 0.25} | dict.fromkeys(
        ("ci_low", "ci_high")
    )
    assert "accuracy_change" not in by_name(health(ROWS, None, now))
    nothing = {**now, "value": None, "n": 0}
    assert by_name(health(ROWS, None, now, nothing))["accuracy_change"]["value"] is None


def test_spearman_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    for _ in range(60):
        x, y = ([draw.randint(0, 5) / 3 for _ in range(7)] for _ in range(2))
        assert ranks(x) == stats.rankdata(x).tolist()
        expected = [stats.spearmanr(x, y).statistic] if len(set(x)) > 1 and len(set(y)) > 1 else []
        assert spearman(list(zip(x, y, strict=True))) == pytest.approx(expected)
    assert spearman([]) == spearman([(1.0, 2)]) == spearman([(1.0, 2), (1.0, 3)]) == []


def test_a_judge_of_length() -> None:
    rows = [judged(f"Question {n}?", 10 * k + 1, [float(k)]) for n in range(5) for k in range(4)]
    found = by_name(health(rows))
    assert found["longest_agreement"]["value"] == found["score_length_spearman"]["value"] == 1.0
    turned = by_name(health([judged(f"Question {n}?", 50 - k, [float(k)]) for n in range(5) for k in range(4)]))
    assert turned["longest_agreement"]["value"] == 0.0 and turned["score_length_spearman_overall"]["value"] == -1.0


def test_rows_of_other_tools_lack_what_they_lack() -> None:
    plain = [{"prompt": "One?", "response": "x" * n, "score": score} for n, score in ((1, 5), (2, 3), (3, None))]
    odd = [{**row, "scores": "5", "score_from": "text", "judge": ["a"]} for row in plain]
    for rows in (plain, odd):
        found = by_name(health([judged_record(row) for row in rows]))
        for name in ("parse_rate", "forced_score_rate", "cut_off", "score_std_within_k"):
            assert (found[name]["value"], found[name]["n"]) == (None, 0)
        assert found["gap"]["value"] == 2.0 and found["top_score_share"]["n"] == 2


def test_no_rows_are_nulls() -> None:
    assert all((row["value"], row["n"]) == (None, 0) for row in health([], [], None))
    assert over_limits(health([]), Limits()) is None


def test_the_order_of_the_rows_does_not_matter() -> None:
    draw = random.Random(0)
    rows = [
        judged(f"Question {n}?", draw.randint(1, 90), [draw.randint(0, 5) * 1.0, draw.randint(0, 5) * 1.0])
        for n in range(20)
        for _ in range(4)
    ]
    straight = health(rows)
    draw.shuffle(rows)
    for row, other in zip(health(rows), straight, strict=True):
        assert row == {key: pytest.approx(value) if "ci_" in key else value for key, value in other.items()}


def test_no_text_is_kept() -> None:
    def long_rows() -> Iterator[dict]:
        for n in range(60):
            yield judged(f"Question {n // 4}? " + "y" * 500_000, 500_000, [1.0]) | {"judgements": ["z" * 500_000]}

    tracemalloc.start()
    numbers = numbers_of(long_rows())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert numbers.responses == 60 and peak < 10_000_000  # all texts: 90 MB


# --- intervals -------------------------------------------------------------------------------


def test_the_interval_of_a_share_is_the_binomial_one() -> None:
    [row] = metrics("t", {"m": [[1.0]] * 60 + [[0.0]] * 40})
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert (row["value"], row["n"]) == (0.6, 100)
    assert (row["ci_low"], row["ci_high"]) == (pytest.approx(0.6 - half, abs=0.02), pytest.approx(0.6 + half, abs=0.02))


def test_changes_since_a_round_of_one_prompt_have_no_interval() -> None:
    def round_of(prompts: int) -> list[dict]:
        return [judged(f"{n}?", 3 + n + k, [1.0 + k]) for n in range(prompts) for k in (0, 1)]

    for now, then, known in ((3, 1, False), (1, 3, False), (3, 3, True)):
        rows = by_name(health(round_of(now), round_of(then)))
        for name in ("length_growth", "gap_change"):
            assert rows[name]["value"] is not None and (rows[name]["ci_low"] is not None) is known


def test_resamples_keep_the_prompts_of_all_metrics_together() -> None:
    groups = [[float(n)] for n in range(10)]
    drawn = resampled_means({"x": groups, "twice": [[2 * group[0]] for group in groups], "none": [[]] * 10})
    assert drawn["twice"].tolist() == pytest.approx((2 * drawn["x"]).tolist())
    assert all(math.isnan(value) for value in drawn["none"].tolist())


def test_blocks_of_draws_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"m": [[n / 7] for n in range(9)]}
    whole = metrics("t", values, 3)
    monkeypatch.setattr("srlm_cli.stats.bootstrap.COUNTS_AT_ONCE", 9 * 7)
    assert metrics("t", values, 3) == whole != metrics("t", values, 4)


# --- the guards ------------------------------------------------------------------------------


def row(name: str, value: float | None, **more) -> dict:
    return {"metric": name, "value": value, "n": 1, **more}


ILL = {
    "max-one-score = 1.0": (row("top_score_share", 0.953, score=4), "95.3% of the scores are 4, over --max-one-score"),
    "min-parse-rate = 0.0": (row("parse_rate", 0.121), "12.1% of the judgements hold a score, under --min-parse-rate"),
    "max-length-growth = 2.4": (row("length_growth", 2.31), "2.31 times as long as in the round before, over --max-le"),
    "max-accuracy-drop = 1.0": (row("accuracy_change", -0.15), "15.0 points fewer than in the round before, over --ma"),
}


@pytest.mark.parametrize("setting", ILL)
def test_a_guard_says_what_why_and_how_to_go_on(setting: str) -> None:
    ill, words = ILL[setting]
    error = over_limits([row("accuracy", 0.5), ill], Limits())
    assert error.code == ExitCode.LIMIT and words in error.message
    assert f'set {setting} under ["eval health"] in srlm.toml to continue anyway' in error.hint
    assert ";" in error.hint  # a reason stands before it


@pytest.mark.parametrize("setting", ILL)
def test_the_setting_that_a_guard_names_lets_the_loop_go_on(setting: str) -> None:
    name, value = setting.split(" = ")
    limits = Limits(**{name.split("-", 1)[1].replace("-", "_"): float(value)})
    assert over_limits([row("accuracy", 0.5), ILL[setting][0]], limits) is None


def test_one_line_names_all_limits_that_are_passed() -> None:
    error = over_limits([row("accuracy", 0.5), *(ill for ill, _ in ILL.values())], Limits())
    assert all(words in error.message for _, words in ILL.values()) and "\n" not in str(error)
    assert all(setting in error.hint for setting in ILL)


def test_a_value_at_its_limit_passes() -> None:
    at = [row("top_score_share", 0.95, score=1), row("parse_rate", 0.5), row("length_growth", 2.0)]
    assert over_limits([*at, row("accuracy", 0.7), row("accuracy_change", 0.7 - 0.8)], Limits()) is None


def test_a_guard_without_its_input_is_not_checked() -> None:
    nulls = [row(name, None) for name in ("top_score_share", "parse_rate", "length_growth", "accuracy_change")]
    assert over_limits(nulls, Limits()) is over_limits([], Limits()) is None


# --- the command -----------------------------------------------------------------------------

COLLAPSED = as_lines([judged(f"Question {n}?", 10, [4.0]) for n in range(8)])


def reward_row(value: float, **more) -> dict:
    return {"task": "reward", "metric": "pairwise_accuracy", "value": value, "n": 9, "ci_low": 0, "ci_high": 1, **more}


def test_health_of_what_judge_writes(srlm: Srlm) -> None:
    rows = [{"prompt": f"Question {n}?", "response": f"answer {k}", "k": k} for n in range(4) for k in range(3)]
    piped = srlm("judge", "--engine", "echo", stdin=as_lines(rows))
    result = srlm("eval", "health", stdin=piped.out)
    found = by_name(result.rows)
    assert result.code == 0 and found["parse_rate"]["n"] == 36
    single = [score for row in piped.rows for score in row["scores"]]
    assert found["parse_rate"]["value"] == sum(score is not None for score in single) / 36
    assert {row["model"] for row in result.rows} == {"echo"}


def test_a_collapsed_judge_ends_with_4_behind_its_rows(srlm: Srlm) -> None:
    result = srlm("eval", "health", "--quiet", stdin=COLLAPSED)
    assert result.code == 4 and by_name(result.rows)["top_score_share"]["value"] == 1.0
    [line] = result.err.splitlines()
    assert line.startswith("srlm eval health: error: 100.0% of the scores are 4, over --max-one-score 0.95 (")
    assert "max-one-score = 1.0" in line and "held back" not in line
    written = srlm("eval", "health", "--out", "health.jsonl", stdin=COLLAPSED)
    assert written.code == 4 and read_rows(srlm.folder / "health.jsonl") == result.rows


@pytest.mark.parametrize("out", ["health.jsonl", "health.jsonl.gz"])
def test_a_held_file_appears_when_the_limit_is_changed(srlm: Srlm, out: str) -> None:
    argv = ["eval", "health", "--out", out, "--on-limit", "hold"]
    for _ in range(2):
        held = srlm(*argv, stdin=COLLAPSED)
        assert held.code == 4 and f"held back in {out}.part" in held.err
        assert not (srlm.folder / out).exists()
    (srlm.folder / f"{out}.part").rename(srlm.folder / ("held-" + out))
    kept = read_rows(srlm.folder / ("held-" + out))
    (srlm.folder / "srlm.toml").write_text('["eval health"]\nmax-one-score = 1.0\n')
    done = srlm(*argv, stdin=COLLAPSED)
    assert done.code == 0 and read_rows(srlm.folder / out) == kept != []
    assert read_json(srlm.folder / f"{out}.meta.json")["counts"]["read"] == 8
    assert not list(srlm.folder.glob("*.part*"))


def test_hold_lets_rows_pass_through_a_pipe(srlm: Srlm) -> None:
    result = srlm("eval", "health", "--on-limit", "hold", stdin=COLLAPSED)
    assert result.code == 4 and result.rows and "held back" not in result.err


@pytest.mark.parametrize(
    ("argv", "flag", "passed", "kept", "words"),
    [
        ([], "--max-one-score", "0.3", "0.4", "33.3% of the scores are 4"),
        ([], "--min-parse-rate", "0.7", "0.6", "61.5% of the judgements"),
        (["--before", "before.jsonl"], "--max-length-growth", "1.9", "2", "2.00 times as long"),
        (
            ["--reward", "now.jsonl", "--reward-before", "then.jsonl"],
            "--max-accuracy-drop",
            "0.19",
            "0.2",
            "20.0 points",
        ),
    ],
    ids=lambda value: value if str(value).startswith("--") else "",
)
def test_every_limit_can_be_set(srlm: Srlm, argv: list, flag: str, passed: str, kept: str, words: str) -> None:
    write_rows(srlm.folder / "before.jsonl", BEFORE)
    write_rows(srlm.folder / "now.jsonl", [reward_row(0.5), reward_row(0.9, replies=2)])
    write_rows(srlm.folder / "then.jsonl", [reward_row(0.1, replies=2), reward_row(0.7)])
    ill = srlm("eval", "health", *argv, flag, passed, stdin=as_lines(ROWS))
    assert ill.code == 4 and words in ill.err and flag in ill.err, ill.err
    well = srlm("eval", "health", *argv, flag, kept, stdin=as_lines(ROWS))
    assert well.code == 0 and well.rows == ill.rows


def test_a_reward_file_before_needs_one_to_compare(srlm: Srlm) -> None:
    result = srlm("eval", "health", "--reward-before", "then.jsonl", stdin=as_lines(ROWS))
    assert result.code == 2 and "--reward FILE" in result.err


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (ROWS, "then.jsonl:1: expected a metric row"),
        ([{"metric": "win", "value": 1}], "then.jsonl: no `pairwise_accur"),
    ],
)
def test_a_file_that_is_no_reward_file_is_named(srlm: Srlm, rows: list, words: str) -> None:
    write_rows(srlm.folder / "then.jsonl", rows)
    result = srlm("eval", "health", "--reward", "then.jsonl", stdin=as_lines(ROWS))
    assert result.code == 3 and words in result.err


def test_a_bad_row_of_the_round_before_is_named(srlm: Srlm) -> None:
    write_rows(srlm.folder / "before.jsonl", [*BEFORE, {"prompt": "One?"}])
    result = srlm("eval", "health", "--before", "before.jsonl", stdin=as_lines(ROWS))
    assert result.code == 3 and "before.jsonl:3: " in result.err and result.out == ""


@pytest.mark.parametrize("flag", ["--in", "--before", "--reward"])
def test_no_input_is_written_over(srlm: Srlm, flag: str) -> None:
    write_rows(srlm.folder / "file.jsonl", [reward_row(0.5)] if flag == "--reward" else ROWS)
    before = (srlm.folder / "file.jsonl").read_bytes()
    result = srlm("eval", "health", flag, "file.jsonl", "--out", "file.jsonl", stdin=as_lines(ROWS))
    assert result.code == 2 and "is the input" in result.err
    assert (srlm.folder / "file.jsonl").read_bytes() == before
