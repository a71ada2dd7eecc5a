"""The engine for OpenAI-compatible servers: many requests in flight, completions in input order.

Requests are read and completions are yielded in the caller's thread. The HTTP traffic of an engine runs in an asyncio
loop in a thread of its own, which ends with the engine.
"""

from __future__ import annotations

import asyncio
import json
import re
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from threading import Lock, Thread
from typing import Any

import openai

from srlm_cli.engines import choice_probabilities
from srlm_cli.engines.base import (
    SERVER_CLOSES,
    TEMPLATE_REFUSED,
    Completion,
    EngineSpec,
    Request,
    Sampling,
    end_of,
    no_text,
)
from srlm_cli.engines.chat_template import ChatTemplate, answered
from srlm_cli.engines.openai_answers import Answer, Json, Reply, read_answer
from srlm_cli.engines.openai_draws import Draws
from srlm_cli.engines.openai_refusals import names, refusal, words
from srlm_cli.engines.openai_server import Server
from srlm_cli.errors import BadRow, EngineError, OptionError
from srlm_cli.models.embedded import EMBEDDED
from srlm_cli.models.load import load_tokenizer, quiet_libraries
from srlm_cli.streams.console import say
from srlm_cli.thoughts import SWITCHES, Thought, marks_of

CHAT, COMPLETIONS = "/chat/completions", "/completions"
LOOK_AHEAD = 4  # requests started before the oldest is complete, as a multiple of --concurrency
SEEDS = 2**31  # seeds below this limit are accepted by every server
TOP = 20  # the most log-probabilities per token that OpenAI and vLLM return
CHOICE_TOKENS = 8  # enough for a choice and punctuation around it
# If a server continues the turn, the total probability of the choices is above this (`stages.judge.MIN_SCORE_MASS`).
CONTINUED = 0.2
FIRST = 16  # requests with choices that decide whether a server continues turns at all
RARE = 1e-4  # below this probability a choice is not divided among its extensions
CONTEXT = re.compile(r"context length (?:is|of) (\d+)")
HELLO = [{"role": "user", "content": "Hello!"}]  # a prompt that no server refuses
HELLO_TOKENS = 2048  # room for what a thinking model thinks about a greeting
FILTERS = ("top_k", "min_p", "repetition_penalty", "presence_penalty")  # sent where they are not neutral
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


