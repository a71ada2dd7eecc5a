"""LLM-as-a-meta-judge: judgements of one reply compared two by two (arXiv 2407.19594, section 2.2)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, groupby
from statistics import pvariance

from srlm_cli.engines.base import Completion, Engine, Request, Sampling, template_refusal
from srlm_cli.errors import BadRow
from srlm_cli.records import Record, as_text, is_number, judged_record, prompt_key
from srlm_cli.seeds import derive
from srlm_cli.stages import Outcome
from srlm_cli.stages.evidence import refuse_other_evidence
from srlm_cli.stages.judge import judge_prompt
from srlm_cli.stages.lookahead import generate_for
from srlm_cli.stages.rescore import stored_record
from srlm_cli.stages.verdicts import verdict_of
from srlm_cli.templates import Template


@dataclass(frozen=True)
class MetaOptions:
    """The templates of the judge and the meta-judge, how it is sampled, and the number of replies per prompt.

    The meta-judge compares the judgements of the `replies` per prompt whose K scores vary most (the paper: one),
    because there the judge is least certain. `direct` requests the verdict without reasons, by the probability of the
    template's choices.
    """

    template: Template
    meta_template: Template
    sampling: Sampling
    seed: int
    replies: int = 1
    direct: bool = False


@dataclass
class Contest:
    """A reply with its K judgements as training targets, None for those without a readable score."""

    row: Record
    targets: list[str | None]
    task: list[dict[str, str]]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The judgements to compare, two by two, by their place."""
        return list(combinations((k for k, target in enumerate(self.targets) if target is not None), 2))


@dataclass
class Session:
    """One prompt: the contests of its replies, the number of its rows, and the rows that were dropped."""

    read: int
    at_end: bool
    contests: list[Contest]
    dropped: dict[str, int]
    completions: list[Completion] = field(default_factory=list)

    @property
    def asked(self) -> int:
        """How many questions the meta-judge answers: two for each pair of judgements."""
        return 2 * sum(len(contest.pairs) for contest in self.contests)


def meta_judge(rows: Iterable[Record], engine: Engine, options: MetaOptions) -> Iterator[Outcome]:
    """Yield, for each prompt, the replies whose judgements were compared, with their `battles`.

    The meta-judge sees each pair of judgements in both orders. A battle has the indices `a` and `b`, and two
    `verdicts`: with a shown first, and with b shown first (A is the one shown first). `targets` are the compared
    texts, `judge_prompt` is their prompt. A judgement without a readable score, or equal to another one, is null. All
    other replies are dropped and counted.
    """
    sessions: deque[Session] = deque()

    def questions() -> Iterator[tuple[Session, Contest, int, int, bool]]:
        for session in sessions_of(rows, options):
            sessions.append(session)
            for contest in session.contests:
                for a, b in contest.pairs:
                    yield session, contest, a, b, False
                    yield session, contest, a, b, True

    def ask(question: tuple[Session, Contest, int, int, bool]) -> Request:
        return request(*question[1:], options)

    for (session, *_), completion in generate_for(questions(), ask, engine):
        while sessions[0] is not session:  # nothing to compare in these
            yield outcome(sessions.popleft(), engine.model, options)
        session.completions.append(completion)
        if len(session.completions) == session.asked:
            yield from outcomes(sessions.popleft(), engine.model, options)
    while sessions:
        yield outcome(sessions.popleft(), engine.model, options)


def outcomes(session: Session, model: str, options: MetaOptions) -> Iterator[Outcome]:
    """Yield the outcome of a prompt; if the chat template refuses a request, all its rows are bad."""
    if refusal := next(filter(None, map(template_refusal, session.completions)), ""):
        yield from (Outcome(bad=refusal, at_end=session.at_end) for _ in range(session.read))
    else:
        yield outcome(session, model, options)


def sessions_of(rows: Iterable[Record], options: MetaOptions) -> Iterator[Session]:
    """Yield each prompt with its consecutive replies; the last one is final only at the end of the input."""
    waiting: list[Record] = []
    for _, group in groupby(rows, key=lambda row: row["prompt_id"]):
        if waiting:
            yield session_of(waiting, False, options)
        waiting = list(group)
    if waiting:
        yield session_of(waiting, True, options)


