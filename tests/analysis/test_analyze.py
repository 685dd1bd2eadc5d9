"""`distprune analyze`: what it counts, measures and says of runs that prune weights and channels."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from distprune.analysis.latency import Timing
from distprune.analysis.words import in_words
from distprune.cli import main as command
from distprune.train import main
from tests.jobs import DIGITS, SHORT, read_json

QUICK = ("--seconds", "0.05", "--batch-sizes", "2,16")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of two runs: `weights` and `channels`."""
    folder = tmp_path_factory.mktemp("runs")
    for name, words in (("weights", ()), ("channels", ("prune.pattern=channels", "prune.sparsity=0.5"))):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main([str(DIGITS), *SHORT, f"run.dir={folder / name}", *words]) == 0
    return folder


@pytest.fixture
def analyzed(runs, monkeypatch, capsys):
    """Analyse a run, and return what was printed and what was written."""

    def call(name, *words):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.chdir(runs)
        capsys.readouterr()
        assert command(["analyze", name, *QUICK, *words]) == 0
        return capsys.readouterr().out, read_json(f"{name}/analysis.json")

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)


def test_zeros_work_and_sizes_are_those_of_the_files(analyzed, runs):
    _, found = analyzed("weights")
    summary, weights = read_json("weights/summary.json"), load_file("weights/model.safetensors")
    for name, layer in found["layers"].items():
        assert layer["zeros"] == int((weights[f"{name}.weight"] == 0).sum())
        assert layer["effective_macs"] == round(layer["macs"] * (1 - layer["zeros"] / layer["weights"]))
    assert sum(layer["zeros"] for layer in found["layers"].values()) == summary["prune/zeros"]
    dense, pruned = found["totals"]["dense"], found["totals"]["pruned"]
    assert dense["macs"] == pruned["macs"] == 337_536
    assert pruned["nonzero"] == summary["params/nonzero"]
    sizes = found["sizes"]
    assert sizes["pruned"] == Path("weights/model.safetensors").stat().st_size
    assert sizes["packed"] < 0.2 * sizes["dense"]
    assert sizes["pruned zipped"] < 0.2 * sizes["dense"]


def test_forms_are_timed_at_each_batch_and_zeros_alone_are_said_to_gain_nothing(analyzed):
    printed, found = analyzed("weights")
    assert [(t["form"], t["batch"]) for t in found["latency"]] == [
        ("dense", 2), ("masked", 2), ("dense", 16), ("masked", 16),
    ]  # fmt: skip
    assert all(t["low_ms"] <= t["median_ms"] <= t["high_ms"] for t in found["latency"])
    said = " ".join(printed.split())
    assert "Nothing got faster on cpu by zeros alone" in said
    assert "distprune export weights --format packed" in said


def test_a_model_without_channels_costs_less_and_is_timed_as_shrunk(analyzed):
    printed, found = analyzed("channels")
    summary = read_json("channels/summary.json")
    assert {t["form"] for t in found["latency"]} == {"dense", "shrunk"}
    assert found["totals"]["pruned"]["macs"] == summary["macs/left"]
    assert found["totals"]["dense"]["macs"] == summary["macs/dense"]
    assert found["totals"]["pruned"]["parameters"] == summary["params/total"]
    assert found["sizes"]["pruned"] < found["sizes"]["dense"]
    assert "of the parameters and" in printed


@pytest.mark.slow
def test_what_a_runtime_or_a_compiler_brings_is_told_from_what_pruning_brings(analyzed, runs, monkeypatch):
    monkeypatch.chdir(runs)
    assert command(["export", "channels", "--format", "onnx"]) == 0
    printed, found = analyzed("channels", "run.compile=true", "--batch-sizes", "16")
    forms = {t["form"]: t["gain"] for t in found["latency"]}
    assert list(forms) == ["dense", "shrunk", "dense compiled", "shrunk compiled", "dense onnx", "onnx"]
    assert [name for name, gain in forms.items() if gain is None] == ["dense", "dense compiled", "dense onnx"]
    assert "the dense model run the same way" in " ".join(printed.split())


def test_scripts_get_json_and_threads(analyzed):
    printed, found = analyzed("weights", "--json", "--threads", "1")
    assert json.loads(printed) == found
    assert found["machine"]["threads"] == 1


def test_a_run_whose_dense_model_was_not_kept_is_compared_with_nothing(analyzed, runs):
    kept = (runs / "weights" / "dense.safetensors").rename(runs / "kept")
    try:
        printed, found = analyzed("weights")
    finally:
        kept.rename(runs / "weights" / "dense.safetensors")
    assert {t["form"] for t in found["latency"]} == {"masked"}
    assert "dense" not in found["sizes"]
    assert "The dense model was not kept" in printed


