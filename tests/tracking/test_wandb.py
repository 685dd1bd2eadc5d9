"""The offline W&B file, read back record by record."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from distprune.tracking.wandb import _is_reachable
from distprune.tracking.wandb_file import read_items, read_records
from tests.jobs import DIGITS, SHORT, own_cache, read_json, read_rows
from tests.tracking.files import all_steps, segments, steps
from tests.training.runs import Starter, descendants, kill, reached, when


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("wandb")
    words = [*SHORT, "tracking.wandb.mode=offline", "tracking.wandb.tags=[small, first]", "tracking.wandb.group=tests"]
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
    history = [read_items(record.history.item) for record in records if record.HasField("history")]
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
    assert f"wandb sync run/wandb/offline-run-*-{(folder / 'wandb_id').read_text()}" in output
    found = segments(folder)
    assert {segment.run.run_id for segment in found} == {(folder / "wandb_id").read_text()}
    assert all_steps(found) == [row["trainer/step"] for row in read_rows(folder)]
    assert len([segment for segment in found if segment.rows]) > 1


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


@pytest.mark.slow
def test_of_a_step_with_two_rows_both_are_handed_on_once(tmp_path):
    rows = [{"trainer/step": 1, "a": 1.0}, {"trainer/step": 2, "a": 2.0}, {"trainer/step": 2, "b": 3.0}]
    program = """
import json, sys
from pathlib import Path
from distprune.config.schema import Wandb
from distprune.tracking.wandb import WandbTracker
tracker = WandbTracker(Wandb(mode="offline"), Path("."), {})
for row in json.loads(sys.argv[1]):
    tracker.log(row)
tracker.finish(None)
"""
    for part in (rows[:2], rows[1:], rows):
        (tmp_path / "metrics.jsonl").write_text("")
        subprocess.run([sys.executable, "-c", program, json.dumps(part)], cwd=tmp_path, check=True)
    found = []
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        found += [read_items(r.history.item) for r in read_records(path) if r.HasField("history")]
    assert [{name: v for name, v in row.items() if not name.startswith("_")} for row in found] == rows


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
        assert _is_reachable() is found
