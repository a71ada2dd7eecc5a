"""The record types of the stages: fields, ids and validation.

A record is a JSON object. Each function takes a record as it was read and returns it in the form that srlm uses
(`prompt`, `completion`, `responses`, ids filled in). Unknown fields are passed through unchanged. An invalid record
raises `BadRow`, which says what was expected.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from hashlib import sha256
from typing import Any

from srlm_cli.dataset_formats import FOREIGN, Message, Prompt, Record, messages, own_form, text
from srlm_cli.errors import BadRow
from srlm_cli.thoughts import UNFINISHED, divided, may_think

PROVENANCE = "provenance.json"  # in a model folder: how it was trained, and from which data
SURROGATE = re.compile("[\ud800-\udfff]")

KWARGS = "chat_template_kwargs"  # of a row: options for the chat template, over those of the command
FULL_SCORE = 5  # of the additive judge prompt

# Finish reasons of servers and other tools for a text that is complete (stop) or cut at its limit (length).
ENDS = dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn"), "stop")
ENDS |= dict.fromkeys(("length", "max_tokens", "model_length", "model_context_window_exceeded"), "length")


def short_hash(text: str) -> str:
    """Return the first 16 hex digits of the SHA-256 of `text`."""
    return text_hash(text)[:16]


def text_hash(text: str) -> str:
    """Return the SHA-256 of `text` in hex."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def encodable(text: str) -> str:
    """Return a text with U+FFFD for each lone surrogate (half a character), which UTF-8 cannot encode."""
    return SURROGATE.sub("\ufffd", text)


def encodable_value(value: Any, noted: Counter[str] | None = None, what: str = "rows") -> Any:
    """Return a JSON value with all its texts `encodable`; if this changes it, it is counted in `noted`."""
    text = json.dumps(value, ensure_ascii=False)
    if not SURROGATE.search(text):
        return value
    if noted is not None:
        noted[f"{what} with half a character (a lone surrogate), replaced by U+FFFD"] += 1
    return json.loads(encodable(text))


def prompt_id(prompt: Prompt) -> str:
    """Return the id of a prompt: a hash of its text; one user message equals the bare string."""
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0]["role"] == "user":
        prompt = prompt[0]["content"]
    return short_hash(prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True))


def prompt_key(prompt: Prompt) -> str:
    """Return a hash of a prompt's words, independent of spaces and capitals, to find duplicates."""
    return short_hash(" ".join(as_text(prompt).casefold().split()))


def as_messages(prompt: Prompt) -> list[Message]:
    """Return a prompt as chat messages: `[{"role": ..., "content": ...}]`."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def as_text(prompt: Prompt) -> str:
    """Return a prompt as one string, each turn labelled with its role, for templates and reports."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def with_system(prompt: Prompt, system: str) -> Prompt:
    """Return a prompt with a system message; raise BadRow where it has one."""
    turns = as_messages(prompt)
    if turns[0]["role"] == "system":
        raise BadRow("the prompt has a system message, and --system gives another")
    return [{"role": "system", "content": system}, *turns]


def reply_message(row: Record) -> Message:
    """Return a response as the assistant's message; its thought is in the field where chat templates look for it."""
    thought = {"reasoning_content": row["thought"]} if row.get("thought") else {}
    return {"role": "assistant", "content": row["response"], **thought}


# --- the records -----------------------------------------------------------------------------


def prompt_record(row: Record) -> Record:
    """Return a prompt record `{id, prompt}`; formats of other tools are accepted (see `dataset_formats`).

    The `responses` of a ranked record are left out.
    """
    _refuse_mixed_turns(row)
    own = own_form(row)
    prompt = _prompt(own, row)
    rest = {key: value for key, value in own.items() if key != "responses"}
    return _with(rest, id=_id(row) or prompt_id(prompt), prompt=prompt)


def asks_turns(row: Record) -> bool:
    """Return whether a row asks for a conversation: `turns`, or a `prompt`, that is a list of texts (MT-Bench)."""
    return "turn" not in row and (_are_texts(row.get("turns")) or _are_texts(row.get("prompt")))


