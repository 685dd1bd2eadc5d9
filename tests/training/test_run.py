"""What a run logs, and that it does not depend on how it is cut up between processes and micro-batches."""

import math
import subprocess
import sys

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from distprune.cli import main as command
from distprune.train import main
from tests.jobs import DIGITS, SHORT, read_json, read_rows

# Without batch norm, whose statistics are those of a rank's own part of the batch.
LINEAR = (
    *SHORT,
    "model={name: lenet300, args: {in_features: 64}}",
    "train.batch_size=50",
    "data.eval_split=test[:100]",
)
METRICS = {
    "train/loss", "train/loss_ce", "train/loss_kd", "train/top1", "train/lr", "train/grad_norm", "train/samples_per_s",
    "prune/target_sparsity", "prune/sparsity", "prune/threshold", "prune/update_ms", "prune/newly_pruned",
    "prune/layer/1.weight", "eval/top1", "eval/loss", "trainer/step", "trainer/epoch",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)


def run(*overrides, name="run"):
    assert main([str(DIGITS), *LINEAR, f"run.dir={name}", *overrides]) == 0
    return read_rows(name)


def test_every_metric_is_logged_and_adds_up():
    rows = run()
    assert {name for row in rows for name in row} >= METRICS
    steps_per_epoch = 1437 // 50
    trained = [row for row in rows if "train/loss" in row]
    assert [row["trainer/step"] for row in trained] == [
        *range(10, 84, 10),
        84,
        *range(90, 168, 10),
        168,
        *range(170, 196, 10),
        196,
    ]
    for row in rows:
        assert row["trainer/epoch"] == row["trainer/step"] / steps_per_epoch
        if "train/loss_kd" in row:
            parts = 0.9 * row["train/loss_kd"] + 0.1 * row["train/loss_ce"]
            assert row["train/loss"] == pytest.approx(parts, rel=1e-4)
    evaluated = [row for row in rows if "eval/top1" in row]
    assert [row["trainer/step"] for row in evaluated] == [84, 168, 196]
    assert all(row["eval/top1"] == round(row["eval/top1"]) for row in evaluated), "100 images make whole percents"
    updates = [row for row in rows if "prune/sparsity" in row]
    assert [row["trainer/step"] for row in updates] == [*range(84, 168, 10), 168]
    assert [row["prune/sparsity"] for row in updates][-1] == round(0.9 * 50200) / 50200


def test_micro_batches_do_not_change_what_is_learnt():
    whole, cut = run(name="whole"), run("train.accumulate=3", name="cut")
    for a, b in zip(whole, cut, strict=True):
        if a["trainer/step"] <= 80 and "train/loss" in a:
            assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-3)
            assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-2)


def test_ranks_do_not_change_what_is_learnt(launch):
    alone = run("run.log_every=4", name="alone")
    ended = launch(3, DIGITS, *LINEAR, "run.log_every=4", "run.dir=three", "train.accumulate=2")
    assert ended.returncode == 0, ended.stderr
    three = read_rows("three")
    for a, b in zip(alone, three, strict=True):
        if a["trainer/step"] <= 80 and "train/loss" in a:
            assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-3)
    assert read_json("three/summary.json")["prune/zeros"] == round(0.9 * 50200)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    run(name="a")
    run(name="b")
    run("run.seed=1", name="c")
    a, b, c = ((read_json(f"{name}/summary.json")["mask_digest"]) for name in "abc")
    assert a == b != c


