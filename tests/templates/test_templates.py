"""Templates: how they are found and checked, and which score or verdict is read from an answer."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest

from helpers import ROOT, Srlm, as_lines, write_rows
from srlm_cli import templates
from srlm_cli.errors import OptionError
from srlm_cli.stages.verdicts import named
from srlm_cli.templates import Template
from srlm_cli.templates.reading import plain

POINTWISE = {"prompt", "response"}
PAIRWISE = {"prompt", "first", "second"}
ADDITIVE = templates.load("additive", fields=POINTWISE)
SCORE_ONLY = templates.load("score_only", fields=POINTWISE)
RATING = templates.load("rating", fields=POINTWISE)
VERDICT = templates.load("pairwise", fields=PAIRWISE)
META = templates.load("meta", fields={"task", "first", "second"})
TWO_SCORES = templates.load("compare_scores", fields=PAIRWISE)
READERS = [ADDITIVE, SCORE_ONLY, RATING, VERDICT, TWO_SCORES]


def own(
    folder: Path, text: str, *, fields: set[str] = POINTWISE, reads: bool = False, of_rows: bool = False
) -> Template:
    """Return a template of the user's own."""
    path = folder / "own.toml"
    path.write_text(text, encoding="utf-8")
    return templates.load(str(path), fields=fields, reads=reads, of_rows=of_rows)


# --- the score of 0 to 5 ---------------------------------------------------------------------

