"""The built-in checks, by name; each is made from its arguments and takes a reply without space around it.

Most are kinds of instructions of IFEval (arXiv 2311.07911). The checks are this project's own: nothing is drawn at
random, words are compared as text, and no language is guessed. So figures differ from those of IFEval's checkers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

import regex

from srlm_cli.rules.code import passes

Check = Callable[[str], bool]

SECONDS = 1.0  # of the processor, for a regular expression and one reply
PATTERN_LENGTH = 1000
# `regex` writes counted repeats out when it compiles: 300 MB for a million.
REPEATS = 100_000

SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f\u061f\u0964]+[\"'\u201d\u2019)\]]*(?=\s|$)")
BULLET = re.compile(r"\s*[-*\u2022]\s+\S")
HIGHLIGHT = re.compile(r"\*(?!\s)[^*\n]*[^*\s]\*")
PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")
TITLE = re.compile(r"<<[^<>\n]+>>")
FENCE = re.compile(r"```[a-zA-Z]*\n(.*?)\n?```", re.DOTALL)
# A sign after a letter or a digit is a hyphen: the 5 of "item-5".
SIGN = r"(?:(?<![\w.])[-+\u2212])?"
NUMBER = re.compile(rf"{SIGN}(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{{1,3}})?|{SIGN}(?<!\d)\.\d+")
RANGE = re.compile(r"(\d{1,9})?(\.\.)?(\d{1,9})?")


class BadRule(ValueError):
    """A rule that does not exist, or arguments that it does not take."""


class TooSlow(Exception):
    """A check that does not end in its time."""


# --- arguments -------------------------------------------------------------------------------


def in_range(args: str | None, name: str) -> Callable[[int], bool]:
    """Return whether a count is in a range: `N`, `A..B`, `A..` or `..B`."""
    found = RANGE.fullmatch(args or "")
    low, dots, high = found.groups() if found else (None, None, None)
    if not (low or high) or (low and high and not dots) or (not low and not dots):
        raise BadRule(f"rule {name} takes a range: 3, 2..5, 2.. or ..5, got {args!r}")
    least, most = int(low or 0), int(high) if high else int(low) if not dots else None
    if most is not None and least > most:
        raise BadRule(f"rule {name}: the range {args} is empty")
    return lambda count: least <= count and (most is None or count <= most)


def a_text(args: str | None, name: str) -> str:
    """Return the text of the arguments."""
    if not args or not args.strip():
        raise BadRule(f"rule {name} takes a text, as in {name}:TEXT")
    return args.strip()


def counted(name: str, count: Callable[[str], int]) -> Callable[[str | None], Check]:
    """Return what makes a check of how often something is in a reply."""

    def make(args: str | None) -> Check:
        fits = in_range(args, name)
        return lambda text: fits(count(text))

    return make


def plain(name: str, check: Check) -> Callable[[str | None], Check]:
    """Return what makes a check without arguments."""

    def make(args: str | None) -> Check:
        if args is not None:
            raise BadRule(f"rule {name} takes no arguments, got {args!r}")
        return check

    return make


def with_text(name: str, check: Callable[[str, str], bool]) -> Callable[[str | None], Check]:
    """Return what makes a check that compares a reply with a text, `check(reply, text)`."""

    def make(args: str | None) -> Check:
        wanted = a_text(args, name)
        return lambda text: check(text, wanted)

    return make


# --- what is counted -------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Return the words of a text: what is between spaces and has a letter or a digit."""
    return [word for word in text.split() if any(map(str.isalnum, word))]


def sentences(text: str) -> int:
    """Return the number of sentences: parts with a letter or digit that end in . ! or ? before a space, or at the end.

    An abbreviation such as "e.g." before a space ends a part, too.
    """
    return sum(any(map(str.isalnum, part)) for part in SENTENCE_END.split(text))


def paragraphs(text: str) -> int:
    """Return the number of paragraphs: parts between empty lines."""
    return sum(bool(part.strip()) for part in re.split(r"\n[^\S\n]*\n", text))


def lines(text: str) -> list[str]:
    """Return the lines of a text that are not empty."""
    return [line for line in text.split("\n") if line.strip()]


def capital_words(text: str) -> int:
    """Return the number of words in capital letters."""
    return sum(word.isupper() for word in words(text))


def occurrences(wanted: str) -> re.Pattern[str]:
    """Return the pattern of a text as whole words, in capital or small letters."""
    before = r"(?<!\w)" if re.match(r"\w", wanted) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", wanted) else ""
    return re.compile(before + re.escape(wanted) + after, re.IGNORECASE)


# --- single checks ---------------------------------------------------------------------------


def includes(args: str | None) -> Check:
    """Return the check for a text, as whole words."""
    pattern = occurrences(a_text(args, "include"))
    return lambda text: pattern.search(text) is not None


