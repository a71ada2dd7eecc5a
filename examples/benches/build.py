"""Build ranked rows from benchmarks for judges, so that `srlm judge` and `srlm eval reward` measure a judge on them.

    python build.py rewardbench2 --out rewardbench2.jsonl            # from the model hub
    python build.py judgebench --split claude --out judgebench.jsonl
    python build.py llmbar --dataset dataset.json --out llmbar.jsonl  # a file of your own, with the same columns

A reply that the benchmark calls right or better has rank 0, any other reply has rank 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
JUDGEBENCH = {  # the categories of its paper, by the beginnings of its sources
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}


def rewardbench2(row: Record) -> Record:
    """Return a prompt of RewardBench 2 (arXiv 2506.01937): one right reply and three others, or several (Ties)."""
    made = ranked(row["id"], row["prompt"], [(row["chosen"], 0), (row["rejected"], 1)], row["subset"])
    return made | ({"ties": row["id"]} if row["subset"] == "Ties" else {})


def judgebench(row: Record) -> Record:
    """Return a pair of JudgeBench (arXiv 2410.12784): one of the replies is correct."""
    better = {"A>B": 0, "B>A": 1}[row["label"]]
    replies = [([row["response_A"]], better), ([row["response_B"]], 1 - better)]
    category = next((name for start, name in JUDGEBENCH.items() if row["source"].startswith(start)), row["source"])
    return ranked(row["pair_id"], row["question"], replies, category)


def llmbar(row: Record) -> Record:
    """Return a pair of LLMBar (arXiv 2310.07641): one of the outputs follows the instruction."""
    better = {1: 0, 2: 1}[int(row["label"])]
    replies = [([row["output_1"]], better), ([row["output_2"]], 1 - better)]
    return ranked(None, row["input"], replies, None)


def ranked(name: str | None, prompt: str, replies: list[tuple[list[str], int]], category: str | None) -> Record:
    """Return a ranked row; `replies` are texts with their rank."""
    for texts, _ in replies:
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"expected texts as replies, got {texts!r:.80}")
    responses = [{"text": text, "rank": rank} for texts, rank in replies for text in texts]
    return {"id": name, "prompt": prompt, "responses": responses, "category": category}


BENCHES = {  # how a row is read; where it is on the hub, and in which split
    "rewardbench2": (rewardbench2, "allenai/reward-bench-2", "test"),
    "judgebench": (judgebench, "ScalerLab/JudgeBench", "gpt"),
    "llmbar": (llmbar, None, "train"),
}


def build(bench: str, rows: Iterable[Record], category: str | None) -> Iterator[Record]:
    """Yield the ranked rows of a benchmark. A row without an id gets one from its category and its place."""
    read = BENCHES[bench][0]
    for at, row in enumerate(rows, 1):
        try:
            made = read(row)
        except (KeyError, TypeError, ValueError) as error:
            raise SystemExit(f"row {at} is not a row of {bench}: {type(error).__name__} {error}") from None
        made["category"] = category or made["category"] or bench
        yield made | {"id": f"{made['category']}-{at}" if made["id"] in (None, "") else made["id"]}


def load(dataset: str | None, split: str) -> Iterable[Record]:
    """Return the rows of a dataset of the hub, or of a local JSON, JSONL or parquet file."""
    from datasets import load_dataset

    if dataset is None:
        raise SystemExit("LLMBar is not on the hub as rows: give its dataset.json with --dataset")
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(dataset).suffix)
    return load_dataset(kind, data_files=dataset, split="train") if kind else load_dataset(dataset, split=split)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--dataset", help="hub id, or a JSON, JSONL or parquet file with its columns")
    parser.add_argument("--split", help="split on the hub; JudgeBench has `gpt` and `claude`")
    parser.add_argument("--category", help="category of all rows, such as the subset of LLMBar")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    _, hub, split = BENCHES[given.bench]
    rows = list(build(given.bench, load(given.dataset or hub, given.split or split), given.category))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with open(given.out, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(rows)} rows in {given.out}")


if __name__ == "__main__":
    main()
