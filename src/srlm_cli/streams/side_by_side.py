"""Several inputs that are read side by side, with the errors and counts of one reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from srlm_cli.errors import DataError
from srlm_cli.records import Record
from srlm_cli.streams.reader import Reader, Rejects


class SideBySide:
    """Readers of several inputs, not traced and without shards, for a command that takes rows from each of them.

    When one of them meets a bad row all of them end, so that rows before it can still be finished.
    """

    shard = None
    digest = b""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = readers
        self.paths = [path for reader in readers for path in reader.paths]
        self.refused: dict[str, str] = {}
        self._last, self._finished, self._ended = readers[0], 0, False

    def rows(self, number: int) -> Iterator[tuple[int, Record]]:
        """Yield (line number, row) of one of the inputs."""
        reader = self.readers[number]
        while not self._ended and (row := reader.take()) is not None:
            self._last = reader
            yield reader.origin[0][1], row
        self._ended = self._ended or reader.error is not None

    def finish(self, count: int) -> None:
        """Mark `count` rows of all inputs as finished by the stage."""
        self._finished += count

    def take(self) -> Record | None:
        """Return a row that is left, or None at the end of all inputs."""
        return next((row for reader in self.readers if (row := reader.take()) is not None), None)

    @property
    def at(self) -> str:
        """Where the last row was read: file:line."""
        return self._last.at

    @property
    def error(self) -> DataError | None:
        """The error of a bad row that ended the inputs."""
        for reader in self.readers:
            if reader.error:
                return reader.error
        return None

    @error.setter
    def error(self, error: DataError | None) -> None:
        for reader in self.readers:
            reader.error = error

    @property
    def unfinished(self) -> int:
        """The number of rows that were returned and not yet reported with `finish`."""
        return sum(reader.unfinished for reader in self.readers) - self._finished

    @property
    def skipped(self) -> int:
        """The number of bad rows that were skipped."""
        return sum(reader.skipped for reader in self.readers)

    @property
    def noted(self) -> Counter[str]:
        """The number of rows that were changed or read in part, by the kind of change."""
        return sum((reader.noted for reader in self.readers), Counter())

    @property
    def rejects(self) -> Rejects | None:
        """The file of skipped rows, which all inputs share."""
        return self.readers[0].rejects
