"""Runs that are stopped go on with the same command and end as if nothing had happened."""

import signal

from tests.jobs import read_json
from tests.training.runs import reached, whole


def test_stops_at_any_place_leave_no_trace(tmp_path, start):
    code, output = start(0, "run.dir=undisturbed", "model.channels_last=true")
    assert code == 0, output
    folder = tmp_path / "stopped"
    for step, number, expected in (
        (30, signal.SIGTERM, 75),
        (200, signal.SIGKILL, -signal.SIGKILL),
        (350, signal.SIGUSR1, 75),
        (500, signal.SIGINT, 75),
    ):
        now = {"send": number, "once": reached(folder, step)}
        code, output = start(0, "run.dir=stopped", "model.channels_last=true", **now)
        assert code == expected, output
        if expected == 75:
            status = read_json(folder / "status.json")
            assert status["state"] == "preempted"
            assert "a signal" in status["error"]
            assert "Traceback" not in output
    code, output = start(0, "run.dir=stopped", "model.channels_last=true")
    assert code == 0, output
    assert "going on from step" in output
    assert whole(folder) == whole(tmp_path / "undisturbed")
    assert read_json(folder / "status.json")["state"] == "done"


def test_a_stop_file_and_a_time_budget_stop_too(tmp_path, start):
    folder = tmp_path / "run"
    code, output = start(0, "run.dir=run", "run.max_minutes=0.0001")
    assert code == 75, output
    assert "run.max_minutes" in read_json(folder / "status.json")["error"]
    (folder / "stop").touch()
    code, output = start(0, "run.dir=run", send=signal.SIGCONT, once=reached(folder, 40))
    assert code == 0, output
    assert not (folder / "stop").exists()


def test_another_job_in_the_folder_is_refused(tmp_path, start):
    code, _ = start(0, "run.dir=run", "run.max_minutes=0.0001")
    assert code == 75
    code, output = start(0, "run.dir=run", "prune.sparsity=0.5", "run.seed=3", "run.log_every=5")
    assert code == 2
    assert "prune.sparsity: was 0.9 when the run in run began, now 0.5" in output
    assert "run.seed" in output
    assert "run.log_every" not in output
