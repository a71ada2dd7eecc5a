"""The error types and the exit codes: every way a command can end is named here."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of the program."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    DATA = 3
    LIMIT = 4
    INTERRUPTED = 130
    CLOSED_PIPE = 141


class SrlmError(Exception):
    """A failure with a message for people: one plain line, and a hint on what to do.

    One that is `shared` all processes of a training meet; its main process says it.
    """

    code = ExitCode.FAILURE
    shared = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class OptionError(SrlmError):
    """Options, settings or a stale FILE.part that do not fit: exit 2."""

    code = ExitCode.USAGE
    shared = True


class DataError(SrlmError):
    """A row that cannot be used, named by file:line: exit 3."""

    code = ExitCode.DATA
    shared = True


class LimitExceeded(SrlmError):
    """Everything is written, but a limit that the user set is passed: exit 4."""

    code = ExitCode.LIMIT


class EngineError(SrlmError):
    """A model that cannot be loaded, or an engine that failed: exit 1."""


class ClosedPipe(Exception):
    """The reader of our stdout has gone (`| head`): exit 141, in silence."""


class BadRow(ValueError):
    """An error in one row; the reader adds file:line and raises it as DataError."""
