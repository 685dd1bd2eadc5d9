"""`distprune export`: each format, loaded in a process of its own, is the model that was trained."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import nn

from distprune.cli import main as command
from distprune.config import load_config
from distprune.export import load_model, load_packed
from distprune.export.export import ExportError, refuse
from distprune.export.onnx import Session, lost_zeros, quantize
from distprune.export.source import Source
from distprune.models import build_model, load_weights
from distprune.train import main
from distprune.training.finished import FinishedRun
from tests.hf_jobs import classifier, language_model
from tests.jobs import DIGITS, SHORT, read_json


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of runs: `weights`, and `channels` that stay as zeros."""
    folder = tmp_path_factory.mktemp("runs")
    channels = ("prune.pattern=channels", "prune.sparsity=0.5", "prune.channels.shrink=never")
    for name, words in (("weights", ()), ("channels", channels)):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main([str(DIGITS), *SHORT, f"run.dir={folder / name}", *words]) == 0
    return folder


@pytest.fixture(autouse=True)
def _in_folder(runs, monkeypatch):
    monkeypatch.chdir(runs)
    AcceleratorState._reset_state(reset_partial_state=True)


def export(name, form, *words):
    assert command(["export", name, "--format", form, *words]) == 0
    return read_json(f"{name}/export/{form}{'-int8' if '--quantize' in words else ''}/figures.json")


def images(name):
    return Source.of(FinishedRun(name)).held_out.first_inputs()


def test_packed_is_small_and_comes_back_to_the_bit(capsys):
    figures, summary = export("weights", "packed"), read_json("weights/summary.json")
    assert figures["top1"] == figures["original_top1"] == summary["eval/top1"]
    assert (figures["max_difference"], figures["agree"], figures["samples"]) == (0, 1, 360)
    assert figures["bytes"] <= 0.15 * figures["dense_bytes"]
    folder = Path("weights/export/packed")
    assert figures["bytes"] == (folder / "model.safetensors").stat().st_size
    weights, again = load_file("weights/model.safetensors"), load_packed(folder / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    printed = " ".join(capsys.readouterr().out.split())
    assert "Checked in a process of its own on 360 samples: the largest difference of a logit is 0" in printed
    model = load_model(folder)
    assert torch.equal(model(images("weights")), Source.of(FinishedRun("weights")).model(images("weights")))


def test_onnx_takes_any_number_of_samples_and_its_card_says_how(runs):
    figures = export("weights", "onnx")
    assert figures["max_difference"] <= 1e-4 * figures["largest"]
    assert figures["top1"] == figures["original_top1"]
    card = Path("weights/export/onnx/README.md").read_text(encoding="utf-8")
    assert f"| {figures['top1']:.2f} % on 360 images of `test` |" in card
    assert "distprune export weights --format onnx" in card
    assert b"/distprune/" not in Path("weights/export/onnx/model.onnx").read_bytes(), "no path of this machine"
    (code,) = re.findall(r"^```python\n(.*?)^```", card, flags=re.M | re.S)
    for count in (1, 5):
        tried = f"import numpy\nimages = numpy.zeros(({count}, 1, 8, 8), numpy.float32)\n{code}print(logits.shape)"
        ended = subprocess.run(
            [sys.executable, "-c", tried], cwd="weights/export/onnx", capture_output=True, text=True, check=True
        )
        assert ended.stdout.strip() == f"({count}, 10)"


def test_int8_keeps_zeros_and_accuracy():
    figures = export("weights", "onnx", "--quantize", "int8", "--calibration", "200")
    assert abs(figures["top1"] - figures["original_top1"]) <= 0.5
    assert figures["calibration"] == 200
    card = Path("weights/export/onnx-int8/README.md").read_text(encoding="utf-8")
    assert "--format onnx --quantize int8 --calibration 200 --max-drop 0.5\n" in card
    graph = onnx.load("weights/export/onnx-int8/model.int8.onnx").graph
    small = {i.name: numpy_helper.to_array(i) for i in graph.initializer if i.data_type == onnx.TensorProto.INT8}
    weights = [value for value in small.values() if value.ndim > 1]
    assert sorted(value.size for value in weights) == [144, 640, 4608, 32768]
    dense = load_file("weights/model.safetensors")
    for value in weights:
        (same,) = [w for w in dense.values() if w.numel() == value.size and w.dim() > 1]
        zeros = int((same == 0).sum())
        assert zeros <= int(np.sum(value == 0)) < value.size


@pytest.mark.parametrize("external", [False, True])
def test_int8_keeps_the_biases_of_filters_that_are_all_zero(tmp_path, external):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 16)).eval()
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight[1] = 0
            layer.bias[1] = 0.37
        model[0].bias[2] = 0
        model[0].weight[2] = 0
    images = 20 * torch.randn(64, 1, 8, 8)
    program = torch.onnx.export(
        model, (images,), input_names=["images"], dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    program.save(tmp_path / "model.onnx", external_data=external)
    train = SimpleNamespace(drawn_inputs=lambda count, seed: [images])
    source = SimpleNamespace(
        names=[], values=lambda x: (x,), train=train, run=SimpleNamespace(config=load_config(DIGITS))
    )
    out = quantize(source, tmp_path / "model.onnx", 64)
    assert (tmp_path / "model.int8.onnx.data").exists() == external
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(out).graph.initializer}
    biases = [stored[name] * stored[f"{name}_scale"] for name in stored if name.endswith("bias_quantized")]
    assert [round(float(bias[1]), 4) for bias in biases] == [0.37, 0.37]
    found, expected = Session(out)(images)[:, 1], model(images)[:, 1]
    assert (found - expected).abs().max() <= 0.501 * stored["linear_scale"], "rounded once"


