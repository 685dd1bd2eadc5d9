"""Measured by several processes, stopped, killed and begun again: the same figures."""

import os
import signal
import sys
from pathlib import Path

import pytest

from distprune.analysis.sensitivity import Turns
from distprune.cli import main
from distprune.training.stopping import Stopped
from tests.analysis.conftest import nothing_left_behind
from tests.jobs import DIGITS, ROOT
from tests.training.runs import descendants, kill, run, when

LEVELS = ",".join(f"0.{number}" for number in range(51, 99, 2))
TRIALS = 1 + 4 * 24
SLOW = ("eval.batch_size=1", "data.eval_split=test[:150]", "--sparsities", LEVELS)


@pytest.fixture
def words(weights):
    """Of a measurement that takes some seconds."""
    return [str(DIGITS), f"model.weights={weights}", *SLOW, "--out", "out"]


@pytest.fixture(scope="module")
def alone(weights, tmp_path_factory):
    """What one process finds that nobody disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    with nothing_left_behind():
        assert main(["sensitivity", str(DIGITS), f"model.weights={weights}", *SLOW, "--out", str(folder)]) == 0
    return outcome(folder)


@pytest.fixture
def start(tmp_path, environment, words):
    """Start the command, with `processes` 0 without a launcher."""

    def begin(processes, launcher="cpu", **how):
        program = ["-m", "distprune.cli", "sensitivity", *words]
        if processes:
            config = ["--config_file", str(ROOT / "launch" / f"{launcher}.yaml"), "--num_processes", str(processes)]
            program = ["-m", "accelerate.commands.accelerate_cli", "launch", *config, *program]
        return run([sys.executable, *program], tmp_path, environment, **how)

    return begin


def results():
    return [line for path in Path("out").glob("*.jsonl") for line in path.read_text().split("\n")[:-1]]


def outcome(folder="out"):
    return [Path(folder, name).read_bytes() for name in ("sensitivity.json", "allocation-0.9.yaml")]


def measured(count):
    """Whether so many results are there."""
    return lambda: len(results()) >= count


def test_two_ranks_find_what_one_finds_and_say_it_once(start, alone):
    code, output = start(2)
    assert code == 0, output
    assert output.count("Next:") == 1
    assert len(results()) == TRIALS
    assert outcome() == alone


def test_two_ranks_that_are_killed_and_one_that_goes_on_find_it_too(start, words, alone, capfd):
    code, output = start(2, once=when(measured(30), lambda: kill(descendants(os.getpid()))), send=signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    before = results()
    assert 30 <= len(before) < TRIALS
    assert len(list(Path("out").glob("*.jsonl"))) == 2
    with Path("out/sensitivity-rank-00001.jsonl").open("a") as torn:
        torn.write('{"layer": "0.weight", "spars')
    assert main(["sensitivity", *words]) == 0
    assert capfd.readouterr().err.count("evaluation ") == TRIALS - len(before)
    assert len(results()) == TRIALS
    assert outcome() == alone


def test_ctrl_c_ends_with_75_and_one_line_and_the_same_command_goes_on(start, words):
    code, output = start(0, once=measured(20), send=signal.SIGINT)
    assert code == 75, output
    assert output.splitlines()[-1] == "distprune: stopped by a signal; the same command goes on"
    assert "Traceback" not in output
    before = len(results())
    assert 20 <= before < TRIALS
    Path("out/stop").touch()  # of the start before
    assert main(["sensitivity", *words]) == 0
    assert len(results()) == TRIALS


def test_a_stop_file_stops(start):
    code, output = start(0, once=when(measured(20), Path("out/stop").touch), send=0)
    assert code == 75, output
    assert "distprune: stopped by a stop file; the same command goes on" in output


def test_a_rank_that_waits_ends_for_the_reason_of_the_other():
    turns, told = Turns(1), []
    turns.stop("stopped by a stop file")
    with pytest.raises(Stopped, match="a stop file"):
        turns.wait(lambda: told.append(1))
    assert told == [1]
    for _ in turns:
        pass
    turns.wait(lambda: None)


def test_shards_are_refused(start):
    code, output = start(2, launcher="fsdp2")
    assert code == 1, output
    assert output.count("launcher: every rank holds the whole model here, FSDP would shard it; take launch/") == 1
    assert not Path("out").exists()
