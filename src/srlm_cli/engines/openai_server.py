"""An OpenAI-compatible server: POST by POST, what it refuses remembered, its errors as one plain line."""

from __future__ import annotations

import asyncio
import re
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx2
import openai

from srlm_cli.engines.base import EngineSpec
from srlm_cli.engines.endpoint import base_url, key_for, proxy_for
from srlm_cli.errors import EngineError, OptionError
from srlm_cli.redact import redacted
from srlm_cli.streams.console import say

SECONDS_TO_CONNECT = 10.0
SECONDS_TO_WAIT = 120  # for a server that says when to come again; the openai library does not wait longer
FEW_LOGPROBS = 5  # what servers that refuse more than that take
# Fields that a request can do without: each is left out from when a server refuses it.
OPTIONAL = ("n", "seed", "top_p", "temperature", "stop", "logprobs", "top_logprobs", "max_tokens")
TOO_LONG = re.compile(r"context.?(?:length|window|size)|prompt is too long|too many tokens", re.IGNORECASE)
FILTERED = re.compile(r"content.?(?:filter|policy|management)|ResponsibleAI", re.IGNORECASE)

Json = dict[str, Any]


class Server:
    """A server behind a base URL; whoever posts to it passes its `gate`, `concurrency` at a time.

    Requests that meet 408, 409, 429, 5xx, a lost connection or the timeout are tried again by the
    openai library: exponential backoff with jitter, up to 8 s, or what `Retry-After` says; one of more than
    120 s ends the tries.
    """

    def __init__(self, spec: EngineSpec) -> None:
        url = base_url(spec.base_url)
        self.url = redacted(url)  # for people
        self.spec = spec
        # A transport of our own: the library's client opens a proxy for each variable, of protocols it lacks too.
        transport = httpx2.AsyncHTTPTransport(proxy=proxy_for(url), limits=openai.DEFAULT_CONNECTION_LIMITS)
        self.client = openai.AsyncOpenAI(
            api_key=key_for(url),
            base_url=url.partition("?")[0],
            default_query=dict(parse_qsl(urlsplit(url).query)),
            max_retries=spec.retries,
            timeout=openai.Timeout(spec.timeout, connect=min(spec.timeout, SECONDS_TO_CONNECT)),
            http_client=openai.DefaultAsyncHttpxClient(transport=transport),
        )
        self.gate = asyncio.Semaphore(spec.concurrency)
        self.refused: set[tuple[str, str]] = set()
        self.most_logprobs: dict[str, int] = {}

    async def post(self, path: str, body: Json) -> Json:
        """Return the answer to a request, without the fields that the server has refused.

        Raises the library's errors, and ValueError for an answer that is no JSON object.
        """
        while True:
            sent = self._accepted(path, body)
            try:
                answer = await self.client.post(path, body=sent, cast_to=object)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if too_long(error) or filtered(error) or not self._learn(path, sent, error):
                    raise
                continue
            if not isinstance(answer, dict):
                raise ValueError(f"{str(answer)[:80]!r}")
            return answer

    async def models(self) -> list[str] | None:
        """Return the names that the server lists, or None where it lists none that can be read."""
        try:
            listed = await self.client.with_options(max_retries=0, timeout=SECONDS_TO_CONNECT).get(
                "/models", cast_to=object
            )
            return [str(model["id"]) for model in listed["data"]]
        except (openai.OpenAIError, OSError, ValueError, TypeError, KeyError):
            return None

    def _accepted(self, path: str, body: Json) -> Json:
        """Return a request as this server takes it."""
        sent = {field: value for field, value in body.items() if (path, field) not in self.refused}
        if "max_tokens" in body and "max_tokens" not in sent:
            sent["max_completion_tokens"] = body["max_tokens"]  # its name for newer models of OpenAI's own
        for field in ("logprobs", "top_logprobs"):
            if type(sent.get(field)) is int and path in self.most_logprobs:
                sent[field] = min(sent[field], self.most_logprobs[path])
        return sent

    def _learn(self, path: str, sent: Json, error: openai.APIStatusError) -> bool:
        """Remember which field an error names; False where it names none that can be left out."""
        field = next((field for field in sent if field in OPTIONAL and names(error, field)), None)
        if field is None:
            return False
        number = sent.get("top_logprobs", sent.get("logprobs"))
        if field.endswith("logprobs") and type(number) is int and number > FEW_LOGPROBS:
            self.most_logprobs[path] = FEW_LOGPROBS
        elif (path, field) not in self.refused:
            self.refused.add((path, field))
            say(f"srlm: {self.url} refuses `{field}` ({words(error)[:120]}): going on without it")
        return True

    # --- errors ----------------------------------------------------------------------------------

    async def explained(self, error: Exception) -> EngineError:
        """Return an error of the library, or of an answer that cannot be read, as one line with a hint."""
        if isinstance(error, openai.APIStatusError):
            return await self._status(error)
        tries = f"in {self.spec.retries + 1} tries"
        if isinstance(error, openai.APITimeoutError):
            return EngineError(f"{self.url} did not answer within {self.spec.timeout:g} s, {tries}", "--timeout")
        if isinstance(error, openai.APIConnectionError):
            return EngineError(
                f"cannot reach {self.url}, {tries}: {error.__cause__ or error}", "is the server up, --base-url right?"
            )
        return EngineError(
            f"{self.url} gave an answer that is none of an OpenAI-compatible server: {error}",
            "--base-url usually ends in /v1",
        )

    def _tried_again(self, error: openai.APIStatusError) -> bool:
        """Tell whether the library tried again: not where a server asks to wait for longer than it will."""
        wait = error.response.headers.get("retry-after", "")
        return not (wait.isdecimal() and int(wait) > SECONDS_TO_WAIT)

    async def _status(self, error: openai.APIStatusError) -> EngineError:
        code = error.status_code
        said = f"{code} {words(error)[:300]}"
        if code in (401, 403):
            return EngineError(f"{self.url} does not take the key: {said}", "OPENAI_API_KEY is its key")
        if code == 429 or code >= 500 or code == 408:
            tries = f"{self.spec.retries + 1} times" if self._tried_again(error) else "and asks to wait too long"
            return EngineError(f"{self.url} failed {tries}: {said}", "--retries, --concurrency")
        if code == 404 or (code in (400, 422) and "model" in said):
            offered = await self.models()
            if offered is None and code == 404:
                return EngineError(f"nothing to ask at {self.url}: {said}", "--base-url usually ends in /v1")
            if offered and self.spec.model not in offered:
                return EngineError(
                    f"{self.url} does not take the model {self.spec.model}: {said}", f"it offers {listing(offered)}"
                )
        return EngineError(f"{self.url} refused a request: {said}")


