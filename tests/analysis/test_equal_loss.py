"""Layers share a sparsity so that none costs more loss than another."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distprune.analysis.equal_loss import Curve, UnreachableError, allocate

LEVELS = (0.5, 0.8, 0.9, 0.99)

increases = st.lists(st.floats(-0.5, 10), min_size=len(LEVELS), max_size=len(LEVELS))
curves = st.lists(st.builds(Curve, st.integers(1, 10**7), st.just(LEVELS), increases), min_size=1, max_size=8).map(
    lambda made: {f"layer{number}": curve for number, curve in enumerate(made)}
)
budgets = st.floats(0.0, 0.99)


def cost(curve, sparsity):
    """The loss increase as the method has it: never falling, linear in log density; by numpy."""
    highest = np.maximum.accumulate([0.0, *curve.increases])
    return float(np.interp(-np.log1p(-sparsity), [0.0, *-np.log1p(-np.array(curve.sparsities))], highest))


def over_all(curves, sparsities):
    weights = [curve.weights for curve in curves.values()]
    return np.average([sparsities[name] for name in curves], weights=weights)


@given(curves, budgets)
def test_the_total_is_what_was_asked_for(curves, budget):
    allocation = allocate(curves, budget)
    assert list(allocation.sparsities) == list(curves)
    assert over_all(curves, allocation.sparsities) == pytest.approx(budget, rel=1e-9, abs=1e-12)
    assert all(0 <= sparsity <= LEVELS[-1] + 1e-12 for sparsity in allocation.sparsities.values())


@given(curves, budgets)
def test_every_layer_costs_the_same_unless_it_is_as_sparse_as_was_measured(curves, budget):
    allocation = allocate(curves, budget)
    for name, curve in curves.items():
        spent = cost(curve, allocation.sparsities[name])
        assert spent <= allocation.increase + 1e-6
        if allocation.sparsities[name] < LEVELS[-1] - 1e-6:
            assert spent == pytest.approx(allocation.increase, abs=1e-6)


@given(curves, budgets, st.randoms(use_true_random=False))
def test_no_other_allocation_of_the_total_has_a_lower_highest_cost(curves, budget, random):
    allocation = allocate(curves, budget)
    other = {name: random.uniform(0, LEVELS[-1]) for name in curves}
    if over_all(curves, other) >= budget:
        assert max(cost(curve, other[name]) for name, curve in curves.items()) >= allocation.increase - 1e-6


@given(curves, budgets, budgets)
def test_a_higher_total_makes_no_layer_denser(curves, one, other):
    less, more = (allocate(curves, budget) for budget in sorted((one, other)))
    assert less.increase <= more.increase + 1e-9
    for name in curves:
        assert less.sparsities[name] <= more.sparsities[name] + 1e-6


def test_two_layers_by_hand():
    # Both lose 1 where half of their weights are left, the second four times as much with each further halving.
    curves = {"a": Curve(100, (0.5, 0.75), (1.0, 2.0)), "b": Curve(300, (0.5, 0.75), (1.0, 5.0))}
    # At an increase of 2 the first is at 0.75 and the second a quarter of the way from 1 to 2 halvings.
    budget = (100 * 0.75 + 300 * (1 - 0.5**1.25)) / 400
    allocation = allocate(curves, budget)
    assert allocation.increase == pytest.approx(2.0)
    assert allocation.sparsities == pytest.approx({"a": 0.75, "b": 1 - 0.5**1.25})


def test_where_nothing_is_lost_layers_go_equally_far():
    free = {"a": Curve(10, (0.5, 0.75), (0.0, 0.0)), "b": Curve(1000, (0.5, 0.75), (-0.1, 0.0))}
    allocation = allocate(free, 0.4)
    assert allocation.increase == 0
    assert allocation.sparsities == pytest.approx({"a": 0.4, "b": 0.4})


def test_a_total_that_is_not_reached_says_what_is():
    curves = {"a": Curve(100, (0.5,), (0.0,)), "b": Curve(300, (0.5, 0.9), (0.0, math.pi))}
    assert allocate(curves, 0.8).sparsities == pytest.approx({"a": 0.5, "b": 0.9})
    with pytest.raises(UnreachableError) as refused:
        allocate(curves, 0.81)
    assert refused.value.most == pytest.approx(0.8)
