"""Convert records of other tools to the form of srlm, with the meaning that these tools document.

- TRL, "Dataset formats and types": preference records without a prompt; `prompt` as a string with full dialogues.
- LLaMA-Factory, data/README.md: alpaca's `instruction`, `input`, `output`, `system`, `history`; sharegpt's
  `conversations`, `system`; `chosen` and `rejected` as one message.
- axolotl, docs/dataset-formats and docs/rlhf: `question` and `answer`, `system_prompt`, `conversations` of
  {role, content}, `chosen_response` and `rejected_response`.
- Dolly's `context`, which LLaMA-Factory calls `input`.
- Anthropic's HH: texts of the form "\\n\\nHuman: ... \\n\\nAssistant: ...".

Any other form, or a contradiction, raises `BadRow`.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

from srlm_cli.errors import BadRow

Record = dict[str, Any]
Message = dict[str, str]
Prompt = str | list[Message]

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
DIALOGUES = ("messages", "conversations")
SYSTEM = ("system", "system_prompt")
SIDES = ("chosen", "rejected")
REPLIES = (*SIDES, "completion")
# Columns that would change the prompt. If a record still has one of them after it was read, it was not used.
UNUSED = frozenset({*SYSTEM, "history", "input", "context", "tools", "image", "images", "videos", "audios"})
FOREIGN = UNUSED | {
    "instruction",
    "question",
    "completion",
    *DIALOGUES,
    *SIDES,
    *(f"{side}_response" for side in SIDES),
}
READ = FOREIGN | {"prompt"}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_START = "\n\nHuman:"


def own_form(row: Record, *, completed: bool = False) -> Record:
    """Return a record with `prompt`, `completion`, `chosen` and `rejected` in the form of srlm, as far as it has them.

    Each is a string or a list of {role, content}. The original columns are removed, so that no later stage reads them
    again. With `completed` the answer becomes `completion`, whatever its name is (`output`, `answer`, the last turn of
    a dialogue).
    """
    prompt = row.get("prompt")
    if type(prompt) is str and FOREIGN.isdisjoint(row) and not prompt.startswith(HH_START):
        return row
    left = {name: value for name, value in row.items() if value is not None or name not in READ}
    for side in SIDES:
        if side not in left and f"{side}_response" in left:
            left[side] = left.pop(f"{side}_response")
    wanted = SIDES if not completed and left.keys() >= set(SIDES) else ("completion",)
    replies = {name: as_reply(left.pop(name), name) for name in wanted if _is_reply(left.get(name))}
    prompt, answer = _pop_prompt(left, completed and not replies)
    if answer is not None:
        replies["completion"] = answer
    prompt, replies = _split(prompt, replies)
    if prompt is not None:
        left["prompt"] = _with_system(_with_history(prompt, left), left)
    made = {**left, **replies}
    return {name: made.pop(name) for name in row if name in made} | made


def unused_columns(row: Record) -> list[str]:
    """Return the columns of a record that other tools put into the prompt, and srlm does not use."""
    return [] if UNUSED.isdisjoint(row) else [name for name in sorted(UNUSED & row.keys()) if not _empty(row[name])]


# --- prompts ---------------------------------------------------------------------------------


def _pop_prompt(left: Record, completed: bool) -> tuple[Prompt | None, Prompt | None]:
    """Remove and return the prompt of a record, and its answer if `completed`; None for missing ones."""
    own = as_prompt(left.pop("prompt"), "prompt") if "prompt" in left else None
    dialogue = next((name for name in DIALOGUES if name in left), None)
    if own is None and "instruction" in left:
        prompt, answers = _joined(left, ("instruction", "input", "context")), ("output", "response")
    elif own is None and "question" in left:
        prompt, answers = _joined(left, ("context", "question")), ("answer", "response")
    elif dialogue:
        return _pop_dialogue(left, dialogue, own, completed)
    else:
        return own, None
    name = next((name for name in answers if name in left), None) if completed else None
    return prompt, text(left.pop(name), name) if name else None


def _pop_dialogue(left: Record, name: str, own: Prompt | None, completed: bool) -> tuple[Prompt, Prompt | None]:
    """Remove and return a dialogue: the turns before the assistant's last one, and this one as the answer.

    If the record also has its `own` prompt, as in UltraChat, sampling uses that prompt, and training the dialogue.
    """
    turns = messages(left.pop(name), name)
    ended = turns[-1]["role"] == "assistant" and "responses" not in left
    before = turns[:-1] if ended else turns
    agreed = before if own is None else _agreed(own, before, name)
    if not completed:
        return agreed if own is None else own, None
    if not ended or not before:
        raise BadRow("expected a dialogue that ends with an assistant turn after a user turn")
    return agreed, turns[-1]["content"]


def _joined(left: Record, names: tuple[str, ...]) -> str:
    """Remove columns from a record and return their texts, joined by a blank line; empty ones are skipped."""
    parts = [text(left.pop(name) or "", name) for name in names if name in left]
    return "\n\n".join(part for part in parts if part)


def _with_history(prompt: Prompt, left: Record) -> Prompt:
    """Return a prompt after the turns of a `history`, a list of [prompt, reply]."""
    if _empty(left.get("history")) or not isinstance(prompt, str):
        return prompt
    pairs = left.pop("history")
    right = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(said, str) for said in pair) for pair in pairs
    )
    if not right:
        raise BadRow("expected `history` to be a list of [prompt, reply] with two texts each")
    roles = ("user", "assistant")
    return [
        *({"role": role, "content": said} for pair in pairs for role, said in zip(roles, pair, strict=True)),
        {"role": "user", "content": prompt},
    ]


def _with_system(prompt: Prompt, left: Record) -> Prompt:
    """Return a prompt with its system message; a system message in the dialogue has priority over the column."""
    name = next((name for name in SYSTEM if isinstance(left.get(name), str) and not _empty(left[name])), None)
    if name is None:
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    own = [turn["content"] for turn in turns if turn["role"] == "system"]
    if not own or left[name] in own:
        told = left.pop(name)
        return prompt if own else [{"role": "system", "content": told}, *turns]
    return prompt


# --- replies ---------------------------------------------------------------------------------


def _split(prompt: Prompt | None, replies: Record) -> tuple[Prompt | None, Record]:
    """Return the prompt and the replies of a record; the prompt of full dialogues is their common part.

    This is TRL's `extract_prompt`. Only assistant turns can follow the prompt.
    """
    whole = {name: turns for name, turns in replies.items() if isinstance(turns, list) and not _spoken(turns[:1])}
    if whole and len(whole) < len(replies):
        raise BadRow(f"expected replies of one form, got a whole dialogue as `{next(iter(whole))}` only")
    if whole:
        shared = _shared(list(whole.values()))
        if not shared:
            raise BadRow("expected whole dialogues to begin with the same turns, which are the prompt")
        prompt = shared if prompt is None else _agreed(prompt, shared, next(iter(whole)))
        replies = {name: turns[len(shared) :] for name, turns in whole.items()}
    for name, turns in replies.items():
        if isinstance(turns, list) and not _spoken(turns):
            after = " after what the dialogues share" if whole else ""
            raise BadRow(f"expected `{name}` to be turns of the assistant only{after}, got one of another role")
    return prompt, replies


def _shared(dialogues: list[list[Message]]) -> list[Message]:
    """Return the turns that dialogues begin with together; each keeps its last one."""
    alike = takewhile(lambda turns: all(turn == turns[0] for turn in turns), zip(*dialogues, strict=False))
    return [turns[0] for turns in alike][: min(map(len, dialogues)) - 1]


def _spoken(turns: list[Message]) -> bool:
    """Return whether turns are the assistant's."""
    return all(turn["role"] == "assistant" for turn in turns)


