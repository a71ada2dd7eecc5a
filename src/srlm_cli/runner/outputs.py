"""Where the rows of a command go: stdout, or a file that appears when it is complete."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

from srlm_cli import distributed
from srlm_cli.errors import LimitExceeded, OptionError, SrlmError
from srlm_cli.records import Record
from srlm_cli.streams.writer import FileWriter, StreamWriter

STDOUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
_data_fd: int | None = None


def data_stdout() -> int:
    """Return a private copy of stdout for rows; whatever a library prints goes to stderr from now on."""
    global _data_fd
    if _data_fd is None:
        sys.stdout.flush()
        _data_fd = os.dup(1)
        os.dup2(2, 1)
    return _data_fd


def open_writer(out: str | None, fingerprint: dict[str, Any]) -> FileWriter | StreamWriter:
    """Return the writer for `--out`: stdout, or a file that appears when it is complete; None keeps nothing."""
    out = "-" if out in STDOUT else out
    stdout = data_stdout()
    if out is None:
        return StreamWriter(os.open(os.devnull, os.O_WRONLY))
    if out == "-":
        return StreamWriter(os.dup(stdout))
    if os.path.isdir(out):
        raise OptionError(f"{out} is a folder", "--out takes a file")
    if os.path.exists(out) and not os.path.isfile(out):  # a device or a named pipe
        return StreamWriter(os.open(out, os.O_WRONLY), out)
    return FileWriter(Path(os.path.realpath(out)), fingerprint)  # the target of a link, not the link


def commit(
    writer: FileWriter | StreamWriter,
    out: str | None,
    meta: dict[str, Any],
    state: dict[str, Any],
    exceeded: LimitExceeded | None,
    on_limit: str,
) -> None:
    """Let the output appear; with `--on-limit hold`, over a limit, keep FILE.part, which the error then names."""
    try:
        if exceeded and on_limit == "hold" and isinstance(writer, FileWriter):
            writer.mark(state)
            writer.close()
            exceeded.hint += f"; held back in {out}.part"
        else:
            writer.commit(meta, state)
    except OSError as error:
        raise write_error(error, writer) from error


def same_file(one: str, other: str) -> bool:
    """Return whether two paths name one file, there or not yet; devices such as /dev/null are for all."""
    if os.path.exists(one) and os.path.exists(other):
        return os.path.isfile(one) and os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def refuse_own_input(out: str | None, inputs: list[str]) -> None:
    """Raise OptionError if a command would overwrite its input."""
    if out in (None, "-") or not Path(out).is_file():
        return
    for path in inputs:
        if path != "-" and same_file(out, path):
            raise OptionError(f"--out {out} is the input", "use another output file")


def refuse_clash(option: str, path: str | None, out: str, inputs: list[str]) -> None:
    """Raise OptionError if a second output file is `--out` itself, or an input."""
    same = lambda other: path == other or ("-" not in (path, other) and same_file(path, other))  # noqa: E731
    if path and same(out):
        both = "stdout" if path == "-" else path
        raise OptionError(f"{option} and --out are both {both}", "give each its own file")
    if path and any(path != "-" and same(one) for one in inputs):
        raise OptionError(f"{option} {path} is an input", "use another output file")


def print_result(row: Record) -> None:
    """Print the one JSON line of results of a command that makes a folder."""
    if not distributed.is_main():
        return
    writer = StreamWriter(os.dup(data_stdout()))
    writer.write([row])
    writer.close()


def how_to_go_on(writer: FileWriter | StreamWriter) -> str:
    """Return a hint that says where the rows so far are."""
    if isinstance(writer, StreamWriter):
        return "the rows so far are written; a run whose --out is a regular file can be resumed"
    return f"finished rows are in {writer.part}; run the same command again to resume"


def write_error(error: OSError, writer: FileWriter | StreamWriter) -> SrlmError:
    """Return a failed write as an error; for a full disk its hint says how to resume."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    where = error.filename or (writer.part if isinstance(writer, FileWriter) else writer.name)
    return SrlmError(f"{where}: {error.strerror or error}", how_to_go_on(writer) if full else "")


def close_quietly(writer: FileWriter | StreamWriter) -> None:
    """Save what can be saved when something else has failed already."""
    try:
        writer.close()
    except Exception:  # noqa: BLE001 - the first failure is the one to report
        pass
