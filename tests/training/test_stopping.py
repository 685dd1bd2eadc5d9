"""When the ranks are asked whether to stop, and what makes them stop."""

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

from distprune.training.stopping import MOST_STEPS_BETWEEN, SIGNALS, Stopper


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_reason(tmp_path, number):
    stopper = Stopper(tmp_path / "stop", None, None)
    stopper.listen()
    assert stopper.reason() is None
    os.kill(os.getpid(), number)
    assert stopper.reason() == "a signal"


def test_a_second_interrupt_ends_the_process_at_once(tmp_path):
    Stopper(tmp_path / "stop", None, None).listen()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_file_and_a_budget_are_reasons(tmp_path):
    assert Stopper(tmp_path / "stop", 1e-9, None).reason() == "run.max_minutes"
    (tmp_path / "stop").touch()
    assert Stopper(tmp_path / "stop", None, None).reason() == "a stop file"


def test_fast_steps_are_asked_after_now_and_then_and_slow_ones_each_time(tmp_path):
    stopper = Stopper(tmp_path / "stop", None, None)
    (tmp_path / "stop").touch()
    fast = [stopper.after_step() is not None for _ in range(300)]
    asked = [step for step, answer in enumerate(fast) if answer]
    gaps = [b - a for a, b in itertools.pairwise(asked)]
    assert asked[0] == 0
    assert gaps[:3] == [2, 4, 8]
    assert max(gaps) == MOST_STEPS_BETWEEN
    slow = Stopper(tmp_path / "stop", None, None)
    for _ in range(3):
        time.sleep(0.3)
        assert slow.after_step() is not None


@pytest.mark.parametrize(("launched", "expected"), [(True, "the end of its launcher"), (False, "None")])
def test_a_launcher_that_is_gone_is_a_reason(tmp_path, launched, expected):
    ours = (
        "import time; from pathlib import Path; from distprune.training.stopping import Stopper\n"
        "stopper = Stopper(Path('stop'), None, None); print('ready', flush=True)\n"
        "end = time.monotonic() + 5\n"
        "while stopper.reason() is None and time.monotonic() < end: time.sleep(0.05)\n"
        "print(stopper.reason(), flush=True)"
    )
    launcher = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    if launched:
        environment["ACCELERATE_MIXED_PRECISION"] = "no"
    running = subprocess.Popen(
        [sys.executable, "-c", launcher, ours], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert running.stdout.readline() == "ready\n"
    running.kill()
    assert running.stdout.readline() == expected + "\n"
    running.stdout.close()
    running.wait()
