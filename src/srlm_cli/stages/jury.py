"""Join the scores of several judges for the same replies: one judged record for each reply."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, groupby, starmap
from math import fsum, log
from operator import mul
from typing import NamedTuple

from srlm_cli.errors import BadRow, DataError
from srlm_cli.records import Record, is_judged_reply, judged_record, refuse_two_prompts
from srlm_cli.stages import Outcome
from srlm_cli.stages.make_pairs import in_memory
from srlm_cli.stages.seen import never_seen
from srlm_cli.stats.reliability import Reliability
from srlm_cli.templates.criteria import is_written

# What one judge said of a reply. The record of a jury has its own `score`, `scores`, `score_from` and `judge`.
OF_ONE_JUDGE = {
    "score", "scores", "score_from", "score_mass", "judgements", "judgement_finish_reasons", "judge_thoughts", "judge",
    "score_judge", "score_rules", "comparisons", "places",
    "battles", "targets", "judge_prompt",
}  # fmt: skip
IN_A_FILE = {"score", "score_from"}  # of these, what the join on disk needs
MISSING = "missing"
NOT_READ = ("pairwise", "implicit", "reward", "rules")  # sources of a score that is not read in a judgement

Rows = Iterable[tuple[int, Record]]
Parts = Iterable[tuple[Hashable, Iterable[Record]]]


class Ballot(NamedTuple):
    """A judged record with the number of its juror, from 0, and its line in the juror's file."""

    juror: int
    line: int
    row: Record


@dataclass(frozen=True)
class Juror:
    """One judge: the file with its scores as messages show it, its name, the `judge` of its records, its weight."""

    file: str
    name: str
    judge: Record
    weight: float = 1.0


@dataclass
class Bench:
    """What was counted of the jurors: how far they agree, and of each the replies it lacks and those without a score.

    `alone` is True as long as no reply was in two files.
    """

    jurors: int
    reliability: Reliability = field(init=False)
    missing: list[int] = field(init=False)
    unscored: list[int] = field(init=False)
    alone: bool = True

    def __post_init__(self) -> None:
        self.reliability = Reliability(self.jurors)
        self.missing, self.unscored = [0] * self.jurors, [0] * self.jurors


def juror_record(row: Record) -> Record:
    """Return a judged record; one of `srlm judge` is returned unchanged, which is fast."""
    return row if is_judged_reply(row) else judged_record(row)


def jury(
    streams: Sequence[Rows],
    jurors: Sequence[Juror],
    bench: Bench,
    *,
    unsorted: bool = False,
    is_new: Callable[[int], bool] | None = None,
    group_by_key: Callable[[Parts], Iterable[list[Record]]] | None = None,
) -> Iterator[Outcome]:
    """Yield one outcome per prompt: its replies, each with the weighted mean of the scores of all jurors.

    `streams` are the records of each juror with their line numbers. As long as the files have the same prompts in the
    same order, one prompt is in memory; from the first difference on, `group_by_key` joins the rest. A reply is found
    by its id. It has `scores`, one per juror, null where the juror gave none; `score_from` is then null, or `missing`
    where the juror's file lacks the reply. A juror without a score does not count, and without any the score is null.
    """
    judge, weights = judge_of(jurors), [juror.weight for juror in jurors]
    for ballots, at_end in ballots_by_prompt(streams, unsorted, is_new or never_seen(), group_by_key or in_memory):
        rows = [verdict(votes, weights, judge) for votes in by_reply(ballots, jurors)]
        count(rows, bench)
        counts = {
            "missing jurors": len(rows) * len(jurors) - len(ballots),
            "unscored": sum(row["score"] is None for row in rows),
        }
        yield Outcome(rows=rows, read=len(ballots), counts=counts, at_end=at_end)


def judge_of(jurors: Sequence[Juror]) -> Record:
    """Return the `judge` of the records of a jury: who the jurors are, in the order of `scores`."""
    return {"model": "jury", "jurors": [{**juror.judge, "weight": juror.weight} for juror in jurors]}


def ballots_by_prompt(
    streams: Sequence[Rows],
    unsorted: bool,
    is_new: Callable[[int], bool],
    group_by_key: Callable[[Parts], Iterable[list[Record]]],
) -> Iterator[tuple[list[Ballot], bool]]:
    """Yield (the ballots of a prompt, whether this is final only at the end of the input)."""
    groups = [
        groupby(starmap(partial(Ballot, juror), rows), key=lambda ballot: ballot.row["prompt_id"])
        for juror, rows in enumerate(streams)
    ]
    ballots: list[Ballot] = []
    while True:
        heads = [next(group, None) for group in groups]
        if ballots:
            yield ballots, None in heads
        prompts = {head and head[0] for head in heads}
        if unsorted or len(prompts) > 1 or None in prompts:
            break
        [prompt] = prompts
        refuse_again(prompt, is_new)
        ballots = [ballot for _, found in heads for ballot in found]
    for found in group_by_key(parts(heads, groups)):
        refuse_again(found[0]["row"]["prompt_id"], is_new)
        yield [Ballot(**one) for one in found], True


def parts(heads: list, groups: Sequence[Iterator]) -> Parts:
    """Yield (prompt, its ballots as records without what the jury has no use for), one group of each file in turn."""
    while any(heads):
        for prompt, ballots in filter(None, heads):
            yield prompt, ({**ballot._asdict(), "row": without_judgements(ballot.row)} for ballot in ballots)
        heads = [next(group, None) for group in groups]


def of_all_judges(row: Record) -> Record:
    """Return a judged record without what one judge said."""
    made = {key: value for key, value in row.items() if key not in OF_ONE_JUDGE}
    if "criteria" in made and is_written(made["criteria"]):
        del made["criteria"]
    return made


