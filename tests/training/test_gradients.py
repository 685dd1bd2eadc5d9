"""Runs on two ranks that do not send the gradients of pruned weights end with the bytes of those that send all."""

import re
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from distprune.config import load_config
from distprune.training import devices
from tests.jobs import DIGITS, SHORT, read_json, read_rows
from tests.training.runs import reached

pytestmark = pytest.mark.slow
SINGLE = ("train.clip_norm=1.0", "train.accumulate=2")
CHANNELS = ("prune.pattern=channels", "prune.sparsity=0.5", "prune.channels={shrink: live, shrink_every: 3}")


@pytest.mark.parametrize("settings", [SINGLE, CHANNELS], ids=["weights", "channels that are removed"])
def test_the_outcome_is_that_of_sending_all(settings, tmp_path, start):
    for way in ("dense", "packed"):
        code, output = start(2, f"run.dir={way}", f"train.gradients={way}", *SHORT, *settings)
        assert code == 0, output
    ours, theirs = (load_file(tmp_path / way / "model.safetensors") for way in ("packed", "dense"))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    for mine, other in zip(*(read_rows(tmp_path / way) for way in ("packed", "dense")), strict=True):
        assert [mine.get(key) for key in ("train/loss", "train/grad_norm")] == [
            other.get(key) for key in ("train/loss", "train/grad_norm")
        ]
    assert (
        read_json(tmp_path / "packed/summary.json")["mask_digest"]
        == read_json(tmp_path / "dense/summary.json")["mask_digest"]
    )


def test_a_run_that_measures_goes_on_where_it_was_stopped(tmp_path, start):
    job = ("run.dir=run", *SHORT)  # train.gradients is `auto`
    start(2, *job, send=signal.SIGKILL, once=reached(tmp_path / "run", 80), everyone=True)
    code, output = start(2, *job)
    assert code == 0, output
    logged = (tmp_path / "run/logs/rank-00000.log").read_text(encoding="utf-8")
    assert re.search(r"gradients take .* ms a step dense, .* ms packed: (dense|packed) from now on", logged)
    code, output = start(2, "run.dir=dense", "train.gradients=dense", *SHORT)
    assert code == 0, output
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "dense"))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.parametrize(
    ("hosts", "shards", "device", "exchange"),
    [
        ("aa", False, "cpu", "auto"),
        ("ab", False, "cpu", "auto"),
        ("aab", False, "cpu", "auto"),
        ("aaa", False, "cpu", "dense"),
        ("ab", True, "cpu", "dense"),
        ("ab", False, "cuda", "dense"),
    ],
)
def test_what_auto_measures(hosts, shards, device, exchange, monkeypatch):
    monkeypatch.setattr(devices, "gather_object", lambda mine: list(hosts))
    accelerator = SimpleNamespace(num_processes=len(hosts), is_fsdp2=shards, device=torch.device(device))
    assert devices.gradient_exchange(load_config(DIGITS, []), accelerator) == exchange


def test_shards_have_nothing_to_pack(start):
    code, output = start(2, "run.dir=run", "train.gradients=packed", *SHORT, launcher="fsdp2")
    assert code != 0
    assert "train.gradients: packed is for replicas" in output
