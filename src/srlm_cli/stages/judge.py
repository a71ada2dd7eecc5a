"""LLM-as-a-judge: K judgements of each response, their scores averaged (arXiv 2401.10020, section 2.2)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import fmean
from typing import Any

from srlm_cli.engines.base import Completion, Engine, Request, Sampling, template_refusal
from srlm_cli.errors import EngineError
from srlm_cli.records import ENDS, KWARGS, Message, Record, as_messages, as_text, is_reply, with_system
from srlm_cli.rules import asked_in
from srlm_cli.seeds import derive
from srlm_cli.stages import Outcome, closed_thoughts, counts_of_ends
from srlm_cli.stages import criteria as of_criteria
from srlm_cli.stages.evidence import EvidenceOptions, Replies, count_found, evidence_text, with_evidence
from srlm_cli.stages.lookahead import generate_for
from srlm_cli.templates import JUDGED, Template
from srlm_cli.templates import criteria as criteria_of
from srlm_cli.templates.criteria import Criterion, Finding
from srlm_cli.thoughts import UNFINISHED, Thought

Check = Callable[[Record], Record | list[Record]]

READ_TOGETHER = 64
CHOSEN_TOGETHER = 8  # few: what an engine keeps of them from one criterion to the next needs memory
OF_JUDGES_BEFORE = ("score_mass", "judge_thoughts", "score_judge", "score_rules", "comparisons", "places")
# Of SmolLM2-135M, untrained, all scores together have 0.51 at least of the probability where one is asked for, and 0.13
# at most where an answer begins.
MIN_SCORE_MASS = 0.2


@dataclass(frozen=True)
class JudgeOptions:
    """`num_judgements` judgements per response (the paper's K) with a template, and how their scores are read.

    `score` is `text`, the number at the end of the judgement (the paper), or `expected`, the expectation over the
    template's choices at the position of that number: sum of p(k) k. With `force_score` a judgement without a score
    gets one: the template's `finish` is appended and the score is requested. An expectation is null if the choices
    have less than `min_score_mass` of the probability, because the judge would have written something else. None is
    `MIN_SCORE_MASS`, or 0 with criteria: a value is then chosen among those of its scale, whatever else was probable.
    `system` is the system message of the judge, `template_kwargs` are the options of its chat template.
    `evidence` says which passages are found for `$evidence`. With `last_turn` the judge sees only the last message of
    the prompt, not the conversation before it.
    """

    template: Template
    num_judgements: int
    sampling: Sampling
    seed: int
    force_score: bool = False
    score: str = "text"
    min_score_mass: float | None = None
    system: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    evidence: EvidenceOptions | None = None
    last_turn: bool = False

    @property
    def least_mass(self) -> float:
        """The probability that all scores have at least where an expectation is read."""
        if self.min_score_mass is None:
            return 0.0 if self.template.criteria else MIN_SCORE_MASS
        return self.min_score_mass

    @property
    def asks_again(self) -> bool:
        """Whether probabilities of scores are asked for."""
        return self.force_score or self.score == "expected"


@dataclass(frozen=True)
class Judgement:
    """One text of the judge without its `thought`, with its score, or None if it cannot be read.

    `score_from` is `text` or `expected` if the judge wrote a score, `finish` if a missing score was requested,
    `direct` if only the score was requested, None without a score. `mass` is the total probability of all scores at
    that position, None if it was not requested; of criteria it is the least. `findings` are those of each criterion.
    """

    text: str
    score: float | None
    score_from: str | None
    finish_reason: str
    mass: float | None = None
    thought: Thought | None = None
    findings: dict[str, Finding] = field(default_factory=dict)

    @property
    def none_applies(self) -> bool:
        """Whether no criterion applies, so that there is no score."""
        return self.score is None and bool(self.findings) and all(one.score is None for one in self.findings.values())


@dataclass
class Judged:
    """A response with its K judgements and their token counts; or the `refusal` of the chat template."""

    response: Record
    judgements: list[Judgement]
    tokens_in: int
    tokens_out: int
    follow_ups: tuple[Completion | None, ...] = ()
    refusal: str = ""


def judge(responses: Iterable[Record], engine: Engine, options: JudgeOptions) -> Iterator[Outcome]:
    """Yield each response with `score`, the mean of `scores`, one per judgement in `judgements`.

    A judgement without a readable score has null in `scores`; a response without any has `score: null`. A response
    that no model wrote (see `records.is_reply`) is not judged and has `score: null`. Scores are read only in the
    judge's own text, never in its prompt.
    """
    for judged in judgements_of(responses, engine, options):
        if judged.refusal:
            yield Outcome(bad=judged.refusal)
            continue
        found = count_found([judged.response]) if options.evidence else {}
        yield Outcome(
            rows=[
                judged_row(
                    judged.response,
                    judged.judgements,
                    judge_of(engine, options),
                    options.asks_again,
                    options.template.criteria,
                )
            ],
            counts=count_judgements(judged.judgements) | ({} if is_reply(judged.response) else {"no reply": 1}) | found,
            tokens_in=judged.tokens_in,
            tokens_out=judged.tokens_out,
        )


def judgements_of(responses: Iterable[Record], engine: Engine, options: JudgeOptions) -> Iterator[Judged]:
    """Yield each response, with its `evidence` if it is looked for, and its K judgements."""
    spent: deque[tuple[int, int]] = deque()
    asking = replace(options, evidence=None)  # what workers are sent

    def shown(group: Iterable[Replies]) -> Iterator[Record]:
        for (row,), tokens in group:
            spent.append(tokens)
            yield row

    for group in with_evidence(([row] for row in responses), engine, options.evidence, options.sampling):
        for judged in judgements_of_shown(shown(group), engine, asking):
            tokens_in, tokens_out = spent.popleft()
            judged.tokens_in, judged.tokens_out = judged.tokens_in + tokens_in, judged.tokens_out + tokens_out
            yield judged


def judgements_of_shown(responses: Iterable[Record], engine: Engine, options: JudgeOptions) -> Iterator[Judged]:
    """Yield each response with its K judgements, with scores as the options say.

    A `direct` template with `expected` gives one judgement for any K, because nothing is drawn at random.
    """
    if of_criteria.piecewise(engine, options.template, options.template_kwargs):
        pending = iter(responses)
        together = CHOSEN_TOGETHER if options.template.direct else READ_TOGETHER
        while group := list(islice(pending, together)):
            yield from judged_by_criteria(group, engine, options)
        return
    if options.score == "expected" and options.template.direct and not options.template.criteria:
        for row, completion in generate_for(responses, about_replies(direct_request, options), engine):
            if completion is None:
                yield Judged(row, [], 0, 0)
                continue
            score = expectation(completion, options)
            text, source = ("", None) if score is None else (options.template.finish + completion.texts[0], "direct")
            judgement = Judgement(text, score, source, completion.finish_reasons[0], completion.mass)
            refusal = template_refusal(completion)
            yield Judged(row, [judgement], completion.tokens_in, completion.tokens_out, refusal=refusal)
        return
    asked = generate_for(responses, about_replies(judge_request, options), engine)
    while group := list(islice(asked, READ_TOGETHER if options.asks_again else 1)):
        judged = [judged_by(done, row, options) if done else Judged(row, [], 0, 0) for row, done in group]
        if options.asks_again:
            read_again(judged, engine, options)
        yield from judged


def judged_by_criteria(rows: list[Record], engine: Engine, options: JudgeOptions) -> Iterator[Judged]:
    """Yield responses with judgements by criteria that are asked for piece by piece."""
    count = 1 if options.score == "expected" and options.template.direct else options.num_judgements
    asked = {at: asked_about(row, options) for at, row in enumerate(rows) if is_reply(row)}
    drafts = {
        at: [of_criteria.Draft(rows[at]["id"], k, messages) for k in range(count)] for at, messages in asked.items()
    }
    of_criteria.write([draft for some in drafts.values() for draft in some], engine, asking(options))
    for at, row in enumerate(rows):
        done = drafts.get(at, [])
        read = [judgement_of(draft, options) for draft in done]
        tokens = sum(draft.tokens_in for draft in done), sum(draft.tokens_out for draft in done)
        yield Judged(row, read, *tokens, refusal=next((draft.refusal for draft in done if draft.refusal), ""))


def asking(options: JudgeOptions) -> of_criteria.Asking:
    """Return how values of criteria are asked for."""
    expected = options.score == "expected"
    return of_criteria.Asking(options.template, options.sampling, options.seed, expected, options.least_mass)


def judgement_of(draft: of_criteria.Draft, options: JudgeOptions) -> Judgement:
    """Return the judgement that was written criterion by criterion."""
    template = options.template
    text = criteria_of.whole(template.criteria, draft.found, template.direct) if draft.found else ""
    score = template.total(draft.found)
    how = "text" if options.score != "expected" else "direct" if template.direct else "expected"
    mass = min(draft.masses, default=None) if options.asks_again else None
    return Judgement(text, score, score if score is None else how, draft.failed or "stop", mass, findings=draft.found)


def judged_by(completion: Completion, row: Record, options: JudgeOptions) -> Judged:
    """Return a response with the judgements of a completion."""
    read = read_judgements(completion, options.template)
    tokens = completion.tokens_in, completion.tokens_out
    return Judged(row, read, *tokens, completion.follow_ups, template_refusal(completion))


def about_replies(
    ask: Callable[[Record, JudgeOptions], Request], options: JudgeOptions
) -> Callable[[Record], Request | None]:
    """Return the request to judge a response, None for a response that no model wrote."""
    return lambda row: ask(row, options) if is_reply(row) else None


def judge_request(row: Record, options: JudgeOptions, places: range | None = None) -> Request:
    """Return the request to judge one response, with K seeds, or those of some of the K `places`."""
    places = range(options.num_judgements) if places is None else places
    seeds = tuple(derive(options.seed, "judge", row["id"], k) for k in places)
    template = options.template
    sampling = replace(options.sampling, last_line=template.last_line)
    follow_up = AskAgain(row, options, places.start) if options.asks_again and not template.criteria else None
    schema = criteria_of.schema(template.criteria, template.direct) if template.criteria else None
    return Request(asked_about(row, options), sampling, seeds, follow_up=follow_up, schema=schema)


def asked_about(row: Record, options: JudgeOptions) -> list[dict[str, str]]:
    """Return the judge's prompt about a response, after the system message where there is one."""
    return judge_prompt(row, options.template, options.system, last_turn=options.last_turn)


@dataclass(frozen=True)
class AskAgain:
    """The `follow_up` of a judgement: the probability of each score at the position of the score.

    With `expected`, this is the position of the written score. With `force_score`, a missing score is requested after
    `finish`. `first` is the place among the K judgements at which those of the completion begin. It is a class, so
    that it can be pickled.
    """

    row: Record
    options: JudgeOptions
    first: int = 0

    def __call__(self, k: int, text: str, thought: Thought | None) -> Request | None:
        """Return the question about judgement `k` of the row, or None where there is none."""
        reason = "stop" if thought is None or thought.closed else UNFINISHED
        return self.about(k, read_judgement(text, reason, self.options.template, thought))

    def about(self, k: int, judgement: Judgement) -> Request | None:
        """Return the question about a judgement that was read."""
        options = self.options
        if not (options.force_score if judgement.score is None else options.score == "expected"):
            return None
        if not can_continue(judgement):
            return None
        return Request(
            asked_about(self.row, options),
            options.sampling,
            (derive(options.seed, "finish", self.row["id"], self.first + k),),
            prefix=before_score(judgement, options.template),
            choices=options.template.choices,
            thought=judgement.thought.raw if judgement.thought else "",
        )


def can_continue(judgement: Judgement) -> bool:
    """Return whether a judgement can be asked for a score after it; raise EngineError if its thought is not known."""
    if judgement.finish_reason not in (*ENDS, "empty", UNFINISHED):  # it never came: there is nothing to continue
        return False
    if judgement.thought and not judgement.thought.raw:
        raise EngineError(
            "the server tells a thought, but not how the model wrote it: it cannot be asked for a score after it",
            "--tokenizer MODEL; or --score text, without --force-score",
        )
    return True


def direct_request(row: Record, options: JudgeOptions) -> Request:
    """Return the request for a score without reasons, after `finish`."""
    return Request(
        asked_about(row, options),
        replace(options.sampling, temperature=0.0),
        (derive(options.seed, "judge", row["id"], 0),),
        prefix=options.template.finish,
        choices=options.template.choices,
    )


def judge_prompt(
    row: Record, template: Template, system: str | None = None, *, last_turn: bool = False
) -> list[Message]:
    """Return the judge's prompt about a response record as messages: the same for judging and for EFT rows.

    It has the whole conversation before the response, or with `last_turn` its last message only.
    Raises BadRow if the record lacks a field that the template needs.
    """
    shown = {"evidence": evidence_text(row["evidence"])} if template.uses("evidence") and "evidence" in row else {}
    asked = template.chat(row, prompt=prompt_text(row, last_turn), response=row["response"] or "", **shown)
    return asked if system is None else with_system(asked, system)


def prompt_text(row: Record, last_turn: bool) -> str:
    """Return the prompt of a record as the judge sees it: all of it, or its last message."""
    return as_text(as_messages(row["prompt"])[-1:] if last_turn else row["prompt"])


def with_fields_of(template: Template, check: Check, replies: Callable[[Record], list[Record]] | None = None) -> Check:
    """Return a check of rows that also refuses those without a field that the template needs, except `evidence`.

    `replies` returns the response records of a row, if it is another kind of row.
    """

    def checked(row: Record) -> Record | list[Record]:
        found = check(row)
        for one in replies(found) if replies else found if isinstance(found, list) else [found]:
            template.refuse_without_fields(one, {*JUDGED, "evidence"})
        return found

    return checked


def prompt_shown(row: Record, options: JudgeOptions, at: str) -> str:
    """Return the judge's prompt about a response as a text for people, with the place that the row was read `at`."""
    if not is_reply(row):
        return f"--- {at}: no reply, it is not judged\n"
    turns = asked_about(row, options)
    if options.template.direct and options.score == "expected" and not options.template.criteria:
        turns = [*turns, {"role": "assistant", "content": options.template.finish}]
    return "".join(f"--- {at}: {turn['role']}\n{turn['content']}\n" for turn in turns)


def prompts_shown(rows: Iterable[tuple[Record, str]], engine: Engine, options: JudgeOptions) -> Iterator[str]:
    """Yield `prompt_shown` of each (response, place), with the passages that are found for it."""
    places: deque[str] = deque()

    def replies() -> Iterator[list[Record]]:
        for row, at in rows:
            places.append(at)
            yield [row]

    for group in with_evidence(replies(), engine, options.evidence, options.sampling):
        for (row,), _ in group:
            yield prompt_shown(row, options, places.popleft())


def read_judgements(completion: Completion, template: Template) -> list[Judgement]:
    """Return the K judgements of a completion, with the last well-formed score of each."""
    return [
        read_judgement(text, reason, template, completion.thought(k))
        for k, (text, reason) in enumerate(zip(completion.texts, completion.finish_reasons, strict=True))
    ]


def read_judgement(text: str, finish_reason: str, template: Template, thought: Thought | None = None) -> Judgement:
    """Return a judgement with its last well-formed score."""
    found = template.findings(text)
    score = template.total(found) if template.criteria else template.score(text)
    source = None if score is None else "text"
    return Judgement(text.strip(), score, source, finish_reason, thought=thought, findings=found)


def read_again(judged: list[Judged], engine: Engine, options: JudgeOptions, first: int = 0) -> None:
    """Replace judgements in place by those with scores from probabilities, as `AskAgain` requests them.

    `first` is the place among the K judgements at which these begin.

    A written score becomes the expectation at its position; a missing score is drawn from the choices, or is their
    expectation. What the engine did not answer together with the completion is requested now.
    """
    if options.template.criteria:
        read_criteria_again(judged, engine, options)
        return
    asked = [
        (one, k, request, one.follow_ups[k] if one.follow_ups else None)
        for one in judged
        for k, judgement in enumerate(one.judgements)
        if (request := AskAgain(one.response, options, first).about(k, judgement))
    ]
    late = engine.generate(request for _, _, request, answer in asked if not answer)
    for one, k, _, answer in asked:
        completion = answer or next(late)
        one.tokens_in, one.tokens_out = one.tokens_in + completion.tokens_in, one.tokens_out + completion.tokens_out
        choice, old = completion.texts[0], one.judgements[k]
        expected = options.score == "expected"
        score = expectation(completion, options) if expected else float(choice) if choice else None
        source = None if score is None else "finish" if old.score is None else "expected"
        one.judgements[k] = replace(old, score=score, score_from=source, mass=completion.mass)


def read_criteria_again(judged: list[Judged], engine: Engine, options: JudgeOptions) -> None:
    """Replace judgements in place by those with expected values, or with the values that were missing."""
    again: list[tuple[Judged, int, of_criteria.Draft, list[Criterion]]] = []
    for one in judged:
        for k, old in enumerate(one.judgements):
            wanted = [
                criterion
                for criterion in options.template.criteria
                if (options.score == "expected" if criterion.name in old.findings else options.force_score)
            ]
            if wanted and can_continue(old):
                thought = old.thought.raw if old.thought else ""
                about = asked_about(one.response, options)
                draft = of_criteria.Draft(one.response["id"], k, about, dict(old.findings), thought=thought)
                again.append((one, k, draft, wanted))
    of_criteria.ask_again([(draft, wanted) for _, _, draft, wanted in again], engine, asking(options))
    for one, k, draft, _ in again:
        old = one.judgements[k]
        score = options.template.total(draft.found)
        source = None if score is None else "finish" if old.score is None and not old.none_applies else "expected"
        mass = min(draft.masses, default=None)
        one.judgements[k] = replace(old, score=score, score_from=source, mass=mass, findings=draft.found)
        one.tokens_in, one.tokens_out = one.tokens_in + draft.tokens_in, one.tokens_out + draft.tokens_out


def before_score(judgement: Judgement, template: Template) -> str:
    """Return the text of the judge before its score, or all of it and `finish` if it has no score."""
    text = judgement.text
    if judgement.score is not None:
        return text[: template.last_match(text).start]
    return (text if text.endswith("\n") or not text else text + "\n") + template.finish


def expectation(completion: Completion, options: JudgeOptions) -> float | None:
    """Return the mean of the template's choices weighted by probability, or None if their total is too small.

    Raises EngineError if the engine cannot return probabilities.
    """
    if not completion.probabilities:
        if completion.finish_reasons[0] in ("stop", "length"):
            raise EngineError(
                "the engine gives no log-probabilities, which an expected score is made of", "--score text"
            )
        return None
    if completion.mass is not None and completion.mass < options.least_mass:
        return None
    choices = options.template.choices
    return sum(p * float(choice) for p, choice in zip(completion.probabilities, choices, strict=True))


def judge_of(engine: Engine, options: JudgeOptions) -> Record:
    """Return the field `judge`: the model and its settings."""
    about = {"model": engine.model, "template": options.template.name, "template_hash": options.template.hash}
    about |= {} if options.system is None else {"system": options.system}
    about |= {"conversation": "last"} if options.last_turn else {}
    about |= {"evidence": options.evidence.about} if options.evidence else {}
    return about | ({KWARGS: options.template_kwargs} if options.template_kwargs else {})


def judged_row(
    row: Record,
    judgements: list[Judgement],
    judge: Record,
    with_mass: bool = False,
    criteria: tuple[Criterion, ...] = (),
) -> Record:
    """Return a response record with its judgements and scores, the mass of the scores if requested, and `criteria`."""
    scores = [judgement.score for judgement in judgements]
    thoughts = [judgement.thought and judgement.thought.text for judgement in judgements]
    readable = [score for score in scores if score is not None]
    return {
        **{key: value for key, value in row.items() if not is_of_a_judge_before(key, value)},
        **({"rules": asked_in(row["rules"])} if isinstance(row.get("rules"), dict) and "score_rules" in row else {}),
        "score": fmean(readable) if readable else None,
        "scores": scores,
        "score_from": [judgement.score_from for judgement in judgements],
        **({"score_mass": [judgement.mass for judgement in judgements]} if with_mass else {}),
        "judgements": [judgement.text for judgement in judgements],
        **({"criteria": [criteria_of.written(one.findings, criteria) for one in judgements]} if criteria else {}),
        **({"judge_thoughts": thoughts} if any(thoughts) else {}),
        "judgement_finish_reasons": [judgement.finish_reason for judgement in judgements],
        "judge": judge,
    }


def is_of_a_judge_before(key: str, value: Any) -> bool:
    """Return whether a field is from an earlier judgement, so that it does not hold for a new one."""
    return key in OF_JUDGES_BEFORE or (key == "criteria" and criteria_of.is_written(value))


def count_judgements(judgements: list[Judgement]) -> dict[str, int]:
    """Count judgements: all, unparsed, with a forced score, with too low a mass, cut off, and not written."""
    return {
        "judgements": len(judgements),
        "unparsed": sum(judgement.score is None for judgement in judgements),
        "forced scores": sum(judgement.score_from == "finish" for judgement in judgements),
        "low score mass": sum(
            one.score is None and one.mass is not None and not one.none_applies for one in judgements
        ),
        **({"no criterion applies": none} if (none := sum(one.none_applies for one in judgements)) else {}),
        **counts_of_ends(judgement.finish_reason for judgement in judgements),
        **closed_thoughts(judgement.thought for judgement in judgements),
    }
