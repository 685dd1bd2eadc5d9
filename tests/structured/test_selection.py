"""What units are worth and which go, against the slow and plain way."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from distprune.pruning import NonFiniteError
from distprune.structured import ChannelGroup, ChannelPruner, Channels, find_channels
from distprune.structured.selection import Limits, choose, rank_units
from tests.pruning.reference import Levels
from tests.structured.nets import NETS, made, pruned, some


def channels_of(sizes, widths) -> Channels:
    """Groups that are no model's, of which each unit costs its own."""
    groups, begin = [], 0
    for place, (size, width) in enumerate(zip(sizes, widths, strict=True)):
        groups.append(ChannelGroup(f"g{place}", begin, size, width, ()))
        begin += size
    return Channels(tuple(groups), {}, frozenset(), {}, frozenset(), (), {})


@st.composite
def cases(draw):
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    widths = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=len(sizes), max_size=len(sizes)))
    channels = channels_of(sizes, widths)
    scores = draw(st.lists(st.integers(0, 4), min_size=channels.units, max_size=channels.units))
    kept = torch.tensor(draw(st.lists(st.booleans(), min_size=channels.units, max_size=channels.units)))
    for group in channels.groups:
        kept[group.begin] = True
    prices = draw(st.lists(st.integers(1, 5), min_size=channels.units, max_size=channels.units))
    compare = draw(st.sampled_from(["global", "uniform"]))
    most = {g.name: draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])) for g in channels.groups if draw(st.booleans())}
    limits = (draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 3, 4, 8])), most)
    return channels, scores, kept, compare, limits, prices, draw(st.floats(0, 1))


def in_order(channels, scores, kept, compare):
    """The units that are left, the next to go first."""
    level = {}
    for group in channels.groups:
        units = [u for u in range(group.begin, group.begin + group.size) if kept[u]]
        mean = sum(scores[u] for u in units) / len(units)
        for place, unit in enumerate(sorted(units, key=lambda u: (scores[u], -u))):
            gone = group.size - len(units)
            share = (gone + place + 0.5) / group.size
            level[unit] = (scores[unit] / mean if mean else 0.0) if compare == "global" else share
    return sorted(level, key=lambda unit: (level[unit], -unit))


@given(cases())
def test_the_lowest_go_first_and_of_equal_ones_the_later(case):
    channels, scores, kept, compare, *_ = case
    assert rank_units(channels, scores, kept, compare).tolist() == in_order(channels, scores, kept, compare)


@given(cases())
def test_what_goes_is_nested_and_within_limits(case):
    channels, scores, kept, compare, (least, multiple, most), *_ = case
    order = rank_units(channels, scores, kept, compare)
    limits = Limits(channels, least, multiple, most)
    before = kept
    for count in range(len(order) + 1):
        left = limits.apply(order, count, kept)
        assert not (left & ~before).any(), "what is gone stays gone"
        assert (before & ~left).sum() <= multiple * len(channels.groups)
        for group in channels.groups:
            units, had = int(left[group.units].sum()), int(kept[group.units].sum())
            width = units * group.width
            assert units == had or width % multiple == 0
            assert units == had or width >= least
            assert units == had or units >= round(group.size * (1 - most.get(group.name, 1)), 9)
            assert units >= 1
            asked = sum(1 for unit in order[:count].tolist() if group.begin <= unit < group.begin + group.size)
            assert had - units <= asked, "no more than the order says"
        before = left
    assert torch.equal(limits.apply(order, 0, kept), kept)


@given(cases())
def test_the_budget_is_met_as_closely_as_any_count_does_and_ties_keep_more(case):
    channels, scores, kept, compare, limits, prices, share = case
    order = rank_units(channels, scores, kept, compare)
    limits = Limits(channels, *limits)

    def cost(left):
        return sum(price for price, stays in zip(prices, left.tolist(), strict=True) if stays)

    budget = share * cost(kept)
    left, taken = choose(order, kept, limits, cost, budget)
    assert torch.equal(left, limits.apply(order, taken, kept))
    every = [limits.apply(order, count, kept) for count in range(len(order) + 1)]
    closest = min(abs(cost(one) - budget) for one in every)
    assert abs(cost(left) - budget) == closest
    assert cost(left) == max(cost(one) for one in every if abs(cost(one) - budget) == closest)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 1000), st.integers(1, 5))
