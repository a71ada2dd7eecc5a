"""One run of a command that turns rows into rows: open, resume, write, count, finish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from srlm_cli import __version__
from srlm_cli.engines import LazyEngine
from srlm_cli.engines.base import SERVER_CLOSES
from srlm_cli.engines.chat_template import now
from srlm_cli.errors import BadRow, DataError, ExitCode, LimitExceeded, OptionError, SrlmError
from srlm_cli.options.common import SamplingOptions, StreamOptions
from srlm_cli.records import Record
from srlm_cli.runner.inputs import check_whole, count_skipped, expected, refuse_missing, warn
from srlm_cli.runner.outputs import close_quietly, commit, how_to_go_on, open_writer, refuse_own_input, write_error
from srlm_cli.runner.provenance import meta
from srlm_cli.runner.tally import Tally
from srlm_cli.stages import Outcome
from srlm_cli.streams.console import progress, say
from srlm_cli.streams.reader import Reader
from srlm_cli.streams.side_by_side import SideBySide
from srlm_cli.streams.writer import FileWriter, StreamWriter


class Interrupted(SrlmError):
    """Ctrl-C: finished rows are kept."""

    code = ExitCode.INTERRUPTED
    shared = True


@dataclass
class Resumed:
    """Where an unfinished run stopped: how many inputs are done, and the rows that it wrote."""

    read: int = 0
    rows: Callable[[], Iterator[Record]] = lambda: iter(())


class StageRun:
    """One run of a stage by a command: it owns the reader, the writer and the tally.

    `identity` has everything that decides the rows: a FILE.part of another identity is not resumed. A stage without
    input (`reader` None) counts its own tries, up to `total`; `source` is the reader of its seed data. A fast stage
    whose state is not in its last rows always runs `from_the_start`.
    """

    def __init__(
        self,
        name: str,
        options: StreamOptions,
        reader: Reader | SideBySide | None,
        identity: dict[str, Any],
        *,
        engine: LazyEngine | None = None,
        source: Reader | None = None,
        total: int | None = None,
        from_the_start: bool = False,
    ) -> None:
        self.name, self.options, self.reader, self.engine = name, options, reader, engine
        self.source, self.total, self.from_the_start = reader or source, total, from_the_start
        paths = self.source.paths if self.source else []
        refuse_missing(paths)
        refuse_own_input(options.out, paths)
        self.writer: FileWriter | StreamWriter = open_writer(
            options.out, {"command": name, "srlm": __version__, **identity}
        )
        self.tally = Tally()
        self.about: Callable[[], dict[str, Any]] = dict  # more for FILE.meta.json, known at the end
        self.summary = Tally.summary

    def run(
        self,
        make: Callable[[Reader, Resumed], Iterable[Outcome]],
        limit: Callable[[Tally], LimitExceeded | None] = lambda tally: None,
    ) -> Tally:
        """Run a stage over the input and write its rows; return the counts.

        A bad row raises DataError after all earlier rows are finished and saved. The error of `limit` is raised after
        everything is written.
        """
        resumed = self._resume()
        if self.reader is not None and not self.from_the_start:
            self.total = expected(self.reader, self.options.limit)
        try:
            self._write(make(self.reader, resumed))
        except KeyboardInterrupt:
            self.writer.close()
            raise Interrupted("interrupted", how_to_go_on(self.writer)) from None
        except BadRow as error:
            self.writer.close()
            raise DataError(f"{self.reader.at}: {error}") from None
        except OSError as error:
            close_quietly(self.writer)
            raise write_error(error, self.writer) from error
        except BaseException:
            close_quietly(self.writer)
            raise
        count_skipped(self.name, self.tally, self.source)
        warn(self.name, self.engine.noted if self.engine else {})
        exceeded = limit(self.tally)
        about = meta(self.name, self.source, self.tally, self.engine) | self.about()
        commit(self.writer, self.options.out, about, self._state(), exceeded, self.options.on_limit)
        if not self.options.quiet:
            say(f"srlm {self.name}: {self.summary(self.tally)}")
        if exceeded:
            raise exceeded
        return self.tally

    def _write(self, outcomes: Iterable[Outcome]) -> None:
        """Write and count the outcomes, each with a checkpoint; a bad row that ended the input raises its error."""
        reader, writer, tally = self.reader, self.writer, self.tally
        before, started = tally.seconds, time.monotonic()
        with progress(self.name, self.total, done=tally.read, quiet=self.options.quiet) as bar:
            for outcome in outcomes:
                if outcome.at_end and reader is not None and reader.error:
                    break
                if outcome.bad:
                    reader.refuse(outcome.bad)
                    if reader.error:
                        break
                writer.write(outcome.rows)
                tally.add(outcome)
                tally.seconds = before + time.monotonic() - started
                if reader is not None:
                    reader.finish(outcome.read)
                if not self.from_the_start:
                    writer.mark(self._state())
                bar.advance(outcome.read if reader is not None else len(outcome.rows), tally.speed())
        tally.seconds = before + time.monotonic() - started
        check_whole(reader)

    def _resume(self) -> Resumed:
        """Open the output, after what an unfinished run left there if it is this run's own."""
        writer, reader = self.writer, self.reader
        if isinstance(writer, StreamWriter):
            self._settle_date({})
            return Resumed()
        self._settle_date(writer.begun_with())
        saved = self._left_over(writer)
        digest = reader.skip(saved["read"], saved.get("refused")) if saved and reader is not None else None
        if digest is not None and reader.error:
            raise reader.error
        if digest is not None and digest != saved["digest"]:
            if self.options.on_stale != "restart" or "-" in reader.paths:
                raise OptionError(f"{writer.part} is from a run over other input", "--restart deletes it")
            reader.rewind()
            saved = None
        if not saved:
            self._settle_date({})
        writer.start(saved)
        if not saved:
            return Resumed()
        self.tally = Tally.of({key: saved[key] for key in Tally().as_dict()})
        if not self.options.quiet:
            read, kept = self.tally.read, self.tally.kept
            say(f"srlm {self.name}: resuming after {read} completed inputs ({kept} rows in {writer.part})")
        return Resumed(self.tally.read, writer.previous)

    def _settle_date(self, begun: dict[str, Any]) -> None:
        """Let chat templates write one date in all of a run, also of a resumed one, unless it is given."""
        if self.engine is None or self.engine.spec.today:
            return
        self.engine.today = begun.get("today") or now()
        fingerprint = getattr(self.writer, "fingerprint", {})
        if "today" in fingerprint:
            fingerprint["today"] = self.engine.today

    def _left_over(self, writer: FileWriter) -> dict[str, Any] | None:
        """Return the checkpoint to continue from, or None; raise OptionError if it was another run's."""
        if self.options.restart:
            return None
        try:
            saved = writer.left_over()
        except OptionError:
            if self.options.on_stale != "restart":
                raise
            return None
        return saved if saved and saved.get("read") and not self.from_the_start else None

    def _state(self) -> dict[str, Any]:
        """Return the content of a checkpoint: the counts, and the digest of the input so far."""
        reader = self.reader
        refused = {"refused": reader.refused} if reader is not None and reader.refused else {}
        return {**self.tally.as_dict(), "digest": reader.digest.hex() if reader is not None else "", **refused}


