"""Runs that are stopped go on with the same command and end as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from distprune.training.checkpoint import CheckpointError, Checkpoints
from tests.jobs import DIGITS, ROOT, SHORT, read_json, read_rows

JOB = (*SHORT, "phases.dense.epochs=6", "checkpoint.every=20", "model.args={width: 8}", "model.channels_last=true")
TIMES = {"train/samples_per_s", "prune/update_ms"}


def command(processes, *overrides):
    program = [sys.executable, "-m"]
    if processes > 1:
        program += ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(ROOT / "launch" / "cpu.yaml")]
        program += ["--num_processes", str(processes), "-m"]
    return [*program, "distprune.train", str(DIGITS), *JOB, *overrides]


def whole(folder):
    """What must not depend on stops: weights, masks, and every logged figure but times."""
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in read_rows(folder)]
    return (folder / "model.safetensors").read_bytes(), (folder / "masks.safetensors").read_bytes(), rows


@pytest.fixture
def start(tmp_path, environment):
    """Run to the end, or until `until` is logged or saved; the exit code."""

    def run(processes, *overrides, send=None, once=None):
        running = subprocess.Popen(
            command(processes, *overrides),
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        if once is not None:
            deadline = time.monotonic() + 120
            while not once() and running.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            if running.poll() is None:
                os.killpg(running.pid, send) if send == signal.SIGKILL else running.send_signal(send)
        output, _ = running.communicate(timeout=200)
        return running.returncode, output

    return run


def reached(folder, step):
    """Whether a step has been logged."""

    def look():
        path = folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return bool(lines) and json.loads(lines[-1])["trainer/step"] >= step

    return look


def test_stops_at_any_place_leave_no_trace(tmp_path, start):
    code, output = start(1, "run.dir=undisturbed")
    assert code == 0, output
    folder = tmp_path / "stopped"
    for step, number, expected in (
        (30, signal.SIGTERM, 75),
        (100, signal.SIGKILL, -signal.SIGKILL),
        (150, signal.SIGUSR1, 75),
        (170, signal.SIGINT, 75),
    ):
        code, output = start(1, "run.dir=stopped", send=number, once=reached(folder, step))
        assert code == expected, output
        if expected == 75:
            status = read_json(folder / "status.json")
            assert status["state"] == "preempted"
            assert "a signal" in status["error"]
            assert "Traceback" not in output
    code, output = start(1, "run.dir=stopped")
    assert code == 0, output
    assert "going on from step" in output
    assert whole(folder) == whole(tmp_path / "undisturbed")
    assert read_json(folder / "status.json")["state"] == "done"


def test_a_stop_file_and_a_time_budget_stop_too(tmp_path, start):
    folder = tmp_path / "run"
    code, output = start(1, "run.dir=run", "run.max_minutes=0.0001")
    assert code == 75, output
    assert "run.max_minutes" in read_json(folder / "status.json")["error"]
    (folder / "stop").touch()
    code, output = start(1, "run.dir=run", send=signal.SIGCONT, once=reached(folder, 40))
    assert code == 0, output
    assert not (folder / "stop").exists()


def test_another_job_in_the_folder_is_refused(tmp_path, start):
    code, _ = start(1, "run.dir=run", "run.max_minutes=0.0001")
    assert code == 75
    code, output = start(1, "run.dir=run", "prune.sparsity=0.5", "run.seed=3", "run.log_every=5")
    assert code == 2
    assert "prune.sparsity: was 0.9 when the run in run began, now 0.5" in output
    assert "run.seed" in output
    assert "run.log_every" not in output


def test_damaged_checkpoints_are_passed_over(tmp_path, start):
    code, output = start(1, "run.dir=undisturbed")
    assert code == 0, output
    code, output = start(1, "run.dir=run", send=signal.SIGTERM, once=reached(tmp_path / "run", 60))
    assert code == 75, output
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 2
    newest = checkpoints[-1]
    for name in ("state.json", "manifest.json", "shard-00001-model-00001-of-00001.safetensors"):
        content = (newest / name).read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        for damage in (b"", content[: len(content) // 2], bytes(flipped), None):
            (newest / name).write_bytes(damage) if damage is not None else (newest / name).unlink()
            found = Checkpoints(newest.parent, 0, 1, 2).newest()
            assert found is not None, (name, damage)
            assert found.path == checkpoints[0], name
        (newest / name).write_bytes(content)
    (newest / "state.json").write_bytes(b"{}")
    code, output = start(1, "run.dir=run")
    assert code == 0, output
    assert "is damaged and is passed over" in output
    assert "Traceback" not in output
    assert whole(tmp_path / "run") == whole(tmp_path / "undisturbed")


def test_a_failed_save_leaves_earlier_checkpoints_whole(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 0, 1, keep=2)
    tensors = {"w": torch.arange(6.0)}
    checkpoints.save(1, tensors, {"step": 1})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("torch.distributed.checkpoint.hf_storage.HuggingFaceStorageWriter.write_data", full)
        with pytest.raises(CheckpointError, match=r"step 2.*No space left"):
            checkpoints.save(2, tensors, {"step": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    found = checkpoints.newest()
    assert found.step == 1
    into = {"w": torch.zeros(6)}
    checkpoints.load(found, into)
    assert torch.equal(into["w"], torch.arange(6.0))


def test_the_newest_and_the_spared_are_kept_and_later_ones_that_were_passed_over_are_not(tmp_path):
    checkpoints = Checkpoints(tmp_path, 0, 1, keep=2)
    for step in (1, 2, 3, 9):
        checkpoints.save(step, {"w": torch.zeros(1)}, {"step": step}, spared=[1])
    (tmp_path / "step-00000009" / "state.json").write_text("")
    assert checkpoints.newest().step == 3
    for step in (4, 5):
        checkpoints.save(step, {"w": torch.zeros(1)}, {"step": step}, spared=[1])
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000001", "step-00000004", "step-00000005"]
    assert (tmp_path / "latest").read_text() == "step-00000005\n"


@pytest.mark.slow
def test_two_ranks_go_on_with_two_and_with_three(tmp_path, start):
    code, output = start(2, "run.dir=undisturbed")
    assert code == 0, output
    folder = tmp_path / "run"
    code, output = start(2, "run.dir=run", send=signal.SIGTERM, once=reached(folder, 50))
    assert read_json(folder / "status.json")["state"] == "preempted", output
    code, output = start(2, "run.dir=run", send=signal.SIGKILL, once=reached(folder, 150))
    code, output = start(2, "run.dir=run")
    assert code == 0, output
    assert whole(folder) == whole(tmp_path / "undisturbed")

    other = tmp_path / "other"
    code, output = start(2, "run.dir=other", send=signal.SIGTERM, once=reached(other, 150))
    assert read_json(other / "status.json")["state"] == "preempted", output
    code, output = start(3, "run.dir=other")
    assert code == 0, output
    summary = read_json(other / "summary.json")
    assert summary["world_size"] == 3
    assert summary["prune/zeros"] == round(0.9 * summary["prune/weights"])
    assert [row["trainer/step"] for row in read_rows(other)] == [row["trainer/step"] for row in read_rows(folder)]
