"""What a report is made of, where it goes, and what it refuses."""

import base64
import html
import io
import json
import math
import re
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from distprune.analysis.tables import print_summary
from distprune.cli import main as command
from distprune.report.figures import MOST_POINTS, short, thinned
from distprune.report.gather import gather
from tests.jobs import ROOT, read_json
from tests.report.conftest import run
from tests.report.folders import add_analysis, add_exports, add_histograms, add_validation


def report(*words):
    return command(["report", *map(str, words)])


def text(path):
    """A page without its scripts and styles."""
    page = Path(path).read_text(encoding="utf-8")
    return html.unescape(re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", " ", page, flags=re.S))


def specs(path):
    """The figures in a page, parsed as JSON that knows no NaN."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    page = Path(path).read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', page, flags=re.S)
    return {name: json.loads(spec, parse_constant=refuse) for name, spec in found}


def test_a_run_ends_with_its_report_and_three_commands(done):
    assert (done.folder / "report.html").exists()
    figures = dict(re.findall(r"^(\w[\w ]*?)  +(.+)$", done.said, flags=re.M))
    assert figures["run folder"] == str(done.folder)
    assert figures["report"] == f"{done.folder}/report.html"
    following = done.said[done.said.index("Next:") :].splitlines()[1:]
    assert [line.split()[:2] for line in following[:3]] == [
        ["distprune", name] for name in ("analyze", "export", "report")
    ]


def test_long_paths_are_printed_whole(done, capsys):
    folder = Path("/") / ("x" * 120) / "run"
    print_summary(read_json(done.folder / "summary.json"), folder, folder / "report.html")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"run folder {folder}" in lines
    assert f"report {folder}/report.html" in lines


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "analysis.json").write_text("{", encoding="utf-8")
    short_phases = [f"phases.{phase}.epochs=1" for phase in ("dense", "prune", "finetune")]
    code, said = run(folder, *short_phases, "eval.every=null")
    assert code == 0
    assert read_json(folder / "status.json")["state"] == "done"
    assert not (folder / "report.html").exists()
    assert "the report could not be written" in (folder / "logs" / "rank-00000.log").read_text(encoding="utf-8")
    assert "report.html" not in said


def test_a_page_is_one_small_file_that_names_nothing_outside(full, tmp_path):
    assert report(full, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(page) < 2_000_000
    markup = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    assert set(re.findall(r'(?:src|href)="(.)', markup)) <= {"#", "d"}
    assert all(uri.startswith("data:") for uri in re.findall(r'src="([^"]*)"', markup))
    assert not re.search(r"url\(|@import", page[: page.index("<body>")])


def test_writing_it_takes_less_than_two_seconds(copied):
    assert report(copied) == 0
    begun = time.perf_counter()
    assert report(copied) == 0
    assert time.perf_counter() - begun < 2


def test_what_was_not_measured_is_named_with_its_command(done):
    shown = text(done.folder / "report.html")
    for missing in ("analyze", "validate"):
        assert f"distprune {missing} {done.folder}" in shown


def test_what_was_measured_is_shown(full, tmp_path, capsys):
    assert report(full, "--out", tmp_path / "page.html") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    shown = text(tmp_path / "page.html")
    for words in (
        "Latency at batch 64 on cpu",
        "Xeon <2 GHz>, 2 threads; torch 2.15.0",
        "Dense kernels gain nothing from zeros.",
        "Corrupted images",
        "The worst 20 of 30 classes",
        "Exports",
        "rolled back",
    ):
        assert words in shown
    assert "distprune analyze" not in shown
    assert "distprune validate" not in shown


def test_layers_have_the_work_that_was_counted_of_their_modules(copied):
    add_analysis(copied, ["0.weight", "3.weight"])
    assert report(copied) == 0
    shown = " ".join(text(copied / "report.html").split())
    assert "sparsity MACs effective MACs 0.weight" in shown
    (row,) = re.findall(r"3\.weight 32 [^%]+% (\S+ \S+)", shown)
    assert row == "2,000 600"


def test_an_export_that_was_cut_off_is_not_shown(copied):
    add_exports(copied)
    (copied / "export" / "onnx").rename(copied / "export" / ".onnx.partial")
    (run,) = gather([str(copied)])
    assert list(run.exports) == ["packed"]


@pytest.mark.parametrize("damaged", ["metrics.jsonl", "histograms.jsonl", "dense.safetensors"])
def test_a_file_that_cannot_be_read_is_named(damaged, copied, capsys):
    (copied / damaged).write_text('{"trainer/st', encoding="utf-8")
    assert report(copied) == 2
    assert str(copied) in capsys.readouterr().err


def test_corruptions_that_were_left_out_are_named_with_their_command(copied):
    add_validation(copied)
    found = read_json(copied / "validation.json")
    found["sets"] = {"eval": found["sets"]["eval"] | {"dense": None, "agree": None, "lost": None, "gained": None}}
    for one in found["sets"]["eval"]["classes"]:
        one["dense"] = None
    (copied / "validation.json").write_text(json.dumps(found), encoding="utf-8")
    assert report(copied) == 0
    shown = text(copied / "report.html")
    assert f"distprune validate {copied} eval.corruptions=true" in shown
    assert "Points lost by class" not in shown


def test_classes_stand_by_what_they_lost(full):
    assert report(full) == 0
    (classes,) = (
        spec for spec in specs(full / "report.html").values() if "class 29" in json.dumps(spec["data"]["values"][0])
    )
    lost = [row["value"] for row in classes["data"]["values"]]
    assert lost == sorted(lost, reverse=True)
    assert lost[0] == pytest.approx(99.0 - (99.5 - 0.7 * 29))


def test_figures_that_are_not_finite_break_nothing(copied):
    layers = list(read_json(copied / "summary.json")["prune/layers"])
    add_analysis(copied, layers)
    add_validation(copied)
    lines = (copied / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows[:5]:
        row |= {"train/loss": math.nan, "train/grad_norm": math.inf, "eval/top1": math.nan}
    (copied / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    summary = read_json(copied / "summary.json")
    summary |= {"eval/loss": math.nan, "eval/perplexity": math.inf, "dense/top1": math.nan, "eval/top1_drop": math.nan}
    (copied / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert report(copied) == 0
    assert specs(copied / "report.html")
    assert not re.search(r"\b(nan|inf)\b", text(copied / "report.html"), flags=re.I)


def test_names_are_escaped(full, four, tmp_path):
    for runs in ([full], four):
        assert report(*runs, "--out", tmp_path / "page.html") == 0
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert "digits &lt;b&gt;&amp;amp;" in page
        assert not re.search(r"<b>", page[: page.index("</main>")])


def test_several_runs_are_compared(four, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report(*four) == 0
    shown = text(tmp_path / "report.html")
    begin = shown.index("Settings in which they differ")
    differ = shown[begin : shown.index("Their course")]
    assert re.findall(r"\b[a-z]+(?:\.[a-z]+)+", differ) == ["prune.sparsity", "prune.pattern"]
    curve = specs(tmp_path / "report.html")["all-1-1-1"]["data"]["values"]
    assert {(row["name"], row["x"]) for row in curve} >= {("digits", 0.9), ("digits-95", 0.95)}
    assert len(curve) == 4


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, done):
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "digits").symlink_to(done.folder)
    runs = gather([str(tmp_path / place / "digits") for place in ("first", "second")])
    assert [one.name for one in runs] == ["first/digits", "second/digits"]


@pytest.mark.parametrize("missing", ["model.safetensors", "summary.json", "config.yaml"])
def test_a_run_that_is_not_done_is_refused(missing, copied, capsys):
    (copied / missing).unlink()
    (copied / "report.html").unlink()
    assert report(copied) == 2
    assert missing in capsys.readouterr().err
    assert not (copied / "report.html").exists()


def test_wrong_words_are_refused(done, copied, tmp_path, capsys):
    (copied / "validation.json").write_text("[1", encoding="utf-8")
    wrong = {
        ("nowhere",): "there is no such thing",
        (done.folder, done.folder): "named twice",
        (done.folder, "--out", tmp_path): "is a folder; name a file",
        (done.folder, "--out", done.folder / "summary.json" / "page.html"): "is not a folder that can be written",
        (copied,): "validation.json cannot be read",
    }
    for words, message in wrong.items():
        assert report(*words) == 2
        assert message in capsys.readouterr().err


def test_an_older_run_without_its_dense_model_is_shown(copied):
    (copied / "dense.safetensors").unlink()
    (copied / "histograms.jsonl").unlink()
    assert report(copied) == 0
    shown = text(copied / "report.html")
    assert "the dense model was not kept" in shown
    assert "before and after" not in shown


def test_histograms_count_every_weight(done):
    (found,) = gather([str(done.folder)])
    for when, file in (("before", "dense"), ("after", "model")):
        weights = load_file(done.folder / f"{file}.safetensors")
        for name, layer in found.histograms.items():
            counts, mine = getattr(layer, when), weights[name]
            assert counts.zeros == int((mine == 0).sum())
            assert sum(counts.counts) == int((mine != 0).sum())
            inside = mine[mine != 0].double().clamp(-counts.limit, counts.limit)
            independent, _ = np.histogram(inside, bins=64, range=(-counts.limit, counts.limit))
            assert counts.counts == independent.tolist()


def test_logged_histograms_go_before_counted_ones(copied):
    add_histograms(copied, ["0.weight"])
    (found,) = gather([str(copied)])
    assert list(found.histograms) == ["0.weight"]
    assert (found.histograms["0.weight"].before.zeros, found.histograms["0.weight"].after.zeros) == (24, 57)


def pixels(uri):
    """Red, green, blue and alpha of an image, by row and column."""
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    return torch.from_numpy(np.array(image))


def test_kernels_are_those_of_the_first_convolution_and_zeros_are_transparent(done):
    (found,) = gather([str(done.folder)])
    weights = load_file(done.folder / "model.safetensors")["0.weight"]
    assert {kernel.layer for kernel in found.kernels} == {"0.weight"}
    assert [kernel.index for kernel in found.kernels] == [0, 2, 4, 6, 9, 11, 13, 15]
    for kernel in found.kernels:
        opaque = pixels(kernel.after[0])[..., 3] > 0
        assert torch.equal(opaque, weights[kernel.index, 0] != 0)
        assert kernel.zeros == int((~opaque).sum())
        assert bool((pixels(kernel.before[0])[..., 3] == 255).all())


def test_filters_that_were_taken_out_are_shown_as_removed(channels):
    (found,) = gather([str(channels.folder)])
    left = read_json(channels.folder / "summary.json")["prune/layers"]["0"]
    dense = load_file(channels.folder / "dense.safetensors")["0.weight"]
    pruned = load_file(channels.folder / "model.safetensors")["0.weight"]
    assert len(pruned) == 16 - left["zeros"]
    kept = [kernel for kernel in found.kernels if not kernel.removed]
    assert all(kernel.zeros == 9 for kernel in found.kernels if kernel.removed)
    assert len(kept) >= 8 - left["zeros"]
    assert len(dense) == 16
    layer = found.histograms["0.weight"]
    assert layer.before.zeros + sum(layer.before.counts) == dense.numel()
    assert layer.after.zeros + sum(layer.after.counts) == pruned.numel()


def test_exports_are_weighed_without_their_cards(copied):
    add_exports(copied)
    (found,) = gather([str(copied)])
    assert {name: count for name, (count, _) in found.exports.items()} == {"onnx": 155000, "packed": 21010}


def test_thinned_points_keep_the_extremes():
    points = [(step, math.sin(step)) for step in range(10_000)]
    points[1234], points[4321] = (1234, 9.0), (4321, -9.0)
    points[777] = (777, None)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 2
    assert {points[0], points[1234], points[4321], points[-1]} <= set(kept)
    assert kept == sorted(kept, key=lambda point: point[0])
    assert thinned(points[:50]) == points[:50]


def test_shortened_labels_stay_different():
    long = [f"encoder.layer.{i}.attention.self.query.weight" for i in range(12)]
    long += [f"encoder.layer.{i}.output.self.query.weight" for i in range(12)]
    assert len(set(short(long))) == 24
    assert all(len(label) < 30 for label in short(long))
    assert short(["conv1.weight", "fc.weight"]) == ["conv1", "fc"]
    assert all(len(label) <= 22 for label in short(["a" * 20 + "b" * 20]))


def test_the_commands_of_the_page_on_reports_run(done, channels, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"^```\n(.*?)^```", page, flags=re.M | re.S) for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("distprune report ")]
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for words in commands:
        for name in (word for word in words if word.startswith("runs/")):
            if not Path(name).exists():
                Path(name).symlink_to(done.folder)
        assert command(words[1:]) == 0
    assert len(commands) >= 2
    assert Path("sparsities.html").exists()
