"""Candidate responses: N for each prompt (arXiv 2401.10020, section 2.3, step 2)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from srlm_cli.engines.base import Completion, Engine, Request, Sampling, template_refusal
from srlm_cli.records import ENDS, KWARGS, Message, Record, as_messages, asks_turns, is_reply, reply_message
from srlm_cli.seeds import derive
from srlm_cli.stages import Outcome, closed_thoughts, counts_of_ends
from srlm_cli.thoughts import UNFINISHED


@dataclass(frozen=True)
class SampleOptions:
    """`n` responses per prompt, drawn with `sampling`; the seed of each is derived from `seed`.

    `template_kwargs` are the options of the chat template; each record has them, so that training renders it alike.
    """

    n: int
    sampling: Sampling
    seed: int
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def sample(prompts: Iterable[Record], engine: Engine, options: SampleOptions) -> Iterator[Outcome]:
    """Yield, for each prompt row, its N response rows `<prompt_id>/<k>`.

    A completion that the engine did not write (see `Completion`) is counted and has no row. One that was cut off in its
    thought has a row with a `response` of null. A prompt without any response is a bad row.

    A row with `turns` (see `records.turns_record`) is a conversation: each turn has N response rows, with the id
    `<id>/turn-<turn>/<k>`, whose `prompt` is the conversation before it. All N answer the same conversation, in which
    the first reply of each earlier turn was given. A turn without any reply ends the conversation, and is counted.
    """
    waiting: deque[Conversation] = deque()  # in the order of the rows
    ready: deque[Conversation] = deque()  # with another turn to ask
    asked: deque[Conversation] = deque()  # in the order of the requests
    rows = iter(prompts)

    def requests() -> Iterator[Request]:
        while True:
            if ready:
                conversation = ready.popleft()
            elif (row := next(rows, None)) is not None:
                waiting.append(conversation := Conversation(as_asked(row, options), options))
            else:
                return
            asked.append(conversation)
            yield conversation.request()

    while True:
        for completion in engine.generate(requests()):
            conversation = asked.popleft()
            conversation.take(completion, engine.model)
            if not conversation.ended:
                ready.append(conversation)
            while waiting and waiting[0].ended:
                yield waiting.popleft().outcome()
        if not ready:  # else the engine took no request after the last completions
            return


class Conversation:
    """A prompt row whose turns are asked one after the other; a prompt without `turns` has one."""

    def __init__(self, row: Record, options: SampleOptions) -> None:
        self.options = options
        self.turns: list[str] = row["turns"] if asks_turns(row) else []
        self.row = {key: value for key, value in row.items() if key != "turns"} if self.turns else row
        self.turn, self.ended = 1, False
        self.rows: list[Record] = []
        self.counts: Counter[str] = Counter()
        self.tokens_in = self.tokens_out = 0
        self.bad = ""

    @property
    def asked(self) -> Record:
        """The row of the present turn."""
        if not self.turns:
            return self.row
        return {**self.row, "id": f"{self.row['id']}/turn-{self.turn}", "turn": self.turn, "num_turns": len(self.turns)}

    def request(self) -> Request:
        """Return the request for the N responses of the present turn."""
        row, options = self.asked, self.options
        seeds = tuple(derive(options.seed, "sample", row["id"], k) for k in range(options.n))
        return Request(as_messages(row["prompt"]), options.sampling, seeds, template_kwargs=row.get(KWARGS))

    def take(self, completion: Completion, model: str) -> None:
        """Add the responses of the present turn, and go to the next one after the first that is a reply."""
        made = _responses(self.asked, completion, model)
        self.rows += made
        self.counts.update(_finish_counts(completion, len(made)))
        self.tokens_in += completion.tokens_in
        self.tokens_out += completion.tokens_out
        if not self.rows or template_refusal(completion):
            self.bad = f"turn {self.turn}: " * (self.turn > 1) + _why_none(completion)
        given = next(filter(is_reply, made), None)
        left = self.turns[self.turn :]
        if given and left:
            prompt: list[Message] = as_messages(self.row["prompt"])
            self.row = {**self.row, "prompt": [*prompt, reply_message(given), {"role": "user", "content": left[0]}]}
            self.turn += 1
            return
        self.ended = True
        if left:
            self.counts["turns not asked, after one without a reply"] += len(left)

    def outcome(self) -> Outcome:
        """Return the response rows of all turns."""
        return Outcome(
            rows=[] if self.bad else self.rows,
            bad=self.bad,
            counts=dict(self.counts),
            tokens_in=self.tokens_in,
            tokens_out=self.tokens_out,
        )


def as_asked(row: Record, options: SampleOptions) -> Record:
    """Return a prompt row with the options of the chat template that its model sees."""
    kwargs = {**options.template_kwargs, **(row.get(KWARGS) or {})}
    return {**row, KWARGS: kwargs} if kwargs else row


def _responses(row: Record, completion: Completion, model: str) -> list[Record]:
    rows = []
    for k, (text, reason) in enumerate(zip(completion.texts, completion.finish_reasons, strict=True)):
        if reason in ENDS or reason == UNFINISHED:
            thought = completion.thought(k)
            rows.append(
                {
                    **row,
                    "id": f"{row['id']}/{k}",
                    "prompt_id": row["id"],
                    "prompt": row["prompt"],
                    "response": None if reason == UNFINISHED else text.strip(),
                    "thought": (thought.text or None) if thought else None,
                    "k": k,
                    "finish_reason": reason,
                    "model": model,
                }
            )
    return rows


def _finish_counts(completion: Completion, responses: int) -> dict[str, int]:
    ended = zip(completion.texts, completion.finish_reasons, strict=True)
    empty = sum(reason in ENDS and not text.strip() for text, reason in ended)
    return {
        "responses": responses,
        **counts_of_ends(completion.finish_reasons),
        **({"empty replies": empty} if empty else {}),
        **closed_thoughts(completion.thoughts),
    }


def _why_none(completion: Completion) -> str:
    """Return a message that says why a prompt got no response."""
    if refusal := template_refusal(completion):
        return refusal
    reason = completion.finish_reasons[0]
    about = {
        "prompt-too-long": "the prompt is too long for the model",
        "content_filter": "a content filter refused it",
        "empty": "the model's replies are empty",
        "refused": "the server refused it",
    }.get(reason, f"no reply: {reason}")
    return f"{about}: {completion.why}" if completion.why else about
