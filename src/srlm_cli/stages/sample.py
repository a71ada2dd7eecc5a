"""Candidate responses: N for each prompt (arXiv 2401.10020, section 2.3, step 2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from srlm_cli.engines.base import Completion, Engine, Request, Sampling, template_refusal
from srlm_cli.records import ENDS, KWARGS, Record, as_messages
from srlm_cli.seeds import derive
from srlm_cli.stages import Outcome, closed_thoughts, counts_of_ends
from srlm_cli.stages.lookahead import generate_for
from srlm_cli.thoughts import UNFINISHED


@dataclass(frozen=True)
class SampleOptions:
    """`n` responses per prompt, drawn with `sampling`; the seed of each is derived from `seed`.

    `template_kwargs` are the options of the chat template; each record has them, so that training renders it alike.
    """

    n: int
    sampling: Sampling
    seed: int
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def sample(prompts: Iterable[Record], engine: Engine, options: SampleOptions) -> Iterator[Outcome]:
    """Yield, for each prompt row, its N response rows `<prompt_id>/<k>`.

    A completion that the engine did not write (see `Completion`) is counted and has no row. One that was cut off in its
    thought has a row with a `response` of null. A prompt without any response is a bad row.
    """

    def ask(row: Record) -> Request:
        seeds = tuple(derive(options.seed, "sample", row["id"], k) for k in range(options.n))
        return Request(as_messages(row["prompt"]), options.sampling, seeds, template_kwargs=row.get(KWARGS))

    for row, completion in generate_for((as_asked(row, options) for row in prompts), ask, engine):
        rows = _responses(row, completion, engine.model)
        yield Outcome(
            rows=rows,
            bad="" if rows else _why_none(completion),
            counts=_finish_counts(completion, len(rows)),
            tokens_in=completion.tokens_in,
            tokens_out=completion.tokens_out,
        )


def as_asked(row: Record, options: SampleOptions) -> Record:
    """Return a prompt row with the options of the chat template that its model sees."""
    kwargs = {**options.template_kwargs, **(row.get(KWARGS) or {})}
    return {**row, KWARGS: kwargs} if kwargs else row


def _responses(row: Record, completion: Completion, model: str) -> list[Record]:
    rows = []
    for k, (text, reason) in enumerate(zip(completion.texts, completion.finish_reasons, strict=True)):
        if reason in ENDS or reason == UNFINISHED:
            thought = completion.thought(k)
            rows.append(
                {
                    **row,
                    "id": f"{row['id']}/{k}",
                    "prompt_id": row["id"],
                    "prompt": row["prompt"],
                    "response": None if reason == UNFINISHED else text.strip(),
                    "thought": (thought.text or None) if thought else None,
                    "k": k,
                    "finish_reason": reason,
                    "model": model,
                }
            )
    return rows


def _finish_counts(completion: Completion, responses: int) -> dict[str, int]:
    ended = zip(completion.texts, completion.finish_reasons, strict=True)
    empty = sum(reason in ENDS and not text.strip() for text, reason in ended)
    return {
        "responses": responses,
        **counts_of_ends(completion.finish_reasons),
        **({"empty replies": empty} if empty else {}),
        **closed_thoughts(completion.thoughts),
    }


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
