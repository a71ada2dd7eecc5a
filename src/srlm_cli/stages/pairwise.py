"""Score the replies to a prompt by comparing them two by two, in both orders (arXiv 2401.10020, section 3.2).

The scores are those of a Bradley-Terry model of each prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from srlm_cli.engines.base import Completion, Engine, Request
from srlm_cli.records import FULL_SCORE, Record, with_system
from srlm_cli.seeds import derive
from srlm_cli.stages import Outcome, closed_thoughts, counts_of_ends
from srlm_cli.stages.judge import Judgement, JudgeOptions, judge_of, judged_row, prompt_text
from srlm_cli.stages.rounds import IsNew, Prompt, at_once, in_rounds, prompts_of
from srlm_cli.stages.seen import never_seen
from srlm_cli.stages.verdicts import probability_of, verdict_of
from srlm_cli.stats.bradley_terry import PRIOR, SHARE, strengths

if TYPE_CHECKING:
    from numpy import ndarray

BY = "pairwise"
DIGITS = 9  # of a score: Newton's method leaves less between equal replies


@dataclass(frozen=True)
class PairwiseOptions(JudgeOptions):
    """`num_judgements` verdicts per pair and order. `direct` reads a verdict from the probabilities of the choices.

    With `comparisons` each reply is compared with this number of others at most, in Swiss rounds: the best so far with
    the next best that it has not met. Without it, with all others.
    """

    comparisons: int | None = None
    direct: bool = False


@dataclass(frozen=True)
class Game:
    """One verdict on two replies, by their places: `share` of a win for the first shown, None if unreadable."""

    first: int
    second: int
    share: float | None
    judgement: Judgement

    def share_of(self, place: int) -> float | None:
        """Return the share of a win of one of the two."""
        return self.share if self.share is None or place == self.first else 1 - self.share

    def judgement_of(self, place: int) -> Judgement:
        """Return the verdict as a judgement of one of the two, on the scale of scores."""
        share = self.share_of(place)
        return self.judgement if share is None else replace(self.judgement, score=FULL_SCORE * share, score_from=BY)


@dataclass
class PairwiseJudging:
    """The comparisons of one prompt (see `rounds.Judging`)."""

    prompt: Prompt
    options: PairwiseOptions
    games: list[Game] = field(default_factory=list)
    met: dict[tuple[int, int], None] = field(default_factory=dict)
    rounds: int = 0
    asked: list[tuple[int, int]] = field(default_factory=list)

    def ask(self) -> list[Request]:
        """Return the requests of the next round: each pair of replies in both orders."""
        pairs = self.next_pairs()
        self.met |= dict.fromkeys(pairs)
        self.rounds += 1
        self.asked = [order for a, b in pairs for order in ((a, b), (b, a))]
        rows = self.prompt.rows
        return [comparison(rows[first], rows[second], self.options) for first, second in self.asked]

    def take(self, answers: list[Completion]) -> None:
        """Take the verdicts."""
        for (first, second), answer in zip(self.asked, answers, strict=True):
            self.games += [Game(first, second, *verdict) for verdict in verdicts_of(answer, self.options)]

    def next_pairs(self) -> list[tuple[int, int]]:
        """Return the pairs of the next round: all in one round, or those of a Swiss round."""
        replies, most = self.prompt.replies, self.options.comparisons
        if most is None or most >= len(replies) - 1:
            return [] if self.rounds else list(combinations(replies, 2))
        return [] if self.rounds >= most else self.swiss()

    def swiss(self) -> list[tuple[int, int]]:
        """Return pairs of replies with nearly equal points that have not met; the seed orders equal ones.

        Those with the fewest comparisons choose first, so that nobody sits out twice before all others have.
        """
        points, played = dict.fromkeys(self.prompt.replies, 0.0), dict.fromkeys(self.prompt.replies, 0)
        for game in self.games:
            for place in (game.first, game.second):
                points[place] += 0.5 if game.share is None else game.share_of(place)
                played[place] += 1
        drawn = {
            at: derive(self.options.seed, "swiss", self.rounds, self.prompt.rows[at]["id"])
            for at in self.prompt.replies
        }
        ranking = sorted(self.prompt.replies, key=lambda at: (played[at], -points[at], drawn[at]))
        pairs = []
        while ranking:
            one = ranking.pop(0)
            near = sorted(ranking, key=lambda at: (abs(points[at] - points[one]), drawn[at]))
            other = next((at for at in near if ordered(one, at) not in self.met), None)
            if other is not None:
                ranking.remove(other)
                pairs.append(ordered(one, other))
        return pairs


def ordered(a: int, b: int) -> tuple[int, int]:
    """Return two places, the smaller one first."""
    return (a, b) if a < b else (b, a)


def judge_pairwise(
    responses: Iterable[Record], engine: Engine, options: PairwiseOptions, is_new: IsNew | None = None
) -> Iterator[Outcome]:
    """Yield the responses to each prompt with `score`: 5 times the mean probability to win against another reply.

    The probabilities are those of a Bradley-Terry model of the prompt, to which as many ties are added as pairs were
    compared, spread over all pairs. `judgements` are all verdicts on the reply, and `scores` its share of each win
    times 5. `comparisons` has the other reply of each, and whether this one was shown first. A reply without a readable
    verdict has `score: null`, and so has the only reply to a prompt. The responses to a prompt must be consecutive;
    `is_new` remembers the prompts.
    """
    prompts = prompts_of(responses, is_new or never_seen())
    judged = at_once if options.comparisons is None else in_rounds
    for one in judged((PairwiseJudging(prompt, options) for prompt in prompts), engine):
        judge = judge_of(engine, options) | {"by": BY}
        judge |= {} if options.comparisons is None else {"comparisons": options.comparisons}
        yield from one.prompt.outcomes([] if one.prompt.bad else rows_of(one, judge), counts_of(one))


def comparison(first: Record, second: Record, options: PairwiseOptions) -> Request:
    """Return the request to compare two replies in this order."""
    prompt = prompt_text(first, options.last_turn)
    asked = options.template.chat(prompt=prompt, first=first["response"], second=second["response"])
    asked = asked if options.system is None else with_system(asked, options.system)
    draws = 1 if options.direct else options.num_judgements
    seeds = tuple(derive(options.seed, "compare", first["id"], second["id"], k) for k in range(draws))
    if not options.direct:
        return Request(asked, options.sampling, seeds)
    greedy = replace(options.sampling, temperature=0.0)
    return Request(asked, greedy, seeds, prefix=options.template.finish, choices=options.template.choices)


def verdicts_of(answer: Completion, options: PairwiseOptions) -> Iterator[tuple[float | None, Judgement]]:
    """Yield the share of a win for the first reply, and the judgement, of each text."""
    for k, (text, reason) in enumerate(zip(answer.texts, answer.finish_reasons, strict=True)):
        verdict = verdict_of(replace(answer, texts=[text]), options.template, options.direct)
        share = None if verdict is None else SHARE[verdict]
        if options.direct and answer.probabilities:
            share = probability_of("A", answer, options.template)
        text = options.template.finish + text if options.direct and text else text
        yield share, Judgement(text.strip(), None, None, reason, thought=answer.thought(k))


def rows_of(one: PairwiseJudging, judge: Record) -> list[Record]:
    """Return the judged responses of a prompt."""
    scores = scores_of(one)
    rows = []
    for at, row in enumerate(one.prompt.rows):
        games = [game for game in one.games if at in (game.first, game.second)]
        judged = judged_row(row, [game.judgement_of(at) for game in games], judge)
        against: list[dict[str, Any]] = [
            {"id": one.prompt.rows[game.second if first else game.first]["id"], "shown_first": first}
            for game in games
            for first in [game.first == at]
        ]
        rows.append({**judged, "score": scores.get(at), "comparisons": against})
    return rows


def scores_of(one: PairwiseJudging) -> dict[int, float]:
    """Return the score of each reply that has a readable verdict, by its place."""
    known = sorted({at for game in one.games if game.share is not None for at in (game.first, game.second)})
    if not known:
        return {}
    import numpy as np

    wins = wins_of(one, known)
    compared = ((wins + wins.T) > 0).sum() / (len(known) * (len(known) - 1))
    found = strengths(wins + PRIOR * compared * (1 - np.eye(len(known))))
    beats = 1 / (1 + np.exp(found[None, :] - found[:, None]))
    means = (beats.sum(axis=1) - 0.5) / (len(known) - 1)
    return {at: round(FULL_SCORE * float(mean), DIGITS) for at, mean in zip(known, means, strict=True)}


def wins_of(one: PairwiseJudging, known: list[int]) -> ndarray:
    """Return (replies, replies): the wins of the row's reply over the column's, readable verdicts only."""
    import numpy as np

    place = {at: number for number, at in enumerate(known)}
    wins = np.zeros((len(known), len(known)))
    for game in one.games:
        if game.share is not None:
            first, second = place[game.first], place[game.second]
            wins[first, second] += game.share
            wins[second, first] += 1 - game.share
    return wins


def counts_of(one: PairwiseJudging) -> dict[str, int]:
    """Count verdicts, those that cannot be read, pairs whose two orders disagree, and cycles of three replies."""
    shares = [game.share for game in one.games]
    return {
        "verdicts": len(shares),
        "unparsed": shares.count(None),
        "pairs compared": len(one.met),
        "orders disagree": disagreements(one),
        "cycles": cycles(one),
        **({"prompts with one reply": 1} if len(one.prompt.replies) == 1 else {}),
        **counts_of_ends(game.judgement.finish_reason for game in one.games),
        **closed_thoughts(game.judgement.thought for game in one.games),
    }


def disagreements(one: PairwiseJudging) -> int:
    """Return the number of pairs with two orders that name different winners, a tie included."""
    winners: dict[tuple[int, int], list[list[float]]] = {pair: [[], []] for pair in one.met}
    for game in one.games:
        if game.share is not None:
            low, high = ordered(game.first, game.second)
            winners[low, high][game.first == high].append(game.share_of(low))
    means = [[sum(side) / len(side) - 0.5 for side in both] for both in winners.values() if all(both)]
    return sum((straight > 0) - (straight < 0) != (swapped > 0) - (swapped < 0) for straight, swapped in means)


def cycles(one: PairwiseJudging) -> int:
    """Return the number of three replies of which each beats another, over both orders together."""
    known = one.prompt.replies
    if len(known) < 3 or not one.games:
        return 0
    import numpy as np

    wins = wins_of(one, known)
    beats = (wins > wins.T).astype(np.int64)
    return int(np.trace(beats @ beats @ beats)) // 3
