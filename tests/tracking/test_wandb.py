"""The offline W&B file, read back record by record."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distprune.cli import main as command
from distprune.tracking.wandb import unreachable
from distprune.tracking.wandb_artifacts import log_models, sparsity_alias
from distprune.tracking.wandb_file import kind_of, read_items, read_records
from tests.jobs import DIGITS, SHORT, own_cache, read_json, read_rows
from tests.tracking.files import all_steps, segments, steps
from tests.training.runs import Starter, descendants, kill, reached, when


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("wandb")
    words = [
        *SHORT,
        "tracking.wandb={mode: offline, artifacts: true}",
        "eval.every=15",
        "tracking.wandb.tags=[small, first]",
        "tracking.wandb.group=tests",
    ]
    program = [sys.executable, "-m", "distprune.train", str(DIGITS), *words]
    ended = subprocess.run(program, cwd=where, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return where / "runs" / "digits"


@pytest.fixture(scope="module")
def records(folder):
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return list(read_records(path))


def test_the_run_has_the_id_in_the_folder_and_its_tags(folder, records):
    (run,) = [record.run for record in records if record.HasField("run")]
    assert run.run_id == (folder / "wandb_id").read_text()
    assert (run.project, run.run_group, run.job_type) == ("distprune", "tests", "prune")
    assert set(run.tags) == {"small", "first"}
    assert run.display_name == "digits"


def test_the_config_is_the_resolved_one(records):
    configs = [record.run.config for record in records if record.HasField("run")]
    configs += [record.config for record in records if record.HasField("config")]
    config = {name: value for c in configs for name, value in read_items(c.update).items()}
    assert config["prune"]["sparsity"] == 0.9
    assert config["phases"]["dense"]["epochs"] == 3
    assert config["world_size"] == 1


def test_trainer_step_is_the_axis_of_every_metric(records):
    metrics = {m.name or m.glob_name: m for m in (r.metric for r in records if r.HasField("metric"))}
    assert metrics["*"].step_metric == "trainer/step"
    assert metrics["eval/top1"].summary.max
    assert metrics["eval/top1"].step_metric == "trainer/step"


def test_the_history_is_that_of_metrics_jsonl(folder, records):
    every = [read_items(record.history.item) for record in records if record.HasField("history")]
    history = [row for row in every if not kind_of(row)]
    rows = read_rows(folder)
    assert len(history) == len(rows)
    for logged, row in zip(history, rows, strict=True):
        assert {name: value for name, value in logged.items() if not name.startswith("_")} == pytest.approx(row)


def test_the_summary_is_there(folder, records):
    summary = {}
    for record in records:
        if record.HasField("summary"):
            summary |= read_items(record.summary.update)
    written = read_json(folder / "summary.json")
    assert summary["prune/zeros"] == written["prune/zeros"]
    assert summary["eval/top1_drop"] == pytest.approx(written["eval/top1_drop"])
    assert summary["mask_digest"] == written["mask_digest"]
    assert any(record.HasField("exit") and record.exit.exit_code == 0 for record in records)


def media(records, kind):
    """Rows that hold histograms or tables."""
    rows = [read_items(record.history.item) for record in records if record.HasField("history")]
    return [row for row in rows if kind_of(row).startswith(kind)]


def test_the_histograms_are_those_of_histograms_jsonl(folder, records):
    lines, rows = read_rows(folder, "histograms.jsonl"), media(records, "weights")
    assert [row["trainer/step"] for row in rows] == [line["trainer/step"] for line in lines]
    for row, line in zip(rows, lines, strict=True):
        for name, layer in line["layers"].items():
            assert row[f"weights/{name}/values"] == layer["counts"]
            edges = row[f"weights/{name}/bins"]
            assert len(edges) == 65
            assert [edges[place] for place in (0, 32, 64)] == [-layer["limit"], 0.0, layer["limit"]]


def test_there_is_a_table_of_layers_at_each_milestone_of_sparsity(folder, records):
    rows, summary, found = read_rows(folder), read_json(folder / "summary.json"), {}
    for row in media(records, "layers/"):
        found[kind_of(row)] = row["trainer/step"], row[f"{kind_of(row)}/path"]
    assert list(found) == ["layers/sparsity-0.50", "layers/sparsity-0.70", "layers/sparsity-0.80",
                           "layers/sparsity-0.90", "layers/final"]  # fmt: skip
    (files,) = folder.glob("wandb/offline-run-*/files")
    for name, (step, path) in found.items():
        table = read_json(files / path)
        assert table["columns"] == ["layer", "shape", "weights", "zeros", "sparsity"]
        assert {layer: shape for layer, shape, *_ in table["data"]}["3.weight"] == "32 x 16 x 3 x 3"
        assert all(zeros == round(share * weights) for _, _, weights, zeros, share in table["data"])
        if name == "layers/final":
            assert step == summary["steps"]
            assert {row[0]: row[3] for row in table["data"]} == {
                layer: of["zeros"] for layer, of in summary["prune/layers"].items()
            }
        else:
            reached = next(row for row in rows if row.get("prune/sparsity", 0.0) >= float(name[-4:]) - 1e-4)
            assert step == reached["trainer/step"]
            assert sum(zeros for *_, zeros, _ in table["data"]) == round(reached["prune/sparsity"] * 38160)


def test_the_dense_the_best_and_the_final_model_are_versions_of_one_artifact(folder, records):
    summary = read_json(folder / "summary.json")
    found = [r.artifact for r in records if r.HasField("artifact") and r.artifact.type == "model"]
    assert {artifact.name for artifact in found} == {f"model-{(folder / 'wandb_id').read_text()}"}
    told = [(set(artifact.aliases) - {"latest"}, json.loads(artifact.metadata)) for artifact in found]
    best = summary["best/step"]
    expected = [({"dense"}, {"top1": summary["dense/top1"], "sparsity": 0.0, "step": None})]
    final = {"top1": summary["eval/top1"], "sparsity": summary["prune/sparsity"], "step": summary["steps"]}
    if best != summary["steps"]:
        expected += [({"best"}, {**final, "top1": summary["best/top1"], "step": best})]
        assert (folder / "best.safetensors").exists()
    expected += [({"final", "sparsity-0.90"} | ({"best"} if best == summary["steps"] else set()), final)]
    assert told == expected
    for artifact in found:
        for entry in artifact.manifest.contents:
            assert entry.local_path == str(folder / entry.path), "nothing is copied"


def test_the_best_model_has_the_accuracy_that_is_said_of_it(folder, tmp_path, capsys, monkeypatch):
    summary = read_json(folder / "summary.json")
    if summary["best/step"] == summary["steps"]:
        pytest.skip("the last step was the best")
    monkeypatch.chdir(tmp_path)
    assert command(["evaluate", str(folder / "config.yaml"), f"model.weights={folder / 'best.safetensors'}"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["eval/top1"] == summary["best/top1"]
    assert evaluated["params/total"] - evaluated["params/nonzero"] >= summary["prune/zeros"]


def test_an_alert_says_that_the_run_is_done(folder, records):
    (alert,) = [record.alert for record in records if record.HasField("alert")]
    assert alert.title == "digits: the run is done"
    assert f"{read_json(folder / 'summary.json')['eval/top1']:.2f} % at sparsity 0.9000" in alert.text


def test_models_that_w_and_b_does_not_take_do_not_end_the_run(folder, caplog, monkeypatch):
    class Full:
        id = "abc"

        def log_artifact(self, artifact, aliases):
            raise OSError("no room")

    monkeypatch.setattr(logging.getLogger("distprune"), "propagate", True)
    log_models(Full(), folder, read_json(folder / "summary.json"))
    assert f"W&B has not taken all models (no room); they are in {folder}" in caplog.text


def test_leet_shows_an_offline_run_in_a_terminal(folder):
    words = ["wandb", "leet", "inspect", "--summary", "--json", str(folder / "wandb" / "latest-run")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shown = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path})
    told = json.loads(shown.stdout)
    assert read_json(folder / "summary.json")["mask_digest"] in json.dumps(told)


@pytest.mark.parametrize(
    ("sparsity", "alias"),
    [(0.9, "0.90"), (0.8999999, "0.90"), (0.98, "0.98"), (0.995, "0.995"), (0.99996, "0.999"), (0.5234, "0.523")],
)
def test_aliases_name_the_sparsity(sparsity, alias):
    assert sparsity_alias(sparsity) == f"sparsity-{alias}"


def test_accuracy_by_class_is_a_table_of_the_summary(folder, records):
    summary = {}
    for record in records:
        if record.HasField("summary"):
            summary |= read_items(record.summary.update)
    (path,) = folder.glob(f"wandb/offline-run-*/files/{summary['validation/classes']['path']}")
    (classes,) = (found["classes"] for found in read_json(folder / "validation.json")["sets"].values())
    table = read_json(path)
    assert table["columns"] == ["set", "class", "samples", "dense", "pruned"]
    assert table["data"] == [["eval", *(one[k] for k in ("name", "samples", "dense", "pruned"))] for one in classes]


@pytest.fixture
def start_offline(tmp_path):
    """Start a job in tmp_path/run in one process, W&B offline."""
    start = Starter(tmp_path, {**os.environ, "WANDB_MODE": "offline", "DISTPRUNE_CACHE": own_cache(tmp_path)})
    return lambda *words, **how: start(0, "run.dir=run", "tracking.wandb.mode=auto", *words, **how)


def service(folder):
    """The processes that W&B has started for a run."""
    return descendants(read_json(folder / "heartbeats" / "rank-00000.json")["pid"])


@pytest.mark.slow
def test_after_a_kill_the_files_hold_each_step_once(tmp_path, start_offline):
    words = ("run.log_every=2", "checkpoint.every=100")
    folder = tmp_path / "run"
    for step in (50, 170, 350):  # the first before there is a checkpoint
        code, output = start_offline(*words, once=reached(folder, step), send=signal.SIGKILL)
        assert code == -signal.SIGKILL, output
    code, output = start_offline(*words)
    assert code == 0, output
    assert f"wandb sync run/wandb/offline-run-*-{(folder / 'wandb_id').read_text()}*" in output
    found = segments(folder)
    assert {segment.run.run_id for segment in found} == {(folder / "wandb_id").read_text()}
    assert all_steps(found) == [row["trainer/step"] for row in read_rows(folder)]
    assert len([segment for segment in found if segment.rows]) > 1
    media = [row for segment in found for row in segment.media]
    histograms = [line["trainer/step"] for line in read_rows(folder, "histograms.jsonl")]
    assert sorted(step for kind, step in media if kind == "weights") == histograms
    tables = [kind for kind, _ in media if kind != "weights"]
    assert sorted(tables) == sorted({*tables, "layers/sparsity-0.90", "layers/final"})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_every_process_stops_the_run_and_nothing_is_lost(tmp_path, start_offline, number):
    folder = tmp_path / "run"

    def signal_all():
        for process in service(folder):
            os.kill(process, number)

    code, output = start_offline(once=when(reached(folder, 100), signal_all), send=number)
    assert code == 75, output
    assert "Traceback" not in output
    assert read_json(folder / "status.json")["state"] == "preempted"
    if number == signal.SIGUSR1:  # else W&B's service has ended, too
        assert "W&B has failed" not in output
    code, output = start_offline()
    assert code == 0, output
    assert all_steps(segments(folder)) == [row["trainer/step"] for row in read_rows(folder)]


@pytest.mark.slow
def test_the_end_of_w_and_b_is_not_the_end_of_the_run(tmp_path, start_offline):
    folder = tmp_path / "run"
    ended = when(reached(folder, 100), lambda: kill(service(folder)))
    code, output = start_offline(once=ended, send=signal.SIGCONT)
    assert code == 0, output
    assert "distprune: W&B has failed" in output
    assert read_json(folder / "status.json")["state"] == "done"


PROGRAM = """
import json, sys
from pathlib import Path
from unittest import mock
from distprune.config.schema import Wandb
from distprune.tracking.tracker import Histogram
from distprune.tracking.wandb import WandbTracker
rows, steps, ending, second = json.loads(sys.argv[1])
with mock.patch("wandb.Settings._start_datetime", second):
    tracker = WandbTracker(Wandb(mode="offline"), Path("."), {}, {"a": (2, 5)})
