"""What `slurm/train.sbatch` makes of the end of its ranks, with a Slurm that only says what it was asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import DIGITS, ROOT

# The ranks are played by $RANKS; all else that srun is given runs as it is.
SRUN = """\
#!/usr/bin/env bash
printf '%s\\n' "srun $*" >>"$CALLS"
while [[ $1 == --* ]]; do shift; done
if [[ $1 == bash ]]; then eval "$RANKS"; else exec "$@"; fi
"""
SCONTROL = """\
#!/usr/bin/env bash
echo "scontrol $*" >>"$CALLS"
if [[ $1 == show ]]; then printf '%s\\n' n1 n2; fi
"""
SQUEUE = """\
#!/usr/bin/env bash
echo "${QUEUE:-RUNNING}"
"""


@pytest.fixture
def job(tmp_path):
    """Run a start of the job; its exit code, what was asked of Slurm, and its log."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    folder = tmp_path / "run"
    folder.mkdir()

    def start(ranks, restarts=1, script="train", words=(), **others):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = {
            **os.environ,
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SLURM_JOB_ID": "7",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_RESTART_COUNT": str(restarts),
            "CALLS": str(calls),
            "RANKS": ranks,
            **others,
        }
        called = ["bash", str(ROOT / "slurm" / f"{script}.sbatch"), *words, str(DIGITS), f"run.dir={folder}"]
        ended = subprocess.run(called, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        logs = "".join(path.read_text() for path in sorted(tmp_path.rglob("logs/job-*.log")))
        return ended.returncode, calls.read_text(), ended.stdout + ended.stderr + logs

    return start


def leaves(tmp_path, state, step, code):
    """What ranks do that end with a state."""
    status = json.dumps({"state": state, "step": step, "steps": 90, "error": None}, indent=2)
    path = tmp_path / "run" / "status.json"
    return f"printf '%s\\n' '{status}' >'{path}.new'; sleep 0.01; mv '{path}.new' '{path}'; exit {code}"


def test_a_run_that_is_done_ends_the_job(job, tmp_path):
    code, calls, _ = job(leaves(tmp_path, "done", 90, 0))
    assert code == 0
    assert "requeue" not in calls


def test_a_run_that_gets_on_is_requeued_for_ever(job, tmp_path):
    for step in (10, 20, 30, 40, 50, 60):
        code, calls, log = job(leaves(tmp_path, "preempted", step, 1))
        assert code == 0, log
        assert calls.endswith("scontrol requeue 7\n")
    assert "failed" not in log


@pytest.mark.parametrize(
    ("state", "why"),
    [("failed", "failed"), ("preempted", "preempted before its first step"), ("", "unstarted")],
    ids=["failed", "stopped before a step", "never started"],
)
def test_a_run_that_does_not_get_on_is_requeued_so_many_times(job, tmp_path, state, why):
    ranks = leaves(tmp_path, state, 30, 1) if state else "exit 1"
    (tmp_path / "run" / "status.json").write_text(
        json.dumps({"state": "preempted", "step": 30, "steps": 90, "error": None}, indent=2)
    )
    for _ in range(2):
        code, calls, log = job(ranks, MAX_RESTARTS="2")
        assert code == 0, log
        assert calls.endswith("scontrol requeue 7\n")
        assert f"the run is {why}\n" in log
    code, calls, log = job(ranks, MAX_RESTARTS="2")
    assert code == 1
    assert "requeue 7" not in calls
    assert "failed more than MAX_RESTARTS=2 times; not requeued" in log


def test_a_cancelled_job_keeps_its_code(job, tmp_path):
    code, calls, log = job(leaves(tmp_path, "preempted", 10, 143), QUEUE="COMPLETING")
    assert code == 143
    assert "requeue 7" not in calls
    assert "ended by Slurm" in log


def test_a_fault_of_the_configuration_starts_no_ranks(job, tmp_path):
    site = tmp_path / "site.env"
    for fault, where in (("prune.sparsity=2", "less than 1"), ("prune.exclude=[nothing]", "nothing")):
        site.write_text(f"set -- \"$@\" '{fault}'\n")
        code, calls, log = job("exit 0", restarts=0, DISTPRUNE_SITE=str(site))
        assert code == 2
        assert calls == ""
        assert where in log


def test_a_fault_that_only_ranks_find_is_not_requeued(job, tmp_path):
    code, calls, log = job('touch "$DISTPRUNE_REFUSED"; exit 1')
    assert code == 2
    assert "requeue 7" not in calls
    assert "the configuration is at fault" in log
    code, calls, log = job(leaves(tmp_path, "done", 90, 0))
    assert code == 0, "what an earlier start left does not count"


def test_a_python_that_fails_is_not_taken_for_a_fault_of_the_configuration(job, tmp_path):
    site = tmp_path / "site.env"
    site.write_text("sleep() { :; }\nexport PYTHONPATH=/nowhere PYTHONHOME=/nowhere\n")
    code, _, log = job("exit 0", DISTPRUNE_SITE=str(site))
    assert code == 1
    assert log.count("Fatal Python error") == 3, log


def test_a_task_of_an_array_is_requeued_alone(job, tmp_path):
    table = tmp_path / "table.yaml"
    table.write_text("run.seed: [1, 2]\n")
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    ranks = leaves(tmp_path, "preempted", 10, 1).replace("/run/status", "/run/run.seed=2/status")
    code, calls, log = job(ranks, script="sweep", words=[str(table)], **task)
    assert code == 0, log
    assert calls.endswith("scontrol requeue 7_1\n")
    assert (tmp_path / "run" / "run.seed=2" / "logs" / "job-7_1.log").exists()


def test_an_array_without_numbers_says_what_is_missing(job, tmp_path):
    code, _, log = job("exit 0", script="sweep", words=["table.yaml"])
    assert code != 0
    assert "submit this with --array=0-N" in log


def test_a_tilde_and_a_blank_in_the_run_folder(job, tmp_path):
    site = tmp_path / "site.env"
    site.write_text("set -- \"$@\" 'run.dir=~/a b'\n")
    (tmp_path / "home").mkdir()
    ranks = leaves(tmp_path, "done", 90, 0).replace("/run/status", "/home/a b/status")
    code, _, log = job(ranks, HOME=str(tmp_path / "home"), DISTPRUNE_SITE=str(site))
    assert code == 0, log
    assert (tmp_path / "home" / "a b" / "logs" / "job-7.log").exists()


def test_in_a_container_all_of_python_runs_there(job, tmp_path):
    site = tmp_path / "site.env"
    site.write_text("CONTAINER_IMAGE=/images/torch.sqsh CONTAINER_MOUNTS=/data:/data\n")
    code, calls, log = job(leaves(tmp_path, "done", 90, 0), restarts=0, DISTPRUNE_SITE=str(site))
    assert code == 0, log
    steps = [call for call in calls.splitlines() if call.startswith("srun")]
    words = f"--container-image=/images/torch.sqsh --container-workdir={tmp_path} --container-mounts=/data:/data"
    assert all(words in step for step in steps)
    assert [step.split(words)[1].split()[0] for step in steps] == ["python", "distprune", "bash"]
