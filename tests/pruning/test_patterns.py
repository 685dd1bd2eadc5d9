"""N:M: every group ends with exactly M - N zeros, and never has more."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distprune.pruning import (
    NM,
    Bounds,
    CubicSchedule,
    ErdosRenyiKernel,
    LampAllocation,
    LinearSchedule,
    Movement,
    NonFiniteError,
    OneShotSchedule,
    Pruner,
    Random,
    Taylor,
    UniformAllocation,
)


def groups_of(mask, m):
    """Rows of M along the input dimension."""
    return mask.movedim(1, -1).reshape(-1, m)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 20, bias=False),
    )


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(5, 8), NM(1, 2)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_one_shot_keeps_the_largest_of_each_group(pattern, memory_format):
    model = net().to(memory_format=memory_format)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pruner = Pruner(
        model, torch.optim.SGD(model.parameters(), lr=0.1), OneShotSchedule(pattern.sparsity), pattern=pattern
    )
    assert "0.weight" not in pruner.masks
    assert "input dimension 3 is no multiple" in pruner.left_out["0.weight"]
    report = pruner.step()
    assert report.zeros == round(pattern.sparsity * report.weights)
    for name, mask in pruner.masks.items():
        kept, magnitudes = groups_of(mask, pattern.m), groups_of(before[name].abs(), pattern.m)
        assert (kept.sum(1) == pattern.n).all()
        least = torch.where(kept, magnitudes, torch.inf).amin(1)
        most = torch.where(kept, 0, magnitudes).amax(1)
        assert (most <= least).all(), "a brute-force best keeps the largest of each group"
        assert torch.equal(kept, torch.zeros_like(kept).scatter(1, magnitudes.topk(pattern.n).indices, True))


def reference(weights, before, k, n, m):
    """Masks of one flat list of groups after k zeros: sorted by magnitude, of equal ones the later first."""
    flat = [abs(w) for w in weights]
    allowed = []
    for begin in range(0, len(flat), m):
        order = sorted(range(begin, begin + m), key=lambda i: (before[i], flat[i], -i))
        allowed += order[: m - n]
    order = sorted(allowed, key=lambda i: (before[i], flat[i], -i))
    kept = [True] * len(flat)
    for i in order[:k]:
        kept[i] = False
    return kept


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (2, 3)]),
    st.integers(1, 6),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
    st.integers(1, 5),
)
def test_gradual_pruning_is_that_of_a_sort_among_what_may_go(pattern, rows, across, random, updates):
    n, m = pattern
    values = [random.choice([0.0, -0.0, 0.5, -0.5, 1.0, random.uniform(-2, 2)]) for _ in range(rows * across * m)]
    layer = nn.Linear(across * m, rows, bias=False)
    values = torch.tensor(values).tolist()  # rounded to float32
    layer.weight.data.copy_(torch.tensor(values).view(rows, -1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    nm = NM(n, m)
    pruner = Pruner(layer, optimizer, LinearSchedule(nm.sparsity, 0, updates, 1), pattern=nm, min_weights=0)
    kept = [True] * len(values)
    for _ in range(updates + 1):
        report = pruner.step()
        current = [v if stays else 0.0 for v, stays in zip(values, kept, strict=True)]
        kept = reference(current, kept, report.zeros, n, m)
        assert pruner.masks["weight"].flatten().tolist() == kept
        assert (groups_of(pruner.masks["weight"], m).sum(1) >= n).all()
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    assert (groups_of(pruner.masks["weight"], m).sum(1) == n).all()


@pytest.mark.parametrize("score", [Taylor(), Movement(), Random(3)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("allocation", [UniformAllocation(), ErdosRenyiKernel()], ids=lambda a: type(a).__name__)
def test_whatever_the_score_and_the_allocation_the_pattern_is_whole_at_the_end(score, allocation):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = CubicSchedule(0.5, 1, 9, 2)
    pruner = Pruner(model, optimizer, schedule, score=score, allocation=allocation, pattern=NM(2, 4))
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        pruner.step()
        assert all((groups_of(mask, 4).sum(1) >= 2).all() for mask in pruner.masks.values())
    for name, mask in pruner.masks.items():
        assert (groups_of(mask, 4).sum(1) == 2).all()
        weight = dict(model.named_parameters())[name]
        assert (groups_of((weight != 0), 4).sum(1) == 2).all()


def test_a_weight_that_may_not_go_is_still_looked_at():
    model = net()
    pruner = Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), OneShotSchedule(0.5), pattern=NM(2, 4))
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"2\.weight: 1 of 1152"):
        pruner.step()
    assert pruner.zeros == 0


def test_huge_weights_that_may_go_do_and_no_others():
    layer = nn.Linear(8, 1, bias=False)
    most = torch.finfo(torch.float32).max
    layer.weight.data.copy_(torch.tensor([[most, most, most, most, 1.0, 2.0, 3.0, 4.0]]))
    pruner = Pruner(layer, torch.optim.SGD(layer.parameters(), lr=0.1), OneShotSchedule(0.5), pattern=NM(2, 4))
    pruner.step()
    assert pruner.masks["weight"].tolist() == [[True, True, False, False, False, False, True, True]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"schedule": OneShotSchedule(0.6)}, "a sparsity of 0.5; the schedule ends with 0.6"),
        ({"schedule": OneShotSchedule(0.4)}, "a sparsity of 0.5; the schedule ends with 0.4"),
        ({"allocation": LampAllocation()}, "lamp weighs a layer as a whole"),
        ({"bounds": {"last": Bounds(min=0.7)}}, "5.weight is to have at least 0.7 sparsity, and 2:4 gives it 0.5"),
        ({"bounds": {"last": Bounds(max=0.3)}}, "allow at most"),
        ({"pattern": NM(2, 7)}, "nothing to prune"),
    ],
)
def test_what_cannot_end_in_the_pattern_is_refused(given, message):
    model = net()
    arguments = {"schedule": OneShotSchedule(0.5), "pattern": NM(2, 4), **given}
    with pytest.raises(ValueError, match=message):
        Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), **arguments)


@pytest.mark.parametrize("text", ["2:2", "0:4", "4:2", "2", "a:b", "2:4:8"])
def test_texts_that_are_no_pattern_are_refused(text):
    with pytest.raises(ValueError, match="N:M"):
        NM.parse(text)


def test_transposed_convolutions_and_vectors_stay_dense():
    model = nn.Sequential(nn.ConvTranspose2d(8, 8, 2), nn.Conv2d(8, 4, 1))
    pruner = Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), OneShotSchedule(0.5), pattern=NM(2, 4))
    assert list(pruner.masks) == ["1.weight"]
    assert "transposed" in pruner.left_out["0.weight"]
    assert list(itertools.chain(pruner.left_out)) == ["0.weight"]
