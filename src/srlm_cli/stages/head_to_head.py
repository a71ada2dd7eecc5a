"""Compare models: a judge sees two replies in both orders and picks one (arXiv 2401.10020, section 3.2)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

from srlm_cli.engines.base import Completion, Engine, Request, Sampling, template_refusal
from srlm_cli.errors import DataError
from srlm_cli.records import Record, as_text, has_ended, refuse_two_prompts
from srlm_cli.seeds import derive
from srlm_cli.stages import Outcome
from srlm_cli.stages.lookahead import generate_for
from srlm_cli.stages.seen import never_seen
from srlm_cli.stages.verdicts import probability_of, verdict_of
from srlm_cli.templates import Template


@dataclass(frozen=True)
class HeadToHeadOptions:
    """A pairwise template and how the judge is sampled.

    `direct` requests the verdict without reasons: the more probable of the template's choices. `by` is the field of
    the responses with the category of the prompt.
    """

    template: Template
    sampling: Sampling
    seed: int
    direct: bool = False
    by: str = "category"


@dataclass(frozen=True)
class Entry:
    """The responses of one model: its name (see `names_of`), the file, and the rows.

    For all entries except the first, the rows can be a mapping from prompt id to the first response.
    """

    name: str | None
    file: str
    rows: Iterable[Record] | Mapping[str, Record]


@dataclass(frozen=True)
class Round:
    """One prompt: its response from each entry that has one, and the rows skipped since the previous round."""

    responses: dict[int, Record]
    passed: dict[str, int]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The entries to compare, two by two, by their place."""
        return list(combinations(self.responses, 2))


