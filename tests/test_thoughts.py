"""What of a text is a thought, closed or not, and where a completion ends in spite of one."""

from __future__ import annotations

import pytest

from srlm_cli import thoughts
from srlm_cli.engines.base import Sampling, end_of


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
         "<|channel|>analysis <|channel|>final<|message|>Four."),
        ("<think>a</think>Four.<think>b</think>Five.", "<think> </think>Four.<think> </think>Five."),
        ("<think>a <think>b</think> c\n</think>\nFour.", "<think> </think> </think> Four."),
        ("<think>a</think>\nFour. It has a </think> mark.", "<think> </think> Four. It has a </think> mark."),
        ("It names `<think>` and '</think>'.", "It names `<think>` and '</think>'."),
    ],
)  # fmt: skip
def test_what_is_left_without_thoughts(text: str, answer: str) -> None:
    assert answer_of(text) == answer and len(thoughts.blanked(text)) == len(text)


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("Four.", "Four."),
        ("<think>a</think>Four.", "<think>a</think>Four."),
        ("<think>\nHm, \n", "<think>\nHm,\n</think>\n\n"),
        ("[THINK]Hm", "[THINK]Hm\n[/THINK]\n\n"),
        ("<think>a</think>b<thought>c", "<think>a</think>b<thought>c\n</think>\n\n"),
    ],
)
def test_a_thought_is_closed_where_a_text_ends_in_it(text: str, closed: str) -> None:
    assert thoughts.closed(text) == closed
    assert thoughts.closed(closed) == closed


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