def turns_record(row: Record) -> Record:
    """Return a conversation to sample, `{id, prompt, turns}`: the texts of the user, of which `prompt` is the first.

    A system message becomes a part of `prompt`. Raises BadRow if a turn is empty, or the record has another prompt.
    """
    turns = row["turns"] if _are_texts(row.get("turns")) else row["prompt"]
    if blank := [at for at, turn in enumerate(turns, 1) if not turn.strip()]:
        raise BadRow(f"expected a text in each of `turns`, got an empty one at turn {blank[0]}")
    if row.get("prompt") not in (None, turns, turns[0]):
        raise BadRow("expected `prompt` or `turns`: `prompt` is not the first of `turns`")
    own = own_form({key: value for key, value in row.items() if key != "responses"} | {"prompt": turns[0]})
    asked = [{"role": "user", "content": turn} for turn in turns]
    return _with(own, id=_id(row) or prompt_id(asked), prompt=_prompt(own, row), turns=turns)


def user_turns(prompt: Prompt) -> list[str]:
    """Return the texts of the user in a prompt."""
    return [turn["content"] for turn in as_messages(prompt) if turn["role"] == "user"]


def completion_record(row: Record) -> Record:
    """Return an IFT or EFT record `{id, prompt, completion}`; formats of other tools are accepted."""
    own = own_form(row, completed=True)
    if "completion" not in own:
        raise BadRow(f"expected `completion` beside `prompt`, got {_keys(row)}")
    prompt, completion = _prompt(own, row), _reply(own, "completion")
    return _with(own, id=_id(row) or prompt_id(prompt), prompt=prompt, completion=completion)


def eft_record(row: Record) -> Record:
    """Return a record of `srlm make-eft` unchanged, after a check of its prompt, completion and `score`."""
    completion_record(row)
    if not is_number(row.get("score")):
        raise BadRow(f"expected `score`, a number, got {row.get('score', 'none')!r}")
    return row


def ranked_record(row: Record) -> Record:
    """Return a ranked record `{id, prompt, responses: [{text, rank | score}]}`.

    `rank` starts at 0 or 1, and a smaller rank is better; `score` is any number, and a larger score is better.
    """
    own = own_form(row)
    prompt, responses = _prompt(own, row), row.get("responses")
    if responses == []:
        raise BadRow("expected at least one of `responses`, got an empty list")
    if not isinstance(responses, list):
        raise BadRow(f"expected `responses`, a list of {{text, rank or score}}, got {_keys(row)}")
    for response in responses:
        if not isinstance(response, dict) or not isinstance(response.get("text"), str):
            raise BadRow("expected each of `responses` to be {text, rank or score}")
        if not any(is_number(response.get(key)) for key in ("rank", "score")):
            raise BadRow("expected a number as `rank` or `score` of every response")
    if not any(all(is_number(response.get(key)) for response in responses) for key in ("rank", "score")):
        raise BadRow("expected a `rank` of every response, or a `score` of every response, not some of each")
    return _with(own, id=_id(row) or prompt_id(prompt), prompt=prompt)


def response_record(row: Record) -> Record:
    """Return a response record `{id, prompt_id, prompt, response}`, from `srlm sample` or another tool.

    The id is `<prompt_id>/<k>`, or ends with a hash of the response if the record has no `k`. A thought at the start of
    the response becomes `thought`. A response of null is a thought without an answer.
    """
    if "responses" in row and "response" not in row:
        raise BadRow("expected `response`, got a ranked row with `responses`, which `srlm judge` reads first")
    own = own_form(row)
    nothing = "response" in row and row["response"] is None and "finish_reason" in row
    prompt, response = _prompt(own, row), "" if nothing else text(row.get("response"), "response")
    group = _id(row, "prompt_id") or prompt_id(prompt)
    name = _id(row) or f"{group}/{row['k'] if 'k' in row else short_hash(response)}"
    found = {"finish_reason": UNFINISHED} if nothing else without_thought(row, response)
    return _with({**own, **found}, id=name, prompt_id=group, prompt=prompt)


def without_thought(row: Record, response: str) -> Record:
    """Return `response` and `thought` of a row whose response begins with a thought, nothing of another."""
    if row.get("thought") or not may_think(response):
        return {}
    answer, thought = divided(response)
    if thought is None:
        return {}
    if answer is None:
        return {"response": None, "thought": thought, "finish_reason": UNFINISHED}
    return {"response": answer.strip(), "thought": thought or None}


def has_ended(row: Record) -> bool:
    """Return whether the response of a record is complete or cut at its limit; True without a `finish_reason`.

    With any other `finish_reason` (`content_filter`, `prompt-too-long`, `error`) the model wrote no response, whatever
    the text is.
    """
    reason = row.get("finish_reason")
    return reason is None or reason == "stop" or str(reason).lower() in ENDS  # most are: there are many rows


