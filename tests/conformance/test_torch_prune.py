"""Side by side with torch.nn.utils.prune: where we differ, the test says why."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from distprune.pruning import Pruner, UniformAllocation
from tests.pruning.reference import Levels


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 6, bias=False))


def ours(model: nn.Module, levels, **options) -> list[torch.Tensor]:
    """Masks after each level has been reached in turn."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruner(model, optimizer, Levels(levels), min_weights=0, **options)
    for number in range(len(levels)):
        if number:
            optimizer.step()
        pruner.step()
    return list(pruner.masks.values())


def theirs(model: nn.Sequential) -> list[torch.Tensor]:
    return [model[0].weight_mask.bool(), model[2].weight_mask.bool()]


def parameters(model: nn.Sequential):
    return [(model[0], "weight"), (model[2], "weight")]


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 1000))
def test_global_pruning_of_different_weights_gives_the_same_masks(amount, seed):
    # Both round half to even. At amount 0 and at 1 theirs has no special case either.
    expected = net(seed)
    prune.global_unstructured(parameters(expected), prune.L1Unstructured, amount=amount)
    assert all(torch.equal(a, b) for a, b in zip(ours(net(seed), [amount]), theirs(expected), strict=True))


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 1000))
def test_layerwise_pruning_takes_the_same_weights_but_for_rounding(amount, seed):
    # l1_unstructured rounds in each layer; we round once, over the model, and layers share out the rest: the sum is
    # exact, and each layer's count is within one of theirs.
    expected = net(seed)
    for module, name in parameters(expected):
        prune.l1_unstructured(module, name, amount=amount)
    found = ours(net(seed), [amount], allocation=UniformAllocation())
    assert sum(int((~mask).sum()) for mask in found) == round(amount * 210)
    for mine, other in zip(found, theirs(expected), strict=True):
        assert abs(int(mine.sum()) - int(other.sum())) <= 1
        assert not (mine & ~other).any() or not (other & ~mine).any()  # one contains the other


def test_of_equal_weights_we_say_which_stay_and_torch_leaves_it_to_topk():
    # Torch takes what topk returns, which for equal values is no promise and may differ between devices. Ours is the
    # same everywhere: the earlier stay. The number is the same.
    model, other = nn.Linear(8, 1, bias=False), nn.Linear(8, 1, bias=False)
    for m in (model, other):
        nn.init.ones_(m.weight)
    prune.l1_unstructured(other, "weight", amount=0.5)
    (mask,) = ours(model, [0.5])
    assert mask.tolist() == [[True] * 4 + [False] * 4]
    assert int(other.weight_mask.sum()) == 4


def test_amounts_of_repeated_calls_compound_in_torch_and_are_of_the_whole_here():
    # Torch prunes a fraction of what the calls before have left: 0.5 four times of 44 weights gives 22, 33, 39 (5.5
    # rounds to 6), 41 (2.5 rounds to 2). Our sparsities are of all weights; the same four levels give the same counts.
    other, zeros = nn.Linear(11, 4, bias=False), []
    for _ in range(4):
        prune.l1_unstructured(other, "weight", amount=0.5)
        zeros.append(int((other.weight_mask == 0).sum()))
    assert zeros == [22, 33, 39, 41]
    model = nn.Linear(11, 4, bias=False)
    model.load_state_dict({"weight": other.weight_orig.detach()})
    (mask,) = ours(model, [n / 44 for n in zeros])
    assert torch.equal(mask, other.weight_mask.bool())
    assert int((~ours(nn.Linear(11, 4, bias=False), [0.5, 0.5, 0.5, 0.5])[0]).sum()) == 22


@pytest.mark.parametrize("levels", [(0.3, 0.6), (0.5, 0.9)])
def test_pruned_weights_stay_pruned_in_both_however_they_grow(levels):
    # Torch keeps the original and multiplies; pruned entries of weight_orig may grow but stay masked. Ours are 0.
    expected, model = net(1), net(1)
    amounts = levels[0], (levels[1] - levels[0]) / (1 - levels[0])
    prune.global_unstructured(parameters(expected), prune.L1Unstructured, amount=amounts[0])
    first = [mask.clone() for mask in theirs(expected)]
    with torch.no_grad():
        for module, _ in parameters(expected):
            module.weight_orig[module.weight_mask == 0] = 100.0
    prune.global_unstructured(parameters(expected), prune.L1Unstructured, amount=amounts[1])
    assert not any((b & ~a).any() for a, b in zip(first, theirs(expected), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours(model, levels), theirs(expected), strict=True))