SCORES = [
    # what stands around it
    ("Score: 4/5", 4),
    ("**Score:** 4", 4),
    ("**Score**: 4", 4),
    ("Score: **4**", 4),
    ("Score: <4>", 4),
    ("Score: [4]", 4),
    ("`Score: 4`", 4),
    ('"Score: 4"', 4),
    ("Score: “4”", 4),
    ("### Score\n\n4/5", 4),
    ("Score:\n4", 4),
    ('{"reasons": "Fine.", "score": 4}', 4),
    ("<score>4</score>", 4),
    ("SCORE: 0", 0),
    ("Score:3", 3),
    # what stands between the word and the number
    ("score - 4", 4),
    ("Score – 4", 4),
    ("Score = 2", 2),
    ("Score 3", 3),
    ("The score is 3.", 3),
    ("Score is: 3", 3),
    ("A score of 2", 2),
    ("Score (0-5): 3", 3),
    ("Score (out of 5): 3", 3),
    ("Score out of 5: 3", 3),
    # what stands behind the number
    ("Total score: 4.5", 4.5),
    ("Score: 4 points", 4),
    ("Score: 4 out of 5", 4),
    ("Score: **4**/5", 4),
    ("Score: 4 points out of a possible 5", 4),
    ("Score: 4.", 4),
    ("Score: 5.0", 5),
    ("Score: 4, since it is good.", 4),
    ("Score: 4\n+ clear\n- 2 errors", 4),
    # a sum that is written out
    ("Score: 1+1+1=3", 3),
    ("Score: 1 + 1 + 0 = **2**/5", 2),
    ("Score: (1+1+1) = 3", 3),
    ("Score: 1 point + 1 point = 2 points", 2),
    ("Score: 1 (relevant) + 1 (helpful) = 2", 2),
    ("Score: 3 (1+1+1)", 3),
    ("Score: 1 + 1 + 1", None),
    ("Score: 1 (relevant) + 1 (helpful)", None),
    # several: the last; one with a sign goes before one in passing
    ("Score: 2\nNo, on reflection more.\nScore: 3", 3),
    ("Score: 5 would be too much.\n\nScore: 1", 1),
    ("A score of 5 is for experts. Final score: 2", 2),
    ("The score is 2. No: the score is 3.", 3),
    ("Score: 3\n\nThe reply deals with 4 of 7 points.", 3),
    ("Score: 4\nIt was scored on 5 criteria.", 4),
    ("Score: 4\nFor a score of 5 it would need sources.", 4),
    # digits of other scripts, full-width signs, decimal comma
    ("Score: ４", 4),
    ("Score：4", 4),
    ("Ｓｃｏｒｅ：４／５", 4),
    ("Score：【4】", 4),
    ("Score: ٤", 4),
    ("Score: ٤٫٥", 4.5),
    ("Score: ४/५", 4),
    ("Score: ৩", 3),
    ("Score: 4,5", 4.5),
    ("Score: 4️⃣", 4),
    # another scale, or none
    ("Score: 10", None),
    ("Score: 13 of 5", None),
    ("Score: 55", None),
    ("Score: 5.5", None),
    ("Score: ١٠", None),
    ("Score: 4/10", None),
    ("Score: **4**/10", None),
    ("Score: ４／１０", None),
    ("Score: 4 out of 10", None),
    ("Score: 4 (out of 10)", None),
    ("Score: 4 points out of 10", None),
    ("Score: 4 of 10", None),
    ("Score: 8/50", None),
    ("Score: 4%", None),
    ("Score: -1", None),
    ("Score: −1", None),
    ("Score -1", None),
    # no one number
    ("Score: 4-5", None),
    ("Score: 4–5", None),
    ("Score: 3 or 4", None),
    ("Score: 3.7.2", None),
    ("Score: 1,000", None),
    ("Score: 4½", None),
    ("Score: ②", None),
    ("Score:\n1. Relevance: 1\n2. Help: 1", None),
    ("Score: four", None),
    ("Score: ", None),
    ("Score: N/A", None),
    ("I would give 4 of 5.", None),
    ("1+1+1=3", None),
    ("Underscore 4, scoreboard 3, scores 2", None),
    ("", None),
    # quoted from the reply
    ('The reply says "Score: 5", which is odd.\nScore: 2', 2),
    ('Score: 2\nThe reply says "Score: 5".', 2),
    ('The reply says "Score: 5", which is odd.', None),
    ("The reply says “Score: 5”.", None),
    ("<reply>\nWell.\nScore: 5\n</reply>\nIt rates itself.", None),
    ("<reply>\nWell.\nScore: 5\n</reply>\nIt rates itself.\nScore: 1", 1),
    ("Score: 1\n<reply>\nWell.\nScore: 5\n</reply>", 1),
    ("<reply>A good reply.\nScore: 3", 3),
    # a thought is no verdict
    ("<think>\nScore: 5\nNo.\n</think>\n\nIt greets only.\n\nScore: 1", 1),
    ("<think>\nOne might say Score: 5, but let me look again, since", None),
    ("<think>\nIs this a Score: 5? No.\n</think>\n\nI cannot rate this.", None),
    ("Well, Score: 5 is too much.\n</think>\n\nScore: 2", 2),
    ("Score: 3\nThe reply names the mark `<think>`.", 3),
    ("<reply>\n<think>\nHm.\n</reply>\nScore: 2", 2),
    # nor is a draft, a question, a thing supposed, or an earlier score than one that cannot be read
    ("A first draft:\nScore: 5\nNo, it does not help.", None),
    ("Initial score: 5. It is wrong, though.\nSo the final score is 2.", 2),
    ("Draft score: 5\nScore: 1", 1),
    ("Score: 5? No.\nThe score is 2.", 2),
    ("Score: 5 would be too much. I give a score of 1.", 1),
    ("For a score of 5 it would need sources.", None),
    ("Score: 3\nFinal score: 7/10", None),
    ("Score: 3\nFinal score: N/A", None),
    ("Score: 3\nScore: 3 or 4", None),
    # nor is another quantity
    ("Score: 3\nConfidence score: 4", 3),
    ("Confidence score: 4", None),
    ("**Confidence score**: 4/5\n**Score**: 2/5", 2),
    ("Confidence in the score: 5\nScore: 2", 2),
    ("Score: 2\nMaximum score: 5", 2),
    ('{"score": 2, "confidence_score": 5}', 2),
    ("<result><score>2</score><confidence_score>5</confidence_score></result>", 2),
    ("<confidence_score>5</confidence_score>", None),
    ("Score: 3\nRelevance score: 1/1", 3),
    ('The reply says "Final score: 5".\nScore: 2', 2),
    # reckoned
    ("Score: 1/5 + 1/5 = 2/5", 2),
    ("Score: 1/5 + 1/5 + 0/5 = **2/5**", 2),
    ("Score: 1/5 + 1/5", None),
    ("Score: 5 - 1 = 4", 4),
    ("Score: 80% = 4/5", 4),
    ("Score: 1 + 1 + 1 = 3 + 0.5 = 3.5", 3.5),
    ("Score: $1 + 1 = 2$", 2),
    # LaTeX, JSON, tags
    ("Score: \\boxed{4}", 4),
    ("Score: $\\boxed{4/5}$", 4),
    ("\\boxed{\\text{Score: } 4}", 4),
    ("Score: \\frac{4}{5}", 4),
    ("Score: \\frac{4}{10}", None),
    ('{"score": "4/5", "reasons": "For a score of 5 it needs sources."}', 4),
    ('{"final_score": 3}', 3),
    ("{'totalScore': 3}", 3),
    ("<final_score>\n4\n</final_score>", 4),
    ('<score max="5">4</score>', 4),
    ('<score value="4"/>', 4),
    ("Score: 5 would be too much: <score>1</score>", 1),
    # tables
    ("| **Score** | **4/5** |", 4),
    ("| Point | Score |\n|---|---|\n| Relevant | 1 |\n| Helpful | 1 |\n| **Total** | **2** |", 2),
    ("| Point | Score | Why |\n|---|:-:|---|\n| Relevant | 1 | a |\n| Total score | 2/5 | b |\n\nThat is all.", 2),
    ("Point | Score (0-5)\n--- | ---\nRelevant | 1\nTotal | 3", 3),
    ("| Reasons | Score |\n|---|---|\n| A score of 5 needs sources. | 4 |", 4),
    ("| Point | Score |\n|---|---|\n| Relevant | 1 |\n| Helpful | 1 |", None),
    ("| Point | Score |\n|---|---|\n| Total | 2/10 |", None),
    ("| Point | Score |\n|---|---|\n| Total | 2 |\n\nScore: 3", 3),
    # the last line alone
    ("It helps.\n\n**4**", 4),
    ("It helps.\n\n4/5", 4),
    ("It helps.\n\n4/10", None),
    ("It helps.\n\n\\boxed{4}", 4),
    ("A score of 5 is for experts, so the answer is $\\boxed{2}$.", 2),
    ("- Relevant: 1\n- Helpful: 1\n\n**Total:** 2", 2),
    ("It helps.\n<answer>4</answer>", 4),
    ("4", 4),
    ("It helps:\n1. It answers.\n2. It is short.\n3.", None),
    ("It helps. It names all of the\n4", None),
]


