"""Model against model: verdicts in both orders, many files, categories, ratings, and what is refused."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

import pytest

from helpers import ListEngine, Srlm, as_lines, asked_text, read_json, read_rows, write_rows
from srlm_cli import templates
from srlm_cli.engines.base import Completion, Sampling
from srlm_cli.engines.echo import EchoEngine
from srlm_cli.errors import BadRow, DataError
from srlm_cli.evaluate.standings import metrics, table, win_rates
from srlm_cli.records import response_record
from srlm_cli.stages.head_to_head import Entry, HeadToHeadOptions, head_to_head, names_of
from srlm_cli.stages.verdicts import probability_of

FORM = templates.load("pairwise", fields={"prompt", "first", "second"})
ARGV = ["eval", "head-to-head", "--engine", "echo", "--direct"]


def by_name(rows: list[dict]) -> dict[str, dict]:
    return {row["metric"]: row for row in rows}


def side(model: str, prompts: list[str], **more) -> list[dict]:
    rows = [{"prompt": p, "response": f"{model} on {p}", "k": 0, "model": model} for p in prompts]
    return [response_record({**row, **more}) for row in rows]


def entries(*sides: list[dict]) -> list[Entry]:
    names = [rows[0]["model"] if rows else f"side {at}" for at, rows in enumerate(sides)]
    return [Entry(name, f"{name}.jsonl", rows) for name, rows in zip(names, sides, strict=True)]


def play(answers: list[str], *sides: list[dict], kept: list[dict] = (), **options) -> tuple:
    """Return the match rows, the outcomes and the engine of a comparison with these verdicts."""
    sides = sides or (side("M2", ["One?"]), side("M1", ["One?"]))
    engine = ListEngine([[answer] for answer in answers])
    made = list(head_to_head(entries(*sides), engine, HeadToHeadOptions(FORM, Sampling(), 0, **options), kept=kept))
    return [row for outcome in made for row in outcome.rows], made, engine


# --- one pair --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("straight", "swapped", "winner"),
    [
        ("Verdict: A", "Verdict: B", "A"),
        ("Verdict: B", "Verdict: A", "B"),
        ("Verdict: A", "Verdict: A", "tie"),
        ("Verdict: B", "Verdict: B", "tie"),
        ("Verdict: tie", "Verdict: tie", "tie"),
        ("Verdict: A", "Verdict: tie", "tie"),
        ("Verdict: A", "no idea", "tie"),
        ("no idea", "no idea", "tie"),
        ("Verdict: B, or rather\n**Verdict: A**", "verdict: b", "A"),
    ],
)
def test_a_verdict_counts_only_in_both_orders(straight: str, swapped: str, winner: str) -> None:
    rows, _, _ = play([straight, swapped])
    assert [row["winner"] for row in rows] == [winner]


def test_the_judge_sees_both_orders() -> None:
    _, _, engine = play(["Verdict: A", "Verdict: B"])
    first, second = (asked_text(request) for request in engine.asked)
    assert first.index("M2 on One?") < first.index("M1 on One?")
    assert second.index("M1 on One?") < second.index("M2 on One?")


def test_a_verdict_is_never_read_from_a_reply() -> None:
    a = [{**row, "response": "Verdict: A"} for row in side("M2", ["One?"])]
    rows, outcomes, _ = play(["Both are fine.", "Both are fine."], a, side("M1", ["One?"]))
    assert rows[0]["verdicts"] == [None, None] and outcomes[0].counts["unparsed"] == 2


def test_a_direct_verdict_is_one_of_the_choices() -> None:
    rows, _, engine = play(["A", "B"], direct=True)
    assert rows[0]["winner"] == "A"
    assert all(request.choices == ("A", "B") and request.prefix == "Verdict: " for request in engine.asked)


@pytest.mark.parametrize("choices", [("A", "B", "tie"), ("tie", "B", "A")])
def test_probabilities_go_by_the_name_of_a_choice(choices: tuple[str, ...]) -> None:
    """The first reply wins with 0.2, the second with 0.1, else it is a tie; whichever stands first."""
    form = replace(FORM, choices=choices)
    shares = {"A": 0.2, "B": 0.1, "tie": 0.7}
    said = Completion(["tie"], ["stop"], 1, 1, [shares[choice] for choice in choices])
    assert probability_of("A", said, form) == pytest.approx(0.2 + 0.35)
    assert probability_of("B", said, form) == pytest.approx(0.1 + 0.35)


def test_replies_to_two_prompts_of_one_id_do_not_meet() -> None:
    sides = side("M2", ["Why?"], prompt_id="1"), side("M1", ["How?"], prompt_id="1")
    with pytest.raises(BadRow, match="two prompts have the prompt_id 1"):
        play(["Verdict: A", "Verdict: B"], *sides)


def test_rows_without_a_partner_are_counted_and_only_first_responses_count() -> None:
    a = [*side("M2", ["One?", "Two?"]), *side("M2", ["Two?"]), *side("M2", ["Nowhere?"])]
    rows, outcomes, _ = play(["Verdict: A", "Verdict: B"], a, side("M1", ["Two?", "Three?"]))
    assert len(rows) == 1 and sum(outcome.read for outcome in outcomes) == len(a)
    dropped = {reason: n for outcome in outcomes for reason, n in outcome.dropped.items()}
    assert sum(n for outcome in outcomes for n in outcome.dropped.values()) == 3
    assert dropped["not the first response"] == 1


def test_a_match_of_the_only_pair_has_the_id_of_its_prompt() -> None:
    rows, _, _ = play(["Verdict: A", "Verdict: B"])
    assert [(row["id"], row["prompt_id"]) for row in rows] == [(side("M1", ["One?"])[0]["prompt_id"],) * 2]


def match(winner: str, verdicts: list, a: str, b: str, **more) -> dict:
    return {
        "prompt_id": a + b, "winner": winner, "verdicts": verdicts, "response_a": a, "response_b": b,
        "model_a": "M2", "model_b": "M1", **more,
    }  # fmt: skip


def test_win_rates_by_hand() -> None:
    rows = by_name(
        win_rates(
            [
                match("A", ["A", "B"], "four", "two"),
                match("tie", ["A", "A"], "four", "two"),
                match("tie", [None, "tie"], "four", "two"),
                match("B", ["B", "A"], "eighteen", "two222"),
            ]
        )
    )
    values = {name: (row["value"], row["n"]) for name, row in rows.items()}
    assert values == {
        "win": (0.25, 4), "tie": (0.5, 4), "loss": (0.25, 4), "win_rate": (0.5, 4),
        "first_position": (pytest.approx(4 / 6), 6), "length": (5.0, 4), "baseline_length": (3.75, 4),
    }  # fmt: skip
    assert all(row["ci_low"] <= row["value"] <= row["ci_high"] for row in rows.values())


def test_lean_is_the_share_of_matches_that_are_more_probable_than_not() -> None:
    played = [match("tie", ["A", "A"], "a", "b", probability=p) for p in (0.6, 0.9, 0.5, 0.1)]
    assert by_name(win_rates(played))["preference_rate"]["value"] == 0.5


# --- many files ------------------------------------------------------------------------------

M1, M2, M3 = (side(model, ["One?", "Two?"]) for model in ("M1", "M2", "M3"))


def test_every_pair_of_files_plays_every_prompt_in_both_orders() -> None:
    rows, outcomes, engine = play(["Verdict: A", "Verdict: B"] * 6, M3, M2, M1)
    assert [(row["prompt"], row["model_a"], row["model_b"]) for row in rows] == [
        (prompt, a, b) for prompt in ("One?", "Two?") for a, b in combinations(["M3", "M2", "M1"], 2)
    ]
    assert len({row["id"] for row in rows}) == 6 and len({request.seeds for request in engine.asked}) == 12
    for row, straight, swapped in zip(rows, engine.asked[::2], engine.asked[1::2], strict=True):
        a, b = (f"{row[model]} on {row['prompt']}" for model in ("model_a", "model_b"))
        assert (row["response_a"], row["response_b"]) == (a, b)
        assert asked_text(straight).index(a) < asked_text(straight).index(b)
        assert asked_text(swapped).index(b) < asked_text(swapped).index(a)
    assert [outcome.read for outcome in outcomes if outcome.rows] == [1, 1]
    assert sum(outcome.counts.get("verdicts", 0) for outcome in outcomes) == 12


def test_files_that_did_not_answer_a_prompt_are_left_out_of_it() -> None:
    third = side("M1", ["Two?", "Three?"])
    rows, outcomes, _ = play(["no idea"] * 8, [*M3, *side("M3", ["Nowhere?"])], M2, third)
    assert [(row["prompt"], row["model_a"], row["model_b"]) for row in rows] == [
        ("One?", "M3", "M2"), ("Two?", "M3", "M2"), ("Two?", "M3", "M1"), ("Two?", "M2", "M1"),
    ]  # fmt: skip
    assert [outcome.counts["prompts not answered by all"] for outcome in outcomes if outcome.rows] == [1, 0]
    assert sum(outcome.read for outcome in outcomes) == 3
    assert outcomes[-1].dropped == {"no response of the other model": 1}


def test_kept_matches_are_not_played_again() -> None:
    whole, _, _ = play(["Verdict: A", "Verdict: B"] * 6, M3, M2, M1)
    rows, _, engine = play(["Verdict: A", "Verdict: B"] * 3, M3[1:], M2, M1, kept=whole[:3])
    assert rows == whole[3:] and len(engine.asked) == 6


def test_the_first_file_is_read_no_further_than_its_matches_are_asked_for() -> None:
    read = []
    first = Entry("M3", "-", (read.append(row) or row for row in M3))
    made = head_to_head([first, *entries(M2, M1)], EchoEngine(), HeadToHeadOptions(FORM, Sampling(), 0))
    assert len(next(made).rows) == 3 and len(read) == 1


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ((M3, side("M1", ["Three?"])), "no prompt of M3.jsonl is answered in M1.jsonl"),
        ((M3, []), "no prompt of M3.jsonl is answered in side 1.jsonl"),
        ((M3, side("M2", ["One?"]), side("M1", ["Two?"])), "no prompt of M3.jsonl is answered in both M2.jsonl and M1"),
    ],
)
def test_files_without_a_prompt_in_common_are_an_error(sides: tuple, message: str) -> None:
    with pytest.raises(DataError, match=message):
        play(["no idea"] * 4, *sides)


def test_nothing_read_is_no_error() -> None:
    rows, outcomes, _ = play([], [], M1)
    assert rows == [] and sum(outcome.read for outcome in outcomes) == 0


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "files", "names"),
    [
        (["M2", "M1"], ["a/r.jsonl", "b/r.jsonl"], ["M2", "M1"]),
        (
            ["runs/x/M2/model", None, None],
            ["m.jsonl", "-", "x/people.jsonl.gz"],
            ["runs/x/M2/model", "stdin", "people"],
        ),
        (["m", "m"], ["hot.jsonl", "cold.jsonl"], ["hot", "cold"]),
        (["m", "m"], ["M2/responses.jsonl", "M1/responses.jsonl"], ["M2/responses", "M1/responses"]),
        (["m", "m", "other"], ["x/M2/r.jsonl", "y/M2/r.jsonl", "z.jsonl"], ["x/M2/r", "y/M2/r", "other"]),
        ([None, "m"], ["-", "b.jsonl"], [None, "m"]),
        ([None, None], ["a.jsonl", "b.jsonl"], [None, None]),
        (["m", "m"], ["r.jsonl", "r.jsonl"], ["r", "r (2)"]),
        (["m", None, "n"], ["a.jsonl", "m.jsonl", "c.jsonl"], ["m", "m (2)", "n"]),
        (["", 3, ["x"]], ["./a.jsonl", "b.json", "/c.jsonl"], ["a", "b.json", "c"]),
    ],
)
def test_files_are_named_by_model_or_else_by_what_tells_them_apart(models: list, files: list, names: list) -> None:
    assert names_of(models, files) == names


# --- categories ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "category"),
    [({"category": "code"}, "code"), ({"category": 3}, "3"), ({"category": None}, None), ({"kind": "code"}, None)],
)
def test_matches_keep_the_category_of_their_prompt(fields: dict, category: str | None) -> None:
    rows, _, _ = play(["no idea"] * 2, side("M2", ["One?"], **fields), side("M1", ["One?"]))
    assert [row.get("category") for row in rows] == [category] and ("category" in rows[0]) == (category is not None)


def test_the_category_may_stand_in_another_field_and_in_one_of_the_files_only() -> None:
    rows, _, _ = play(["no idea"] * 2, side("M2", ["One?"]), side("M1", ["One?"], kind="code"), by="kind")
    assert [row["category"] for row in rows] == ["code"]


def test_rates_by_category_by_hand() -> None:
    played = [
        match("A", ["A", "B"], "a", "b", category="code"),
        match("tie", ["A", "A"], "c", "d", category="code"),
        match("B", ["B", "A"], "e", "f", category="art"),
        match("A", ["A", "B"], "g", "h"),
    ]
    rows = metrics(played, ["M2", "M1"])
    parts = [(row["category"], row["metric"], row["value"], row["n"]) for row in rows if "category" in row]
    assert parts == [
        ("art", "win", 0.0, 1), ("art", "tie", 0.0, 1), ("art", "loss", 1.0, 1), ("art", "win_rate", 0.0, 1),
        ("code", "win", 0.5, 2), ("code", "tie", 0.5, 2), ("code", "loss", 0.0, 2), ("code", "win_rate", 0.75, 2),
    ]  # fmt: skip
    assert by_name(rows)["win_rate"]["value"] == 2.5 / 4  # the row over all prompts is the last of its name
    assert {(row["model"], row["baseline"]) for row in rows} == {("M2", "M1")}


# --- metrics of many -------------------------------------------------------------------------


def games(a: str, b: str, winners: str) -> list[dict]:
    ends = {"A": ["A", "B"], "B": ["B", "A"], "t": ["A", "A"]}
    return [
        match({"t": "tie"}.get(w, w), ends[w], "aaaa", "bb", prompt_id=str(at), model_a=a, model_b=b)
        for at, w in enumerate(winners)
    ]


THREE = [*games("M3", "M2", "AAtB"), *games("M3", "M1", "AAAt"), *games("M2", "M1", "AtBA")]


def test_every_pair_has_its_metrics_and_every_model_its_rating() -> None:
    rows = metrics(THREE, ["M3", "M2", "M1"])
    rates = {(row["model"], row["baseline"]): row["value"] for row in rows if row["metric"] == "win_rate"}
    assert rates == {("M3", "M2"): 2.5 / 4, ("M3", "M1"): 3.5 / 4, ("M2", "M1"): 2.5 / 4}
    rated = [row for row in rows if row["metric"] == "bradley_terry"]
    assert [(row["model"], row["n"]) for row in rated] == [("M3", 8), ("M2", 8), ("M1", 8)]
    assert rated[0]["value"] > rated[1]["value"] > rated[2]["value"]
    assert "bradley_terry" not in by_name(metrics(games("M2", "M1", "AAtB"), ["M2", "M1"]))


def test_the_length_controlled_rate_stands_beside_the_win_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_matches(played: Iterable[dict], seed: int = 0) -> dict | None:
        played = list(played)
        row = {"task": "head_to_head", "metric": "length_controlled_win_rate", "value": len(played) / 10, "n": seed}
        return None if played[0]["model_b"] == "M1" else row

    monkeypatch.setattr("srlm_cli.evaluate.length_control.of_matches", of_matches)
    rows = [row for row in metrics(THREE, ["M3", "M2", "M1"], 7) if row["metric"] == "length_controlled_win_rate"]
    assert [(row["model"], row["baseline"], row["value"], row["n"]) for row in rows] == [("M3", "M2", 0.4, 7)]


def test_no_matches_are_null_metrics_of_named_models() -> None:
    rows = metrics([], ["M3", "M2", "M1"])
    assert {(row["value"], row["n"], row["ci_low"], row["ci_high"]) for row in rows} == {(None, 0, None, None)}
    assert {row["model"] for row in rows} == {"M3", "M2", "M1"}


def test_the_table_by_hand() -> None:
    rating = {"task": "head_to_head", "metric": "bradley_terry", "ci_low": -51.2, "ci_high": 80.4, "n": 4}
    rows = [
        {"metric": "win_rate", "model": "long name", "baseline": "b", "value": 0.625},
        {"metric": "win_rate", "model": "long name", "baseline": "b", "value": 0.1, "category": "code"},
        {"metric": "win_rate", "model": "b", "baseline": "c", "value": None},
        {**rating, "model": "long name", "value": 12.6},
        {**rating, "model": "b", "value": -0.2, "ci_low": -0.4, "ci_high": 0.4},
        {**rating, "model": "c", "value": 7.0, "ci_low": None, "ci_high": None},
    ]
    assert table(rows, ["long name", "b", "c"])[1:] == [
        "                 1      2  3          rating",
        "1 long name      -  62.5%  -  +13 [-51, +80]",
        "2 b          37.5%      -  -     +0 [+0, +0]",
        "3 c              -      -  -              +7",
    ]


def test_the_table_shows_foreign_names_without_what_moves_the_cursor() -> None:
    lines = table([], ["\x1b[2Jgone\n[/red]", "b", "c"])
    assert "1 ?[2Jgone?[/red]" in lines[2] and all(line.isprintable() for line in lines)


# --- the command -----------------------------------------------------------------------------


def test_head_to_head_needs_the_other_side(srlm: Srlm) -> None:
    result = srlm("eval", "head-to-head", "--engine", "echo")
    assert result.code == 2 and "--against" in result.err


def test_matches_are_kept_and_metrics_come_from_them(srlm: Srlm) -> None:
    write_rows(srlm.folder / "b.jsonl", side("M1", ["One?", "Two?"]))
    argv = [*ARGV, "--against", "b.jsonl", "--matches", "m.jsonl", "--out", "o.jsonl"]
    result = srlm(*argv, stdin=as_lines(side("M2", ["Two?", "One?"])))
    assert (result.code, result.out) == (0, "")
    matches, rows = read_rows(srlm.folder / "m.jsonl"), by_name(read_rows(srlm.folder / "o.jsonl"))
    assert [match["prompt"] for match in matches] == ["Two?", "One?"]
    assert rows["win"]["value"] == sum(match["winner"] == "A" for match in matches) / 2
    assert read_json(srlm.folder / "o.jsonl.meta.json")["counts"]["read"] == 2
    assert "rating" not in result.err


QUESTIONS = [f"Question number {n}?" for n in range(12)]


def three_files(srlm: Srlm, *more: str) -> list[str]:
    """Write the responses of three models and return the arguments that compare them."""
    for model in ("M3", "M2", "M1"):
        rows = [row for n, p in enumerate(QUESTIONS) for row in side(model, [p], category=["code", "art"][n % 2])]
        write_rows(srlm.folder / f"{model}.jsonl", rows)
    return [*ARGV, "--in", "M3.jsonl", "--against", "M2.jsonl", "--against", "M1.jsonl", *more]


def test_three_files_give_the_full_table_and_ratings(srlm: Srlm) -> None:
    result = srlm(*three_files(srlm, "--matches", "m.jsonl"))
    assert result.code == 0, result.err
    matches = read_rows(srlm.folder / "m.jsonl")
    assert len(matches) == len({match["id"] for match in matches}) == 36
    wins = {"A": 1, "tie": 0.5, "B": 0}
    for a, b in combinations(["M3", "M2", "M1"], 2):
        played = [match for match in matches if (match["model_a"], match["model_b"]) == (a, b)]
        of_pair = [row for row in result.rows if (row["model"], row.get("baseline")) == (a, b)]
        parts = [row for row in of_pair if row.get("category") == "code" and row["metric"] == "win_rate"]
        expected = [wins[match["winner"]] for match in played if match["prompt"] in QUESTIONS[::2]]
        assert [(row["value"], row["n"]) for row in parts] == [(sum(expected) / 6, 6)]
        total = by_name([row for row in of_pair if "category" not in row])["win_rate"]
        assert (total["value"], total["n"]) == (sum(wins[match["winner"]] for match in played) / 12, 12)
    ratings = [row for row in result.rows if row["metric"] == "bradley_terry"]
    assert [row["model"] for row in ratings] == ["M3", "M2", "M1"]
    assert all(row["ci_low"] <= row["value"] <= row["ci_high"] and row["n"] == 24 for row in ratings)
    assert re.search(r"^1 M3 +- +\d+\.\d% +\d+\.\d% +[+-]\d+ \[", result.err, re.MULTILINE), result.err
    assert srlm(*three_files(srlm, "--quiet")).err == ""


@pytest.mark.parametrize("after", [3, 9, 40])
def test_three_files_killed_and_resumed_equal_uninterrupted(srlm: Srlm, after: int) -> None:
    whole = srlm(*three_files(srlm, "--matches", "whole.jsonl"))
    argv = three_files(srlm, "--matches", "m.jsonl")
    assert srlm.mortal(after, signal.SIGKILL, *argv).code == -signal.SIGKILL
    assert (srlm.folder / "m.jsonl.part").exists() and not (srlm.folder / "m.jsonl").exists()
    resumed = srlm(*argv)
    assert resumed.code == 0 and resumed.out == whole.out
    if after != 9:  # a prompt of three files takes six verdicts, and a checkpoint a moment
        assert ("resuming after" in resumed.err) == (after > 6)
    assert read_rows(srlm.folder / "m.jsonl") == read_rows(srlm.folder / "whole.jsonl")


def test_another_file_to_compare_with_is_another_run(srlm: Srlm) -> None:
    argv = three_files(srlm, "--matches", "m.jsonl")
    assert srlm.mortal(20, signal.SIGKILL, *argv).code == -signal.SIGKILL
    write_rows(srlm.folder / "M1.jsonl", side("M1", QUESTIONS[1:]))
    result = srlm(*argv)
    assert result.code == 2 and "against" in result.err and "--restart" in result.err


def test_two_files_of_one_model_are_named_by_their_files(srlm: Srlm) -> None:
    write_rows(srlm.folder / "hot.jsonl", side("m", ["One?"]))
    write_rows(srlm.folder / "cold.jsonl", side("m", ["One?"]))
    result = srlm(*ARGV, "--in", "hot.jsonl", "--against", "cold.jsonl")
    assert {(row["model"], row["baseline"]) for row in result.rows} == {("hot", "cold")}


def test_stdin_can_be_the_other_side(srlm: Srlm) -> None:
    write_rows(srlm.folder / "a.jsonl", side("M2", ["One?"]))
    result = srlm(*ARGV, "--in", "a.jsonl", "--against", "-", stdin=as_lines(side("M1", ["One?"])))
    assert {(row["model"], row["baseline"]) for row in result.rows} == {("M2", "M1")}


def test_files_to_compare_with_can_come_from_the_settings(srlm: Srlm) -> None:
    write_rows(srlm.folder / "b.jsonl", side("M1", ["One?"], kind="code"))
    (srlm.folder / "srlm.toml").write_text('["eval head-to-head"]\nagainst = ["b.jsonl"]\nby = "kind"\n')
    result = srlm(*ARGV, stdin=as_lines(side("M2", ["One?"])))
    assert result.code == 0 and {row.get("category") for row in result.rows} == {None, "code"}


# --- what is refused -------------------------------------------------------------------------


def test_files_with_nothing_in_common_are_told_before_a_model_is_loaded(srlm: Srlm) -> None:
    write_rows(srlm.folder / "a.jsonl", side("M2", ["One?"]))
    write_rows(srlm.folder / "b.jsonl", side("M1", ["Two?"]))
    argv = ["eval", "head-to-head", "--model", "./nowhere", "--in", "a.jsonl", "--against", "b.jsonl"]
    result = srlm(*argv, "--matches", "m.jsonl", "--out", "o.jsonl")
    assert result.code == 3 and len(result.err.splitlines()) == 1
    assert "no prompt of a.jsonl is answered in b.jsonl" in result.err and "`prompt_id`" in result.err
    assert {path.name for path in srlm.folder.iterdir()} == {"a.jsonl", "b.jsonl"}


def test_nothing_in_common_is_seen_at_the_end_of_a_pipe(srlm: Srlm) -> None:
    write_rows(srlm.folder / "b.jsonl", side("M1", ["Two?"]))
    result = srlm(*ARGV, "--against", "b.jsonl", stdin=as_lines(side("M2", ["One?"])))
    assert result.code == 3 and "no prompt of <stdin> is answered in b.jsonl" in result.err and result.out == ""


@pytest.mark.parametrize("through", ["pipe", "file"])
def test_a_bad_row_is_named_rather_than_what_it_cut_off(srlm: Srlm, through: str) -> None:
    write_rows(srlm.folder / "b.jsonl", side("M1", ["Two?"]))
    rows = [*side("M2", ["One?"]), "{", *side("M2", ["Two?"])]
    write_rows(srlm.folder / "a.jsonl", rows)
    given = {"stdin": as_lines(rows)} if through == "pipe" else {}
    result = srlm(*ARGV, "--against", "b.jsonl", "--in", "-" if through == "pipe" else "a.jsonl", **given)
    assert result.code == 3 and ":2: not JSON" in result.err


def test_a_bad_row_of_the_other_side_is_named(srlm: Srlm) -> None:
    write_rows(srlm.folder / "b.jsonl", [*side("M1", ["One?"]), {"prompt": "Two?"}])
    result = srlm(*ARGV, "--against", "b.jsonl", stdin=as_lines(side("M2", ["One?"])))
    assert result.code == 3 and "b.jsonl:2: " in result.err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--matches", "x.jsonl", "--out", "x.jsonl"], "--matches and --out are both x.jsonl"),
        (["--matches", "x.jsonl", "--out", "./x.jsonl"], "--matches and --out are both x.jsonl"),
        (["--matches", "-"], "--matches and --out are both stdout"),
        (["--matches", "a.jsonl"], "--matches a.jsonl is an input"),
        (["--matches", "link.jsonl"], "--matches link.jsonl is an input"),
        (["--out", "a.jsonl"], "--out a.jsonl is the input"),
        (["--out", "b.jsonl"], "--out b.jsonl is the input"),
        (["--against", "-", "--against", "-"], "stdin can be only one of the files"),
    ],
    ids=" ".join,
)
def test_a_file_is_not_written_twice_or_over_an_input(srlm: Srlm, more: list[str], words: str) -> None:
    for name, model in (("a", "M2"), ("b", "M1")):
        write_rows(srlm.folder / f"{name}.jsonl", side(model, ["One?"]))
    (srlm.folder / "link.jsonl").symlink_to("b.jsonl")
    before = {path.name: path.read_bytes() for path in srlm.folder.iterdir()}
    result = srlm(*ARGV, "--in", "a.jsonl", "--against", "b.jsonl", *more, stdin="")
    assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in srlm.folder.iterdir()} == before


def test_a_file_of_another_name_is_another_run(srlm: Srlm) -> None:
    """Three files without models go by their names, which the matches hold."""
    rows = [{"prompt": prompt, "response": f"on {prompt}"} for prompt in ("One?", "Two?")]
    for name in ("a", "b", "c"):
        write_rows(srlm.folder / f"{name}.jsonl", rows)
    write_rows(srlm.folder / "bad.jsonl", [*rows, "{"])
    argv = [*ARGV, "--in", "bad.jsonl", "--against", "b.jsonl", "--matches", "m.jsonl", "--against"]
    assert srlm(*argv, "a.jsonl").code == 3
    result = srlm(*argv, "c.jsonl")
    assert result.code == 2 and "names" in result.err