def was_cut_off(row: Record) -> bool:
    """Return whether the response of a row was cut off at its limit."""
    return ENDS.get(str(row.get("finish_reason")).lower()) == "length"


def is_reply(row: Record) -> bool:
    """Return whether a response can be scored and used for training: it has a text, and `has_ended`."""
    text = row["response"]  # null without an answer
    return bool(text) and not text.isspace() and has_ended(row)


def judged_record(row: Record) -> Record:
    """Return a judged record: a response record with `score`, a number or null (unreadable)."""
    row = response_record(row)
    if "score" not in row:
        raise BadRow("expected `score`, a number or null, which `srlm judge` adds")
    if not (row["score"] is None or is_number(row["score"])):
        raise BadRow(f"expected `score`, a number or null, got {row['score']!r:.60}")
    return row


def is_judged_reply(row: Record) -> bool:
    """Return True only if `judged_record` would change nothing except the order of the fields; a fast check.

    False means that the record needs the full check. A prompt that starts with a space can be empty, or in the format
    of HH.
    """
    try:
        own, group, prompt, response = row["id"], row["prompt_id"], row["prompt"], row["response"]
        score = row["score"]
    except KeyError:
        return False
    texts = type(own) is type(group) is type(prompt) is type(response) is str
    known = score is None or type(score) is float or (type(score) is int and is_number(score))
    if not (texts and known and own and group and prompt and response) or prompt[0].isspace() or response.isspace():
        return False
    return row.get("finish_reason", "stop") == "stop" and FOREIGN.isdisjoint(row) and not may_think(response)


def meta_record(row: Record) -> Record:
    """Return a record of `srlm judge --meta`: a response record with `judge_prompt`, `targets` and `battles`."""
    row = response_record(row)
    targets, battles = row.get("targets"), row.get("battles")
    if not isinstance(battles, list):
        raise BadRow(f"expected `battles`, as `srlm judge --meta` writes them, got {_keys(row)}")
    if not isinstance(targets, list) or not all(target is None or isinstance(target, str) for target in targets):
        raise BadRow("expected `targets`, a text or null for each judgement")
    for battle in battles:
        sides = [battle.get("a"), battle.get("b")] if isinstance(battle, dict) else []
        known = [type(side) is int and 0 <= side < len(targets) and targets[side] is not None for side in sides]
        verdicts = battle.get("verdicts") if all(known) and sides else None
        if not isinstance(verdicts, list) or len(verdicts) != 2:
            raise BadRow("expected each of `battles` to be {a, b, verdicts}, with the places of two targets")
    return _with(row, judge_prompt=messages(row.get("judge_prompt"), "judge_prompt"))


def pair_record(row: Record) -> Record:
    """Return a preference record `{id, prompt, chosen, rejected}`, strings or message lists.

    A record can have `label_smoothing`: the probability, 0 to 1, that chosen and rejected are swapped.
    """
    own = own_form(row)
    prompt, chosen, rejected = _prompt(own, row), _reply(own, "chosen"), _reply(own, "rejected")
    smoothing = row.get("label_smoothing", 0.0)
    if not is_number(smoothing) or not 0 <= smoothing <= 1:
        raise BadRow(f"expected `label_smoothing` to be a number from 0 to 1, got {smoothing!r}")
    return _with(own, id=_id(row) or prompt_id(prompt), prompt=prompt, chosen=chosen, rejected=rejected)


def judged_completion_record(row: Record) -> Record:
    """Return a judged record as an IFT record; `full_score` is whether it has the highest score."""
    judged = judged_record(row)
    kept = {key: value for key, value in judged.items() if key not in ("response", "score")}
    return _with(kept, completion=judged["response"], full_score=judged["score"] == FULL_SCORE)


RENAMED_METRICS = {
    "lean": "preference_rate",
    "finished": "forced_score_rate",
    "scored": "scored_rate",
    "spread_within_k": "score_std_within_k",
}


def metric_record(row: Record) -> Record:
    """Return a metric record `{task, metric, value, n, ci_low, ci_high}`; a value that is not defined is null.

    Metric names of earlier versions are replaced by the current ones.
    """
    numbers = [row.get(name) for name in ("value", "ci_low", "ci_high")]
    if not isinstance(row.get("metric"), str) or not all(n is None or is_number(n) for n in numbers):
        raise BadRow("expected a metric row {metric, value, n, ci_low, ci_high}")
    return {**row, "metric": RENAMED_METRICS[row["metric"]]} if row["metric"] in RENAMED_METRICS else row


