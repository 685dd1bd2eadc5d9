"""The offline W&B file, read back record by record."""

import json
import struct
import subprocess
import sys
import zlib

import pytest

from tests.jobs import DIGITS, SHORT, read_json, read_rows

wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")

BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path):
    """Records of a .wandb file: a 7-byte header, then a LevelDB log in blocks of 32 KiB, each entry checksummed."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, parts = 7, []
    while position + 7 <= len(content):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        checksum, size, kind = struct.unpack("<IHB", content[position : position + 7])
        data = content[position + 7 : position + 7 + size]
        assert zlib.crc32(data, zlib.crc32(bytes([kind]))) == checksum
        position += 7 + size
        parts.append(data)
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


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


def items(entries):
    """Name -> value of protobuf entries that hold JSON."""
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


def test_the_run_has_the_id_in_the_folder_and_its_tags(folder, records):
    (run,) = [record.run for record in records if record.HasField("run")]
    assert run.run_id == (folder / "wandb_id").read_text()
    assert (run.project, run.run_group, run.job_type) == ("distprune", "tests", "prune")
    assert set(run.tags) == {"small", "first"}
    assert run.display_name == "digits"


def test_the_config_is_the_resolved_one(records):
    configs = [record.run.config for record in records if record.HasField("run")]
    configs += [record.config for record in records if record.HasField("config")]
    config = {name: value for c in configs for name, value in items(c.update).items()}
    assert config["prune"]["sparsity"] == 0.9
    assert config["phases"]["dense"]["epochs"] == 3
    assert config["world_size"] == 1


def test_trainer_step_is_the_axis_of_every_metric(records):
    metrics = {m.name or m.glob_name: m for m in (r.metric for r in records if r.HasField("metric"))}
    assert metrics["*"].step_metric == "trainer/step"
    assert metrics["eval/top1"].summary.max
    assert metrics["eval/top1"].step_metric == "trainer/step"


def test_the_history_is_that_of_metrics_jsonl(folder, records):
    history = [items(record.history.item) for record in records if record.HasField("history")]
    rows = read_rows(folder)
    assert len(history) == len(rows)
    for logged, row in zip(history, rows, strict=True):
        assert {name: value for name, value in logged.items() if not name.startswith("_")} == pytest.approx(row)


def test_the_summary_is_there(folder, records):
    summary = {}
    for record in records:
        if record.HasField("summary"):
            summary |= items(record.summary.update)
    written = read_json(folder / "summary.json")
    assert summary["prune/zeros"] == written["prune/zeros"]
    assert summary["eval/top1_drop"] == pytest.approx(written["eval/top1_drop"])
    assert summary["mask_digest"] == written["mask_digest"]
    assert any(record.HasField("exit") and record.exit.exit_code == 0 for record in records)
