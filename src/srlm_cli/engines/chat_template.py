"""A chat as a model reads it: by its own template, once, with no further special tokens."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from json import dumps
from string import ascii_letters
from typing import TYPE_CHECKING

from srlm_cli.errors import BadRow
from srlm_cli.records import Message, encodable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    today: str | None,
    add_generation_prompt: bool = True,
) -> str:
    """Return a dialogue as its model reads it, ready for the assistant's turn where a generation prompt is added.

    `today` is the moment, in ISO form, that a template writes which asks for the date; None is now. Raises BadRow where
    the template refuses the dialogue.
    """
    dated = {"chat_template": clock(today) + tokenizer.get_chat_template()} if today and writes_date(tokenizer) else {}
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **dated
        )
    except Exception as error:  # a template is a program of the model's makers: anything can be raised
        said = " ".join(str(error).split()) or type(error).__name__
        raise BadRow(f"the chat template refuses it: {said}") from error


@cache
def clock(today: str) -> str:
    """Return the beginning of a chat template that writes this moment as the current one, by what strftime knows.

    It is a macro: transformers makes a text of a function that is given to a template.
    """
    moment = datetime.fromisoformat(today)
    directives = [f"%{flag}{letter}" for flag in ("-", "") for letter in ascii_letters]
    written = {directive: moment.strftime(directive) for directive in directives}
    parts = "".join(f" | replace({dumps(one)}, {dumps(text)})" for one, text in written.items() if text != one)
    return f"{{% macro strftime_now(format) %}}{{{{ format{parts} }}}}{{% endmacro %}}"


def now() -> str:
    """Return this moment as `rendered` takes it."""
    return datetime.now().isoformat(timespec="seconds")


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a chat template asks for the date, as those of Llama 3.1 and Granite 3 do."""
    return "strftime_now" in str(tokenizer.chat_template)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a rendered text; the template has written its special tokens already."""
    return tokenizer(encodable(text), add_special_tokens=False)["input_ids"]


def stop_ids(configured: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends a turn: the tokenizer's EOS and those of the generation settings."""
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*ids, tokenizer.eos_token_id] if token is not None})