@pytest.mark.parametrize("template", [ADDITIVE, SCORE_ONLY], ids=lambda template: template.name)
@pytest.mark.parametrize(("answer", "score"), SCORES)
def test_the_score_that_is_read(template: Template, answer: str, score: float | None) -> None:
    assert template.score(answer) == score


# --- a rating, a verdict, two scores ---------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Good. Rating: [[8]]", 8),
        ("Rating: [[10]]", 10),
        ("[[7.5]]", 7.5),
        ("Rating: [[7,5]]", 7.5),
        ("Rating: [[8/10]]", 8),
        ("Rating: [[ 8 ]]\nIt meets 3 of 4 points.", 8),
        ("Rating: [[3]]\nOn reflection: [[4]]", 4),
        ("[[6]] it is, though others give a rating of 9.", 6),
        ("Rating: 8", 8),
        ("**Rating:** 8/10", 8),
        ("Rating: [[8", 8),
        ("Rating: [[８]]", 8),
        ("Rating: [[11]]", None),
        ("Rating: [[0]]", None),
        ("Rating: [[rating]]", None),
        ("Rating: 4/5", None),
        ("The matrix is [[1, 2], [3, 4]].", None),
        ("Score: 8", None),
        ("<reply>\nRating: [[10]]\n</reply>", None),
        ("<think>\nRating: [[10]]\n</think>\nRating: [[3]]", 3),
        ("Confidence rating: 9\nRating: 3", 3),
        ("Rating: [[3]]\nConfidence rating: 9", 3),
        ("Initial rating: [[9]]", None),
        ('{"rating": 8}', 8),
        ("<rating>8</rating>", 8),
        ("| Rating | 8/10 |", 8),
        ("| Point | Rating |\n|---|---|\n| Depth | 3 |\n| Overall | 8 |", 8),
        ("Rating: \\boxed{8}", 8),
        ("It is good.\n\n**8/10**", 8),
        ("A rating of 10 is for experts.\n\n\\boxed{8}", 8),
        ("Rating: [[3]]\nRating: [[8/5]]", None),
    ],
)
def test_the_rating_that_is_read(answer: str, score: float | None) -> None:
    assert RATING.score(answer) == score


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Verdict: A", "A"),
        ("**Verdict:** B", "B"),
        ("Verdict: [[B]]", "B"),
        ("[[A]]", "A"),
        ("[[C]]", "C"),
        ("Verdict: tie", "tie"),
        ("Verdict: a tie", "tie"),
        ("The verdict is a tie.", "tie"),
        ("Verdict: Reply A", "A"),
        ("The better reply is B.", "B"),
        ("verdict: b", "b"),
        ("Verdict: A\nNo. Verdict: B", "B"),
        ("It could be better a little.", None),
        ("Both are fine.", None),
        ("<reply A>\nVerdict: A\n</reply A>", None),
        ("<think>\nVerdict: A\n</think>\nVerdict: B", "B"),
        ("<think>\nVerdict: A", None),
        ("Initial verdict: A", None),
        ("Initial verdict: [[A]]", None),
        ("Verdict: B\nIn one way the better reply is A.", "B"),
        ("Verdict: A, B, or tie", None),
        ("Verdict: A or B", None),
        ("Verdict: A clear win for B", None),
        ("Verdict: A is worse than B", None),
        ("Verdict: A is better than B", "A"),
        ("Verdict: A\n\nB was too long.", "A"),
        ("Verdict: the first reply", "first"),
        ('{"verdict": "A", "confidence": 0.9}', "A"),
        ("<verdict>B</verdict>", "B"),
        ("| Verdict | B |", "B"),
        ("Verdict: \\boxed{\\text{B}}", "B"),
        ("It is clearer.\n\n**B**", "B"),
        ("The answer is $\\boxed{A}$.", "A"),
        ("B", "B"),
    ],
)
def test_the_verdict_that_is_read(answer: str, verdict: str | None) -> None:
    assert VERDICT.verdict(answer) == verdict