def only_model(spec: EngineSpec) -> str:
    """Return the one model that a server offers; raise OptionError where there is a choice, EngineError without any."""
    server = Server(spec)

    async def ask() -> list[str] | None:
        async with server.client:
            return await server.models()

    offered = asyncio.run(ask())
    if not offered:
        raise EngineError(f"{server.url} does not tell which models it has", "is it up? --model MODEL, --base-url URL")
    if len(offered) > 1:
        raise OptionError(f"no model given, and {server.url} has {len(offered)}", f"--model {listing(offered)}")
    return offered[0]


def too_long(error: openai.APIStatusError) -> bool:
    """Tell whether a request was refused for the length of its prompt, or of prompt and completion."""
    return error.status_code in (400, 413, 422) and bool(TOO_LONG.search(f"{error.code} {words(error)}"))


def filtered(error: openai.APIStatusError) -> bool:
    """Tell whether a request was refused for what its prompt says."""
    return error.status_code == 400 and bool(FILTERED.search(f"{error.code} {words(error)}"))


def names(error: openai.APIStatusError, field: str) -> bool:
    """Tell whether an error is about a field of the request."""
    return error.param == field or bool(re.search(rf"(?<![\w\\]){field}(?!\w)", words(error)))


def words(error: openai.APIStatusError) -> str:
    """Return what a server says is wrong, in one line."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    return " ".join(str(body or error.message).split())


def listing(models: list[str]) -> str:
    """Return some names for people."""
    return ", ".join(models[:8]) + (f" and {len(models) - 8} more" if len(models) > 8 else "")
