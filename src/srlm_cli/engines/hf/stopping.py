"""Stop conditions: an end token, a stop text, a last line, or the maximum length."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from srlm_cli.engines.base import Sampling, end_of
from srlm_cli.engines.chat_template import ChatTemplate, answered, stop_ids
from srlm_cli.thoughts import Thought

UNFINISHED = "\ufffd"  # a tokenizer writes this for bytes of an incomplete character


class Written(NamedTuple):
    """A finished completion: its answer, finish reason, thought, and number of tokens."""

    text: str
    reason: str
    thought: Thought | None
    tokens: int


class Stops:
    """Return whether tokens end a completion, and turn them into its text."""

    def __init__(self, configured: int | list[int] | None, template: ChatTemplate) -> None:
        """Take the tokens that end a turn by a model's generation settings."""
        self.template, self.tokenizer = template, template.tokenizer
        self.ids = set(stop_ids(configured, self.tokenizer))
        self._anchor = self.tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._piece = lru_cache(maxsize=None)(self._spelled)

    def ended(self, tokens: list[int], sampling: Sampling, opened: bool = False) -> bool:
        """Return whether the last of these tokens ends the completion before its full length.

        The text is checked only if the last token has the last character of a stop text, or ends a line. `opened`: the
        prompt has opened a thought.
        """
        if tokens[-1] in self.ids:
            return True
        if not sampling.stop and not sampling.last_line:
            return False
        piece = self._piece(tokens[-1])
        signs = [stop[-1] for stop in sampling.stop if stop] + ["\n"] * bool(sampling.last_line) + [UNFINISHED]
        if not any(sign in piece for sign in signs):
            return False
        return end_of(self.template.text(tokens), sampling, self.template.marks, opened) is not None

    def finished(self, tokens: list[int], sampling: Sampling, opened: bool = False, at_limit: bool = False) -> Written:
        """Return a completion as its answer, finish reason, thought (closed `at_limit`) and number of tokens."""
        end = next((at for at, token in enumerate(tokens) if token in self.ids), None)
        text = self.template.text(tokens[:end])
        cut = end_of(text, sampling, self.template.marks, opened)
        reason = "length" if end is None and cut is None else "stop"
        answer, thought = self.template.marks.divide(text[:cut], opened)
        if thought and at_limit:
            thought = thought._replace(at_limit=True)
        return Written(*answered(answer, reason, thought), len(tokens) if end is None else end + 1)

    def closing(self, tokens: list[int], prompt: str) -> list[int]:
        """Return the tokens that close the open thought of a completion; none if no thought is open."""
        text = self.template.closing(prompt, self.template.text(tokens))
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _spelled(self, token: int) -> str:
        """Return the text of a token inside a text; alone, some tokenizers remove its leading space."""
        before = self.tokenizer.decode(self._anchor)
        return self.tokenizer.decode([*self._anchor, token])[len(before) :]