@pytest.mark.parametrize(
    "answer",
    ["[[A=B]]", "[[A≈B]]", "[[A＝B]]", "[[C]]", "[[tie]]", "Verdict: Tie.", "Verdict: A tie", "Verdict: it's a draw",
     "Verdict: A = B", "Verdict: A and B are equally good", "Verdict: Both are equal", "Verdict: both replies tie",
     "Verdict: Neither is better.", "Verdict: No clear winner", "Verdict: equivalent",
     '{"winner": "tie"}', "Verdict: A\nVerdict: A=B", "Tie", "**Tie**", "Verdict: on par"],
)  # fmt: skip
def test_signs_and_words_of_a_tie_are_no_choice_of_the_first(answer: str) -> None:
    assert named(VERDICT.verdict(answer)) == "tie"


@pytest.mark.parametrize(
    ("answer", "winner"),
    [("[[A>B]]", "A"), ("[[A>>B]]", "A"), ("[[B>A]]", "B"), ("[[B>>A]]", "B"), ("[[A<B]]", "B"), ("[[ A << B ]]", "B"),
     ("Verdict: A > Reply B", "A"), ("Verdict: second", "B"), ("Verdict: Reply 2", "B"), ("[[a]]", "A")],
)  # fmt: skip
def test_a_comparison_names_the_better_one(answer: str, winner: str) -> None:
    assert named(VERDICT.verdict(answer)) == winner


