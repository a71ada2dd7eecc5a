"""Judge the same replies in several ways, so that the ways can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from itertools import islice

from srlm_cli.engines.base import Engine
from srlm_cli.records import Record
from srlm_cli.stages import Outcome
from srlm_cli.stages.rounds import IsNew, Prompt, prompts_of
from srlm_cli.stages.seen import never_seen

PROMPTS_A_TURN = 16  # with 4 responses and K=3 nearly a batch; what an interruption loses
Judge = Callable[[Iterable[Record], Engine], Iterator[Outcome]]


def judge_kinds(
    responses: Iterable[Record],
    engine: Engine,
    kinds: Mapping[str, Judge],
    clock: Callable[[], float],
    seconds: MutableMapping[str, float],
    is_new: IsNew | None = None,
) -> Iterator[Outcome]:
    """Yield the responses to each prompt as judged by each kind, in the order of `kinds`.

    A row has its `kind`, and `tokens_in` and `tokens_out`, which this kind spent on all responses to the prompt. To
    `seconds` of each kind its time by the `clock` is added. The kinds take turns after some prompts, so that each
    fills its batches and all are measured alike. If one kind cannot judge a prompt, its responses are bad rows. The
    responses to a prompt must be consecutive; `is_new` remembers the prompts.
    """
    prompts = prompts_of(responses, is_new or never_seen())
    while together := list(islice(prompts, PROMPTS_A_TURN)):
        good = [prompt for prompt in together if not prompt.bad]
        judged: dict[str, list[list[Outcome]]] = {}
        for name, judge in kinds.items():
            started = clock()
            judged[name] = list(by_prompt(good, judge((row for prompt in good for row in prompt.rows), engine)))
            seconds[name] = seconds.get(name, 0.0) + clock() - started
        of_kinds = {name: iter(outcomes) for name, outcomes in judged.items()}
        for prompt in together:
            yield from joined(prompt, {} if prompt.bad else {name: next(some) for name, some in of_kinds.items()})


def by_prompt(prompts: Iterable[Prompt], outcomes: Iterator[Outcome]) -> Iterator[list[Outcome]]:
    """Yield the outcomes about each prompt; a kind has one for each response, or one for all."""
    for prompt in prompts:
        found: list[Outcome] = []
        while sum(one.read for one in found) < len(prompt.rows):
            found.append(next(outcomes))
        yield found


def joined(prompt: Prompt, of_kinds: Mapping[str, list[Outcome]]) -> Iterator[Outcome]:
    """Yield the outcome about a prompt from those of all kinds."""
    every = [one for outcomes in of_kinds.values() for one in outcomes]
    prompt.bad = prompt.bad or next((one.bad for one in every if one.bad), "")
    prompt.tokens_in, prompt.tokens_out = sum(one.tokens_in for one in every), sum(one.tokens_out for one in every)
    rows = []
    for name, outcomes in of_kinds.items():
        spent = {
            "tokens_in": sum(one.tokens_in for one in outcomes),
            "tokens_out": sum(one.tokens_out for one in outcomes),
        }
        rows += [{**row, "id": f"{row['id']}/{name}", "kind": name, **spent} for one in outcomes for row in one.rows]
    counts = sum((Counter(one.counts) for one in every), Counter())
    del counts["no reply"]  # counted once, not by each kind
    yield from prompt.outcomes(rows, dict(counts))
