"""Which two replies become a pair: each variant against pairs worked out by hand."""

from __future__ import annotations

import random

import pytest

from helpers import Record, Srlm, as_lines, read_json, read_rows, write_rows
from srlm_cli.errors import BadRow, DataError, OptionError
from srlm_cli.records import judged_record
from srlm_cli.stages.agreement import agreement, mean_agreement
from srlm_cli.stages.judge_pairs import judge_pairs
from srlm_cli.stages.length_penalty import balanced_alpha
from srlm_cli.stages.make_pairs import PairOptions, group_of, make_pairs, scored_record
from srlm_cli.stages.pair_choice import Choice, choose, sampled
from srlm_cli.streams.lookup import Lookup


def replies(*scored: tuple[float | None, int], prompt: str = "Why?", **more) -> list[Record]:
    """Return judged responses to one prompt, of these scores and lengths."""
    rows = [{"prompt": prompt, "response": chr(97 + k) * n, "k": k, "score": s} for k, (s, n) in enumerate(scored)]
    return [judged_record({**row, **more}) for row in rows]


def picked(rows: list[Record], others: list[Record] | None = None, **options) -> tuple[int, int] | str:
    """Return the places of chosen and rejected, or why there are none."""
    pair, reason = choose(rows, rows if others is None else others, Choice(**options))
    return (pair[0]["k"], pair[1]["k"]) if pair else reason


def pairs_of(rows: list[Record], **options) -> list[Record]:
    return [row for outcome in make_pairs(rows, PairOptions(**options)) for row in outcome.rows]


# --- length control by rho -------------------------------------------------------------------

# scores 5 .. 1, so at rho 0.25 the tiers are [4, 5] and [1, 2]
FIVE = ((5, 90), (4, 40), (3, 10), (2, 80), (1, 20))


@pytest.mark.parametrize(
    ("rho", "expected"),
    [
        (0.0, (0, 4)),  # best and worst
        (0.2, (0, 4)),  # tiers [4.2, 5] and [1, 1.8] hold no other
        (0.25, (1, 3)),  # the ends of the tiers are within them
        (0.4, (1, 3)),
        (0.5, (2, 3)),  # 3 is in both tiers: the shortest of the upper, and not the longest of the lower one
    ],
)
def test_the_shortest_of_the_best_against_the_longest_of_the_worst(rho: float, expected: tuple[int, int]) -> None:
    assert picked(replies(*FIVE), rho=rho) == expected


def test_a_tier_that_ends_at_a_third_holds_it() -> None:
    third = 11 / 3  # the mean of 3, 4, 4: the upper tier of 1 and 5 at rho 1/3 begins at 5 - 4/3, the same number
    assert picked(replies((5, 9), (third, 3), (1, 5)), rho=1 / 3) == (1, 2)


def test_of_equal_lengths_the_better_is_chosen_and_the_worse_rejected() -> None:
    assert picked(replies((5, 9), (4.9, 9), (1.1, 7), (1, 7)), rho=0.2) == (0, 3)


def test_rho_0_is_the_paper_s_choice_whatever_the_lengths_are() -> None:
    rows = replies((4, 5), (4, 1), (4, 3), (1, 2), (1, 9))
    chosen = {picked(rows, seed=seed) for seed in range(40)}
    assert chosen == {(c, r) for c in (0, 1, 2) for r in (3, 4)}


def test_chosen_is_never_worse_than_rejected() -> None:
    draw = random.Random(1)
    for _ in range(300):
        rows = replies(*((draw.randint(0, 15) / 3, draw.randint(1, 60)) for _ in range(draw.randint(2, 7))))
        rho, rejected_of = draw.choice([0, 0.1, 0.3, 0.5]), draw.choice([None, 1, 2, 5])
        pair, reason = choose(rows, rows if not rejected_of else sampled(rows, rejected_of, 0), Choice(rho=rho))
        assert reason in ("", "tie") if pair is None else pair[0]["score"] > pair[1]["score"]


def test_a_middling_reply_that_is_both_is_no_pair() -> None:
    # at rho 0.5 the shortest of [2, 4] and the longest of [0, 2] are the two of score 2
    assert picked(replies((4, 50), (2, 1), (2, 60), (0, 50)), rho=0.5) == "tie"