def test_a_zero_that_would_be_none_is_seen(tmp_path):
    def graph(path, values, zero):
        weight = numpy_helper.from_array(values, "w" if zero is None else "w_quantized")
        scale, point = numpy_helper.from_array(np.float32(0.5), "s"), numpy_helper.from_array(np.int8(zero or 0), "z")
        node = onnx.helper.make_node("DequantizeLinear", ["w_quantized", "s", "z"], ["y"])
        made = onnx.helper.make_graph([] if zero is None else [node], "g", [], [], [weight, scale, point])
        onnx.save(onnx.helper.make_model(made), path)
        return path

    before = graph(tmp_path / "before", np.array([[0.0, 1.0]], np.float32), None)
    assert lost_zeros(before, graph(tmp_path / "same", np.array([[0, 2]], np.int8), 0)) == []
    assert lost_zeros(before, graph(tmp_path / "moved", np.array([[3, 5]], np.int8), 3)) == []
    assert lost_zeros(before, graph(tmp_path / "lost", np.array([[1, 2]], np.int8), 0)) == ["w"]


def test_a_program_of_torch_is_reloaded_without_distprune():
    figures = export("weights", "torch-export")
    assert figures["max_difference"] <= 1e-4 * figures["largest"]
    module = torch.export.load("weights/export/torch-export/model.pt2").module()
    model = Source.of(FinishedRun("weights")).model
    for count in (1, 7):
        inputs = torch.randn(count, 1, 8, 8)
        torch.testing.assert_close(module(inputs), model(inputs), rtol=1e-4, atol=1e-4)


def test_plain_weights_fit_the_model():
    export("weights", "safetensors")
    model = build_model("digits_cnn", {}, 10)
    load_weights(model, "weights/export/safetensors/model.safetensors")
    assert load_config("weights/export/safetensors/config.yaml").model.name == "digits_cnn"


def test_channels_that_stayed_as_zeros_are_taken_away():
    figures, summary = export("channels", "shrunk"), read_json("channels/summary.json")
    assert figures["max_difference"] <= 1e-5 * max(1, figures["largest"])
    assert figures["top1"] == summary["eval/top1"]
    assert figures["parameters"] < summary["params/total"]
    card = Path("channels/export/shrunk/README.md").read_text(encoding="utf-8")
    assert f"| parameters, not zero | {figures['parameters']:,}, " in card
    model = load_model("channels/export/shrunk")
    assert sum(p.numel() for p in model.parameters()) == figures["parameters"]


def test_a_second_export_takes_the_place_of_the_first_only_when_it_is_whole(monkeypatch):
    assert command(["export", "weights", "--format", "packed", "--out", "there"]) == 0
    before = Path("there/model.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/bin/false")
        assert command(["export", "weights", "--format", "packed", "--out", "there"]) == 1
    assert Path("there/model.safetensors").stat().st_mtime_ns == before
    assert not list(Path().glob(".there*"))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert command(["export", "weights", "--format", "packed", "--out", "there"]) == 0
    assert Path("there/model.safetensors").stat().st_mtime_ns != before


