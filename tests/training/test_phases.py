"""Phases, learning rates and the place of the sparsity schedule in a run."""

import math

import pytest

from distprune.config import load_config
from distprune.errors import ConfigError
from distprune.training.phases import make_timetable
from tests.jobs import DIGITS


def timetable(*overrides, steps_per_epoch=10):
    return make_timetable(load_config(DIGITS, overrides), steps_per_epoch)


def test_phases_follow_each_other_and_the_schedule_fills_the_prune_phase():
    table = timetable("phases.dense={steps: 7}", "phases.prune={epochs: 2.5}", "phases.finetune={epochs: 1}")
    assert [(s.name, s.begin, s.end) for s in table.spans] == [("dense", 0, 7), ("prune", 7, 32), ("finetune", 32, 42)]
    assert (table.pruning.begin, table.pruning.end, table.steps) == (7, 32, 42)


def test_a_phase_of_no_length_is_skipped():
    table = timetable("phases.dense={steps: 0}", "distill=null")
    assert [s.name for s in table.spans] == ["prune", "finetune"]
    assert table.pruning.schedule.begin == 0


def test_cosine_falls_from_the_peak_to_the_minimum_after_warm_up():
    phase = "{steps: 24, lr: 0.5, min_lr: 0.1, warmup_steps: 4}"
    span = timetable(f"phases.dense={phase}").spans[0]
    assert [span.lr(step) for step in range(4)] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert span.lr(4) == pytest.approx(0.5)
    assert span.lr(14) == pytest.approx(0.3)
    assert span.lr(23) == pytest.approx(0.1 + 0.4 * 0.5 * (1 + math.cos(math.pi * 19 / 20)))


def test_step_falls_at_its_milestones_and_constant_stays():
    table = timetable(
        "phases.dense={steps: 20, lr: 1.0, schedule: step, milestones: [0.5, 0.75], gamma: 0.1}",
        "phases.prune={steps: 5, lr: 0.3, schedule: constant}",
    )
    dense, prune, _ = table.spans
    assert [dense.lr(s) for s in (0, 9, 10, 14, 15, 19)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert {prune.lr(s) for s in range(20, 25)} == {0.3}


def test_doubtful_schedules_are_warned_of():
    assert "shorter than the schedule" in timetable("prune.length={epochs: 25}").pruning.warnings[0]
    assert "larger than the schedule" in timetable("prune.every=1000").pruning.warnings[0]
    assert "no step follows" in timetable("phases.finetune={steps: 0}").pruning.warnings[0]
    assert timetable().pruning.warnings == ()


def test_a_schedule_that_outlasts_the_run_is_refused():
    with pytest.raises(ConfigError, match="never be reached"):
        timetable("prune.length={epochs: 41}")
