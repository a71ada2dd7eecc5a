"""Candidate responses: N for each prompt (arXiv 2401.10020, section 2.3, step 2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from srlm_cli.engines.base import Completion, Engine, Request, Sampling
from srlm_cli.records import Row, as_messages
from srlm_cli.seeds import derive
from srlm_cli.stages import Outcome
from srlm_cli.stages.lookahead import generate_for


@dataclass(frozen=True)
class SampleOptions:
    """`n` responses a prompt, drawn at `sampling` with seeds derived from `seed`."""

    n: int
    sampling: Sampling
    seed: int


def sample(prompts: Iterable[Row], engine: Engine, options: SampleOptions) -> Iterator[Outcome]:
    """Yield, for each prompt row, its N response rows `<prompt_id>/<k>`."""

    def ask(row: Row) -> Request:
        seeds = tuple(derive(options.seed, "sample", row["id"], k) for k in range(options.n))
        return Request(as_messages(row["prompt"]), options.sampling, seeds)

    for row, completion in generate_for(prompts, ask, engine):
        yield Outcome(
            rows=_responses(row, completion, engine.model),
            counts=_finish_counts(completion),
            tokens_in=completion.tokens_in,
            tokens_out=completion.tokens_out,
        )


def _responses(row: Row, completion: Completion, model: str) -> list[Row]:
    return [
        {
            **row,
            "id": f"{row['id']}/{k}",
            "prompt_id": row["id"],
            "prompt": row["prompt"],
            "response": text.strip(),
            "k": k,
            "finish_reason": reason,
            "model": model,
        }
        for k, (text, reason) in enumerate(zip(completion.texts, completion.finish_reasons, strict=True))
    ]


def _finish_counts(completion: Completion) -> dict[str, int]:
    counts = {"responses": len(completion.texts)}
    for reason in completion.finish_reasons:
        if reason != "stop":
            name = "cut off" if reason == "length" else reason.replace("-", " ")
            counts[name] = counts.get(name, 0) + 1
    return counts
