"""Passages from a program of the user's own, which reads queries and writes passages as JSONL."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from srlm_cli.errors import OptionError, SrlmError
from srlm_cli.evidence.search import Passage
from srlm_cli.records import encodable, is_number
from srlm_cli.redact import redacted

TIMEOUT = 600.0  # seconds that a program has for one answer
PATIENCE = 10.0  # seconds that it has to end after its last query


class Program:
    """A search program, started at the first query and kept until `close`.

    A query is one line, `{"id": 0, "query": "...", "count": 3}`. Its answer is one line with the same `id`:
    `{"id": 0, "passages": [{"text": "..."}]}`; a passage can have `id`, `source` and `title`, too. Raises OptionError
    if there is no such program, SrlmError if it ends, is silent for `TIMEOUT` seconds or writes anything else.
    """

    def __init__(self, command: str) -> None:
        try:
            self.words = shlex.split(command)
        except ValueError as error:
            raise OptionError(f"--evidence-cmd {redacted(command)}: {error}") from None
        if not self.words or not shutil.which(self.words[0]):
            raise OptionError(f"--evidence-cmd: no program {self.words[0] if self.words else ''!r}")
        self.name = redacted(command)
        self.process: subprocess.Popen[bytes] | None = None
        self.queries: SimpleQueue[bytes | None] = SimpleQueue()
        self.answers: SimpleQueue[bytes | None] = SimpleQueue()
        self.asked = 0

    def search(self, query: str, count: int) -> list[Passage]:
        """Return at most `count` passages that the program answers, best first."""
        if self.process is None:
            self._start()
        line = json.dumps({"id": self.asked, "query": encodable(query), "count": count}, ensure_ascii=False)
        self.queries.put(f"{line}\n".encode())
        try:
            answer = self.answers.get(timeout=TIMEOUT)
        except Empty:
            hint = "it has to write one line for each line that it reads, and to flush it"
            raise self._failed(f"no answer to query {self.asked} in {TIMEOUT:g} seconds", hint) from None
        if answer is None:
            self.answers.put(None)  # no more lines, which `close` asks for, too
            raise self._failed(f"{self._end()} before it answered query {self.asked}", "its own messages are above")
        try:
            found = self._passages(answer)
        except (ValueError, RecursionError) as error:
            text = encodable(answer.decode(errors="replace").strip())
            hint = f"got {text[:200]}{'...' if text[200:] else ''}"
            raise self._failed(f"the answer to query {self.asked}: {error}", hint) from None
        self.asked += 1
        return found[:count]

    def close(self) -> str:
        """End the program; return how it ended if that was not well, else "".

        Raises SrlmError if it wrote lines after its last answer.
        """
        if self.process is None:
            return ""
        self.queries.put(None)
        end = self._end()
        if self._wrote_more():
            hint = "one line for each line that it reads; other messages belong on its stderr"
            raise self._failed(f"more answers than queries, which were {self.asked}", hint)
        return "" if end == "it ended with exit code 0" else f"--evidence-cmd {self.name}: {end}"

    def _start(self) -> None:
        try:
            process = subprocess.Popen(self.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise OptionError(f"--evidence-cmd {self.name}: {error.strerror or error}") from None

        def write() -> None:
            try:
                while (line := self.queries.get()) is not None:
                    process.stdin.write(line)
                    process.stdin.flush()
                process.stdin.close()
            except OSError:  # it has ended, which its output shows
                pass

        def read() -> None:
            for line in process.stdout:
                self.answers.put(line)
            self.answers.put(None)

        for work in (write, read):  # threads, so that no full pipe stops both sides
            Thread(target=work, daemon=True).start()
        self.process = process

    def _end(self) -> str:
        """Return how the program ended; one that runs on is killed."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"it did not end within {PATIENCE:g} seconds of its last line"
        return f"it was killed by signal {-code}" if code < 0 else f"it ended with exit code {code}"

    def _wrote_more(self) -> bool:
        """Return whether a program that has ended wrote lines that were not read as answers."""
        with suppress(Empty):  # its own child processes may keep its output open
            while (line := self.answers.get(timeout=PATIENCE)) is not None:
                if line.strip():
                    return True
        return False

    def _failed(self, what: str, hint: str) -> SrlmError:
        return SrlmError(f"--evidence-cmd {self.name}: {what}", hint)

    def _passages(self, line: bytes) -> list[Passage]:
        """Return the passages of an answer; raise ValueError if it is another kind of line."""
        try:
            answer = json.loads(line.decode())
        except ValueError:
            raise ValueError("expected a line of JSON; other messages belong on its stderr") from None
        if not isinstance(answer, dict) or not isinstance(answer.get("passages"), list):
            raise ValueError('expected {"id": ..., "passages": [{"text": ...}]}')
        if answer.get("id") != self.asked or isinstance(answer["id"], bool):
            raise ValueError(f"expected the id {self.asked}")
        return [passage_of(found) for found in answer["passages"]]


def passage_of(found: Any) -> Passage:
    """Return a passage of an answer; raise ValueError if it has no text, or a field of another type."""
    if not isinstance(found, dict) or not isinstance(found.get("text"), str) or not found["text"].strip():
        raise ValueError("expected each passage to have a `text`")
    for key in ("source", "title"):
        if not isinstance(found.get(key), str | None):
            raise ValueError(f"expected `{key}` of a passage to be a text")
    name = found.get("id")
    if not (name is None or isinstance(name, str) or (is_number(name) and isinstance(name, int))):
        raise ValueError("expected `id` of a passage to be a text or a whole number")
    texts = {key: encodable(found.get(key) or "") for key in ("source", "title", "text")}
    texts["source"] = texts["source"] or None
    return Passage(encodable(name) if isinstance(name, str) else name, **texts, score=0.0)
