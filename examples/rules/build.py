"""Write the data of this example: questions of the quickstart, under a rule that a program can check.

    python build.py --seeds ../quickstart --out data --seed 0

Files: `ift.jsonl` (replies that keep the rule), `ranked.jsonl` (replies that keep it, have another form, or are as
they were, with their scores), and `round-1.jsonl`, `round-2.jsonl`, ... (prompts of the rounds). No training uses the
questions of `test.jsonl` and `ranked_test.jsonl`, which are the same with all seeds, nor those of `valid.jsonl` and
`ranked_valid.jsonl`, which are for choosing settings.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from srlm_cli.rules import check_reply, rules_of_row

Record = dict[str, Any]
BREAK = re.compile(r"(?<=[.!?])\s+|\n+")  # between the sentences and lines of a text
LONGEST_PROMPT, SHORTEST, LONGEST = 200, 40, 200  # characters; longer replies end at their last whole sentence
TEST, EFT, IFT, LESSONS = 80, 84, 24, 140  # questions: EFT, IFT and others of the rounds; the rest is for validation
ROUNDS = 3


# The words of the prompt, the rule, how a text is changed to keep it, and changes that do not keep it.
WORDS, RULE, CHANGE = "Write in lower case only.", "lower-case", str.lower
OTHER: list[Callable[[str], str]] = [str.upper, str.title, lambda text: f"Answer: {text}", '"{}"'.format]


def keeps(text: str, rule: str) -> bool:
    """Return whether a reply keeps a rule."""
    row = {"response": text, "rules": [rule]}
    return bool(check_reply(row, rules_of_row(row))[rule])


def ends_of(text: str) -> list[int]:
    """Return where the sentences and lines of a text end."""
    return [*(found.start() for found in BREAK.finditer(text)), len(text)]


def seeds_of(folder: Path) -> list[tuple[str, str]]:
    """Return the questions of the quickstart with their best reply, cut to its first sentences if it is long."""
    texts = []
    for name in ("ift", "ranked", "ranked_eval"):
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            best = row["completion"] if name == "ift" else min(row["responses"], key=lambda one: one["rank"])["text"]
            if isinstance(row["prompt"], str) and isinstance(best, str) and len(row["prompt"]) <= LONGEST_PROMPT:
                texts.append((row["prompt"], best[: max(end for end in [0, *ends_of(best)] if end <= LONGEST)]))
    return [(prompt, reply) for prompt, reply in texts if len(reply) >= SHORTEST]


def asked(question: str) -> Record:
    """Return a question under the rule."""
    return {"prompt": f"{question} {WORDS}", "rules": [RULE]}


def ranked(question: str, reply: str, draw: random.Random) -> Record:
    """Return a prompt with texts of random length that keep the rule or do not, scored 5 or 0."""

    def part() -> str:
        return reply[: draw.choice(ends_of(reply))]

    texts = dict.fromkeys([CHANGE(part()), draw.choice(OTHER)(part()), part()])
    replies = [{"text": text, "score": 5.0 * keeps(text, RULE)} for text in texts]
    draw.shuffle(replies)
    return {**asked(question), "responses": replies}


def write(path: Path, rows: Iterable[Record]) -> None:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    texts = seeds_of(options.seeds)
    random.Random("test").shuffle(texts)  # the same with all seeds
    test, rest = texts[:TEST], texts[TEST:]
    random.Random(options.seed).shuffle(rest)
    eft, ift, more, valid = rest[:EFT], rest[EFT : EFT + IFT], rest[EFT + IFT : LESSONS], rest[LESSONS:]
    options.out.mkdir(parents=True, exist_ok=True)

    def lessons(some: list[tuple[str, str]], name: str) -> list[Record]:
        """Return ranked texts for questions, with draws of their own."""
        draw = random.Random(name if name == "test" else f"{options.seed} {name}")
        return [ranked(*one, draw) for one in some]

    write(options.out / "ranked.jsonl", lessons(eft, "ranked"))
    for name, some in (("test", test), ("valid", valid)):
        write(options.out / f"{name}.jsonl", [asked(question) for question, _ in some])
        write(options.out / f"ranked_{name}.jsonl", lessons(some, name))
    write(options.out / "ift.jsonl", [{**asked(question), "completion": CHANGE(reply)} for question, reply in ift])
    for number in range(1, ROUNDS + 1):
        rows = [asked(question) for question, _ in eft + ift + more]
        random.Random(f"{options.seed} round-{number}").shuffle(rows)
        write(options.out / f"round-{number}.jsonl", rows)


if __name__ == "__main__":
    main()
