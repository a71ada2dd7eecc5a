"""Finds the thought (reasoning) in a model's text, and separates it from the answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

QUOTES = tuple("`\"'")
SWITCHES = ("enable_thinking", "thinking")  # names in templates of the option that turns thinking on and off
UNFINISHED = "unfinished-thought"  # the finish reason of a text whose thought has no closing mark


@dataclass(frozen=True)
class Family:
    """The marks that a family of models writes around a thought.

    `begins` and `ends` are regular expressions that match the marks. `opening` and `closing` are the texts to write
    if the chat template does not define them. `tokens` are the special tokens of the marks. A token in `after` ends
    the answer.
    """

    begins: str
    ends: str
    opening: str
    closing: str
    tokens: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


def tags(name: str, brackets: tuple[str, str] = ("<", ">"), slash: str = "/") -> Family:
    """Return the family whose thoughts are between two tags with this name."""
    opened, closed = (brackets[0] + mark + name + brackets[1] for mark in ("", slash))
    return Family(re.escape(opened), re.escape(closed), f"{opened}\n", f"\n{closed}\n\n", (opened, closed))


FAMILIES = (
    tags("think"),  # DeepSeek, Qwen, SmolLM3, GLM, Nemotron, OLMo, LFM2
    tags("thinking"),
    tags("thought"),
    tags("seed:think"),
    tags("THINK", ("[", "]")),  # Magistral
    tags("think", ("\u25c1", "\u25b7")),  # Kimi
    Family(
        r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>", "<|begin_of_thought|>\n", "\n<|end_of_thought|>\n\n",
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ),
    Family(
        r"<\|START_THINKING\|>", r"<\|END_THINKING\|>(?:\s*<\|START_RESPONSE\|>)?", "<|START_THINKING|>",
        "<|END_THINKING|><|START_RESPONSE|>", ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|END_RESPONSE|>",),
    ),  # Command A
    Family(
        r"<\|channel>thought\b", r"<channel\|>", "<|channel>thought\n", "\n<channel|>", ("<|channel>", "<channel|>")
    ),  # Gemma 4
    Family(
        r"(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)\b[^<]*(?:<\|message\|>)?",
        r"(?:<\|end\|>)?(?:<\|start\|>assistant)?<\|channel\|>final\b[^<]*(?:<\|message\|>)?",
        "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>"), ("<|end|>", "<|start|>"),
    ),  # gpt-oss
    Family(
        r"(?:<\|start\|>assistant)? to=self<\|message\|>",
        r"(?:<\|eom\|>)?(?:<\|start\|>assistant)? to=user<\|message\|>",
        " to=self<|message|>", "<|eom|><|start|>assistant to=user<|message|>",
        ("<|start|>", "<|message|>", "<|eom|>"), ("<|eom|>", "<|start|>"),
    ),  # Muse Glimmer
)  # fmt: skip


class Thought(NamedTuple):
    """A thought: its text without marks, and `raw`, all that the model wrote before the answer, with the marks.

    `closed` is False if the model did not write the closing mark. `at_limit` is True if srlm wrote the closing mark
    because the thought reached its limit of tokens.
    """

    text: str
    raw: str
    closed: bool = True
    at_limit: bool = False


class Span(NamedTuple):
    """The place of a thought in a text, in characters: its begin and end, and the end of its closing mark."""

    begin: int
    end: int
    after: int


@dataclass(frozen=True)
class Marks:
    """The marks to search for in a text."""

    families: tuple[Family, ...] = FAMILIES

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """A regular expression for any opening or closing mark."""
        begins, ends = ("|".join(getattr(one, kind) for one in self.families) for kind in ("begins", "ends"))
        return re.compile(rf"(?i)(?P<open>{begins})|(?P<close>{ends})")

    @cached_property
    def at_end(self) -> re.Pattern[str]:
        """A regular expression for a text that ends with an opening mark, as some generation prompts do."""
        return re.compile(rf"(?i)(?:{'|'.join(one.begins for one in self.families)})\s*\Z")

    def opened(self, prompt: str) -> bool:
        """Return whether a prompt ends with an opening mark."""
        return bool(self.at_end.search(prompt[-200:]))

    def named_in(self, text: str) -> Family | None:
        """Return the family whose opening mark is in a text, such as a template's source; None where none is."""
        found = [(match.start(), one) for one in self.families if (match := re.search(one.begins, text))]
        return min(found, key=lambda one: one[0])[1] if found else None

    def spans(self, text: str, opened: bool = False) -> list[Span]:
        """Return the thoughts of a text.

        A thought without a closing mark ends with the text. A closing mark without an opening mark ends a thought that
        the prompt opened: all text before it. A second such mark counts only if it is alone on its line. A mark in
        quotation marks or backticks is part of the text.
        """
        found: list[Span] = []
        begin: int | None = 0 if opened else None
        end = 0
        for mark in self.pattern.finditer(text):
            before, after = (sign in QUOTES for sign in (text[mark.start() - 1 : mark.start()], text[mark.end() :][:1]))
            if mark["open"]:
                if not before and (begin is None or not text[begin : mark.start()].strip()):
                    begin = mark.end()
            elif (
                not (before and after)
                if begin is not None
                else not (before or after) and (not found or alone(text, mark))
            ):
                found.append(Span(end if begin is None else begin, mark.start(), mark.end()))
                begin, end = None, mark.end()
        return found if begin is None else [*found, Span(begin, len(text), len(text) + 1)]

    def divide(self, text: str, opened: bool = False) -> tuple[str, Thought | None]:
        """Return the answer and the thought of a text that a model wrote; the thought is None if there is none.

        `opened` means that the prompt ended with the opening mark. A text with several thoughts has its answer after
        the last one. If the last thought has no closing mark, the answer is empty.
        """
        found = self.spans(text, opened)
        leads = found and (opened or not self.pattern.sub("", text[: found[0].begin]).strip())
        if not leads:
            return text, None
        last = found[-1]
        words = "\n\n".join(said for span in found if (said := text[span.begin : span.end].strip()))
        if last.after > len(text):
            return "", Thought(words, text, closed=False)
        answer = text[last.after :].lstrip()
        raw = text[: len(text) - len(answer)]
        for mark in (mark for family in self.families for mark in family.after):
            answer = answer.partition(mark)[0]
        return answer, Thought(words, raw)

    def closing(self, text: str, opened: bool = False, family: Family | None = None) -> str:
        """Return the text that closes an open thought at the end of a text, or an empty text if no thought is open.

        The family is that of the opening mark in the text, or `family` if the prompt opened the thought.
        """
        found = self.spans(text, opened)
        if not found or found[-1].after <= len(text):
            return ""
        mark = next(
            (mark for mark in self.pattern.finditer(text) if mark["open"] and mark.end() == found[-1].begin), None
        )
        families = [one for one in self.families if mark and re.fullmatch(one.begins, mark[0], re.IGNORECASE)]
        return (families or [family or self.families[0]])[0].closing

    def blanked(self, text: str) -> str:
        """Return a text of the same length with spaces in place of its thoughts."""
        for begin, end, _ in self.spans(text):
            text = text[:begin] + " " * (end - begin) + text[end:]
        return text

    def tokens(self, known: set[str]) -> Iterator[str]:
        """Yield the special tokens of each family whose tokens are all in a vocabulary."""
        for family in self.families:
            if set(family.tokens) <= known:
                yield from {*family.tokens, *family.after}


