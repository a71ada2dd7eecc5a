"""The work of a race: srlm's requests for sampling and judging, made by its own stage code."""

from __future__ import annotations

import json
from pathlib import Path

from srlm_cli import templates
from srlm_cli.engines.base import Request, Sampling
from srlm_cli.records import as_messages, prompt_record
from srlm_cli.seeds import derive
from srlm_cli.stages.judge import JudgeOptions, judge_request


def requests_of(task: str, rows: str, each: int, sampling: dict) -> list[Request]:
    """Return a request with `each` seeds for each row of a JSONL file: prompts to answer, or replies to judge."""
    found = [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    how = Sampling(**sampling)
    if task == "judge":
        options = JudgeOptions(templates.load("additive", fields={"prompt", "response"}, reads=True), each, how, seed=0)
        return [judge_request(row, options) for row in found]
    prompts = [prompt_record(row) for row in found]
    return [
        Request(as_messages(row["prompt"]), how, tuple(derive(0, "sample", row["id"], k) for k in range(each)))
        for row in prompts
    ]
