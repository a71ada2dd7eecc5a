"""Training data: records rendered once with the model's chat template, and a report of cut and dropped records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from srlm_cli.errors import BadRow, DataError
from srlm_cli.records import KWARGS, Record, as_messages, short_hash
from srlm_cli.seeds import share
from srlm_cli.stages.labels import BETWEEN, CUT_OFF, NO_SCORE
from srlm_cli.streams.reader import FIX, named
from srlm_cli.streams.writer import dumps
from srlm_cli.train.render import Renderer, Sequence

IGNORED = -100
SIDES = ("chosen", "rejected")

Refuse = Callable[[Record, str], None]  # called with a record that cannot be used for training, and the reason


@dataclass
class DataReport:
    """The data of a training: records, tokens, target tokens, and what was cut or dropped."""

    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0
    truncated: int = 0
    left_out: int = 0
    not_last: int = 0
    duplicates: int = 0
    identical: int = 0
    refused: int = 0
    not_drawn: int = 0
    longest: int = 0
    no_label: Counter[str] = field(default_factory=Counter)  # the rows of `kto` without one, by the reason
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Sequence] = field(default_factory=dict)  # the sequences of the first row, by name

    def add(self, tokens: int, targets: int) -> None:
        """Count one sequence."""
        self.tokens += tokens
        self.target_tokens += targets
        self.longest = max(self.longest, tokens)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures."""
        counters = {"no_label": dict(self.no_label), "notes": dict(self.notes)}  # `asdict` would count their items
        return {**{name: value for name, value in vars(self).items() if name != "examples"}, **counters}

    def line(self, unit: str) -> str:
        """Return the figures in one line for people; what did not happen is not named."""
        parts = [f"{self.rows} {unit}", f"{self.tokens} tokens", f"{self.target_tokens} of them trained on"]
        parts.append(f"the longest sequence has {self.longest}")
        parts += [f"{count} {note}" for note, count in self.notes.items()]
        parts += [f"{self.truncated} cut at --max-length"] * bool(self.truncated)
        return ", ".join(parts + self.dropped())

    def dropped(self) -> list[str]:
        """Return how many rows are not trained on, by the reason."""
        counts = {
            "duplicates dropped": self.duplicates,
            "dropped: chosen and rejected are the same tokens": self.identical,
            "left out, longer than --max-length": self.left_out,
            "left out by --train-turns last": self.not_last,
            "bad rows": self.refused,
            "left out by --mix-weight": self.not_drawn,
            **{f"left out, {reason}": count for reason, count in self.no_label.items()},
        }
        return [f"{count} {reason}" for reason, count in counts.items() if count]

    def ways_out(self) -> str:
        """Return which options keep more rows, "" if it is not known."""
        ways = {
            "`srlm sample` with a higher --max-new-tokens": self.no_label[CUT_OFF],
            "`srlm judge --force-score`": self.no_label[NO_SCORE],
            "a lower --desirable-score or a higher --undesirable-score": self.no_label[BETWEEN],
            "a higher --max-length": self.left_out,
        }
        return "; ".join(way for way, count in ways.items() if count)


def stop(row: Record, reason: str) -> None:
    """Raise the DataError of a row that cannot be trained on."""
    at = named(row["origin"][0]) if "origin" in row else f"row {row.get('id', '')}"
    raise DataError(f"{at}: {reason}", FIX)


def distinct(rows: Iterable[Record], fields: tuple[str, ...], report: DataReport, keep: bool) -> Iterator[Record]:
    """Yield the rows without those whose `fields` are those of an earlier one; they are counted."""
    seen = set()
    for row in rows:
        key = short_hash(dumps([row[field] for field in fields] + [row.get(name) for name in ("thought", KWARGS)]))
        if key in seen and not keep:
            report.duplicates += 1
            continue
        seen.add(key)
        yield row


def of_turns(rows: Iterable[Record], turns: str, report: DataReport, refuse: Refuse, field: str) -> Iterator[Record]:
    """Yield the rows to train on: with `last` only the last turns of sampled conversations, which have a `turn`.

    With `all` a row also gives one for each turn of the assistant in its prompt, except an EFT row (with a `score`),
    whose prompt is the judge's, and a pair, in whose loss they cancel. Each turn is a row of its own, so that its
    prompt is what sampling would show. A row with an empty turn goes to `refuse`.
    """
    for row in rows:
        if turns == "last" and row.get("turn", 0) != row.get("num_turns", row.get("turn", 0)):
            report.not_last += 1
            continue
        if turns == "all" and field == "completion" and "score" not in row:
            before = earlier_turns(row)
            if not all(turn[field][0]["content"].strip() for turn in before):
                refuse(row, "a turn of the assistant in its prompt is empty, and --train-turns all trains on it")
                report.refused += 1
                continue
            report.notes.update(["of earlier turns of the assistant"] * len(before))
            yield from before
        yield row


def earlier_turns(row: Record) -> list[Record]:
    """Return a row for each turn of the assistant in a prompt that answers one of the user."""
    prompt = as_messages(row["prompt"])
    rest = {key: value for key, value in row.items() if key != "thought"}
    return [
        {**rest, "prompt": prompt[:at], "completion": [turn]}
        for at, turn in enumerate(prompt)
        if turn["role"] == "assistant" and any(before["role"] == "user" for before in prompt[:at])
    ]