def test_what_was_taken_out_is_known_without_the_dense_model(analyzed, runs):
    kept = (runs / "channels" / "dense.safetensors").rename(runs / "kept")
    try:
        printed, found = analyzed("channels")
    finally:
        kept.rename(runs / "channels" / "dense.safetensors")
    assert found["totals"]["dense"]["parameters"] == 38_330
    assert found["totals"]["dense"]["macs"] == 337_536
    assert "Nothing got smaller" not in printed


def test_an_export_that_was_cut_off_is_not_timed(analyzed, runs):
    partial = runs / "weights" / "export" / ".onnx.partial"
    partial.mkdir(parents=True)
    (partial / "figures.json").write_text('{"format": "onnx"}', encoding="utf-8")
    _, found = analyzed("weights")
    assert {t["form"] for t in found["latency"]} == {"dense", "masked"}


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(runs, monkeypatch, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr("os.access", lambda *_: False)
    assert command(["analyze", str(runs / "weights"), *QUICK]) == 2
    assert "cannot write to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["none"], "none is no run folder: there is no such thing"),
        (["."], "it has no config.yaml"),
        (["weights", "--batch-sizes", "1,x,0"], "'x' is no number of samples"),
        (["weights", "--threads", "0"], "--threads: must be at least 1"),
        (["weights", "--seconds", "0"], "--seconds: must be above 0"),
        (["weights", "data.eval_split=tset"], "'tset'"),
    ],
)
def test_wrong_input_is_one_message(runs, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(runs)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert command(["analyze", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err


def timing(form, speedup, low, high, batch=64):
    return Timing(form, "cpu", 2, batch, 1, 1, 1, 64, speedup, low, high, None, 1.5, 1.4, 1.6)


TOTALS = {
    "dense": {"parameters": 100, "nonzero": 100, "macs": 1000, "effective_macs": 1000},
    "pruned": {"parameters": 50, "nonzero": 50, "macs": 500, "effective_macs": 500},
}


@pytest.mark.parametrize(
    ("form", "speedup", "low", "high", "expected"),
    [
        ("shrunk", 1.9, 1.8, 2.0, "is faster than dense: 1.90 times at batch 64."),
        ("shrunk", 1.4, 1.3, 1.5, "1.40 times at batch 64; it multiplies 2.00 times less, but"),
        ("shrunk", 1.0, 0.9, 1.1, "is not faster on cpu (1.00 times at batch 64), though it multiplies 2.00"),
        ("shrunk", 1.6, 0.9, 2.7, "cannot be told: the machine had other work, and its rounds differ"),
        ("onnx int8", 2.0, 1.9, 2.1, "onnx int8 is 2.00 times as fast as dense at batch 64, and 1.50 times as fast as"),
        ("onnx int8", 0.5, 0.4, 0.6, "onnx int8 is 2.00 times slower than dense at batch 64, and 1.50 times as fast"),
        ("dense onnx", 2.0, 1.9, 2.1, ""),
    ],
)
def test_words_say_what_was_measured(form, speedup, low, high, expected):
    sizes = {"dense": 400, "pruned": 200, "pruned zipped": 190, "packed": 200}
    words = in_words(
        "run", "channels", TOTALS, sizes, [timing("dense", 1, 1, 1), timing(form, speedup, low, high)], None
    )
    assert expected in " ".join(words)
    assert "dense onnx" not in " ".join(words)


def test_words_quote_the_folder():
    totals = {form: {"parameters": 10, "nonzero": 10, "macs": 10, "effective_macs": 10} for form in ("dense", "pruned")}
    words = in_words("a b", None, totals, {"dense": 100, "pruned": 100, "packed": 10}, (), None)
    assert "distprune export 'a b' --format packed." in words[0]


def test_words_name_the_class_that_lost_most():
    classes = [
        {"name": "cat", "samples": 50, "dense": 90.0, "pruned": 80.0},
        {"name": "dog", "samples": 50, "dense": 90.0, "pruned": 91.0},
    ]
    accuracy = {
        "samples": 100,
        "dense": {"top1": 90.0},
        "pruned": {"top1": 85.5},
        "lost": 6,
        "gained": 2,
        "classes": classes,
    }
    sizes = {"pruned": 200, "pruned zipped": 190, "packed": 200}
    *_, counts, worst = in_words("run", None, TOTALS, sizes, [], accuracy)
    assert "from 90.00 to 85.50 % (-4.50 points): of 100 samples 6 were lost and 2 gained" in counts
    assert "cat (-10.00 points)" in worst
