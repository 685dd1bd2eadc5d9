"""Runs that prune whole channels: the model shrinks while it trains, and is saved as it is then."""

import json
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from distprune.cli import main as command
from distprune.config import load_config
from distprune.errors import ConfigError
from distprune.models import build_model, load_weights
from distprune.structured import Channels
from distprune.train import main
from tests.jobs import DIGITS, SHORT, read_json, read_rows
from tests.training.runs import reached, whole

CHANNELS = ("prune.pattern=channels", "prune.sparsity=0.5")
RESNET = (*CHANNELS, "model={name: resnet20}", "data.mean=[0.3, 0.3, 0.3]", "data.std=[0.4, 0.4, 0.4]")


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)


def run(*overrides, name="run"):
    assert main([str(DIGITS), *SHORT, f"run.dir={name}", *overrides]) == 0
    return read_json(f"{name}/summary.json")


def evaluated(capsys, name="run"):
    capsys.readouterr()
    assert command(["evaluate", name]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("prune.channels={budget: params, norm: l1, min_width: 4}", "prune.allocation=uniform"),
        ("prune.channels={budget: channels, multiple: 4, shrink: live}", "prune.score=taylor"),
        ("prune.channels.shrink=never", "prune.bounds={'8': {max: 0.5}}", "optimizer={name: adamw}"),
        ("prune.channels={shrink: live, shrink_every: 3, penalty: 1.0e-3}", "prune.exclude=['0']"),
    ],
    ids=["end", "params", "taylor", "never", "penalty"],
)
def test_the_budget_is_met_and_what_is_saved_is_what_was_trained(capsys, settings):
    summary = run(*CHANNELS, *settings)
    assert summary["prune/target_sparsity"] == 0.5
    assert summary["prune/sparsity"] == pytest.approx(0.5, abs=0.04)
    removes = "prune.channels.shrink=never" not in settings
    assert [s["difference"] <= 1e-5 for s in summary["prune/shrinks"]] == [True] * len(summary["prune/shrinks"])
    assert bool(summary["prune/shrinks"]) == removes
    weights = load_file("run/model.safetensors")
    parameters = sum(w.numel() for name, w in weights.items() if "running" not in name and "num_batches" not in name)
    assert parameters == summary["params/total"]
    assert (summary["params/total"] < summary["params/dense"]) == removes
    if not removes:
        assert summary["params/total"] - summary["params/nonzero"] >= summary["prune/zeros"] > 0
    again = evaluated(capsys)
    assert again["eval/top1"] == summary["eval/top1"]
    assert again["params/total"] == summary["params/total"]
    for layer in summary["prune/layers"].values():
        assert 0 <= layer["zeros"] < layer["shape"][0]


def test_it_shrinks_as_soon_as_the_schedule_ends_and_costs_what_is_said():
    summary = run(*CHANNELS, "prune.every=7")
    (shrunk,) = summary["prune/shrinks"]
    steps_per_epoch = summary["steps"] // 7
    assert shrunk["step"] == 6 * steps_per_epoch, "the end of the phase prune"
    last = [row for row in read_rows("run") if "macs/left" in row][-1]
    assert last["macs/left"] == summary["macs/left"] == shrunk["macs"]
    assert last["params/left"] == summary["params/total"] == shrunk["params"]
    model = build_model("digits_cnn", {}, 10)
    load_weights(model, "run/model.safetensors")
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 1, 8, 8))
    assert counter.get_total_flops() == 2 * summary["macs/left"]


def test_a_shrunk_model_can_be_pruned_on(capsys):
    first = run(*CHANNELS)
    start = ("model.weights=run/model.safetensors", "phases.dense={}")
    second = run(*CHANNELS, *start, name="again")
    assert second["params/dense"] == first["params/total"]
    assert second["dense/top1"] == first["eval/top1"]
    assert evaluated(capsys, "again")["params/total"] == second["params/total"]
    third = run(*start, "prune.sparsity=0.5", name="weights")
    assert third["params/total"] == first["params/total"]
    assert third["prune/zeros"] == round(0.5 * third["prune/weights"])
    assert evaluated(capsys, "weights")["eval/top1"] == third["eval/top1"]


def test_rounds_take_channels_back_and_the_model_shrinks_at_the_end(capsys):
    rounds = ("phases.prune={}", "prune.rounds={count: 2}", "prune.guard={max_drop: 0.5, min_step: 0.3}")
    summary = run(*CHANNELS, *rounds, "prune.sparsity=0.9", "phases.finetune={steps: 5, lr: 0.001}")
    outcomes = summary["prune/rounds"]
    assert any(not outcome["accepted"] for outcome in outcomes)
    accepted = [0.0, *(outcome["sparsity"] for outcome in outcomes if outcome["accepted"])]
    assert summary["prune/sparsity"] == accepted[-1]
    assert summary["params/total"] == evaluated(capsys)["params/total"]
    assert (summary["params/total"] < summary["params/dense"]) == (accepted[-1] > 0)


