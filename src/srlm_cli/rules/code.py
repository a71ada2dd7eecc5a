"""The rule `passes`: the Python code of a reply is run with tests, in a process of its own with limits.

`read_rule` refuses it unless `--run-code` allows it. The limits stop a program that does not end, or that fills memory
or disk by mistake. They do not protect from one that means harm: it can read files, and use the network.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

SECONDS = 10  # of the processor
CLOCK = 20  # seconds
MEMORY = 2 << 30
FILE = 16 << 20
BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)

# Runs the file, then writes a word to a pipe: a program that ends before its tests does not get there. The file is not
# `__main__`, so that what a reply has for its own start does not run.
PROGRAM = f"""
import os, resource, sys
path, seconds, pipe, word = sys.argv[1:]
del sys.argv[1:]
for kind, most in (("CPU", int(seconds)), ("AS", {MEMORY}), ("FSIZE", {FILE}), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (most, most))
exec(compile(open(path, encoding="utf-8").read(), "reply.py", "exec"), {{"__name__": "reply"}})
os.write(int(pipe), word.encode())
"""


def passes(tests: str | None) -> Callable[[str], bool]:
    """Return the check that the code of a reply, and then the tests, run to their end."""
    return lambda text: runs(f"{code_of(text)}\n\n{tests or ''}\n")


def code_of(text: str) -> str:
    """Return the code blocks of a reply that are marked as Python, else those without a mark, else all of it."""
    blocks = BLOCK.findall(text)
    for marks in (("python", "py", "python3"), ("",)):
        if found := [code for mark, code in blocks if mark.lower() in marks]:
            return "\n".join(found)
    return text


def runs(code: str) -> bool:
    """Return whether a Python program runs to its end, within the limits, in an empty folder and without input."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reply.py"
        path.write_text(code, encoding="utf-8", errors="replace")
        reading, writing = os.pipe()
        with open(reading, "rb") as pipe:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", PROGRAM, path, str(SECONDS), str(writing), word],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder},
                pass_fds=[writing],
                start_new_session=True,
            )
            os.close(writing)
            try:
                ended = process.wait(CLOCK) == 0
            except subprocess.TimeoutExpired:
                ended = False
            finally:
                with suppress(ProcessLookupError):  # also what it has started
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return ended and pipe.read(len(word)) == word.encode()