def session_of(rows: list[Record], at_end: bool, options: MetaOptions) -> Session:
    """Return the contests of a prompt: the replies on which the judge was least certain."""
    dropped: Counter[str] = Counter()
    found = []
    for row in rows:
        contest = Contest(row, targets_of(row, options.template), task_of(row, options.template))
        if contest.pairs:
            found.append(contest)
        else:
            dropped["fewer than two readable judgements"] += 1
    least_sure = sorted(found, key=lambda one: (-variance(one.row), derive(options.seed, "meta-reply", one.row["id"])))
    dropped["another reply varies more"] += len(least_sure[options.replies :])
    ids = {contest.row["id"] for contest in least_sure[: options.replies]}
    return Session(len(rows), at_end, [one for one in found if one.row["id"] in ids], dict(+dropped))


def task_of(row: Record, template: Template) -> list[dict[str, str]]:
    """Return the judge's prompt for a row."""
    judge = row["judge"] if isinstance(row.get("judge"), dict) else {}
    return judge_prompt(row, template, judge.get("system"), last_turn=judge.get("conversation") == "last")


def targets_of(row: Record, template: Template) -> list[str | None]:
    """Return each judgement up to its score; None for a judgement without a score or equal to an earlier one."""
    targets: list[str | None] = []
    for text in row["judgements"]:
        readable = template.score(text) is not None
        target = text[: template.last_match(text).end] if readable else None
        targets.append(None if target in targets else target)
    return targets


def variance(row: Record) -> float:
    """Return the variance of the scores of a reply that are not null."""
    return pvariance([score for score in row["scores"] if score is not None] or [0.0])


def request(contest: Contest, a: int, b: int, swapped: bool, options: MetaOptions) -> Request:
    """Return the request to compare two judgements, in one order."""
    first, second = (b, a) if swapped else (a, b)
    template = options.meta_template
    asked = template.chat(
        task=as_text(contest.task), first=contest.targets[first] or "", second=contest.targets[second] or ""
    )
    seeds = (derive(options.seed, "meta", contest.row["id"], a, b, swapped),)
    begin = {"prefix": template.finish, "choices": template.choices} if options.direct else {}
    return Request(asked, options.sampling, seeds, **begin)


def outcome(session: Session, model: str, options: MetaOptions) -> Outcome:
    """Return the rows of a prompt, with battles decided by the answers, in the order of the requests."""
    verdicts = [verdict_of(answer, options.meta_template, options.direct) for answer in session.completions]
    said = iter(verdicts)
    template = options.meta_template
    made = [
        {
            **contest.row,
            "prompt_key": prompt_key(contest.row["prompt"]),
            "judge_prompt": contest.task,
            "targets": contest.targets,
            "battles": [{"a": a, "b": b, "verdicts": [next(said), next(said)]} for a, b in contest.pairs],
            "meta_judge": {"model": model, "template": template.name, "template_hash": template.hash},
        }
        for contest in session.contests
    ]
    return Outcome(
        rows=made,
        read=session.read,
        dropped=session.dropped,
        counts={"verdicts": len(verdicts), "unparsed": verdicts.count(None)},
        tokens_in=sum(answer.tokens_in for answer in session.completions),
        tokens_out=sum(answer.tokens_out for answer in session.completions),
        at_end=session.at_end,
    )


def meta_judgeable(row: Record, template: Template) -> Record:
    """Return a judged record that has its judgements, each with a score or null; raise BadRow for any other.

    A record of another judge template is a bad row, because its judgements answer another prompt. So is a record with
    scores only, because there is no text to compare.
    """
    row = stored_record(judged_record(row))
    scores = row.get("scores")
    right = isinstance(scores, list) and all(score is None or is_number(score) for score in scores)
    if not right or len(scores) != len(row["judgements"]):
        raise BadRow("expected `scores`, a number or null for each of the `judgements`")
    if row.get("score_from") == ["direct"]:
        raise BadRow(
            "its score was read without reasons, so there is no judgement to compare: "
            "judge with reasons (--template additive), or several times (--score text --num-judgements 11)"
        )
    if template.uses("evidence"):
        refuse_other_evidence(row)
    judge = row["judge"] if isinstance(row.get("judge"), dict) else {}
    if judge.get("template_hash", template.hash) != template.hash:
        name = judge.get("template")
        raise BadRow(
            f"judged with the template {name}, not with {template.name} as it is: --template names the judge's"
        )
    return row