# --- a price of a character ------------------------------------------------------------------


def test_score_minus_alpha_times_length_decides() -> None:
    rows = replies((5, 300), (4, 100), (1, 200), (2, 350))
    assert picked(rows) == (0, 2)
    # 5 - 3, 4 - 1, 1 - 2, 2 - 3.5: the second is best, the fourth worst
    assert picked(rows, alpha=0.01) == (1, 3)
    [pair] = pairs_of(rows, alpha=0.01)
    assert (pair["score_chosen"], pair["score_rejected"], pair["length_alpha"]) == (4, 2, 0.01)
    assert "length_alpha" not in pairs_of(rows)[0]


def test_equal_scores_are_no_preference_whatever_the_lengths_are() -> None:
    assert picked(replies((3, 10), (3, 500)), alpha=0.01) == "tie"


def test_the_least_gap_is_of_what_decides() -> None:
    rows = replies((5, 300), (4, 100), (1, 200))
    assert picked(rows, alpha=0.01, min_gap=4) == (1, 2)  # 3 against -1
    assert picked(rows, alpha=0.01, min_gap=4.1) == "gap too small"


def test_auto_makes_the_mean_gap_zero() -> None:
    # One prompt: the longer is better by 1 and 100 characters longer, the shorter one by 0.5 for 100.
    # Above 0.01 the first pair turns round; the gaps are then 100, 100 -> -100, 100: zero.
    prompts = [replies((2, 150), (1, 50)), replies((4, 210), (2, 110))]
    found = balanced_alpha((rows, rows) for rows in prompts)
    assert found.alpha == pytest.approx(0.01, abs=1e-6) and found.alpha > 0.01
    assert found.gap == 0
    lengths = [pair_lengths(pairs_of(rows, alpha=found.alpha)[0]) for rows in prompts]
    assert lengths == [(50, 150), (210, 110)]


def pair_lengths(pair: Record) -> tuple[int, int]:
    return len(pair["chosen"][0]["content"]), len(pair["rejected"][0]["content"])


def test_auto_stops_beside_the_step_that_is_nearer_to_zero() -> None:
    # 100 against 20 up to 1/90, where the second becomes the best: 10 against 20, up to 1/80, is nearer to zero
    three = replies((3, 100), (2, 10), (2, 20))
    found = balanced_alpha([(three, three)])
    assert found.gap == -10 and 1 / 90 < found.alpha < 1 / 90 + 1e-6
    assert pair_lengths(pairs_of(three, alpha=found.alpha)[0]) == (10, 20)


def test_auto_is_0_where_chosen_replies_are_not_longer() -> None:
    rows = replies((5, 10), (1, 200))
    assert balanced_alpha([(rows, rows)]).alpha == 0
    assert balanced_alpha([]).gap is None
    tied = replies((3, 10), (3, 200))
    assert balanced_alpha([(tied, tied)]).gap is None


def test_auto_against_all_alphas_tried_one_by_one() -> None:
    draw = random.Random(3)
    prompts = []
    for _ in range(40):
        quality = [draw.random() * 5 for _ in range(4)]
        prompts.append(replies(*((q, 20 + int(60 * q) + draw.randint(0, 150)) for q in quality)))

    def gap(alpha: float) -> float:
        pairs = [pair_lengths(pair) for rows in prompts for pair in pairs_of(rows, alpha=alpha)]
        return sum(a - b for a, b in pairs) / len(pairs)

    found = balanced_alpha((rows, rows) for rows in prompts)
    assert found.gap == pytest.approx(gap(found.alpha)) and gap(0) > 50
    assert abs(found.gap) <= min(abs(gap(n / 4000)) for n in range(100)) + 1e-9


# --- the worst of m ---------------------------------------------------------------------------


def test_rejected_is_the_worst_of_m_drawn_at_random() -> None:
    rows = replies(*((score, 5) for score in range(8)))
    rejected = [picked(rows, sampled(rows, 3, seed)) for seed in range(200)]
    worst = [pair[1] for pair in rejected if pair != "tie"]
    # of the C(8, 3) = 56 draws C(7, 2) = 21 hold the worst one; none is worse than sixth
    assert max(worst) == 5 and 0.25 < worst.count(0) / 200 < 0.5
    assert {pair[0] for pair in rejected if pair != "tie"} == {7}
    assert picked(rows, sampled(rows, 8, 1)) == picked(rows, sampled(rows, 99, 1)) == (7, 0)


