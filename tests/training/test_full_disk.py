"""Folders that are full or read-only: the run goes on, and fails only after so many failed saves in a row."""

import errno
import os
import signal
import subprocess
import time
from contextlib import suppress

import pytest
from accelerate.state import AcceleratorState

from distprune.train import main
from distprune.training.checkpoint import Checkpoints
from distprune.training.run_folder import RunFolder
from tests.jobs import DIGITS, SHORT, read_json
from tests.training.runs import reached, when, whole


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts 20 MB of memory on a folder."""
    mounted = []

    def mount(folder):
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder):
    with suppress(OSError), (folder / "of somebody else").open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)


@pytest.fixture
def undisturbed(tmp_path, start):
    code, output = start(0, "run.dir=undisturbed")
    assert code == 0, output
    return whole(tmp_path / "undisturbed")


def test_a_checkpoint_folder_that_fills_up_does_not_end_the_run(tmp_path, start, small_disk, undisturbed):
    folder = tmp_path / "run"
    disk = small_disk(folder / "checkpoints")
    full = when(reached(folder, 100), lambda: fill(disk))
    code, output = start(0, "run.dir=run", "checkpoint.max_failures=1000", once=full, send=signal.SIGCONT)
    assert code == 0, output
    assert "No space left on device; earlier checkpoints are whole" in output
    assert read_json(folder / "status.json")["state"] == "done"
    assert whole(folder) == undisturbed
    assert Checkpoints(disk, 2, None).newest() is not None


def test_large_checkpoints_fill_the_folder_by_themselves(tmp_path, start, small_disk):
    disk = small_disk(tmp_path / "run" / "checkpoints")
    # 5.5 MB each: two, the first and the best at the final sparsity, and the one being written are more than 20 MB.
    large = ("model.args={width: 56}", "optimizer={name: adamw}", "phases.dense.lr=0.001", "phases.prune.lr=0.001")
    short = ("phases.dense.epochs=2", "phases.prune.epochs=2", "phases.finetune={epochs: 2, lr: 0.001}")
    code, output = start(0, "run.dir=run", *large, *short, "checkpoint.max_failures=1000")
    assert code == 0, output
    assert "No space left on device" in output
    assert Checkpoints(disk, 2, None).newest() is not None


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_after_so_many_failed_saves_the_run_ends_and_goes_on_when_there_is_room(
    tmp_path, start, small_disk, undisturbed, fault
):
    folder = tmp_path / "run"
    disk = small_disk(folder / "checkpoints")

    def remount(options):
        command = ["mount", "-o", f"remount,{options}", str(disk)]
        end = time.monotonic() + 30
        while subprocess.run(command, check=False, capture_output=True).returncode:  # busy while a file is written
            assert time.monotonic() < end, command
            time.sleep(0.001)

    harm = when(reached(folder, 100), (lambda: fill(disk)) if fault == "full" else (lambda: remount("ro")))
    code, output = start(0, "run.dir=run", once=harm, send=signal.SIGCONT)
    assert code == 1, output
    reason = "No space left on device" if fault == "full" else "Read-only file system"
    assert "3 checkpoints in a row have failed" in output
    assert reason in read_json(folder / "status.json")["error"]
    assert "Traceback" not in output
    if fault == "full":
        (disk / "of somebody else").unlink()
    else:
        remount("rw")
    code, output = start(0, "run.dir=run")
    assert code == 0, output
    assert "going on from step" in output
    assert whole(folder) == undisturbed


def test_figures_wait_while_the_run_folder_is_full(tmp_path, start, small_disk):
    often = ("distill=null", "run.log_every=1")  # what is left of a page that is begun takes some rows more
    code, output = start(0, "run.dir=undisturbed", *often)
    assert code == 0, output
    folder = small_disk(tmp_path / "run")

    def fill_for_a_while():
        fill(folder)
        time.sleep(0.4)
        (folder / "of somebody else").unlink()

    code, output = start(
        0,
        "run.dir=run",
        *often,
        "checkpoint.max_failures=1000",
        once=when(reached(folder, 300), fill_for_a_while),  # the dense model is kept by then
        send=signal.SIGCONT,
    )
    assert code == 0, output
    assert "metrics.jsonl: No space left on device; figures wait until it can be written" in output
    assert whole(folder) == whole(tmp_path / "undisturbed")


@pytest.mark.parametrize("teaches", [False, True])
def test_without_room_for_the_dense_model_the_run_goes_on_unless_it_teaches(tmp_path, monkeypatch, teaches):
    write = RunFolder.write_tensors

    def full(folder, name, *args):
        if name == "dense.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        write(folder, name, *args)

    monkeypatch.setattr(RunFolder, "write_tensors", full)
    AcceleratorState._reset_state(reset_partial_state=True)
    words = () if teaches else ("distill=null",)
    assert main([str(DIGITS), *SHORT, f"run.dir={tmp_path / 'run'}", *words]) == int(teaches)
    log = (tmp_path / "run" / "logs" / "rank-00000.log").read_text(encoding="utf-8")
    if teaches:
        assert "No space left on device: 'dense.safetensors'; make room, and the same command goes on" in log
    else:
        assert "in the end nothing can be compared with the dense model" in log
        assert read_json(tmp_path / "run" / "validation.json")["sets"]["eval"]["dense"] is None
