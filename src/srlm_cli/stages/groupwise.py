"""Score all replies to a prompt in one call, in several orders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from srlm_cli.engines.base import Completion, Engine, Request
from srlm_cli.records import Record, with_system
from srlm_cli.seeds import derive
from srlm_cli.stages import Outcome, closed_thoughts, counts_of_ends
from srlm_cli.stages.judge import Judgement, JudgeOptions, judge_of, judged_row, prompt_text
from srlm_cli.stages.rounds import IsNew, Prompt, at_once, prompts_of
from srlm_cli.stages.seen import never_seen
from srlm_cli.templates.groups import scores_by_letter, shown

BY = "group"
MOST_REPLIES = 702  # A to ZZ


@dataclass
class GroupJudging:
    """The judging of one prompt (see `rounds.Judging`): K orders of its replies."""

    prompt: Prompt
    options: JudgeOptions
    orders: list[list[int]] = field(default_factory=list)
    answers: list[Completion] = field(default_factory=list)

    def ask(self) -> list[Request]:
        """Return one request per order, all in one round."""
        if self.orders or not self.prompt.replies:
            return []
        if len(self.prompt.replies) > MOST_REPLIES:
            self.prompt.bad = f"{len(self.prompt.replies)} replies to one prompt, at most {MOST_REPLIES}"
            return []
        self.orders = [order_of(self.prompt, k, self.options.seed) for k in range(self.options.num_judgements)]
        return [self.request(k) for k in range(len(self.orders))]

    def take(self, answers: list[Completion]) -> None:
        """Take the answers."""
        self.answers = answers

    def request(self, k: int) -> Request:
        """Return the request with the replies in one order."""
        rows, options = self.prompt.rows, self.options
        texts = shown([rows[at]["response"] for at in self.orders[k]])
        asked = options.template.chat(prompt=prompt_text(rows[0], options.last_turn), replies=texts)
        asked = asked if options.system is None else with_system(asked, options.system)
        return Request(asked, options.sampling, (derive(options.seed, "group", rows[0]["prompt_id"], k),))


def order_of(prompt: Prompt, k: int, seed: int) -> list[int]:
    """Return the places of the replies in order `k`.

    Orders are random by the ids of the replies. Of n of them in turn, each reply has each position once.
    """
    turn, by = divmod(k, len(prompt.replies))
    name = prompt.rows[0]["prompt_id"]
    drawn = sorted(prompt.replies, key=lambda at: (derive(seed, "order", name, turn, prompt.rows[at]["id"]), at))
    return drawn[by:] + drawn[:by]


def judge_group(
    responses: Iterable[Record], engine: Engine, options: JudgeOptions, is_new: IsNew | None = None
) -> Iterator[Outcome]:
    """Yield the responses to each prompt with `score`, the mean of `scores`, one per order of the replies.

    The judge sees all replies to the prompt in each of `num_judgements` orders, and `judgements` has what it wrote.
    `places` is where the reply was shown, from 0. A score that is missing or unreadable is null. The responses to a
    prompt must be consecutive; `is_new` remembers the prompts.
    """
    prompts = prompts_of(responses, is_new or never_seen())
    for one in at_once((GroupJudging(prompt, options) for prompt in prompts), engine):
        judged = {} if one.prompt.bad else judgements_of(one)
        rows = [] if one.prompt.bad else rows_of(one, judged, judge_of(engine, options) | {"by": BY})
        every = [judgement for found in judged.values() for judgement in found]
        written = list(zip(*judged.values(), strict=True))
        counts = {
            "judgements": len(every),
            "unparsed": sum(judgement.score is None for judgement in every),
            "calls": len(written),
            **counts_of_ends(found[0].finish_reason for found in written),
            **closed_thoughts(found[0].thought for found in written),
        }
        yield from one.prompt.outcomes(rows, counts)


def judgements_of(one: GroupJudging) -> dict[int, list[Judgement]]:
    """Return the judgements of each reply, by its place, in the order of the calls."""
    judged: dict[int, list[Judgement]] = {at: [] for at in one.prompt.replies}
    for order, answer in zip(one.orders, one.answers, strict=True):
        text, reason = answer.texts[0], answer.finish_reasons[0]
        for at, score in zip(order, scores_by_letter(text, one.options.template, len(order)), strict=True):
            source = None if score is None else "text"
            judged[at].append(Judgement(text.strip(), score, source, reason, thought=answer.thought(0)))
    return judged


def rows_of(one: GroupJudging, judged: dict[int, list[Judgement]], judge: Record) -> list[Record]:
    """Return the judged responses of a prompt."""
    return [
        {
            **judged_row(row, judged.get(at, []), judge),
            "places": [order.index(at) for order in one.orders] if at in judged else [],
        }
        for at, row in enumerate(one.prompt.rows)
    ]