def test_the_draw_is_the_prompt_s_own() -> None:
    rows = replies(*((score, 5) for score in range(8)))
    assert sampled(rows, 3, 0) == sampled(rows[::-1], 3, 0)
    [alone] = pairs_of(rows, rejected_of=3)
    others = replies((1, 2), (5, 1), prompt="How?")
    assert pairs_of([*others, *rows], rejected_of=3)[1] == alone


# --- replies of an earlier model -------------------------------------------------------------


def finder(rows: list[Record]):
    return lambda key: [row for row in rows if group_of(row) == key]


def test_rejected_is_the_worst_of_the_earlier_model() -> None:
    now = replies((4, 9), (2, 5), model="M2")
    then = replies((3, 7), (1, 8), (None, 3), model="M0")
    [pair] = pairs_of(now, earlier=finder(then))
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("a" * 9, "b" * 8)
    assert (pair["score_chosen"], pair["score_rejected"]) == (4, 1)
    assert (pair["model_chosen"], pair["model_rejected"]) == ("M2", "M0") and "model" not in pair


def test_one_reply_is_enough_against_those_of_the_earlier_model() -> None:
    assert len(pairs_of(replies((4, 9)), earlier=finder(replies((1, 5))))) == 1


@pytest.mark.parametrize(
    ("now", "then", "reason"),
    [
        (((4, 9),), (), "no scored response of the earlier model"),
        (((4, 9),), ((None, 3),), "no scored response of the earlier model"),
        (((None, 9),), ((2, 3),), "no scored response"),
        (((2, 9), (1, 4)), ((3, 3),), "none better than the earlier model's"),
        (((3, 9), (1, 4)), ((3, 3),), "tie"),
    ],
)
def test_why_an_earlier_model_gives_no_pair(now: tuple, then: tuple, reason: str) -> None:
    [outcome] = make_pairs(replies(*now), PairOptions(earlier=finder(replies(*then))))
    assert outcome.dropped == {reason: 1} and outcome.rows == []


# --- the agreement of two judges -------------------------------------------------------------


def test_agreement_is_kendall_s_tau_from_0_to_1() -> None:
    now = replies((4, 1), (3, 2), (2, 3), (1, 4))
    # pairs of the four: 6; one swap of neighbours leaves 5 alike and 1 not: tau 4/6, C 5/6
    assert agreement(now, replies((3, 1), (4, 2), (2, 3), (1, 4))) == pytest.approx(5 / 6)
    assert agreement(now, now) == 1
    assert agreement(now, replies((1, 1), (2, 2), (3, 3), (4, 4))) == 0
    assert agreement(now, replies((2, 1), (2, 2), (2, 3), (2, 4))) == 0.5
    # the ties of one judge alone count as neither: 5 pairs alike, 1 neither, C = (5/6 + 1) / 2
    assert agreement(now, replies((4, 1), (3, 2), (1, 3), (1, 4))) == pytest.approx(11 / 12)


def test_without_ties_the_agreement_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    for _ in range(20):
        a, b = ([draw.random() for _ in range(6)] for _ in range(2))
        found = agreement(
            replies(*((s, k + 1) for k, s in enumerate(a))), replies(*((s, k + 1) for k, s in enumerate(b)))
        )
        assert found == pytest.approx((stats.kendalltau(a, b).statistic + 1) / 2)


def test_only_what_both_have_scored_is_compared() -> None:
    now, then = replies((4, 1), (3, 2), (None, 3)), replies((4, 1), (3, 2), (1, 3))
    assert agreement(now, then) == 1
    assert agreement(now, then[:1]) is None and agreement(now, []) is None
    with pytest.raises(BadRow, match="another text"):
        agreement(now, [{**then[0], "response": "other"}])


