"""An OpenAI-compatible server in this process that answers from a rule and fails as a test wants it to."""

from __future__ import annotations

import json
import math
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

Json = dict[str, Any]
MODEL = "stub-model"


@dataclass(frozen=True)
class Fault:
    """What happens instead of an answer: a status, raw bytes, a cut connection, or none for a while."""

    status: int = 200
    body: Json | bytes | str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    hang: bool = False


@dataclass(frozen=True)
class Asked:
    """One request as it came: its path behind /v1, body, place in the order of arrival, and time."""

    path: str
    body: Json
    at: int
    time: float

    @property
    def text(self) -> str:
        """The prompt, or the last thing that the user said."""
        if "prompt" in self.body:
            return self.body["prompt"]
        return next(m["content"] for m in reversed(self.body["messages"]) if m["role"] == "user")


def refuse(asked: Asked, *fields: str) -> Fault | None:
    """Return a 400 about the first of these fields that a request has."""
    found = [name for name in fields if name in asked.body]
    return found and error(400, f"Unrecognized request argument supplied: {found[0]}", param=found[0]) or None


def error(status: int, message: str, **more: Any) -> Fault:
    """Return an error in the shape of OpenAI's."""
    retry = {"retry-after-ms": "10"} if status in (408, 429) or status >= 500 else {}
    return Fault(status, {"error": {"message": message, "type": "stub", "param": None, "code": None, **more}}, retry)


