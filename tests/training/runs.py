"""Runs in processes of their own that are stopped, killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.jobs import DIGITS, ROOT, SHORT, read_rows

JOB = (
    *SHORT,
    "phases.dense.epochs=10",
    "phases.prune.epochs=10",
    "phases.finetune.epochs=10",
    "checkpoint.every=20",
    "model.args={width: 8}",
)
TIMES = {"train/samples_per_s", "prune/update_ms"}


def command(processes, *overrides, launcher="cpu", program=("-m", "distprune.train")):
    """What a user types; with `processes` 0 without a launcher."""
    words = [*program, str(DIGITS), *JOB, *overrides]
    if processes == 0:
        return [sys.executable, *words]
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    config = ["--config_file", str(ROOT / "launch" / f"{launcher}.yaml"), "--num_processes", str(processes)]
    return [*accelerate, *config, *words]


def whole(folder):
    """What must not depend on stops: weights, masks, histograms, validation, and every logged figure but times."""
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in read_rows(folder)]
    files = ("model.safetensors", "masks.safetensors", "histograms.jsonl", "validation.json")
    return *((folder / name).read_bytes() for name in files), rows


def last_logged(folder):
    """The last step that has been logged by a run that goes on; -1 before the first."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["trainer/step"] if lines else -1


def reached(folder, step):
    """Whether a step has been logged."""
    return lambda: last_logged(folder) >= step


def when(condition, act):
    """A condition that acts when it becomes true."""

    def look():
        if condition():
            act()
            return True
        return False

    return look


def descendants(pid):
    """The processes below one, which a launcher puts into sessions of their own."""
    try:
        return [process.pid for process in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def signal_all(pids, number):
    """A signal to those of the processes that are left."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill(pids):
    """SIGKILL to those of the processes that are left."""
    signal_all(pids, signal.SIGKILL)


def run(words, folder, environment, send=None, once=None, everyone=False, timeout=400):
    """Run a program to the end; or until `once()`, then send a signal to it, or to all that it has started.

    Returns:
        The exit code and what was printed.
    """
    running = subprocess.Popen(
        words,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        if once is not None:
            deadline = time.monotonic() + 240
            while not once() and running.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            if running.poll() is None:
                signal_all([running.pid, *(descendants(running.pid) if everyone else ())], send)
        output, _ = running.communicate(timeout=timeout)
    finally:
        if running.poll() is None:
            kill([running.pid, *descendants(running.pid)])
    return running.returncode, output


@dataclass
class Starter:
    """Starts the job in a folder."""

    folder: Path
    environment: dict[str, str]

    def __call__(self, processes, *overrides, send=None, once=None, everyone=False, timeout=400, **how):
        """Run to the end; or until `once()`, then send a signal to the started process, or to all that it has started.

        Returns:
            The exit code and what was printed.
        """
        words = command(processes, *overrides, **how)
        return run(words, self.folder, self.environment, send, once, everyone, timeout)