def test_the_weight_of_a_pair_is_1_minus_the_agreement() -> None:
    now = [*replies((4, 1), (3, 2), (2, 3)), *replies((1, 2), (5, 3), prompt="How?")]
    then = [*replies((4, 1), (2, 2), (3, 3)), *replies((2, 2), (4, 3), prompt="How?")]
    each = pairs_of(now, before=finder(then))
    assert [pair["agreement"] for pair in each] == [pytest.approx(2 / 3), 1]
    assert [pair["label_smoothing"] for pair in each] == [pytest.approx(1 / 3), 0]
    mean = mean_agreement([(now[:3], then[:3]), (now[3:], then[3:]), (now[:3], [])])
    assert mean == pytest.approx(5 / 6)
    assert {pair["label_smoothing"] for pair in pairs_of(now, before=finder(then), mean_agreement=mean)} == {1 - mean}
    [*_, outcome] = make_pairs(now, PairOptions(before=finder(then[:3])))
    assert outcome.dropped == {"not ranked by both judges": 1}


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (((9, 1), (0, 2), (-5, 3)), ""),  # another scale, and the best of this judge above its worst
        (((1, 1), (9, 2), (0.5, 3)), ""),  # only the two of the pair count
        (((1, 1), (9, 2), (2, 3)), "the judges disagree"),
        (((1, 1), (9, 2), (1, 3)), "the judges disagree"),  # a tie
        (((1, 1), (9, 2)), "not scored by both judges"),
        (((1, 1), (9, 2), (None, 3)), "not scored by both judges"),
    ],
)
def test_only_pairs_that_another_judge_orders_alike_are_kept(then: tuple, reason: str) -> None:
    now = replies((4, 1), (3, 2), (2, 3))
    [outcome] = make_pairs(now, PairOptions(before=finder(replies(*then)), agreed_only=True))
    assert outcome.dropped == ({reason: 1} if reason else {}) and len(outcome.rows) == (not reason)
    assert not outcome.rows or not {"agreement", "label_smoothing"} & outcome.rows[0].keys()
    with pytest.raises(BadRow, match="another text"):
        other = [{**replies((4, 1))[0], "response": "other"}]
        list(make_pairs(now, PairOptions(before=finder(other), agreed_only=True)))


# --- people's scores -------------------------------------------------------------------------


def test_the_variants_hold_for_ranked_rows() -> None:
    texts = ["a" * 90, "b" * 40, "c" * 10, "d" * 80, "e" * 20]
    by_score = {
        "prompt": "Why?",
        "responses": [{"text": t, "score": s} for t, s in zip(texts, (5, 4, 3, 2, 1), strict=True)],
    }
    by_rank = {"prompt": "Why?", "responses": [{"text": t, "rank": r} for r, t in enumerate(texts)]}
    for row in (by_score, by_rank):
        [pair] = pairs_of(scored_record(row), rho=0.25)
        assert pair_lengths(pair) == (40, 80) and pair["score_from"] == "human"
        [pair] = pairs_of(scored_record(row), rejected_of=1, seed=2)
        assert pair_lengths(pair)[0] == 90


# --- a file beside the input -----------------------------------------------------------------


