"""Criteria for a judge that a model writes from ranked replies, and what a judge finds for each of them.

After Auto-Rubric (arXiv 2510.17314). Ranked rows are in three parts: a model is shown the first, criteria are chosen by
the second, and the result is measured on the third.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from random import Random

from srlm_cli.engines.base import Completion, Engine, Request, Sampling, template_refusal
from srlm_cli.errors import EngineError
from srlm_cli.records import Record, as_text, is_reply, prompt_key, responses_of, short_hash
from srlm_cli.seeds import derive, share
from srlm_cli.stages import Outcome, counts_of_ends
from srlm_cli.stages.gen_prompts import NearDuplicates
from srlm_cli.stages.judge import JudgeOptions, judge
from srlm_cli.stages.words import length
from srlm_cli.templates import Template
from srlm_cli.templates.criteria import Criterion, listed, of_template, plain, scores_in

SIMILAR = 0.7  # ROUGE-L above which two criteria are one, as for new prompts
WRITTEN_AT_ONCE = 4
MOST_WORDS_OF_NAME, LEAST_WORDS = 6, 3
# A bullet or a number, marks of bold type or quotation, the name, a colon or a dash, the description.
LINE = re.compile(
    r"""(?x) \s*+ (?: (?: [-+*•>#]+ | \d+ [.):] ) \s++ | \d+ [.):] )?+ [*_`"“]*
    (?P<name> [^:*`"“”\\]+? ) [*_`"”]* \s* (?: : | \s[-–—](?=\s) ) [*_`]* \s* (?P<description> \S .* )"""
)

Found = dict[str, float | None]
Rubric = tuple[Criterion, ...]


@dataclass(frozen=True)
class Parts:
    """Ranked rows in parts: to write criteria from, to choose them by, and to measure on.

    `unordered` counts those that are in none: people put no two of their replies in an order.
    """

    shown: list[Record]
    chosen_by: list[Record]
    measured: list[Record]
    unordered: int


@dataclass(frozen=True)
class RubricOptions:
    """At most `count` criteria are written, in at most `max_tries` answers that are shown `rows_shown` rows each.

    `judging` is how replies are judged, by a template with criteria, in whose place others are put. `scale` is that of
    the criteria that are written. `own` are criteria that are tried, too, and were not written by the model.
    """

    count: int
    max_tries: int
    rows_shown: int
    scale: str | int
    template: Template
    sampling: Sampling
    seed: int
    judging: JudgeOptions
    own: Rubric = ()


@dataclass
class Trial:
    """What a run has found so far.

    `candidates` are the criteria that are tried; `found` has their scores, 0 to 1, for each reply of the second part.
    `rubric` are the criteria that were kept, and `scores` the scores of the replies of the third part by them.
    """

    candidates: list[Criterion] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    rubric: Rubric | None = None
    scores: list[float | None] = field(default_factory=list)


def parts_of(ranked: Iterable[Record], seed: int, writes: bool) -> Parts:
    """Return ranked rows in parts with equal numbers of prompts, at random; the first is empty unless a model `writes`.

    Rows of one prompt are in one part.
    """
    prompts: dict[str, list[Record]] = {}
    unordered = 0
    for row in ranked:
        if len({reply["human"] for reply in replies_of(row)}) > 1:
            prompts.setdefault(prompt_key(row["prompt"]), []).append(row)
        else:
            unordered += 1
    keys = sorted(prompts, key=lambda key: share(seed, "rubric", key))
    count = 3 if writes else 2
    ends = [at * len(keys) // count for at in range(count + 1)]
    made = [[row for key in keys[a:b] for row in prompts[key]] for a, b in zip(ends, ends[1:], strict=False)]
    return Parts(*([] if writes else [[]]), *made, unordered)


def replies_of(ranked: Record) -> list[Record]:
    """Return the replies of a ranked row that have a text, with the value that people gave them as `human`."""
    return [reply for reply in responses_of(ranked) if is_reply(reply)]


def make_rubric(
    parts: Parts,
    engine: Engine,
    options: RubricOptions,
    choose: Callable[[Trial], Rubric],
    trial: Trial,
    kept: Iterable[Record] = (),
    done: int = 0,
) -> Iterator[Outcome]:
    """Yield the outcomes of a run and fill its `trial`: criteria are written, tried one by one, chosen and measured.

    A row is a criterion (`criterion`, `description`), or a reply as it was judged. `choose` returns what is kept. The
    rows `kept` and the number of outcomes `done` resume an earlier run.
    """
    judged = []
    trial.candidates += options.own
    for row in kept:
        if "judgements" in row:  # it may have a field `criterion` of the user's own
            judged.append(row)
        else:
            trial.candidates.append(criterion_of(row["criterion"], row["description"], options.scale))
    yield from write_criteria(parts.shown, engine, options, trial.candidates, done - len(judged))
    replies = [reply for row in parts.chosen_by for reply in replies_of(row)]
    trial.found += [{} for _ in replies]
    old = iter(judged)
    for criterion in trial.candidates:
        before = list(islice(old, len(replies)))
        asked = ask(replies[len(before) :], engine, options.judging, (criterion,))
        for at, row in enumerate(before):
            trial.found[at] |= found_in(row, criterion)
        for at, outcome in enumerate(asked, len(before)):
            yield outcome
            trial.found[at] |= found_in(outcome.rows[0], criterion)
    trial.rubric = choose(trial)
    if not trial.rubric:
        return
    last = [reply for row in parts.measured for reply in replies_of(row)]
    trial.scores += [row["score"] for row in old]
    for outcome in ask(last[len(trial.scores) :], engine, options.judging, trial.rubric):
        yield outcome
        trial.scores.append(outcome.rows[0]["score"])


# --- criteria are written --------------------------------------------------------------------


def write_criteria(
    rows: list[Record], engine: Engine, options: RubricOptions, candidates: list[Criterion], tried: int
) -> Iterator[Outcome]:
    """Yield one outcome per answer, with a row per new criterion, and add these to the candidates.

    Lines without a criterion, near duplicates (also of the examples in the template), and those over the number that is
    wanted are counted as dropped.
    """
    examples = [one for line in options.template.text.split("\n") if (one := criterion_in(line, options.scale))]
    known = NearDuplicates([text_of(one) for one in [*candidates, *examples]], SIMILAR)
    wanted = options.count + len(options.own)
    for start in range(tried, options.max_tries, WRITTEN_AT_ONCE):
        if len(candidates) >= wanted:
            return
        numbers = range(start, min(start + WRITTEN_AT_ONCE, options.max_tries))
        answers = engine.generate([request_for_criteria(rows, number, options) for number in numbers])
        for number, completion in zip(numbers, answers, strict=True):
            if refusal := template_refusal(completion):
                raise EngineError(refusal, "make-rubric asks with one message of the user")
            made, dropped = [], Counter()
            for criterion in criteria_in(completion, options.scale, dropped):
                if len(candidates) >= wanted:
                    dropped["criteria over the number wanted"] += 1
                elif known.fault(text_of(criterion)) or plain(criterion.name) in {plain(c.name) for c in candidates}:
                    dropped["near-duplicate criteria"] += 1
                else:
                    candidates.append(criterion)
                    known.add(text_of(criterion))
                    made.append(criterion_row(criterion, number, engine.model))
            yield Outcome(made, dropped=dict(dropped), tokens_in=completion.tokens_in, tokens_out=completion.tokens_out)
            if len(candidates) >= wanted:
                return


def request_for_criteria(rows: list[Record], number: int, options: RubricOptions) -> Request:
    """Return the request of one try: some ranked rows, the best reply of each and the worst one."""
    shown = Random(derive(options.seed, "rows", number)).sample(rows, min(options.rows_shown, len(rows)))
    text = "\n\n".join(comparison(at, row) for at, row in enumerate(shown, 1))
    return Request(
        options.template.chat(comparisons=text, count=str(min(options.count, 5))),
        options.sampling,
        (derive(options.seed, "criteria", number),),
        prefix=options.template.start(next="1"),
    )


def comparison(number: int, ranked: Record) -> str:
    """Return a ranked row as the model is shown it."""
    replies = replies_of(ranked)
    better, worse = (end(replies, key=lambda reply: reply["human"])["response"] for end in (max, min))
    return (
        f"Request {number}: {as_text(ranked['prompt'])}\n\nThe better reply:\n<reply>\n{better}\n</reply>\n\n"
        f"The worse reply:\n<reply>\n{worse}\n</reply>"
    )


def criteria_in(completion: Completion, scale: str | int, dropped: Counter[str]) -> Iterator[Criterion]:
    """Yield the criteria in an answer; count the lines that are none, and one that was cut off, in `dropped`."""
    text, end = completion.texts[0], completion.finish_reasons[0]
    lines = [line for line in text.split("\n") if line.strip()]
    if end == "length":
        dropped["lines cut off"] += len(lines[-1:])
        lines = lines[:-1]
    elif end != "stop":
        dropped.update(counts_of_ends([end]))
    for line in lines:
        if criterion := criterion_in(line, scale):
            yield criterion
        else:
            dropped["lines without a criterion"] += 1


def criterion_in(line: str, scale: str | int) -> Criterion | None:
    """Return the criterion of a line, `name: description`, or None."""
    read = LINE.fullmatch(line)
    if not read:
        return None
    name, description = " ".join(read["name"].split()), read["description"].strip().strip("*_` ")
    if len(name.split()) > MOST_WORDS_OF_NAME or length(description)[0] < LEAST_WORDS:
        return None
    try:
        return criterion_of(name, description, scale)
    except ValueError:
        return None


def criterion_of(name: str, description: str, scale: str | int) -> Criterion:
    """Return a criterion; raise ValueError for a name or a scale that no template can have."""
    [made] = of_template([{"name": name, "description": description, "scale": scale}])
    return made


def criterion_row(criterion: Criterion, number: int, model: str) -> Record:
    """Return the record of a criterion that was written, with its try and its model."""
    about = {"criterion": criterion.name, "description": criterion.description, "model": model, "try": number}
    return {"id": short_hash(text_of(criterion)), **about}


def text_of(criterion: Criterion) -> str:
    """Return a criterion as one text."""
    return f"{criterion.name}: {criterion.description}"


# --- criteria are asked ----------------------------------------------------------------------


def ask(replies: list[Record], engine: Engine, options: JudgeOptions, criteria: Rubric) -> Iterator[Outcome]:
    """Yield the replies as they are judged by these criteria, and no others."""
    form = options.template
    form = replace(form, criteria=criteria, hash=short_hash(f"{form.hash}\n{listed(criteria)}"))
    for outcome in judge(replies, engine, replace(options, template=form)):
        if outcome.bad:
            raise EngineError(outcome.bad, "make-rubric judges each reply to its prompt")
        yield outcome


def found_in(row: Record, criterion: Criterion) -> Found:
    """Return the score of a criterion in a judged row: None if it cannot be read, nothing if it does not apply."""
    found = scores_in(row)
    return {criterion.name: None} if found is None else found
