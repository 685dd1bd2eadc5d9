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


def test_rounds_train_the_finetune_phase_anew():
    words = [
        "phases.prune={}",
        "phases.dense={epochs: 3}",
        "phases.finetune={steps: 25, lr: 0.2}",
        "prune.rounds.count=3",
    ]
    table = timetable(*words)
    dense, *rounds = table.spans
    assert (dense.begin, dense.end) == (0, 30)
    assert [(s.name, s.begin, s.end, s.key) for s in rounds] == [
        ("finetune", 30, 55, "phases.finetune"),
        ("finetune", 55, 80, "phases.finetune"),
        ("finetune", 80, 105, "phases.finetune"),
    ]
    assert [s.attempt.sparsity for s in rounds][-1] == table.pruning.schedule.final == 0.9
    assert [rounds[1].lr(55 + step) for step in range(25)] == [rounds[0].lr(30 + step) for step in range(25)]
    assert [table.after(step).begin for step in (0, 29, 30, 79, 104)] == [0, 0, 30, 55, 80]
    assert table.after(105) is None
    assert table.steps == 105


def test_after_a_refusal_the_rounds_to_come_are_others():
    table = timetable("phases.prune={}", "prune.rounds.count=2", "prune.guard={max_drop: 1.0, min_step: 0.3}")
    before = table.steps
    table.rounds.schedule.judge(False)
    length = table.spans[1].end - table.spans[1].begin
    assert table.steps == before + 3 * length, "the refused one, and four half steps in place of two whole"
    assert table.after(table.spans[1].end).attempt.again


def test_rewound_rounds_begin_where_they_are_told_to():
    words = [
        "phases.prune={}",
        "phases.finetune={}",
        "phases.dense={epochs: 4, warmup_steps: 7}",
        "prune.rounds.count=2",
    ]
    words += ["prune.rounds.recovery=rewind_weights", "prune.rounds.rewind_to={epochs: 0.5}"]
    table = timetable(*words)
    assert [(s.begin, s.end) for s in table.spans] == [(0, 40), (40, 75), (75, 110)]
    assert table.rounds.rewind_to == 5
    assert [table.spans[2].lr(75 + step) for step in range(35)] == [table.spans[0].lr(5 + step) for step in range(35)]


def test_a_teacher_who_never_teaches_is_warned_of():
    (warning,) = timetable(
        "phases.finetune={}", "distill.phases=[finetune]", "phases.prune={epochs: 9}"
    ).pruning.warnings[1:]
    assert "no phase finetune of some length" in warning


def test_doubtful_rounds_are_warned_of():
    rewound = ["phases.prune={}", "phases.finetune={}", "prune.rounds={count: 2, recovery: rewind_lr}"]
    assert "T^2" in timetable(*rewound).pruning.warnings[0]
    assert timetable(*rewound, "distill.temperature=1.0").pruning.warnings == ()
    guarded = timetable("phases.prune={}", "prune.rounds={count: 2}", "prune.guard={max_drop: 1.0}")
    assert "judges by data.eval_split" in guarded.pruning.warnings[0]
