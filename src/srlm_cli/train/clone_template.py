"""A chat template for a base model: its text, its special tokens and their embeddings, and the token that ends a turn.

A template comes from a name, a file or another model, as TRL's `clone_chat_template` takes it from a model. Only those
tokens are added that the template writes.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from srlm_cli.engines.chat_template import MARK, THOUGHT, ChatTemplate, assistant
from srlm_cli.errors import BadRow, EngineError, OptionError
from srlm_cli.models.embedded import EMBEDDED
from srlm_cli.models.load import base_tokenizer, end_of_turn_ids, load_tokenizer
from srlm_cli.records import Message

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from srlm_cli.train.options import TrainSpec

OPTION = "--chat-template"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = re.compile(r"<[|｜][^<>\s'\"{}]{1,40}[|｜]>|<\|\w+>|<\w+\|>|<(?:start|end)_of_\w+>|</?s>")  # of all families
USER: Message = {"role": "user", "content": MARK}
SYSTEM: Message = {"role": "system", "content": "A-system-message"}


def clone_template(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Give a tokenizer the chat template of a name, file or model, its special tokens, and its end of a turn as EOS.

    Raises OptionError where the source has no template, where this does not write the messages, or where nothing ends
    a turn.
    """
    from tokenizers import AddedToken

    text, theirs = find_template(tokenizer, source)
    if tokenizer.bos_token is None and "bos_token" in text:  # some templates (Llama 3) refuse a model without one
        text = "{% set bos_token = '' %}" + text
    tokenizer.chat_template = text
    written = "\n".join(dialogues(tokenizer, source))
    found = {token: AddedToken(token, special=True, normalized=False) for token in SPECIAL.findall(written)}
    found |= {token: about for token, about in theirs.items() if token in written}
    tokenizer.add_tokens([found[token] for token in sorted(found)])
    end = end_of_turn(tokenizer, source) or tokenizer.eos_token
    if end is None:
        raise OptionError(f"{OPTION} {source}: no special token ends a turn", "the template writes one after a reply")
    tokenizer.eos_token = end
    tokenizer.pad_token = tokenizer.pad_token or end


def find_template(tokenizer: PreTrainedTokenizerBase, source: str) -> tuple[str, dict[str, AddedToken]]:
    """Return the text of a template, and the tokens that were added to the vocabulary of its model, if it has one."""
    if source == "chatml":
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]  # as the model has seen texts
        return "{{ bos_token }}" * begins + CHATML, {}
    path = Path(source)
    if source in (names := trl_names()):
        path = trl_folder() / f"{source}.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8-sig"), {}
        except (OSError, ValueError) as error:
            raise OptionError(f"{OPTION} {source}: {error}") from None
    if not path.exists() and os.sep not in source and source not in EMBEDDED:
        raise OptionError(f"{OPTION} {source}: no such template", f"a file, a model, chatml, {', '.join(names)}")
    theirs = load_tokenizer(source)
    return theirs.get_chat_template(), {token.content: token for token in theirs.added_tokens_decoder.values()}


def trl_folder() -> Path:
    """Return the folder of the chat templates in the installed TRL."""
    spec = find_spec("trl")
    return Path(spec.origin or "").parent / "chat_templates" if spec else Path("chat_templates")


def trl_names() -> list[str]:
    """Return the names of the chat templates in the installed TRL, without their variants for training."""
    return sorted(file.stem for file in trl_folder().glob("*.jinja") if not file.stem.endswith("_training"))