@pytest.mark.parametrize("answer", ["Verdict: Both are good, but A is better", "Verdict: unclear", "Verdict: A?"])
def test_a_verdict_that_cannot_be_told_is_none(answer: str) -> None:
    assert VERDICT.verdict(answer) is None


@pytest.mark.parametrize(
    ("answer", "scores", "verdict"),
    [
        ("8 9\nBoth are good.", (8, 9), "B"),
        ("9 8.5", (9, 8.5), "A"),
        ("7, 7\nThe same.", (7, 7), "tie"),
        ("**8 9**\nBoth.", (8, 9), "B"),
        ("Scores: (10, 1)", (10, 1), "A"),
        ("I solve it: x = 10.\n\nReply 1: 3/10 (wrong)\nReply 2: 9/10 (right)", (3, 9), "B"),
        ("Assistant 1: 9\n\nAssistant 2: 4\nAssistant 1 is right.", (9, 4), "A"),
        ("８ ９", (8, 9), "B"),
        ("8 9\nThey solved 3 4 and 5.", (8, 9), "B"),
        ("<think>\n9 1\n</think>\n2 7", (2, 7), "B"),
        ("Assistant 1 is right, assistant 2 is not.\nThe output tuple is (10, 4).", (10, 4), "A"),
        ("The scores for Assistant 1 and Assistant 2 are 4 and 9, respectively.", (4, 9), "B"),
        ("The scores for Assistant 2 and Assistant 1 are 4 and 9, respectively.", None, None),
        ("I give Assistant 1 a score of 8 out of 10 and Assistant 2 a score of 6.5 out of 10.", (8, 6.5), "A"),
        ("We can assign a score of 5 to reply A and a score of 9 to reply B.", (5, 9), "B"),
        ("Reply A's score is 3 out of 10, and reply B's score is 10 out of 10.", (3, 10), "B"),
        ("Assistant 1:\nScore: 6/10\n\nIt has 3 steps.\n\nAssistant 2:\nScore: 8/10\n\nIt has 4.", (6, 8), "B"),
        ("Assistant 1 has 3 errors and Assistant 2 has 5.", None, None),
        ("11 9", None, None),
        ("8", None, None),
        ("8/10", None, None),
        ("The points are (2, 3) and (10, 4).", None, None),
        ("<reply 1>\n10 1\n</reply 1>", None, None),
        ("Both get 8.", None, None),
    ],
)
def test_two_scores_make_a_verdict(answer: str, scores: tuple | None, verdict: str | None) -> None:
    assert TWO_SCORES.scores(answer) == scores and TWO_SCORES.verdict(answer) == verdict


def test_two_scores_may_stand_in_either_order(tmp_path: Path) -> None:
    text = "text = '$prompt $first $second'\nhigh = 5\npattern = '(?P<b>[0-9]) then (?P<a>[0-9])'"
    template = own(tmp_path, text, fields=PAIRWISE)
    assert template.scores("1 then 4") == (4, 1) and template.verdict("1 then 4") == "A"
    assert template.scores("1 then 6") is None and template.verdict("1 then 6") is None


# --- any answer ------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [t for t in READERS if t.choices], ids=lambda template: template.name)
def test_a_template_reads_what_it_asks_for(template: Template) -> None:
    for choice in template.choices:
        assert template.verdict("Well.\n" + template.finish + choice) == choice
        if template.high:
            assert template.score("Well.\n" + template.finish + choice) == float(choice)


