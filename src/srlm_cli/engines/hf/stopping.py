"""Stop conditions: an end token, a stop text, a last line, or the maximum length."""

from __future__ import annotations

from functools import lru_cache

from srlm_cli.engines.base import Sampling, end_of
from srlm_cli.engines.chat_template import stop_ids

UNFINISHED = "\ufffd"  # a tokenizer writes this for bytes of an incomplete character


class Stops:
    """Return whether tokens end a completion, and turn them into its text."""

    def __init__(self, net, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids = set(stop_ids(net.generation_config.eos_token_id, tokenizer))
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._piece = lru_cache(maxsize=None)(self._spelled)

    def ended(self, tokens: list[int], sampling: Sampling) -> bool:
        """Return whether the last of these tokens ends the completion before its full length.

        The text is checked only if the last token has the last character of a stop text, or ends a line.
        """
        if tokens[-1] in self.ids:
            return True
        if not sampling.stop and not sampling.last_line:
            return False
        piece = self._piece(tokens[-1])
        signs = [stop[-1] for stop in sampling.stop if stop] + ["\n"] * bool(sampling.last_line) + [UNFINISHED]
        if not any(sign in piece for sign in signs):
            return False
        return end_of(self.tokenizer.decode(tokens, skip_special_tokens=True), sampling) is not None

    def finished(self, tokens: list[int], sampling: Sampling) -> tuple[str, str, int]:
        """Return the text, the finish reason and the number of tokens of a completion."""
        end = next((at for at, token in enumerate(tokens) if token in self.ids), None)
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        cut = end_of(text, sampling)
        reason = "length" if end is None and cut is None else "stop"
        return text[:cut], reason, len(tokens) if end is None else end + 1

    def _spelled(self, token: int) -> str:
        """Return the text of a token inside a text; alone, some tokenizers remove its leading space."""
        before = self.tokenizer.decode(self._anchor)
        return self.tokenizer.decode([*self._anchor, token])[len(before) :]