def _agreed(prompt: Prompt, turns: list[Message], name: str) -> list[Message]:
    """Return the prompt of a record that has a prompt and dialogues; raise BadRow if they contradict each other.

    A string must be one of the user turns. A list can lack turns, or have more turns before those of the dialogue.
    """
    if isinstance(prompt, str):
        if any(turn["role"] == "user" and turn["content"].strip() == prompt.strip() for turn in turns):
            return turns
    elif all(turn in turns for turn in prompt):
        return turns
    elif prompt[-len(turns) :] == turns:
        return prompt
    raise BadRow(f"expected the dialogue of `{name}` to hold the `prompt`, which is another text")


# --- the pieces ------------------------------------------------------------------------------


def as_prompt(value: Any, field: str) -> Prompt:
    """Return a prompt, a string or a list of messages; a string in the format of Anthropic's HH becomes a list."""
    if isinstance(value, list):
        return messages(value, field)
    said = text(value, field)
    if not said.startswith(HH_START):
        return said
    turns = hh_turns(said)
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def as_reply(value: Any, field: str) -> Prompt:
    """Return a reply, a string or a list of messages; the list can be a full dialogue."""
    if isinstance(value, dict):
        return messages([value], field)
    if isinstance(value, list):
        return messages(value, field)
    said = text(value, field)
    return hh_turns(said) if said.startswith(HH_START) else said


def hh_turns(said: str) -> list[Message]:
    """Return a dialogue of Anthropic's HH as messages."""
    _, *parts = HH_TURN.split(said)
    return [
        {"role": ROLES[who.lower()], "content": words.strip()}
        for who, words in zip(parts[::2], parts[1::2], strict=True)
    ]


def messages(value: Any, field: str) -> list[Message]:
    """Return a list of messages as {role, content}, from {role, content} or {from, value}."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"expected `{field}` to be a list of {{role, content}}, got {kind(value)}")
    return [_message(turn, field) for turn in value]


def _message(turn: Any, field: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"expected every message of `{field}` to be {{role, content}}, got {kind(turn)}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = _text_of(content, field)
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRow(f"expected every message of `{field}` to be {{role, content}} with texts")
    if "role" not in turn and role not in ROLES:
        raise BadRow(f"expected `from` in `{field}` to be one of {', '.join(ROLES)}, got {role!r}")
    rest = {key: told for key, told in turn.items() if key not in ("role", "content", "from", "value")}
    return {"role": ROLES.get(role, role), "content": content, **rest}


def _text_of(parts: list[Any], field: str) -> str:
    """Return the text of a message content in parts; raise BadRow for other parts, such as images."""
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None for part in parts
    ]
    if not all(isinstance(part, str) for part in texts):
        raise BadRow(f"expected the parts of a content in `{field}` to be texts, {{type: text, text}}")
    return "".join(texts)


def text(value: Any, field: str) -> str:
    """Return a string; raise BadRow for any other type."""
    if not isinstance(value, str):
        raise BadRow(f"expected `{field}` to be a text, got {kind(value)}")
    return value


def kind(value: Any) -> str:
    """Return what kind of JSON value this is, in words."""
    names = {type(None): "nothing", str: "a text", list: "a list", dict: "an object", bool: "a true or false"}
    return names.get(type(value), "a number")


def _is_reply(value: Any) -> bool:
    """Return whether a value has the form of a reply; any other list is not changed."""
    return isinstance(value, str | dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _empty(value: Any) -> bool:
    """Return whether a column is empty; `tools` can be a list that was written as a string."""
    return not value or (isinstance(value, str) and value.strip() in ("", "[]", "{}"))
