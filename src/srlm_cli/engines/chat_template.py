"""Renders conversations with the chat template of a model, and separates thought and answer in its output."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime
from functools import cache, cached_property
from json import dumps
from string import ascii_letters
from typing import TYPE_CHECKING, Any

from srlm_cli.engines.base import EngineSpec, Request
from srlm_cli.errors import BadRow, EngineError, OptionError
from srlm_cli.records import KWARGS, Message, encodable
from srlm_cli.thoughts import MARKS, SWITCHES, UNFINISHED, Family, Marks, Thought, marks_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kwargs = dict[str, Any]

MARK = "A-reply-that-no-template-changes"
THOUGHT = "A-thought-that-no-template-changes"
HELLO: list[Message] = [{"role": "user", "content": MARK}]
FIELDS = ("reasoning_content", "reasoning", "thinking")  # where a message holds its thought


class ChatTemplate:
    """The chat template of a tokenizer with the options of a run.

    `today` is the time, in ISO format, for templates that write the date; None is the current time. `thinking` is `on`,
    `off` or `auto` (the default of the template). `kwargs` are variables for the template; those of a row replace them.
    `marks` are the marks of thoughts. `name` is the model's name in errors. Raises OptionError for a variable that the
    template does not use.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        today: str | None = None,
        thinking: str = "auto",
        kwargs: Kwargs | None = None,
        marks: Marks = MARKS,
        name: str = "the model",
    ) -> None:
        self.tokenizer, self.today, self.marks = tokenizer, today or None, marks
        self.source = str(tokenizer.get_chat_template())
        self.kwargs: Kwargs = dict(kwargs or {})
        for key in self.kwargs:
            if not self._names(key):
                raise OptionError(f"the chat template of {name} does not use `{key}`", "--template-kwargs without it")
        if thinking != "auto":
            if not self.switch:
                opens = self.marks.opened(self._rendered(HELLO, self.kwargs, True))
                only = ": it always opens one" if opens else ""
                raise OptionError(f"the chat template of {name} has no switch for thoughts{only}", "--thinking auto")
            self.kwargs[self.switch] = thinking == "on"

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, spec: EngineSpec) -> ChatTemplate:
        """Return the template of a tokenizer with the options of an engine."""
        kwargs = json.loads(spec.template_kwargs) if spec.template_kwargs else {}
        return cls(
            tokenizer, today=spec.today, thinking=spec.thinking, kwargs=kwargs, marks=marks_of(spec.think_markers),
            name=spec.tokenizer or spec.model or "the model",
        )  # fmt: skip

    # --- rendering ---------------------------------------------------------------------------

    def render(self, messages: list[Message], more: Kwargs | None = None, *, add_generation_prompt: bool = True) -> str:
        """Return a rendered dialogue, with the generation prompt by default.

        `more` are the template variables of a row. Raises BadRow if the template refuses the dialogue or does not use
        one of the variables.
        """
        return self._rendered(messages, self._with(more), add_generation_prompt)

    def turn(self, request: Request) -> str:
        """Return the rendered messages of a request, followed by its thought, closed, and its prefix.

        A prefix is the beginning of the answer. If the request has no thought, the prefix follows an empty one.
        """
        if request.thought or not request.prefix or not self.family:
            chat = self.render(request.messages, request.template_kwargs)
            closing = self.closing(chat, request.thought) if request.thought else ""
            return chat + request.thought + closing + request.prefix
        return "".join(self.answering(request.messages, request.template_kwargs)) + request.prefix

    def may_think(self, more: Kwargs | None = None) -> bool:
        """Return whether a turn can begin with a thought: the template knows thoughts, and they are not turned off."""
        return self.family is not None and not (self.switch and self._with(more).get(self.switch) is False)

    def answering(self, messages: list[Message], more: Kwargs | None = None) -> tuple[str, str]:
        """Return a dialogue ready for an answer without a thought, and the spaces that the template puts before one.

        That is the generation prompt, with thoughts turned off where the template knows how, or with an empty one that
        is closed.
        """
        kwargs = self._with(more)
        if self.family and self.switch:
            kwargs[self.switch] = False
        head = self._rendered(messages, kwargs, True)
        if self.marks.opened(head):
            return head.rstrip("\n") + self._closing(head), ""
        lead = self._lead(messages, kwargs, head)
        if lead.strip() and self.marks.pattern.search(lead):  # an empty thought, or the mark of an answer
            return head + lead, ""
        return head, lead

    def lead(self, messages: list[Message], more: Kwargs | None = None) -> str:
        """Return what a model writes between the generation prompt and an answer, if it does not think."""
        kwargs = self._with(more)
        lead = self._lead(messages, kwargs, self._rendered(messages, kwargs, True))
        return "" if any(mark["open"] for mark in self.marks.pattern.finditer(lead)) else lead

    def _lead(self, messages: list[Message], kwargs: Kwargs, head: str) -> str:
        """Return what the template writes between its generation prompt and an answer."""
        try:
            before, _, _ = self._rendered([*messages, assistant(MARK)], kwargs, False).partition(MARK)
        except BadRow:
            return ""
        return before[len(head) :] if before.startswith(head) else ""

    def thinking(self, messages: list[Message], more: Kwargs | None = None) -> Kwargs:
        """Return the options of a row with a thought: with thoughts on, where the generation prompt turns them off."""
        kwargs = self._with(more)
        if self.switch and kwargs.get(self.switch) is None:
            marks = list(self.marks.pattern.finditer(head := self._rendered(messages, kwargs, True)))
            if marks and marks[-1]["close"] and not head[marks[-1].end() :].strip():
                return {**kwargs, self.switch: True}
        return kwargs

    def around(self, messages: list[Message], more: Kwargs | None = None) -> tuple[str, str]:
        """Return the text between the generation prompt and a thought, and the text between the thought and its answer.

        They are the template's, where it shows the thoughts of messages, else those of its family.
        """
        head = self.render(messages, more)
        for field in FIELDS:
            reply = {**assistant(MARK), field: THOUGHT}
            try:
                whole = self.render([*messages, reply], more, add_generation_prompt=False)
            except BadRow:
                continue
            before, found, rest = whole.partition(THOUGHT)
            between, shown, _ = rest.partition(MARK)
            if found and shown and before.startswith(head):
                return before[len(head) :], between
        family = self.family or self.marks.families[0]
        return "" if self.marks.opened(head) else family.opening, family.closing

    def end(self, messages: list[Message], stops: set[str], more: Kwargs | None = None) -> str:
        """Return what the template writes after an answer up to the first of the tokens that end a turn.

        A template that writes none has the header of the next turn there (GLM). It is empty where there is none either.
        """
        for rest in ([], HELLO):
            try:
                whole = self.render([*messages, assistant(MARK), *rest], more, add_generation_prompt=False)
            except BadRow:
                continue
            after = whole.rpartition(MARK)[0].rpartition(MARK)[2] if rest else whole.rpartition(MARK)[2]
            ends = [at + len(stop) for stop in stops if (at := after.find(stop)) >= 0]
            if ends:
                return after[: min(ends)]
        return ""

    def _with(self, more: Kwargs | None) -> Kwargs:
        """Return the template variables of the run, updated with those of a row."""
        for key in more or ():
            if not self._names(key):
                raise BadRow(f"the chat template does not use `{key}` of `{KWARGS}`")
        return {**self.kwargs, **(more or {})}

    def _closing(self, head: str) -> str:
        """Return what closes the thought that a generation prompt has opened."""
        family = self.marks.named_in(head[-200:]) or self.family or self.marks.families[0]
        return "\n" + family.closing if family.opening.endswith("\n") else family.closing

    def _rendered(self, messages: list[Message], kwargs: Kwargs, add_generation_prompt: bool) -> str:
        if self.takes_parts:
            messages = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
        return rendered(
            self.tokenizer, messages, today=self.today, add_generation_prompt=add_generation_prompt, kwargs=kwargs
        )

    # --- what the template knows -------------------------------------------------------------

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template needs the content of a message as a list of parts, as that of Idefics 3 does."""
        if "content" not in self.source:
            return False
        parts = [{"role": "user", "content": [{"type": "text", "text": MARK}]}]
        shown = []
        for messages in (HELLO, parts):
            try:
                shown.append(MARK in rendered(self.tokenizer, messages, today=self.today))
            except BadRow:
                shown.append(False)
        return shown == [False, True]

    @cached_property
    def switch(self) -> str | None:
        """The name of the variable that turns thinking on and off, or None if the template has none."""
        for name in SWITCHES:
            if self._names(name):
                try:
                    on, off = (self._rendered(HELLO, {**self.kwargs, name: value}, True) for value in (True, False))
                except BadRow:
                    continue
                if on != off:
                    return name
        return None

    @cached_property
    def family(self) -> Family | None:
        """The family of the marks in the template's source, or in the vocabulary if the template only has a switch."""
        if found := self.marks.named_in(self.source):
            return found
        known = set(self.tokenizer.get_added_vocab()) if self.switch else set()
        return next((one for one in self.marks.families if one.tokens and set(one.tokens) <= known), None)

    def _names(self, option: str) -> bool:
        return re.search(rf"\b{re.escape(option)}\b", self.source) is not None

    # --- what was written --------------------------------------------------------------------

    @cached_property
    def kept(self) -> frozenset[int]:
        """The special tokens that are kept in a decoded text, because they mark the thought."""
        known = self.tokenizer.get_added_vocab()
        return frozenset(known[token] for token in self.marks.tokens(set(known)))

    @cached_property
    def skipped(self) -> frozenset[int]:
        """The special tokens that are removed from a decoded text."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})  # all_special_ids has only those with a role
        special = {at for at, token in added.items() if token.special}
        return frozenset(special.union(self.tokenizer.all_special_ids)) - self.kept

    def text(self, ids: list[int]) -> str:
        """Return the decoded text of tokens, with the marks of thoughts."""
        if self.kept.isdisjoint(ids):
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        return self.tokenizer.decode([token for token in ids if token not in self.skipped])

    def closing(self, prompt: str, text: str) -> str:
        """Return the text that closes an open thought at the end of a text, or an empty text if no thought is open."""
        opened = self.marks.opened(prompt)
        return self.marks.closing(text, opened, self.marks.named_in(prompt[-200:]) if opened else None)


def answered(text: str, reason: str, thought: Thought | None) -> tuple[str, str, Thought | None]:
    """Return the answer, the finish reason and the thought; a thought without an end has an empty answer."""
    return (text, reason, thought) if thought is None or thought.closed else ("", UNFINISHED, thought)


def assistant(content: str) -> Message:
    """Return a message of the assistant."""
    return {"role": "assistant", "content": content}


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    today: str | None,
    add_generation_prompt: bool = True,
    kwargs: Kwargs | None = None,
) -> str:
    """Return a dialogue by a tokenizer's template; raise BadRow where that refuses it."""
    dated = {"chat_template": clock(today) + tokenizer.get_chat_template()} if today and writes_date(tokenizer) else {}
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **dated, **(kwargs or {})
        )
    except Exception as error:  # a template is a program of the model's authors: it can raise anything
        said = " ".join(str(error).split()) or type(error).__name__
        if type(error).__name__ == "TemplateSyntaxError":  # of jinja2; no row can change it
            hint = "correct chat_template.jinja or tokenizer_config.json in the folder of the model"
            raise EngineError(f"the chat template is broken: line {error.lineno}: {said}", hint) from error
        raise BadRow(f"the chat template refuses it: {said}") from error


