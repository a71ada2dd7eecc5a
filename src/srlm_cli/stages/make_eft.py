"""EFT rows: the judge's own task as fine-tuning data, from replies that people ranked.

`accept` is the paper's way (arXiv 2401.10020, section 3.1.1): the model judges, and the judgements
are kept whose scores order the replies as people did. `hindsight` is for a model that cannot judge
yet: the human rank gives the score, and the model writes the reasons for it, or none are given.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

from srlm_cli.engines.base import Engine, Request, Sampling
from srlm_cli.errors import BadRow
from srlm_cli.records import Row, as_messages, as_text, human_value, is_number, responses_of
from srlm_cli.seeds import derive
from srlm_cli.stages import Outcome
from srlm_cli.stages.judge import judge_prompt
from srlm_cli.stages.lookahead import generate_for
from srlm_cli.templates import Template

THIN_FROM = 20


@dataclass(frozen=True)
class EftOptions:
    """The judge's template, how it is sampled, and which share of the rows one score may have."""

    template: Template
    sampling: Sampling
    seed: int
    samples: int = 4
    ties: bool = False
    max_share: float = 1.0
    score_range: tuple[float, float] = (0.0, 1.0)
    reason_template: Template | None = None


class Thinning:
    """Drop rows of a score that has more than its share already (the paper thins out the score 4)."""

    def __init__(self, max_share: float, kept: Iterable[Row] = ()) -> None:
        self.max_share = max_share
        self.kept = Counter(row["score"] for row in kept)

    def split(self, rows: list[Row]) -> tuple[list[Row], int]:
        """Return the rows to keep and how many are dropped."""
        keep = []
        for row in rows:
            total = self.kept.total()
            if total < THIN_FROM or self.kept[row["score"]] + 1 <= self.max_share * (total + 1):
                self.kept[row["score"]] += 1
                keep.append(row)
        return keep, len(rows) - len(keep)


def accept(
    ranked: Iterable[Row], engine: Engine, options: EftOptions, *, kept: Iterable[Row] = ()
) -> Iterator[Outcome]:
    """Yield, for each ranked prompt, the EFT rows of the judgements that agree with people.

    Sample j of all its replies is one ranking of them; if it orders every pair that people ordered
    in the same way, all its judgements become rows. A tie of the model agrees only with `ties`.
    """
    thinning = Thinning(options.max_share, kept)

    def ask(place: tuple[Row, Row]) -> Request:
        response = place[1]
        seeds = tuple(derive(options.seed, "eft", response["id"], j) for j in range(options.samples))
        return Request(
            judge_prompt(response["prompt"], response["response"], options.template), options.sampling, seeds
        )

    replies = ((row, response) for row in ranked for response in responses_of(row))
    group: list = []
    for (row, response), completion in generate_for(replies, ask, engine):
        group.append((response, completion))
        if len(group) == len(row["responses"]):
            yield accepted(group, options, thinning)
            group = []


def accepted(group: list, options: EftOptions, thinning: Thinning) -> Outcome:
    """Return the outcome of one prompt: `group` holds each of its responses with its judgements."""
    human = [response["human"] for response, _ in group]
    outcome = Outcome(
        tokens_in=sum(completion.tokens_in for _, completion in group),
        tokens_out=sum(completion.tokens_out for _, completion in group),
    )
    dropped: Counter[str] = Counter()
    rows = []
    for j in range(options.samples):
        texts = [completion.texts[j].strip() for _, completion in group]
        scores = [options.template.score(text) for text in texts]
        if any(score is None for score in scores):
            dropped["judgements: no score"] += len(group)
        elif not agrees(human, scores, options.ties):
            dropped["judgements: not in the order of people"] += len(group)
        else:
            # What follows the score is cut: the target ends in it.
            kept = [upto_score(text, options.template) for text in texts]
            for (response, _), text, score in zip(group, kept, scores, strict=True):
                rows.append(eft_row(response, text, score, options.template, f"/{j}"))
    outcome.counts = {"judgements": options.samples * len(group), "accepted": len(rows)}
    outcome.rows, thinned = thinning.split(rows)
    if thinned:
        dropped["judgements: score too common"] += thinned
    outcome.dropped = dict(dropped)
    return outcome


def agrees(human: list[float], scores: list[float], ties: bool) -> bool:
    """Tell whether scores order every pair of replies as people did; pairs that people tied do not count."""
    for a, b in combinations(range(len(human)), 2):
        wanted, given = human[a] - human[b], scores[a] - scores[b]
        if wanted and (wanted * given < 0 or (given == 0 and not ties)):
            return False
    return len(set(human)) > 1


