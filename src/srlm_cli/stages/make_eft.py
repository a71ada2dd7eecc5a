"""EFT rows: the judge's own task as fine-tuning data, from replies that people ranked.

`accept` is the method of the paper (arXiv 2401.10020, section 3.1.1): the model judges, and judgements are kept if
their scores order the replies as people did. `hindsight` is for a model that cannot judge yet: the human rank gives
the score, and the model writes reasons for it, or the score has no reasons.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from srlm_cli.engines.base import Engine, Request, Sampling, template_refusal
from srlm_cli.records import KWARGS, Record, as_text, prompt_key, responses_of
from srlm_cli.seeds import derive, share
from srlm_cli.stages import Outcome
from srlm_cli.stages.evidence import EvidenceOptions, count_found, evidence_text, with_evidence
from srlm_cli.stages.judge import Judged, Judgement, JudgeOptions, judge_prompt, judgements_of
from srlm_cli.stages.lookahead import generate_for
from srlm_cli.stages.rank_scores import RankScores
from srlm_cli.templates import Template

THIN_FROM = 20


@dataclass(frozen=True)
class EftOptions:
    """The judge's template, how it is sampled, and the maximum share of the rows with the same score.

    `num_judgements` are drawn for each reply (`accept`), `rows_per_reply` are made from it (`hindsight`).
    `ties` lets equal scores of the model agree with any order of people's. `system` is the judge's system message, and
    `template_kwargs` are what its chat template is given: the rows name them. `evidence` says which passages the judge
    is shown.
    """

    template: Template
    sampling: Sampling
    seed: int
    num_judgements: int = 4
    rows_per_reply: int = 1
    ties: bool = False
    max_share: float = 1.0
    force_score: bool = False
    rank_scores: RankScores | None = None
    reason_template: Template | None = None
    system: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    evidence: EvidenceOptions | None = None


class Thinning:
    """Drop rows of a score that has more than its share already (the paper thins out the score 4)."""

    def __init__(self, max_share: float, kept: Iterable[Record] = ()) -> None:
        self.max_share = max_share
        self.kept = Counter(row["score"] for row in kept)

    def split(self, rows: list[Record]) -> tuple[list[Record], int]:
        """Return the rows to keep and how many are dropped."""
        keep = []
        for row in rows:
            total = self.kept.total()
            if total < THIN_FROM or self.kept[row["score"]] + 1 <= self.max_share * (total + 1):
                self.kept[row["score"]] += 1
                keep.append(row)
        return keep, len(rows) - len(keep)


def thinned(rows: Iterable[Record], max_share: float, *, kept: Iterable[Record] = ()) -> Iterator[Outcome]:
    """Yield EFT records unchanged, without those whose score already has more than its share.

    Records that were made with a `max_share` of 1, also in several parts, become those of one run with this share.
    """
    thinning = Thinning(max_share, kept)
    for row in rows:
        keep, dropped = thinning.split([row])
        yield Outcome(rows=keep, dropped={"targets: score too common": dropped} if dropped else {})


def accept(
    ranked: Iterable[Record], engine: Engine, options: EftOptions, *, kept: Iterable[Record] = ()
) -> Iterator[Outcome]:
    """Yield, for each ranked prompt, the EFT rows of the judgements that agree with people.

    Sample j of all its replies is one ranking of them; if it orders every pair that people ordered
    in the same way, all its judgements become rows. A tie of the model agrees only with `ties`.
    """
    thinning = Thinning(options.max_share, kept)
    judging = JudgeOptions(
        options.template,
        options.num_judgements,
        options.sampling,
        options.seed,
        force_score=options.force_score,
        system=options.system,
        evidence=options.evidence,
    )
    waiting: list[Record] = []

    def replies() -> Iterator[Record]:
        for row in ranked:
            waiting.append(row)
            yield from responses_of(row)

    group: list[Judged] = []
    for judged in judgements_of(replies(), engine, judging):
        group.append(judged)
        if len(group) == len(waiting[0]["responses"]):
            waiting.pop(0)
            yield accepted(group, options, thinning)
            group = []


def accepted(group: list[Judged], options: EftOptions, thinning: Thinning) -> Outcome:
    """Return the outcome of one prompt: `group` holds each of its responses with its judgements.

    A response that no model wrote was not judged; the others are compared without it.
    """
    if refusal := next((one.refusal for one in group if one.refusal), ""):
        return Outcome(bad=refusal)
    judgements_asked = options.num_judgements * len(group)
    dropped: Counter[str] = Counter()
    if missing := sum(not one.judgements for one in group):
        dropped["judgements: no reply"] += options.num_judgements * missing
        group = [one for one in group if one.judgements]
    human = [one.response["human"] for one in group]
    outcome = Outcome(tokens_in=sum(one.tokens_in for one in group), tokens_out=sum(one.tokens_out for one in group))
    rows = []
    for j in range(options.num_judgements if group else 0):
        judgements = [one.judgements[j] for one in group]
        scores = [judgement.score for judgement in judgements]
        if any(score is None for score in scores):
            dropped["judgements: no score"] += len(group)
        elif not agrees(human, scores, options.ties):
            dropped["judgements: not in the order of people"] += len(group)
        else:
            for one, judgement in zip(group, judgements, strict=True):
                target = ending_in_score(judgement, options.template)
                row = eft_row(one.response, target, judgement.score, options, f"/{j}")
                rows.append({**row, "thought": judgement.thought.text} if judgement.thought else row)
    found = count_found(one.response for one in group) if options.evidence else {}
    outcome.counts = {"judgements": judgements_asked, "accepted": len(rows), **found}
    outcome.rows, thinned = thinning.split(rows)
    if thinned:
        dropped["judgements: score too common"] += thinned
    outcome.dropped = dict(dropped)
    return outcome


def agrees(human: list[float], scores: list[float], ties: bool) -> bool:
    """Return whether scores order every pair of replies as people did; pairs that people tied do not count."""
    for a, b in combinations(range(len(human)), 2):
        wanted, given = human[a] - human[b], scores[a] - scores[b]
        if wanted and (wanted * given < 0 or (given == 0 and not ties)):
            return False
    return len(set(human)) > 1


def ending_in_score(judgement: Judgement, template: Template) -> str:
    """Return a judgement as a training target: cut after its last score, or with the score that was requested."""
    if judgement.score_from == "finish":
        return with_score(judgement.text, f"{judgement.score:g}", template)
    last = template.last_match(judgement.text)
    return judgement.text[: last.end] if last else judgement.text


def with_score(reason: str, score: str, template: Template) -> str:
    """Return reasons followed by the line with the score."""
    return (reason + "\n" if reason else "") + template.finish + score


def hindsight(
    ranked: Iterable[Record], engine: Engine | None, options: EftOptions, *, kept: Iterable[Record] = ()
) -> Iterator[Outcome]:
    """Yield, for each ranked prompt, `rows_per_reply` EFT rows per reply, their scores taken from people's ranking.

    With `reason_template` the engine writes the reasons, given the score; those that state another
    score or repeat their instruction are dropped. Without it the target is the score alone.
    """
    thinning = Thinning(options.max_share, kept)
    for responses, scores, reasons, spent, refusal in with_reasons(ranked, engine, options):
        if refusal:
            yield Outcome(bad=refusal)
            continue
        rows, dropped = [], Counter()
        replies = [response for response in responses for _ in range(options.rows_per_reply)]
        for at, (response, score, reason) in enumerate(zip(replies, scores, reasons, strict=True)):
            why = "all ranked alike by people" if score is None else ""
            if why := why or (reason_fault(reason, score, options) if options.reason_template else ""):
                dropped[f"targets: {why}"] += 1
                continue
            target = with_score(reason, str(score), options.template)
            sample = f"/{at % options.rows_per_reply}" if options.rows_per_reply > 1 else ""
            rows.append(eft_row(response, target, float(score), options, sample))
        rows, thinned = thinning.split(rows)
        if thinned:
            dropped["targets: score too common"] += thinned
        counts = {"targets": len(scores), **(count_found(responses) if options.evidence else {})}
        yield Outcome(rows=rows, dropped=dict(dropped), counts=counts, tokens_in=spent[0], tokens_out=spent[1])


def scores_of(row: Record, options: EftOptions) -> list[int | None]:
    """Return `rows_per_reply` scores for each reply, reply by reply; their uniforms are spread evenly over [0, 1)."""
    first = share(options.seed, "mark", row["id"])
    uniforms = [(first + j / options.rows_per_reply) % 1.0 for j in range(options.rows_per_reply)]
    drawn = [options.rank_scores.of(row, uniform) for uniform in uniforms]
    return [scores[at] for at in range(len(row["responses"])) for scores in drawn]


def with_reasons(ranked: Iterable[Record], engine: Engine | None, options: EftOptions) -> Iterator[tuple]:
    """Yield for each ranked row its replies, the scores of its targets, a reason for each, tokens, a refusal or "".

    The replies are response records, with passages if they are looked for. Tokens are (in, out).
    """
    waiting: deque[Record] = deque()

    def replies() -> Iterator[list[Record]]:
        for row in ranked:
            waiting.append(row)
            yield responses_of(row)

    for group in with_evidence(replies(), engine, options.evidence, options.sampling):
        shown = ((responses, scores_of(waiting.popleft(), options), spent) for responses, spent in group)
        if options.reason_template:
            yield from reasons_for(shown, engine, options)
        else:
            yield from ((responses, scores, [""] * len(scores), spent, "") for responses, scores, spent in shown)


def reasons_for(shown: Iterable[tuple], engine: Engine, options: EftOptions) -> Iterator[tuple]:
    """Yield what `with_reasons` yields, with reasons of the engine; takes (replies, scores, tokens so far)."""

    def ask(place: tuple) -> Request:
        (responses, scores, _), at = place
        response = responses[at // options.rows_per_reply]
        facts = {"evidence": evidence_text(response["evidence"])} if options.evidence else {}
        asked = options.reason_template.chat(
            prompt=as_text(response["prompt"]),
            response=response["response"] or "",
            score=str(scores[at]),
            high=f"{options.template.high:g}",
            **facts,
        )
        return Request(asked, options.sampling, (derive(options.seed, "reason", response["prompt_id"], at),))

    places = ((one, at) for one in shown for at in range(len(one[1])))
    reasons, used, refusal = [], (0, 0), ""
    for ((responses, scores, spent), _), completion in generate_for(places, ask, engine):
        reasons.append(completion.texts[0].strip() if completion.finish_reasons[0] == "stop" else "")
        used = used[0] + completion.tokens_in, used[1] + completion.tokens_out
        refusal = refusal or template_refusal(completion)
        if len(reasons) == len(scores):
            yield responses, scores, reasons, (used[0] + spent[0], used[1] + spent[1]), refusal
            reasons, used, refusal = [], (0, 0), ""


# A score named in passing: "4/5", "4 out of 5", "three points", "rated 4", "a score of 2".
NUMBER = r"(\d+(?:\.\d+)?|zero|one|two|three|four|five|six|seven|eight|nine|ten)"
NAMED_SCORE = re.compile(
    rf"(?i)\b(?:scor|rat|grad|mark)(?:e|es|ed|ing|s)?\b\W+(?:(?:of|as|is|it|a|at)\W+)*{NUMBER}\b"
    rf"|\b{NUMBER}\s*(?:/|out of)\s*\d|\b{NUMBER}\s+(?:points?|stars?)\b"
)
NAMES = {name: at for at, name in enumerate("zero one two three four five six seven eight nine ten".split())}
LEAKED_WORDS = 5


def reason_fault(reason: str, score: int, options: EftOptions) -> str:
    """Return why a reason cannot teach: nothing written, another score in it, or its instruction."""
    if not reason:
        return "no reason"
    named = [next(filter(None, found)).lower() for found in NAMED_SCORE.findall(reason)]
    if options.template.score(reason) is not None or any(_number(n) != score for n in named):
        return "the reason names a score"
    if shared_words(reason, options.reason_template.text):
        return "the reason repeats its instruction"
    return ""


def _number(text: str) -> float:
    return float(NAMES.get(text, text))


def shared_words(text: str, other: str) -> bool:
    """Return whether two texts share `LEAKED_WORDS` consecutive words."""
    runs = [
        {tuple(words[at : at + LEAKED_WORDS]) for at in range(len(words) - LEAKED_WORDS + 1)}
        for words in (re.findall(r"\w+", part.lower()) for part in (text, other))
    ]
    return bool(runs[0] & runs[1])


def eft_row(response: Record, target: str, score: float, options: EftOptions, sample: str = "") -> Record:
    """Return an EFT row: the judge's prompt, the judgement to learn, and where it comes from."""
    template = options.template
    asked = judge_prompt(response, template, options.system)
    return {
        **{key: value for key, value in response.items() if key not in ("response", "thought", "k", "human", KWARGS)},
        **({KWARGS: options.template_kwargs} if options.template_kwargs else {}),
        "id": response["id"] + sample,
        "prompt": asked,
        "completion": [{"role": "assistant", "content": target}],
        "prompt_id": response["prompt_id"],
        "prompt_key": prompt_key(response["prompt"]),
        "score": score,
        "template": template.name,
    }
