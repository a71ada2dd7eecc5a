"""Find the verdict in a judgement with the pattern of a template.

Thoughts, and replies that the judge repeats, are ignored. The last match of the pattern counts. Two named groups are
special: a match with `not` is ignored, and a match with `weak` counts only if there is no other match. Before a weak
match counts, `closing_values` are tried: verdicts without the word that the template asks for.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from srlm_cli import thoughts

# A block of the judge's prompt that an answer can repeat; its text is not from the judge.
REPEATED = re.compile(r"<reply\b[^>]*>.*?</reply\b[^>]*>", re.DOTALL | re.IGNORECASE)
# Dashes, quotation marks, the Arabic decimal sign and CJK brackets, mapped to the ASCII signs of patterns.
SAME_SIGN = dict(zip("\u2013\u2014\u2212“”„«»‘’\u066b【】", '---"""""\'\'.[]', strict=True))
MEANT = {"not", "weak"}  # groups that are not verdicts


@dataclass(frozen=True)
class Found:
    """The texts of a pattern's groups, by name or number, and the position of the first group in the answer."""

    texts: dict[str | int, str | None]
    start: int
    end: int


def read(answer: str, pattern: str, finish: str) -> Found | None:
    """Return the match that counts, or None."""
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
    """Return the groups of a pattern that are verdicts, by name or number."""
    rule = re.compile(pattern)
    names = {number: name for name, number in rule.groupindex.items()}
    return tuple(names.get(at, at) for at in range(1, rule.groups + 1) if names.get(at) not in MEANT)


@cache
def names_thoughts(pattern: str) -> bool:
    """Return whether a pattern names the mark of a thought, so that it reads thoughts by itself."""
    return "think" in pattern.lower()


def found(match: re.Match[str], offset: int = 0) -> Found:
    """Return a match as `Found`, with its position moved by an offset."""
    groups = verdict_groups(match.re.pattern)
    return Found(
        {group: match[group] for group in groups}, match.start(groups[0]) + offset, match.end(groups[0]) + offset
    )


def took_part(match: re.Match[str], group: str) -> bool:
    """Return whether the pattern has a group of this name and the group is in the match."""
    return group in match.re.groupindex and match[group] is not None


# --- the judge's own words -----------------------------------------------------------------------


def own_words(answer: str, pattern: str) -> str:
    """Return `plain` of an answer, with spaces in place of thoughts and repeated replies; the length is the same."""
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
# A last line with one value: of a total, in bold type, in a tag, in LaTeX; or only a letter or a word.
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
    """Yield possible verdicts with their positions: a cell of a table, a box in LaTeX, the last line."""
    if "|" in own and (label := re.search(r"\w+", finish)):
        yield from table_values(own, label[0])
    if boxed := BOXED.search(own):
        yield boxed[1], boxed.start(1)
    end = len(own.rstrip())
    line = LAST_LINE.fullmatch(own, own.rfind("\n", 0, end) + 1, end)
    if line and is_told(line, own.strip()):
        yield line["value"], line.start("value")


def is_told(line: re.Match[str], whole: str) -> bool:
    """Return whether the value of a line is a verdict; a bare number can be part of a list that was cut off."""
    bare = line["value"][0].isdigit() and "/" not in line["value"]
    return bool(not bare or line["marks"] or line["lead"] or NUMBER.fullmatch(whole))


def table_values(own: str, label: str) -> Iterator[tuple[str, int]]:
    """Yield, for each table from the last to the first, the cell in column `label` of the total or of the only row."""
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
    """Return the texts of a table row, without bold and italic marks, with their positions."""
    begin = start + len(line) - len(line.lstrip(" \t|"))
    found = []
    for part in line.strip(" \t|").split("|"):
        text = part.lstrip(" *_`")
        found.append((text.rstrip(" *_`"), begin + len(part) - len(text)))
        begin += len(part) + 1
    return found
