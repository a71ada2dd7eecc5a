"""Build seed data from Open Assistant message trees: IFT rows and human-ranked prompts.

    python build.py --out data/                         # OpenAssistant/oasst2 from the model hub
    python build.py --dataset trees.jsonl --out data/   # rows of your own with the same columns

As in the paper (arXiv 2401.10020, section 3.1.1): English, first turns; IFT takes the reply that people
ranked best, the judge's lessons come from prompts with several ranked replies. A part of these prompts
is held out to measure the judge on, and stands in no other file.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from srlm_cli.records import prompt_key
from srlm_cli.stages.split import held_out

Record = dict[str, Any]


def usable(message: Record, lang: str) -> bool:
    """Tell whether a message is of the language, was not deleted and did not fail its review."""
    return message["lang"] == lang and not message.get("deleted") and message.get("review_result") is not False


def first_turns(messages: Iterable[Record], lang: str) -> Iterator[tuple[Record, list[Record]]]:
    """Yield each opening prompt with its ranked replies, best (rank 0) first."""
    prompts, replies = {}, defaultdict(list)
    for message in messages:
        if not usable(message, lang):
            continue
        if message["parent_id"] is None and message["role"] == "prompter":
            prompts[message["message_id"]] = message
        elif message["role"] == "assistant" and message["rank"] is not None:
            replies[message["parent_id"]].append(message)
    for prompt_id, prompt in prompts.items():
        if replies[prompt_id]:
            yield prompt, sorted(replies[prompt_id], key=lambda reply: reply["rank"])


def ift_row(prompt: Record, best: Record) -> Record:
    """Return a seed row: the prompt and the reply that people ranked best."""
    return {"id": prompt["message_id"], "prompt": prompt["text"], "completion": best["text"]}


def ranked_row(prompt: Record, replies: list[Record]) -> Record:
    """Return a ranked row: the prompt and its replies with their ranks."""
    responses = [{"text": reply["text"], "rank": int(reply["rank"])} for reply in replies]
    return {"id": prompt["message_id"], "prompt": prompt["text"], "responses": responses}


def build(messages: Iterable[Record], lang: str, eval_share: float, seed: int) -> dict[str, list[Record]]:
    """Return the rows of each file: `ift`, `ranked` to learn from, `ranked_eval` to be measured on."""
    made: dict[str, list[Record]] = {"ift": [], "ranked": [], "ranked_eval": []}
    for prompt, replies in first_turns(messages, lang):
        several = len(replies) > 1
        if several and held_out({"prompt": prompt["text"]}, eval_share, seed):
            made["ranked_eval"].append(ranked_row(prompt, replies))
            continue
        if several:
            made["ranked"].append(ranked_row(prompt, replies))
        if replies[0]["rank"] == 0:
            made["ift"].append(ift_row(prompt, replies[0]))
    measured = {prompt_key(row["prompt"]) for row in made["ranked_eval"]}  # a prompt can open several trees
    made["ift"] = [row for row in made["ift"] if prompt_key(row["prompt"]) not in measured]
    return made


def load(dataset: str, split: str) -> Iterable[Record]:
    """Return the messages of a dataset of the hub, or of a local JSONL or parquet file."""
    from datasets import load_dataset

    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(dataset).suffix)
    return load_dataset(kind, data_files=dataset, split="train") if kind else load_dataset(dataset, split=split)


def write(path: Path, rows: list[Record]) -> None:
    """Write rows as JSONL and say how many."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    """Build the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="OpenAssistant/oasst2", help="hub id, or a .jsonl or .parquet file")
    parser.add_argument("--split", default="train")
    parser.add_argument("--lang", default="en")
    parser.add_argument("--eval-share", type=float, default=0.25, help="share of the ranked prompts to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    messages = load(options.dataset, options.split)
    for name, rows in build(messages, options.lang, options.eval_share, options.seed).items():
        write(options.out / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