class OpenAIEngine:
    """An engine that sends requests to a server.

    All completions of one request are requested together (`n`), with a `seed` made from the first seed. If the server
    returns fewer, each of the others is requested by itself with its own seed. The start of the assistant's turn is
    sent in the first of these ways that the server accepts: vLLM's `continue_final_message`; the completions route with
    the chat template rendered here, if the tokenizer is available; a last message of the assistant, which most servers
    continue.
    """

    name = "openai"

    def __init__(self, spec: EngineSpec) -> None:
        self.model = spec.model
        self.server = Server(spec)
        self.noted = self.server.noted
        self.template = LocalTemplate(spec)
        self.chat = spec.route != "completion"
        if not self.chat:
            self.template.load()
        here = spec.route == "auto" and self.template.at_hand
        self.ways = deque(["extension", "template", "turn"] if here else ["extension", "turn"])
        self.masses: list[float] = []
        self.look_ahead = LOOK_AHEAD * spec.concurrency
        self.draws = Draws(self._texts, self.server.url, spec.check_sampling)
        self.extra_body: Json = json.loads(spec.extra_body) if spec.extra_body else {}
        self.marks = marks_of(spec.think_markers)
        self.opens: bool | None = False if spec.thinking == "off" else True if spec.think_markers else None
        self.takes_others: bool | None = None
        self.trying = asyncio.Lock()
        self.loop = asyncio.new_event_loop()
        Thread(target=run_until_stopped, args=(self.loop,), name="openai", daemon=True).start()
        weakref.finalize(self, self.loop.call_soon_threadsafe, self.loop.stop).atexit = False

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield completions in order; requests in flight are cancelled when the caller stops."""
        begun: deque[Future[Completion]] = deque()
        try:
            for request in requests:
                if request.sampling.max_thinking_tokens:
                    raise OptionError(
                        "--max-thinking-tokens: a server closes thoughts itself",
                        SERVER_CLOSES,
                    )
                begun.append(asyncio.run_coroutine_threadsafe(self._answer(request), self.loop))
                while begun and (begun[0].done() or len(begun) >= self.look_ahead):
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()

    async def _answer(self, request: Request) -> Completion:
        """Return the completion of a request, also of a refused one; raise EngineError for other failures."""
        try:
            return await (self._choose(request) if request.choices else self._write(request))
        except openai.APIStatusError as error:
            reason = refusal(error)
            if not reason and error.status_code in (400, 422) and await self._takes_others(request):
                reason = "refused"
            if not reason:
                raise await self.server.explained(error) from error
            return no_text(request, reason, tokens_told(error), why=f"{error.status_code} {words(error)[:300]}")
        except BadRow as error:  # from the chat template rendered here
            return no_text(request, TEMPLATE_REFUSED, why=str(error))
        except (openai.OpenAIError, OSError, ValueError) as error:
            raise await self.server.explained(error) from error

    async def _takes_others(self, request: Request) -> bool:
        """Return whether the server accepts this request with other messages: then its own messages are the reason."""
        async with self.trying:
            if self.takes_others is None:
                try:
                    await self._ask(replace(request, messages=HELLO, choices=()), request.seeds[:1])
                    self.takes_others = True
                except (openai.OpenAIError, OSError, ValueError, EngineError):
                    self.takes_others = False
        return self.takes_others

    # --- free text ---------------------------------------------------------------------------

    async def _write(self, request: Request) -> Completion:
        """Return one text per seed; greedy texts are all equal and requested once."""
        size = len(request.seeds)
        if request.sampling.top_p == 0:  # servers refuse it; it means the most probable token
            request = replace(request, sampling=replace(request.sampling, temperature=0.0, top_p=1.0))
        seeds = request.seeds if request.sampling.temperature > 0 else request.seeds[:1]
        first = await self._ask(request, seeds)
        replies = first.replies
        rest = await self._ask_apart(request, seeds[len(replies) :])
        replies = [*replies, *(answer.replies[0] for answer in rest)]
        if len(seeds) > 1 and len({reply.text for reply in replies}) == 1 and await self.draws.shared(len(seeds)):
            rest += (again := await self._ask_apart(request, seeds[1 : len(first.replies)]))
            replies[1 : len(first.replies)] = [answer.replies[0] for answer in again]
        ended = [await self._ended(reply, request) for reply in replies]
        texts, reasons, thoughts = zip(*(ended * size)[:size], strict=True)
        spent = sum(answer.tokens_out for answer in (first, *rest))
        found = thoughts if any(thoughts) else ()
        return Completion(list(texts), list(reasons), first.tokens_in, spent, thoughts=found)

    # --- thoughts ----------------------------------------------------------------------------

    async def _ended(self, reply: Reply, request: Request) -> tuple[str, str, Thought | None]:
        """Return the answer of a reply, its finish reason and its thought, cut at an end that the server ignored.

        A reply with another finish reason than `stop` or `length`, or without text, becomes an empty text with that
        reason. A text that ended by itself is cut at stop texts only: its last verdict may not be the first.
        """
        if reply.finish_reason not in ("stop", "length"):
            return "", reply.finish_reason, None
        if request.prefix and self.ways[0] == "extension" and not reply.text:
            # The text after the start of an answer: parsers of vLLM do not see that the prompt has closed the thought.
            reply = replace(reply, text=reply.reasoning, reasoning="")
        if reply.reasoning.strip():
            self.opens = False  # the server divides
            reasoning, text = reply.reasoning.strip(), reply.text.lstrip()
            thought = Thought(reasoning, self._as_written(reasoning, text, request), closed=bool(text))
            return answered(*cut(text, reply.finish_reason, request), thought)
        text = behind_prefix(reply.text, request.prefix)
        if not text.strip():
            return "", "empty", None
        opened = await self._opened(text, reply.finish_reason, request)
        _, thought = self.marks.divide(text, opened)
        if thought is None:
            return *cut(text, reply.finish_reason, request), None
        if not thought.closed:
            return answered("", reply.finish_reason, thought)
        answer, reason = cut(text[len(thought.raw) :], reply.finish_reason, request)
        return answered(self.marks.divide(thought.raw + answer, opened)[0], reason, thought)

    def _as_written(self, reasoning: str, text: str, request: Request) -> str:
        """Return the thought before a text as the model wrote it, if the chat template is available."""
        if not self.template.at_hand:
            return ""
        before, between = self.template.load().around(request.messages, request.template_kwargs)
        return before + reasoning + (between if text else "")

    async def _opened(self, text: str, reason: str, request: Request) -> bool:
        """Return whether the prompt of a text has opened a thought; for a text without marks the template decides.

        Without a template, other replies decide. If there are none, one is requested from the server, once.
        """
        if request.prefix or request.thought:
            return False
        if not self.chat or (reason == "length" and self.template.at_hand and not self.marks.pattern.search(text)):
            return await asyncio.to_thread(self.template.opens, request)
        if found := self.marks.pattern.search(text):
            self.opens = bool(self.opens or found["close"])
            return False
        if reason == "stop":
            if self.opens is None and self.template.at_hand and await asyncio.to_thread(self.template.opens, request):
                await self._find_marks()
            self.opens = bool(self.opens)  # a thought would have been closed
            return False
        async with self.trying:
            if self.opens is None:
                await self._greet()
        return bool(self.opens)

    async def _find_marks(self) -> None:
        """Raise EngineError if no reply shows where its thought ends, after one without the thought of its prompt.

        `transformers serve` removes marks that are special tokens.
        """
        async with self.trying:
            if self.opens is None and not await self._greet():
                raise EngineError(
                    f"the chat template of {self.template.model} opens a thought, and the replies of {self.server.url} "
                    "have none: nothing shows where an answer begins",
                    "--thinking off, if the server turns thoughts off; else a server with a parser of thoughts",
                )

    async def _greet(self) -> bool:
        """Request a reply to a greeting, to see whether it starts inside a thought; return whether it has a thought."""
        greedy = Sampling(0.0, 1.0, HELLO_TOKENS)
        try:
            (reply, *_) = (await self._ask(Request(HELLO, greedy, (0,)), (0,))).replies
        except openai.OpenAIError:
            reply = Reply("", "stop", None)
        found = self.marks.pattern.search(reply.text)
        self.opens = bool(found and found["close"])
        if not found and not reply.reasoning and reply.finish_reason == "length":
            say(
                f"srlm: {self.server.url} does not tell whether its replies begin with a thought: those that were cut "
                "are taken as answers. --tokenizer MODEL tells, or --think-markers OPEN CLOSE"
            )
        return bool(found or reply.reasoning.strip())

    async def _ask_apart(self, request: Request, seeds: tuple[int, ...]) -> list[Answer]:
        """Return one answer per seed, each from a request of its own."""
        return await asyncio.gather(*(self._ask(request, (seed,)) for seed in seeds))

    async def _ask(self, request: Request, seeds: tuple[int, ...], **more: object) -> Answer:
        """Return the server's answer to one POST: one reply per seed, or fewer."""
        sampling = request.sampling
        body: Json = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": seeds[0] % SEEDS,
            **({"n": len(seeds)} if len(seeds) > 1 else {}),
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
            **({"response_format": json_format(request.schema)} if request.schema else {}),
            **{name: value for name in FILTERS if (value := getattr(sampling, name)) != getattr(Sampling, name)},
            **self.extra_body,
            **more,
        }
        return read_answer(await self._post(request, body), len(seeds))

    async def _texts(self, request: Request, seeds: tuple[int, ...]) -> list[str]:
        """Return the texts of one answer."""
        return [reply.text for reply in (await self._ask(request, seeds)).replies]

    async def _post(self, request: Request, body: Json) -> Json:
        """Send a request, with its prefix in the first way that the server accepts."""
        async with self.server.gate:
            if not self.chat or not (request.prefix or request.thought):
                return await self._fitting(request, body, "turn" if self.chat else "template")
            if request.thought:
                return await self._fitting(request, body, self._way_after_a_thought())
            while True:
                way = self.ways[0]
                try:
                    return await self._fitting(request, body, way)
                except (openai.BadRequestError, openai.UnprocessableEntityError, openai.NotFoundError) as error:
                    if way == "turn" or not refuses_way(error, way):
                        raise
                    if self.ways[0] == way:  # concurrent requests may have removed it already
                        self.ways.popleft()

    def _way_after_a_thought(self) -> str:
        """Return the way to continue a turn after a thought: only as text, as templates drop or change thoughts."""
        if "template" in self.ways:
            return "template"
        raise EngineError(
            "the server cannot continue after a thought by its chat route",
            "--route completion --tokenizer MODEL sends the prompt as text; or --score text without --force-score",
        )

    async def _fitting(self, request: Request, body: Json, way: str) -> Json:
        """Send a request; if prompt and completion do not fit in the context, shorten the completion."""
        if way == "template":
            path, shown = COMPLETIONS, {"prompt": await asyncio.to_thread(self.template.render, request)}
        else:
            path, shown = CHAT, chat_of(request, way)
            if kwargs := {**self.template.kwargs, **(request.template_kwargs or {})}:
                shown["chat_template_kwargs"] = {**body.get("chat_template_kwargs", {}), **kwargs}
        if path == COMPLETIONS and body.get("logprobs"):
            body = {**body, "logprobs": body["top_logprobs"]}
            del body["top_logprobs"]
        try:
            return await self.server.post(path, {**body, **shown})
        except openai.APIStatusError as error:
            refused = error
        rest = {key: value for key, value in body.items() if key != "max_tokens"}
        for limit in self._limits(refused, shown.get("prompt")):
            try:
                return await self.server.post(path, {**rest, **shown, **limit})
            except openai.APIStatusError as error:
                refused = error
        raise refused

    def _limits(self, error: openai.APIStatusError, prompt: str | None) -> list[Json]:
        """Return the `max_tokens` fields to try if prompt and completion do not fit: the rest of the context, or none.

        Without the field a chat server continues to the end of its context; a completions server does not.
        """
        if refusal(error) != "prompt-too-long":
            return []
        if prompt is None:
            room = room_told(words(error))
            return [*([{"max_tokens": room}] if room else []), {}]
        context = CONTEXT.search(words(error))
        room = int(context[1]) - self.template.count(prompt) if context else 0
        return [{"max_tokens": room}] if room > 0 else []

    # --- choices -----------------------------------------------------------------------------

    async def _choose(self, request: Request) -> Completion:
        """Return one choice per seed, from the log-probabilities after the prefix.

        They are requested at temperature 0, at which servers return those of the model itself. The choice is then drawn
        here at the temperature of the request. A server without log-probabilities writes a text instead.
        """
        answer = await self._next_tokens(request)
        steps = answer.replies[0].steps
        if steps is None:
            return await self._choose_by_text(request)
        found = choice_probabilities.masses(steps, request.choices, request.prefix[len(request.prefix.rstrip()) :])
        spent = [answer]
        for short in request.choices:
            spent += await self._divide(request, short, found)
        mass, probabilities = sum(found.values()), choice_probabilities.shared(list(found.values()))
        size = len(request.seeds)
        tokens_in, tokens_out = answer.tokens_in, sum(answer.tokens_out for answer in spent)
        if not self._continued(request, mass) or probabilities is None:
            return Completion([""] * size, ["no-choice"] * size, tokens_in, tokens_out, mass=mass)
        return replace(choice_probabilities.completion(request, probabilities, mass, tokens_in), tokens_out=tokens_out)

    def _continued(self, request: Request, mass: float) -> bool:
        """Return whether the server continued the start of a turn, judged by the probability of the choices.

        Raise EngineError if it did not continue most of the first ones.
        """
        if not request.prefix or not self.chat or self.ways[0] == "template":
            return True
        if len(self.masses) < FIRST:
            self.masses.append(mass)
            if len(self.masses) == FIRST and median(self.masses) < CONTINUED:
                raise EngineError(
                    f"the server starts new answers instead of continuing {request.prefix[-30:]!r}: most of the first "
                    f"{FIRST} gave {', '.join(request.choices)} less than {CONTINUED:.0%} of the probability",
                    "--route completion --tokenizer MODEL sends the prompt as text",
                )
        return mass >= CONTINUED

    async def _divide(self, request: Request, short: str, found: dict[str, float]) -> list[Answer]:
        """Divide the probability of a choice ("1") between it and the choices that extend it ("10")."""
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
        """Return the next two tokens with the most probable alternatives; the first token can be a space."""
        greedy = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=2)
        return await self._ask(replace(request, sampling=greedy), request.seeds[:1], logprobs=True, top_logprobs=TOP)

    async def _choose_by_text(self, request: Request) -> Completion:
        """Return, per seed, the choice that a sampled text starts with, or an empty text."""
        short = replace(request.sampling, max_new_tokens=CHOICE_TOKENS, stop=())
        written = await self._write(replace(request, sampling=short, choices=()))
        return replace(written, texts=[choice_probabilities.named_in(text, request.choices) for text in written.texts])