for row in rows:
    tracker.log(row)
for step in steps:
    tracker.log_histograms(step, {"a": Histogram(1.0, [1] * 64, 3)})
if ending == "stopped":
    tracker.preempt()
tracker.finish(None if ending != "done" else {
    "steps": 9, "prune/layers": {"a": {"shape": [2, 5], "zeros": 9, "sparsity": 0.9}}, "prune/sparsity": 0.9,
    "eval/top1": 50.0, "dense/top1": 90.0,
})
"""


@pytest.fixture
def track(tmp_path):
    """Hand a tracker of its own process rows and histograms of steps; returns all records of all such processes."""

    def run(rows, steps=(), ending="killed", second="20260102_030405"):
        (tmp_path / "metrics.jsonl").write_text("")
        words = json.dumps([rows, list(steps), ending, second])
        environment = {**os.environ, "HOME": str(tmp_path / "home")}
        subprocess.run([sys.executable, "-c", PROGRAM, words], cwd=tmp_path, env=environment, check=True)
        return [r for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")) for r in read_records(path)]

    return run


def plain(records):
    """The rows of figures, without what W&B adds."""
    rows = [read_items(record.history.item) for record in records if record.HasField("history")]
    return [{name: v for name, v in row.items() if not name.startswith("_")} for row in rows if not kind_of(row)]


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, 1], ids=["in-one-second", "in-three"])
def test_of_a_step_with_two_rows_both_are_handed_on_once(track, length):
    rows = [{"trainer/step": 1, "a": 1.0}, {"trainer/step": 2, "a": 2.0}, {"trainer/step": 2, "b": 3.0}]
    for start, part in enumerate((rows[:2], rows[1:], rows)):
        records = track(part, second=f"20260102_03040{start * length}")
    assert plain(records) == rows


@pytest.mark.slow
def test_histograms_tables_and_alerts_are_handed_on_once(track, tmp_path):
    rows = [
        {"trainer/step": 1, "prune/sparsity": 0.5, "prune/layer/a": 0.5, "eval/top1": 90.0, "dense/top1": 90.0},
        {"trainer/step": 2, "prune/sparsity": 0.89999, "prune/layer/a": 0.9},
        {"trainer/step": 3, "eval/top1": 60.0, "dense/top1": 90.0},
        {"trainer/step": 4, "eval/top1": 50.0, "dense/top1": 90.0},
    ]
    track(rows[:2], [1, 1], "stopped")
    track(rows[:3], [1, 1, 2], "stopped")
    records = track(rows, [1, 1, 2, 3], "done")
    assert plain(records) == rows
    assert [row["trainer/step"] for row in media(records, "weights")] == [1, 1, 2, 3]
    tables = [(kind_of(row), row["trainer/step"]) for row in media(records, "layers/")]
    assert tables == [("layers/sparsity-0.50", 1), ("layers/sparsity-0.90", 2), ("layers/final", 9)]
    titles = [record.alert.title.partition(": ")[2] for record in records if record.HasField("alert")]
    stopped = "the run was stopped"
    assert titles == [stopped, "accuracy has collapsed", stopped, "the run is done"]
    assert list(tmp_path.glob("wandb/artifacts/staging/*")), "tables wait for their upload in the run folder"
    assert not list(tmp_path.glob("home/**/staging/*"))


def test_the_accuracy_of_given_weights_is_handed_on_at_step_0(tmp_path, start_offline, folder):
    weights = ("model.args={}", f"model.weights={folder / 'model.safetensors'}", "phases.dense.epochs=0")
    code, output = start_offline(*weights, "phases.prune.epochs=1")
    assert code == 0, output
    (segment,) = segments(tmp_path / "run")
    assert steps(segment)[0] == 0
    assert steps(segment) == [row["trainer/step"] for row in read_rows(tmp_path / "run")]


@pytest.mark.parametrize(
    ("proxies", "found"),
    [
        ({"http": "127.0.0.1:PORT"}, True),
        ({"http": "http://127.0.0.1:PORT"}, True),
        ({"http": "http://127.0.0.1:9"}, False),
        ({"http": "http://127.0.0.1:nonsense"}, False),
        ({"http": "http://127.0.0.1:9", "no": "localhost"}, True),
        ({}, True),
    ],
)
def test_w_and_b_is_looked_for_where_it_will_be_called(monkeypatch, proxies, found):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in proxies.items():
            monkeypatch.setenv(f"{name}_proxy", value.replace("PORT", port))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://localhost:{port}")
        assert (unreachable() is None) is found
