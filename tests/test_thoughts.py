"""What of a text is a thought, closed or not, and where a completion ends in spite of one."""

from __future__ import annotations

import pytest

from srlm_cli import thoughts
from srlm_cli.engines.base import Sampling, end_of
from srlm_cli.thoughts import MARKS


def answer_of(text: str) -> str:
    """Return what is left of a text without its thoughts."""
    return " ".join(thoughts.blanked(text).split())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Four.", "Four."),
        ("<think>\nHm.\n</think>\n\nFour.", "<think> </think> Four."),
        ("<think>Hm", "<think>"),
        ("Hm.\n</think>\n\nFour.", "</think> Four."),
        ("<THINK>Hm</Think>Four.", "<THINK> </Think>Four."),
        ("<thinking>Hm</thinking> Four.", "<thinking> </thinking> Four."),
        ("<seed:think>Hm</seed:think>Four.", "<seed:think> </seed:think>Four."),
        ("[THINK]Hm[/THINK]Four.", "[THINK] [/THINK]Four."),
        ("<|channel>thought\nHm<channel|>Four.", "<|channel>thought <channel|>Four."),
        ("<|channel|>analysis<|message|>Hm<|end|><|channel|>final<|message|>Four.",
         "<|channel|>analysis<|message|> <|end|><|channel|>final<|message|>Four."),
        ("<think>a</think>Four.<think>b</think>Five.", "<think> </think>Four.<think> </think>Five."),
        ("<think>a <think>b</think> c\n</think>\nFour.", "<think> </think> </think> Four."),
        ("<think>a</think>\nFour. It has a </think> mark.", "<think> </think> Four. It has a </think> mark."),
        ("It names `<think>` and '</think>'.", "It names `<think>` and '</think>'."),
    ],
)  # fmt: skip
def test_what_is_left_without_thoughts(text: str, answer: str) -> None:
    assert answer_of(text) == answer and len(thoughts.blanked(text)) == len(text)


@pytest.mark.parametrize(
    ("text", "opened", "answer", "thought", "closing"),
    [
        ("Four.", False, "Four.", None, ""),
        ("<think>\nHm.\n</think>\n\nFour.", False, "Four.", "Hm.", ""),
        ("\n<think>Hm.</think>Four.", False, "Four.", "Hm.", ""),
        ("Hm.\n</think>\n\nFour.", False, "Four.", "Hm.", ""),  # by a server whose template has opened it
        ("Hm.\n</think>\n\nFour.", True, "Four.", "Hm.", ""),
        ("</think>\n\nFour.", True, "Four.", "", ""),
        ("<think>\n\n</think>\n\n", False, "", "", ""),
        ("<think>\nHm, \n", False, None, "Hm,", "\n</think>\n\n"),
        ("Hm", True, None, "Hm", "\n</think>\n\n"),
        ("", True, None, "", "\n</think>\n\n"),
        ("[THINK]Hm", False, None, "Hm", "\n[/THINK]\n\n"),
        ("<think>Hm</think>\"Four.\"", False, '"Four."', "Hm", ""),
        ("<think>It says `</think>` there</think>Four.", False, "Four.", "It says `</think>` there", ""),
        ("<think>a</think>b<thought>c", False, None, "a\n\nc", "\n</thought>\n\n"),
        ("<think>a</think>b<think>c</think>d", False, "d", "a\n\nc", ""),
        ("The tag <think> opens one.", False, "The tag <think> opens one.", None, "\n</think>\n\n"),
        ("It names `<think>` and '</think>'.", False, "It names `<think>` and '</think>'.", None, ""),
        ("<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Four.<|end|>", False,
         "Four.", "Hm", ""),
        ("<|channel|>final<|message|>Four.", False, "Four.", "", ""),
        ("<|channel|>analysis<|message|>Hm", False, None, "Hm",
         "<|end|><|start|>assistant<|channel|>final<|message|>"),
        ("<|channel>thought\n<channel|>Four.", False, "Four.", "", ""),
    ],
)  # fmt: skip
def test_a_text_is_divided_into_thought_and_answer(
    text: str, opened: bool, answer: str | None, thought: str | None, closing: str
) -> None:
    found, about = MARKS.divide(text, opened)
    assert (about and about.text) == thought and MARKS.closing(text, opened) == closing
    assert found == (answer or "") and (about is None or about.closed == (answer is not None))
    if about:
        assert about.raw == text if answer is None else text.startswith(about.raw) and found in text
    again, closed = MARKS.divide(text + closing + "Four.", opened) if answer is None else (found, about)
    assert again == (answer if answer is not None else "Four.") and (closed is None or closed.closed)


LAST = Sampling(last_line=r"Score: \d")


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("Fine.\nScore: 4\nUser: and", "Fine.\nScore: 4"),
        ("<think>\nScore: 5\nNo.\n", None),
        ("<think>\nScore: 5\nNo.\n</think>\nScore: 1\nUser: and", "<think>\nScore: 5\nNo.\n</think>\nScore: 1"),
        ("Score: 5\nNo.\n</think>\nScore: 1\n", "Score: 5\nNo.\n</think>\nScore: 1"),
    ],
)
def test_no_line_of_a_thought_ends_a_completion(text: str, end: str | None) -> None:
    cut = end_of(text, LAST)
    assert (None if cut is None else text[:cut]) == end


def test_every_mark_has_a_sign_of_the_quick_test() -> None:
    for family in thoughts.FAMILIES:
        for mark in (family.opening, family.closing, *family.tokens):
            assert any(sign in mark for sign in thoughts.SIGNS), mark
        for written in (str, str.upper, str.title, str.swapcase):
            mark = written(family.opening)
            assert thoughts.MARKS.divide(f"{mark}Hm.")[1] and thoughts.may_think(f"{mark}Hm."), mark
        thought = f"{family.opening}Score: 1{family.closing}Score: 4"
        assert "Score: 1" not in thoughts.blanked(thought) and thoughts.blanked(thought).endswith("Score: 4")
