"""A chat as a model reads it: by its own template, once, with no further special tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srlm_cli.errors import EngineError
from srlm_cli.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: list[Message], model: str) -> str:
    """Return a chat as text, ready for the assistant's turn; raise EngineError where the template refuses it."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's makers: anything can be raised
        raise EngineError(f"the chat template of {model} refused a prompt: {error}") from error


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a rendered text; the template has written its special tokens already."""
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate is no text to a tokenizer
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stop_ids(configured: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends a turn: the tokenizer's EOS and those of the generation settings."""
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*ids, tokenizer.eos_token_id] if token is not None})
