"""The client of an OpenAI-compatible server: it remembers refused fields and turns errors into one line."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx2
import openai

from srlm_cli.engines.base import EngineSpec
from srlm_cli.engines.endpoint import OPENAI, base_url, key_for, proxy_for
from srlm_cli.engines.openai_answers import Json
from srlm_cli.engines.openai_refusals import correct_status, names, refusal, words
from srlm_cli.errors import EngineError, OptionError
from srlm_cli.records import encodable_value
from srlm_cli.redact import redacted
from srlm_cli.streams.console import say

SECONDS_TO_CONNECT = 10.0
SECONDS_TO_WAIT = 120  # the longest `Retry-After` that the openai library waits for
FEW_LOGPROBS = 5  # for servers that refuse more
LEAST_TEMPERATURE = 0.01  # for servers that refuse 0; vLLM also raises lower values to it
# Fields that are no longer sent after a server refused them: srlm does the same itself, or no result depends on them.
OPTIONAL = ("n", "seed", "stop", "logprobs", "top_logprobs", "max_tokens", "response_format")
# Fields that can be left out only if they have the default value of the API reference.
DEFAULTS = {"temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "repeat_penalty": 1}
DEFAULTS |= {"presence_penalty": 0, "frequency_penalty": 0, "skip_special_tokens": False}
# Servers, by the `owned_by` of their models, that apply further sampling settings unless these fields are set: vLLM and
# SGLang read them from generation_config.json, llama.cpp uses top-k 40 and min-p 0.05 by default. vLLM and SGLang also
# remove special tokens from texts: without the marks of its thought, a thought would be a part of the answer.
OWN_SAMPLING = {
    "vllm": ("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "skip_special_tokens"),
    "llamacpp": ("top_k", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty"),
}
OWN_SAMPLING["sglang"] = OWN_SAMPLING["vllm"]
OPTIONS = {name: "--" + name.replace("_", "-") for name in DEFAULTS} | {"repeat_penalty": "--repetition-penalty"}


class Server:
    """A server with a base URL. Callers of `post` hold `gate`, which allows `concurrency` requests at a time.

    `noted` counts the answers that were changed.

    The openai library retries requests after status 408, 409, 429 and 5xx, a dropped connection or a timeout. It waits
    with exponential backoff and jitter, up to 8 s, or as long as `Retry-After` asks; a wait of more than 120 s ends the
    retries. Answers that are errors with status 200 are retried as well (`correct_status`).
    """

    def __init__(self, spec: EngineSpec) -> None:
        url = base_url(spec.base_url)
        self.url = redacted(url)  # for people
        self.spec = spec
        # An explicit transport, because the library's client opens every proxy in the environment, supported or not.
        transport = httpx2.AsyncHTTPTransport(proxy=proxy_for(url), limits=openai.DEFAULT_CONNECTION_LIMITS)
        self.client = openai.AsyncOpenAI(
            api_key=key_for(url),
            base_url=url.partition("?")[0],
            default_query=dict(parse_qsl(urlsplit(url).query)),
            max_retries=spec.retries,
            timeout=openai.Timeout(spec.timeout, connect=min(spec.timeout, SECONDS_TO_CONNECT)),
            http_client=openai.DefaultAsyncHttpxClient(transport=transport, event_hooks={"response": [correct_status]}),
        )
        self.gate = asyncio.Semaphore(spec.concurrency)
        self.noted: Counter[str] = Counter()
        self.refused: set[tuple[str, str]] = set()
        self.most_logprobs: dict[str, int] = {}
        self.greedy = 0.0
        self.own_sampling: Json | None = None if url != OPENAI else {}
        self.getting_to_know = asyncio.Lock()

    async def post(self, path: str, body: Json) -> Json:
        """Send a request, without the fields that the server has refused, and return the answer.

        Raises the library's errors, ValueError if the answer is not a JSON object, and EngineError if the server
        refuses the temperature or top-p: with its own values the responses would have another distribution.
        """
        own = await self._neutral()
        if "repeat_penalty" in own and "repetition_penalty" in body:  # its name in llama.cpp
            body = {**body, "repeat_penalty": body["repetition_penalty"]}
            del body["repetition_penalty"]
        body = encodable_value({**own, **body})
        while True:
            sent = self._accepted(path, body)
            try:
                answer = await self.client.post(path, body=sent, cast_to=object)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if refusal(error) or not self._learn(path, sent, error):
                    raise
                continue
            if not isinstance(answer, dict):
                raise ValueError(f"{str(answer)[:80]!r}")
            return encodable_value(answer, self.noted, "answers of the server")

    async def models(self) -> list[str] | None:
        """Return the names of the server's models, or None if there is no readable list."""
        try:
            listed = await self.client.with_options(max_retries=0, timeout=SECONDS_TO_CONNECT).get(
                "/models", cast_to=object
            )
            return [str(model["id"]) for model in listed["data"]]
        except (openai.OpenAIError, OSError, ValueError, TypeError, KeyError):
            return None

    async def _neutral(self) -> Json:
        """Return the fields that stop this server from changing more than temperature and top-p say, or its texts.

        The server is asked once, without retries: `/models` of `transformers serve` 5.23 fails on a machine without a
        hub cache. If the server cannot be reached, the request that follows is retried and reports it.
        """
        async with self.getting_to_know:
            if self.own_sampling is None:
                asking = self.client.with_options(max_retries=0, timeout=SECONDS_TO_CONNECT)
                try:
                    kind = str((await asking.get("/models", cast_to=object))["data"][0]["owned_by"])
                except openai.APIConnectionError:
                    return {}
                except (openai.APIStatusError, ValueError, TypeError, LookupError):
                    kind = ""
                self.own_sampling = {field: DEFAULTS[field] for field in OWN_SAMPLING.get(kind, ())}
        return self.own_sampling

    def _accepted(self, path: str, body: Json) -> Json:
        """Return a request in the form that this server accepts."""
        sent = {key: value for key, value in body.items() if (path, key) not in self.refused or not spare(key, value)}
        if "max_tokens" in body and "max_tokens" not in sent:
            sent["max_completion_tokens"] = body["max_tokens"]  # the name for newer OpenAI models
        for field in ("logprobs", "top_logprobs"):
            if type(sent.get(field)) is int and path in self.most_logprobs:
                sent[field] = min(sent[field], self.most_logprobs[path])
        if sent.get("temperature") == 0 and self.greedy:
            # Some servers return log-probabilities after temperature: at 1 they are those of the model.
            sent["temperature"] = 1 if "logprobs" in sent else self.greedy
        return sent

    def _learn(self, path: str, sent: Json, error: openai.APIStatusError) -> bool:
        """Remember the field that an error names; return False if none, raise EngineError if the field is required."""
        named = [field for field in sent if (field in OPTIONAL or field in DEFAULTS) and names(error, field)]
        if not named:
            return False
        field = next((field for field in named if spare(field, sent[field])), named[0])
        number = sent.get("top_logprobs", sent.get("logprobs"))
        if field.endswith("logprobs") and type(number) is int and number > FEW_LOGPROBS:
            self.most_logprobs[path] = FEW_LOGPROBS
        elif spare(field, sent[field]):
            if (path, field) not in self.refused:
                self.refused.add((path, field))
                self._say(error, f"`{field}`", "requests leave it out")
        elif field == "temperature" and sent[field] == 0:
            if not self.greedy:
                self.greedy = LEAST_TEMPERATURE
                self._say(error, "a temperature of 0", f"it gets {self.greedy}, or 1 where log-probabilities are read")
        else:
            option, value = OPTIONS.get(field, field), sent[field]
            raise EngineError(
                f"{self.url} refuses {option} {value:g}: {words(error)[:200]}",
                f"its own would be used instead; {option} {DEFAULTS[field]} sends none where it is refused",
            )
        return True

    def _say(self, error: openai.APIStatusError, what: str, then: str) -> None:
        say(f"srlm: {self.url} rejects {what} ({words(error)[:120]}): {then}")

    # --- errors ----------------------------------------------------------------------------------

    async def explained(self, error: Exception) -> EngineError:
        """Return a library error, or an unreadable answer, as an error of one line with a hint."""
        if isinstance(error, openai.APIStatusError):
            return await self._status(error)
        tries = f"in {self.spec.retries + 1} tries"
        if isinstance(error, openai.APITimeoutError):
            return EngineError(f"{self.url} did not answer within {self.spec.timeout:g} s, {tries}", "--timeout")
        if isinstance(error, openai.APIConnectionError):
            return EngineError(
                f"cannot reach {self.url}, {tries}: {error.__cause__ or error}",
                "is the server running, is --base-url right?",
            )
        return EngineError(
            f"{self.url} sent an answer that is not from an OpenAI-compatible server: {error}",
            "--base-url usually ends in /v1",
        )

    def _tried_again(self, error: openai.APIStatusError) -> bool:
        """Return whether the library retried: it does not if the server asks for too long a wait."""
        wait = error.response.headers.get("retry-after", "")
        return not (wait.isdecimal() and int(wait) > SECONDS_TO_WAIT)

    async def _status(self, error: openai.APIStatusError) -> EngineError:
        code = error.status_code
        said = f"{code} {words(error)[:300]}"
        if code in (401, 403):
            return EngineError(f"{self.url} rejects the API key: {said}", "set OPENAI_API_KEY")
        if code == 429 or code >= 500 or code == 408:
            tries = f"{self.spec.retries + 1} times" if self._tried_again(error) else "and asks to wait too long"
            return EngineError(f"{self.url} failed {tries}: {said}", "--retries, --concurrency")
        if code == 404 or (code in (400, 422) and "model" in said):
            offered = await self.models()
            if offered is None and code == 404:
                return EngineError(f"nothing to ask at {self.url}: {said}", "--base-url usually ends in /v1")
            if offered and self.spec.model not in offered:
                return EngineError(
                    f"{self.url} does not serve the model {self.spec.model}: {said}", f"it offers {listing(offered)}"
                )
        return EngineError(f"{self.url} rejected a request: {said}")


def only_model(spec: EngineSpec) -> str:
    """Return the only model of a server; raise OptionError if there are several, EngineError if there are none."""
    server = Server(spec)

    async def ask() -> list[str] | None:
        async with server.client:
            return await server.models()

    offered = asyncio.run(ask())
    if not offered:
        raise EngineError(f"{server.url} does not list its models", "is it running? --model MODEL, --base-url URL")
    if len(offered) > 1:
        raise OptionError(f"no model given, and {server.url} has {len(offered)}", f"--model {listing(offered)}")
    return offered[0]


def spare(field: str, value: Any) -> bool:
    """Return whether a field with this value can be left out without a change of the result."""
    return field in OPTIONAL or (field in DEFAULTS and value == DEFAULTS[field])


def listing(models: list[str]) -> str:
    """Return the first names as one text for an error message."""
    return ", ".join(models[:8]) + (f" and {len(models) - 8} more" if len(models) > 8 else "")