def judged_rows(prompts: int, **more) -> list[Record]:
    return [
        {"prompt": f"Question {n}?", "response": f"{n}/{k}", "k": k, "score": float((n + k) % 4), **more}
        for n in range(prompts)
        for k in range(3)
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_lookup_finds_the_rows_of_a_prompt_in_any_order(srlm: Srlm, name: str) -> None:
    rows = judged_rows(20)
    path = str(write_rows(srlm.folder / name, rows[:30] + ["", " "] + rows[30:]))
    find = Lookup(path, scored_record, group_of)
    records = [judged_record(row) for row in rows]
    draw = random.Random(0)
    for at in draw.sample(range(20), 20):
        assert find(group_of(records[3 * at])) == records[3 * at : 3 * at + 3]
    assert find(("nowhere", False)) == []


def test_a_lookup_names_what_is_wrong(srlm: Srlm) -> None:
    rows = judged_rows(2)
    apart = str(write_rows(srlm.folder / "apart.jsonl", [rows[0], rows[3], rows[1]]))
    with pytest.raises(DataError, match="apart.jsonl:3: .* are not grouped"):
        Lookup(apart, scored_record, group_of)
    bad = str(write_rows(srlm.folder / "bad.jsonl", [rows[0], "{"]))
    with pytest.raises(DataError, match="bad.jsonl:2: not JSON"):
        Lookup(bad, scored_record, group_of)
    with pytest.raises(OptionError):
        Lookup("-", scored_record, group_of)


# --- the command -----------------------------------------------------------------------------


def test_the_command_takes_all_variants(srlm: Srlm) -> None:
    write_rows(srlm.folder / "in.jsonl", judged_rows(8, model="M2"))
    write_rows(srlm.folder / "m1.jsonl", judged_rows(8, model="M1")[::-1])
    write_rows(srlm.folder / "again.jsonl", [{**row, "score": -row["score"]} for row in judged_rows(8)])
    plain = srlm("make-pairs", "--in", "in.jsonl").rows
    anchored = srlm("make-pairs", "--in", "in.jsonl", "--rejected-pool", "m1.jsonl")
    assert anchored.code == 0, anchored.err
    assert {row["model_rejected"] for row in anchored.rows} == {"M1"} and len(anchored.rows) == len(plain)
    weighed = srlm("make-pairs", "--in", "in.jsonl", "--consistency-with", "again.jsonl", "--out", "pairs.jsonl")
    assert weighed.code == 0, weighed.err
    [mean] = {
        row["agreement"] for row in srlm("make-pairs", "--in", "in.jsonl", "--consistency-with", "again.jsonl").rows
    }
    assert mean < 0.2
    beyond = [{**row, "score": 10**400 if row["k"] else row["score"]} for row in judged_rows(2)]  # of all floats
    huge = srlm("make-pairs", stdin=as_lines(beyond))
    assert huge.code == 3 and "a number or null, got 1000" in huge.err and len(huge.err) < 200, huge.err
    skipped = srlm("make-pairs", "--on-error", "skip", stdin=as_lines(beyond))
    assert skipped.code == 0 and "4 dropped: bad row" in skipped.err
    alone = srlm("make-pairs", "--in", "in.jsonl", "--agreement", "pair")
    assert alone.code == 2 and "--consistency-with FILE" in alone.err
    kept = srlm("make-pairs", "--consistency-with", "in.jsonl", "--agreement", "pair", stdin=as_lines(judged_rows(8)))
    assert kept.code == 0 and len(kept.rows) == len(plain)
    same = srlm("make-pairs", "--consistency-with", "in.jsonl", "--agreement", "prompt", stdin=as_lines(judged_rows(8)))
    assert [row["label_smoothing"] for row in same.rows] == [0.0] * len(plain)
    counts = read_json(srlm.folder / "pairs.jsonl.meta.json")["counts"]
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["counts"]["prompts"] == 8


def test_the_chosen_response_can_be_that_of_a_later_model(srlm: Srlm) -> None:
    def scored(model: str, *scores: float, prompt: str = "Why?") -> list[Record]:
        return [
            {"prompt": prompt, "response": f"{model} {k}", "k": k, "score": score, "model": model}
            for k, score in enumerate(scores)
        ]

    write_rows(srlm.folder / "later.jsonl", [*scored("M2", 3.0, 4.0), *scored("M2", 0.0, prompt="How?")])
    rows = [*scored("M1", 1.0, 5.0), *scored("M1", 2.0, prompt="How?"), *scored("M1", 2.0, 1.0, prompt="Who?")]
    result = srlm("make-pairs", "--chosen-pool", "later.jsonl", "--out", "pairs.jsonl", stdin=as_lines(rows))
    assert result.code == 0, result.err
    [pair] = read_rows(srlm.folder / "pairs.jsonl")
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("M2 1", "M1 0")
    assert (pair["model_chosen"], pair["model_rejected"]) == ("M2", "M1")
    dropped = read_json(srlm.folder / "pairs.jsonl.meta.json")["counts"]["dropped"]
    assert dropped == {"none better than the earlier model's": 1, "no scored response of the later model": 1}


@pytest.mark.parametrize("unsorted", [(), ("--unsorted",)], ids=["sorted", "unsorted"])
def test_among_the_best_the_least_varied_scores_can_decide(srlm: Srlm, unsorted: tuple[str, ...]) -> None:
    scores = [[5.0, 3.0], [4.0, 4.0], [4.0, None], [1.0, 1.0], [2.0, 0.0]]
    rows = [
        {"prompt": f"Ask {n}?", "response": f"r{k}", "k": k, "score": [4.0, 4.0, 4.0, 1.0, 1.0][k], "scores": one}
        for n in range(20)
        for k, one in enumerate(scores)
    ]
    by_seed = srlm("make-pairs", *unsorted, stdin=as_lines(rows)).rows
    by_spread = srlm("make-pairs", "--tie-break", "spread", *unsorted, stdin=as_lines(rows)).rows
    assert {row["chosen"][0]["content"] for row in by_seed} == {"r0", "r1", "r2"}
    assert {row["chosen"][0]["content"] for row in by_spread} == {"r1"}
    assert [row["rejected"] for row in by_seed] == [row["rejected"] for row in by_spread]


def test_auto_says_what_it_found_and_goes_into_the_rows(srlm: Srlm) -> None:
    rows = [*replies((2, 150), (1, 50)), *replies((4, 210), (2, 110), prompt="How?")]
    write_rows(srlm.folder / "in.jsonl", rows)
    result = srlm("make-pairs", "--in", "in.jsonl", "--length-penalty", "auto")
    assert result.code == 0 and "alpha 0.01" in result.err and "+0.0 characters" in result.err
    assert [pair_lengths(row) for row in result.rows] == [(50, 150), (210, 110)]
    assert result.rows[0]["length_alpha"] == pytest.approx(0.01, abs=1e-6)
    shuffled = write_rows(srlm.folder / "mixed.jsonl", [rows[0], rows[2], rows[1], rows[3]])
    assert srlm("make-pairs", "--in", shuffled.name, "--length-penalty", "auto", "--unsorted").rows == result.rows
    apart = srlm("make-pairs", "--in", shuffled.name, "--length-penalty", "auto")
    assert apart.code == 3 and "mixed.jsonl:3" in apart.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--length-penalty", "auto"], "--in FILE"),
        (["--length-penalty", "auto", "--rho", "0.2"], "--rho"),
        (["--length-penalty", "some"], "auto"),
        (["--length-penalty", "-1"], "from 0 up"),
        (["--consistency-with", "in.jsonl"], "--in FILE"),
        (["--of", "judgements"], "--in FILE"),
        (["--of", "judgements", "--consistency-with", "in.jsonl"], "cannot be used with"),
        (["--rejected-pool", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--rejected-pool", "-"], "stdin"),
        (["--rejected-pool", "in.jsonl", "--out", "in.jsonl"], "is the input"),
        (["--rho", "0.6"], "0.5"),
    ],
)
def test_what_cannot_be_is_told(srlm: Srlm, args: list[str], words: str) -> None:
    write_rows(srlm.folder / "in.jsonl", judged_rows(2))
    result = srlm("make-pairs", *args, stdin=as_lines(judged_rows(2)))
    assert result.code == 2 and words in result.err, result.err


def test_files_without_a_prompt_in_common_are_bad_data(srlm: Srlm) -> None:
    write_rows(srlm.folder / "in.jsonl", judged_rows(2))
    write_rows(srlm.folder / "other.jsonl", [{**row, "prompt": "Else?"} for row in judged_rows(1)])
    result = srlm("make-pairs", "--in", "in.jsonl", "--consistency-with", "other.jsonl")
    assert result.code == 3 and "--consistency-with" in result.err


BESIDE = [
    ["--rejected-pool"],
    ["--chosen-pool"],
    ["--agreement", "mean", "--consistency-with"],
    ["--agreement", "prompt", "--consistency-with"],
    ["--agreement", "pair", "--consistency-with"],
]


@pytest.mark.parametrize("option", BESIDE, ids=" ".join)
@pytest.mark.parametrize("prompt", [None, "Else?"], ids=["empty", "other"])
def test_a_file_without_a_prompt_of_the_input_is_exit_3(srlm: Srlm, option: list[str], prompt: str | None) -> None:
    write_rows(srlm.folder / "in.jsonl", judged_rows(3))
    rows = replies((1, 5), (3, 5), prompt=prompt) if prompt else []
    write_rows(srlm.folder / "other.jsonl", rows)
    result = srlm("make-pairs", "--in", "in.jsonl", *option, "other.jsonl", "--out", "pairs.jsonl")
    assert result.code == 3 and "no prompt of in.jsonl" in result.err and option[-1] in result.err, result.err
    assert len(result.err.splitlines()) == 1 and not (srlm.folder / "pairs.jsonl").exists()


@pytest.mark.parametrize("option", BESIDE, ids=" ".join)
def test_an_empty_input_makes_no_pairs(srlm: Srlm, option: list[str]) -> None:
    write_rows(srlm.folder / "in.jsonl", [])
    write_rows(srlm.folder / "other.jsonl", judged_rows(2))
    result = srlm("make-pairs", "--in", "in.jsonl", *option, "other.jsonl", "--out", "pairs.jsonl")
    assert result.code == 0 and not read_rows(srlm.folder / "pairs.jsonl"), result.err


def test_a_long_chosen_reply_is_left_out(srlm: Srlm) -> None:
    assert picked(replies((5, 11), (1, 5)), max_chosen_length=10) == "chosen too long"
    assert picked(replies((5, 10), (1, 50)), max_chosen_length=10) == (0, 1)


def test_two_bad_replies_make_no_pair() -> None:
    assert picked(replies((2, 5), (1, 5)), min_chosen_score=2.5) == "chosen score too low"
    assert picked(replies((2.5, 5), (1, 5)), min_chosen_score=2.5) == (0, 1)
    assert picked(replies((2, 5), (1, 5)), min_chosen_score=2.5, shuffle_labels=True) == "chosen score too low"


def test_a_price_of_a_character_is_found_among_huge_scores() -> None:
    """Numbers of 1e15 lie further apart than the precision that is asked for."""
    rows = [{"score": 1e15 * k, "response": "x" * (10 + 7 * k)} for k in range(4)]
    assert balanced_alpha([(rows, rows)]).alpha > 0


# --- the control -----------------------------------------------------------------------------


def test_shuffled_labels_are_the_same_pairs_with_half_of_them_swapped() -> None:
    rows = [row for n in range(400) for row in replies((5, 3), (1, 4), (2, 5), prompt=f"Ask {n}?")]
    plain, shuffled = pairs_of(rows), pairs_of(rows, shuffle_labels=True, seed=1)
    assert len(plain) == len(shuffled) == 400
    swapped = 0
    for pair, dealt in zip(plain, shuffled, strict=True):
        label = dealt.pop("shuffled_labels")
        other = dict(pair)
        for field in ("{}", "score_{}", "{}_id"):
            a, b = field.format("chosen"), field.format("rejected")
            other[a], other[b] = pair[b], pair[a]
        assert dealt == (other if label == "swapped" else pair)
        swapped += label == "swapped"
    assert 160 < swapped < 240  # 200, 4 standard deviations
    assert pairs_of(rows, shuffle_labels=True, seed=1) != pairs_of(rows, shuffle_labels=True, seed=2)


def test_a_control_says_so_in_the_row_the_meta_and_the_counts(srlm: Srlm) -> None:
    rows = [row for n in range(40) for row in replies((5, 3), (1, 4), prompt=f"Ask {n}?")]
    write_rows(srlm.folder / "in.jsonl", rows)
    result = srlm("make-pairs", "--in", "in.jsonl", "--shuffle-labels", "--seed", "3", "--out", "out.jsonl")
    meta = read_json(srlm.folder / "out.jsonl.meta.json")
    swapped = sum(row["shuffled_labels"] == "swapped" for row in read_rows(srlm.folder / "out.jsonl"))
    assert meta["shuffle_labels"] == {"seed": 3} and f"{swapped} labels swapped" in result.err
    assert meta["counts"]["counts"]["labels swapped"] == swapped
    srlm("make-pairs", "--in", "in.jsonl", "--out", "plain.jsonl")
    assert "shuffle_labels" not in read_json(srlm.folder / "plain.jsonl.meta.json")


def test_a_pair_of_judgements_is_shuffled_too() -> None:
    row = {"id": "p/0", "prompt_id": "p", "targets": ["good", "bad"], "judge_prompt": [], "battles": []}
    rows = [{**row, "id": f"p/{n}"} for n in range(40)]
    made = [
        out
        for outcome in judge_pairs(rows, lambda row: [2.0, 1.0], Choice(shuffle_labels=True))
        for out in outcome.rows
    ]
    chosen = {pair["shuffled_labels"]: pair["chosen"][0]["content"] for pair in made}
    assert chosen == {"kept": "good", "swapped": "bad"}
