"""Rounds of iterative pruning in the main job: recovered, judged, rolled back and rewound."""

import hashlib
import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from distprune.cli import main as command
from distprune.config.schema import Guard
from distprune.pruning import RoundsSchedule
from distprune.train import main
from distprune.training.evaluation import EvalResult
from distprune.training.phases import Rounds
from distprune.training.recovery import Recovery
from distprune.training.run_state import RunState
from tests.jobs import DIGITS, SHORT, read_json, read_rows

ROUNDS = (*SHORT, "phases.prune={}", "model.args={width: 8}", "prune.rounds.count=3")
REWOUND = (*ROUNDS, "phases.finetune={}", "prune.rounds.rewind_to={steps: 20}")
DENSE = 66
# At 99 % less than 100 weights are left; no guard lets that pass.
GUARDED = (*ROUNDS, "prune.sparsity=0.99", "prune.guard={max_drop: 5.0, min_step: 0.3}", "phases.finetune={epochs: 2}")


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)


def run(*overrides):
    assert main([str(DIGITS), "run.dir=run", *overrides]) == 0
    return read_rows("run"), read_json("run/summary.json")


def test_each_round_prunes_its_share_and_trains_the_phase_anew():
    rows, summary = run(*ROUNDS, "run.log_every=11", "phases.finetune={epochs: 1, lr: 0.02}")
    weights, updates = summary["prune/weights"], [row for row in rows if "prune/newly_pruned" in row]
    assert [row["trainer/step"] for row in updates] == [DENSE, DENSE + 22, DENSE + 44]
    levels = [1 - 0.1 ** (number / 3) for number in (1, 2)] + [0.9]
    assert [row["prune/sparsity"] for row in updates] == [round(level * weights) / weights for level in levels]
    rates = {row["trainer/step"]: row["train/lr"] for row in rows if "train/lr" in row}
    assert len({rates[DENSE + 22 * number + 11] for number in range(3)}) == 1
    assert rates[DENSE + 11] != rates[DENSE + 22]
    judged = [row for row in rows if "prune/round" in row]
    assert [row["prune/round"] for row in judged] == [1, 2, 3]
    # A row of an evaluation says nothing of the pruning that follows it.
    assert all("eval/top1" in row and "prune/sparsity" not in row for row in judged)
    assert summary["steps"] == DENSE + 66
    assert [outcome["top1"] for outcome in summary["prune/rounds"]] == [row["eval/top1"] for row in judged]
    assert summary["eval/top1"] == judged[-1]["eval/top1"]


def tensors_of(folder, kind):
    found = {}
    for shard in folder.glob("shard-*"):
        found |= load_file(shard)
    return {name: value for name, value in found.items() if name.startswith(kind)}


@pytest.mark.parametrize("optimizer", ["{name: sgd, momentum: 0.9}", "{name: adamw}"])
def test_rewound_weights_and_optimizer_state_are_those_of_the_step_under_the_masks_of_now(
    tmp_path, monkeypatch, optimizer
):
    seen = []

    def rewind(state, mark, original=RunState.rewind):
        masks = {name: mask.clone() for name, mask in state._pruner.masks.items()}
        step = state._pruner.steps_done
        original(state, mark)
        (saved,) = (tmp_path / "run" / "checkpoints").glob("step-00000020")
        for name, value in tensors_of(saved, "model.").items():
            name = name.removeprefix("model.")
            assert torch.equal(
                state._model.state_dict()[name], value * masks.get(name, torch.tensor(1)).to(value.dtype)
            )
        for name, parameter in state._model.named_parameters():
            for kind, value in state._optimizer.state[parameter].items():
                early = tensors_of(saved, f"optimizer.{name}.{kind}")[f"optimizer.{name}.{kind}"]
                mask = masks[name].float() if name in masks and value.dim() else torch.tensor(1.0)
                assert torch.equal(value, early * mask), (name, kind)
        assert all(torch.equal(state._pruner.masks[name], mask) for name, mask in masks.items())
        assert state._pruner.steps_done == step
        seen.append(state._pruner.zeros)

    monkeypatch.setattr(RunState, "rewind", rewind)
    _, summary = run(*REWOUND, "prune.rounds.recovery=rewind_weights", f"optimizer={optimizer}")
    assert seen == [round(level * summary["prune/weights"]) for level in (1 - 0.1 ** (1 / 3), 1 - 0.1 ** (2 / 3), 0.9)]
    assert summary["steps"] == DENSE + 3 * (DENSE - 20)


