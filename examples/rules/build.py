"""Write the data of this example: questions of the quickstart, each under one rule that a program can check.

    python build.py --seeds ../quickstart --out data --seed 0

All prompts get a rule that the reply of the seed data does not keep. Files: `ift.jsonl` (replies that keep the rule),
`ranked.jsonl` and `ranked_eval.jsonl` (replies that keep it, keep another rule, or keep none, with their scores),
`own.jsonl` (prompts for the model's own replies), `round-1.jsonl` and `round-2.jsonl` (prompts of the rounds), and
`ruled.jsonl` (prompts that no training uses). The prompts of `ranked_eval.jsonl` are those of `ruled.jsonl`.
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
SENTENCE = re.compile(r"(?<=[.!?])\s+")
LONGEST_PROMPT, SHORTEST, LONGEST = 250, 40, 420  # characters
EFT, IFT = 110, 50  # prompts; all others are held out


def as_bullets(text: str) -> str:
    """Return a text as bullet points, one per sentence."""
    return "\n".join(f"- {part.strip(' -*')}" for part in SENTENCE.split(text) if part.strip(" -*"))


# The words of the prompt, the rule, and how a text is changed to keep it: each changes the length by a few characters.
RULES: list[tuple[str, str, Callable[[str], str]]] = [
    ("Write in lower case only.", "lower-case", str.lower),
    ("Use no commas.", "no-commas", lambda text: text.replace(",", "")),
    ('Begin with the word "Answer:".', "starts:Answer:", lambda text: f"Answer: {text}"),
    ('End with the word "Done."', "ends:Done.", lambda text: f"{text.rstrip()} Done."),
    ("Write a list in which each line begins with a dash.", "bullets-only", as_bullets),
    ("Put the whole reply in double quotation marks.", "quoted", lambda text: '"{}"'.format(text.replace('"', "'"))),
]


def keeps(text: str, rule: str) -> bool:
    """Return whether a reply keeps a rule."""
    row = {"response": text, "rules": [rule]}
    return bool(check_reply(row, rules_of_row(row))[rule])


def seeds_of(folder: Path) -> list[tuple[str, str]]:
    """Return the prompts of the quickstart with their best reply."""
    found = []
    for name in ("ift", "ranked", "ranked_eval"):
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            best = row["completion"] if name == "ift" else min(row["responses"], key=lambda one: one["rank"])["text"]
            found.append((row["prompt"], best))
    texts = [(prompt, reply) for prompt, reply in found if isinstance(prompt, str) and isinstance(reply, str)]
    return [(p, r) for p, r in texts if len(p) <= LONGEST_PROMPT and SHORTEST <= len(r) <= LONGEST]


def asked(prompt: str, reply: str, draw: random.Random) -> Record:
    """Return a prompt under a rule that its reply does not keep; `change` makes a text keep it."""
    words, rule, change = draw.choice([one for one in RULES if not keeps(reply, one[1])])
    return {"prompt": f"{prompt} {words}", "rules": [rule], "change": change}


def ranked(prompt: str, reply: str, draw: random.Random) -> Record:
    """Return a prompt with texts of random length that keep its rule, another rule, or none, scored 5 or 0."""
    row = asked(prompt, reply, draw)

    def part() -> str:
        parts = SENTENCE.split(reply)
        return " ".join(parts[: draw.randint(1, len(parts))])

    texts = dict.fromkeys([row["change"](part()), draw.choice(RULES)[2](part()), part()])
    replies = [{"text": text, "score": 5.0 * keeps(text, row["rules"][0])} for text in texts]
    draw.shuffle(replies)
    return {"prompt": row["prompt"], "responses": replies, "rules": row["rules"]}


def without_change(row: Record) -> Record:
    """Return a prompt as it is written."""
    return {key: value for key, value in row.items() if key != "change"}


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
    random.Random(options.seed).shuffle(texts)
    parts = {"ranked": texts[:EFT], "ift": texts[EFT : EFT + IFT], "ranked_eval": texts[EFT + IFT :]}
    options.out.mkdir(parents=True, exist_ok=True)
    draws = lambda what: random.Random(f"{options.seed} {what}")  # noqa: E731

    rows = {name: [ranked(*one, draw) for one in parts[name]] for name in ("ranked", "ranked_eval")
            for draw in [draws(name)]}  # fmt: skip
    for name, some in rows.items():
        write(options.out / f"{name}.jsonl", some)
    draw = draws("ift")
    lessons = [(asked(*one, draw), one[1]) for one in parts["ift"]]
    write(options.out / "ift.jsonl", ({"prompt": row["prompt"], "completion": row["change"](reply)}
                                      for row, reply in lessons))  # fmt: skip
    for name, source in (("own", "ranked"), ("ruled", "ranked_eval")):
        write(options.out / f"{name}.jsonl", ({"prompt": row["prompt"], "rules": row["rules"]} for row in rows[source]))
    for name in ("round-1", "round-2"):
        draw = draws(name)
        some = [without_change(asked(*one, draw)) for one in parts["ranked"] + parts["ift"]]
        write(options.out / f"{name}.jsonl", some)


if __name__ == "__main__":
    main()
