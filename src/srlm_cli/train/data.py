"""Rows as the trainer sees them: rendered once by the model's own template, and a report of what was cut."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from srlm_cli.errors import DataError
from srlm_cli.records import Message, Prompt, Row, as_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass
class DataReport:
    """What goes into a training: rows, tokens, those that bear loss, and what was cut or left out."""

    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0
    truncated: int = 0
    left_out: int = 0

    def add(self, tokens: int, targets: int) -> None:
        """Count one sequence."""
        self.tokens += tokens
        self.target_tokens += targets

    def as_dict(self) -> dict[str, int]:
        """Return the figures."""
        return asdict(self)


def answer(completion: Prompt) -> list[Message]:
    """Return a completion as the assistant's messages."""
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Prompt) -> tuple[list[int], int]:
    """Return the token ids of a dialogue and where its target begins.

    Prompt and completion are rendered together by the chat template, with no further special tokens:
    one BOS, the end of turn trained. The target begins behind the generation prompt.
    """
    messages = as_messages(prompt)
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages + answer(completion), tokenize=False)
    head = tokenizer(opened, add_special_tokens=False)["input_ids"]
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    start = len(os.path.commonprefix([head, ids]))
    if tokenizer.eos_token_id not in ids[start:]:
        ids.append(tokenizer.eos_token_id)
    return ids, start


def sft_rows(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, *, drop_long: bool = False
) -> tuple[list[Row], DataReport]:
    """Return `{input_ids, labels}` of IFT and EFT rows; only target tokens have labels.

    A row longer than `max_length` loses its end, counted; a row whose prompt fills it is left out. An
    EFT row (one with a `score`) must not lose its end, which is the score: DataError, or left out too
    with `drop_long`.
    """
    made, report = [], DataReport()
    for row in rows:
        ids, start = render(tokenizer, row["prompt"], row["completion"])
        if len(ids) > max_length:
            if "score" in row and drop_long:
                report.left_out += 1
                continue
            if "score" in row:
                raise DataError(
                    f"EFT row {row['id']} has {len(ids)} tokens, over --max-length {max_length}",
                    "its score would be cut off: raise --max-length, or --on-long drop leaves such rows out",
                )
            report.truncated += 1
        if start >= max_length:
            report.left_out += 1
            continue
        ids = ids[:max_length]
        made.append({"input_ids": ids, "labels": [IGNORED] * start + ids[start:]})
        report.add(len(ids), len(ids) - start)
    report.rows = len(made)
    return made, report


def dpo_rows(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[Row], DataReport]:
    """Return `{prompt, chosen, rejected}` message rows as TRL's DPOTrainer takes them, and what it will cut."""
    made, report = [], DataReport()
    for row in rows:
        sides = [render(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        report.truncated += any(len(ids) > max_length for ids, _ in sides)
        if any(start >= max_length for _, start in sides):
            report.left_out += 1
            continue
        made.append(
            {"prompt": as_messages(row["prompt"]), "chosen": answer(row["chosen"]), "rejected": answer(row["rejected"])}
        )
        for ids, start in sides:
            report.add(min(len(ids), max_length), min(len(ids), max_length) - start)
    report.rows = len(made)
    return made, report


def dataset(rows: list[Row]) -> Any:
    """Return rows as a `datasets.Dataset`."""
    from datasets import Dataset

    return Dataset.from_list(rows)
