"""The search that looks at few weights finds what the search that looks at all of them finds."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distprune.pruning import NonFiniteError, Pruner, bracket, rows
from distprune.pruning import masks as mask_ops
from distprune.pruning.bracket import MagnitudeSearch
from distprune.pruning.threshold import Search


class Levels:
    """Prunes to each of some sparsities, one at each step."""

    def __init__(self, levels):
        self._levels = levels
        self.final = levels[-1]

    def sparsity(self, step):
        return self._levels[min(step, len(self._levels) - 1)]

    def is_update(self, step):
        return step < len(self._levels)


class Net(nn.Module):
    def __init__(self, shapes, draw, channels_last=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, o, k, bias=False) for o, i, k in shapes)
        for layer in self.layers:
            layer.weight = nn.Parameter(draw(layer.weight.shape))
        if channels_last:
            self.to(memory_format=torch.channels_last)


@pytest.fixture(params=[False, True], ids=["one by one", "many at once"])
def found(monkeypatch, request):
    """Whether the bracket held the threshold, of each search; brackets are taken of the smallest models too. Tensors
    are looked at as on a CPU, and as on a GPU."""
    outcomes = []
    between = MagnitudeSearch._between

    def noted(self, *arguments):
        outcomes.append(between(self, *arguments))
        return outcomes[-1]

    monkeypatch.setattr(MagnitudeSearch, "_between", noted)
    monkeypatch.setattr(bracket, "SMALL", 0)
    monkeypatch.setattr(bracket, "MOST_INSIDE", 1)
    for module in (rows, mask_ops, bracket):
        monkeypatch.setattr(module, "takes_many", lambda device: request.param)
    monkeypatch.setattr(rows, "LEAST_ROWS", 7)
    return outcomes


def pruned(model, levels, **options):
    """The masks after each level, of a model that changes a little between them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, optimizer, Levels(levels), **options)
    masks = []
    for step in range(len(levels)):
        report = pruner.step()
        assert report.zeros == round(levels[step] * pruner.weights)
        masks.append({name: mask.clone() for name, mask in pruner.masks.items()})
        for tensor in pruner.tensors:
            weight = tensor.weight
            assert torch.equal(weight != 0, pruner.masks[tensor.name] & (weight != 0))
            torch.manual_seed(step)
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    return masks, pruner


def in_full(model, levels, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr("distprune.pruning.pruner.MagnitudeSearch", Search)
        return pruned(model, levels, **options)


SHAPES = [(64, 16, 3), (3, 5, 1), (256, 64, 3), (1, 7, 2)]
DRAWS = {
    "normal": torch.randn,
    "equal ones": lambda shape: (8 * torch.randn(shape)).round() / 8,
    "of very different sizes": lambda shape: torch.randn(shape) * 10 ** (6 * torch.rand(shape[0], 1, 1, 1) - 3),
    "a tenth are zero": lambda shape: torch.randn(shape) * (torch.rand(shape) > 0.1),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("min_weights", [0, 1])
def test_the_masks_are_those_of_the_full_search(kind, channels_last, min_weights, found, monkeypatch):
    torch.manual_seed(1)
    model = Net(SHAPES, DRAWS[kind], channels_last)
    levels = [0.02, 0.3, 0.305, 0.9, 0.98]
    expected, _ = in_full(copy.deepcopy(model), levels, monkeypatch, min_weights=min_weights)
    masks, _ = pruned(model, levels, min_weights=min_weights)
    for one, other in zip(masks, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert len(found) == len(levels)
    assert None not in found[1:], "the first level may be among the weights that are 0"


def test_the_sample_may_be_wrong(found, monkeypatch):
    """The first of each run, which alone are looked at ahead, are the largest by far."""
    weight = torch.rand(64, 1024)
    weight[:, : bracket.RUN] += 5
    draw = lambda shape: weight.view(shape).clone()  # noqa: E731
    expected, _ = in_full(Net([(64, 1024, 1)], draw), [0.5], monkeypatch)
    masks, _ = pruned(Net([(64, 1024, 1)], draw), [0.5])
    assert found == [None]
    assert torch.equal(masks[0]["layers.0.weight"], expected[0]["layers.0.weight"])


def test_where_too_many_lie_in_the_bracket_all_are_looked_at(found, monkeypatch):
    monkeypatch.setattr(bracket, "MOST_INSIDE", 32)
    masks, _ = pruned(Net([(64, 64, 3)], torch.ones), [0.5])
    assert found == [None]
    kept = masks[0]["layers.0.weight"].flatten()
    assert torch.equal(kept, torch.arange(len(kept)) < len(kept) // 2), "of equal ones the later go"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value, found):
    model = Net([(64, 64, 3)], torch.randn)
    _, pruner = pruned(model, [0.25, 0.5])
    kept = pruner.masks["layers.0.weight"].nonzero()[5]
    with torch.no_grad():
        model.layers[0].weight[tuple(kept)] = value
    pruner.schedule = Levels([0.25, 0.5, 0.75])
    before = pruner.masks["layers.0.weight"].clone()
    with pytest.raises(NonFiniteError, match=r"layers\.0\.weight: 1 of 36864"):
        pruner.step()
    assert torch.equal(pruner.masks["layers.0.weight"], before)


@pytest.mark.parametrize("value", [3.0, 1e-3, float("nan")])
def test_pruned_weights_that_somebody_set_do_not_come_back(value, found):
    model = Net([(64, 64, 3)], torch.randn)
    _, pruner = pruned(model, [0.25, 0.5])
    before = pruner.masks["layers.0.weight"].clone()
    with torch.no_grad():
        model.layers[0].weight[~before] = value
    pruner.schedule = Levels([0.25, 0.5, 0.75])
    assert pruner.step().zeros == round(0.75 * 36864)
    mask = pruner.masks["layers.0.weight"]
    assert not (mask & ~before).any()
    assert torch.equal(model.layers[0].weight != 0, mask)


@given(st.data())
def test_any_magnitudes_and_levels(data):
    values = st.sampled_from([0.0, 1e-40, 0.5, 0.25, 0.75, -0.5, 2.0, 3e38]) | st.floats(-2, 2, width=32)
    numbers = data.draw(st.lists(values, min_size=24, max_size=60))
    levels = sorted(data.draw(st.lists(st.floats(0.01, 0.9), min_size=1, max_size=3)))
    weight = torch.tensor(numbers, dtype=torch.float32)[:, None, None, None]
    draw = lambda shape: weight.clone().view(shape)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        expected, _ = in_full(Net([(len(numbers), 1, 1)], draw), levels, patch)
        patch.setattr(bracket, "SMALL", 0)
        patch.setattr(bracket, "MOST_INSIDE", 1)
        masks, _ = pruned(Net([(len(numbers), 1, 1)], draw), levels)
    for one, other in zip(masks, expected, strict=True):
        assert torch.equal(one["layers.0.weight"], other["layers.0.weight"])
