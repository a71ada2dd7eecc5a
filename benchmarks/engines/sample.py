"""How fast each engine draws N responses a prompt: real prompts, natural stops.

    python benchmarks/engines/sample.py --data ../shared/data/eval_prompts
    python benchmarks/engines/sample.py --data FOLDER --prompts 16 --max-new-tokens 64 --rows 64 --repeats 1

The prompts are those of vicuna_bench and koala, mixed; a JSONL file of prompts will do as well. The
settings are the paper's (N=4, temperature 0.7, top-p 0.9). Rates are generated tokens a second; the
load and a warm-up are left out.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from paths import existing_file, folder_with
from race import options, race

PROMPT_DATA = "folder of vicuna_bench and koala, or a JSONL file"
FILES = ("vicuna_bench.jsonl", "koala.jsonl")


def prompt_data(text: str) -> Path:
    """Return the path of a folder that has FILES, or of a JSONL file."""
    return folder_with(*FILES)(text) if Path(text).is_dir() else existing_file(text)


def prompts(data: Path, limit: int) -> list[dict]:
    """Return prompt rows, mixed so that the first few are like all."""
    files = [data / name for name in FILES] if data.is_dir() else [data]
    found = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [row["turns"][0] if "turns" in row else row["prompt"] for row in found]
    random.Random(0).shuffle(texts)
    return [{"prompt": text} for text in texts[:limit]]


def main() -> None:
    """Make the work and race."""
    parser = options(__doc__, "prompts", probe=16)
    parser.add_argument("--data", type=prompt_data, required=True, help=PROMPT_DATA)
    parser.add_argument("--prompts", type=int, default=260)
    parser.add_argument("-n", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "prompts.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in prompts(given.data, given.prompts)))
        sampling = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": given.max_new_tokens}
        work = {"task": "sample", "rows": str(rows), "each": given.n, "sampling": sampling}
        race(given, work, stops=[], counted="tokens", unit="tokens")


if __name__ == "__main__":
    main()
