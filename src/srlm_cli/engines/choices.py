"""One of several texts by its probability: read from the most probable tokens that a server tells of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from random import Random

SPACES = str.maketrans("Ġ▁", "  ")  # how byte-level and SentencePiece vocabularies write a leading space


@dataclass(frozen=True)
class Step:
    """One written token, its probability, and those of the most probable tokens at its place."""

    token: str
    probability: float
    top: dict[str, float]


def masses(steps: Sequence[Step], choices: Sequence[str]) -> dict[str, float]:
    """Return the probability of each choice as the next word, 0 for one that is not among the top tokens.

    A tokenizer may write the space before a choice as part of it (" A") or as a token of its own
    (" ", "4"): tokens count without their spaces, and behind a token of nothing but spaces the next
    step counts too.
    """
    found = dict.fromkeys(choices, 0.0)
    before = 1.0
    for step in steps:
        for token, probability in step.top.items():
            if (text := _plain(token)) in found:
                found[text] += before * probability
        if _plain(step.token):
            break
        before *= step.probability
    return found


def shared(found: dict[str, float]) -> list[float] | None:
    """Return masses as probabilities that sum to 1, or None where there is no mass to share."""
    total = sum(found.values())
    return [mass / total for mass in found.values()] if total > 0 else None


def pick(choices: Sequence[str], probabilities: Sequence[float], temperature: float, seed: int) -> str:
    """Return a choice drawn by its probability at a temperature; at 0 the most probable one."""
    best = max(probabilities)
    if temperature <= 0:
        return choices[probabilities.index(best)]
    weights = [exp((log(p) - log(best)) / temperature) if p > 0 else 0.0 for p in probabilities]
    return Random(seed).choices(choices, weights)[0]


def longer(choice: str, choices: Sequence[str]) -> list[str]:
    """Return the choices that go on where another one ends: "10" for "1"."""
    return [other for other in choices if other != choice and other.startswith(choice)]


def named_in(text: str, choices: Sequence[str]) -> str:
    """Return the choice that a text begins with, or an empty string; the longest one, as a word of its own."""
    text = text.lstrip(" \n*_`\"'([")
    for choice in sorted(choices, key=len, reverse=True):
        if text.startswith(choice) and not text[len(choice) : len(choice) + 1].isalnum():
            return choice
    return ""


def _plain(token: str) -> str:
    return token.translate(SPACES).strip()