def test_learning_rates_are_rewound_without_the_weights():
    rows, summary = run(*REWOUND, "prune.rounds.recovery=rewind_lr", "run.log_every=1")
    rates = {row["trainer/step"]: row["train/lr"] for row in rows if "train/lr" in row}
    dense = [rates[step] for step in range(21, DENSE + 1)]
    for number in range(3):
        begin = DENSE + number * len(dense)
        assert [rates[begin + step] for step in range(1, len(dense) + 1)] == dense
    assert summary["prune/zeros"] == round(0.9 * summary["prune/weights"])


def test_a_round_outside_the_guard_is_rolled_back_wholly_and_the_sparsest_model_within_is_left(tmp_path, monkeypatch):
    back = []

    def roll_back(state, mark, original=RunState.roll_back):
        original(state, mark)
        folder = tmp_path / "run" / "checkpoints"
        saved = folder / (folder / mark).read_text().strip()
        for name, value in tensors_of(saved, "model.").items():
            assert torch.equal(state._model.state_dict()[name.removeprefix("model.")], value)
        for name, parameter in state._model.named_parameters():
            for kind, value in state._optimizer.state[parameter].items():
                assert torch.equal(value, tensors_of(saved, "optimizer.")[f"optimizer.{name}.{kind}"])
        assert state._pruner.zeros == read_json(saved / "state.json")["zeros"]
        assert state._pruner.mask_digest == read_json(saved / "state.json")["mask_digest"]
        back.append(state._pruner.zeros)

    monkeypatch.setattr(RunState, "roll_back", roll_back)
    rows, summary = run(*GUARDED)
    outcomes = summary["prune/rounds"]
    assert not outcomes[-1]["accepted"]
    refused = [outcome for outcome in outcomes if not outcome["accepted"]]
    assert len(back) == len(refused) >= 1
    for outcome in outcomes:
        assert outcome["accepted"] == (outcome["drop"] <= 5.0)
        assert outcome["drop"] == pytest.approx(summary["dense/top1"] - outcome["top1"])
    best = max((o for o in outcomes if o["accepted"]), key=lambda o: o["sparsity"], default=None)
    sparsity, top1 = (best["sparsity"], best["top1"]) if best else (0.0, summary["dense/top1"])
    assert summary["prune/zeros"] == round(sparsity * summary["prune/weights"])
    assert summary["prune/sparsity"] == sparsity
    assert summary["eval/top1"] == top1, "evaluated again"
    assert summary["eval/top1_drop"] <= 5.0
    assert rows[-1]["eval/top1"] == top1
    judged = [row for row in rows if "guard/drop" in row]
    assert [row["guard/accepted"] for row in judged] == [outcome["accepted"] for outcome in outcomes]
    assert not (tmp_path / "run" / "checkpoints" / "best").exists(), "what is best of the final sparsity is not known"


def test_with_nothing_within_the_guard_the_dense_model_is_left(capsys):
    _, summary = run(*GUARDED, "prune.guard.max_drop=0", "prune.sparsity=0.999", "prune.rounds.count=1")
    assert summary["prune/zeros"] == 0
    assert summary["eval/top1"] == summary["dense/top1"]
    told = capsys.readouterr().err
    assert "a smaller step would be below min_step" in told
    assert "no round was within prune.guard: the model is dense" in told


def test_given_weights_are_guarded_from_the_first_step(tmp_path):
    run(*SHORT, "phases.prune={}", "phases.finetune={}", "prune.sparsity=0", "model.args={width: 8}")
    shutil.move("run", "dense")
    words = (*GUARDED, "phases.dense={}", "model.weights=dense/model.safetensors", "eval.sets={held: 'train[1000:]'}")
    rows, summary = run(*words, "prune.guard.set=held", "prune.guard.max_drop=8.0")
    assert rows[0]["trainer/step"] == 0
    assert rows[0]["eval/held/top1"] == summary["dense/held/top1"]
    assert summary["dense/held/top1"] - summary["eval/held/top1"] <= 8.0
    for outcome in summary["prune/rounds"]:
        assert outcome["drop"] == pytest.approx(summary["dense/held/top1"] - outcome["top1"])


def test_named_sets_are_evaluated_wherever_the_model_is(capsys):
    rows, summary = run(*SHORT, "eval.sets={half: 'test[:180]', other-half: 'test[180:]'}", "model.args={width: 8}")
    for row in rows:
        if "eval/top1" in row:
            assert row["eval/top1"] == pytest.approx((row["eval/half/top1"] + row["eval/other-half/top1"]) / 2)
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert command(["evaluate", "run"]) == 0
    told = json.loads(capsys.readouterr().out)
    for name in ("eval/top1", "eval/half/top1", "eval/other-half/top1"):
        assert told[name] == summary[name]
    assert summary["dense/half/top1"] <= 100


