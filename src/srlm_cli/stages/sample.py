"""Candidate responses: N for each prompt (arXiv 2401.10020, section 2.3, step 2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from srlm_cli.engines.base import Completion, Engine, Request, Sampling, template_refusal
from srlm_cli.records import ENDS, Record, as_messages
from srlm_cli.seeds import derive
from srlm_cli.stages import Outcome, counts_of_ends
from srlm_cli.stages.lookahead import generate_for


@dataclass(frozen=True)
class SampleOptions:
    """`n` responses per prompt, drawn with `sampling`; the seed of each is derived from `seed`."""

    n: int
    sampling: Sampling
    seed: int


def sample(prompts: Iterable[Record], engine: Engine, options: SampleOptions) -> Iterator[Outcome]:
    """Yield, for each prompt row, its N response rows `<prompt_id>/<k>`.

    A completion that the engine did not write (see `Completion`) is counted and has no row. A prompt without any
    response is a bad row.
    """

    def ask(row: Record) -> Request:
        seeds = tuple(derive(options.seed, "sample", row["id"], k) for k in range(options.n))
        return Request(as_messages(row["prompt"]), options.sampling, seeds)

    for row, completion in generate_for(prompts, ask, engine):
        rows = _responses(row, completion, engine.model)
        yield Outcome(
            rows=rows,
            bad="" if rows else _why_none(completion),
            counts=_finish_counts(completion, len(rows)),
            tokens_in=completion.tokens_in,
            tokens_out=completion.tokens_out,
        )


def _responses(row: Record, completion: Completion, model: str) -> list[Record]:
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
        if reason in ENDS
    ]


def _finish_counts(completion: Completion, responses: int) -> dict[str, int]:
    return {"responses": responses, **counts_of_ends(completion.finish_reasons)}


def _why_none(completion: Completion) -> str:
    """Return a message that says why a prompt got no response."""
    if refusal := template_refusal(completion):
        return refusal
    reason = completion.finish_reasons[0]
    about = {
        "prompt-too-long": "the prompt is too long for the model",
        "content_filter": "a content filter refused it",
        "empty": "the model's replies are empty",
        "refused": "the server refused it",
    }.get(reason, f"no reply: {reason}")
    return f"{about}: {completion.why}" if completion.why else about
