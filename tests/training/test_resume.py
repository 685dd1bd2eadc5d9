"""Runs that are stopped go on with the same command and end as if nothing had happened."""

import hashlib
import json
import signal
import struct

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs import read_json, read_rows
from tests.training.runs import reached, whole


def test_stops_at_any_place_leave_no_trace(tmp_path, start):
    code, output = start(0, "run.dir=undisturbed", "model.channels_last=true")
    assert code == 0, output
    folder = tmp_path / "stopped"
    for step, number, expected in (
        (30, signal.SIGTERM, 75),
        (200, signal.SIGKILL, -signal.SIGKILL),
        (350, signal.SIGUSR1, 75),
        (500, signal.SIGINT, 75),
    ):
        now = {"send": number, "once": reached(folder, step)}
        code, output = start(0, "run.dir=stopped", "model.channels_last=true", **now)
        assert code == expected, output
        if expected == 75:
            status = read_json(folder / "status.json")
            assert status["state"] == "preempted"
            assert "a signal" in status["error"]
            assert "Traceback" not in output
    code, output = start(0, "run.dir=stopped", "model.channels_last=true")
    assert code == 0, output
    assert "going on from step" in output
    assert whole(folder) == whole(tmp_path / "undisturbed")
    assert read_json(folder / "status.json")["state"] == "done"


def test_a_stop_file_and_a_time_budget_stop_too(tmp_path, start):
    folder = tmp_path / "run"
    code, output = start(0, "run.dir=run", "run.max_minutes=0.0001")
    assert code == 75, output
    assert "run.max_minutes" in read_json(folder / "status.json")["error"]
    (folder / "stop").touch()
    code, output = start(0, "run.dir=run", send=signal.SIGCONT, once=reached(folder, 40))
    assert code == 0, output
    assert not (folder / "stop").exists()


def test_another_job_in_the_folder_is_refused(tmp_path, start):
    code, _ = start(0, "run.dir=run", "run.max_minutes=0.0001")
    assert code == 75
    code, output = start(0, "run.dir=run", "prune.sparsity=0.5", "run.seed=3", "run.log_every=5")
    assert code == 2
    assert "prune.sparsity: was 0.9 when the run in run began, now 0.5" in output
    assert "run.seed" in output
    assert "run.log_every" not in output


@pytest.mark.parametrize("damage", ["a file that is cut short", "a mask that is another, with a manifest that fits"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, start, damage):
    code, output = start(0, "run.dir=undisturbed")
    assert code == 0, output
    folder = tmp_path / "run"
    code, output = start(0, "run.dir=run", send=signal.SIGTERM, once=reached(folder, 400))
    assert code == 75, output
    before, newest = sorted((folder / "checkpoints").glob("step-*"))[-2:]
    (shard,) = newest.glob("shard-*")
    if damage == "a file that is cut short":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        flip_a_bit_of(shard, "mask.8.weight")
        manifest = read_json(newest / "manifest.json")
        manifest[shard.name]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
        (newest / "manifest.json").write_text(json.dumps(manifest, indent=2))
    code, output = start(0, "run.dir=run")
    assert code == 0, output
    assert f"{newest.name} is damaged and is passed over" in output
    assert f"{before.name}" in output
    assert "Traceback" not in output
    assert whole(folder) == whole(tmp_path / "undisturbed")


def flip_a_bit_of(path, name):
    content = bytearray(path.read_bytes())
    (header,) = struct.unpack("<Q", content[:8])
    begin, _ = json.loads(content[8 : 8 + header])[name]["data_offsets"]
    content[8 + header + begin] ^= 1
    path.write_bytes(content)


def test_the_best_and_the_first_at_the_final_sparsity_are_kept(tmp_path, start):
    code, output = start(0, "run.dir=run", "eval.every=15")
    assert code == 0, output
    checkpoints, rows = tmp_path / "run" / "checkpoints", read_rows(tmp_path / "run")
    # The schedule ends at 440, but of so few weights as many are zero some updates before.
    sparsities = {row["trainer/step"]: row["prune/sparsity"] for row in rows if "prune/sparsity" in row}
    reached = next(step for step, sparsity in sparsities.items() if sparsity == sparsities[440])
    rows = [row for row in rows if "eval/top1" in row and row["trainer/step"] >= reached]
    final = rows[0]["trainer/step"]
    assert reached <= final <= 440
    best = max(rows, key=lambda row: row["eval/top1"])  # the first of those that are equal
    assert (checkpoints / "best").read_text() == f"step-{best['trainer/step']:08d}\n"
    assert (checkpoints / "first-final").read_text() == f"step-{final:08d}\n"
    assert (checkpoints / "latest").read_text() == "step-00000660\n"
    kept = {int(path.name[5:]) for path in checkpoints.glob("step-*")}
    assert kept >= {final, best["trainer/step"], 660}
    assert len(kept) <= 4
    state = read_json(checkpoints / "step-00000660" / "state.json")
    assert state["best_top1"] == best["eval/top1"]


def test_checkpoints_in_the_background_are_those_of_the_foreground(tmp_path, start):
    for name, background in (("front", "false"), ("back", "true")):
        code, output = start(0, f"run.dir={name}", f"checkpoint.background={background}", "optimizer={name: adamw}")
        assert code == 0, output
    shards = [next((tmp_path / name / "checkpoints" / "step-00000660").glob("shard-*")) for name in ("front", "back")]
    front, back = (load_file(shard) for shard in shards)
    assert front.keys() == back.keys()
    assert all(torch.equal(front[name], back[name]) for name in front)
    states = [read_json(shard.with_name("state.json")) for shard in shards]
    for state in states:
        del state["config"], state["progress"]
    assert states[0] == states[1]
