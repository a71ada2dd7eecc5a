"""Write the data of this example: facts of countries and elements, as documents, questions and replies.

    python build.py --out data --seed 0

Files: `corpus.jsonl` (all facts, for the judge), `ift.jsonl` (questions with replies), `ranked.jsonl` (right and wrong
replies with their scores), and `round-1.jsonl`, `round-2.jsonl`, ... (the questions of the rounds). Measured on:
`test.jsonl` (the facts of the rounds, asked in other words), `valid.jsonl` (the same for other facts of the rounds, to
choose settings), `never.jsonl` (facts that no round asks for) and `ranked_test.jsonl` (those, with replies to judge).
The facts of EFT and IFT, of the rounds, and those never asked are about different countries and elements.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]
HERE = Path(__file__).parent
EFT, NEVER, IFT, VALID = 0.35, 0.2, 48, 0.3  # shares of countries and elements; questions; share of the facts of rounds
NO_ANSWER = 0.3  # share of the wrong replies that give no answer
ROUNDS = 3

# What is asked: file, column of the value, statement, question of the rounds, questions in other words, check.
KINDS = {
    "capital": (
        "countries.csv",
        "The capital of {name} is {value}.",
        "What is the capital of {name}?",
        "Name the capital city of {name}.",
        "include:{value}",
    ),
    "continent": (
        "countries.csv",
        "The continent of {name} is {value}.",
        "On which continent is {name}?",
        "Which continent does {name} belong to?",
        "include:{value}",
    ),
    "currency": (
        "countries.csv",
        "The currency of {name} is the {value}.",
        "What is the currency of {name}?",
        "Which currency do people in {name} use?",
        "include:{value}",
    ),
    "symbol": (
        "elements.csv",
        "The chemical symbol of {name} is {value}.",
        "What is the chemical symbol of {name}?",
        "Which symbol stands for {name} in the periodic table?",
        r"regex:\b{value}\W*$",
    ),
}
REPLIES = [*3 * ["{statement}"], "{value}", "{value}.", "It is {value}.", "The answer is {value}."]


class Fact(NamedTuple):
    """A fact: its kind, the country or element, and what is true of it."""

    kind: str
    name: str
    value: str

    def form(self, number: int) -> str:
        """Return a form of `KINDS` for this fact."""
        return KINDS[self.kind][number].format(name=self.name, value=self.value)

    @property
    def statement(self) -> str:
        return self.form(1)

    def asked(self, number: int = 2) -> Record:
        """Return a question for this fact, with the rule that a right reply keeps."""
        rule = KINDS[self.kind][4].format(value=re.escape(self.value) if self.kind == "symbol" else self.value)
        return {"prompt": self.form(number), "rules": [rule]}


def read_facts() -> list[Fact]:
    """Return the facts of the tables."""
    facts = []
    for kind, (name, *_) in KINDS.items():
        with (HERE / name).open(encoding="utf-8") as file:
            facts += [Fact(kind, next(iter(row.values())), row[kind]) for row in csv.DictReader(file)]
    return facts


def no_answer(fact: Fact, draw: random.Random) -> str:
    """Return words of the question, or half of the value: what a judge may not take for the answer."""
    said = [fact.name, fact.kind, fact.value[: (len(fact.value) + 1) // 2]]
    return draw.choice([words for words in said if words != fact.value])


def wrong_value(fact: Fact, facts: list[Fact], draw: random.Random) -> str:
    """Return what is true of another country or element, or no answer."""
    others = [other.value for other in facts if other.kind == fact.kind and other.value != fact.value]
    return no_answer(fact, draw) if draw.random() < NO_ANSWER else draw.choice(others)


def ranked(fact: Fact, facts: list[Fact], draw: random.Random) -> Record:
    """Return a question with a right and a wrong reply, scored 5 and 0."""
    replies = []
    for value, score in ((fact.value, 5.0), (wrong_value(fact, facts, draw), 0.0)):
        said = fact._replace(value=value)
        replies.append({"text": draw.choice(REPLIES).format(statement=said.statement, value=value), "score": score})
    draw.shuffle(replies)
    return {**fact.asked(), "responses": replies}


def write(path: Path, rows: Iterable[Record]) -> None:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out, facts = options.out, read_facts()
    out.mkdir(parents=True, exist_ok=True)

    draw = random.Random(options.seed)
    names = list(dict.fromkeys(fact.name for fact in facts))
    draw.shuffle(names)
    first, last = round(EFT * len(names)), round((1 - NEVER) * len(names))
    part = {name: "eft" if at < first else "round" if at < last else "never" for at, name in enumerate(names)}
    parts: dict[str, list[Fact]] = {"eft": [], "round": [], "never": []}
    for fact in draw.sample(facts, len(facts)):
        parts[part[fact.name]].append(fact)

    write(out / "corpus.jsonl", [{"id": f"{one.kind}/{one.name}", "text": one.statement} for one in facts])
    write(out / "ranked.jsonl", [ranked(one, facts, draw) for one in parts["eft"]])
    write(out / "ift.jsonl", [{**one.asked(), "completion": one.statement} for one in parts["eft"][:IFT]])
    for number in range(1, ROUNDS + 1):
        write(out / f"round-{number}.jsonl", [one.asked() for one in draw.sample(parts["round"], len(parts["round"]))])
    cut = round(VALID * len(parts["round"]))
    write(out / "valid.jsonl", [one.asked(3) for one in parts["round"][:cut]])
    write(out / "test.jsonl", [one.asked(3) for one in parts["round"][cut:]])
    write(out / "never.jsonl", [one.asked(3) for one in parts["never"]])
    write(out / "ranked_test.jsonl", [ranked(one, facts, draw) for one in parts["never"]])


if __name__ == "__main__":
    main()
