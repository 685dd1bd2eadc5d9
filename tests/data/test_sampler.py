"""Which samples make up which step: a function of seed and step, whatever the number of ranks and micro-batches."""

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distprune.data import Order
from distprune.data.sampler import RankBatches, mix, mix_each


def epoch_order(order, epoch):
    """Indices of an epoch, one after another."""
    first = epoch * order.steps_per_epoch
    return [index for step in range(first, first + order.steps_per_epoch) for index in order.batch(step)[1].tolist()]


def steps_of(order, begin, count, world_size, accumulate):
    """For each step from `begin` on, the tokens of each micro-batch of all ranks."""
    ranks = [RankBatches(order, begin, rank, world_size, accumulate) for rank in range(world_size)]
    micro = [list(islice(batches, count * accumulate)) for batches in ranks]
    return [[part for own in micro for part in own[i * accumulate : (i + 1) * accumulate]] for i in range(count)]


def together(parts):
    return sorted(token for part in parts for token in part)


def test_the_order_depends_on_seed_and_epoch_only():
    first = epoch_order(Order(1000, 10, seed=3), epoch=5)
    torch.manual_seed(99)
    assert epoch_order(Order(1000, 10, seed=3), epoch=5) == first
    assert epoch_order(Order(1000, 50, seed=3), epoch=5) == first, "the size of the batch only cuts the order up"


def test_other_seeds_and_epochs_have_orders_of_their_own():
    orders = [tuple(epoch_order(Order(100, 10, seed), epoch)) for seed in range(20) for epoch in range(20)]
    assert len(set(orders)) == len(orders)
    # A random permutation leaves one place in a hundred as it is.
    unmoved = sum(index == place for order in orders for place, index in enumerate(order))
    assert unmoved == pytest.approx(len(orders), rel=0.2)


@given(
    samples=st.integers(1, 300), part=st.floats(0, 1), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000),
)  # fmt: skip
def test_a_sample_appears_at_most_once_in_an_epoch_and_few_are_left_out(samples, part, seed, epoch):
    batch_size = max(1, round(part * samples))
    indices = epoch_order(Order(samples, batch_size, seed), epoch)
    assert len(set(indices)) == len(indices)
    assert set(indices) <= set(range(samples))
    assert samples - len(indices) < batch_size


def test_what_is_left_out_differs_from_epoch_to_epoch():
    order = Order(samples=15, batch_size=10, seed=0)
    assert order.steps_per_epoch == 1
    assert {index for epoch in range(30) for index in epoch_order(order, epoch)} == set(range(15))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_and_micro_batches_share_the_same_batches(world_size, accumulate):
    order = Order(samples=100, batch_size=23, seed=1)
    steps = steps_of(order, 0, 2 * order.steps_per_epoch, world_size, accumulate)
    for number, parts in enumerate(steps):
        epoch, indices = order.batch(number)
        assert epoch == number // order.steps_per_epoch
        assert together(parts) == sorted((epoch, index) for index in indices.tolist())
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == world_size * accumulate


@given(begin=st.integers(0, 40), old_ranks=st.integers(1, 4), new_ranks=st.integers(1, 4), accumulate=st.integers(1, 2))
def test_a_start_at_a_later_step_goes_on_where_another_run_would_be(begin, old_ranks, new_ranks, accumulate):
    order = Order(samples=50, batch_size=8, seed=2)
    whole = steps_of(order, 0, begin + 5, old_ranks, 1)
    rest = steps_of(order, begin, 5, new_ranks, accumulate)
    for before, after in zip(whole[begin:], rest, strict=True):
        assert together(before) == together(after)


@given(
    seed=st.integers(-(2**40), 2**63), place=st.integers(0, 20),
    tokens=st.lists(st.tuples(st.integers(-1, 2**40), st.integers(0, 2**40)), max_size=20),
)  # fmt: skip
def test_what_is_drawn_for_many_samples_is_what_is_drawn_for_each(seed, tokens, place):
    assert mix_each(seed, tokens, place).tolist() == [mix(seed, *token, place) for token in tokens]
