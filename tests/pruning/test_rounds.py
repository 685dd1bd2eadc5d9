"""Levels of iterative pruning, and what follows when rounds are refused."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distprune.pruning import RoundsSchedule


def levels(schedule):
    return [attempt.sparsity for attempt in schedule.attempts]


def test_the_last_round_reaches_exactly_what_is_asked_for():
    schedule = RoundsSchedule(final=0.9, begin=7, every=10, rounds=3)
    assert levels(schedule) == pytest.approx([1 - 0.1 ** (1 / 3), 1 - 0.1 ** (2 / 3), 0.9], abs=1e-15)
    assert levels(schedule)[-1] == 0.9
    assert [(a.round, a.begin, a.end, a.again) for a in schedule.attempts] == [
        (1, 7, 17, False),
        (2, 17, 27, False),
        (3, 27, 37, False),
    ]
    assert [schedule.sparsity(step) for step in (0, 6, 7, 16, 27, 1000)] == [
        0,
        0,
        *levels(schedule)[::2][:1] * 2,
        0.9,
        0.9,
    ]


def test_a_refused_round_is_tried_again_with_half_the_step_and_so_are_those_that_follow():
    schedule = RoundsSchedule(final=0.9, begin=0, every=10, rounds=2, min_step=0.2)
    whole = 1 - 0.1**0.5
    schedule.judge(True)
    schedule.judge(False)
    half = 1 - (1 - whole) * 0.1**0.25
    assert levels(schedule) == pytest.approx([whole, 0.9, half, 0.9], abs=1e-15)
    assert [a.round for a in schedule.attempts] == [1, 2, 2, 3]
    assert [a.again for a in schedule.attempts] == [False, False, True, False]
    schedule.judge(True)
    schedule.judge(False)
    assert levels(schedule)[-2:] == pytest.approx([1 - (1 - half) * 0.1**0.125, 0.9])
    schedule.judge(False)  # the next would prune 1 - 0.1^(1/16) = 13 % of what is left
    assert len(schedule.attempts) == len(schedule.outcomes) == 5
    assert schedule.sparsity(49) == levels(schedule)[-1]
    assert schedule.sparsity(50) == schedule.sparsity(1000) == pytest.approx(half)
    with pytest.raises(ValueError, match="all rounds were judged"):
        schedule.judge(True)


def test_with_all_rounds_refused_nothing_is_pruned():
    schedule = RoundsSchedule(final=0.5, begin=3, every=5, rounds=1, min_step=0.2)
    for _ in range(2):  # 0.5, then 1 - sqrt(0.5) = 0.29, then 0.16
        schedule.judge(False)
    assert len(schedule.attempts) == 2
    assert schedule.sparsity(13) == 0.0
    assert [step for step in range(40) if schedule.is_update(step)] == [3, 8]


def test_steps_that_are_small_from_the_beginning_are_done():
    schedule = RoundsSchedule(final=0.5, begin=0, every=1, rounds=200, min_step=0.01)
    assert len(schedule.attempts) == 200
    schedule.judge(False)
    assert len(schedule.attempts) == 1


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"rounds": 0}, "rounds"), ({"every": 0}, "every"), ({"final": 1.0}, "final"), ({"min_step": 0.0}, "min_step")],
)
def test_values_out_of_range_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        RoundsSchedule(**{"final": 0.9, "begin": 0, "every": 10, "rounds": 3, **wrong})


@given(st.floats(0.0, 0.999), st.integers(1, 12), st.floats(0.001, 0.5), st.lists(st.booleans(), max_size=60))
def test_whatever_is_refused_sparsity_rises_from_what_was_accepted_and_ends_at_most_at_the_final(
    final, rounds, min_step, outcomes
):
    schedule = RoundsSchedule(final, 5, 10, rounds, min_step)
    for within in outcomes:
        if len(schedule.outcomes) == len(schedule.attempts):
            break
        schedule.judge(within)
    judged = list(zip(schedule.attempts, schedule.outcomes, strict=False))
    accepted = 0.0
    for attempt, within in judged:
        assert accepted <= attempt.sparsity <= final
        assert schedule.sparsity(attempt.begin) == schedule.sparsity(attempt.end - 1) == attempt.sparsity
        accepted = attempt.sparsity if within else accepted
    to_come = schedule.attempts[len(judged) :]
    assert all(a.sparsity >= accepted for a in to_come)
    assert all(a.end == b.begin for a, b in itertools.pairwise(schedule.attempts))
    if not (judged and not judged[-1][1] and not to_come):
        assert schedule.sparsity(10**9) == final
    else:
        assert schedule.sparsity(10**9) == accepted
