"""What each layer costs is counted as a loop over plain torch counts it, and becomes an allocation."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from distprune.analysis.sensitivity import pruned
from distprune.analysis.sensitivity_folder import SensitivityFolder
from distprune.cli import main
from distprune.models import build_model
from tests.analysis.conftest import digits
from tests.jobs import DIGITS, read_json

LAYERS = ["0.weight", "3.weight", "8.weight", "10.weight"]
DEFAULT = [0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99]


@pytest.fixture
def measure(weights):
    """Run the command on the digits in this process."""

    def start(*words, weights=weights):
        return main(["sensitivity", str(DIGITS), f"model.weights={weights}", *words])

    return start


def by_hand(weights, layer=None, sparsity=0.0):
    """Loss and top-1 with one layer pruned: sorted by magnitude, of equal ones the later first; all images at once."""
    state = load_file(weights)
    if layer is not None:
        flat = state[layer].reshape(-1).numpy()
        order = sorted(range(len(flat)), key=lambda place: (abs(flat[place]), -place))
        flat[order[: round(sparsity * len(flat))]] = 0
    model = build_model("digits_cnn", {}, 10).eval()
    model.load_state_dict(state)
    images, labels = digits("test")
    with torch.no_grad():
        logits = model(images)
    return F.cross_entropy(logits.double(), labels).item(), 100 * (logits.argmax(1) == labels).double().mean().item()


def test_figures_are_those_of_a_loop_over_plain_torch(measure, weights):
    assert measure("--out", "out") == 0
    found = read_json("out/sensitivity.json")
    loss, top1 = by_hand(weights)
    assert found["dense"]["top1"] == pytest.approx(top1)
    assert found["dense"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["dense"]["samples"] == 360
    assert list(found["layers"]) == LAYERS
    drops = []
    for name, layer in found["layers"].items():
        assert layer["weights"] == np.prod(layer["shape"]) == load_file(weights)[name].numel()
        assert [row["sparsity"] for row in layer["pruned"]] == DEFAULT
        for row in layer["pruned"]:
            loss_here, top1_here = by_hand(weights, name, row["sparsity"])
            assert row["top1"] == pytest.approx(top1_here)
            assert row["loss"] == pytest.approx(loss_here, rel=1e-5)
            assert row["drop"] == pytest.approx(top1 - top1_here)
            assert row["zeros"] == round(row["sparsity"] * layer["weights"])
            drops.append(row["drop"])
    assert max(drops) > 10, "nothing is told apart"


def test_the_allocation_is_for_the_sparsity_of_the_configuration(measure):
    assert measure("--out", "out", "prune.sparsity=0.87") == 0
    text = Path("out/allocation-0.87.yaml").read_text()
    assert text.startswith("# Sparsity of each layer, 0.87 over all 38,160 weights, by distprune sensitivity for\n")
    shares, layers = yaml.safe_load(text), read_json("out/sensitivity.json")["layers"]
    assert list(shares) == LAYERS
    total = sum(shares[name] * layer["weights"] for name, layer in layers.items()) / 38160
    assert total == pytest.approx(0.87, rel=1e-6)


def test_another_sparsity_or_further_levels_need_no_second_measurement(measure, capsys):
    assert measure("--out", "out", "--sparsities", "0.5,0.99") == 0
    assert capsys.readouterr().err.count("evaluation ") == 9
    assert measure("--out", "out", "--sparsities", "0.5,0.99", "prune.sparsity=0.7") == 0
    assert "evaluation " not in capsys.readouterr().err
    assert measure("--out", "out", "--sparsities", "0.99,0.8,0.5", "prune.exclude=[last]") == 0
    assert capsys.readouterr().err.count("evaluation ") == 3
    assert list(read_json("out/sensitivity.json")["layers"]) == LAYERS[:3]


def test_the_terminal_shows_a_table_and_the_next_command(measure, weights, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert measure("run.dir=runs/one", "run.seed=3") == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    command = shlex.split(lines[-1])
    assert command[:5] == ["accelerate", "launch", "-m", "distprune.train", str(DIGITS)]
    assert command[5:] == [
        f"model.weights={weights}",
        "run.seed=3",
        "prune.allocation=runs/one-sensitivity/allocation-0.9.yaml",
        "run.dir=runs/one-allocated",
    ]
    header = next(line for line in lines if line.split()[:1] == ["layer"])
    assert header.split() == ["layer", "0.5", "0.7", "0.8", "0.9", "0.95", "0.98", "0.99", "gets"]
    rows = read_json("runs/one-sensitivity/sensitivity.json")["layers"]["8.weight"]["pruned"]
    drops = [f"{row['drop']:.2f}" for row in rows]
    assert ["8", *drops] in [line.split()[:8] for line in lines]
    assert all(len(line) <= 80 for line in lines[:-5])


def test_the_picture_has_a_row_for_each_layer(measure):
    assert measure("--out", "few", "prune.include=[first]") == 0
    assert measure("--out", "all") == 0
    few, every = (Image.open(f"{folder}/sensitivity.png") for folder in ("few", "all"))
    assert every.height - few.height == pytest.approx(3 * 0.24 * 120, abs=3)


def test_a_tensor_is_what_it_was_after_it_was_pruned():
    weight = torch.nn.Parameter(torch.tensor([[3.0, -1.0], [1.0, 0.5]]))
    before = weight.detach().clone()
    with pruned(weight, 0.5):
        assert weight.tolist() == [[3.0, -1.0], [0.0, 0.0]]
    assert torch.equal(weight, before)


def test_order_is_that_of_the_indices_in_whatever_memory_format():
    weight = torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last)
    with pruned(weight, 0.25):
        assert weight.reshape(-1).tolist() == [1.0] * 18 + [0.0] * 6


def test_results_of_other_weights_or_settings_are_not_mixed(measure, weights, tmp_path, capsys):
    assert measure("--out", "out", "--sparsities", "0.95") == 0
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    state = load_file(weights)
    state["0.weight"][0] += 1
    save_file(state, tmp_path / "other.safetensors")
    other = {"weights": tmp_path / "other.safetensors"}
    capsys.readouterr()
    assert measure("--out", "out", "data.eval_split=test[:50]", **other) == 2
    message = capsys.readouterr().err
    assert "3 faults" in message
    for part in (
        "model.weights: was 'sha256 ",
        "data.eval_split: was 'test' when the results in out",
        "data: was '360",
    ):
        assert part in message
    assert message.count("go on with the same, or choose another --out") == 3
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


def test_weights_that_were_moved_are_the_same(measure, weights, tmp_path, capsys):
    assert measure("--out", "out") == 0
    (tmp_path / "moved.safetensors").write_bytes(weights.read_bytes())
    capsys.readouterr()
    assert measure("--out", "out", weights=tmp_path / "moved.safetensors") == 0
    assert "evaluation " not in capsys.readouterr().err


def test_what_is_damaged_is_measured_again(measure, capsys):
    assert measure("--out", "out") == 0
    results = Path("out/sensitivity-rank-00000.jsonl")
    before, figures = results.read_text(), Path("out/sensitivity.json").read_bytes()
    lines = before.splitlines(keepends=True)
    results.write_text("".join([*lines[:10], "\0" * 30 + "\n", *lines[11:20], lines[20][:25]]))
    capsys.readouterr()
    assert measure("--out", "out") == 0
    assert capsys.readouterr().err.count("evaluation ") == 1 + len(lines) - 20
    assert Path("out/sensitivity.json").read_bytes() == figures
    assert sorted(results.read_text().splitlines()[-10:]) == sorted([lines[10].rstrip(), *before.splitlines()[20:]])


def test_rows_that_are_no_results_are_passed_over(measure):
    assert measure("--out", "out", "--sparsities", "0.5,0.95") == 0
    before = Path("out/sensitivity.json").read_bytes()
    rows = Path("out/sensitivity-rank-00000.jsonl")
    kept = "".join(rows.read_text().splitlines(keepends=True)[:-1])
    strange = [
        "12",
        '{"layer": "0.weight", "sparsity": 0.5}',
        '{"layer": [1], "sparsity": 1, "top1": 1, "loss": 1, "samples": 1}',
    ]
    rows.write_text(kept + "".join(f"{row}\n" for row in strange))
    assert measure("--out", "out", "--sparsities", "0.5,0.95") == 0
    assert Path("out/sensitivity.json").read_bytes() == before


def test_zeros_that_were_there_before_are_counted(measure, weights, tmp_path):
    state = load_file(weights)
    state["8.weight"][:, ::4] = 0
    save_file(state, tmp_path / "sparse.safetensors")
    assert measure("--out", "out", "--sparsities", "0.1,0.95", weights=tmp_path / "sparse.safetensors") == 0
    layer = read_json("out/sensitivity.json")["layers"]["8.weight"]
    before = int((state["8.weight"] == 0).sum())
    assert before >= layer["weights"] // 4
    assert [row["zeros"] for row in layer["pruned"]] == [before, round(0.95 * layer["weights"])]


@pytest.mark.parametrize("width", [30, 50])
def test_a_narrow_terminal_gets_whole_names_and_figures(measure, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert measure("--out", "out") == 0
    table = capsys.readouterr().out.split("gets:")[0]
    assert "\u2026" not in table
    heads = [f"{level:g}" for level in DEFAULT] + ["gets"]
    lines = [line.split() for line in table.splitlines()]
    assert [word for line in lines if line[:1] == ["layer"] and line[1] in heads for word in line[1:]] == heads
    assert max(map(len, table.splitlines())) <= width


def test_a_folder_in_use_is_refused(measure, capsys):
    other = SensitivityFolder("out")
    other.claim()
    try:
        assert measure("--out", "out") == 2
    finally:
        other.release()
    assert "--out: another process writes to out; wait for it, or choose another --out" in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--sparsities", "0.5,many,,0.95"], ["2 faults", "--sparsities: 'many' is no number", "'' is no number"]),
        (["--sparsities", "0,0.5,1,nan,90,0.95"], ["4 faults", "0 is not between", "1 is not", "nan is", "90 is"]),
        (["--sparsities", "0.95,0.5,0.950"], ["1 fault", "--sparsities: 0.950 is given twice"]),
        (["--sparsities", "0.5,0.8"], ["prune.sparsity: 0.9 is not below 0.8", "--sparsities 0.5,0.8,0.95"]),
        (["--sparsities", "0.5,0.9"], ["none could make up for another", "--sparsities 0.5,0.9,0.95"]),
        (["prune.sparsity=0.9999"], ["not below 0.99,", "0.99,0.99995"]),
        (["model.weights=null"], ["model.weights: nothing to measure; name trained weights"]),
        (["--out", "file"], ["--out: cannot write to file"]),
        (["--out", "file/below"], ["--out: cannot write to file/below"]),
        (["prune.pattern=channels"], ["prune.pattern: single weights are measured here"]),
        (["prune.exclude=[11.*]"], ["prune: pattern '11.*' matches no parameter"]),
        (["data.eval_split=val"], ["'val'"]),
        (
            ["--sparsities", "2", "--out", "file", "prune.sparcity=0.5", "run.seed=x"],
            ["4 faults", "--sparsities: 2", "prune.sparcity: unknown key", "run.seed", "--out: cannot write"],
        ),
        (["--sparsities", "x", "--out", "file", "model.weights=null"], ["3 faults", "'x'", "model.weights", "--out"]),
    ],
)
def test_wrong_input_is_one_message_and_nothing_is_written(measure, words, expected, capsys):
    Path("file").write_text("")
    assert measure(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    for part in expected:
        assert part in err
    assert [str(path) for path in Path().rglob("*")] == ["file"]


def test_weights_that_are_not_finite_are_named(measure, weights, tmp_path, capsys):
    state = load_file(weights)
    state["3.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    assert measure("--out", "out", weights=tmp_path / "nan.safetensors") == 2
    assert "model.weights: 3.weight has NaN or infinity" in capsys.readouterr().err
    assert not Path("out").exists()