def test_a_gradient_norm_is_clipped_after_masking():
    rows = run("train.clip_norm=0.01", "optimizer={name: sgd, momentum: 0.0}", "phases.dense.lr=1.0")
    assert read_json("run/summary.json")["prune/sparsity"] == pytest.approx(0.9, abs=1e-5)
    first = next(row for row in rows if "train/loss" in row)
    free = next(
        row
        for row in run("optimizer={name: sgd, momentum: 0.0}", "phases.dense.lr=1.0", name="free")
        if "train/loss" in row
    )
    assert first["train/loss"] > free["train/loss"], "steps of 0.01 learn more slowly"


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer={name: adamw, fused: true}", "phases.dense.lr=0.001", "phases.prune.lr=0.001"),
        ("run.precision=bf16", "model={name: digits_cnn}", "model.channels_last=true", "train.label_smoothing=0.1"),
        ("data.storage=stream", "data.workers=2"),
        ("prune.include=[last]", "distill=null"),
        ("prune.schedule=oneshot", "phases.prune.epochs=0", "phases.finetune.epochs=3", "prune.allocation=uniform"),
        ("prune.schedule=cosine", "prune.allocation=lamp"),
        ("prune.schedule=polynomial", "prune.power=5.0", "prune.allocation={last: 0.5, '*': 0.908}"),
        ("prune.schedule=distprune:CubicSchedule", "prune.score=distprune.pruning:Taylor", "prune.allocation=erk"),
    ],
    ids=["adamw", "bf16", "stream", "last", "oneshot", "lamp", "table", "own"],
)
def test_settings_reach_the_target_sparsity(settings):
    run(*settings)
    summary = read_json("run/summary.json")
    assert summary["prune/zeros"] == round(0.9 * summary["prune/weights"])
    assert summary["eval/top1"] > 50


@pytest.mark.slow
def test_a_compiled_run_reaches_the_target_sparsity():
    run("run.compile=true", "model={name: digits_cnn}")
    assert read_json("run/summary.json")["prune/sparsity"] == pytest.approx(0.9, abs=1e-4)


def test_a_teacher_of_another_shape_comes_from_a_file():
    run(
        "prune.sparsity=0.0",
        "phases.prune.epochs=0",
        "distill=null",
        "model.name=digits_cnn",
        "model.args={width: 8}",
        name="teacher",
    )
    teacher = "{name: digits_cnn, args: {width: 8}, weights: teacher/model.safetensors}"
    rows = run(f"distill={{teacher: {teacher}, phases: [dense, prune, finetune]}}")
    assert all("train/loss_kd" in row for row in rows if "train/loss" in row)


def test_starting_from_weights_takes_them_as_teacher():
    run("prune.sparsity=0.0", "phases.prune.epochs=0", "distill=null", name="dense")
    rows = run("phases.dense.epochs=0", "model.weights=dense/model.safetensors")
    dense = read_json("dense/summary.json")["eval/top1"]
    assert rows[0]["trainer/step"] == 0
    assert rows[0]["eval/top1"] == dense == read_json("run/summary.json")["dense/top1"]


def test_the_dense_model_is_judged_and_taken_as_teacher_before_it_is_pruned():
    rows = run("prune.initial=0.8", "prune.length={steps: 0}", "phases.finetune.steps=0", "run.log_every=1")
    dense, first = (next(row for row in rows if row["trainer/step"] == step) for step in (84, 85))
    assert dense["prune/sparsity"] == pytest.approx(0.9, abs=1e-5)
    assert dense["eval/top1"] == read_json("run/summary.json")["dense/top1"] > 80
    assert first["train/loss_kd"] > 1, "a student pruned in one shot is far from the teacher it was"


def test_a_teacher_for_the_last_phase_only_is_the_dense_model_all_the_same():
    run("distill={phases: [finetune]}")
    teacher = load_file("run/dense.safetensors")
    assert all((teacher[name] != 0).any(dim=-1).all() for name in ("1.weight", "3.weight", "5.weight"))


def test_a_prune_phase_of_less_than_a_step_is_refused(capsys):
    assert main([str(DIGITS), *LINEAR, "run.dir=run", "phases.prune.epochs=0.001"]) == 2
    assert "never reached" in capsys.readouterr().err


def test_a_finished_folder_is_not_taken_for_another_job(capsys):
    run()
    assert main([str(DIGITS), *LINEAR, "run.dir=run", "prune.sparsity=0.5"]) == 2
    assert "prune.sparsity: was 0.9" in capsys.readouterr().err


def test_a_diverging_run_fails_with_a_remedy(capsys):
    assert main([str(DIGITS), *LINEAR, "run.dir=run", "phases.dense.lr=1e30"]) == 1
    status = read_json("run/status.json")
    assert status["state"] == "failed"
    assert status["error"].startswith("rank 0 at step ")
    assert "phases.dense.lr" in status["error"]
    errors = capsys.readouterr().err
    assert "Traceback" not in errors