def warn_of_thoughts(name: str, tally: Tally, sampling: SamplingOptions, engine: LazyEngine) -> None:
    """Say on stderr how many texts were cut off in their thought, and which option to raise."""
    if count := tally.counts["unfinished thought"]:
        closes = (
            f"the server close them ({SERVER_CLOSES})"
            if engine.name == "openai"
            else "--max-thinking-tokens close them"
        )
        say(
            f"srlm {name}: {count} thoughts were not finished within --max-new-tokens {sampling.max_new_tokens}: they "
            f"have no answer. Raise it, or let {closes}"
        )


def write_metrics(
    name: str,
    out: str,
    made: list[Record],
    reader: Reader,
    read: int,
    *,
    quiet: bool,
    limit: LimitExceeded | None = None,
    on_limit: str = "write",
) -> None:
    """Write the result of a command that reads all its input first, `read` rows of it.

    A `limit` that was exceeded is raised when everything is written; `on_limit` hold keeps FILE.part back.
    """
    tally = Tally(read=read, kept=len(made))
    count_skipped(name, tally, reader)
    about = meta(name, reader, tally, None)
    write_whole(name, out, made, tally, about, quiet=quiet, limit=limit, on_limit=on_limit)


def write_whole(
    name: str,
    out: str,
    made: list[Record | bytes],
    tally: Tally,
    about: dict[str, Any],
    *,
    quiet: bool,
    limit: LimitExceeded | None = None,
    on_limit: str = "write",
) -> None:
    """Write an output that is made as a whole at the end, with what FILE.meta.json says `about` it."""
    writer = open_writer(out, {"command": name})
    try:
        if isinstance(writer, FileWriter):
            writer.start(None)
        writer.write(made)
    except OSError as error:
        raise write_error(error, writer) from error
    commit(writer, out, about, tally.as_dict(), limit, on_limit)
    if not quiet:
        say(f"srlm {name}: {tally.summary()}")
    if limit:
        raise limit
