"""Ask any OpenAI-compatible server: many requests in flight, completions in input order.

The requests are pulled and the completions yielded in the caller's thread; the HTTP of one engine
runs in an asyncio loop of its own, in a thread that ends with the process.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING

import openai

from srlm_cli import models
from srlm_cli.engines import choice_probabilities
from srlm_cli.engines.base import Completion, EngineSpec, Request, end_of
from srlm_cli.engines.chat_template import chat_text
from srlm_cli.engines.choice_probabilities import Step
from srlm_cli.engines.openai_server import Json, Server, filtered, names, too_long, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT, COMPLETIONS = "/chat/completions", "/completions"
LOOK_AHEAD = 4  # requests begun before the oldest is done, as a multiple of those in flight
SEEDS = 2**31  # what every server takes as a seed
TOP = 20  # what OpenAI and vLLM tell at most
CHOICE_TOKENS = 8  # room for a choice and the marks around it
COLUMNS = ("tokens", "token_logprobs", "top_logprobs")  # of the completions route
RARE = 1e-4  # a choice less probable than this has no share worth asking for
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


@dataclass(frozen=True)
class Reply:
    """One completion of an answer; `steps` are its tokens, None where the server gave no log-probabilities."""

    text: str
    finish_reason: str
    steps: list[Step] | None


@dataclass(frozen=True)
class Answer:
    """The replies to one request, and what they cost."""

    replies: list[Reply]
    tokens_in: int
    tokens_out: int


class OpenAIEngine:
    """A model behind a server.

    The completions of one request are asked for together (`n`), under a `seed` made of its first
    one; a server that gives fewer is asked for each of the rest under its own. The beginning of an
    assistant's turn is sent in the first of these ways that the server takes: vLLM's
    `continue_final_message`; the completions route with the chat template rendered here, where its
    tokenizer is at hand; a last message of the assistant, which most servers go on from.
    """

    name = "openai"

    def __init__(self, spec: EngineSpec) -> None:
        self.model = spec.model
        self.server = Server(spec)
        self.template = ChatTemplate(spec.tokenizer, spec.model)
        self.chat = spec.route != "completion"
        if not self.chat:
            self.template.load()
        here = spec.route == "auto" and self.template.at_hand
        self.ways = deque(["extension", "template", "turn"] if here else ["extension", "turn"])
        self.look_ahead = LOOK_AHEAD * spec.concurrency
        self.loop = asyncio.new_event_loop()
        Thread(target=self.loop.run_forever, name="openai", daemon=True).start()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield completions in order; what is still asked for when the caller stops is called off."""
        begun: deque[Future[Completion]] = deque()
        try:
            for request in requests:
                begun.append(asyncio.run_coroutine_threadsafe(self._answer(request), self.loop))
                while begun and (begun[0].done() or len(begun) >= self.look_ahead):
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()

    async def _answer(self, request: Request) -> Completion:
        """Return the completion of a request; every failure of server and network becomes EngineError."""
        try:
            return await (self._choose(request) if request.choices else self._write(request))
        except openai.APIStatusError as error:
            reason = "prompt-too-long" if too_long(error) else "content_filter" if filtered(error) else None
            if reason is None:
                raise await self.server.explained(error) from error
            size = len(request.seeds)
            return Completion([""] * size, [reason] * size, tokens_told(error), 0)
        except (openai.OpenAIError, OSError, ValueError) as error:
            raise await self.server.explained(error) from error

    # --- free text ---------------------------------------------------------------------------

    async def _write(self, request: Request) -> Completion:
        """Return a text for each seed; greedy ones are all the same and asked for once."""
        size = len(request.seeds)
        if request.sampling.top_p == 0:  # which servers refuse, and which is the most probable token
            request = replace(request, sampling=replace(request.sampling, temperature=0.0, top_p=1.0))
        seeds = request.seeds if request.sampling.temperature > 0 else request.seeds[:1]
        first = await self._ask(request, seeds)
        missing = seeds[len(first.replies) :]
        answers = [first, *await asyncio.gather(*(self._ask(request, (seed,)) for seed in missing))]
        ended = [ended_as_asked(reply, request) for answer in answers for reply in answer.replies]
        texts, reasons = map(list, zip(*(ended * size)[:size], strict=True))
        return Completion(texts, reasons, first.tokens_in, sum(answer.tokens_out for answer in answers))

    async def _ask(self, request: Request, seeds: tuple[int, ...], **more: object) -> Answer:
        """Return the server's answer to one POST: a reply for each seed, or for fewer of them."""
        sampling = request.sampling
        body: Json = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": seeds[0] % SEEDS,
            **({"n": len(seeds)} if len(seeds) > 1 else {}),
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
            **more,
        }
        return read_answer(await self._post(request, body), len(seeds))

    async def _post(self, request: Request, body: Json) -> Json:
        """Send a request by the route, and go on with its prefix in the first way that the server takes."""
        async with self.server.gate:
            if not self.chat or not request.prefix:
                return await self._fitting(request, body, "turn" if self.chat else "template")
            while True:
                way = self.ways[0]
                try:
                    return await self._fitting(request, body, way)
                except (openai.BadRequestError, openai.UnprocessableEntityError, openai.NotFoundError) as error:
                    if way == "turn" or not refuses_way(error, way):
                        raise
                    if self.ways[0] == way:  # requests beside this one may have found it out already
                        self.ways.popleft()

    async def _fitting(self, request: Request, body: Json, way: str) -> Json:
        """Send a request; where prompt and completion do not fit together, leave the completion what remains."""
        if way == "template":
            path, shown = COMPLETIONS, {"prompt": as_utf8(await asyncio.to_thread(self.template.render, request))}
        else:
            path, shown = CHAT, chat_of(request, way)
        if path == COMPLETIONS and body.get("logprobs"):
            body = {**body, "logprobs": body["top_logprobs"]}
            del body["top_logprobs"]
        try:
            return await self.server.post(path, {**body, **shown})
        except openai.APIStatusError as error:
            if not too_long(error):
                raise
            room = self._room(error, shown.get("prompt"))
            if room == 0:
                raise
        # Without a limit a chat server goes on to the end of its context; a completions server does not.
        rest = {key: value for key, value in body.items() if key != "max_tokens"}
        return await self.server.post(path, {**rest, **shown, **({"max_tokens": room} if room else {})})

    def _room(self, error: openai.APIStatusError, prompt: str | None) -> int | None:
        """Return how many tokens the context has behind a prompt; 0 is none, None is for the server to say."""
        if prompt is None:
            return None
        context = re.search(r"context length (?:is|of) (\d+)", words(error))
        return max(0, int(context[1]) - self.template.count(prompt)) if context else 0

    # --- choices -----------------------------------------------------------------------------

    async def _choose(self, request: Request) -> Completion:
        """Return a choice for each seed by the log-probabilities behind the prefix.

        They are asked for at temperature 0, where servers tell those of the model itself; the draw at
        the request's own temperature is made here. Without log-probabilities a text is drawn.
        """
        answer = await self._next_tokens(request)
        steps = answer.replies[0].steps
        if steps is None:
            return await self._choose_by_text(request)
        found = choice_probabilities.masses(steps, request.choices, request.prefix[len(request.prefix.rstrip()) :])
        spent = [answer]
        for short in request.choices:
            spent += await self._divide(request, short, found)
        probabilities = choice_probabilities.shared(list(found.values()))
        size = len(request.seeds)
        tokens_in, tokens_out = answer.tokens_in, sum(answer.tokens_out for answer in spent)
        if probabilities is None:
            return Completion([""] * size, ["no-choice"] * size, tokens_in, tokens_out)
        return replace(choice_probabilities.completion(request, probabilities, tokens_in), tokens_out=tokens_out)

    async def _divide(self, request: Request, short: str, found: dict[str, float]) -> list[Answer]:
        """Divide what was found for a choice ("1") among it and those that go on from it ("10")."""
        rest = {other: other[len(short) :] for other in choice_probabilities.longer(short, request.choices)}
        if not rest or found[short] < RARE:
            return []
        answer = await self._next_tokens(replace(request, prefix=request.prefix + short))
        step = (answer.replies[0].steps or [])[:1]
        whole = found[short]
        for other, end in rest.items():
            share = whole * sum(p for token, p in step[0].top.items() if token == end) if step else 0.0
            found[other] += share
            found[short] -= share
        return [answer]

    async def _next_tokens(self, request: Request) -> Answer:
        """Return the next two tokens and the most probable ones beside them; the first may be a space."""
        greedy = replace(request.sampling, temperature=0.0, top_p=1.0, max_new_tokens=2, stop=())
        return await self._ask(replace(request, sampling=greedy), request.seeds[:1], logprobs=True, top_logprobs=TOP)

    async def _choose_by_text(self, request: Request) -> Completion:
        """Return, for each seed, the choice that a drawn text begins with, or an empty text."""
        short = replace(request.sampling, max_new_tokens=CHOICE_TOKENS, stop=())
        written = await self._write(replace(request, sampling=short, choices=()))
        return replace(written, texts=[choice_probabilities.named_in(text, request.choices) for text in written.texts])