def test_the_place_of_a_score_is_that_in_the_answer() -> None:
    answer = "“Well” – <reply>Score: 1</reply>\nScore：４／５, ٣ more"
    found = ADDITIVE.last_match(answer)
    assert answer[: found.start].endswith("Score：") and answer[found.start : found.end] == "４"
    assert len(plain(answer)) == len(answer)


@pytest.mark.parametrize(
    "digits", ["0123456789", "٠١٢٣٤٥٦٧٨٩", "۰۱۲۳۴۵۶۷۸۹", "०१२३४५६७८९", "๐๑๒๓๔๕๖๗๘๙", "０１２３４５６７８９"]
)
def test_digits_of_any_script_are_digits(digits: str) -> None:
    assert plain(digits) == "0123456789"


def test_signs_that_are_no_decimal_digits_stay() -> None:
    assert plain("²①Ⅳ四½é") == "²①Ⅳ四½é"


PIECES = [
    "score", "Score: ", "rating", "[[", "]]", "Verdict", " ", "\n", "4", "5", "10", "0", ".", ",", "/", "+", "=",
    "-", "(", ")", "*", "<reply>", "</reply>", '"', "４", "٤", "：", "of", "out of ", "points", "A", "tie", "is",
    "Reply 1: ", "Reply 2: ", "é",
]  # fmt: skip


def test_whatever_an_answer_is_its_score_is_none_or_in_bounds() -> None:
    draw, read = random.Random(0), 0
    for _ in range(3000):
        answer = "".join(draw.choices(PIECES, k=draw.randint(1, 14)))
        for template in READERS:
            scores = template.scores(answer) if template.high else None
            assert scores is None or all(template.low <= score <= template.high for score in scores), answer
            assert template.verdict(answer) is None or isinstance(template.verdict(answer), str)
            read += scores is not None
    assert read > 100


@pytest.mark.parametrize(
    "answer",
    ["score" + " " * 20000, "Score: " + "*" * 20000, "score " * 4000, "score (" * 3000, "Score: " + "1+" * 9000,
     "Score: " + "1" * 20000, "Score: 1" + " " * 20000, "Score: 1 (a) " * 1500, "[[" * 9000, "rating " * 3000,
     "Verdict: " + "*" * 20000, "Reply 1: 8\n" * 2000, "\n" * 20000, "8 " * 9000, "|-\n" * 5000,
     "| Score |\n|-|\n" * 1500,
     "<think>" * 3000, "</think>\n" * 2000, "first draft: " * 2000, '"score ' * 3000, "confidence in the " * 1500,
     "1/5 + " * 4000, "Score: " + "1 = " * 5000, "\\boxed{" * 3000, "Verdict: " + "A > " * 5000,
     "a score of 1 to reply A " * 800,
     "Assistant 1:\nScore: 6/10\n" * 800, "[[tie " * 1500],
    ids=lambda answer: repr(answer[:12]),
)  # fmt: skip
def test_an_answer_that_goes_round_in_circles_is_read_in_no_time(answer: str) -> None:
    def seconds() -> float:
        started = time.process_time()
        for template in READERS:
            template.verdict(answer)
        return time.process_time() - started

    assert any(seconds() < 2 for _ in range(3))  # usually 0.05; something else in the process may take long once


# --- finding and checking --------------------------------------------------------------------


def test_an_unknown_template_names_those_there_are() -> None:
    with pytest.raises(OptionError, match="additive.*compare_scores.*rating"):
        templates.load("addititve", fields=POINTWISE)