@cache
def clock(today: str) -> str:
    """Return a Jinja macro `strftime_now` that writes this time; it goes before a chat template.

    It is a macro because transformers turns a function that is given to a template into text.
    """
    moment = datetime.fromisoformat(today)
    directives = [f"%{flag}{letter}" for flag in ("-", "") for letter in ascii_letters]
    written = {directive: moment.strftime(directive) for directive in directives}
    parts = "".join(f" | replace({dumps(one)}, {dumps(text)})" for one, text in written.items() if text != one)
    return f"{{% macro strftime_now(format) %}}{{{{ format{parts} }}}}{{% endmacro %}}"


def now() -> str:
    """Return the current time in the form that `rendered` takes."""
    return datetime.now().isoformat(timespec="seconds")


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a chat template writes the date, as those of Llama 3.1 and Granite 3 do."""
    return "strftime_now" in str(tokenizer.chat_template)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a rendered text; special tokens are not added, as the template has written them."""
    return tokenizer(encodable(text), add_special_tokens=False)["input_ids"]


def stop_ids(configured: int | Iterable[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return all tokens that end a turn: the tokenizer's EOS and those of the generation config."""
    ids = [configured] if configured is None or isinstance(configured, int) else list(configured)
    return sorted({token for token in [*ids, tokenizer.eos_token_id] if token is not None})
