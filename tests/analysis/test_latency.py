"""How forms of a model are timed side by side: with forms whose times are known."""

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from distprune.analysis import latency
from distprune.analysis.latency import MIN_ROUNDS, Form, Timing, measure, of_model

CPU = torch.device("cpu")


def sleeping(name, seconds, calls):
    def run(inputs):
        calls.append(name)
        time.sleep(seconds)

    return Form(name, CPU, run)


def test_a_form_that_takes_half_the_time_is_twice_as_fast(monkeypatch):
    monkeypatch.setattr(latency, "SLICE_S", 0.0)
    calls, rounds = [], []
    forms = [sleeping("slow", 0.02, calls), sleeping("fast", 0.01, calls)]
    slow, fast = measure(forms, torch.zeros(4, 1), 0.01, lambda: rounds.append(1))
    assert fast.speedup == pytest.approx(2, rel=0.15)
    assert (slow.speedup, slow.verdict, fast.verdict) == (1, 0, 1)
    assert fast.low_ms <= fast.median_ms <= fast.high_ms
    assert fast.samples_per_s == pytest.approx(4 / (fast.median_ms / 1000))
    assert fast.peak_bytes is None, "no tensor was made"
    assert len(rounds) >= MIN_ROUNDS
    there, back = ["slow", "slow", "fast", "fast"], ["fast", "fast", "slow", "slow"]  # the first of two is not timed
    assert calls[-8:] in ([*there, *back], [*back, *there]), "the order alternates"


def test_what_pruning_gains_is_told_from_what_a_runtime_gains(monkeypatch):
    monkeypatch.setattr(latency, "SLICE_S", 0.0)
    calls = []
    forms = [sleeping("dense", 0.04, calls), sleeping("dense onnx", 0.02, calls), sleeping("onnx", 0.01, calls)]
    forms[2] = replace(forms[2], peer="dense onnx")
    _, dense, pruned = measure(forms, torch.zeros(4, 1), 0.01)
    assert (pruned.speedup, pruned.gain) == (pytest.approx(4, rel=0.15), pytest.approx(2, rel=0.15))
    assert pruned.gain_low <= pruned.gain <= pruned.gain_high
    assert dense.gain is None


def test_a_small_or_unsteady_difference_is_none():
    def timing(ratio, low, high):
        return Timing("a", "cpu", 1, 1, 1, 1, 1, 1, ratio, low, high, None).verdict

    assert timing(1.02, 1.01, 1.03) == 0
    assert timing(1.3, 0.8, 2.0) == 0
    assert timing(1.3, 1.1, 2.0) == 1
    assert timing(0.7, 0.6, 0.9) == -1


def test_peak_memory_is_that_of_what_lives_at_once():
    model = nn.Sequential(nn.Linear(10, 1000, bias=False), nn.Linear(1000, 10, bias=False))
    form = of_model("dense", model, CPU)
    assert 4 * 64 * 1000 <= latency.peak_memory(form, torch.zeros(64, 10)) < 1.5 * 4 * 64 * 1000
    assert not model.training
