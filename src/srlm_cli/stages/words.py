"""Words of any script: how long a text is, and what ROUGE compares.

Some scripts are written without spaces between words. There each letter, with its marks, is a unit of its own.
"""

from __future__ import annotations

from collections import Counter

import regex

# Scripts without spaces between words, and about how many of their letters make one. LB=SA are the scripts of
# South-East Asia whose words only a dictionary tells (UAX 14): Thai, Lao, Khmer, Burmese and others.
LETTERS_PER_WORD = {
    "han": (r"\p{Han}\p{Bopomofo}\p{Yi}", 1.5),
    "kana": (r"[\p{scx=Hiragana}\p{scx=Katakana}]--\p{Han}", 2.5),
    "asian": (r"\p{LB=SA}\p{Tibetan}", 3.0),
}
LETTER = r"[\p{L}\p{N}]"
# A vowel sign belongs to its letter. Accents of Latin, Greek and Cyrillic that are characters of their own part words,
# as they do in the ROUGE of English.
MARKS = r"[\p{M}--[\u0300-\u036f\u0483-\u0489]]*+"
SINGLE = "|".join(rf"(?P<{name}>[[{kind}]&&{LETTER}]{MARKS})" for name, (kind, _) in LETTERS_PER_WORD.items())
OTHER = "".join(f"(?![{kind}])" for kind, _ in LETTERS_PER_WORD.values()) + LETTER
UNIT = regex.compile(rf"{SINGLE}|(?P<word>(?:{OTHER}{MARKS})+)", regex.V1)


def words_of(text: str) -> list[str]:
    """Return what ROUGE compares, in lower case: words, and single letters of a script without spaces."""
    return [unit[0] for unit in UNIT.finditer(text.lower())]


def length(text: str) -> tuple[float, int]:
    """Return the length of a text in words, and how many of its letters are of scripts without spaces.

    Words are separated by spaces. In scripts without spaces, each letter counts as a part of a word.
    """
    found: Counter[str] = Counter()
    for part in text.split():
        units = [unit.lastgroup or "" for unit in UNIT.finditer(part)]
        found.update(units if set(units) - {"word"} else ["word"])
    words = found.pop("word", 0)
    return words + sum(count / LETTERS_PER_WORD[kind][1] for kind, count in found.items()), found.total()