def test_a_checkpoint_that_is_needed_and_gone_ends_the_run_with_its_name(monkeypatch, capsys):
    def rewind(state, mark, original=RunState.rewind):
        shutil.rmtree("run/checkpoints/step-00000020")
        original(state, mark)

    monkeypatch.setattr(RunState, "rewind", rewind)
    assert main([str(DIGITS), "run.dir=run", *REWOUND, "prune.rounds.recovery=rewind_weights"]) == 1
    assert "step-00000020, to which the run must go back, is missing or damaged" in capsys.readouterr().err


def test_the_guard_counts_samples():
    schedule = RoundsSchedule(final=0.9, begin=0, every=1, rounds=4)
    recovery = Recovery(Rounds(schedule, None, "", 0, False), Guard(max_drop=0.1), None)
    dense = EvalResult(91.73, 0.3, 10000)
    for correct, within in ((9163, True), (9162, False), (9173, True), (9300, True)):
        figures = recovery.judge(
            recovery.ends_at(len(recovery.outcomes) + 1), 0.5, dense, EvalResult(correct / 100, 0.3, 10000)
        )
        assert figures["guard/accepted"] == within
    assert schedule.outcomes == (True, False, True, True)
    again = RoundsSchedule(final=0.9, begin=0, every=1, rounds=4)
    resumed = Recovery(Rounds(again, None, "", 0, False), Guard(max_drop=0.1), None)
    resumed.resume(json.loads(json.dumps(recovery.state())))
    assert again.attempts == schedule.attempts
    assert resumed.outcomes == recovery.outcomes


@pytest.mark.parametrize(("samples", "allowed"), [(5000, 1.14), (5000, 2.26), (10000, 0.1), (360, 5.0)])
def test_exactly_what_may_be_lost_may_be_lost(samples, allowed):
    lost = round(allowed * samples / 100)
    for more, within in ((0, True), (1, False)):
        schedule = RoundsSchedule(final=0.9, begin=0, every=1, rounds=1)
        recovery = Recovery(Rounds(schedule, None, "", 0, False), Guard(max_drop=allowed), None)
        dense, now = (EvalResult(100 * (samples - wrong) / samples, 0.3, samples) for wrong in (7, 7 + lost + more))
        assert recovery.judge(recovery.ends_at(1), 0.5, dense, now)["guard/accepted"] == within


def test_a_checkpoint_that_an_older_one_may_go_back_to_is_kept(tmp_path):
    run(*GUARDED, "checkpoint.every=20", "prune.sparsity=0.9", "prune.guard.max_drop=100")
    folder = tmp_path / "run" / "checkpoints"
    kept = {path.name for path in folder.glob("step-*")}
    for name in kept:
        marks = read_json(folder / name / "state.json")["marks"]
        newer = sorted(kept)[-3:]
        if name in newer:
            assert {f"step-{step:08d}" for step in marks.values()} <= kept, name


def test_a_start_passes_over_a_checkpoint_whose_way_back_is_gone(tmp_path, capsys):
    words = (*REWOUND, "prune.rounds.recovery=rewind_weights", "checkpoint.keep=9", "checkpoint.every=10")
    run(*words)
    status, folder = read_json("run/status.json"), tmp_path / "run" / "checkpoints"
    (tmp_path / "run" / "status.json").write_text(json.dumps({**status, "state": "preempted"}))
    shutil.rmtree(folder / "step-00000020")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(DIGITS), "run.dir=run", *words]) == 1
    assert "none of the checkpoints" in capsys.readouterr().err


def test_a_checkpoint_of_another_version_is_refused(tmp_path, capsys):
    run(*ROUNDS)
    newest = tmp_path / "run" / "checkpoints" / (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    state = json.dumps({**read_json(newest / "state.json"), "format": 1}, indent=2)
    (newest / "state.json").write_text(state)
    manifest = read_json(newest / "manifest.json")
    manifest["state.json"] = {"bytes": len(state), "sha256": hashlib.sha256(state.encode()).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest, indent=2))
    (tmp_path / "run" / "status.json").unlink()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(DIGITS), "run.dir=run", *ROUNDS]) == 2
    assert "written by another version of distprune" in capsys.readouterr().err


def test_a_guard_that_never_tries_again_is_warned_of(capsys):
    assert command(["plan", str(DIGITS), *GUARDED, "prune.guard.min_step=0.9"]) == 0
    assert "is not tried again" in " ".join(capsys.readouterr().out.split())
