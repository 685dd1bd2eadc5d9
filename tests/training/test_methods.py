"""Runs with other scores, allocations and schedules than the default, stopped and sharded."""

import signal

import pytest

from tests.jobs import read_json
from tests.training.runs import reached, whole

MOVEMENT = (
    "prune.score=movement",
    "prune.allocation=erk",
    "prune.schedule=linear",
    "prune.bounds={last: {max: 0.6}}",
    "checkpoint.every=30",
)
TAYLOR = (
    "prune.score=taylor",
    "prune.schedule=exponential",
    "prune.every=7",
    "checkpoint.every=30",
)
BLOCKS = (
    "prune.pattern=2x4",
    "prune.every=7",
    "checkpoint.every=30",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "job"),
    [("cpu", MOVEMENT), ("fsdp2", TAYLOR), pytest.param("fsdp2", BLOCKS, marks=pytest.mark.soak)],
    ids=["movement, ddp", "taylor, fsdp2", "blocks, fsdp2"],
)
def test_a_killed_run_goes_on_to_the_same_bytes_whatever_it_prunes_by(tmp_path, start, launcher, job):
    code, output = start(2, "run.dir=undisturbed", *job, launcher=launcher)
    assert code == 0, output
    folder = tmp_path / "run"
    start(2, "run.dir=run", *job, send=signal.SIGKILL, once=reached(folder, 380), everyone=True, launcher=launcher)
    code, output = start(2, "run.dir=run", *job, launcher=launcher)
    assert code == 0, output
    assert "going on from step" in output
    assert whole(folder) == whole(tmp_path / "undisturbed")
    summary = read_json(folder / "summary.json")
    block = 8 if job is BLOCKS else 1
    assert 0 <= round(0.9 * summary["prune/weights"]) - summary["prune/zeros"] < block
    assert summary["prune/zeros"] % block == 0
    if job is MOVEMENT:
        *_, last = summary["prune/layers"].values()
        assert last["sparsity"] <= 0.6


@pytest.mark.slow
def test_a_run_on_reordered_channels_that_is_killed_goes_on_to_the_same_bytes(tmp_path, start):
    code, output = start(
        1, "run.dir=dense", "prune.sparsity=0", "phases.prune={}", "phases.finetune={}", "distill=null"
    )
    assert code == 0, output
    job = (
        "model.weights=dense/model.safetensors", "phases.dense={}", "prune.pattern='2:4'", "prune.sparsity=0.5",
        "prune.permute=true", "checkpoint.every=30",
    )  # fmt: skip
    code, output = start(2, "run.dir=undisturbed", *job, launcher="fsdp2")
    assert code == 0, output
    assert "chains of channels are in another order" in output
    folder = tmp_path / "run"
    start(2, "run.dir=run", *job, send=signal.SIGKILL, once=reached(folder, 100), everyone=True, launcher="fsdp2")
    code, output = start(2, "run.dir=run", *job, launcher="fsdp2")
    assert code == 0, output
    assert "going on from step" in output
    assert whole(folder) == whole(tmp_path / "undisturbed")
