"""Signals to `accelerate launch`, to whole jobs in the middle of an evaluation, and what an API key leaves behind."""

import os
import signal
import time

import pytest

from tests.jobs import read_json
from tests.training.runs import reached, whole


def preempted(folder):
    """Wait for the ranks, which may outlive their launcher."""
    deadline = time.monotonic() + 60
    while read_json(folder / "status.json")["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    return read_json(folder / "status.json")["state"] == "preempted"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_signals_to_the_launcher(tmp_path, start, processes):
    code, output = start(processes, "run.dir=undisturbed")
    assert code == 0, output
    folder = tmp_path / "run"
    for number, step in ((signal.SIGTERM, 100), (signal.SIGUSR1, 350)):
        code, output = start(processes, "run.dir=run", send=number, once=reached(folder, step))
        assert code != 0
        assert preempted(folder), output
        assert "the same command goes on" in output
        assert "/distprune/" not in output, "a traceback of ours"
    code, output = start(processes, "run.dir=run")
    assert code == 0, output
    assert whole(folder) == whole(tmp_path / "undisturbed")
    code, output = start(processes, "run.dir=run")
    assert code == 0
    assert "is done" in output


@pytest.mark.slow
def test_a_launcher_that_is_told_to_passes_signals_on(tmp_path, start):
    start.environment |= {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1", "PET_SHUTDOWN_TIMEOUT": "120"}
    folder = tmp_path / "run"
    _, output = start(2, "run.dir=run", send=signal.SIGUSR1, once=reached(folder, 100))
    assert read_json(folder / "status.json")["state"] == "preempted"
    assert "stopped by a signal" in read_json(folder / "status.json")["error"]
    assert "/distprune/" not in output, "a traceback of ours"


def test_an_evaluation_is_stopped_in_the_middle_and_done_again(tmp_path, start):
    # Signals reach the loader's worker too.
    slow = ("eval.batch_size=1", "eval.every=50", "phases.dense.epochs=4", "phases.prune.epochs=4", "data.workers=1")
    code, output = start(0, "run.dir=undisturbed", *slow)
    assert code == 0, output
    folder = tmp_path / "run"
    stops = []
    for step in (40, 80, 90, 170):  # evaluations are at 50, 88 (the end of the dense phase), 100, ...
        code, output = start(0, "run.dir=run", *slow, send=signal.SIGUSR1, once=reached(folder, step), everyone=True)
        assert code == 75, output
        stops.append(read_json(sorted((folder / "checkpoints").glob("step-*"))[-1] / "state.json")["progress"])
    assert any(stop["evaluating"] for stop in stops)
    code, output = start(0, "run.dir=run", *slow)
    assert code == 0, output
    assert whole(folder) == whole(tmp_path / "undisturbed")


def test_an_api_key_is_in_no_file(tmp_path, start):
    key = "".join(f"{byte:02x}" for byte in os.urandom(20))
    start.environment |= {"WANDB_API_KEY": key, "WANDB_MODE": "offline"}
    code, output = start(0, "run.dir=run", "tracking.wandb.mode=auto", "phases.dense.epochs=1", "phases.prune.epochs=1")
    assert code == 0, output
    assert key not in output
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if key.encode() in path.read_bytes()] == []
