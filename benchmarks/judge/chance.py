"""How many judgements `make-eft --method accept` would keep of a judge that draws its scores at random.

    python benchmarks/judge/chance.py ranked_train.jsonl [--limit 120] [--draws 200]

Scores are 0 to 5, each as likely; a draw is kept if it orders a prompt's replies as people did, without a tie.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from paths import existing_file

from srlm_cli.records import human_values
from srlm_cli.stages.make_eft import agrees


def main() -> None:
    """Draw scores for all replies of each prompt, so many times, and count those that are kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=existing_file)
    parser.add_argument("--limit", type=int, default=120, help="prompts")
    parser.add_argument("--draws", type=int, default=200)
    given = parser.parse_args()
    with open(given.path, encoding="utf-8") as file:
        prompts = [human_values(json.loads(line)) for line, _ in zip(file, range(given.limit), strict=False)]
    lots = random.Random(0)
    kept = drawn = 0
    for human in prompts:
        for _ in range(given.draws):
            drawn += len(human)
            kept += len(human) * agrees(human, [lots.randint(0, 5) for _ in human], ties=False)
    print(f"{len(prompts)} prompts, {given.draws} draws each: {kept / drawn:.1%} of the judgements would be kept")


if __name__ == "__main__":
    main()