@pytest.mark.parametrize(
    "text",
    [
        'text = "no fields"',
        'text = "$prompt $response $other"',
        'text = "$prompt"',
        'text = "$prompt $response for $5"',
        "text = 3 4",
        "text = 3",
        'texts = "x"',
        'text = "$prompt $response"\npattern = "("',
        'text = "$prompt $response"\npattern = "[0-9]"',
        'text = "$prompt $response"\npattern = "([0-9])([0-9])"',
        'text = "$prompt $response"\npattern = "(?P<a>[0-9])(?P<b>[0-9])"',
        'text = "$prompt $response"\npattern = 5',
        'text = "$prompt $response"\nlow = "0"',
        'text = "$prompt $response"\ndirect = 1',
        'text = "$prompt $response"\nchoices = [1, 2]',
        'text = "$prompt $response"\nextends = "none"',
        'text = "$prompt $response"\nextends = 1',
    ],
)
def test_a_template_that_cannot_work_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(OptionError):
        own(tmp_path, text)


def test_a_pattern_of_ones_own_reads_no_thought_unless_it_names_the_mark(tmp_path: Path) -> None:
    answer = "<think>\nGrade: 5\n</think>\nGrade: 2 or, as I thought,\n<think>\nGrade: 4\n"
    text = "text = '$prompt $response'\nhigh = 5\npattern = '%sGrade: ([0-9])'"
    assert own(tmp_path, text % "").score(answer) == 2
    assert own(tmp_path, text % "(?s)<think>.*").score(answer) == 4


def test_a_pattern_of_ones_own_reads_only_what_it_matches(tmp_path: Path) -> None:
    text = "text = '$prompt $response'\nhigh = 5\nfinish = 'Grade: '\npattern = 'Grade: ([0-9])'"
    template = own(tmp_path, text)
    assert [template.score(answer) for answer in ("**4**", "\\boxed{4}", "| Grade | 4 |", "Grade: 4")] == [
        None,
        None,
        None,
        4,
    ]
    assert template.score("Draft: Grade: 4") == 4


def test_groups_of_a_pattern_can_pass_over_and_be_weak(tmp_path: Path) -> None:
    text = "text = '$prompt $response'\nhigh = 5\nfinish = 'Grade: '\n"
    text += "pattern = '(?P<not>old grade)|(?:Grade: |(?P<weak>grade of ))([0-9])'"
    template = own(tmp_path, text)
    assert template.score("Grade: 4\nold grade: 3, not a grade of 5") == 4
    assert template.score("a grade of 5 or a grade of 3") == 3 and template.score("a grade of 5\n\n**2**") == 2
    with pytest.raises(OptionError, match="one group"):
        own(tmp_path, text.replace("([0-9])", "[0-9]"))


def test_a_template_whose_answers_are_read_needs_a_pattern(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="pattern"):
        own(tmp_path, 'text = "$prompt $response"', reads=True)


def test_what_a_pattern_captures_has_to_be_a_number_to_be_a_score(tmp_path: Path) -> None:
    template = own(tmp_path, "text = '$prompt $response'\nhigh = 5\npattern = 'grade ([a-z0-9]+)'")
    assert template.score("grade four") is None and template.score("grade 4") == 4
    assert template.score("grade nan") is None and template.score("grade infinity") is None


def test_a_template_can_extend_a_built_in_one(tmp_path: Path) -> None:
    template = own(tmp_path, 'extends = "additive"\nhigh = 3\ntext = "$prompt $response"')
    assert (template.text, template.high, template.choices) == ("$prompt $response", 3, ("0", "1", "2", "3"))
    assert template.score("Score: 3") == 3 and template.score("Score: 4") is None
    assert template.pattern == SCORE_ONLY.pattern == ADDITIVE.pattern
    alone = own(tmp_path, 'high = 3\ntext = "$prompt $response"')
    assert len({template.hash, alone.hash, ADDITIVE.hash, SCORE_ONLY.hash}) == 4


def test_the_hash_of_a_template_covers_what_it_extends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base.toml"
    monkeypatch.setattr(templates, "files", lambda _: tmp_path)
    hashes = set()
    for high in (3, 4):
        base.write_text(f"high = {high}")
        hashes.add(own(tmp_path, 'extends = "base"\ntext = "$prompt $response"').hash)
    assert len(hashes) == 2