class Stub:
    """A server on a port of its own.

    `behave` returns a Fault, or None for the answer that prompt and seed decide. `steps` are the most
    probable tokens at each place, as {token: probability}, told where log-probabilities are asked for;
    the first of each is the written one. `takes_n` False gives one choice whatever `n` says, and with
    `same_seed` all choices of a request are drawn by its one seed. `owner` is what its models are `owned_by`.
    """

    def __init__(
        self,
        behave: Callable[[Asked], Fault | None] = lambda asked: None,
        *,
        delay: Callable[[Asked], float] = lambda asked: 0.0,
        steps: Callable[[Asked], list[dict[str, float]] | None] = lambda asked: None,
        takes_n: bool = True,
        models: tuple[str, ...] = (MODEL,),
        write: Callable[[str, int], str] | None = None,
        reason: str | None = "stop",
        owner: str | None = None,
        port: int = 0,
    ) -> None:
        self.behave, self.delay, self.steps, self.takes_n = behave, delay, steps, takes_n
        self.models, self.write, self.reason, self.owner = models, write or words, reason, owner
        self.same_seed = False
        self.thoughts_in = ""  # the field of a message that holds its thought, as servers with a parser have it
        self.asked: list[Asked] = []
        self.now = self.most = self.listed = 0
        self.models_status = 200  # of the list of models
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.open: set[socket.socket] = set()
        handler = type("Handler", (_Handler,), {"stub": self})
        self.http = _Http(("127.0.0.1", port), handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Die at once: nothing listens, and open connections are reset."""
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()
        for connection in list(self.open):
            reset(connection)

    def cards(self) -> list[Json]:
        """Return what the list of models says of each."""
        owned = {"owned_by": self.owner} if self.owner else {}
        return [{"id": name, **owned} for name in self.models]

    def posts(self, path: str = "") -> list[Asked]:
        """Return the requests for completions, of one route if that is given."""
        return [asked for asked in self.asked if asked.path.endswith("completions") and asked.path.endswith(path)]


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = True

    def handle_error(self, *_: object) -> None:
        pass  # a client that has gone in the middle of its request


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet an answer
    stub: Stub

    def setup(self) -> None:
        self.stub.open.add(self.request)
        super().setup()

    def finish(self) -> None:
        self.stub.open.discard(self.request)
        try:
            super().finish()
        except OSError:
            pass

    def do_GET(self) -> None:  # noqa: N802
        if self.path == "/v1/models":
            self.stub.listed += 1
            self.send(self.stub.models_status, {"object": "list", "data": self.stub.cards()})
        else:
            self.send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:  # noqa: N802
        stub = self.stub
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with stub.lock:
            stub.now += 1
            stub.most = max(stub.most, stub.now)
            asked = Asked(self.path.removeprefix("/v1"), body, len(stub.asked), time.monotonic())
            stub.asked.append(asked)
        try:
            self.answer(asked)
        except OSError:
            self.close_connection = True
        finally:
            with stub.lock:
                stub.now -= 1

    def answer(self, asked: Asked) -> None:
        fault = self.stub.behave(asked)
        self.stub.ended.wait(self.stub.delay(asked))
        if fault is None:
            self.send(200, answer_to(asked, self.stub))
        elif fault.hang:
            self.stub.ended.wait(30)
        elif fault.cut:
            self.wfile.write(
                b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{"id": "c'
            )
            self.wfile.flush()
            reset(self.request)
            self.close_connection = True
        else:
            self.send(fault.status, fault.body, fault.headers)

    def send(self, status: int, body: Json | bytes | str | None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else (body or "").encode() if not isinstance(body, dict) else None
        kind = "application/json" if data is None or isinstance(body, bytes) else "text/html"
        data = json.dumps(body).encode() if data is None else data
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


def reset(connection: socket.socket) -> None:
    """Close a connection without a goodbye, as a killed process does."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
    except OSError:
        pass


def words(text: str, seed: int) -> str:
    """Return what the stub writes about a text under a seed, with a score at the end."""
    draw = Random(f"{text}/{seed}")
    return (
        " ".join(draw.choices("amber anchor basket candle delta ember".split(), k=5)) + f"\nScore: {draw.randint(0, 5)}"
    )


def answer_to(asked: Asked, stub: Stub) -> Json:
    """Return the answer to a request, in the shape of its route."""
    count = asked.body.get("n", 1) if stub.takes_n else 1
    step = 0 if stub.same_seed else 1
    texts = [stub.write(asked.text, asked.body.get("seed", 0) + step * k) for k in range(count)]
    told = stub.steps(asked) if asked.body.get("logprobs") else None
    chat = asked.path.startswith("/chat")
    made = [
        {
            "index": k,
            "finish_reason": stub.reason,
            "logprobs": told and (chat_logprobs(told) if chat else text_logprobs(told)),
            **({"message": message_of(text, stub)} if chat else {"text": text}),
        }
        for k, text in enumerate(texts)
    ]
    tokens = {"prompt_tokens": len(asked.text.split()), "completion_tokens": sum(len(text.split()) for text in texts)}
    return {"id": "stub", "model": asked.body["model"], "choices": made, "usage": tokens}


def message_of(text: str, stub: Stub) -> Json:
    """Return a message of a text; where the server divides, without its thought, and null where that has no end.

    vLLM 0.32 (`reasoning`) leaves the line breaks around the marks, llama.cpp (`reasoning_content`) removes them.
    """
    if not stub.thoughts_in:
        return {"role": "assistant", "content": text}
    thought, closed, answer = text.removeprefix("<think>").rpartition("</think>")
    parts = (thought, answer) if closed else (answer, None)
    if stub.thoughts_in == "reasoning_content":
        parts = tuple(part and part.strip() for part in parts)
    return {"role": "assistant", "content": parts[1], stub.thoughts_in: parts[0]}


def chat_logprobs(steps: list[dict[str, float]]) -> Json:
    """Return log-probabilities as the chat route has them."""
    shaped = []
    for step in steps:
        top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in step.items()]
        shaped.append({**top[0], "top_logprobs": top})
    return {"content": shaped}


def text_logprobs(steps: list[dict[str, float]]) -> Json:
    """Return log-probabilities as the completions route has them."""
    logs = [{token: math.log(p) for token, p in step.items()} for step in steps]
    return {
        "tokens": [next(iter(step)) for step in steps],
        "token_logprobs": [next(iter(step.values())) for step in logs],
        "top_logprobs": logs,
        "text_offset": [0] * len(steps),
    }


def number_of(asked: Asked) -> int:
    """Return the number in the text of a request, -1 where it has none."""
    found = re.search(r"\d+", asked.text)
    return int(found[0]) if found else -1
