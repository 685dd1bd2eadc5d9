"""Ranks that are not fit to train are found before a model is built, and their hosts named."""

import time

import pytest

from distprune.training.preflight import _judge_links, _judge_reports

PROGRAM = ("-m", "tests.training.faulty_start")
QUICK = ("phases.dense.epochs=1", "phases.prune.epochs=1", "phases.finetune.epochs=0", "integrity.start_timeout=6")


def report(host="n1", **others):
    mine = {
        "host": host,
        "device": "cpu",
        "free": 10**12,
        "sees": True,
        "token": "/shared/.x",
        "versions": {"torch": "2"},
        "config": {"run": {"seed": 0}},
    }
    return mine | others


def log(folder, rank=0):
    return (folder / "logs" / f"rank-{rank:05d}.log").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("version", "node1 has torch 1.0, node0 has 2."),
        ("folder", "run.dir: node1 does not see what node0 wrote into "),
        ("late", "no report from rank 1 (node1)"),
        ("link", "as seen by rank 1 on node1: no route to host; NCCL_SOCKET_IFNAME"),
        ("hang", "rank 1 (node1) ended or hung while links were tried"),
    ],
)
def test_a_host_at_fault_is_named_and_nothing_is_begun(tmp_path, start, fault, expected):
    start.environment |= {"FAULT": f"{fault}:1", "PET_SHUTDOWN_TIMEOUT": "3"}
    began = time.monotonic()
    code, output = start(2, "run.dir=run", *QUICK, program=PROGRAM)
    assert code == 1, output
    assert expected in output
    assert 'Traceback (most recent call last):\n  File "/work' not in output
    assert time.monotonic() - began < 90
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".distprune-*"))


@pytest.mark.slow
def test_what_was_found_is_logged(tmp_path, start):
    start.environment |= {"FAULT": "clock:1"}
    code, output = start(2, "run.dir=run", *QUICK, program=PROGRAM)
    assert code == 0, output
    assert "the clock of node1 is 3600 s behind that of node0" in output
    for line in ("node0: rank 0, 1 x cpu, ", "node1: rank 1, 1 x cpu, ", "first all-reduce: ", "distprune "):
        assert f"preflight: {line}" in log(tmp_path / "run")
    assert not list(tmp_path.glob(".distprune-*"))


def test_one_rank_reports_too(tmp_path, start):
    code, output = start(0, "run.dir=run", *QUICK)
    assert code == 0, output
    assert "preflight: " in log(tmp_path / "run")
    assert "rank 0, 1 x cpu" in log(tmp_path / "run")


def test_each_gpu_is_given_once():
    same = [report(device="H100", uuid="a"), report(device="H100", uuid="a"), report("n2", device="H100", uuid="a")]
    (fault,) = _judge_reports(dict(enumerate(same)), 3).faults
    assert fault.startswith("n1: several ranks were given the same GPU")
    different = [report(device="H100", uuid="a"), report(device="H100", uuid="b")]
    assert not _judge_reports(dict(enumerate(different)), 2).faults


def test_hosts_with_different_configurations_are_named():
    reports = {0: report(), 1: report("n2", config={"run": {"seed": 1}})}
    assert _judge_reports(reports, 2).faults == ["n2 has another configuration than n1: look at run"]


def test_doubts_about_disks_and_devices_are_warnings():
    reports = {0: report(device="H100", uuid="a"), 1: report("n2", device="A100", uuid="b", free=10**6)}
    verdict = _judge_reports(reports, 2)
    assert not verdict.faults
    assert verdict.warnings == [
        "n2: only 1 MB are free in the run folder",
        "devices differ, and the slowest sets the pace: H100, A100",
    ]


def test_a_host_whose_ranks_do_not_reach_each_other_is_named():
    done = {"host": "n1", "at": "done", "host_ms": 1.0, "all_ms": 1.0, "clock": 0.0}
    stuck = {"host": "n2", "at": "host", "error": "not done after 300 s"}
    waiting = {"host": "n1", "at": "all", "error": "not done after 300 s"}
    hosts = {0: "n1", 1: "n1", 2: "n2", 3: "n2"}
    verdict = _judge_links({0: waiting, 1: waiting, 2: stuck, 3: stuck}, hosts)
    assert verdict.faults == ["n2: its ranks 2-3 cannot reach each other: not done after 300 s"]
    assert not _judge_links(dict.fromkeys(hosts, done), hosts).faults
    (fault,) = _judge_links({0: waiting, 1: waiting, 2: waiting}, hosts).faults
    assert fault == "rank 3 (n2) ended or hung while links were tried"
