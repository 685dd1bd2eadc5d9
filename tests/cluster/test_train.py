"""`slurm/train.sbatch` on a real Slurm: jobs that end in every way a cluster knows, and go on."""

import os
import signal
from types import SimpleNamespace

import pytest

from tests.jobs import DIGITS, ROOT, read_json, read_rows
from tests.tracking.files import all_steps, segments
from tests.training.runs import JOB, last_logged, reached, whole

# About half a minute, so that the warning before a time limit of 2 minutes comes before the end.
LONG = (*JOB, "phases.dense.epochs=80", "phases.prune.epochs=50", "phases.finetune.epochs=40")

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory):
    """A folder from which jobs are submitted, and how."""
    folder = tmp_path_factory.mktemp("jobs")
    for name in ("slurm", "launch"):
        (folder / name).symlink_to(ROOT / name)

    def submit(run, *overrides, options=()):
        script = ["--nodes=2", *options, "slurm/train.sbatch", str(DIGITS), *LONG, f"run.dir={run}", *overrides]
        return cluster.submit(folder, *script)

    return SimpleNamespace(folder=folder, submit=submit)


@pytest.fixture(scope="module")
def undisturbed(cluster, jobs):
    """The folder of a run on two nodes that nobody stopped."""
    number = jobs.submit("undisturbed")
    job = cluster.wait_for_state(number, "COMPLETED", "FAILED")
    folder = jobs.folder / "undisturbed"
    assert job["JobState"] == "COMPLETED", log(folder, number)
    return folder


def log(folder, number):
    return (folder / "logs" / f"job-{number}.log").read_text()


def test_two_nodes_train_one_run(undisturbed):
    summary = read_json(undisturbed / "summary.json")
    assert read_json(undisturbed / "status.json")["state"] == "done"
    assert summary["world_size"] == 2
    assert summary["prune/sparsity"] == pytest.approx(0.9, abs=1e-4)
    of_rank_0 = (undisturbed / "logs" / "rank-00000.log").read_text()
    for line in ("n1: rank 0, 1 x cpu", "n2: rank 1, 1 x cpu", "first all-reduce: "):
        assert f"preflight: {line}" in of_rank_0


def test_a_job_goes_on_whatever_stops_it_and_ends_with_the_same_bytes(cluster, jobs, undisturbed):
    limit = ["--time=2", "--signal=B:USR1@90"]
    number = jobs.submit("run", "tracking.wandb.mode=offline", options=limit)
    folder = jobs.folder / "run"

    def restarts(count):
        cluster.wait(number, lambda: int(cluster.job(number)["Restarts"]) == count)

    def trained_on():
        """Wait for the next start, and for some steps of it."""
        cluster.wait_for_state(number, "RUNNING")
        cluster.wait(number, reached(folder, last_logged(folder) + 60))

    restarts(1)  # the time limit is near
    assert "asked to stop" in log(folder, number)
    assert read_json(folder / "status.json")["state"] == "preempted"
    cluster.call("scontrol", "update", f"JobId={number}", "TimeLimit=60")

    trained_on()
    cluster.call("scancel", "--batch", "--signal=USR1", number)
    restarts(2)

    trained_on()
    cluster.call("scancel", "--signal=USR1", number)
    restarts(3)

    trained_on()
    cluster.call("scontrol", "requeue", number)
    restarts(4)

    trained_on()
    beat = read_json(folder / "heartbeats" / "rank-00001.json")
    os.kill(beat["pid"], signal.SIGKILL)
    cluster.wait(number, lambda: int(cluster.job(number)["Restarts"]) == 5, timeout=60)
    assert "rank 1" in read_json(folder / "status.json")["error"]

    job = cluster.wait_for_state(number, "COMPLETED", "FAILED")
    assert job["JobState"] == "COMPLETED", log(folder, number)
    assert whole(folder) == whole(undisturbed)

    found = segments(folder)
    assert {segment.run.run_id for segment in found} == {(folder / "wandb_id").read_text()}
    assert all_steps(found) == [row["trainer/step"] for row in read_rows(folder)]
    assert found[-1].config["slurm"]["job_id"] == number
    assert found[-1].config["slurm"]["nodes"] == "n[1-2]"


def test_a_fault_of_the_configuration_fails_and_is_not_requeued(cluster, jobs):
    number = jobs.submit("faulty", "prune.exclude=[nothing_of_that_name]")
    job = cluster.wait_for_state(number, "COMPLETED", "FAILED")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert "nothing_of_that_name" in log(jobs.folder / "faulty", number)


def test_a_cancelled_job_is_not_requeued(cluster, jobs):
    number = jobs.submit("cancelled", "phases.dense.epochs=100")
    folder = jobs.folder / "cancelled"
    cluster.wait(number, reached(folder, 100))
    cluster.call("scancel", number)
    cluster.wait_until_gone(number)
    assert cluster.job(number)["JobState"] == "CANCELLED"
    assert cluster.job(number)["Restarts"] == "0"
    assert read_json(folder / "status.json")["state"] == "preempted"


def test_a_run_is_finished_on_the_node_that_is_left(cluster, jobs):
    number = jobs.submit("lost", "phases.dense.epochs=40", options=["--nodes=1-2"])
    folder = jobs.folder / "lost"
    cluster.wait(number, reached(folder, 150))
    cluster.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    try:
        job = cluster.wait_for_state(number, "COMPLETED", "FAILED")
        assert job["JobState"] == "COMPLETED", log(folder, number)
        assert job["NodeList"] == "n1"
        assert int(job["Restarts"]) >= 1
    finally:
        cluster.call("scontrol", "update", "NodeName=n2", "State=RESUME", check=False)  # it may have come back already
    summary, steps = read_json(folder / "summary.json"), [row["trainer/step"] for row in read_rows(folder)]
    assert summary["world_size"] == 1
    assert steps == sorted(set(steps))
    assert summary["prune/sparsity"] == pytest.approx(0.9, abs=1e-4)
