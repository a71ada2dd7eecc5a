"""Rows as the trainer sees them: rendered once by the model's own template, and a report of what was cut or left."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from srlm_cli.errors import DataError
from srlm_cli.records import Message, Prompt, Row, as_messages, short_hash
from srlm_cli.seeds import share
from srlm_cli.streams.writer import dumps

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
    duplicates: int = 0
    longest: int = 0

    def add(self, tokens: int, targets: int) -> None:
        """Count one sequence."""
        self.tokens += tokens
        self.target_tokens += targets
        self.longest = max(self.longest, tokens)

    def as_dict(self) -> dict[str, int]:
        """Return the figures."""
        return asdict(self)

    def line(self, unit: str) -> str:
        """Return the figures in one line for people; what did not happen is not named."""
        parts = [f"{self.rows} {unit}", f"{self.tokens} tokens", f"{self.target_tokens} of them trained on"]
        parts.append(f"the longest sequence has {self.longest}")
        parts += [f"{self.duplicates} duplicates dropped"] * bool(self.duplicates)
        parts += [f"{self.truncated} cut at --max-length"] * bool(self.truncated)
        parts += [f"{self.left_out} left out, longer than --max-length"] * bool(self.left_out)
        return ", ".join(parts)


def answer(completion: Prompt) -> list[Message]:
    """Return a completion as the assistant's messages."""
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Prompt) -> tuple[list[int], int]:
    """Return the token ids of a dialogue and where its target begins.

    Prompt and completion are rendered together by the chat template, with no further special tokens:
    one BOS, the end of turn trained. The target begins behind the generation prompt. Raises DataError
    when the template itself makes two BOS.
    """
    messages = as_messages(prompt)
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages + answer(completion), tokenize=False)
    head = tokenizer(opened, add_special_tokens=False)["input_ids"]
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        raise DataError(f"a rendered row begins with two {tokenizer.bos_token}", "fix the model's chat template")
    start = len(os.path.commonprefix([head, ids]))
    if tokenizer.eos_token_id not in ids[start:]:
        ids.append(tokenizer.eos_token_id)
    return ids, start


def distinct(rows: Iterable[Row], fields: tuple[str, ...], report: DataReport, keep: bool) -> Iterator[Row]:
    """Yield the rows without those whose `fields` are those of an earlier one; they are counted."""
    seen = set()
    for row in rows:
        key = short_hash(dumps([row[field] for field in fields]))
        if key in seen and not keep:
            report.duplicates += 1
            continue
        seen.add(key)
        yield row


def sft_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    drop_long: bool = False,
    keep_duplicates: bool = False,
    seed: int = 0,
) -> tuple[list[Row], DataReport]:
    """Return `{input_ids, labels}` of IFT and EFT rows; only target tokens have labels.

    A row with prompt and completion of an earlier one is dropped, unless `keep_duplicates`. A row
    longer than `max_length` loses its end, counted; a row whose prompt fills it is left out. An EFT
    row (one with a `score`) must not lose its end, which is the score: DataError, or left out too
    with `drop_long`. A row whose `mix_weight` is 2.5 stands there twice, or with a chance of a half,
    drawn by `seed`, three times.
    """
    made, report = [], DataReport()
    for row in distinct(rows, ("prompt", "completion"), report, keep_duplicates):
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
        weight = row.get("mix_weight", 1.0)
        for _ in range(int(weight + share(seed, "in-weight", row.get("id"), short_hash(dumps(row["completion"]))))):
            made.append({"input_ids": ids, "labels": [IGNORED] * start + ids[start:]})
            report.add(len(ids), len(ids) - start)
    report.rows = len(made)
    return made, report


def dpo_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    smoothing: float = 0.0,
    keep_duplicates: bool = False,
) -> tuple[list[Row], DataReport]:
    """Return `{prompt_ids, chosen_ids, rejected_ids}` of pairs, as TRL's DPOTrainer collates them.

    A pair that stood before is dropped, unless `keep_duplicates`; a side longer than `max_length`
    loses its end, counted; a pair whose prompt fills it is left out. The probability that
    the two sides are the wrong way round goes along: the row's own `label_smoothing`, else `smoothing`.
    """
    made, report = [], DataReport()
    for row in distinct(rows, ("prompt", "chosen", "rejected"), report, keep_duplicates):
        sides = {side: render(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")}
        start = min(at for _, at in sides.values())
        if start >= max_length:
            report.left_out += 1
            continue
        report.truncated += any(len(ids) > max_length for ids, _ in sides.values())
        pair = {"prompt_ids": sides["chosen"][0][:start]}
        for side, (ids, _) in sides.items():
            ids = ids[:max_length]
            pair[f"{side}_ids"] = ids[start:]
            report.add(len(ids), len(ids) - start)
        made.append({**pair, "label_smoothing": float(row.get("label_smoothing", smoothing))})
    report.rows = len(made)
    return made, report


def as_dataset(rows: list[Row]) -> Any:
    """Return rows as a `datasets.Dataset`."""
    from datasets import Dataset

    return Dataset.from_list(rows)
