"""Kill a run again and again, start the same command again each time, and compare with a run that nobody touched.

    python -m tests.soak.kill_resume --kills 20 [--processes 2] [--seed 0] [--folder DIR] [section.key=value ...]

A kill is SIGKILL to one random rank, or to the launcher and all ranks, at a random instant; a third of them come while
a checkpoint is being written. Where the run is done before all kills are made, it is compared, and another one begun.
Exit code 0 if every run ended with the bytes of the one that was left alone, else 1.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.jobs import ROOT, read_json
from tests.training.runs import command, descendants, kill, whole

# Ranks that outlive another look for its heartbeat for a fifth of the timeout.
JOB = ("checkpoint.every=10", "model.args={width: 24}", "integrity.timeout=10")
LONGEST_START = 16.0


@dataclass
class Kill:
    """What one kill hit."""

    victim: str
    saving: bool
    step: int
    seconds: float


class Soak:
    """Runs the job in folders below `folder`, and kills it."""

    def __init__(self, folder: Path, processes: int, seed: int, overrides: Sequence[str] = ()) -> None:
        self.folder = folder
        self.processes = processes
        self.overrides = overrides
        self.random = random.Random(seed)
        cache = {"DISTPRUNE_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **cache}

    def start(self, name: str) -> subprocess.Popen:
        words = command(self.processes, *JOB, *self.overrides, f"run.dir={name}")
        with (self.folder / f"{name}.log").open("a") as log:
            return subprocess.Popen(words, cwd=self.folder, env=self.environment, stdout=log, stderr=log)

    def finish(self, name: str) -> None:
        running = self.start(name)
        try:
            code = running.wait(timeout=600)
        finally:
            kill([running.pid, *descendants(running.pid)])
            self.clear(name)
        if code or self.state(name) != "done":
            raise SystemExit(
                f"{name} ended with exit code {code} and is {self.state(name)}; see {self.folder}/{name}.log"
            )

    def state(self, name: str) -> str | None:
        path = self.folder / name / "status.json"
        return read_json(path)["state"] if path.exists() else None

    def kill_once(self, name: str, while_saving: bool) -> Kill | None:
        """Start, kill, wait until nothing is left of it; None if the run was done before."""
        began, since = time.monotonic(), time.time()
        running = self.start(name)
        if while_saving:
            self.wait_for_a_save(running, name, since, skip=self.random.randrange(6))
        else:
            self.wait(running, self.random.uniform(0.5, LONGEST_START))
        below = descendants(running.pid)
        ranks = [pid for pid in below if _is_rank(pid)]
        victims = [self.random.choice(ranks)] if ranks and self.random.random() < 0.5 else [running.pid, *below]
        if running.poll() is not None:
            if self.state(name) != "done":
                raise SystemExit(f"{name} ended by itself and is {self.state(name)}; see {self.folder}/{name}.log")
            return None
        kill(victims)
        seconds, saving = time.monotonic() - began, bool(self.partial(name, since))
        try:
            running.wait(timeout=90)
        finally:
            kill([running.pid, *below])
            self.clear(name)
        return Kill("one rank" if len(victims) == 1 else "all processes", saving, self.step(name), seconds)

    def wait(self, running: subprocess.Popen, seconds: float) -> None:
        end = time.monotonic() + seconds
        while running.poll() is None and time.monotonic() < end:
            time.sleep(0.01)

    def wait_for_a_save(self, running: subprocess.Popen, name: str, since: float, skip: int) -> None:
        """Until the checkpoint after the next `skip` is being written."""
        seen: set[str] = set()
        while running.poll() is None and len(seen) <= skip:
            seen |= self.partial(name, since)
            time.sleep(0.0005)
        time.sleep(self.random.uniform(0, 0.01))

    def partial(self, name: str, since: float) -> set[str]:
        """Checkpoints that are being written, without those that an earlier kill left.

        Inodes do not tell them apart: a folder that is made again may get that of the one before it.
        """
        found = set()
        for path in (self.folder / name / "checkpoints").glob(".step-*.partial"):
            with suppress(OSError):
                if path.stat().st_mtime >= since:
                    found.add(path.name)
        return found

    def clear(self, name: str) -> None:
        """Kill what is left of a start, also what its launcher began just before it died."""
        deadline = time.monotonic() + 30
        while left := [process.pid for process in psutil.process_iter() if self.belongs(process, name)]:
            if time.monotonic() > deadline:
                raise SystemExit(f"processes of {name} do not end: {left}")
            kill(left)
            time.sleep(0.05)

    def belongs(self, process: psutil.Process, name: str) -> bool:
        try:
            return f"run.dir={name}" in process.cmdline() and Path(process.cwd()) == self.folder.resolve()
        except psutil.Error:
            return False

    def step(self, name: str) -> int:
        """The step of the newest checkpoint."""
        return max((int(path.name[5:]) for path in (self.folder / name / "checkpoints").glob("step-*")), default=0)


def soak(kills: int, processes: int, seed: int, folder: Path, overrides: Sequence[str] = ()) -> bool:
    """Kill so many times; whether every run ended as the one that was left alone did."""
    job = Soak(folder, processes, seed, overrides)
    job.finish("undisturbed")
    hits: list[Kill] = []
    unequal: list[str] = []
    run = 1
    while len(hits) < kills:
        name = f"killed-{run}"
        saving = sum(hit.saving for hit in hits)
        hit = job.kill_once(name, while_saving=3 * saving <= len(hits))
        if hit is None:
            unequal += compare(folder, name)
            run += 1
        else:
            hits.append(hit)
            while_saving = ", while a checkpoint was being written" if hit.saving else ""
            print(
                f"kill {len(hits):2}  {hit.victim:13}  {hit.seconds:4.1f} s after its start, newest checkpoint of step "
                f"{hit.step}{while_saving}",
                flush=True,
            )
    if (folder / f"killed-{run}").exists():
        job.finish(f"killed-{run}")
        unequal += compare(folder, f"killed-{run}")
    saving = sum(hit.saving for hit in hits)
    print(f"{kills} kills on {processes} processes, {saving} of them while a checkpoint was being written")
    print("; ".join(unequal) or "every run ended with the bytes of the one that was left alone")
    return not unequal


def compare(folder: Path, name: str) -> list[str]:
    """What of a run is not as it is in the one that was left alone."""
    kinds = ("weights", "masks", "histograms", "validation", "figures")
    pairs = zip(kinds, whole(folder / name), whole(folder / "undisturbed"), strict=True)
    unequal = [f"{name} has other {what}" for what, ours, theirs in pairs if ours != theirs]
    print(f"{name} is done: {'; '.join(unequal) or 'equal to the byte'}", flush=True)
    return unequal


def _is_rank(pid):
    try:
        return "distprune.train" in psutil.Process(pid).cmdline()
    except psutil.NoSuchProcess:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    words = parser.parse_intermixed_args()
    folder = words.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    return 0 if soak(words.kills, words.processes, words.seed, folder, words.overrides) else 1


if __name__ == "__main__":
    sys.exit(main())
