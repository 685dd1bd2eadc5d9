"""What a tracker is, several as one, and the plainest: a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from distprune.tracking.logs import logger

Row = Mapping[str, float]
"""Figures of one step by metric name; always holds trainer/step."""


class Tracker(Protocol):
    """Takes the figures of a run. Lives on global rank 0."""

    def log(self, row: Row) -> None:
        """Take the figures of one step."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Take a table of the end of a run."""
        ...

    def preempt(self) -> None:
        """The run was stopped and will go on; `finish` follows."""
        ...

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Close; `summary` is that of a run that is done, None of one that is not."""
        ...


class Trackers:
    """Several trackers as one; none on ranks above 0, so that no caller asks which rank it is on."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = list(trackers)

    def add(self, tracker: Tracker) -> None:
        """Let `tracker` take figures from now on."""
        self._trackers.append(tracker)

    def log(self, row: Row) -> None:
        """Hand `row` to every tracker."""
        for tracker in self._trackers:
            tracker.log(row)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Hand a table to every tracker."""
        for tracker in self._trackers:
            tracker.table(name, columns, rows)

    def preempt(self) -> None:
        """Tell every tracker that the run will go on."""
        for tracker in self._trackers:
            tracker.preempt()

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Close every tracker.

        Raises:
            OSError: of the first that could not write what it held back; all are closed then.
        """
        trackers, self._trackers = self._trackers, []
        failures: list[OSError] = []
        for tracker in trackers:
            try:
                tracker.finish(summary)
            except OSError as error:
                failures.append(error)
        if failures:
            raise failures[0]


class JsonLines:
    """One JSON object per logged step, in the file at once; where the disk is full, as soon as it can be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._pending = b""
        self._warned = False

    def log(self, row: Row) -> None:
        """Append one line."""
        self._pending += json.dumps(dict(row)).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                logger.warning(f"{self._path}: {error.strerror}; figures wait until it can be written")
            self._warned = True

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Nothing to add to the figures of steps."""

    def preempt(self) -> None:
        """Nothing to say."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Close the file.

        Raises:
            OSError: figures that waited still cannot be written, at the end of a run that is done.
        """
        try:
            self._write()
        except OSError as error:
            if summary is not None:
                raise
            logger.warning(f"{self._path}: {error.strerror}; the last figures are lost")
        finally:
            self._file.close()

    def _write(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]