# --- the commands ----------------------------------------------------------------------------

ROWS = [{"prompt": "Why?", "response": "Because.", "k": 0}]


def test_head_to_head_takes_a_template_of_two_scores(srlm: Srlm) -> None:
    write_rows(srlm.folder / "b.jsonl", [{**ROWS[0], "response": "For a reason."}])
    argv = ["eval", "head-to-head", "--engine", "echo", "--against", "b.jsonl", "--template", "compare_scores"]
    assert srlm(*argv, stdin=as_lines(ROWS)).code == 0
    refused = srlm(*argv, "--direct", stdin=as_lines(ROWS))
    assert refused.code == 2 and "--direct" in refused.err


def test_a_judge_of_single_replies_takes_no_template_of_two_scores(srlm: Srlm) -> None:
    result = srlm("judge", "--engine", "echo", "--template", "compare_scores", stdin=as_lines(ROWS))
    assert result.code == 2 and "$response" in result.err


def test_the_templates_of_the_docs_work(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "templates.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    support, strict, grade, fields = (own(tmp_path, text, reads=True, of_rows=True) for text in blocks)
    assert support.score('{"accuracy": "n/a", "on topic": true, "tone": "neutral"}') == 3.75
    assert fields.system and fields.examples and fields.uses("reference") and fields.uses("task.language")
    assert strict.score("Fine. Score: 4/5") == 4 and strict.choices == ADDITIVE.choices
    assert grade.score("Fine.\nGrade: 6") == 6 and grade.score("Grade: 7") is None
    listed = re.findall(r"^\| `(\w+)` \| `(?:judge|eval)", page, re.MULTILINE)
    with_passages = ["evidence", "evidence_score_only"]
    pointwise, others = (ADDITIVE, SCORE_ONLY, RATING), (META, TWO_SCORES)
    together = [VERDICT.name, "group"]
    beside = ["reference", "rubric", "criteria", "criteria_score_only", *with_passages, *together]
    assert listed == [*(t.name for t in pointwise), *beside, *(t.name for t in others)]
    assert set(listed) | {"hindsight", "hindsight_evidence", "new_prompt", "new_criteria", "query"} == set(
        templates.names()
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("low = 1", "`low` has to be below its `high`"),
        ('low = 0\nhigh = 5\nfinish = "Score: "\nchoices = ["good", "bad"]', "choice 'good' is not a number"),
        ('low = 0\nhigh = 5\nfinish = "Score: "\nchoices = ["5", "6"]', "choice '6' is not from `low` 0 to `high` 5"),
        ('low = 0\nhigh = 5\nfinish = "Score: "\nchoices = ["nan"]', "choice 'nan' is not from `low` 0 to `high` 5"),
        ("low = 0\nhigh = inf", "`high` has to be a number"),
        ("low = -1e400\nhigh = 5", "`low` has to be a number"),
        ('low = 0\nhigh = 5\nprefix = "Task $other:"', "`prefix` takes the field $next only"),
    ],
)
def test_a_template_that_could_not_be_read_is_refused_at_once(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(OptionError, match=re.escape(said)):
        own(tmp_path, f"text = 'Rate $prompt $response'\npattern = 'Score: ([0-9])'\n{text}\n", reads=True)


def test_a_template_without_a_pattern_and_without_criteria_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="it has no pattern, and no `criteria`"):
        own(tmp_path, 'extends = "criteria"\ncriteria = []\n', reads=True, of_rows=True)


def test_a_group_that_is_not_there_is_no_score(tmp_path: Path) -> None:
    text = "text = 'Rate $prompt $response'\npattern = 'Score: (?:([0-9])|n/a)'\nlow = 0\nhigh = 5\n"
    form = own(tmp_path, text, reads=True)
    assert form.score("Score: n/a") is None and form.score("Score: 4") == 4