def test_evaluate_counts_the_same_again(capsys):
    run()
    capsys.readouterr()
    assert command(["evaluate", "run"]) == 0
    printed = capsys.readouterr().out
    summary = read_json("run/summary.json")
    assert f'"eval/top1": {summary["eval/top1"]}' in printed
    assert f'"params/nonzero": {summary["params/nonzero"]}' in printed
    assert not math.isnan(summary["eval/loss"])


def test_plan_prints_what_a_run_would_do_and_writes_nothing(tmp_path, capsys):
    words = ["plan", str(DIGITS), *LINEAR, "prune.sparsity=0.999", "prune.length={epochs: 3.5}"]
    assert command(words) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "50,150 of 50,200" in printed
    assert "shorter than the schedule" in printed
    assert "5.weight: prune.sparsity 0.999 leaves about 1 of its 1000 weights" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_pattern_is_approached_and_whole_at_the_end():
    rows = run("prune.pattern='2:4'", "prune.sparsity=0.5", "prune.every=20")
    assert [row["prune/sparsity"] for row in rows if "prune/sparsity" in row][-1] == 0.5
    assert len({row["prune/sparsity"] for row in rows if "prune/sparsity" in row}) >= 4, "step by step"
    for name, weight in load_file("run/model.safetensors").items():
        if weight.dim() == 2:
            assert ((weight != 0).view(-1, 4).sum(1) == 2).all(), name


def test_whole_rows_go_as_many_as_fit(capsys):
    assert command(["plan", str(DIGITS), *LINEAR, "prune.pattern=rows"]) == 0
    assert "in whole blocks" in capsys.readouterr().out
    run("prune.pattern=rows", "prune.every=20", "prune.sparsity=0.7")
    zeros = weights = 0
    for weight in load_file("run/model.safetensors").values():
        if weight.dim() == 2:
            stays = weight != 0
            assert (stays.all(1) | ~stays.any(1)).all()
            zeros, weights = zeros + int((~stays).sum()), weights + weight.numel()
    assert 0.7 * weights - 300 < zeros <= 0.7 * weights
    assert read_json("run/summary.json")["prune/zeros"] == zeros


def test_channels_are_reordered_before_pruning_and_more_is_kept(capsys):
    run("prune.sparsity=0", "phases.prune={}", "phases.finetune={}", "distill=null", name="dense")
    words = [
        "model.weights=dense/model.safetensors", "prune.pattern='2:4'", "prune.sparsity=0.5", "distill=null",
        "prune.schedule=oneshot", "phases.dense={}", "phases.prune={}", "phases.finetune={steps: 1, lr: 1.0e-9}",
    ]  # fmt: skip
    assert command(["plan", str(DIGITS), *LINEAR, *words, "prune.permute=true"]) == 0
    assert "2 chains of channels can be reordered" in capsys.readouterr().out
    kept, dense = {}, set()
    for permute in ("false", "true"):
        AcceleratorState._reset_state(reset_partial_state=True)
        run(*words, f"prune.permute={permute}", name=f"permute-{permute}")
        dense.add(read_json(f"permute-{permute}/summary.json")["dense/top1"])
        weights = load_file(f"permute-{permute}/model.safetensors")
        kept[permute] = sum(w.abs().sum().item() for w in weights.values() if w.dim() == 2)
    assert len(dense) == 1, "the dense model computes the same"
    assert kept["true"] > 1.002 * kept["false"]


def test_plan_shows_rounds(capsys):
    rounds = ["phases.prune={}", "prune.rounds.count=3", "phases.dense={epochs: 3}", "phases.finetune={epochs: 2}"]
    assert command(["plan", str(DIGITS), *LINEAR, *rounds]) == 0
    printed = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "round 1 85 140 2.0" in printed
    assert "round 3 197 252 2.0" in printed
    assert "84 0.535841" in printed
    assert "196 0.900000" in printed


def test_without_wandb_nothing_of_it_is_imported(tmp_path, environment):
    program = (
        "import sys; from distprune.train import main; "
        f"code = main([{str(DIGITS)!r}, *{LINEAR!r}, 'run.dir=run']); "
        "sys.exit(code or ('wandb imported' if 'wandb' in sys.modules else 0))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "run" / "wandb").exists()