def responses_of(ranked: Record) -> list[Record]:
    """Return a ranked record as response records, in order, with `k` and the human value as `human`."""
    rest = {key: value for key, value in ranked.items() if key not in ("id", "responses")}
    return [
        {
            **rest,
            "id": f"{ranked['id']}/{k}",
            "prompt_id": ranked["id"],
            "response": response["text"],
            **without_thought(response, response["text"]),
            **({"model": response["model"]} if isinstance(response.get("model"), str) else {}),
            "k": k,
            "human": value,
        }
        for k, (response, value) in enumerate(zip(ranked["responses"], human_values(ranked), strict=True))
    ]


def human_values(ranked: Record) -> list[float]:
    """Return the human value of each response, larger is better: the scores if all have one, else the negated ranks."""
    responses = ranked["responses"]
    if all(is_number(response.get("score")) for response in responses):
        return [float(response["score"]) for response in responses]
    return [0.0 - response["rank"] for response in responses]


# --- rows of one id ---------------------------------------------------------------------------


def refuse_two_prompts(responses: list[Record]) -> None:
    """Raise BadRow for responses with the same `prompt_id` and different prompts, as after `cat` of several files."""
    first = responses[0]["prompt"]
    for row in responses:
        if row["prompt"] != first and as_messages(row["prompt"]) != as_messages(first):
            raise BadRow(f"two prompts have the prompt_id {row['prompt_id']}: give each an id")


def refuse_two_replies(responses: list[Record]) -> None:
    """Raise BadRow for different replies with the same id, as in two rankings of one prompt without ids."""
    if len({row["id"] for row in responses}) == len(responses):
        return
    texts: dict[str, str] = {}
    for row in responses:
        if texts.setdefault(row["id"], row["response"]) != row["response"]:
            raise BadRow(f"two replies have the id {row['id']}: give each ranking of a prompt an id of its own")


# --- the pieces ------------------------------------------------------------------------------


def _with(row: Record, **fields: Any) -> Record:
    """Return the record with these fields first, followed by its other fields."""
    return {**fields, **row, **fields}


def _id(row: Record, key: str = "id") -> str | None:
    """Return the id of a row as a text, None if it has none; raise BadRow if it is not a text or a number."""
    name = row.get(key)
    if name is None or name == "":
        return None
    if not isinstance(name, str | int | float) or isinstance(name, bool):
        raise BadRow(f"expected `{key}`, a text or a number, got {name!r:.60}")
    return str(name)


def _prompt(own: Record, row: Record) -> Prompt:
    """Return the prompt of a record in `own_form`; `row` is the record as it was in the file."""
    if not isinstance(own.get(KWARGS), dict | None):
        raise BadRow(f"expected `{KWARGS}` to be an object, got {own[KWARGS]!r}")
    if own.get("prompt") is None and row.get("prompt", own) is own:
        if "turns" in row:
            raise BadRow(f"expected `turns`, a list of texts, or `prompt`, got {row['turns']!r:.60}")
        raise BadRow(f"expected `prompt` (or `instruction`, `question`, `messages`, `conversations`), got {_keys(row)}")
    prompt = own.get("prompt")
    if not prompt and "prompt" in row:
        prompt = text(row["prompt"], "prompt")
    if not prompt or (isinstance(prompt, str) and prompt.isspace()):
        raise BadRow("expected a prompt, got an empty one")
    return prompt


def _reply(own: Record, name: str) -> Prompt:
    """Return a reply of a record in `own_form`, a string or messages; raise BadRow if it is empty."""
    reply = own.get(name)
    reply = messages(reply, name) if isinstance(reply, list) else text(reply, name)
    if not (reply if isinstance(reply, str) else any(turn["content"] for turn in reply)):
        raise BadRow(f"expected `{name}` to hold text, got an empty one")
    return reply


def _refuse_mixed_turns(row: Record) -> None:
    """Raise BadRow for a conversation to sample whose `turns` are texts and other values."""
    turns = row.get("turns")
    if "turn" not in row and isinstance(turns, list) and 0 < sum(isinstance(one, str) for one in turns) < len(turns):
        raise BadRow(f"expected `turns`, a list of texts, got {turns!r:.60}")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number that a float can hold; true, false, NaN and infinities are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _keys(row: Record) -> str:
    names = list(row)
    if not names:
        return "an empty object"
    return "the fields " + ", ".join(f"`{name}`" for name in names[:6]) + (", ..." if len(names) > 6 else "")
