"""Shared by the tests: the program as a subprocess, a list-backed engine, small files of rows."""

from __future__ import annotations

import gzip
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from forked import File, Forked, server_for
from srlm_cli.engines.base import Completion, Request
from srlm_cli.engines.chat_template import answered
from srlm_cli.thoughts import MARKS

Record = dict[str, Any]
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHARED = ROOT.parent / "shared" / "data"
PROGRAM = [sys.executable, "-m", "srlm_cli"]
FORKS = hasattr(os, "pidfd_open")  # as `command_server.py` needs it
FORKED = [sys.executable, str(HERE / "forked_srlm.py")] if FORKS else PROGRAM  # for make and shells
MORTAL = [sys.executable, str(HERE / "mortal_srlm.py")]
READ_EARLY = ("PYTHON", "NUMBA_", "TORCH_")  # variables that are read at the start of Python or at imports
LOUD = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "COLUMNS", "TTY_COMPATIBLE")
KEPT = ("SRLM_HOME", "SRLM_CPU")


def slow(*values: Any) -> Any:
    """Return parameters that only `make test-slow` tries."""
    return pytest.param(*values, marks=pytest.mark.slow)


@dataclass
class Result:
    """How a finished process ended."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[Record]:
        """The rows on stdout; anything else there fails."""
        return [json.loads(line) for line in self.out.split("\n") if line]


def clean_env(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Return the environment without this project's variables and without those of colour."""
    kept = {k: v for k, v in os.environ.items() if k not in LOUD and (not k.startswith("SRLM_") or k in KEPT)}
    no_cache = dict.fromkeys(("SRLM_DPO_REF_CACHE", "SRLM_KTO_REF_CACHE"), "false")  # that of the user
    return {**kept, "PYTHONIOENCODING": "utf-8", **no_cache, **(extra or {})}


def as_bytes(text: str | bytes) -> bytes:
    """Return a text as UTF-8, bytes as they are."""
    return text if isinstance(text, bytes) else text.encode()


def as_lines(rows: Iterable[Record | str]) -> str:
    """Return rows as JSONL; a string stands for itself, as a (bad) line."""
    return "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


def write_rows(path: Path, rows: Iterable[Record | str]) -> Path:
    """Write JSONL, gzipped where the name says so."""
    data = as_lines(rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read_rows(path: Path) -> list[Record]:
    """Return the rows of a JSONL file, gzipped or not."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n") if line]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass
class Srlm:
    """Run the program in a folder of its own, where no srlm.toml is found.

    The processes are forked by a server that has imported what they need, unless their environment holds what is
    read before that, or a test asks for an interpreter of their own.
    """

    folder: Path

    def __call__(self, *args: str, stdin: str | bytes | int = "", **more: Any) -> Result:
        """Run `srlm ARGS` to its end and return how it ended."""
        return self.run([*PROGRAM, *args], stdin, **more)

    def code(self, code: str, *args: str, stdin: str | bytes = "") -> Result:
        """Run `python -c CODE ARGS` to its end; what the program needs may be imported already."""
        return self.run([sys.executable, "-c", code, *args], stdin, forks=True)

    def mortal(self, after: int, sign: int, *args: str) -> Result:
        """Run `srlm ARGS` with an echo engine that sends itself a signal after so many completions."""
        return self.run([*MORTAL, str(after), str(int(sign)), *args])

    def run(
        self,
        command: Sequence[str | bytes | Path],
        stdin: str | bytes | int = "",
        env: dict[str, str] | None = None,
        *,
        forks: bool | None = None,
        file_size: Sequence[int] | None = None,
        stdout: File = PIPE,
        stderr: File = PIPE,
    ) -> Result:
        """Run a command to its end; `stdin` is a text or a file descriptor, `file_size` the limits of RLIMIT_FSIZE."""
        files = {"stdin": stdin if isinstance(stdin, int) else PIPE, "stdout": stdout, "stderr": stderr}
        process = self._process([os.fsdecode(word) for word in command], env, files, forks, file_size)
        out, err = process.communicate(None if isinstance(stdin, int) else as_bytes(stdin), timeout=600)
        return Result(process.returncode, (out or b"").decode(), (err or b"").decode())

    def start(self, *args: str, command: list[str] = PROGRAM, forks: bool | None = None) -> subprocess.Popen | Forked:
        """Start `srlm ARGS` with pipes and return at once."""
        return self._process([*command, *args], None, dict.fromkeys(("stdin", "stdout", "stderr"), PIPE), forks)

    def _process(
        self,
        command: list[str],
        env: dict[str, str] | None,
        files: dict[str, File],
        forks: bool | None = None,
        file_size: Sequence[int] | None = None,
    ) -> subprocess.Popen | Forked:
        """Start a process, forked where that shows no difference, unless `forks` says more."""
        if forks is None:
            ours = command[:3] == PROGRAM or command[1].startswith((str(HERE), str(self.folder)))
            forks = ours and not any(name.startswith(READ_EARLY) for name in env or {})
        if FORKS and forks:
            server = server_for(command, self.folder)
            return Forked(server, command[1:], self.folder, clean_env(env), **files, file_size=file_size)
        limit = file_size and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, tuple(file_size)))
        return subprocess.Popen(command, cwd=self.folder, env=clean_env(env), bufsize=0, preexec_fn=limit, **files)


class ListEngine:
    """An engine that answers from a list: one list of texts a request, in order.

    A text is divided into thought and answer as by every engine. Where a request has choices, the answer is a list of
    their probabilities, which may sum to less than 1, or of texts as always.
    """

    name = "list"

    def __init__(self, answers: Iterable[list[str]], *, model: str = "fake", reasons: str = "stop") -> None:
        self.answers = iter(answers)
        self.model = model
        self.reasons = reasons
        self.asked: list[Request] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield the next answer for each request, and remember what was asked."""
        for request in requests:
            self.asked.append(request)
            texts = next(self.answers)
            if request.choices and isinstance(texts[0], float):
                best = request.choices[texts.index(max(texts))]
                mass = sum(texts)
                likely = [probability / mass for probability in texts]
                yield Completion([best] * len(request.seeds), ["stop"] * len(request.seeds), 10, 1, likely, mass)
                continue
            ended = [answered(answer, self.reasons, thought) for answer, thought in map(MARKS.divide, texts)]
            answers, reasons, thoughts = zip(*ended, strict=True)
            found = thoughts if any(thoughts) else ()
            yield Completion(list(answers), list(reasons), tokens_in=10, tokens_out=len(texts), thoughts=found)


def asked_text(request: Request) -> str:
    """Return all that a request shows the model."""
    return "\n".join(message["content"] for message in request.messages) + request.prefix
