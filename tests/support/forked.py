"""Commands as processes that a server forks (`command_server.py`), with what the tests use of `subprocess.Popen`."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from threading import Thread
from typing import BinaryIO

from command_server import LENGTH, NUMBER

File = int | BinaryIO
SERVER = Path(__file__).with_name("command_server.py")
SESSION, OWNER = "TESTS_SESSION", "TESTS_OWNER"
ECHO = ["--engine", "echo"]
STAGES = [
    ["sample", *ECHO], ["judge", *ECHO], ["make-eft", *ECHO], ["gen-prompts", *ECHO, "--count", "1"], ["make-pairs"],
    ["eval", "reward"], ["eval", "health"], ["eval", "length-control"],
    ["eval", "head-to-head", *ECHO, "--against", "/dev/null"],
]  # fmt: skip
LIGHT = {
    "modules": ["jinja2", "jsonlines", "matplotlib.backends.backend_svg", "openai", "rich.progress", "scipy.special"],
    "commands": [*([*words, "--in", "/dev/null"] for words in STAGES), ["report", "."]],
}
HEAVY = {
    "modules": ["datasets", "peft", "transformers.models.llama.modeling_llama", "trl", "srlm_cli.*"],
    "commands": [
        [kind, "--in", "/dev/null", "--model", "nowhere", "--out", "nowhere"] for kind in ("sft", "dpo", "kto")
    ],
}
# Two of a kind have unlike hashes of strings, so that an order of a set that shows in a result is found.
SERVERS = {"light-1": LIGHT, "light-2": LIGHT, "heavy": HEAVY}


def session() -> Path:
    """Return a folder that all workers of this run of the tests share; `conftest.py` sets it."""
    return Path(os.environ[SESSION])


LIGHT_ONES = cycle(("light-1", "light-2") if os.getpid() % 2 else ("light-2", "light-1"))


@cache
def address(name: str) -> str:
    """Return the socket of a server, which is started if no worker has done so yet."""
    path = session() / name
    with open(session() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            start_server(name, path)
    return str(path)


def start_server(name: str, path: Path) -> None:
    """Start a server and wait until it listens."""
    seed = str(list(SERVERS).index(name) + 1)
    with open(session() / f"{name}.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, str(SERVER), str(path), os.environ[OWNER], json.dumps(SERVERS[name])],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env={**os.environ, "PYTHONHASHSEED": seed},
            start_new_session=True,
        )  # fmt: skip
    if server.stdout.readline() != b"ready\n":
        raise RuntimeError((session() / f"{name}.log").read_text())


def server_for(command: Sequence[str], folder: Path) -> str:
    """Return the server that has imported most of what a command needs: of two alike one in turn."""
    return "heavy" if loads_a_model(command, folder) else next(LIGHT_ONES)


def loads_a_model(command: Sequence[str], folder: Path) -> bool:
    """Tell whether a command names a model that is there, or is a script that opens or trains one."""
    if command[1] != "-m":
        return command[1] != "-c" and Path(command[1]).name != "mortal_srlm.py"
    if "--model" not in command or {"--engine", "--base-url"} & {*command}:
        return False
    name = command[command.index("--model") + 1]
    return "/" not in name or (folder / name).exists()


class Forked:
    """A command that a server forked."""

    def __init__(
        self, server: str, argv: list[str], folder: Path, env: dict[str, str], *,
        stdin: File, stdout: File = subprocess.PIPE, stderr: File = subprocess.PIPE,
        file_size: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.args, self.returncode = argv, None
        theirs, self.stdin = pipe(stdin, write=True)
        mine = [theirs]
        theirs, self.stdout = pipe(stdout)
        mine.append(theirs)
        theirs, self.stderr = pipe(stderr)
        mine.append(theirs)
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(address(server))
        asked = {"argv": argv, "cwd": str(folder), "env": env, "file_size": file_size}
        body = json.dumps(asked).encode()
        socket.send_fds(self.connection, [LENGTH.pack(len(body))], mine)
        self.connection.sendall(body)
        for file, given in zip(mine, (stdin, stdout, stderr), strict=True):
            if given == subprocess.PIPE:
                os.close(file)
        self.pid = self._number()

    def _number(self) -> int:
        data = self.connection.recv(NUMBER.size)
        if not data:
            raise RuntimeError(f"the server of commands has ended: {self.args}")
        return NUMBER.unpack(data)[0]

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, or the signal that ended the command as a negative number."""
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = os.waitstatus_to_exitcode(self._number())
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self.connection.close()
        return self.returncode

    def communicate(self, data: bytes | None = None, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Write to the command, read all that it writes, and wait for its end."""
        got: dict[BinaryIO, bytes] = {}
        threads = [Thread(target=lambda file=file: got.update({file: file.read()})) for file in self._outputs()]
        threads += [Thread(target=write_all, args=(self.stdin, data or b""))] if self.stdin else []
        for thread in threads:
            thread.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        for thread in threads:
            thread.join(timeout)
        for file in self._outputs():
            file.close()
        return got.get(self.stdout, b""), got.get(self.stderr, b"")

    def _outputs(self) -> list[BinaryIO]:
        return [file for file in (self.stdout, self.stderr) if file]

    def send_signal(self, sign: int) -> None:
        """Send a signal to a command that has not been waited for."""
        if self.returncode is None:
            os.kill(self.pid, sign)

    def kill(self) -> None:
        """Kill the command."""
        self.send_signal(signal.SIGKILL)


def pipe(wanted: File, *, write: bool = False) -> tuple[int, BinaryIO | None]:
    """Return the command's file and, where a pipe is wanted, our end of it."""
    if wanted != subprocess.PIPE:
        return wanted if isinstance(wanted, int) else wanted.fileno(), None
    read_end, write_end = os.pipe()
    return (read_end, open(write_end, "wb", 0)) if write else (write_end, open(read_end, "rb", 0))


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write to a command that may end before it has read everything, and close."""
    try:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
    except BrokenPipeError:
        pass
    finally:
        file.close()


def make_session() -> Path:
    """Make the folder of a run of the tests; its name is short, as that of a socket has to be."""
    folder = Path(tempfile.mkdtemp(prefix="srlm-tests-"))
    os.environ |= {SESSION: str(folder), OWNER: str(os.getpid())}
    return folder
