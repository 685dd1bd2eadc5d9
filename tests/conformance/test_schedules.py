"""Schedules, with values from papers and from other libraries' published tests."""

import itertools

import pytest
import torch

from distprune.pruning import (
    CosineSchedule,
    CubicSchedule,
    ExponentialSchedule,
    LinearSchedule,
    PolynomialSchedule,
    RoundsSchedule,
)


@pytest.mark.parametrize(("step", "sparsity"), [(100, 0.2), (102, 0.4928), (105, 0.725), (110, 0.8)])
def test_cubic_gives_the_values_of_tensorflow_model_optimization(step, sparsity):
    # tfmot's pruning_schedule_test.py, PolynomialDecay with power 3 (Zhu and Gupta 2017, equation 1).
    schedule = CubicSchedule(initial=0.2, final=0.8, begin=100, end=110)
    assert schedule.sparsity(step) == pytest.approx(sparsity, abs=1e-9)


@pytest.mark.parametrize(("final", "at_4", "at_13"), [(0.8, 0.2897, 0.8), (0.4, 0.1813, 0.4)])
def test_cubic_gives_the_values_of_torch_ao(final, at_4, at_13):
    # torch.ao test_scheduler.py, CubicSL with initial step 3, delta_t 2 and 5 updates: the span is 10 steps.
    schedule = CubicSchedule(initial=0.1, final=final, begin=3, end=13, every=2)
    assert schedule.sparsity(4) == pytest.approx(at_4, abs=5e-5)
    assert schedule.sparsity(13) == at_13


def test_cubic_gives_the_value_of_jaxpruner_one_step_later():
    # jaxpruner's PolynomialSchedule, 0 to 0.5 over 20 steps: 0.4375 at its step 9, which is our step 10.
    assert CubicSchedule(final=0.5, begin=0, end=20).sparsity(10) == pytest.approx(0.4375)


def test_polynomial_of_power_3_is_the_cubic():
    polynomial, cubic = PolynomialSchedule(0.9, 10, 60, initial=0.1), CubicSchedule(0.9, 10, 60, initial=0.1)
    assert [polynomial.sparsity(s) for s in range(70)] == pytest.approx([cubic.sparsity(s) for s in range(70)])


def test_polynomial_of_power_1_is_linear():
    # tfmot's PolynomialDecay with power 1: straight from initial to final.
    straight = PolynomialSchedule(final=0.8, begin=100, end=110, initial=0.2, power=1.0)
    assert [straight.sparsity(s) for s in (100, 105, 110)] == pytest.approx([0.2, 0.5, 0.8])
    linear = LinearSchedule(final=0.8, begin=100, end=110, initial=0.2)
    assert [linear.sparsity(s) for s in range(99, 112)] == pytest.approx([straight.sparsity(s) for s in range(99, 112)])


def test_cosine_rises_as_torch_anneals_a_learning_rate():
    # torch.optim.lr_scheduler.CosineAnnealingLR falls from 1 to 0 along the same curve (Loshchilov and Hutter 2017).
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    annealed = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    schedule = CosineSchedule(final=0.9, begin=0, end=20)
    for step in range(21):
        assert schedule.sparsity(step) == pytest.approx(0.9 * (1 - annealed.get_last_lr()[0]), abs=1e-9)
        optimizer.step()
        annealed.step()


def test_exponential_prunes_the_same_share_of_what_is_left_at_each_update():
    schedule = ExponentialSchedule(final=0.95, begin=0, end=50, every=10, initial=0.2)
    left = [1 - schedule.sparsity(step) for step in range(0, 51, 10)]
    assert left[0] == pytest.approx(0.8)
    assert left[-1] == pytest.approx(0.05)
    assert [b / a for a, b in itertools.pairwise(left)] == pytest.approx([(0.05 / 0.8) ** 0.2] * 5)


def test_rounds_of_a_fifth_of_what_is_left_give_the_levels_of_the_lottery_ticket_papers():
    # Frankle and Carbin 2019 and Renda, Frankle and Carbin 2020 prune 20 % of what is left at a time: 80.0, 64.0, 51.2,
    # 41.0, 32.8, 26.2, 21.0, ... % remain; 10.7 % after ten rounds.
    schedule = RoundsSchedule(final=1 - 0.8**10, begin=0, every=5, rounds=10)
    left = [100 * (1 - schedule.sparsity(step)) for step in range(0, 50, 5)]
    assert left == pytest.approx([80.0, 64.0, 51.2, 41.0, 32.8, 26.2, 21.0, 16.8, 13.4, 10.7], abs=0.05)
    assert [step for step in range(80) if schedule.is_update(step)] == list(range(0, 50, 5))
