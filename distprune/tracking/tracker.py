"""What a tracker is, several as one, and the plainest: a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from distprune.tracking.logs import logger

Row = Mapping[str, float]
"""Figures of one step by metric name; always holds trainer/step."""
BINS = 64


@dataclass(frozen=True)
class Histogram:
    """Weights of one layer by size.

    Attributes:
        limit: where the bins end, the same for all histograms of the layer.
        counts: of the weights that are not 0, in 64 equal bins over [-limit, limit]; what lies outside is counted in
            the outermost.
        zeros: weights that are 0.
    """

    limit: float
    counts: list[int]
    zeros: int


class Tracker(Protocol):
    """Takes the figures of a run. Lives on global rank 0."""

    def log(self, row: Row) -> None:
        """Take the figures of one step."""
        ...

    def log_histograms(self, step: int, layers: Mapping[str, Histogram]) -> None:
        """Take histograms of the weights of layers."""
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

    def log_histograms(self, step: int, layers: Mapping[str, Histogram]) -> None:
        """Hand histograms to every tracker."""
        for tracker in self._trackers:
            tracker.log_histograms(step, layers)

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
    """One JSON object per logged step, in the file at once; where the disk is full, as soon as it can be written.

    Args:
        metrics: the file of figures.
        histograms: that of histograms, made when there are some.
    """

    def __init__(self, metrics: Path, histograms: Path) -> None:
        self._metrics = _Lines(metrics)
        self._histograms = _Lines(histograms)
        self._metrics.open()

    def log(self, row: Row) -> None:
        """Append one line."""
        self._metrics.append(dict(row))

    def log_histograms(self, step: int, layers: Mapping[str, Histogram]) -> None:
        """Append one line."""
        self._histograms.append(histogram_line(step, layers))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Nothing to add to the figures of steps."""

    def preempt(self) -> None:
        """Nothing to say."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Close the files.

        Raises:
            OSError: what waited still cannot be written, at the end of a run that is done.
        """
        try:
            self._metrics.close(must=summary is not None)
        finally:
            self._histograms.close(must=summary is not None)


def histogram_line(step: int, layers: Mapping[str, Histogram]) -> dict[str, Any]:
    """The JSON object of one line of histograms.jsonl."""
    return {"trainer/step": step, "layers": {name: asdict(layer) for name, layer in layers.items()}}


def read_histograms(path: Path) -> list[tuple[int, dict[str, Histogram]]]:
    """(step, layers) of each line of histograms.jsonl, in order; none where there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    read = [json.loads(line) for line in lines]
    return [(line["trainer/step"], {n: Histogram(**layer) for n, layer in line["layers"].items()}) for line in read]


class _Lines:
    """A file of JSON lines, which are held back while it cannot be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        self._pending = b""
        self._warned = False

    def open(self) -> FileIO:
        """Make the file, or go on with it."""
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
        return self._file

    def append(self, content: Mapping[str, Any]) -> None:
        """Append one line."""
        self._pending += json.dumps(content).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                logger.warning(f"{self._path}: {error.strerror}; figures wait until it can be written")
            self._warned = True

    def close(self, must: bool) -> None:
        """Write what waits, or else raise an OSError where it `must` be written."""
        try:
            self._write()
        except OSError as error:
            if must:
                raise
            logger.warning(f"{self._path}: {error.strerror}; the last figures are lost")
        finally:
            if self._file is not None:
                self._file.close()

    def _write(self) -> None:
        while self._pending:
            self._pending = self._pending[self.open().write(self._pending) :]
