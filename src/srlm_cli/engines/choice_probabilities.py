"""Choose one of several texts by probability, in the same way in all engines; also from a server's top tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, isfinite, log
from random import Random

from srlm_cli.engines.base import Completion, Request

SPACES = str.maketrans("Ġ▁", "  ")  # how byte-level and SentencePiece vocabularies write a leading space


@dataclass(frozen=True)
class Step:
    """One token of a completion, its probability, and those of the most probable tokens at its position."""

    token: str
    probability: float
    top: dict[str, float]


def masses(steps: Sequence[Step], choices: Sequence[str], gap: str = "") -> dict[str, float]:
    """Return the probability of each choice as the next word, 0 for one that is not among the top tokens.

    `gap` is the white space before a choice. A tokenizer can write it as part of the choice (" A") or as a token of
    its own (" ", "4"), so after a token of white space the next step counts too. Some servers remove the space of a
    token, so white space counts only if it makes a difference.
    """
    exact = _masses(steps, choices, {gap + choice: choice for choice in choices}, str)
    return (
        exact if any(exact.values()) else _masses(steps, choices, dict(zip(choices, choices, strict=True)), str.strip)
    )


def _masses(
    steps: Sequence[Step], choices: Sequence[str], texts: dict[str, str], read: Callable[[str], str]
) -> dict[str, float]:
    """Add up the probabilities of the tokens that start one of the texts, by choice."""
    found = dict.fromkeys(choices, 0.0)
    written, before = "", 1.0
    for step in steps:
        for token, probability in step.top.items():
            if choice := texts.get(read(written + token.translate(SPACES))):
                found[choice] += before * probability
        written += step.token.translate(SPACES)
        if written.strip():
            break
        before *= step.probability
    return found


def of_texts(logs: Sequence[float], ends: Sequence[Sequence[int]]) -> list[float]:
    """Return the probability of each choice from the log-probabilities of the tokens of its whole text.

    If a choice is the start of another one ("1" and "10"), the probability of the longer one is subtracted from it.
    Only the nearest extension counts: "100" is subtracted from "10", and "10" from "1".
    """
    whole = [exp(log_ - max(logs)) for log_ in logs]
    left = list(whole)
    for at, end in enumerate(ends):
        begins = [other for other, short in enumerate(ends) if short != end and end[: len(short)] == short]
        if begins:
            left[max(begins, key=lambda other: len(ends[other]))] -= whole[at]
    return shared([max(mass, 0.0) for mass in left])


def mass_of(logs: Sequence[float], ends: Sequence[Sequence[int]]) -> float:
    """Return the probability that any choice comes next, from the log-probabilities of their whole texts."""
    continued = [any(short != end and end[: len(short)] == short for short in ends) for end in ends]
    return sum(exp(log_) for log_, within in zip(logs, continued, strict=True) if not within)


def shared(parts: Sequence[float]) -> list[float] | None:
    """Return masses normalized to a sum of 1, or None if their sum is zero."""
    total = sum(parts)
    return [part / total for part in parts] if total > 0 else None


def completion(request: Request, probabilities: list[float], mass: float, tokens_in: int) -> Completion:
    """Return the completion of a request with `choices` of these probabilities: one choice is drawn per seed."""
    temperature = request.sampling.temperature
    texts = [pick(request.choices, probabilities, temperature, seed) for seed in request.seeds]
    mass = min(mass, 1.0) if isfinite(mass) else 0.0
    return Completion(texts, ["stop"] * len(texts), tokens_in, len(texts), probabilities, mass)


def pick(choices: Sequence[str], probabilities: Sequence[float], temperature: float, seed: int) -> str:
    """Return a choice drawn by its probability at a temperature; at 0 the most probable one."""
    best = max(probabilities)
    if temperature <= 0:
        return choices[probabilities.index(best)]
    weights = [exp((log(p) - log(best)) / temperature) if p > 0 else 0.0 for p in probabilities]
    return Random(seed).choices(choices, weights)[0]


def longer(choice: str, choices: Sequence[str]) -> list[str]:
    """Return the choices that extend another one: "10" for "1"."""
    return [other for other in choices if other != choice and other.startswith(choice)]


def named_in(text: str, choices: Sequence[str]) -> str:
    """Return the longest choice that a text starts with as a whole word, or ""."""
    text = text.lstrip(" \n*_`\"'([")
    for choice in sorted(choices, key=len, reverse=True):
        if text.startswith(choice) and not text[len(choice) : len(choice) + 1].isalnum():
            return choice
    return ""