def dialogues(tokenizer: PreTrainedTokenizerBase, source: str) -> list[str]:
    """Return what the template writes: dialogues, with a system message and a thought where it accepts them.

    The marks of its thoughts come last, since some templates (Gemma 4) do not show the thoughts of messages. Raises
    OptionError where the template refuses the simplest dialogue, or does not write its messages.
    """
    template = ChatTemplate(tokenizer, name=f"{OPTION} {source}")
    reply = assistant(MARK)
    try:
        whole = template.render([USER, reply], add_generation_prompt=False)
    except (BadRow, EngineError) as error:
        raise OptionError(f"{OPTION} {source}: {getattr(error, 'message', error)}") from None
    if whole.count(MARK) != 2:
        raise OptionError(
            f"{OPTION} {source}: the template does not write a message and its reply", "a Jinja chat template of text"
        )
    found = [whole]
    thinks = {**reply, "reasoning_content": THOUGHT}
    for messages in ([USER], [USER, reply, USER], [SYSTEM, USER], [USER, thinks]):
        try:
            found.append(template.render(messages, add_generation_prompt=messages[-1]["role"] == "user"))
        except BadRow:
            continue
    return [*found, template.family.opening + template.family.closing] if template.family else found


def special_tokens(tokenizer: PreTrainedTokenizerBase, source: str) -> list[str]:
    """Return the added tokens of a vocabulary that its template writes."""
    written = "\n".join(dialogues(tokenizer, source))
    return [token for token in tokenizer.get_added_vocab() if token in written]


def end_of_turn(tokenizer: PreTrainedTokenizerBase, source: str) -> str | None:
    """Return the special token that ends a reply; None where the template writes none.

    It is the last one of what comes after a reply both at the end and before another turn: after their end some
    templates (Phi-3) close a whole dialogue with another token. Where the two begin differently, it is the last one
    at the end (gpt-oss), or else the first one of the next turn (GLM).
    """
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    template = ChatTemplate(tokenizer, name=f"{OPTION} {source}")
    reply = assistant(MARK)
    last = template.render([USER, reply], add_generation_prompt=False).rpartition(MARK)[2]
    try:
        next_turn = template.render([USER, reply, {**USER, "content": THOUGHT}], add_generation_prompt=False)
    except BadRow:
        next_turn = ""
    following = next_turn.rpartition(MARK)[2].partition(THOUGHT)[0]
    shared = os.path.commonprefix([last, following])
    for text, place in ((shared, -1), (last, -1), (following, 0)):
        if inside := in_order(text, tokens):
            return inside[place]
    return None


def in_order(text: str, tokens: set[str]) -> list[str]:
    """Return the tokens in a text, in their order."""
    return sorted((token for token in tokens if token in text), key=text.find)


# --- the model -------------------------------------------------------------------------------


def extend_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: TrainSpec) -> list[int]:
    """Give a model embeddings for its template's tokens, and the end of a turn; return the tokens to be learned.

    These are the special tokens of the template, except for those that the model has learned: its BOS and EOS. A new
    embedding is the mean of all old ones, in the input and in the output (Hewitt, 2021, "Initializing new word
    embeddings"); so is one that is zero, as those of reserved tokens can be.
    """
    import torch

    before = base_tokenizer(spec.model)
    known = before.get_vocab()
    inputs = model.get_input_embeddings().weight
    old, size = len(inputs), max(tokenizer.get_vocab().values()) + 1
    learned = {before.bos_token, before.eos_token, before.unk_token}
    tokens = [token for token in special_tokens(tokenizer, spec.chat_template or "") if token not in learned]
    numbers = {*range(old, size), *tokenizer.convert_tokens_to_ids(tokens)}
    new = {*range(old, size), *tokenizer.get_vocab().values()} - {*known.values()}
    begin = new | {number for number in numbers if number < old and not inputs[number].any()}
    if size > old:
        model.resize_token_embeddings(size, mean_resizing=False)
    rows = torch.tensor(sorted(number for number in {*known.values()} - begin if number < old))
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for table in (layer.weight, getattr(layer, "bias", None)):
                if table is not None:
                    table[sorted(begin)] = table[rows].mean(0)
    end = tokenizer.eos_token_id
    special = {*before.all_special_ids, *before.added_tokens_decoder}
    others = [number for number in end_of_turn_ids(spec.model) if number in special and number != end]
    for config in (model.config, model.config.get_text_config()):
        config.eos_token_id = end
    model.generation_config.eos_token_id = [end, *others] if others else end
    return sorted(numbers)