def without_judgements(row: Record) -> Record:
    """Return a judged record without the judgements, to save space until all are read."""
    return of_all_judges(row) | {key: row[key] for key in IN_A_FILE if key in row}


def refuse_again(prompt: str, is_new: Callable[[int], bool]) -> None:
    """Raise BadRow for a prompt whose replies were joined before."""
    if not is_new(hash(prompt)):
        raise BadRow(
            f"the replies to prompt {prompt} are not grouped: "
            "sort the rows by prompt_id, or --unsorted groups them on disk"
        )


def by_reply(ballots: list[Ballot], jurors: Sequence[Juror]) -> Iterable[list[Ballot | None]]:
    """Return the ballots on each reply to a prompt by juror, replies in the order in which they first came.

    Raises DataError for a reply that a file has twice, and for two texts or prompts of one id.
    """
    replies: dict[str, list[Ballot | None]] = {}
    first = ballots[0].row
    for ballot in ballots:
        juror, _, row = ballot
        try:
            if row["prompt"] != first["prompt"]:
                refuse_two_prompts([first, row])
            votes = replies.get(row["id"])
            if votes is None:
                votes = replies[row["id"]] = [None] * len(jurors)
            elif votes[juror]:
                raise BadRow(f"the reply {row['id']} is also in line {votes[juror].line}: keep one of them")
            else:
                refuse_other_text(row, votes[0] or next(filter(None, votes)), jurors)
        except BadRow as error:
            raise DataError(f"{jurors[juror].file}:{ballot.line}: {error}") from None
        votes[juror] = ballot
    return replies.values()


def refuse_other_text(row: Record, other: Ballot, jurors: Sequence[Juror]) -> None:
    """Raise BadRow if the reply has another text than the same reply of another juror."""
    if row["response"] != other.row["response"]:
        place = f"{jurors[other.juror].file}:{other.line}"
        raise BadRow(f"the reply {row['id']} has another text than in {place}: expected judgements of the same replies")


def verdict(votes: list[Ballot | None], weights: Sequence[float], judge: Record) -> Record:
    """Return the record of the first juror that has the reply, with the scores of all jurors instead of its own."""
    made = of_all_judges((votes[0] or next(filter(None, votes))).row)
    scores = [vote and vote.row["score"] for vote in votes]
    made["score"] = weighted_mean(scores, weights)
    made["scores"] = scores
    made["score_from"] = [source_of(vote.row) if vote else MISSING for vote in votes]
    made["judge"] = judge
    return made


def source_of(row: Record) -> str | None:
    """Return how a juror came to its score: `expected` by probability, one of NOT_READ, or `text`; None without one."""
    if row["score"] is None:
        return None
    sources = row.get("score_from")
    if not isinstance(sources, list):
        return "text"
    if "expected" in sources or "direct" in sources:
        return "expected"
    for source in NOT_READ:  # for, not next(): this runs for each score
        if source in sources:
            return source
    return "text"


def weighted_mean(scores: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Return the weighted mean of the scores there are, None without any; the mean of equal scores is that score."""
    if None in scores or 0 in weights:  # few replies have it: there are many
        known = [(score, weight) for score, weight in zip(scores, weights, strict=True) if score is not None and weight]
        if not known:
            return None
        scores, weights = zip(*known, strict=True)
    mean = fsum(map(mul, scores, weights)) / fsum(weights)
    return min(max(mean, min(scores)), max(scores))  # rounding can lead a hair beyond equal scores


def count(rows: list[Record], bench: Bench) -> None:
    """Count the records of one prompt."""
    bench.reliability.add(row["scores"] for row in rows)
    for row in rows:
        if None in row["scores"]:
            for juror, (score, source) in enumerate(zip(row["scores"], row["score_from"], strict=True)):
                bench.missing[juror] += source == MISSING
                bench.unscored[juror] += score is None and source != MISSING
        if bench.alone:
            bench.alone = len(row["scores"]) - row["score_from"].count(MISSING) < 2


# --- weights by agreement with people --------------------------------------------------------


@dataclass
class Accuracy:
    """How often each juror orders two replies to a prompt as people do; a tie of the juror is half a hit."""

    jurors: int
    hits: list[float] = field(init=False)
    pairs: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.hits, self.pairs = [0.0] * self.jurors, [0] * self.jurors

    def add(self, human: Sequence[float | None], scores: Sequence[Sequence[float | None]]) -> None:
        """Add the replies to one prompt: what people thought, and for each reply the score of each juror."""
        for (one, a), (other, b) in combinations(zip(human, scores, strict=True), 2):
            if one is None or other is None or one == other:
                continue
            for juror, (x, y) in enumerate(zip(a, b, strict=True)):
                if x is not None and y is not None:
                    self.pairs[juror] += 1
                    self.hits[juror] += 0.5 if x == y else (x > y) == (one > other)

    def of(self, juror: int) -> Record:
        """Return the `accuracy` of a juror over n pairs of replies, null without any."""
        n = self.pairs[juror]
        return {"accuracy": self.hits[juror] / n if n else None, "n": n}

    def weights(self) -> list[float]:
        """Return the log odds of each juror's accuracy, 0 for one at or below chance.

        These are the best weights of independent voters (Nitzan and Paroush, 1982; Shapley and Grofman, 1984). One
        hit and one miss are added, so that the weight of a juror without a miss is finite.
        """
        odds = [(hits + 1) / (pairs - hits + 1) for hits, pairs in zip(self.hits, self.pairs, strict=True)]
        return [max(0.0, log(one)) for one in odds]


def reweighted(row: Record, jurors: Sequence[Juror], judge: Record) -> Record:
    """Return a record of a jury with the score that other weights give."""
    return {**row, "score": weighted_mean(row["scores"], [juror.weight for juror in jurors]), "judge": judge}
