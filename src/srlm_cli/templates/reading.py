"""How a verdict is found in what a judge wrote, by the pattern of a template.

Nothing is read in a thought, nor in a reply that the judge repeats. The last match of the pattern counts. Two groups
of it have a meaning: what `not` matches is passed over, and a match of `weak` counts only where there is no other.
Before such a weak one, `closing_values` are tried: verdicts that a judge gave without the template's word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from srlm_cli import thoughts

# A block of the judge's prompt that an answer may repeat; what stands in it is not the judge's own.
REPEATED = re.compile(r"<reply\b[^>]*>.*?</reply\b[^>]*>", re.DOTALL | re.IGNORECASE)
# Dashes, quotation marks, the Arabic decimal sign and CJK brackets, as patterns have them.
SAME_SIGN = dict(zip("\u2013\u2014\u2212“”„«»‘’\u066b【】", '---"""""\'\'.[]', strict=True))
MEANT = {"not", "weak"}  # groups that are no verdict


@dataclass(frozen=True)
class Found:
    """The texts of a pattern's groups, by name where they have one, and where the first of them is in the answer."""

    texts: dict[str | int, str | None]
    start: int
    end: int


def read(answer: str, pattern: str, finish: str) -> Found | None:
    """Return what counts of an answer, or None."""
    own = own_words(answer, pattern)
    rule = re.compile(pattern)
    matches = [match for match in rule.finditer(own) if not took_part(match, "not")]
    strong = [match for match in matches if not took_part(match, "weak")]
    if strong:
        return found(strong[-1])
    if "weak" in rule.groupindex:
        for value, at in closing_values(own, finish):
            match = rule.match(finish + value)
            if match and not took_part(match, "weak") and AFTER.fullmatch(match.string, match.end()):
                return found(match, at - len(finish))
    return found(matches[-1]) if matches else None


@cache
def verdict_groups(pattern: str) -> tuple[str | int, ...]:
    """Return the groups of a pattern that hold a verdict, by name where they have one."""
    rule = re.compile(pattern)
    names = {number: name for name, number in rule.groupindex.items()}
    return tuple(names.get(at, at) for at in range(1, rule.groups + 1) if names.get(at) not in MEANT)


@cache
def names_thoughts(pattern: str) -> bool:
    """Return whether a pattern names the mark of a thought, so that it reads thoughts by itself."""
    return "think" in pattern.lower()


def found(match: re.Match[str], offset: int = 0) -> Found:
    """Return a match, its place moved by an offset."""
    groups = verdict_groups(match.re.pattern)
    return Found(
        {group: match[group] for group in groups}, match.start(groups[0]) + offset, match.end(groups[0]) + offset
    )


def took_part(match: re.Match[str], group: str) -> bool:
    """Return whether a group of this name, if there is one, is part of a match."""
    return group in match.re.groupindex and match[group] is not None


# --- the judge's own words -----------------------------------------------------------------------


def own_words(answer: str, pattern: str) -> str:
    """Return an answer of the same length as `plain`, with spaces for thoughts and repeated replies."""
    own = REPEATED.sub(lambda block: " " * len(block[0]), plain(answer))
    return own if names_thoughts(pattern) else thoughts.blanked(own)


def plain(text: str) -> str:
    """Return a text of the same length with ASCII for digits of any script, full-width signs, dashes and quotes."""
    return text if text.isascii() else "".join(map(_plain_sign, text))


def _plain_sign(sign: str) -> str:
    if sign.isdecimal():
        return str(unicodedata.decimal(sign))
    if "\uff01" <= sign <= "\uff5e":  # full-width forms, in the order of ASCII
        return chr(ord(sign) - 0xFEE0)
    return SAME_SIGN.get(sign, sign)


# --- verdicts without the template's word --------------------------------------------------------

TOTAL = r"(?:(?:the|my)\ )?(?:final|overall|total|sum)"
# The last line as one value: of a total, in bold type, in a tag, in LaTeX; or a letter or a word alone.
LAST_LINE = re.compile(
    rf"""(?xi) [\s>#-]*+ (?: \*\s++ )?
    (?P<lead> \**+ (?: {TOTAL}\ )? (?: {TOTAL}|answer|verdict|result|judge?ment ) \**+ \s*+ (?: is | [:=] ) \s*+ )?
    (?P<marks> (?: [*_`]{{1,3}}\ ? | <(?:final_?)?(?:answer|verdict|result|output)> | \$+ | \\[(\[] | \\boxed\{{ )*+ )
    (?P<value> [^\s*_`<>$\\{{}}|][^*_`<>$\\{{}}|\n]*? )
    [\s*_`$.)\]}}\\]*+ (?: </\w+> )? [\s*_`$.]*+
    """
)
BOXED = re.compile(r"\\boxed\{([^{}\n]*)\}[\s$.)\\\]}]*\Z")
NUMBER = re.compile(r"\d+(?:[.,]\d+)?")
AFTER = re.compile(r"(?i)[\s*_`)\]}\"'$]*(?:(?:/|(?:out )?of)\s*\d+(?:\.0)?|points?|\([^()]*\)|[\s*_`)\]}\"'$.])*")
RULER = re.compile(r"[\s|:-]*-[\s|:-]*")


def closing_values(own: str, finish: str) -> Iterator[tuple[str, int]]:
    """Yield texts that may be the verdict, and where they are: the cell of a table, and the last line."""
    if "|" in own and (label := re.search(r"\w+", finish)):
        yield from table_values(own, label[0])
    if boxed := BOXED.search(own):
        yield boxed[1], boxed.start(1)
    end = len(own.rstrip())
    line = LAST_LINE.fullmatch(own, own.rfind("\n", 0, end) + 1, end)
    if line and is_told(line, own.strip()):
        yield line["value"], line.start("value")


def is_told(line: re.Match[str], whole: str) -> bool:
    """Return whether a line that holds one value means it: a bare number may be a part of a list that was cut off."""
    bare = line["value"][0].isdigit() and "/" not in line["value"]
    return bool(not bare or line["marks"] or line["lead"] or NUMBER.fullmatch(whole))


def table_values(own: str, label: str) -> Iterator[tuple[str, int]]:
    """Yield, of each table from the last to the first, the cell below `label` of the total, or of the only row."""
    column = re.compile(rf"(?xi)(?:{TOTAL}\ )?(?:{label}|points)s?(?:\ ?\(.*\))?")
    named = re.compile(rf"(?xi){TOTAL}\b|{label}\b")
    lines = [(match[0], match.start()) for match in re.finditer(r"[^\n]+", own)]
    tables = [list(block) for barred, block in groupby(lines, key=lambda line: "|" in line[0]) if barred]
    for header, ruler, *body in (table for table in reversed(tables) if len(table) > 2):
        places = [place for place, (cell, _) in enumerate(cells(*header)) if column.fullmatch(cell)]
        if not places or not RULER.fullmatch(ruler[0]):
            continue
        rows = [cells(*line) for line in body]
        totals = [row for row in rows if named.match(row[0][0])]
        for row in totals[-1:] or (rows if len(rows) == 1 else []):
            yield from (row[place] for place in places if place < len(row))


def cells(line: str, start: int) -> list[tuple[str, int]]:
    """Return the texts of a table's row, without marks of type, and where they are."""
    begin = start + len(line) - len(line.lstrip(" \t|"))
    found = []
    for part in line.strip(" \t|").split("|"):
        text = part.lstrip(" *_`")
        found.append((text.rstrip(" *_`"), begin + len(part) - len(text)))
        begin += len(part) + 1
    return found
