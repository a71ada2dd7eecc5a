"""One dialogue as tokens: the prompt as sampling shows it to the model, then the reply to be learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from srlm_cli.engines.chat_template import rendered, token_ids
from srlm_cli.errors import BadRow, DataError
from srlm_cli.records import Message, Prompt, as_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "A-reply-that-no-template-changes"

# What a person should know of a rendered row; `Sequence.notes` has some of them.
KEPT = "with the reply as it is, where the chat template would change it"
ADDED = "with text of the chat template before the reply, which is trained on"
SPLIT = "with prompt and reply tokenized separately, where the tokenizer would merge them"


class Sequence(NamedTuple):
    """Token ids of a dialogue, where its target begins, and what a person should know of it."""

    ids: list[int]
    start: int
    notes: tuple[str, ...] = ()


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Prompt, today: str = "") -> Sequence:
    """Return a dialogue as its model reads it, rendered by the chat template without further special tokens.

    It begins with the tokens that sampling would show the model: one BOS, up to and with the generation prompt. The
    target is the rest, with the end of the turn. A template that changes the reply (it drops thoughts) or does not
    repeat its own generation prompt (it opens a thought there) does not decide the target: that is the reply as it is.
    `today` is the date of a template that writes one. Raises BadRow where the template refuses the dialogue or where
    prompt and reply cannot be told apart, DataError when the template itself makes two BOS.
    """
    opened = rendered(tokenizer, as_messages(prompt), today=today, add_generation_prompt=True)
    target, note = _target(tokenizer, as_messages(prompt), answer(completion), opened, today)
    head, ids = token_ids(tokenizer, opened), token_ids(tokenizer, opened + target)
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        raise DataError(f"a rendered row begins with two {tokenizer.bos_token}", "fix the model's chat template")
    merged = ids[: len(head)] != head
    if merged:
        ids = _split(tokenizer, head, target, ids)
    if tokenizer.eos_token_id not in ids[len(head) :]:
        ids.append(tokenizer.eos_token_id)
    return Sequence(ids, len(head), tuple(filter(None, (note, SPLIT if merged else ""))))


def answer(completion: Prompt) -> list[Message]:
    """Return a completion as the assistant's messages."""
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _target(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], reply: list[Message], opened: str, today: str
) -> tuple[str, str]:
    """Return the text to be learned after the generation prompt, and what of it is not as the template has it."""
    whole = rendered(tokenizer, messages + reply, today=today, add_generation_prompt=False)
    if whole.startswith(opened):
        target = whole[len(opened) :]
        if all(turn["content"].strip() in target for turn in reply):
            before = target[: target.index(reply[0]["content"].strip())]
            return target, ADDED if before.strip() else ""
    if len(reply) > 1:
        raise BadRow("the chat template changes replies of several turns: one turn can be trained on as it is")
    frame = rendered(tokenizer, messages + answer(MARK), today=today, add_generation_prompt=False)
    before, _, end = frame.partition(MARK)
    text = reply[0]["content"]
    if (begun := opened.removeprefix(before).strip()) and opened.startswith(before):
        said = text.lstrip().removeprefix(begun)  # the thought is open already
        text = text if said == text.lstrip() else said.removeprefix("\n")
    return text + end, KEPT


def _split(tokenizer: PreTrainedTokenizerBase, head: list[int], target: str, joined: list[int]) -> list[int]:
    """Return prompt and target tokenized separately; raise BadRow where that is another text.

    Byte-level BPE merges the line breaks at the end of a prompt and at the beginning of a reply. Sampling never sees
    such a token.
    """
    ids = head + token_ids(tokenizer, target)
    one, other = (tokenizer.decode(some, clean_up_tokenization_spaces=False) for some in (ids, joined))
    if one != other:
        raise BadRow("the tokenizer merges the end of the prompt and the beginning of the reply")
    return ids
