"""Find the thoughts in a model's text: reasoning that is not part of the answer."""

from __future__ import annotations

import re

# The marks of a thought by family: how it is opened, how it is closed, and the text that closes it.
MARKS = (
    (r"<(?:think|thinking|thought)>", r"</(?:think|thinking|thought)>", "</think>"),  # DeepSeek, Qwen, SmolLM3, GLM
    (r"<seed:think>", r"</seed:think>", "</seed:think>"),
    (r"\[THINK\]", r"\[/THINK\]", "[/THINK]"),  # Magistral
    (r"\u25c1think\u25b7", r"\u25c1/think\u25b7", "\u25c1/think\u25b7"),  # Kimi
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>", "<|end_of_thought|>"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>", "<|END_THINKING|>"),  # Command A
    (r"<\|channel>thought\b", r"<channel\|>", "<channel|>"),  # Gemma 4
    (r"<\|channel\|>analysis\b", r"<\|channel\|>final\b", "<|channel|>final<|message|>"),  # gpt-oss
)
OPEN, CLOSE = ("|".join(mark[at] for mark in MARKS) for at in (0, 1))
# A mark in quotation marks or backticks is named, not used.
MARK = re.compile(rf"""(?i)(?<![`"'])(?:(?P<open>{OPEN})|(?P<close>{CLOSE}))(?![`"'])""")


def spans(text: str) -> list[tuple[int, int]]:
    """Return where the thoughts of a text begin and end, without their marks.

    One that is never closed goes to the end. A closing mark without an opening one ends a thought that the prompt
    has opened: all before it. After a closed thought, such a mark counts where it is alone on its line.
    """
    found: list[tuple[int, int]] = []
    begin: int | None = None
    end = 0
    for mark in MARK.finditer(text):
        if mark["open"]:
            begin = mark.end() if begin is None else begin
        elif begin is not None or not found or alone(text, mark):
            found.append((end if begin is None else begin, mark.start()))
            begin, end = None, mark.end()
    return found if begin is None else [*found, (begin, len(text))]


def alone(text: str, mark: re.Match[str]) -> bool:
    """Return whether a mark is all of its line."""
    before, after = text[: mark.start()].rpartition("\n")[2], text[mark.end() :].partition("\n")[0]
    return not before.strip() and not after.strip()


def blanked(text: str) -> str:
    """Return a text of the same length with spaces in place of its thoughts."""
    for begin, end in spans(text):
        text = text[:begin] + " " * (end - begin) + text[end:]
    return text


def closed(text: str) -> str:
    """Return a text whose thoughts are closed: with a closing mark where it ends inside of one."""
    found = spans(text)
    if not found or found[-1][1] < len(text):
        return text
    opened = next(mark for mark in MARK.finditer(text) if mark["open"] and mark.end() == found[-1][0])
    end = next(end for begin, _, end in MARKS if re.fullmatch(begin, opened[0], re.IGNORECASE))
    return f"{text.rstrip()}\n{end}\n\n"