def test_uniform_takes_the_same_share_of_every_group(tens, seed, fifths):
    channels = channels_of([10 * n for n in tens], [1] * len(tens))
    scores = torch.randint(9, (channels.units,), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = torch.ones(channels.units, dtype=torch.bool)
    order = rank_units(channels, scores, kept, "uniform")
    left, _ = choose(order, kept, Limits(channels, 1, 1, {}), channels.count_units, (1 - fifths / 6) * channels.units)
    shares = [1 - left[group.units].float().mean().item() for group in channels.groups]
    for share, group in zip(shares, channels.groups, strict=True):
        assert abs(share - fifths / 6) <= 1 / group.size


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("name", NETS)
def test_scores_are_sums_over_all_that_makes_and_takes_a_unit(name, norm):
    """The order in which units go, one at a time, is that of plain float64 sums."""
    model, images = made(name)
    channels = find_channels(model, images)
    state = {n: p.detach().double().abs() for n, p in model.named_parameters()}
    sums = torch.zeros(channels.units, dtype=torch.float64)
    for tensor, dim in channels.scored:
        values = state[tensor].square() if norm == "l2" else state[tensor]
        by_index = values.movedim(dim, 0).reshape(values.shape[dim], -1).sum(1)
        for index, unit in enumerate(channels.owners[tensor][dim].tolist()):
            if unit >= 0:
                sums[unit] += by_index[index]
    order = in_order(channels, sums.tolist(), torch.ones(channels.units), "global")
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    levels = Levels([0.2, 0.5, 1 - len(channels.groups) / channels.units])
    pruner = ChannelPruner(model, optimizer, levels, channels, budget="channels", norm=norm)
    pruner.step()
    gone = set((~pruner.kept).nonzero()[:, 0].tolist())
    protected = {group.begin + int(sums[group.units].argmax()) for group in channels.groups}
    allowed = [unit for unit in order if unit not in protected]
    assert gone == set(allowed[: len(gone)])
    assert len(gone) == pytest.approx(0.2 * channels.units, abs=0.5)


def test_what_is_scored_is_makers_takers_and_factors_without_biases():
    channels = find_channels(*made("plain"))
    assert channels.scored == {
        ("0.weight", 0), ("1.weight", 0), ("3.weight", 1), ("3.weight", 0), ("4.weight", 0), ("6.weight", 1),
        ("6.weight", 0), ("9.weight", 1),
    }  # fmt: skip
    hangs = {(name, dim) for name, dims in channels.owners.items() for dim in dims}
    assert hangs - channels.scored == {
        ("0.bias", 0), ("1.bias", 0), ("1.running_mean", 0), ("1.running_var", 0), ("4.bias", 0),
        ("4.running_mean", 0), ("4.running_var", 0), ("5.weight", 0), ("6.bias", 0),
    }  # fmt: skip


@pytest.mark.parametrize("factor", [1e-18, 1.0, 1e17])
def test_weights_of_any_size_and_scores_of_either_sign_are_ranked(factor):
    model = nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False))
    channels = find_channels(model, torch.randn(2, 3))
    values = torch.tensor([3.0, -1, 2, -5, 4, 1])
    with torch.no_grad():
        model[0].weight.copy_(values[:, None].expand(6, 3) * factor)
        model[2].weight.zero_()
    for score, gone in (({}, [1, 5]), ({"score": lambda piece: piece.weight}, [1, 3])):
        tried = copy.deepcopy(model)
        optimizer = torch.optim.SGD(tried.parameters(), lr=0)
        pruner = ChannelPruner(tried, optimizer, Levels([1 / 3]), channels, budget="channels", **score)
        pruner.step()
        assert (~pruner.kept).nonzero()[:, 0].tolist() == gone
    # The sum of all is negative.
    pruner = ChannelPruner(
        model, torch.optim.SGD(model.parameters(), lr=0), Levels([1 / 3]), channels, budget="channels",
        score=lambda piece: piece.weight - 4 * factor,
    )  # fmt: skip
    pruner.step()
    assert (~pruner.kept).nonzero()[:, 0].tolist() == [1, 3]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named_and_nothing_changes(value):
    model, images = made("plain")
    channels = find_channels(model, images)
    pruner = pruned(model, channels, some(channels))
    pruner.schedule = Levels([0.8])
    with torch.no_grad():
        model[3].weight[pruner.masks["3.weight"]] = value
    before = copy.deepcopy(model.state_dict()), pruner.kept.clone(), pruner.mask_digest
    with pytest.raises(NonFiniteError, match=r"weights are NaN or infinite at step 0: in 3\.weight; nothing was prun"):
        pruner.step()
    assert torch.equal(pruner.kept, before[1])
    assert pruner.mask_digest == before[2]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7), before[0][name].nan_to_num(7))