def counts(args: str | None) -> Check:
    """Return the check for how often a text is in a reply, from `RANGE:TEXT`."""
    wanted, _, rest = (args or "").partition(":")
    if not rest.strip():
        raise BadRule(f"rule count takes a range and a text, as in count:2..:sky, got {args!r}")
    fits, pattern = in_range(wanted, "count"), occurrences(rest.strip())
    return lambda text: fits(len(pattern.findall(text)))


def matches(args: str | None) -> Check:
    """Return the check for a regular expression somewhere in a reply (the package `regex`, V0).

    The check raises TooSlow after `SECONDS`. A pattern that would need too much memory raises BadRule.
    """
    pattern = args or ""
    if not pattern:
        raise BadRule("rule regex takes a pattern, as in regex:^Answer")
    repeats = 1
    for count in re.findall(r"\{(\d{1,9})", pattern):
        repeats *= max(int(count), 1)
    if len(pattern) > PATTERN_LENGTH or repeats > REPEATS or re.search(r"\{\d{10}", pattern):
        raise BadRule(
            f"rule regex: a pattern has at most {PATTERN_LENGTH} characters, and {REPEATS} repeats by its counts in "
            "braces together"
        )
    try:
        compiled = regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        raise BadRule(f"rule regex: {pattern!r} is not a regular expression: {error}") from None

    def check(text: str) -> bool:
        try:
            return compiled.search(text, timeout=SECONDS) is not None
        except TimeoutError:
            raise TooSlow(f"the pattern needs more than {SECONDS:g} s for one reply") from None

    return check


def number_is(args: str | None) -> Check:
    """Return the check that the last number of a reply is `VALUE`, or within a tolerance: `VALUE~TOLERANCE`."""
    value, sign, tolerance = (args or "").partition("~")
    wanted, allowed = number(value.strip()), number(tolerance.strip()) if sign else Decimal(0)
    if wanted is None or allowed is None or allowed < 0:
        raise BadRule(f"rule number takes a number, or one with a tolerance, as in number:3.14~0.01, got {args!r}")

    def check(text: str) -> bool:
        found = NUMBER.findall(text)
        last = number(found[-1]) if found else None
        return last is not None and (last == wanted or abs(last - wanted) <= allowed)

    return check


def number(text: str) -> Decimal | None:
    """Return the number that a text is, with or without commas between thousands, or None."""
    if not NUMBER.fullmatch(text) or len(text) > 100:
        return None
    try:
        return Decimal(text.replace(",", "").replace("\u2212", "-"))
    except InvalidOperation:
        return None


def is_json(args: str | None) -> Check:
    """Return the check that a reply is JSON, also in one code block: any value, or an `object` or an `array`."""
    kind = {None: object, "object": dict, "array": list}.get(args)
    if kind is None:
        raise BadRule(f"rule json takes object, array or nothing, got {args!r}")

    def refuse(name: str) -> None:
        raise ValueError(name)

    def check(text: str) -> bool:
        fence = FENCE.fullmatch(text)
        try:  # numbers stay texts: Python refuses very long ones
            made = json.loads(fence[1] if fence else text, parse_constant=refuse, parse_float=str, parse_int=str)
        except (ValueError, RecursionError):
            return False
        return isinstance(made, kind)

    return check


CHECKS: dict[str, Callable[[str | None], Check]] = {
    name: plain(name, check)
    for name, check in {
        "no-commas": lambda text: not set(text) & set(",\uff0c\u060c\u3001"),
        "lower-case": lambda text: text == text.lower(),
        "upper-case": str.isupper,
        "quoted": lambda text: len(text) > 1 and text[0] + text[-1] in ('""', "\u201c\u201d"),
        "title": lambda text: TITLE.search(text) is not None,
        "bullets-only": lambda text: all(map(BULLET.match, lines(text))),
    }.items()
}
PLAIN = frozenset(CHECKS)
CHECKS |= {
    name: counted(name, count)
    for name, count in {
        "characters": len,
        "words": lambda text: len(words(text)),
        "sentences": sentences,
        "paragraphs": paragraphs,
        "lines": lambda text: len(lines(text)),
        "bullets": lambda text: sum(map(bool, map(BULLET.match, lines(text)))),
        "capital-words": capital_words,
        "highlights": lambda text: len(HIGHLIGHT.findall(text)),
        "placeholders": lambda text: len(PLACEHOLDER.findall(text)),
    }.items()
}
CHECKS |= {
    name: with_text(name, check)
    for name, check in {
        "starts": lambda text, wanted: text.casefold().startswith(wanted.casefold()),
        "ends": lambda text, wanted: text.casefold().endswith(wanted.casefold()),
        "equal": lambda text, wanted: text == wanted,
    }.items()
}
CHECKS |= {"include": includes, "count": counts, "regex": matches, "number": number_is, "json": is_json}
CHECKS["passes"] = passes
CODE = frozenset({"passes"})  # its argument is code, perhaps a list of lines; it runs only where that is allowed
