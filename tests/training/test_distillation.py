"""Runs that match features, on two ranks, replicated and sharded."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs import read_rows
from tests.training.runs import reached, whole

pytestmark = pytest.mark.slow

FEATURES = (
    "distill.features=[{student: '2', teacher: '5'}, {student: '6', teacher: '6', loss: cosine, weight: 0.5}]",
    "distill.alpha={begin: 0.9, end: 0.5}",
    "distill.temperature={begin: 4, end: 2, shape: cosine}",
)
# Without batch norm, whose statistics are those of a rank's own part of the batch.
LINEAR = (
    "model={name: lenet300, args: {in_features: 64}}",
    "train.batch_size=50",
    "prune.sparsity=0.0",
    "phases.dense.epochs=1",
    "phases.prune.epochs=2",
    "phases.finetune.epochs=0",
    "distill.features=[{student: '1', teacher: '3', weight: 3.0}]",
    "optimizer={name: adamw}",
    "run.log_every=4",
    "phases.dense.lr=0.001",
    "phases.prune.lr=0.001",
)


def projections(folder):
    """What the newest checkpoint holds of the projections and of the state of their optimizer."""
    newest = max((folder / "checkpoints").glob("step-*"))
    return [
        {name: value for name, value in load_file(shard).items() if "distill." in name}
        for shard in sorted(newest.glob("shard-*"))
    ]


def test_a_killed_run_goes_on_to_the_same_bytes_of_model_and_projections(tmp_path, start):
    job = (*FEATURES, "train.accumulate=2", "phases.dense.epochs=6", "phases.prune.epochs=6")
    code, output = start(2, "run.dir=undisturbed", *job)
    assert code == 0, output
    folder = tmp_path / "run"
    start(2, "run.dir=run", *job, send=signal.SIGKILL, once=reached(folder, 250), everyone=True)
    code, output = start(2, "run.dir=run", *job)
    assert code == 0, output
    assert "going on from step" in output
    assert whole(folder) == whole(tmp_path / "undisturbed")
    ours, theirs = (projections(tmp_path / name) for name in ("run", "undisturbed"))
    assert sum(len(shard) for shard in ours) == 4, "weight and bias of one projection, and their momentum"
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    rows = [row for row in read_rows(folder) if "train/loss_feature" in row]
    assert rows[0]["train/loss_feature"] > rows[-1]["train/loss_feature"]
    assert 0.9 > rows[0]["train/kd_alpha"] > rows[-1]["train/kd_alpha"] > 0.5
    assert not any("distill" in name for name in load_file(folder / "model.safetensors"))


def test_projections_learn_the_same_on_any_number_of_ranks_and_shards(tmp_path, start):
    code, output = start(0, *LINEAR, "run.dir=alone")
    assert code == 0, output
    alone = [row for row in read_rows(tmp_path / "alone") if "train/loss_feature" in row]
    assert alone[-1]["train/loss_feature"] < 0.5 * alone[0]["train/loss_feature"]
    for launcher in ("cpu", "fsdp2"):
        folder = tmp_path / launcher
        code, output = start(2, *LINEAR, "train.accumulate=2", f"run.dir={launcher}", launcher=launcher)
        assert code == 0, output
        rows = [row for row in read_rows(folder) if "train/loss_feature" in row]
        assert [row["trainer/step"] for row in rows] == [row["trainer/step"] for row in alone]
        for ours, theirs in zip(rows, alone, strict=True):
            for name in ("train/loss_feature", "train/loss_kd"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (launcher, ours["trainer/step"])
    shapes = [shard["distill.0.weight"].shape for shard in projections(folder)]
    assert shapes == [(50, 300), (50, 300)], "each rank of FSDP2 holds half of the rows"


@pytest.mark.soak
def test_a_sharded_run_is_stopped_and_goes_on_to_the_same_bytes(tmp_path, start):
    job = (*FEATURES, "phases.dense.epochs=4", "phases.prune.epochs=6", "phases.finetune.epochs=4")
    code, output = start(2, "run.dir=undisturbed", *job, launcher="fsdp2")
    assert code == 0, output
    folder = tmp_path / "run"
    start(2, "run.dir=run", *job, send=signal.SIGTERM, once=reached(folder, 150), launcher="fsdp2")
    code, output = start(2, "run.dir=run", *job, launcher="fsdp2")
    assert code == 0, output
    assert whole(folder) == whole(tmp_path / "undisturbed")
    for a, b in zip(projections(folder), projections(tmp_path / "undisturbed"), strict=True):
        assert a
        assert all(torch.equal(a[name], b[name]) for name in a)