class ChatTemplate:
    """A model's chat template, for the route that takes a text; its tokenizer is loaded by the first use."""

    def __init__(self, tokenizer: str | None, model: str) -> None:
        self.model = tokenizer or model
        self.at_hand = bool(tokenizer) or model in models.EMBEDDED or Path(model).is_dir()
        self.lock = Lock()
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def load(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer; raise EngineError when there is none of that name."""
        with self.lock:
            if self.tokenizer is None:
                models.quiet_libraries()
                self.tokenizer = models.load_tokenizer(self.model)
            return self.tokenizer

    def render(self, request: Request) -> str:
        """Return a chat as text, up to and with its prefix, without the BOS that the server will add."""
        tokenizer = self.load()
        text = chat_text(tokenizer, request.messages, self.model)
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        return (text.removeprefix(tokenizer.bos_token) if adds_bos else text) + request.prefix.rstrip()

    def count(self, text: str) -> int:
        """Return the number of tokens that a server makes of a text."""
        return len(self.load()(text)["input_ids"])


def chat_of(request: Request, way: str) -> Json:
    """Return the messages of a request, the beginning of the assistant's turn as the last one.

    Spaces at its end are left to the model, whose tokens most often begin with them.
    """
    messages = [{**message, "content": as_utf8(message["content"])} for message in request.messages]
    if not request.prefix:
        return {"messages": messages}
    begun = {"role": "assistant", "content": as_utf8(request.prefix.rstrip())}
    return {"messages": [*messages, begun], **(CONTINUE if way == "extension" else {})}


def as_utf8(text: str) -> str:
    """Return a text that can be sent: a lone surrogate, which UTF-8 has no bytes for, becomes `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def refuses_way(error: openai.APIStatusError, way: str) -> bool:
    """Tell whether an error says that the server cannot go on with a turn in this way."""
    if too_long(error) or filtered(error):
        return False
    if way == "template":
        return error.status_code == 404
    return any(names(error, field) for field in CONTINUE) or "assistant" in words(error).lower()


def behind_prefix(text: str, prefix: str) -> str:
    """Return a text without the prefix, should the server repeat it, and without the spaces that belong to it."""
    if not prefix:
        return text
    text = text.removeprefix(prefix.rstrip())
    return text.lstrip() if prefix != prefix.rstrip() else text


def ended_as_asked(reply: Reply, request: Request) -> tuple[str, str]:
    """Return text and finish reason of a reply, cut where the server has not heeded its end.

    One that ended by itself is left whole but for stop texts: it is there, and its last verdict may not be the first.
    """
    if reply.finish_reason == "content_filter":
        return "", reply.finish_reason
    text = behind_prefix(reply.text, request.prefix)
    sampling = request.sampling if reply.finish_reason == "length" else replace(request.sampling, last_line="")
    cut = end_of(text, sampling)
    return (text, reply.finish_reason) if cut is None else (text[:cut], "stop")


def tokens_told(error: openai.APIStatusError) -> int:
    """Return the length of a prompt that is too long, where the server's message tells it."""
    told = re.search(r"(\d+) (?:input tokens|tokens? in the (?:messages|prompt))", words(error))
    return int(told[1]) if told else 0


def read_answer(answer: Json, wanted: int) -> Answer:
    """Return an answer of either route, `wanted` replies at most; raise ValueError where it is none."""
    try:
        made = sorted(answer["choices"], key=lambda choice: choice.get("index") or 0)[:wanted]
        replies = [read_reply(choice) for choice in made]
        usage = answer.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{str(answer)[:200]!r}") from error
    if not replies:
        raise ValueError(f"{str(answer)[:200]!r}")
    return Answer(replies, *tokens)


def read_reply(choice: Json) -> Reply:
    """Return one choice of a chat or of a completion."""
    text = choice["message"].get("content") if "message" in choice else choice["text"]
    if isinstance(text, list):  # of parts, the text among them
        text = "".join(part.get("text") or "" for part in text)
    return Reply(text or "", choice.get("finish_reason") or "stop", read_steps(choice.get("logprobs") or {}))


def read_steps(logprobs: Json) -> list[Step] | None:
    """Return the tokens of a reply with the most probable ones at their places, in either route's shape.

    An answer without any token has none; None is a server that tells nothing.
    """
    if (tokens := logprobs.get("content")) is not None:
        return [
            Step(step["token"], exp(step["logprob"]), summed((top["token"], top["logprob"]) for top in tops(step)))
            for step in tokens
        ]
    if logprobs.get("tokens") is None:
        return None
    return [
        Step(token, exp(logprob or 0.0), summed((top or {}).items()))
        for token, logprob, top in zip(*(logprobs.get(name) or [] for name in COLUMNS), strict=False)
    ]


def tops(step: Json) -> list[Json]:
    """Return the most probable tokens of a step, the written one if the server tells of no other."""
    return step.get("top_logprobs") or [step]


def summed(logprobs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return probabilities by text; tokens of the same text add up."""
    found: dict[str, float] = {}
    for token, logprob in logprobs:
        if token is None or logprob is None:
            continue
        found[token] = found.get(token, 0.0) + exp(logprob)
    return found
