"""Render a dialogue as tokens: the prompt exactly as in sampling, then the target."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from srlm_cli.engines.chat_template import FIELDS, MARK, ChatTemplate, Kwargs, assistant, token_ids
from srlm_cli.errors import BadRow, DataError
from srlm_cli.records import KWARGS, Message, Record, as_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a person should know of a rendered row; `Sequence.notes` has some of them.
KEPT = "with the reply as it is, where the chat template would change it"
ADDED = "with text of the chat template before the reply, which is trained on"
CLOSED = "with thinking turned off before the reply, which is not trained on"
THOUGHT = "with a thought, which is trained on"
LEFT_OUT = "with a thought that is left out"
SPLIT = "with prompt and reply tokenized separately, where the tokenizer would merge them"


class Sequence(NamedTuple):
    """Token ids of a dialogue, where its target and in that its answer begin, and what a person should know of it."""

    ids: list[int]
    start: int
    answer: int
    notes: tuple[str, ...] = ()


class Reply(NamedTuple):
    """The assistant's turns of a row: the turns before the last, the last one's text, and its thought."""

    before: list[Message]
    text: str
    thought: str


class Renderer:
    """Renders the rows of a training by a model's chat template.

    `stops` are tokens at which sampling ends a turn, beside the tokenizer's EOS; only special tokens count, since a
    configuration may still have the default number of another vocabulary. With `train_thoughts` the thought of a
    reply is a part of the target, else it is left out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate | None = None,
        stops: Iterable[int] = (),
        train_thoughts: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template or ChatTemplate(tokenizer)
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self.stop_ids = ({*stops} & special | {tokenizer.eos_token_id}) - {None}
        self.stops = {str(token) for token in tokenizer.convert_ids_to_tokens(sorted(self.stop_ids))} - {"None"}
        self.train_thoughts = train_thoughts

    def rendered(self, row: Record, fields: tuple[str, ...]) -> list[Sequence]:
        """Return the sequence of each reply of a row, all after the same tokens of the prompt.

        Where one has a thought, no thought is put before the others: their turns begin with the answer. Raises BadRow
        where the template refuses the dialogue, where prompt and reply cannot be separated, or where the turn of a
        reply without a thought begins within one.
        """
        kwargs = row.get(KWARGS)
        if kwargs is not None and not isinstance(kwargs, dict):
            raise BadRow(f"expected `{KWARGS}` to be an object")
        replies = [self._reply(row, field) for field in fields]
        thinks = self.train_thoughts and any(reply.thought for reply in replies)
        return [self._sequence(as_messages(row["prompt"]), reply, thinks, kwargs) for reply in replies]

    def _reply(self, row: Record, field: str) -> Reply:
        """Return a reply; its thought is in a field of its message or its row, or at the beginning of its text."""
        turns = [assistant(row[field])] if isinstance(row[field], str) else row[field]
        *before, last = turns
        text = last["content"]
        named = [last.get(name) for name in FIELDS] + [row.get("thought") if field == "completion" else None]
        thought = next((said for said in named if isinstance(said, str) and said.strip()), "")
        if not thought:
            answer, found = self.template.marks.divide(text)
            if found and not found.closed:
                raise BadRow("the reply is a thought without an end")
            text, thought = (answer, found.text) if found else (text, "")
        return Reply(before, text, thought)

    def _sequence(self, messages: list[Message], reply: Reply, thinks: bool, kwargs: Kwargs | None) -> Sequence:
        """Return a dialogue as its model reads it, rendered by the chat template without further special tokens.

        It begins with the tokens that sampling would show the model: one BOS, up to and with the generation prompt. The
        target is the rest, up to the token that ends a turn in sampling. A reply without a thought comes after a
        thought that is turned off, or closed, and is not part of the target.
        """
        template, notes = self.template, []
        if held := next((stop for stop in self.stops if stop in reply.text), ""):
            raise BadRow(f"the reply contains {held}, which ends a turn")
        if reply.before:
            return self._turns(messages, reply, kwargs)
        plain = template.render(messages, kwargs)
        if thinks:
            kwargs = template.thinking(messages, kwargs)
            head = template.render(messages, kwargs)
            if reply.thought:
                before, between = template.around(messages, kwargs)
                lead = before + reply.thought.strip() + between
                notes.append(THOUGHT)
            elif template.marks.opened(head):
                raise BadRow("one reply has a thought and the other has none, where the prompt opens one")
            else:
                lead = template.lead(messages, kwargs)
        else:
            head, lead = template.answering(messages, kwargs)
            notes += [CLOSED] * (head != plain) + [LEFT_OUT] * bool(reply.thought)
        target, note = self._target(messages, reply.text, head, lead, kwargs)
        return self._tokens(head, lead, target, [*notes, *note])

    def _target(
        self, messages: list[Message], text: str, head: str, lead: str, kwargs: Kwargs | None
    ) -> tuple[str, list[str]]:
        """Return the answer with the end of its turn, and what of it is not as the template has it."""
        whole = self.template.render([*messages, assistant(text)], kwargs, add_generation_prompt=False)
        frame = self.template.render([*messages, assistant(MARK)], kwargs, add_generation_prompt=False)
        before, shown, after = frame.partition(MARK)
        if not shown:
            raise BadRow("the chat template does not show the reply as it is")
        said, notes = text, [KEPT]
        bare, own_end = text.strip(), text[len(text.rstrip()) :]
        begin = whole.find(bare, len(before)) if bare and whole.startswith(before) else -1
        rest = whole[begin + len(bare) :]
        if begin >= 0 and not whole[len(before) : begin].strip() and rest in (after, own_end + after):
            said, notes = whole[len(before) : begin] + bare + rest[: len(rest) - len(after)], []
        notes += [ADDED] * bool(lead.strip() and not self.template.marks.pattern.search(lead))
        return said + self.template.end(messages, self.stops, kwargs), notes

    def _tokens(self, head: str, lead: str, target: str, notes: list[str]) -> Sequence:
        """Return texts as tokens; the target ends with a token that ends a turn."""
        prompt, ids = token_ids(self.tokenizer, head), token_ids(self.tokenizer, head + lead + target)
        if ids[:2] == [self.tokenizer.bos_token_id] * 2:
            raise DataError(
                f"a rendered row begins with two {self.tokenizer.bos_token}", "fix the model's chat template"
            )
        if ids[: len(prompt)] != prompt:
            ids = self._split(prompt, lead + target, ids)
            notes.append(SPLIT)
        if ids[-1] not in self.stop_ids or len(ids) == len(prompt):
            ids.append(self.tokenizer.eos_token_id)
        answer = len(prompt) + len(token_ids(self.tokenizer, lead)) if lead.strip() else len(prompt)
        return Sequence(ids, len(prompt), min(answer, len(ids)), tuple(notes))

    def _turns(self, messages: list[Message], reply: Reply, kwargs: Kwargs | None) -> Sequence:
        """Return a dialogue with several turns of the assistant after its prompt, as the template has it."""
        turns = [*reply.before, assistant(reply.text)]
        head = self.template.render(messages, kwargs)
        whole = self.template.render([*messages, *turns], kwargs, add_generation_prompt=False)
        if not whole.startswith(head) or not all(turn["content"].strip() in whole[len(head) :] for turn in turns):
            raise BadRow("the chat template changes replies of several turns: one turn can be trained on as it is")
        target = whole[len(head) :]
        ends = [at + len(stop) for stop in self.stops if (at := target.rfind(stop)) >= 0]
        return self._tokens(head, "", target[: max(ends)] if ends else target, [])

    def _split(self, head: list[int], target: str, joined: list[int]) -> list[int]:
        """Return prompt and target tokenized separately; raise BadRow where that is another text.

        Byte-level BPE merges the line breaks at the end of a prompt and at the beginning of a reply. Sampling never
        sees such a token.
        """
        ids = head + token_ids(self.tokenizer, target)
        one, other = (self.tokenizer.decode(some, clean_up_tokenization_spaces=False) for some in (ids, joined))
        if one != other:
            raise BadRow("the tokenizer merges the end of the prompt and the beginning of the reply")
        return ids
