"""Write judged rows of a realistic shape: prompts of about 300 characters, responses of 1,000, 3 judgements of 500.

python benchmarks/judged_rows.py ROWS FILE [--seed SEED] [--apart]

Four responses a prompt, as `srlm sample | srlm judge --score expected` writes them: one prompt in eight has equal
scores only, elsewhere none are equal, and one response in 50 has none. 2,000,000 rows are 6.8 GB. With --apart the
four responses of a prompt stand a quarter of the file from each other, as after `cat`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from statistics import fmean

from paths import output_file

N, K = 4, 3
TIED, UNREADABLE = 1 / 8, 1 / 50
WORDS = """the of a model answer question because river which light explains "quoted" they water number against
system without people between example however results \n\n describe reason simple history until""".split(" ")
RARE = ("naïve", "—", "“so-called”", "🙂")  # one word in 500: most texts are ASCII, as in English


def prose(draw: Random, characters: int = 1 << 20) -> str:
    """Return a long text, of which any slice serves as a prompt, a response or a judgement."""
    words = []
    while characters > 0:
        words.append(draw.choice(RARE if draw.random() < 1 / 500 else WORDS))
        characters -= len(words[-1]) + 1
    return " ".join(words)


def piece(draw: Random, text: str, mean: int) -> str:
    """Return a slice of a text, of about so many characters."""
    at = draw.randrange(len(text) - 2 * mean)
    return text[at : at + draw.randint(mean // 2, 3 * mean // 2)]


def judged_row(prompt: int, k: int, text: str, seed: int) -> dict:
    """Return response `k` of a prompt with its judgements; the same for the same numbers, in any order."""
    of_prompt, draw = Random(f"{seed}/{prompt}"), Random(f"{seed}/{prompt}/{k}")
    name = f"{of_prompt.getrandbits(64):016x}"
    tied = of_prompt.random() < TIED
    scores = [4.0 if tied else round(5 * draw.random(), 9) for _ in range(K)]
    if draw.random() < UNREADABLE:
        scores = [None] * K
    known = [float(score) for score in scores if score is not None]
    return {
        "id": f"{name}/{k}",
        "prompt": f"{prompt}: {piece(of_prompt, text, 300)}",
        "source": "generated",
        "try": prompt,
        "prompt_id": name,
        "response": piece(draw, text, 1000),
        "k": k,
        "finish_reason": "stop",
        "model": "M1",
        "score": fmean(known) if known else None,
        "scores": scores,
        "score_from": [None if score is None else "text" for score in scores],
        "judgements": [f"{piece(draw, text, 500)}\nScore: {score}" for score in scores],
        "judgement_finish_reasons": ["stop"] * K,
        "judge": {"model": "M1", "template": "additive", "template_hash": "0123456789abcdef"},
    }


def write(rows: int, path: str | Path, seed: int = 0, apart: bool = False) -> None:
    """Write so many rows; the last prompt may have fewer responses than the others."""
    text = prose(Random(seed))
    prompts = -(-rows // N)
    with open(path, "w", encoding="utf-8") as file:
        for at in range(rows):
            prompt, k = (at % prompts, at // prompts) if apart else divmod(at, N)
            file.write(json.dumps(judged_row(prompt, k, text, seed), ensure_ascii=False) + "\n")


def main() -> None:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=int)
    parser.add_argument("file", type=output_file)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--apart", action="store_true")
    options = parser.parse_args()
    write(options.rows, options.file, options.seed, options.apart)


if __name__ == "__main__":
    main()
