"""How fast each engine judges replies, K judgements each, with the additive rubric of `srlm judge`.

    srlm sample --in prompts.jsonl --model smollm2-135m-instruct --max-new-tokens 256 --out responses.jsonl
    python benchmarks/engines/judge.py --replies responses.jsonl

The requests are those of the stage itself. srlm may stop as soon as a score is complete; so may the
others, for whom it is a stop text: "Score: 0" to "Score: 5". Rates are judgements a second; the load
and a warm-up are left out.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from paths import existing_file
from race import options, race

from srlm_cli import templates


def shuffled_prompts(lines: list[str]) -> list[str]:
    """Return rows in an order in which any part is a fair sample; those of a prompt stay side by side, as sampled."""
    of_prompt: dict[str, list[str]] = {}
    for line in lines:
        of_prompt.setdefault(json.loads(line)["prompt_id"], []).append(line)
    groups = list(of_prompt.values())
    random.Random(0).shuffle(groups)
    return [line for group in groups for line in group]


def main() -> None:
    """Make the work and race."""
    parser = options(__doc__, "replies", probe=16)
    parser.add_argument("--replies", type=existing_file, required=True, help="rows of srlm sample")
    parser.add_argument("--limit", type=int, default=1040)
    parser.add_argument("-k", type=int, default=3)
    given = parser.parse_args()
    lines = shuffled_prompts(given.replies.read_text(encoding="utf-8").splitlines(keepends=True))
    rubric = templates.load("additive", fields={"prompt", "response"}, reads=True)
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "replies.jsonl"
        rows.write_text("".join(lines[: given.limit]), encoding="utf-8")
        sampling = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": given.max_new_tokens}
        work = {"task": "judge", "rows": str(rows), "each": given.k, "sampling": sampling}
        stops = [rubric.finish + choice for choice in rubric.choices]
        race(given, work, stops, counted="rows", unit="judgements")


if __name__ == "__main__":
    main()