def test_weights_of_another_model_without_channels_are_refused(capsys):
    run(*CHANNELS)
    job = [str(DIGITS), *SHORT, "run.dir=other", "model.weights=run/model.safetensors"]
    assert main([*job, "model.name=resnet20"]) == 2
    assert "does not fit CifarResNet: the channels that were removed are of another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "layout", ["[]", "{}", '{"kept": ["0-x"], "tensors": {}}', '{"kept": [], "tensors": {"0": 1}}']
)
def test_a_header_that_says_nothing_of_channels_is_refused(tmp_path, layout):
    model = build_model("digits_cnn", {}, 10)
    save_file(model.state_dict(), tmp_path / "wrong.safetensors", {"channels": layout})
    with pytest.raises(ConfigError, match=r"wrong\.safetensors does not fit"):
        load_weights(model, str(tmp_path / "wrong.safetensors"))


def test_a_checkpoint_of_other_channels_is_refused(monkeypatch, capsys):
    job = [str(DIGITS), *SHORT, "run.dir=run", *CHANNELS]
    assert main([*job, "run.max_minutes=0.0001"]) == 75
    monkeypatch.setattr(Channels, "digest", "of other versions")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*job]) == 2
    assert "run.dir: its checkpoint was written where other channels were found" in capsys.readouterr().err


def test_plan_shows_groups_and_what_stays(capsys):
    assert command(["plan", str(DIGITS), *CHANNELS, "tracking.wandb.mode=disabled"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "macs gone" in printed
    assert "of 337,536" in printed
    assert "left dense: 10, nothing in the model takes its channels: they are its outputs" in printed


@pytest.mark.slow
def test_a_compiled_model_is_compiled_again(capsys):
    summary = run(*CHANNELS, "run.compile=true")
    assert len(summary["prune/shrinks"]) == 1
    assert evaluated(capsys)["eval/top1"] == pytest.approx(summary["eval/top1"], abs=0.6)


@pytest.mark.slow
def test_killed_before_and_after_it_shrinks_a_run_goes_on_to_the_same_bytes(tmp_path, start):
    job = (
        *RESNET,
        "data.train_split=train[:640]",
        "phases.dense={steps: 12, lr: 0.05}",
        "phases.prune={steps: 40, lr: 0.02}",
        "phases.finetune={steps: 12, lr: 0.02}",
        "prune.every=4",
        "prune.channels={shrink: live, shrink_every: 3}",
        "checkpoint.every=6",
        "integrity.every=6",
        "run.log_every=2",
        "model.args={}",
        "model.channels_last=true",
    )
    code, output = start(2, "run.dir=undisturbed", *job)
    assert code == 0, output
    expected = read_json("undisturbed/summary.json")
    shrinks = expected["prune/shrinks"]
    assert len(shrinks) >= 4
    assert all(shrunk["difference"] <= 1e-5 for shrunk in shrinks)
    assert expected["macs/left"] == pytest.approx(0.5 * expected["macs/dense"], rel=0.01)
    for step in (shrinks[0]["step"] - 2, shrinks[1]["step"] + 2, shrinks[-1]["step"] + 4):
        start(2, "run.dir=run", *job, send=signal.SIGKILL, once=reached(tmp_path / "run", step), everyone=True)
        assert read_json("run/status.json")["state"] == "running"
    code, output = start(2, "run.dir=run", *job)
    assert code == 0, output
    assert "going on from step" in output
    assert whole(tmp_path / "run") == whole(tmp_path / "undisturbed")
    kept = [{**shrunk, "step_ms": 0} for shrunk in read_json("run/summary.json")["prune/shrinks"]]
    assert kept == [{**shrunk, "step_ms": 0} for shrunk in shrinks]


@pytest.mark.slow
def test_shards_are_cut_when_they_are_saved(capsys, start):
    # The budget is met as closely as whole channels allow, and half the costliest of this width is 2.8 % of all MACs.
    code, output = start(2, "run.dir=run", *CHANNELS, "model.args={width: 16}", launcher="fsdp2")
    assert code == 0, output
    summary = read_json("run/summary.json")
    assert summary["prune/sparsity"] == pytest.approx(0.5, abs=0.03)
    again = evaluated(capsys)
    assert again["params/total"] == summary["params/total"] < summary["params/dense"]
    assert again["eval/top1"] == summary["eval/top1"]
    with safe_open("run/model.safetensors", "pt") as file:
        assert "channels" in file.metadata()
    assert load_config("run/config.yaml").prune.pattern == "channels"