def test_a_home_is_found_in_both_folders(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(runs / "weights")
    assert command(["export", "~/run", "--format", "packed", "--out", "~/there"]) == 0
    assert (tmp_path / "there" / "model.safetensors").exists()


def test_others_may_read_an_export():
    export("weights", "packed")
    assert Path("weights/export/packed/model.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_model_that_was_moved_is_found_where_it_is_now(tmp_path, monkeypatch):
    (tmp_path / "moved.py").write_text("from distprune.models.small import digits_cnn\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    export("weights", "packed", "model.name=moved:digits_cnn")
    assert load_config("weights/export/packed/config.yaml").model.name == "moved:digits_cnn"


def test_int8_of_a_model_with_weights_beside_it_leaves_none_of_them(monkeypatch):
    monkeypatch.setattr("distprune.export.onnx.LARGEST", 1)
    figures = export("weights", "onnx", "--quantize", "int8")
    assert set(figures["files"]) == {"model.int8.onnx", "model.int8.onnx.data"}
    assert figures["bytes"] < 0.5 * figures["dense_bytes"]


def test_a_card_is_read_whatever_the_folder_is_called(runs):
    shutil.copytree(runs / "weights", "a: b #1")
    assert command(["export", "a: b #1", "--format", "packed"]) == 0
    head = Path("a: b #1/export/packed/README.md").read_text(encoding="utf-8").split("---")[1]
    assert yaml.safe_load(head)["model-index"][0]["name"] == "a: b #1-packed"


def test_an_export_that_is_another_model_is_refused():
    figures = {"largest": 10.0, "max_difference": 0.1, "top1": 89.0, "original_top1": 90.0}
    with pytest.raises(ExportError, match=r"differ by 0\.1 from the model's, more than 0\.001"):
        refuse("onnx", False, figures, 0.5)
    with pytest.raises(ExportError, match="differ by nan"):
        refuse("packed", False, {**figures, "max_difference": float("nan")}, 0.5)
    with pytest.raises(ExportError, match=r"loses 1\.00 points of top-1, more than --max-drop 0\.5"):
        refuse("onnx", True, figures, 0.5)
    refuse("2:4", False, figures, 1.0)


@pytest.mark.slow
def test_sigterm_ends_an_export_and_its_check_and_leaves_nothing():
    """The check is a process of its own, which Ctrl-C does not reach."""
    words = [sys.executable, "-m", "distprune.cli", "export", "weights", "--format", "torch-export"]
    partial = Path("weights/export/.torch-export.partial")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        while not (partial / "config.yaml").exists():
            assert process.poll() is None
            time.sleep(0.05)
        (check,) = children(process.pid)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "distprune: stopped by a signal"
    assert "Traceback" not in said
    assert not Path(f"/proc/{check}").exists()
    assert not partial.exists()


def children(pid):
    """Processes that a process has started, as soon as there are any."""
    while True:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
        if found:
            return found
        time.sleep(0.05)


def test_an_export_of_another_format_is_not_replaced(capsys):
    assert command(["export", "weights", "--format", "safetensors", "--out", "weights/plain"]) == 0
    before = Path("weights/plain/model.safetensors").read_bytes()
    assert command(["export", "weights", "--format", "packed", "--out", "weights/plain"]) == 2
    assert "weights/plain holds an export as safetensors" in capsys.readouterr().err
    assert Path("weights/plain/model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["weights", "--format", "onx"], ["--format: no format 'onx'; did you mean 'onnx'?"]),
        (["weights", "--format", "packed", "--quantize", "int8"], ["--quantize: int8 goes with --format onnx"]),
        (["weights", "--format", "onnx", "--calibration", "0"], ["--calibration: takes one sample at least"]),
        (["weights", "--format", "onnx", "--max-drop", "nan"], ["--max-drop: takes points, 0 or more, got nan"]),
        (["none", "--format", "onnx"], ["none is no run folder"]),
        (["weights", "--format", "shrunk"], ["pruned single weights", "prune.pattern=channels"]),
        (["weights", "--format", "2:4"], ["weights pruned single weights", "prune.pattern=2:4"]),
        (["weights", "--format", "packed", "--max-drop", "1"], ["--max-drop: is for formats of fewer bits"]),
        (["weights", "--format", "onnx", "prune.sparsity=0.5"], ["prune: weights was run with other settings"]),
        (["weights", "--format", "packed", "--out", "channels"], ["--out: channels is there and holds no export"]),
        (["weights", "--format", "packed", "--out", "channels/status.json/x"], ["--out: cannot write to"]),
        (["weights", "--format", "packed", "data.eval_split=tset"], ["'tset'"]),
    ],
)
def test_wrong_input_is_one_message_and_nothing_is_written(words, expected, capsys):
    before = sorted(Path().rglob("*"))
    assert command(["export", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    for part in expected:
        assert part in err
    assert sorted(Path().rglob("*")) == before


def test_packages_that_are_missing_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert command(["export", "weights", "--format", "onnx"]) == 2
    assert "pip install 'distprune[export]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("job", [classifier, language_model])
def test_models_of_texts_are_exported_with_any_number_of_tokens(tmp_path, job):
    short = "phases={dense: {steps: 8, lr: 0.002}, prune: {steps: 4, lr: 0.001}, finetune: {steps: 2, lr: 0.001}}"
    assert main([*job(tmp_path), short, "prune.every=2", f"run.dir={tmp_path}/run"]) == 0
    for form in ("onnx", "torch-export", "packed", "safetensors"):
        AcceleratorState._reset_state(reset_partial_state=True)
        figures = export(str(tmp_path / "run"), form)
        assert figures["max_difference"] <= 1e-4 * max(1, figures["largest"])
        assert figures["top1"] == figures["original_top1"]
    card = (tmp_path / "run" / "export" / "onnx" / "README.md").read_text(encoding="utf-8")
    assert ("(int64, N x tokens, 32 at most)" if job is classifier else "(int64, N x 16 tokens)") in card
    folder = tmp_path / "run" / "export" / "safetensors"
    assert json.loads((folder / "config.json").read_text())["architectures"]