def upto_score(text: str, template: Template) -> str:
    """Return a judgement up to its last score."""
    last = template.last_match(text)
    return text[: last.end(1)] if last else text


def hindsight(
    ranked: Iterable[Row], engine: Engine | None, options: EftOptions, *, kept: Iterable[Row] = ()
) -> Iterator[Outcome]:
    """Yield, for each ranked prompt, one EFT row a reply, its score taken from the people's ranking.

    With `reason_template` the engine writes the reasons; those that name a number are dropped.
    Without it the target is the score alone.
    """
    thinning = Thinning(options.max_share, kept)
    for row, scores, reasons, spent in with_reasons(ranked, engine, options):
        rows, dropped = [], Counter()
        for response, score, reason in zip(responses_of(row), scores, reasons, strict=True):
            why = "all ranked alike by people" if score is None else ""
            if why := why or (reason_fault(reason) if options.reason_template else ""):
                dropped[f"replies: {why}"] += 1
                continue
            target = f"{reason}\n{options.template.finish}{score}" if reason else f"{options.template.finish}{score}"
            rows.append(eft_row(response, target, float(score), options.template))
        rows, thinned = thinning.split(rows)
        if thinned:
            dropped["replies: score too common"] += thinned
        yield Outcome(
            rows=rows, dropped=dict(dropped), counts={"replies": len(scores)}, tokens_in=spent[0], tokens_out=spent[1]
        )


def with_reasons(ranked: Iterable[Row], engine: Engine | None, options: EftOptions) -> Iterator[tuple]:
    """Yield (ranked row, a score for each reply, a reason for each reply, tokens in and out)."""
    if not options.reason_template:
        for row in ranked:
            yield row, human_scores(row, options.score_range), [""] * len(row["responses"]), (0, 0)
        return

    def ask(place: tuple[Row, list[int], int]) -> Request:
        row, scores, at = place
        text = options.reason_template.render(
            prompt=as_text(row["prompt"]), response=row["responses"][at]["text"], score=str(scores[at])
        )
        return Request(as_messages(text.strip()), options.sampling, (derive(options.seed, "reason", row["id"], at),))

    def places() -> Iterator[tuple[Row, list[int], int]]:
        for row in ranked:
            scores = human_scores(row, options.score_range)
            yield from ((row, scores, at) for at in range(len(scores)))

    reasons, tokens_in, tokens_out = [], 0, 0
    for (row, scores, _), completion in generate_for(places(), ask, engine):
        reasons.append(completion.texts[0].strip() if completion.finish_reasons[0] == "stop" else "")
        tokens_in, tokens_out = tokens_in + completion.tokens_in, tokens_out + completion.tokens_out
        if len(reasons) == len(scores):
            yield row, scores, reasons, (tokens_in, tokens_out)
            reasons, tokens_in, tokens_out = [], 0, 0


def reason_fault(reason: str) -> str:
    """Return why a reason cannot teach: nothing written, or it names a number of points."""
    if not reason:
        return "no reason"
    if re.search(r"(?i)\bscore\b|\brat(?:ed|ing)\b|\b\d\s*(?:/|out of|of)\s*\d|\bpoints?\b", reason):
        return "the reason names the score"
    return ""


def human_scores(ranked: Row, score_range: tuple[float, float]) -> list[int | None]:
    """Return a score of 0..5 for each reply, from what people thought of it.

    Human scores are mapped linearly from `score_range`; ranks by their place between the best (5)
    and the worst (0) of the prompt, replies of one rank alike. Where all ranks are the same
    they tell nothing, and each score is None.
    """
    replies = ranked["responses"]
    if all(is_number(reply.get("score")) for reply in replies):
        low, high = score_range
        for reply in replies:
            if not low <= reply["score"] <= high:
                raise BadRow(
                    f"the human score {reply['score']} is not within {low} to {high}: --score-low, --score-high"
                )
        return [round(5 * (reply["score"] - low) / (high - low)) for reply in replies]
    places = sorted({human_value(reply) for reply in replies})
    if len(places) == 1:
        return [None for _ in replies]
    return [round(5 * places.index(human_value(reply)) / (len(places) - 1)) for reply in replies]


def eft_row(response: Row, target: str, score: float, template: Template, sample: str = "") -> Row:
    """Return an EFT row: the judge's prompt, the judgement to learn, and where it comes from."""
    return {
        **{key: value for key, value in response.items() if key not in ("response", "k", "human")},
        "id": response["id"] + sample,
        "prompt": judge_prompt(response["prompt"], response["response"], template),
        "completion": [{"role": "assistant", "content": target}],
        "prompt_id": response["prompt_id"],
        "score": score,
        "template": template.name,
    }
