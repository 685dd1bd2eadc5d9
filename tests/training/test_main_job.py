"""The first command of the README, on 1, 2 and 3 processes, judged by what lies in the run folder."""

import json
import struct

import numpy as np
import pytest

from tests.jobs import DIGITS, read_json, read_rows

DTYPES = {"F32": np.float32, "I64": np.int64, "U8": np.uint8}


def read_safetensors(path):
    """The tensors of a file by the format's own description: header length, JSON header, raw bytes."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = np.frombuffer(content[8 + size + begin : 8 + size + end], DTYPES[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_digits_end_at_90_percent_and_nearly_as_good(launch, tmp_path, processes):
    ended = launch(processes, DIGITS)
    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "runs" / "digits"
    assert read_json(folder / "status.json")["state"] == "done"

    summary = read_json(folder / "summary.json")
    assert summary["eval/top1"] >= 97.5
    assert summary["eval/top1_drop"] <= 1.0
    assert summary["dense/top1"] - summary["eval/top1"] == pytest.approx(summary["eval/top1_drop"])
    assert summary["world_size"] == processes

    model, masks = read_safetensors(folder / "model.safetensors"), read_safetensors(folder / "masks.safetensors")
    weights = sum(model[name].size for name in masks)
    zeros = sum(int((model[name] == 0).sum()) for name in masks)
    assert zeros == round(0.9 * weights) == summary["prune/zeros"]
    for name, packed in masks.items():
        rows = model[name].reshape(model[name].shape[0], -1)
        kept = np.unpackbits(packed, axis=1, bitorder="little")[:, : rows.shape[1]].astype(bool).ravel()
        assert not model[name].ravel()[~kept].any()
        assert not np.signbit(model[name].ravel()[~kept]).any()
        assert model[name].size - kept.sum() == summary["prune/layers"][name]["zeros"]

    rows = read_rows(folder)
    assert [row["trainer/step"] for row in rows] == sorted({row["trainer/step"] for row in rows})
    assert rows[-1]["eval/top1"] == summary["eval/top1"]
    assert {path.name for path in (folder / "logs").iterdir()} == {f"rank-{r:05d}.log" for r in range(processes)}
    assert "dense accuracy" in ended.stdout
    assert "Traceback" not in ended.stderr
