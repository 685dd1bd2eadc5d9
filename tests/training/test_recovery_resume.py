"""Runs killed inside a round, and inside a guard's retry, go on to the same bytes."""

import signal

import pytest

from tests.jobs import read_json
from tests.training.runs import reached, whole

pytestmark = pytest.mark.slow

# Rounds of 88 steps behind a dense phase of 220, so sparse at the end that the guard cannot let that pass.
GUARDED = (
    "phases.prune={}",
    "prune.sparsity=0.995",
    "prune.rounds.count=2",
    "prune.guard={max_drop: 6.0, min_step: 0.4, set: held}",
    "eval.sets={held: 'train[1200:]'}",
    "checkpoint.every=30",
    "distill.alpha={begin: 0.9, end: 0.5}",
)
FINETUNE = (*GUARDED, "phases.finetune={epochs: 4, lr: 0.01}")
REWIND = (*GUARDED, "phases.finetune={}", "prune.rounds.rewind_to={epochs: 6}")
DENSE, ROUND = 220, 88


@pytest.mark.parametrize(
    ("processes", "launcher", "job"),
    [
        (0, "cpu", (*FINETUNE, "optimizer={name: adamw}", "phases.dense.lr=0.01", "prune.score=movement")),
        (2, "cpu", (*REWIND, "prune.rounds.recovery=rewind_weights", "checkpoint.background=true")),
        pytest.param(
            2,
            "fsdp2",
            (
                *REWIND,
                "prune.rounds.recovery=rewind_lr",
                "distill.features=[{student: '8', teacher: '8'}]",
                "prune.allocation=erk",
            ),
            marks=pytest.mark.soak,
        ),
    ],
    ids=["one process", "ddp", "fsdp2"],
)
def test_a_run_killed_in_a_round_and_in_a_retry_goes_on_to_the_same_bytes(tmp_path, start, processes, launcher, job):
    code, output = start(processes, "run.dir=undisturbed", *job, launcher=launcher)
    assert code == 0, output
    expected = read_json(tmp_path / "undisturbed" / "summary.json")
    outcomes = expected["prune/rounds"]
    retry = next(i for i, outcome in enumerate(outcomes) if not outcome["accepted"]) + 1
    assert retry < len(outcomes), "a round was tried again"
    folder = tmp_path / "run"
    # Behind a checkpoint within the first round; in the retry before the first of its own, so that the rolling back
    # is done again, and behind that; and in the last evaluation or just before it.
    begin = DENSE + retry * ROUND
    for step in (DENSE + 50, begin + 10, begin + 50, DENSE + len(outcomes) * ROUND - 5):
        start(
            processes,
            "run.dir=run",
            *job,
            send=signal.SIGKILL,
            once=reached(folder, step),
            everyone=True,
            launcher=launcher,
        )
        assert read_json(folder / "status.json")["state"] == "running"
    code, output = start(processes, "run.dir=run", *job, launcher=launcher)
    assert code == 0, output
    assert "going on from step" in output
    assert whole(folder) == whole(tmp_path / "undisturbed")
    summary = read_json(folder / "summary.json")
    for key in ("prune/rounds", "mask_digest", "eval/top1", "eval/held/top1", "prune/zeros", "steps"):
        assert summary[key] == expected[key]
    assert summary["dense/held/top1"] - summary["eval/held/top1"] <= 6.0
