"""Is every rank alive? A heartbeat file per rank, stacks in the log where nothing moves, and who it was that stopped.

heartbeats/rank-00000.json   rank, host, pid, step, time of the last beat, failure
"""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from distprune.tracking.logs import log_path, logger
from distprune.training.hosts import host

# What gloo and NCCL say of ranks that do not answer. Their errors have no class of their own.
LOST = (
    "gloo",
    "NCCL",
    "Application timeout caused pair closure",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket",
)
WARN_AT = 0.75
NAMED = 8


class Liveness:
    """Says in a file that this rank is alive, and watches that it gets on.

    Args:
        folder: where the heartbeat files lie.
        logs: folder of the logs, into which stacks are dumped.
        rank, world_size: of this process.
        start_timeout: seconds that ranks wait for each other before the first step.
        timeout: seconds that they wait from then on.
        after_first_step: called once, when the first step is done.
    """

    def __init__(
        self,
        folder: Path,
        logs: Path,
        rank: int,
        world_size: int,
        start_timeout: float,
        timeout: float,
        after_first_step: Callable[[float], None],
    ) -> None:
        self._folder = folder
        self._log = log_path(logs, rank)
        self._rank = rank
        self._world_size = world_size
        self._limit = start_timeout
        self._timeout = timeout
        self._after_first_step = after_first_step
        self._period = min(5.0, max(0.5, timeout / 10))
        self._step = 0
        self._first_step_done = False
        self._failure: str | None = None
        self._moved = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to beat and to watch."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
        # For crashes that Python does not live to report.
        faulthandler.enable(self._log.open("a", encoding="utf-8"))
        self._beat()
        self._thread.start()

    def step(self, step: int) -> None:
        """A step of training is done."""
        if not self._first_step_done:
            self._after_first_step(self._timeout)
            self._limit = self._timeout
            self._first_step_done = True
        self._step = step
        self._moved = time.monotonic()

    def goes_on_from(self, step: int) -> None:
        """An earlier start had done so many steps."""
        self._step = step

    def moves(self) -> None:
        """Something other than a step is done: a batch was evaluated, a checkpoint written."""
        self._moved = time.monotonic()

    def fail(self, reason: str) -> None:
        """Let the others know why this rank ends."""
        self._failure = reason
        self._beat()

    def stop(self) -> None:
        """Watch no longer."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            self._beat()

    def who_stopped(self) -> str:
        """Name the ranks that have failed or give no sign of life; takes a few heartbeats to find out."""
        before = self._read()
        found = _failed(before)
        if not found:
            for _ in range(5):
                self._ended.wait(self._period / 2)
                self._beat()
            after = self._read()
            silent = [rank for rank in range(self._world_size) if after.get(rank) == before.get(rank)]
            found = _failed(after) or [
                f"{_name(rank, after.get(rank))} has stopped: no sign of life since {_clock(after.get(rank))}, after "
                f"step {_step(after.get(rank))}"
                for rank in silent
                if self._rank not in silent  # else heartbeats cannot be written here, and say nothing
            ]
        if not found:
            found = [
                f"every rank is alive ({_places(after)}), so the network between them is cut, or one of them is stuck; "
                "check the link and NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, and the stacks in the logs"
            ]
        return "; ".join(found)

    def _watch(self) -> None:
        warned = 0.0
        while not self._ended.wait(self._period):
            self._beat()
            waited = time.monotonic() - self._moved
            if waited > WARN_AT * self._limit and self._moved != warned:
                warned = self._moved
                with suppress(OSError), self._log.open("a", encoding="utf-8") as log:
                    faulthandler.dump_traceback(log)
                logger.warning(
                    f"rank {self._rank} has not moved for {waited:.0f} s after step {self._step}, its stacks "
                    f"are in {self._log}; {self.who_stopped()}"
                )

    def _beat(self) -> None:
        beat = {
            "rank": self._rank,
            "host": host(),
            "pid": os.getpid(),
            "step": self._step,
            "time": time.time(),
            "failure": self._failure,
        }
        path = self._folder / f"rank-{self._rank:05d}.json"
        partial = path.with_name(f".{path.name}.partial")
        # On a full disk heartbeats cease; the run goes on.
        with self._lock, suppress(OSError):
            partial.write_text(json.dumps(beat), encoding="utf-8")
            partial.replace(path)

    def _read(self) -> dict[int, dict[str, Any]]:
        beats = {}
        for rank in range(self._world_size):
            with suppress(OSError, ValueError):
                beats[rank] = json.loads((self._folder / f"rank-{rank:05d}.json").read_text(encoding="utf-8"))
        return beats


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error means that another rank does not answer."""
    known = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    return isinstance(error, known) or (isinstance(error, RuntimeError) and any(word in str(error) for word in LOST))


def _failed(beats: dict[int, dict[str, Any]]) -> list[str]:
    return [f"{_name(rank, beat)} failed: {beat['failure']}" for rank, beat in beats.items() if beat["failure"]]


def _name(rank: int, beat: dict[str, Any] | None) -> str:
    return f"rank {rank}" + (f" ({beat['host']}, process {beat['pid']})" if beat else "")


def _places(beats: dict[int, dict[str, Any]]) -> str:
    """Where each rank is; of many, those that are furthest behind."""
    behind = sorted(beats, key=lambda rank: (_step(beats[rank]), rank))
    more = [f"{len(behind) - NAMED} more"] if len(behind) > NAMED else []
    return ", ".join([f"{_name(rank, beats[rank])} after step {_step(beats[rank])}" for rank in behind[:NAMED]] + more)


def _step(beat: dict[str, Any] | None) -> int:
    return int(beat["step"]) if beat else 0


def _clock(beat: dict[str, Any] | None) -> str:
    return time.strftime("%H:%M:%S", time.localtime(beat["time"])) if beat else "the start"
