"""Histograms of weights: counted exactly, at the right moments, and cut back where a run goes back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from distprune.pruning.collectives import Ranks
from distprune.pruning.prunable import find_prunable
from distprune.tracking import BINS
from distprune.train import main
from distprune.training.histograms import count, largest
from distprune.training.run_folder import RunFolder
from tests.distributed.same_masks import models
from tests.jobs import DIGITS, SHORT, read_json, read_rows
from tests.pruning.reference import Bag


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)


def run(*overrides, name="run"):
    assert main([str(DIGITS), *SHORT, f"run.dir={name}", *overrides]) == 0
    return read_rows(name, "histograms.jsonl")


def total(layer):
    return sum(layer["counts"]) + layer["zeros"]


@pytest.mark.parametrize("name", models())
def test_the_counts_are_those_of_numpy(name):
    tensors = find_prunable(Bag(models()[name]), ["*"]).tensors
    limits = {t.name: limit for t, limit in zip(tensors, largest(tensors, Ranks()).tolist(), strict=True)}
    for tensor, (_, layer) in zip(tensors, count(tensors, limits, Ranks()).items(), strict=True):
        weights = tensor.local.detach().double().flatten()
        assert layer.limit == (weights.abs().max().item() if len(weights) else 0.0)
        assert layer.zeros == int((weights == 0).sum())
        assert len(layer.counts) == BINS
        assert sum(layer.counts) == len(weights) - layer.zeros
        if layer.limit > 1e-30:
            nonzero = weights[weights != 0].numpy()
            theirs, _ = np.histogram(nonzero, BINS, (-layer.limit, layer.limit))
            # On the edge of two bins float32 and float64 may differ.
            inner = np.histogram(nonzero * (1 - 1e-6), BINS, (-layer.limit, layer.limit))[0]
            outer = np.histogram(
                np.clip(nonzero * (1 + 1e-6), -layer.limit, layer.limit), BINS, (-layer.limit, layer.limit)
            )[0]
            slack = abs(theirs - inner).sum() + abs(theirs - outer).sum()
            assert abs(theirs - layer.counts).sum() <= slack


def test_what_lies_outside_is_counted_in_the_outermost_bins():
    tensors = find_prunable(Bag([torch.tensor([-3.0, -1.0, -0.01, 0.0, 0.99, 1.0, 7.0, float("inf")])]), ["*"]).tensors
    layer = count(tensors, {tensors[0].name: 1.0}, Ranks())[tensors[0].name]
    assert {place: n for place, n in enumerate(layer.counts) if n} == {0: 2, 31: 1, 63: 4}
    assert layer.zeros == 1


def test_weights_that_are_not_finite_have_no_largest():
    for bad in (float("nan"), float("inf"), -float("inf")):
        tensors = find_prunable(Bag([torch.tensor([1.0, bad]), torch.ones(3)]), ["*"]).tensors
        assert largest(tensors, Ranks()).tolist() == [float("inf"), 1.0]


def test_there_is_a_line_of_the_dense_model_one_for_each_update_and_one_of_the_final_model():
    lines = run()
    rows, summary = read_rows("run"), read_json("run/summary.json")
    updates = [row for row in rows if "prune/newly_pruned" in row]
    dense, *pruned, final = lines
    assert dense["trainer/step"] == updates[0]["trainer/step"]
    assert updates[0]["prune/newly_pruned"] == 0, "so the first update has no line of its own"
    assert [line["trainer/step"] for line in pruned] == [row["trainer/step"] for row in updates[1:]]
    assert final["trainer/step"] == summary["steps"]
    for line, row in zip([dense, *pruned], updates, strict=True):
        for name, layer in line["layers"].items():
            assert layer["limit"] == dense["layers"][name]["limit"]
            assert total(layer) == total(dense["layers"][name])
            assert layer["zeros"] / total(layer) == row[f"prune/layer/{name}"]
    for name, weight in load_file("run/dense.safetensors").items():
        if name in dense["layers"]:
            assert dense["layers"][name]["limit"] == weight.abs().max().item()
    for name, weight in load_file("run/model.safetensors").items():
        if name in final["layers"]:
            assert final["layers"][name]["zeros"] == summary["prune/layers"][name]["zeros"] == int((weight == 0).sum())


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (["tracking.histograms.every=25"], [66, 76, 106, 132, 154]),
        (["prune.schedule=oneshot", "phases.prune.epochs=0", "phases.finetune.epochs=2"], [66, 66, 110]),
    ],
    ids=["every", "oneshot"],
)
def test_updates_that_come_soon_after_others_have_none(settings, steps):
    assert [line["trainer/step"] for line in run(*settings)] == steps


def test_none_are_made_where_none_are_wanted():
    assert main([str(DIGITS), *SHORT, "run.dir=run", "tracking.histograms=null"]) == 0
    assert not Path("run/histograms.jsonl").exists()


def test_channels_that_are_removed_are_gone_from_the_histograms():
    lines = run("prune.pattern=channels", "prune.sparsity=0.5", "prune.channels.shrink=live")
    dense, *_, final = lines
    assert dense["layers"].keys() == final["layers"].keys()
    assert all("bias" not in name for name in dense["layers"])
    weights = load_file("run/model.safetensors")
    for name, layer in final["layers"].items():
        assert total(layer) == weights[name].numel()
        assert layer["limit"] == dense["layers"][name]["limit"]
    assert sum(map(total, final["layers"].values())) < 0.8 * sum(map(total, dense["layers"].values()))


def test_a_round_that_is_rolled_back_leaves_the_histograms_of_the_model_that_stays():
    rounds = ("phases.prune={}", "prune.rounds={count: 2}", "prune.guard={max_drop: 0.5, min_step: 0.3}")
    lines = run(*rounds, "prune.sparsity=0.98", "phases.finetune={steps: 5, lr: 0.001}")
    summary = read_json("run/summary.json")
    assert not summary["prune/rounds"][-1]["accepted"]
    zeros = [sum(layer["zeros"] for layer in line["layers"].values()) for line in lines]
    assert zeros[-1] == summary["prune/zeros"] < zeros[-2]
    assert zeros[0] == 0


def test_a_run_folder_goes_back_to_a_step_with_or_without_its_own_histograms(tmp_path):
    folder = RunFolder(tmp_path)
    for with_update, left in ((True, [1, 2, 2]), (False, [1])):
        for name in ("metrics.jsonl", "histograms.jsonl"):
            lines = "".join(json.dumps({"trainer/step": step}) + "\n" for step in (1, 2, 2, 3))
            (tmp_path / name).write_text(lines + '{"trainer/st')
        folder.go_back_to(2, with_step=not with_update, with_update=with_update)
        assert [row["trainer/step"] for row in read_rows(tmp_path, "histograms.jsonl")] == left
        assert [row["trainer/step"] for row in read_rows(tmp_path)] == ([1] if with_update else [1, 2, 2])
