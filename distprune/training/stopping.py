"""One stop path: signals, a file named `stop` in the run folder, a time budget and a launcher that is gone all end a
run in the same way."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
NO_REASON, SIGNAL, STOP_FILE, OUT_OF_TIME, ORPHANED = range(5)
REASONS = {
    SIGNAL: "a signal",
    STOP_FILE: "a stop file",
    OUT_OF_TIME: "run.max_minutes",
    ORPHANED: "the end of its launcher",
}
# What a launcher leaves in the environment of the processes it starts.
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
# Read at once: it may be gone by the time that data and model are made.
PARENT = os.getppid()
SECONDS_BETWEEN, MOST_STEPS_BETWEEN = 0.5, 50


class Stopped(Exception):
    """The run was asked to stop; its message says so where the checkpoint could not be written."""


class Stopper:
    """Knows whether the run should stop, on all ranks alike.

    Args:
        stop_file: a file whose existence asks the run to stop.
        max_minutes: time budget from now on, or None.
        group: through which ranks agree; None for one rank.
    """

    def __init__(self, stop_file: Path, max_minutes: float | None, group: dist.ProcessGroup | None) -> None:
        self._stop_file = stop_file
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._group = group
        self._signalled = False
        self._launcher = PARENT if any(name in os.environ for name in LAUNCHED) else None
        self._interval, self._steps, self._asked = 1, 0, time.monotonic()

    def listen(self) -> None:
        """Take SIGTERM, SIGUSR1 and SIGINT as a wish to stop; a second SIGINT ends the process at once."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def after_step(self) -> str | None:
        """As `reason`, but asks only about twice a second; called after every step."""
        self._steps += 1
        return self.reason() if self._steps >= self._interval else None

    def reason(self) -> str | None:
        """Why to stop, the same answer on every rank; None to go on. One small all-reduce of CPU memory."""
        interval = self._interval
        if self._steps:  # else a batch of an evaluation, which says nothing of the pace of steps
            pace = (time.monotonic() - self._asked) / self._steps
            # In steps, since clocks differ between ranks; doubling at most, since a fast step may precede slow ones.
            interval = max(1, min(2 * self._interval, MOST_STEPS_BETWEEN, int(SECONDS_BETWEEN / max(pace, 1e-6))))
        answer = torch.tensor([self._wish(), -interval])
        if self._group is not None:
            dist.all_reduce(answer, dist.ReduceOp.MAX, group=self._group)
        self._interval, self._steps, self._asked = -int(answer[1]), 0, time.monotonic()
        return REASONS.get(int(answer[0]))

    def _wish(self) -> int:
        if self._signalled:
            return SIGNAL
        if self._stop_file.exists():
            return STOP_FILE
        if self._deadline is not None and time.monotonic() > self._deadline:
            return OUT_OF_TIME
        if self._launcher is not None and os.getppid() != self._launcher:
            return ORPHANED
        return NO_REASON

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self._signalled = True