def run_until_stopped(loop: asyncio.AbstractEventLoop) -> None:
    """Run the event loop until its engine is no longer used."""
    loop.run_forever()
    loop.close()


class LocalTemplate:
    """A model's chat template, for the completions route; its tokenizer is loaded on first use."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec, self.model = spec, spec.tokenizer or spec.model
        here = spec.model in EMBEDDED or Path(spec.model).is_dir()
        self.at_hand = bool(spec.tokenizer) or (here and find_spec("transformers") is not None)
        self.lock = Lock()
        self.loaded: ChatTemplate | None = None

    def load(self) -> ChatTemplate:
        """Return the template; raise EngineError if there is no tokenizer of this name."""
        with self.lock:
            if self.loaded is None:
                quiet_libraries()
                self.loaded = ChatTemplate.of(load_tokenizer(self.model), self.spec)
            return self.loaded

    @property
    def kwargs(self) -> dict[str, Any]:
        """What the server's chat template is given; without the template itself, by the option's usual name."""
        if self.loaded:
            return self.loaded.kwargs
        switch = {} if self.spec.thinking == "auto" else {SWITCHES[0]: self.spec.thinking == "on"}
        return {**(json.loads(self.spec.template_kwargs) if self.spec.template_kwargs else {}), **switch}

    def opens(self, request: Request) -> bool:
        """Return whether the prompt of a request ends in a thought that it has opened."""
        template = self.load()
        return template.marks.opened(template.turn(request))

    def render(self, request: Request) -> str:
        """Return a chat as text, up to and including its prefix, without the BOS that the server adds."""
        template = self.load()
        text, tokenizer = template.turn(request), template.tokenizer
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        text = text.removeprefix(tokenizer.bos_token) if adds_bos else text
        return text.rstrip() if request.prefix else text

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, with special tokens as the server adds them."""
        return len(self.load().tokenizer(text)["input_ids"])