def sft_rows(
    rows: Iterable[Record],
    renderer: Renderer,
    max_length: int,
    *,
    turns: str = "reply",
    drop_long: bool = False,
    keep_duplicates: bool = False,
    seed: int = 0,
    refuse: Refuse = stop,
) -> tuple[list[Record], DataReport]:
    """Return `{input_ids, labels}` of IFT and EFT rows; only target tokens have labels.

    A record with the prompt and completion of an earlier one is dropped, unless `keep_duplicates`. A record longer than
    `max_length` is cut at its end and counted; it is dropped if its prompt alone is as long. An EFT record (with a
    `score`) must not lose its end, which is the score: this raises DataError, or drops it with `drop_long`. A record
    with a `mix_weight` of 2.5 occurs twice, or three times with a probability of one half (`seed`). A record that
    cannot be rendered (see `Renderer`) goes to `refuse`, and is dropped. `turns` says which turns of the assistant
    are targets (see `of_turns`).
    """
    made, report = [], DataReport()
    rows = of_turns(rows, turns, report, refuse, "completion")
    for row in distinct(rows, ("prompt", "completion"), report, keep_duplicates):
        if (sequences := _rendered(row, ("completion",), renderer, report, refuse)) is None:
            continue
        [(ids, start, _, _)] = sequences
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
        copies = int(weight + share(seed, "in-weight", row.get("id"), short_hash(dumps(row["completion"]))))
        report.not_drawn += copies == 0
        for _ in range(copies):
            made.append({"input_ids": ids, "labels": [IGNORED] * start + ids[start:]})
            report.add(len(ids), len(ids) - start)
    report.rows = len(made)
    return made, report


def dpo_rows(
    rows: Iterable[Record],
    renderer: Renderer,
    max_length: int,
    *,
    turns: str = "reply",
    smoothing: float = 0.0,
    keep_duplicates: bool = False,
    refuse: Refuse = stop,
) -> tuple[list[Record], DataReport]:
    """Return `{prompt_ids, chosen_ids, rejected_ids}` of pairs, as TRL's DPOTrainer collates them.

    A duplicate of an earlier pair is dropped, unless `keep_duplicates`; so is a pair with equal tokens on both sides. A
    side longer than `max_length` is cut at its end and counted; the pair is dropped if its prompt alone is as long.
    Each pair has the probability that its sides are swapped: its own `label_smoothing`, else `smoothing`. A pair that
    cannot be rendered (see `Renderer`) goes to `refuse`, and is dropped.
    """
    made, report = [], DataReport()
    rows = of_turns(rows, turns, report, refuse, "chosen")
    for row in distinct(rows, ("prompt", *SIDES), report, keep_duplicates):
        if (sequences := _rendered(row, SIDES, renderer, report, refuse)) is None:
            continue
        start = sequences[0].start  # the prompt is the same tokens on both sides
        if start >= max_length:
            report.left_out += 1
            continue
        cut = [sequence.ids[:max_length] for sequence in sequences]
        if cut[0] == cut[1]:
            report.identical += 1
            continue
        report.truncated += any(len(sequence.ids) > max_length for sequence in sequences)
        pair = {"prompt_ids": cut[0][:start]}
        for side, ids in zip(SIDES, cut, strict=True):
            pair[f"{side}_ids"] = ids[start:]
            report.add(len(ids), len(ids) - start)
        made.append({**pair, "label_smoothing": float(row.get("label_smoothing", smoothing))})
    report.rows = len(made)
    return made, report


def kto_rows(
    rows: list[Record],
    renderer: Renderer,
    max_length: int,
    *,
    turns: str = "reply",
    keep_duplicates: bool = False,
    refuse: Refuse = stop,
) -> tuple[list[Record], DataReport]:
    """Return `{prompt_ids, completion_ids, label}` of labelled rows, as TRL's KTOTrainer collates them.

    A row with the label null is left out and counted by its `no_label`. A duplicate of an earlier row with its label is
    dropped, unless `keep_duplicates`. A row longer than `max_length` is cut at its end and counted; it is dropped if
    its prompt alone is as long. A row that cannot be rendered (see `Renderer`) goes to `refuse`, and is dropped.
    """
    made, report = [], DataReport()
    labelled = [row for row in rows if row["label"] is not None]
    report.no_label.update(row["no_label"] for row in rows if row["label"] is None)
    rows = of_turns(labelled, turns, report, refuse, "label")
    for row in distinct(rows, ("prompt", "completion", "label"), report, keep_duplicates):
        if (sequences := _rendered(row, ("completion",), renderer, report, refuse)) is None:
            continue
        [(ids, start, _, _)] = sequences
        if start >= max_length:
            report.left_out += 1
            continue
        report.truncated += len(ids) > max_length
        ids = ids[:max_length]
        made.append({"prompt_ids": ids[:start], "completion_ids": ids[start:], "label": row["label"]})
        report.add(len(ids), len(ids) - start)
        report.notes["desirable" if row["label"] else "undesirable"] += 1
    report.rows = len(made)
    return made, report


def _rendered(
    row: Record,
    replies: tuple[str, ...],
    renderer: Renderer,
    report: DataReport,
    refuse: Refuse,
) -> list[Sequence] | None:
    """Return the sequence of each reply of a record, or None if one cannot be rendered; count their notes."""
    try:
        sequences = renderer.rendered(row, replies)
    except BadRow as error:
        refuse(row, str(error))
        report.refused += 1
        return None
    report.examples = report.examples or dict(zip(replies, sequences, strict=True))
    report.notes.update({note for sequence in sequences for note in sequence.notes})
    return sequences


def as_dataset(rows: list[Record]) -> Any:
    """Return rows as a `datasets.Dataset`."""
    from datasets import Dataset

    return Dataset.from_list(rows)
