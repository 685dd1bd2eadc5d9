"""One stop path: signals, a file named `stop` in the run folder, and a time budget all end a run in the same way."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType
from typing import cast

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
NO_REASON, SIGNAL, STOP_FILE, OUT_OF_TIME = range(4)
REASONS = {SIGNAL: "a signal", STOP_FILE: "a stop file", OUT_OF_TIME: "run.max_minutes"}


class Stopped(Exception):
    """The run was asked to stop; its message says so where the checkpoint could not be written."""


class Stopper:
    """Knows whether the run should stop, on all ranks alike.

    Args:
        stop_file: a file whose existence asks the run to stop.
        max_minutes: time budget from now on, or None.
        every: steps between agreements.
    """

    def __init__(self, stop_file: Path, max_minutes: float | None, every: int) -> None:
        self._stop_file = stop_file
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._every = every
        self._signalled = False
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        # Over gloo, so that asking never waits for a GPU.
        self._group = None if alone else cast(dist.ProcessGroup, dist.new_group(backend="gloo"))

    def listen(self) -> None:
        """Take SIGTERM, SIGUSR1 and SIGINT as a wish to stop; a second SIGINT ends the process at once."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def reason(self, step: int) -> str | None:
        """Why to stop after `step`, the same answer on every rank; None to go on. Asks every few steps only."""
        if step % self._every:
            return None
        wish = torch.tensor(self._wish())
        if self._group is not None:
            dist.all_reduce(wish, dist.ReduceOp.MAX, group=self._group)
        return REASONS.get(int(wish))

    def _wish(self) -> int:
        if self._signalled:
            return SIGNAL
        if self._stop_file.exists():
            return STOP_FILE
        if self._deadline is not None and time.monotonic() > self._deadline:
            return OUT_OF_TIME
        return NO_REASON

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self._signalled = True