MARKS = Marks()


def marks_of(own: tuple[str, str] | None) -> Marks:
    """Return the marks to search for: first the pair (opening, closing) of the user, then the known ones."""
    if own is None:
        return MARKS
    opened, closed = own
    family = Family(
        re.escape(opened.strip()), re.escape(closed.strip()), opened, closed, (opened.strip(), closed.strip())
    )
    return Marks((family, *FAMILIES))


def alone(text: str, mark: re.Match[str]) -> bool:
    """Return whether a mark is all of its line."""
    before, after = text[: mark.start()].rpartition("\n")[2], text[mark.end() :].partition("\n")[0]
    return not before.strip() and not after.strip()


SIGNS = ("<", "[", "\u25c1")  # one of them is in every mark
NAMES = re.compile(r"(?i)think|thought|channel\|>|to=self")  # one of them is in every mark


def blanked(text: str) -> str:
    """Return a text of the same length with spaces in place of its thoughts."""
    return MARKS.blanked(text) if any(sign in text for sign in SIGNS) else text


def may_think(text: str) -> bool:
    """Return False if a text has no mark of a thought; a quick test for most texts."""
    one, other, third = SIGNS  # not any(): it takes three times as long, and this runs for each row
    return (one in text or other in text or third in text) and NAMES.search(text) is not None


def divided(text: str) -> tuple[str | None, str | None]:
    """Return the answer and the thought of a stored text.

    The answer is None if the thought has no closing mark. The thought is None if there is none.
    """
    answer, thought = MARKS.divide(text)
    if thought is None:
        return text, None
    return answer if thought.closed else None, thought.text
