"""Draw judgements of the replies to a prompt until its best and its worst reply are settled."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from math import sqrt
from statistics import NormalDist, fmean

from srlm_cli.engines.base import Completion, Engine, Request
from srlm_cli.records import Record
from srlm_cli.stages import Outcome
from srlm_cli.stages.evidence import count_found, with_evidence
from srlm_cli.stages.judge import (
    Judgement,
    JudgeOptions,
    count_judgements,
    judge_of,
    judge_request,
    judged_by,
    judged_row,
    read_again,
)
from srlm_cli.stages.rounds import IsNew, Prompt, in_rounds, prompts_of
from srlm_cli.stages.seen import never_seen

# Before any judgement is known, scores vary by a fifth of the scale, with the weight of one judgement: two equal scores
# do not say that a judge never varies.
PRIOR_SPREAD = 0.2


@dataclass(frozen=True)
class SettleOptions(JudgeOptions):
    """`first` judgements per reply in the first round, one in each other round, `num_judgements` at most.

    A prompt is settled if the judgements that are left would change its best or its worst reply with a probability of
    at most 1 - `settle` each.
    """

    first: int = 2
    settle: float = 0.9


@dataclass
class AdaptiveJudging:
    """The judging of one prompt (see `rounds.Judging`); `asked` are the replies of the last round, by place."""

    prompt: Prompt
    options: SettleOptions
    engine: Engine
    judgements: dict[int, list[Judgement]] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def ask(self) -> list[Request]:
        """Return the requests of the next round, one per reply that can still be the best or the worst."""
        self.asked = self.undecided() if self.judgements else self.prompt.replies
        rows, options = self.prompt.rows, self.options
        return [judge_request(rows[at], options, self.next_places(at)) for at in self.asked]

    def next_places(self, at: int) -> range:
        """Return which of the K judgements of a reply are next."""
        drawn = len(self.judgements.get(at, ()))
        return range(drawn, drawn + 1 if drawn else self.options.first)

    def take(self, answers: list[Completion]) -> None:
        """Take the judgements of a round."""
        for at, answer in zip(self.asked, answers, strict=True):
            judged = judged_by(answer, self.prompt.rows[at], self.options)
            found = self.judgements.setdefault(at, [])
            if self.options.asks_again:
                read_again([judged], self.engine, self.options, len(found))
                self.prompt.tokens_in += judged.tokens_in - answer.tokens_in
                self.prompt.tokens_out += judged.tokens_out - answer.tokens_out
            found += judged.judgements

    def undecided(self) -> list[int]:
        """Return the replies, by place, that need more judgements and can have them."""
        scores = [[one.score for one in found if one.score is not None] for found in self.judgements.values()]
        drawn = [len(found) for found in self.judgements.values()]
        wanted = contenders(scores, drawn, self.options)
        places = list(self.judgements)
        return [places[at] for at in sorted(wanted) if drawn[at] < self.options.num_judgements]


def contenders(scores: list[list[float]], drawn: list[int], options: SettleOptions) -> set[int]:
    """Return which replies need more judgements until the best and the worst are settled, none if they are.

    `scores` are the readable scores of each reply, `drawn` is its number of judgements. The mean of all judgements,
    given those so far, is taken as normal; the spread of a judgement is that of all replies together, with a prior.
    Each end is settled if the probabilities that another reply overtakes add up to 1 - `settle` at most. Replies whose
    mean equals that of the end overtake it only if a score differs from those before: the end moves inwards, or one of
    them outwards. Inwards is as probable as the mean is near its end of the scale. A reply without a readable score
    needs more; with one reply there is nothing to settle.
    """
    if len(scores) < 2:
        return set()
    known = [at for at, found in enumerate(scores) if found]
    wanted = {at for at, found in enumerate(scores) if not found}
    if len(known) < 2:
        return wanted | set(known)
    means = {at: fmean(scores[at]) for at in known}
    squares = sum((score - means[at]) ** 2 for at in known for score in scores[at])
    prior = (PRIOR_SPREAD * (options.template.high - options.template.low)) ** 2
    variance = (squares + prior) / (sum(len(scores[at]) for at in known) - len(known) + 1)
    of_mean = {at: variance * (1 - drawn[at] / options.num_judgements) / len(scores[at]) for at in known}
    left = {at: options.num_judgements - drawn[at] for at in known}
    repeated, differing = repeats(scores)
    order = sorted(known, key=means.__getitem__)
    low, high = options.template.low, options.template.high
    for end, others, inner in ((order[-1], order[:-1], low), (order[0], order[1:], high)):
        changes = {
            other: overtakes(abs(means[end] - means[other]), sqrt(of_mean[end] + of_mean[other])) for other in others
        }
        level = [other for other in others if means[other] == means[end]]
        apart = sum(changes[other] for other in others if other not in level)
        inwards = abs(means[end] - inner) / (high - low)
        of_level = chance_to_differ(repeated, differing, sum(left[other] for other in level))
        tie_breaks = inwards * chance_to_differ(repeated, differing, left[end]) + (1 - inwards) * of_level
        if apart + min(tie_breaks, sum(changes[other] for other in level)) > 1 - options.settle:
            most = (1 - options.settle) / len(others)
            wanted |= {end, *(other for other, change in changes.items() if change > most)}
    return wanted


def overtakes(gap: float, deviation: float) -> float:
    """Return the probability that a gap between two means, with this deviation of its final value, turns round."""
    return NormalDist(0, deviation).cdf(-gap) if deviation else 0.0


def repeats(scores: list[list[float]]) -> tuple[int, int]:
    """Return how many scores came after the first of their reply, and how many differ from its most common score."""
    repeated = sum(len(found) - 1 for found in scores if found)
    return repeated, sum(len(found) - max(Counter(found).values()) for found in scores if found)


def chance_to_differ(repeated: int, differing: int, left: int) -> float:
    """Return the probability that one of the judgements that are `left` differs from the most common score.

    If some of the repeated judgements differ, it comes from their share, with half a judgement that differs and half a
    one that does not (the Jeffreys prior). If none does, nothing is assumed of the rate: it is the probability that
    none of those differs and one that is left does, r**repeated * (1 - r**left), at the r for which it is highest. So
    a judge of any rate is stopped too early with this probability at most.
    """
    if not left:
        return 0.0
    if differing:
        return 1 - (1 - (differing + 0.5) / (repeated + 1)) ** left
    share = repeated / (repeated + left)  # r**left is that at the highest
    return share ** (repeated / left) * (1 - share)


def judge_until_settled(
    responses: Iterable[Record], engine: Engine, options: SettleOptions, is_new: IsNew | None = None
) -> Iterator[Outcome]:
    """Yield the responses to each prompt as `judge` does, with as many judgements as its best and worst reply need.

    In each round the replies that can still be the best or the worst get more judgements. Judgement k of a reply has
    the seed that it has with any number of judgements: what was drawn is the beginning of what more would have been.
    The responses to a prompt must be consecutive; `is_new` remembers the prompts.
    """
    prompts = with_passages(prompts_of(responses, is_new or never_seen()), engine, options)
    asking = replace(options, evidence=None)  # what workers are sent
    for one in in_rounds((AdaptiveJudging(prompt, asking, engine) for prompt in prompts), engine):
        found, judge = one.judgements, judge_of(engine, options) | {"settle": options.settle}
        every = list(chain.from_iterable(found.values()))
        left = options.num_judgements * len(found) - len(every)
        counts = count_judgements(every) | {"judgements saved": left, "prompts settled early": int(left > 0)}
        counts |= count_found(one.prompt.rows) if options.evidence else {}
        rows = [judged_row(row, found.get(at, []), judge, options.asks_again) for at, row in enumerate(one.prompt.rows)]
        yield from one.prompt.outcomes([] if one.prompt.bad else rows, counts)


def with_passages(prompts: Iterable[Prompt], engine: Engine, options: SettleOptions) -> Iterator[Prompt]:
    """Yield each prompt, its responses with their `evidence` if it is looked for: once, before their first round."""
    waiting: deque[Prompt] = deque()

    def replies() -> Iterator[list[Record]]:
        for prompt in prompts:
            waiting.append(prompt)
            yield [] if prompt.bad else prompt.rows

    for group in with_evidence(replies(), engine, options.evidence, options.sampling):
        for rows, (tokens_in, tokens_out) in group:
            prompt = waiting.popleft()
            prompt.rows = rows or prompt.rows
            prompt.tokens_in, prompt.tokens_out = tokens_in, tokens_out
            yield prompt
