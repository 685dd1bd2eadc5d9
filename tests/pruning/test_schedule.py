from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distprune.pruning import CubicSchedule, Schedule


def updates(schedule: CubicSchedule, steps: int = 200) -> list[int]:
    return [s for s in range(steps) if schedule.is_update(s)]


def test_nothing_is_pruned_before_begin_and_final_holds_after_end():
    schedule = CubicSchedule(initial=0.2, final=0.8, begin=100, end=110)
    assert [schedule.sparsity(s) for s in (0, 99, 111, 10**9)] == [0.0, 0.0, 0.8, 0.8]


def test_updates_come_at_begin_then_every_so_often_and_at_end():
    assert updates(CubicSchedule(final=0.9, begin=10, end=40, every=10)) == [10, 20, 30, 40]


def test_last_update_is_forced_where_every_does_not_divide_the_span():
    # tfmot, ACDC and Intel's package miss this one.
    assert updates(CubicSchedule(final=0.9, begin=10, end=35, every=10)) == [10, 20, 30, 35]


def test_every_longer_than_the_span_leaves_begin_and_end():
    assert updates(CubicSchedule(final=0.9, begin=3, end=7, every=1000)) == [3, 7]


def test_begin_equal_to_end_prunes_in_one_shot():
    schedule = CubicSchedule(final=0.9, begin=5, end=5, every=2)
    assert updates(schedule) == [5]
    assert [schedule.sparsity(s) for s in (4, 5, 6)] == [0.0, 0.9, 0.9]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"final": 1.0}, "final"),
        ({"final": 90}, "final"),
        ({"final": -0.1}, "final"),
        ({"final": float("nan")}, "final"),
        ({"initial": 0.95}, "initial"),
        ({"initial": -0.1}, "initial"),
        ({"begin": -1}, "begin"),
        ({"begin": 101}, "begin"),
        ({"every": 0}, "every"),
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong, named):
    right = {"final": 0.9, "begin": 0, "end": 100, "every": 10, "initial": 0.0}
    assert CubicSchedule(**right)
    with pytest.raises(ValueError, match=rf"{named}.*{next(iter(wrong.values()))}"):
        CubicSchedule(**(right | wrong))


def test_cubic_schedule_is_a_schedule():
    assert isinstance(CubicSchedule(final=0.9, begin=0, end=1), Schedule)


@st.composite
def cubic_schedules(draw) -> CubicSchedule:
    initial, final = sorted(draw(st.tuples(st.floats(0, 0.999), st.floats(0, 0.999))))
    begin = draw(st.integers(0, 10**6))
    span = draw(st.one_of(st.integers(0, 20), st.integers(0, 10**7)))
    return CubicSchedule(final, begin, begin + span, draw(st.integers(1, 10**4)), initial)


@given(cubic_schedules(), st.data())
def test_sparsity_never_falls(schedule, data):
    steps = st.integers(0, schedule.end + 10)
    earlier, later = sorted((data.draw(steps), data.draw(steps)))
    assert schedule.sparsity(earlier) <= schedule.sparsity(later)
    assert schedule.sparsity(earlier) <= schedule.sparsity(earlier + 1)


@given(cubic_schedules(), st.integers(0, 10**7))
@example(CubicSchedule(final=0.79, begin=0, end=10, initial=0.11), 0)
def test_sparsity_stays_between_initial_and_final(schedule, after):
    sparsity = schedule.sparsity(min(schedule.begin + after, schedule.end))
    assert schedule.initial <= sparsity <= schedule.final


@given(cubic_schedules(), st.integers(0, 10**7))
def test_sparsity_is_the_cubic_in_exact_arithmetic(schedule, after):
    step = min(schedule.begin + after, schedule.end)
    if schedule.begin == schedule.end:
        return
    left = Fraction(schedule.end - step, schedule.end - schedule.begin)
    exact = Fraction(schedule.final) + (Fraction(schedule.initial) - Fraction(schedule.final)) * left**3
    assert schedule.sparsity(step) == pytest.approx(float(exact), abs=1e-12)


@given(cubic_schedules(), st.data())
def test_from_begin_to_end_no_longer_than_every_passes_without_an_update(schedule, data):
    start = data.draw(st.integers(schedule.begin, schedule.end))
    assert any(schedule.is_update(s) for s in range(start, min(start + schedule.every, schedule.end + 1)))


@given(cubic_schedules())
def test_begin_and_end_are_the_first_and_last_update(schedule):
    assert schedule.is_update(schedule.begin)
    assert schedule.is_update(schedule.end)
    assert not any(schedule.is_update(s) for s in range(max(0, schedule.begin - 100), schedule.begin))
    assert not any(schedule.is_update(s) for s in range(schedule.end + 1, schedule.end + 100))
