"""Starts on a folder that is done, in use, or was left by a run that failed."""

import signal
import subprocess
import sys
import time

import pytest
from accelerate.state import AcceleratorState

from distprune.train import main
from distprune.training.run_folder import RunFolder
from distprune.training.stopping import SIGNALS
from tests.jobs import DIGITS, SHORT, read_json, read_rows


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    # main() leaves handlers behind, which must not outlive the test.
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_finished_run_says_so_and_is_left_alone(tmp_path, capsys):
    words = [str(DIGITS), *SHORT]
    assert main(words) == 0
    folder = tmp_path / "runs" / "digits"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(words) == 0
    assert "is done" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_in_use_is_refused(tmp_path, capsys):
    other = RunFolder(tmp_path / "runs" / "digits")
    other.claim()
    try:
        assert main([str(DIGITS), *SHORT]) == 2
    finally:
        other.release()
    assert "another process writes to" in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_starts_again_from_its_beginning(tmp_path, environment):
    command = [sys.executable, "-m", "distprune.train", str(DIGITS), *SHORT, "phases.dense.epochs=1000"]
    metrics = tmp_path / "runs" / "digits" / "metrics.jsonl"
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.kill()
    running.communicate(timeout=60)
    assert main([str(DIGITS), *SHORT]) == 0
    rows = read_rows(tmp_path / "runs" / "digits")
    assert [row["trainer/step"] for row in rows] == sorted({row["trainer/step"] for row in rows})
    assert read_json(tmp_path / "runs" / "digits" / "status.json")["state"] == "done"
