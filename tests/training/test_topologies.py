"""Runs through the launcher, sharded and replicated, that go on with as many ranks and with others."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from distprune.training.checkpoint import Checkpoints
from tests.jobs import read_json, read_rows
from tests.training.damage import damages
from tests.training.runs import reached, whole

pytestmark = pytest.mark.slow


def stop_at(start, folder, step, processes, *overrides, **how):
    _, output = start(processes, *overrides, send=signal.SIGTERM, once=reached(folder, step), **how)
    assert read_json(folder / "status.json")["state"] == "preempted", output
    assert 'Traceback (most recent call last):\n  File "/work' not in output


def test_three_ranks_go_on_to_the_same_bytes(tmp_path, start):
    code, output = start(3, "run.dir=undisturbed")
    assert code == 0, output
    folder = tmp_path / "run"
    stop_at(start, folder, 60, 3, "run.dir=run")
    stop_at(start, folder, 350, 3, "run.dir=run")
    code, output = start(3, "run.dir=run")
    assert code == 0, output
    assert whole(folder) == whole(tmp_path / "undisturbed")


def test_a_run_goes_on_through_any_topology(tmp_path, start):
    job = ("model={name: lenet300, args: {in_features: 64}}", "train.batch_size=50")  # no statistics of a rank's batch
    code, output = start(0, *job, "run.dir=undisturbed")
    assert code == 0, output
    folder = tmp_path / "run"
    stop_at(start, folder, 60, 2, *job, "run.dir=run")
    check_damaged(folder)
    stop_at(start, folder, 320, 2, *job, "run.dir=run", "distill.sharded=true", launcher="fsdp2")
    check_damaged(folder)
    stop_at(start, folder, 430, 0, *job, "run.dir=run")
    stop_at(start, folder, 540, 3, *job, "run.dir=run", launcher="fsdp2")
    code, output = start(3, *job, "run.dir=run")
    assert code == 0, output
    summary = read_json(folder / "summary.json")
    assert summary["world_size"] == 3
    assert summary["prune/zeros"] == round(0.9 * summary["prune/weights"])
    ours, theirs = read_rows(folder), read_rows(tmp_path / "undisturbed")
    assert [row["trainer/step"] for row in ours] == [row["trainer/step"] for row in theirs]
    assert summary["eval/top1"] > 90
    for a, b in zip(ours, theirs, strict=True):
        if "train/loss" in a and a["trainer/step"] <= 280:  # before the first weight that is pruned in one of them only
            assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-3), a["trainer/step"]
            assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-2), a["trainer/step"]


def check_damaged(folder):
    """Whatever is damaged in the newest checkpoint, the one before it is taken."""
    checkpoints = Checkpoints(folder / "checkpoints", keep=2, group=None)
    newest, before = sorted((folder / "checkpoints").glob("step-*"))[:-3:-1]
    assert len(list(newest.glob("shard-*"))) == 2
    for what in damages(newest, flips=3):
        assert checkpoints.newest().path == before, what
    assert checkpoints.newest().path == newest


@pytest.mark.parametrize(
    ("launcher", "processes", "overrides"),
    [
        ("fsdp2", 2, ["train.clip_norm=1.0", "train.accumulate=2", "checkpoint.background=true", "eval.every=70"]),
        pytest.param(
            "hsdp",
            4,
            ["run.precision=bf16", "distill.sharded=true", "integrity.every=50", "train.accumulate=2"],
            marks=pytest.mark.soak,
        ),
    ],
)
def test_a_sharded_run_is_stopped_and_goes_on_to_the_same_bytes(tmp_path, start, launcher, processes, overrides):
    overrides = [*overrides, "phases.dense.epochs=6", "phases.prune.epochs=6", "phases.finetune.epochs=6"]
    code, output = start(processes, "run.dir=undisturbed", *overrides, launcher=launcher)
    assert code == 0, output
    folder = tmp_path / "run"
    stop_at(start, folder, 200, processes, "run.dir=run", *overrides, launcher=launcher)
    code, output = start(processes, "run.dir=run", *overrides, launcher=launcher)
    assert code == 0, output
    assert whole(folder) == whole(tmp_path / "undisturbed")
    summary, weights = read_json(folder / "summary.json"), load_file(folder / "model.safetensors")
    assert summary["eval/top1"] > 90
    zeros = sum(int((weights[name] == 0).sum()) for name in summary["prune/layers"])
    assert zeros == summary["prune/zeros"] == round(0.9 * summary["prune/weights"])
    assert summary["params/nonzero"] == sum(int(torch.count_nonzero(weights[n])) for n in trained(weights))


def trained(weights):
    return [name for name in weights if "running" not in name and "num_batches" not in name]


def test_sharded_and_compiled(tmp_path, start):
    code, output = start(2, "run.dir=run", "run.compile=true", "train.clip_norm=1.0", launcher="fsdp2", timeout=400)
    assert code == 0, output
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["prune/zeros"] == round(0.9 * summary["prune/weights"])
    assert summary["eval/top1"] > 90


def test_what_cannot_be_sharded_is_refused(start):
    code, output = start(1, "run.dir=run", launcher="fsdp2")
    assert "FSDP shards a model over several processes, but there is one" in output
    code, output = start(2, "run.dir=run", launcher="hsdp")
    assert "2 replicas of 2 shards, but there are 2 processes; set --num_processes 4" in output
    assert "/distprune/" not in output, "a traceback of ours"
    code, output = start(2, "run.dir=run", "model.channels_last=true", launcher="fsdp2")
    assert "model.channels_last: FSDP takes contiguous weights only" in output
    code, output = start(0, "run.dir=run", "distill.sharded=true")
    assert code == 2
    assert "distill.sharded" in output
