"""One rank goes wrong in one way: the run ends within its bound, and the last line names rank and cause."""

import json
import re
import threading
import time

import pytest

from distprune.training.liveness import Liveness, is_lost_rank
from tests.jobs import read_json, read_rows

PROGRAM = ("-m", "tests.training.faulty")


@pytest.fixture
def run_with(tmp_path, start):
    """Run on two ranks with one fault; the exit code, what status.json says, and what was printed."""

    def run(fault, *overrides, launcher="cpu"):
        start.environment |= {"FAULT": fault}
        code, output = start(2, "run.dir=run", *overrides, program=PROGRAM, launcher=launcher)
        return code, read_json(tmp_path / "run" / "status.json"), output

    return run


def log(tmp_path, rank):
    return (tmp_path / "run" / "logs" / f"rank-{rank:05d}.log").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "overrides", "expected"),
    [
        ("mask:1:305", [], "masks have changed between updates, found at step 310: rank 1: 10.weight"),
        (
            "weight:1:105",
            ["integrity.every=10"],
            "weights differ between ranks at step 110: 0.weight, with no majority",
        ),
        (
            "nan:1:229",
            ["train.clip_norm=1.0"],
            "; nothing was pruned; the loss is NaN or infinite, first at step 230 on rank 1",
        ),
        ("nan:1:105", ["run.log_every=50"], "training loss is NaN or infinite, first at step 106 on rank 1"),
    ],
    ids=["mask bit", "weight bit", "NaN at an update", "NaN between updates"],
)
def test_what_goes_wrong_on_one_rank_is_named(run_with, fault, overrides, expected):
    code, status, output = run_with(fault, *overrides)
    assert code == 1
    assert status["state"] == "failed"
    assert expected in status["error"]
    assert expected in output
    assert 'Traceback (most recent call last):\n  File "/work' not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "launcher"), [("freeze", "cpu"), ("freeze", "fsdp2"), ("die", "cpu"), ("fail", "cpu")]
)
def test_a_rank_that_does_not_answer_is_named_within_the_timeout(run_with, tmp_path, fault, launcher):
    code, status, output = run_with(f"{fault}:1:105", "integrity.timeout=8", launcher=launcher)
    assert code == 1
    assert status["state"] == "failed"
    beat = read_json(tmp_path / "run" / "heartbeats" / "rank-00001.json")
    # The timeout, a look at heartbeats, and what a busy machine needs for both.
    assert (tmp_path / "run" / "status.json").stat().st_mtime - beat["time"] < 8 + 2 + 10
    if fault == "fail":
        assert status["error"] == "rank 1 at step 105: ZeroDivisionError: of its own"
        assert beat["failure"] == "ZeroDivisionError: of its own"
    else:
        who = f"rank 1 ({beat['host']}, process {beat['pid']}) has stopped: no sign of life since "
        assert status["error"].startswith("rank 0 at step 105: another rank does not answer: " + who)
        assert status["error"].endswith(f", after step {beat['step']}")
        assert who in output
    if fault == "freeze":
        assert re.search(r"rank 0 has not moved for \d+ s after step 105, its stacks are in", log(tmp_path, 0))
        assert "most recent call first" in log(tmp_path, 0), "stacks of all threads"


@pytest.mark.slow
def test_steps_with_a_loss_that_is_not_finite_are_left_out_on_all_ranks(run_with, tmp_path):
    code, status, output = run_with("loss:1:105", "train.on_nonfinite=skip_step")
    assert code == 0, output
    assert status["state"] == "done"
    for rank in (0, 1):
        assert "the loss is NaN or infinite on rank 1 after step 105; the step is left out" in log(tmp_path, rank)
    rows = read_rows(tmp_path / "run")
    assert all(row["train/loss"] == row["train/loss"] for row in rows if "train/loss" in row)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 660


@pytest.mark.parametrize(
    "said",
    [
        "[/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation",
        "Application timeout caused pair closure",
        "Connection closed by peer [10.0.0.2]:56494",
    ],
)
def test_what_gloo_says_of_a_timeout_means_a_rank_that_does_not_answer(said):
    assert is_lost_rank(RuntimeError(said))


def test_where_every_rank_is_alive_the_network_is_suspected_and_those_behind_are_named(tmp_path):
    ended = threading.Event()

    def beat():
        while not ended.is_set():
            for rank in range(1, 10):
                made = {"rank": rank, "host": f"node{rank}", "pid": 100 + rank, "step": 50 - rank, "failure": None}
                path = tmp_path / f"rank-{rank:05d}.json"
                path.with_suffix(".partial").write_text(json.dumps({**made, "time": time.time()}))
                path.with_suffix(".partial").replace(path)
            ended.wait(0.05)

    liveness = Liveness(tmp_path, tmp_path, 0, 10, 5, 5, lambda _: None)
    liveness.goes_on_from(50)
    others = threading.Thread(target=beat)
    others.start()
    try:
        found = liveness.who_stopped()
    finally:
        ended.set()
        others.join()
    assert found.startswith("every rank is alive (rank 9 (node9, process 109) after step 41, rank 8 (node8, ")
    assert "rank 2 (node2, process 102) after step 48, 2 more), so the network between them is cut, or one of" in found
    assert "GLOO_SOCKET_IFNAME" in found
