"""Read the errors of all known servers: a prompt too long, a content filter, only one choice, a refused field."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx2
import openai

from srlm_cli.engines.openai_answers import Json

TOO_LONG = re.compile(
    "|".join(
        (
            r"context[ _-]?(?:length|window|size|limit)",  # OpenAI, vLLM, SGLang, llama.cpp, Mistral, LM Studio, Ollama
            r"`inputs` (?:tokens|must have)|`max_new_tokens` must be <",  # text-generation-inference
            r"input token count|token count of \d+ exceeds|too many (?:input )?tokens",  # Gemini, Copilot, Bedrock
            r"model token limit|tokens_limit_reached",  # Kimi, GitHub
            r"(?:prompt|input|request)(?: body)?(?: is)? too (?:long|large)|request_too_large",  # Anthropic, Groq
            r"maximum (?:prompt|model|allowed(?: input)?) length",  # xAI, vLLM, SGLang
            r"reduce the length of|range of input length",  # Groq and Cerebras, DashScope
            r"max_(?:completion_)?tokens(?:'| is) too large|at most \d+ completion tokens",  # vLLM, OpenAI
            r"max_tokens must be at least 1, got -",  # vLLM: the number of tokens left for the completion
            r"kv cache can hold",  # SGLang
        )
    ),
    re.IGNORECASE,
)
FILTERED = re.compile(
    r"content.?(?:filter|policy|management|exists risk)|ResponsibleAI|data.?inspection|inappropriate content"
    r"|(?:unsafe|sensitive|prohibited).?content|requires moderation|was flagged|considered high risk",
    re.IGNORECASE,
)
ONE_CHOICE = re.compile(r"only one completion choice|n_cmpl|(?:multiple|single) (?:choice|completion)", re.IGNORECASE)
NO_SCHEMA = re.compile(r"json[ _]?schema|structured (?:output|decoding)|guided|grammar", re.IGNORECASE)
FULL = "Context size has been exceeded"  # llama.cpp: all slots together; temporary

PASSING = ("error", "network_error", "insufficient_system_resource", "abort", "aborted", "cancelled")
SUSPECT = re.compile(rb'"error"\s*:|"finish_reason"\s*:\s*(?:null|"(?:%s)")' % "|".join(PASSING).encode())


def refusal(error: openai.APIStatusError) -> str:
    """Return the finish reason of a request that was refused because of its prompt, or "" for another error.

    `prompt-too-long` is status 413, or status 400 or 422 with a message about the context or `max_tokens`.
    `content_filter` is status 400, 403, 422 or 451 with a message about a filter. The message patterns come from the
    sources of vLLM 0.32 (`renderers/params.py`, `v1/engine/input_processor.py`), SGLang (`tokenizer_manager.py`),
    llama.cpp (`exceed_context_size_error`) and text-generation-inference (`validation.rs`), and from public reports
    about hosted models (google-gemini/gemini-cli#6678, the list of earendil-works/pi, openrouter.ai/docs/errors).
    """
    said = f"{error.code} {error.type} {words(error)}"
    if error.status_code == 413 or (error.status_code in (400, 422) and TOO_LONG.search(said)):
        return "prompt-too-long"
    return "content_filter" if error.status_code in (400, 403, 422, 451) and FILTERED.search(said) else ""


def names(error: openai.APIStatusError, field: str) -> bool:
    """Return whether an error is about a field of the request."""
    said = words(error)
    if field == "n" and ONE_CHOICE.search(said):
        return True
    if field == "response_format" and NO_SCHEMA.search(said):
        return True
    return error.param == field or bool(re.search(rf"(?<![\w\\]){field}(?!\w)", said))


def words(error: openai.APIStatusError) -> str:
    """Return the error message of a server in one line."""
    return told(error.body) or " ".join(error.message.split())


def told(body: Any) -> str:
    """Return the message in the body of an error, or of an answer that reports one."""
    if isinstance(body, list) and body:  # Gemini's
        body = body[0]
    if isinstance(body, dict):
        if choice := failed_choice(body):
            body = choice.get("error") or f"a choice ended with {choice.get('finish_reason')}"
        else:
            body = body.get("message") or details(body.get("detail")) or body.get("error") or body
    return told(body) if isinstance(body, dict) and "message" in body else " ".join(str(body or "").split())


def details(detail: Any) -> Any:
    """Return FastAPI's list of errors as `place: message`, without `input`, which can repeat the whole request."""
    if not isinstance(detail, list) or not all(isinstance(one, dict) and "msg" in one for one in detail):
        return detail
    return "; ".join(f"{'.'.join(map(str, one.get('loc') or ()))}: {one['msg']}" for one in detail)


# --- answers that are errors -------------------------------------------------------------------


async def correct_status(response: httpx2.Response) -> None:
    """Set the status of a response from its body, so that it is retried or reported like other errors.

    Status 200 with an error, with a failed upstream (`finish_reason` error) or with nothing in it becomes 502, which is
    retried, or the status that the error names. A permanent refusal with status 429 or 5xx becomes 400.
    """
    body = await response.aread()
    if response.status_code != 200 or SUSPECT.search(body):
        try:
            response.status_code = status_of(response.status_code, json.loads(body))
        except ValueError:
            return


def status_of(status: int, body: Any) -> int:
    """Return the corrected status of an answer."""
    if status == 200:
        choice = failed_choice(body)
        error = body.get("error") if isinstance(body, dict) else None
        if not (error or choice):
            return 200
        error = error or choice.get("error") or {}
        code = str(error.get("code") if isinstance(error, dict) else "")
        if code.isdecimal() and 400 <= int(code) < 600:
            return int(code)
        status = 502
    lasting = ONE_CHOICE, TOO_LONG, FILTERED
    text = json.dumps(body)
    if (status == 429 or status >= 500) and FULL not in text and any(words.search(text) for words in lasting):
        return 400
    return status


def failed_choice(body: Any) -> Json | None:
    """Return the first choice whose upstream failed, or that has neither text nor finish reason."""
    choices = body.get("choices") if isinstance(body, dict) else None
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict):
            continue
        reason = choice.get("finish_reason")
        message = choice.get("message")
        content = message.get("content") if isinstance(message, dict) else choice.get("text")
        if choice.get("error") or str(reason).lower() in PASSING or (reason is None and not content):
            return choice
    return None
