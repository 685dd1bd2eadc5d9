"""Ranks that are not fit to train are found before a model is built, and their hosts named."""

import re
import time

import pytest

from distprune.training.judgement import judge_links, judge_reports
from tests.jobs import ROOT

PROGRAM = ("-m", "tests.training.faulty_start")
QUICK = ("phases.dense.epochs=1", "phases.prune.epochs=1", "phases.finetune.epochs=0", "integrity.start_timeout=6")


def report(host="n1", **others):
    mine = {
        "host": host,
        "device": "cpu",
        "free": 10**12,
        "sees": True,
        "folder": "/shared",
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
        ("device", "distprune: node1: rank 1: CUDA error: uncorrectable ECC error encountered\n"),
        ("late", "no report from rank 1 (node1)"),
        ("link", "as seen by rank 1 on node1: no route to host; NCCL_SOCKET_IFNAME"),
        ("hang", "the hosts node0, node1 do not reach each other, as seen by rank 0 on node0: not done after 6 s"),
    ],
)
def test_a_host_at_fault_is_named_and_nothing_is_begun(tmp_path, start, fault, expected):
    start.environment |= {"FAULT": f"{fault}:1"}
    began = time.monotonic()
    code, output = start(2, "run.dir=run", *QUICK, program=PROGRAM)
    assert code == 1, output
    assert expected in output
    assert f'File "{ROOT}/distprune' not in output
    assert time.monotonic() - began < 90
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".distprune-*"))


@pytest.mark.slow
def test_what_was_found_is_logged(tmp_path, start):
    start.environment |= {"FAULT": "clock:2", "PER_HOST": "2"}
    code, output = start(4, "run.dir=run", *QUICK, program=PROGRAM)
    assert code == 0, output
    assert "distprune: the clock of node1 is 3600 s behind that of node0\n" in output
    found = log(tmp_path / "run")
    for line in ("node0: ranks 0-1, 2 x cpu, ", "node1: ranks 2-3, 2 x cpu, ", "distprune ", "the clock of node1 "):
        assert f"preflight: {line}" in found
    assert re.search(r"preflight: first all-reduce: \d+ ms within hosts, \d+ ms over all; clocks", found)
    assert not list(tmp_path.glob(".distprune-*"))


def test_one_rank_reports_too(tmp_path, start):
    code, output = start(0, "run.dir=run", *QUICK)
    assert code == 0, output
    assert "preflight: " in log(tmp_path / "run")
    assert "rank 0, 1 x cpu" in log(tmp_path / "run")


def test_each_gpu_is_given_once():
    same = [report(device="H100", uuid="a"), report(device="H100", uuid="a"), report("n2", device="H100", uuid="a")]
    (fault,) = judge_reports(dict(enumerate(same)), 3).faults
    assert fault.startswith("n1: several ranks were given the same GPU")
    different = [report(device="H100", uuid="a"), report(device="H100", uuid="b")]
    assert not judge_reports(dict(enumerate(different)), 2).faults


def test_hosts_with_different_configurations_are_named():
    reports = {0: report(), 1: report("n2", config={"run": {"seed": 1}})}
    assert judge_reports(reports, 2).faults == ["n2 has another configuration in run, n1 has its own"]


def test_a_rank_without_a_gpu_among_others_is_a_fault():
    reports = {0: report(device="H100", uuid="a"), 1: report("n2")}
    assert judge_reports(reports, 2).faults == ["n2: no GPU is seen by rank 1, while others have H100"]


def test_each_rank_of_a_host_is_looked_at():
    reports = {0: report(), 1: report(), 2: report(versions={"torch": "3"})}
    assert judge_reports(reports, 3).faults == ["n1 has torch 3, n1 has 2"]


def test_doubts_about_disks_and_devices_are_warnings():
    reports = {0: report(device="H100", uuid="a"), 1: report("n2", device="A100", uuid="b", free=10**6)}
    verdict = judge_reports(reports, 2)
    assert not verdict.faults
    assert verdict.warnings == [
        "n2: only 1 MB are free in the run folder",
        "devices differ, and the slowest sets the pace: H100, A100",
    ]


def test_a_host_whose_ranks_do_not_reach_each_other_is_named():
    done = {"host": "n1", "at": "done", "host_ms": 1.0, "all_ms": 1.0, "clock": 0.0}
    stuck = {"host": "n2", "at": "host", "error": "not done after 300 s"}
    waiting = {"host": "n1", "at": "all", "error": "not done after 300 s"}
    hosts = ["n1", "n1", "n2", "n2"]
    verdict = judge_links({0: waiting, 1: waiting, 2: stuck, 3: stuck}, hosts)
    assert verdict.faults == ["n2: its ranks do not reach each other, as seen by ranks 2-3: not done after 300 s"]
    assert not judge_links(dict.fromkeys(range(4), done), hosts).faults
    (fault,) = judge_links({0: waiting, 1: waiting, 2: waiting}, hosts).faults
    assert fault == "rank 3 (n2) ended or hung while links were tried"
    (fault,) = judge_links({0: waiting, 1: waiting}, ["n1", "n1"]).faults
    assert fault == "n1: its ranks do not reach each other, as seen by ranks 0-1: not done after 300 s"
