"""Read a run folder: the counts beside each file, the metrics, the scores."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from srlm_cli import records
from srlm_cli.errors import OptionError
from srlm_cli.records import Row
from srlm_cli.streams.reader import read_all
from srlm_cli.train.session import PROVENANCE

STAGES = ("prompts", "responses", "judged", "pairs")


@dataclass
class Round:
    """What Mt did: the counts of its stages, its judging, its training and its metrics."""

    name: str
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    judging: dict[str, Any] = field(default_factory=dict)
    pairs: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Row] = field(default_factory=dict)


def collect(run: Path) -> list[Round]:
    """Return the rounds of a run folder in order, EFT building first; raise OptionError where there is none."""
    folders = sorted((p for p in run.glob("M*") if p.is_dir() and p.name[1:].isdigit()), key=lambda p: int(p.name[1:]))
    if not folders:
        raise OptionError(f"{run} is no run: it holds no M0, M1, ...", "make iterate makes one in runs/NAME")
    rounds = []
    for folder in folders:
        found = Round(folder.name)
        if folder.name == "M0":
            add_counts(found.stages, "eft", run / "eft.jsonl")
        for stage in STAGES:
            add_counts(found.stages, stage, folder / f"{stage}.jsonl")
        found.training = read_json(folder / "model" / PROVENANCE)
        found.judging = judging(folder / "judged.jsonl")
        found.pairs = pairs(folder / "pairs.jsonl")
        for metrics in ("eval-reward.jsonl", "eval-head-to-head.jsonl"):
            found.metrics |= {row["metric"]: row for row in rows_of(folder / metrics)}
        rounds.append(found)
    return rounds


def add_counts(stages: dict[str, dict[str, Any]], name: str, path: Path) -> None:
    """Add the counts of a finished file."""
    if counts := read_json(path.with_name(path.name + ".meta.json")).get("counts"):
        stages[name] = counts


def judging(path: Path) -> dict[str, Any]:
    """Return how a judge scored: parse rate, tie rate of prompts, histogram of the rounded means, lengths."""
    rows = rows_of(path, records.judged_record)
    if not rows:
        return {}
    single = [score for row in rows for score in row["scores"]]
    means = [row["score"] for row in rows if row["score"] is not None]
    prompts: dict[str, list[float]] = {}
    for row in rows:
        if row["score"] is not None:
            prompts.setdefault(row["prompt_id"], []).append(row["score"])
    several = [scores for scores in prompts.values() if len(scores) > 1]
    return {
        "parse_rate": fmean(source == "text" for row in rows for source in row["score_from"]),
        "readable": fmean(score is not None for score in single),
        "tie_rate": fmean(len(set(scores)) == 1 for scores in several) if several else None,
        "histogram": Counter(round(score) for score in single if score is not None),
        "mean": fmean(means) if means else None,
        "length": fmean(len(row["response"]) for row in rows),
    }


def pairs(path: Path) -> dict[str, Any]:
    """Return the mean lengths, in characters, and the mean score gap of preference pairs."""
    rows = rows_of(path, records.pair_record)
    if not rows:
        return {}
    length = {side: fmean(len(row[side][-1]["content"]) for row in rows) for side in ("chosen", "rejected")}
    return {**length, "gap": fmean(row["score_chosen"] - row["score_rejected"] for row in rows)}


def rows_of(path: Path, check: Any = dict) -> list[Row]:
    """Return the rows of a file, none where it is not there yet."""
    return read_all(str(path), check) if path.exists() else []


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file, an empty one where it is not there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
