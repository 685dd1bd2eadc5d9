"""`distprune validate`: both models of a finished run again, on more sets, as a table."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from distprune.analysis.validate import print_tables
from distprune.cli import main
from distprune.train import main as train
from distprune.training import validation
from distprune.training.validation import compare
from tests.analysis.conftest import nothing_left_behind
from tests.jobs import DIGITS, SHORT, read_json


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with nothing_left_behind():
        assert train([str(DIGITS), *SHORT, f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_nothing_changes_where_nothing_is_asked_for(folder, finished):
    assert main(["validate", str(folder)]) == 0
    assert (folder / "validation.json").read_bytes() == (finished / "validation.json").read_bytes()
    others = {path.name: path.read_bytes() for path in finished.glob("*.json*")}
    assert {path.name: path.read_bytes() for path in folder.glob("*.json*")} == others


def test_more_sets_are_counted_and_shown(folder, finished, capsys):
    words = ["validate", str(folder), "eval.corruptions=[contrast]", "eval.sets={part: 'test[:50]'}"]
    assert main(words) == 0
    out = capsys.readouterr().out
    sets = read_json(folder / "validation.json")["sets"]
    assert list(sets) == ["eval", "part", "contrast-1", "contrast-2", "contrast-3"]
    assert sets["eval"] == read_json(finished / "validation.json")["sets"]["eval"]
    assert sets["part"]["samples"] == 50
    for name, found in sets.items():
        line = next(line for line in out.splitlines() if line.split()[:1] == [name])
        dense, pruned = found["dense"]["top1"], found["pruned"]["top1"]
        assert line.split()[1:] == [str(found["samples"]), f"{dense:.2f}", f"{pruned:.2f}", f"{pruned - dense:+.2f}"]
    worst = min(one["pruned"] - one["dense"] for found in sets.values() for one in found["classes"])
    assert out.split("Classes that lost most")[1].splitlines()[4].split()[-1] == f"{worst:+.2f}"


def test_an_interrupted_command_goes_on_with_the_sets_that_are_left(folder, monkeypatch, capsys):
    words = ["validate", str(folder), "eval.corruptions=[jpeg]"]
    counted = []

    def interrupted(*arguments):
        counted.append(1)
        if len(counted) == 3:
            raise KeyboardInterrupt
        return compare(*arguments)

    monkeypatch.setattr(validation, "compare", interrupted)
    assert main(words) == 75
    assert "stopped by a signal; the same command goes on" in capsys.readouterr().err
    assert list(read_json(folder / "validation.json")["sets"]) == ["eval"], "that of the run"
    assert main(words) == 0
    assert len(counted) == 3 + 2
    assert list(read_json(folder / "validation.json")["sets"]) == ["eval", "jpeg-1", "jpeg-2", "jpeg-3"]
    assert main([*words, "run.seed=1"]) == 0
    assert len(counted) == 3 + 2 + 4
    assert not (folder / "validation-so-far.json").exists()


def test_a_folder_of_old_has_no_dense_model(folder, capsys):
    for name in ("dense.safetensors", "validation.json"):
        (folder / name).unlink()
    assert main(["validate", str(folder)]) == 0
    assert "no dense.safetensors" in capsys.readouterr().out
    assert read_json(folder / "validation.json")["sets"]["eval"]["dense"] is None


@pytest.mark.parametrize("name", ["dog [small]", "[/INST]"])
def test_brackets_in_names_are_no_markup(name):
    one = {"top1": 50.0, "loss": 0.1}
    figures = {"samples": 2, "dense": one, "pruned": one, "agree": 1, "lost": 1, "gained": 0}
    out = io.StringIO()
    classes = [{"name": name, "samples": 2, "dense": 100.0, "pruned": 50.0}]
    print_tables({name: {**figures, "classes": classes}}, "texts", Console(file=out, width=100))
    assert out.getvalue().count(name) == 4


@pytest.mark.parametrize("width", [32, 40, 59, 60, 100])
def test_tables_fit_the_terminal(width):
    def figures(dense):
        classes = [{"name": "a class with a long name", "samples": 5000, "dense": dense, "pruned": 90.0}] * 12
        one = {"top1": dense, "loss": 0.1}
        return {
            "samples": 50000,
            "dense": one,
            "pruned": one,
            "classes": classes,
            "agree": 49999,
            "lost": 1,
            "gained": 0,
        }

    out = io.StringIO()
    print_tables({"eval": figures(100.0), "brightness-3": figures(91.0)}, "images", Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert sum("-10.00" in line for line in lines) == 10
    assert ("samples" in lines[2]) == (width >= 60)
    assert "…" not in out.getvalue()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "is no run folder: there is no such thing"),
        (["RUN", "eval.corruptions=[fog]"], "eval.corruptions.0"),
        (["RUN", "eval.sets={more: 'train[:0]'}"], "is empty"),
        (["RUN", "eval.corruptions=true", "data.eval_transforms=[ConvertImageDtype]"], "takes uint8 images"),
    ],
    ids=["no folder", "corruption", "empty set", "no pixels"],
)
def test_what_is_wrong_is_said_and_nothing_written(folder, finished, words, expected, capsys):
    assert main(["validate", *(str(folder) if word == "RUN" else word for word in words)]) == 2
    assert expected in capsys.readouterr().err
    assert (folder / "validation.json").read_bytes() == (finished / "validation.json").read_bytes()


def test_a_run_that_is_not_done_is_refused(folder, capsys):
    Path(folder / "model.safetensors").unlink()
    assert main(["validate", str(folder)]) == 2
    assert "run it to its end first" in capsys.readouterr().err