def chat_of(request: Request, way: str) -> Json:
    """Return the messages of a request, with the start of the assistant's turn as the last message.

    Spaces at its end are removed, because most tokens start with a space themselves.
    """
    if not request.prefix:
        return {"messages": request.messages}
    begun = {"role": "assistant", "content": request.prefix.rstrip()}
    return {"messages": [*request.messages, begun], **(CONTINUE if way == "extension" else {})}


def json_format(schema: Json) -> Json:
    """Return the field that makes a server write by a JSON schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def refuses_way(error: openai.APIStatusError, way: str) -> bool:
    """Return whether an error means that the server cannot continue a turn in this way."""
    if refusal(error):
        return False
    if way == "template":
        return error.status_code == 404
    return any(names(error, field) for field in CONTINUE) or "assistant" in words(error).lower()


def behind_prefix(text: str, prefix: str) -> str:
    """Return a text without the prefix, if the server repeats it, and without the spaces at the end of the prefix."""
    if not prefix:
        return text
    text = text.removeprefix(prefix.rstrip())
    return text.lstrip() if prefix != prefix.rstrip() else text


def cut(text: str, reason: str, request: Request) -> tuple[str, str]:
    """Return an answer, cut at an end that the server ignored, and its finish reason."""
    sampling = request.sampling if reason == "length" else replace(request.sampling, last_line="")
    end = end_of(text, sampling)
    return (text, reason) if end is None else (text[:end], "stop")


def room_told(said: str) -> int | None:
    """Return the number of tokens left for a completion, read from an error message; None if it has no number."""
    context = CONTEXT.search(said) or re.search(r"`inputs` tokens \+ `max_new_tokens` must be <= (\d+)", said)
    prompt = re.search(r"(?<!at least )\b(\d+) (?:in the messages|tokens from the input|`inputs` tokens)", said)
    if context and prompt:
        return max(0, int(context[1]) - int(prompt[1]))
    most = re.search(r"at most (\d+) completion tokens|error: `max_new_tokens` must be <= (\d+)", said)
    return int(most[1] or most[2]) if most else None


def tokens_told(error: openai.APIStatusError) -> int:
    """Return the length of a prompt that is too long, read from the error message; 0 if it has no number."""
    told = re.search(r"(\d+) (?:input tokens|tokens? in the (?:messages|prompt))", words(error))
    return int(told[1]) if told else 0
