"""LLM-as-a-judge: K judgements of each response, their scores averaged (arXiv 2401.10020, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean

from srlm_cli.engines.base import Completion, Engine, Request, Sampling
from srlm_cli.records import Row, as_messages, as_text
from srlm_cli.seeds import derive
from srlm_cli.stages import Outcome
from srlm_cli.stages.lookahead import generate_for
from srlm_cli.templates import Template

FINISH_TOGETHER = 64


@dataclass(frozen=True)
class JudgeOptions:
    """`samples` judgements a response (the paper's K) by a template; `finish_score` asks for missing scores."""

    template: Template
    samples: int
    sampling: Sampling
    seed: int
    finish_score: bool = False


@dataclass(frozen=True)
class Judgement:
    """One text of the judge, its score if it can be read, and where the score came from."""

    text: str
    score: float | None
    score_from: str | None
    finish_reason: str


def judge(responses: Iterable[Row], engine: Engine, options: JudgeOptions) -> Iterator[Outcome]:
    """Yield each response row with `score`, the mean of the `scores` that its `judgements` hold.

    A judgement without a readable score has null in `scores`, and a response without any has a
    `score` of null. The prompt of the judge is never searched for a score, only what it wrote.
    """
    asked = generate_for(responses, lambda row: judge_request(row, options), engine)
    while group := list(islice(asked, FINISH_TOGETHER if options.finish_score else 1)):
        judged = [(row, completion, read_judgements(completion, options.template)) for row, completion in group]
        extra = finish_scores(judged, engine, options) if options.finish_score else [(0, 0)] * len(judged)
        for (row, completion, judgements), (tokens_in, tokens_out) in zip(judged, extra, strict=True):
            yield Outcome(
                rows=[judged_row(row, judgements, engine.model, options.template)],
                counts=count_judgements(judgements),
                tokens_in=completion.tokens_in + tokens_in,
                tokens_out=completion.tokens_out + tokens_out,
            )


def judge_request(row: Row, options: JudgeOptions) -> Request:
    """Return the question to the judge about one response, with K seeds of its own."""
    seeds = tuple(derive(options.seed, "judge", row["id"], k) for k in range(options.samples))
    return Request(judge_prompt(row["prompt"], row["response"], options.template), options.sampling, seeds)


def judge_prompt(prompt, response: str, template: Template) -> list[dict[str, str]]:
    """Return the judge's prompt as messages: the same for judging and for EFT rows."""
    return as_messages(template.render(prompt=as_text(prompt), response=response).strip())


def read_judgements(completion: Completion, template: Template) -> list[Judgement]:
    """Return the K judgements of a completion, with the last well-formed score of each."""
    judgements = []
    for text, reason in zip(completion.texts, completion.finish_reasons, strict=True):
        score = template.score(text)
        judgements.append(Judgement(text.strip(), score, None if score is None else "text", reason))
    return judgements


def finish_scores(judged: list, engine: Engine, options: JudgeOptions) -> list[tuple[int, int]]:
    """Let the model choose a score behind `finish` for each judgement that has none; return tokens in and out.

    The judgements are replaced in place; theirs is then a `score_from` of `finish`.
    """
    missing = [(at, k) for at, (_, _, js) in enumerate(judged) for k, j in enumerate(js) if j.score is None]
    spent = [(0, 0)] * len(judged)

    def ask(place: tuple[int, int]) -> Request:
        row, judgements = judged[place[0]][0], judged[place[0]][2]
        begun = judgements[place[1]].text
        return Request(
            judge_prompt(row["prompt"], row["response"], options.template),
            options.sampling,
            (derive(options.seed, "finish", row["id"], place[1]),),
            prefix=(begun + "\n" if begun else "") + options.template.finish,
            choices=options.template.choices,
        )

    for (at, k), completion in generate_for(missing, ask, engine):
        choice = completion.texts[0]
        spent[at] = (spent[at][0] + completion.tokens_in, spent[at][1] + completion.tokens_out)
        if choice:
            judgements = judged[at][2]
            judgements[k] = replace(judgements[k], score=float(choice), score_from="finish")
    return spent


def judged_row(row: Row, judgements: list[Judgement], model: str, template: Template) -> Row:
    """Return a response row with what the judge said of it."""
    scores = [judgement.score for judgement in judgements]
    readable = [score for score in scores if score is not None]
    return {
        **row,
        "score": fmean(readable) if readable else None,
        "scores": scores,
        "score_from": [judgement.score_from for judgement in judgements],
        "judgements": [judgement.text for judgement in judgements],
        "judgement_finish_reasons": [judgement.finish_reason for judgement in judgements],
        "judge": {"model": model, "template": template.name, "template_hash": template.hash},
    }


def count_judgements(judgements: list[Judgement]) -> dict[str, int]:
    """Return how many judgements there are, how many were finished, cut off, and could not be read."""
    return {
        "judgements": len(judgements),
        "unparsed": sum(judgement.score is None for judgement in judgements),
        "finished": sum(judgement.score_from == "finish" for judgement in judgements),
        "cut off": sum(judgement.finish_reason == "length" for judgement in judgements),
    }