class Common:
    """Which pairs of files have a prompt in common."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files
        self.missing = dict.fromkeys(combinations(range(len(files)), 2))
        self.prompts = 0

    def add(self, answered: Iterable[int]) -> None:
        """Count a prompt of the first file, and note the indices of the files that answered it."""
        self.prompts += 1
        for pair in combinations(answered, 2) if self.missing else ():
            self.missing.pop(pair, None)

    def check(self) -> None:
        """Raise DataError for two files without a common prompt; files without prompts are not an error."""
        for a, b in self.missing if self.prompts else ():
            where = self.files[b] if a == 0 else f"both {self.files[a]} and {self.files[b]}"
            hint = "two rows are of one prompt when their `prompt_id` or, without one, their prompt text is the same"
            raise DataError(f"no prompt of {self.files[0]} is answered in {where}", hint)


def head_to_head(
    entries: Sequence[Entry],
    engine: Engine,
    options: HeadToHeadOptions,
    *,
    kept: Iterable[Record] = (),
    is_new: Callable[[int], bool] | None = None,
) -> Iterator[Outcome]:
    """Yield, for each prompt of the first entry, a match row with its `winner` for every two entries that answered it.

    The judge sees A first, then B first. A side wins only if both orders agree; anything else, also an unreadable
    verdict, is a tie. If a prompt has several responses, the first one counts, also if it is empty, but not one that
    the engine did not write (see `records.has_ended`). Responses of the first entry without an opponent are dropped
    and counted. The rows of the first entry are read as a stream, those of the others first. `kept` are matches of an
    earlier run. `is_new` remembers the prompts, in memory by default. Two entries without a common prompt raise
    DataError at the end (see `Common`).
    """
    others = [entry.rows if isinstance(entry.rows, Mapping) else first_responses(entry.rows) for entry in entries[1:]]
    is_new = is_new or never_seen()
    common = Common([entry.file for entry in entries])
    for match in kept:
        is_new(hash(match["prompt_id"]))
        common.add(answered_by(match["prompt_id"], others))
    passed: Counter[str] = Counter()  # rows without a match since the last match

    def rounds() -> Iterator[Round]:
        for row in entries[0].rows:
            if not has_ended(row):
                passed["no reply"] += 1
                continue
            prompt = row["prompt_id"]
            answered = answered_by(prompt, others)
            common.add(answered)
            if len(answered) == 1:
                passed["no response of the other model"] += 1
            elif not is_new(hash(prompt)):
                passed["not the first response"] += 1
            else:
                found = {0: row, **{at: others[at - 1][prompt] for at in answered[1:]}}
                refuse_two_prompts(list(found.values()))
                before = dict(passed)
                passed.clear()
                yield Round(found, before)

    def orders() -> Iterator[tuple[Round, int, int, bool]]:
        for one in rounds():
            for a, b in one.pairs:
                yield one, a, b, False
                yield one, a, b, True

    def ask(order: tuple[Round, int, int, bool]) -> Request:
        one, a, b, swapped = order
        return request(one.responses[a], one.responses[b], swapped, _place(a, b, entries), options)

    asked = generate_for(orders(), ask, engine)
    for (one, *_), first in asked:
        completions = [first, *(completion for _, completion in islice(asked, 2 * len(one.pairs) - 1))]
        if refusal := next(filter(None, map(template_refusal, completions)), ""):
            yield Outcome(read=sum(one.passed.values()), dropped=one.passed)
            yield Outcome(bad=refusal)
            continue
        yield _outcome(one, completions, entries, options)
    yield Outcome(read=0, at_end=True)  # the next outcomes count only if the input was complete
    common.check()
    if passed:
        yield Outcome(read=passed.total(), dropped=dict(passed))


def first_responses(
    rows: Iterable[Record], first: MutableMapping[str, Record] | None = None
) -> MutableMapping[str, Record]:
    """Return the first response to each prompt by prompt id, stored in `first` (by default a dict)."""
    first = {} if first is None else first
    for row in filter(has_ended, rows):
        first.setdefault(row["prompt_id"], row)
    return first


def answered_by(prompt: str, others: Sequence[Container[str]]) -> list[int]:
    """Return the indices of the entries that answered a prompt of the first one."""
    return [0, *(at for at, of in enumerate(others, 1) if prompt in of)]


def check_common(prompts: Iterable[str], others: Sequence[Container[str]], files: Sequence[str]) -> None:
    """Raise DataError for two files without a common prompt; read only as far as necessary.

    `prompts` are the prompt ids of the first file, `others` those of each other file.
    """
    common = Common(files)
    for prompt in prompts:
        common.add(answered_by(prompt, others))
        if not common.missing:
            return
    common.check()


def numbers_of(match: Record) -> Record:
    """Return a match with the lengths of its texts instead of the texts."""
    known = ("prompt_id", "category", "winner", "verdicts", "probability", "model_a", "model_b")
    lengths = {"length_a": len(match["response_a"]), "length_b": len(match["response_b"])}
    return {key: match[key] for key in known if key in match} | lengths


def request(a: Record, b: Record, swapped: bool, place: list[str], options: HeadToHeadOptions) -> Request:
    """Return the request to compare two responses to one prompt, in one order."""
    first, second = (b, a) if swapped else (a, b)
    asked = options.template.chat(prompt=as_text(a["prompt"]), first=first["response"], second=second["response"])
    seeds = (derive(options.seed, "head-to-head", a["id"], b["id"], swapped, *place),)
    begin = {"prefix": options.template.finish, "choices": options.template.choices} if options.direct else {}
    return Request(asked, options.sampling, seeds, **begin)


def _place(a: int, b: int, entries: Sequence[Entry]) -> list[str]:
    """Return a suffix for the ids of a pair of entries, such as 0-2; "" if it is the only pair."""
    return [f"{a}-{b}"] if len(entries) > 2 else []


def _outcome(
    one: Round, completions: list[Completion], entries: Sequence[Entry], options: HeadToHeadOptions
) -> Outcome:
    """Return the match rows of one prompt, its pairs judged in both orders run them separately."""
    prompt = {key: one.responses[0][key] for key in ("prompt_id", "prompt")}
    category = _category(one, options.by)
    prompt |= {} if category is None else {"category": category}
    matches = []
    for (a, b), straight, swapped in zip(one.pairs, completions[::2], completions[1::2], strict=True):
        match = {
            "id": "/".join([prompt["prompt_id"], *_place(a, b, entries)]),
            **prompt,
            **_judged(straight, swapped, options),
            "model_a": entries[a].name,
            "model_b": entries[b].name,
            "response_a": one.responses[a]["response"],
            "response_b": one.responses[b]["response"],
        }
        matches.append(match)
    return Outcome(
        rows=matches,
        read=1 + sum(one.passed.values()),
        dropped=one.passed,
        counts={
            "verdicts": len(completions),
            "unparsed": sum(match["verdicts"].count(None) for match in matches),
            "prompts not answered by all": int(len(one.responses) < len(entries)),
        },
        tokens_in=sum(completion.tokens_in for completion in completions),
        tokens_out=sum(completion.tokens_out for completion in completions),
    )


def _judged(straight: Completion, swapped: Completion, options: HeadToHeadOptions) -> Record:
    """Return the verdicts of the judge on A and B in both orders."""
    verdicts = [verdict_of(said, options.template, options.direct) for said in (straight, swapped)]
    winners = [verdicts[0], {"A": "B", "B": "A"}.get(verdicts[1] or "", verdicts[1])]
    agreed = winners[0] == winners[1] and winners[0] in ("A", "B")
    judged: Record = {"winner": winners[0] if agreed else "tie", "verdicts": verdicts}
    if straight.probabilities and swapped.probabilities:
        sides = (("A", straight), ("B", swapped))
        judged["probability"] = sum(probability_of(side, said, options.template) for side, said in sides) / 2
    return judged


def _category(one: Round, by: str) -> str | None:
    """Return the category of a prompt as a string, from the first of its responses that has one."""
    values = (row[by] for row in one.responses.values() if row.get(by) not in (None, ""))
    value = next(values, None)
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def names_of(models: Sequence[Any], files: Sequence[str]) -> list[str | None]:
    """Return the name of each file: the `model` of its rows, or the file name.

    Files with the same model, and without a model if there are three or more files, are named by their file names
    without extensions, with enough parent folders to make them unique. The same file twice gets a number. So all names
    differ, except that two files without a model are both None.
    """
    known = [model if isinstance(model, str) and model else None for model in models]
    by_file = [len(files) > 2 if model is None else known.count(model) > 1 for model in known]
    paths = [_parts(file) for file, wanted in zip(files, by_file, strict=True) if wanted]
    depth = 1
    while len({path[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    names: list[str | None] = []
    for model, file, wanted in zip(known, files, by_file, strict=True):
        name = "/".join(_parts(file)[-depth:]) if wanted else model
        numbered = [f"{name} ({number})" for number in range(2, len(files) + 1)]
        names.append(name if name is None else next(free for free in [name, *numbered] if free not in names))
    return names


def _parts(file: str) -> tuple[str, ...]:
    """Return the folders of a path and its name without `.jsonl` and `.gz`."""
    *folders, name = [part for part in file.split("/") if part not in ("", ".")]
    return (*folders, "stdin" if name == "-" else name.removesuffix(".gz").removesuffix(".jsonl"))
