"""Which weights go, with values from other libraries' published tests."""

import pytest
import torch
from torch import nn

from distprune.pruning import Allocation, ErdosRenyiKernel, GlobalAllocation, LampAllocation, Pruner
from tests.pruning.reference import Bag, Levels


def pruned(tensors, sparsity: float, allocation: Allocation | None = None) -> list[torch.Tensor]:
    """What is left of tensors after one update."""
    model = Bag([torch.as_tensor(t, dtype=torch.float32) for t in tensors])
    options = {"include": ["*"], "min_weights": 0, "allocation": allocation or GlobalAllocation()}
    Pruner(model, torch.optim.SGD(model.parameters()), Levels([sparsity]), **options).step()
    return [t.detach() for t in model.tensors]


def test_values_of_torch_global_pruning():
    # torch test/nn/test_pruning.py, test_global_pruning: the 4 smallest of 11 in l1.
    left = pruned([[[1.0, 2, 3, 4], [-4, -3, -2, -1]], [[0, 0.1, -2]]], 4 / 11)
    assert [t.tolist() for t in left] == [[[0, 2, 3, 4], [-4, -3, -2, 0]], [[0, 0, -2]]]


def test_two_fifths_of_17_are_7():
    # torch test/nn/test_pruning.py: 0.4 of 17 -> 7.
    left = pruned([torch.randn(10), torch.randn(7)], 0.4)
    assert sum((t == 0).sum() for t in left) == 7


@pytest.mark.parametrize(
    ("weights", "kept"),
    [
        ([1.0] * 8, [1, 1, 1, 1, 0, 0, 0, 0]),
        ([1, 0.5, 0.3, 0.2, 1, 1.5, 1.8, 2, 1, 1], [1, 0, 0, 0, 1, 1, 1, 1, 0, 0]),
    ],
)
def test_values_of_jaxpruner(weights, kept):
    # jaxpruner's tests of magnitude pruning at 0.5: of equal scores the earlier ones stay.
    (left,) = pruned([weights], 0.5)
    assert (left != 0).tolist() == [bool(x) for x in kept]


@pytest.mark.parametrize(("sparsity", "expected"), [(0.5, (0, 0.31, 0.655)), (0.8, (0.556, 0.70, 0.85))])
def test_erdos_renyi_kernel_gives_the_values_of_jaxpruner(sparsity, expected):
    # jaxpruner's tests of its distribution `erk` on shapes (2, 4), (3, 6), (2, 4, 6). At 0.5 the first saturates and
    # stays dense. Its fractions are of weights that need not be whole; ours are, so they differ by less than a weight.
    shapes = (2, 4), (3, 6), (2, 4, 6)
    left = pruned([torch.randn(shape) for shape in shapes], sparsity, ErdosRenyiKernel())
    zeros = [int((t == 0).sum()) for t in left]
    assert sum(zeros) == round(sparsity * 74)
    for count, tensor, fraction in zip(zeros, left, expected, strict=True):
        assert count == pytest.approx(fraction * tensor.numel(), abs=1)


def test_erdos_renyi_kernel_of_a_large_net_gives_the_fractions_of_its_formula():
    # RigL (Evci et al. 2020), section 3: densities in proportion to (n_in + n_out + w + h) / (n_in n_out w h).
    shapes = (4, 3, 3, 3), (128, 64, 3, 3), (256, 128, 1, 1), (100, 256)
    left = pruned([torch.randn(shape) for shape in shapes], 0.9, ErdosRenyiKernel())
    densities = [float((t != 0).double().mean()) for t in left]
    assert densities[0] == 1.0  # its share would be more than all of it
    factors = [d * t.numel() / sum(t.shape) for d, t in zip(densities[1:], left[1:], strict=True)]
    assert factors == pytest.approx([factors[0]] * 3, rel=0.01)


def test_lamp_scores_are_those_of_the_paper():
    # Lee et al. 2021, equation 2, for weights sorted by magnitude: w_u^2 / sum of w_v^2 over v >= u. Of (1, 2, 3) these
    # are 1/14, 4/13, 1, and of (10, 20) 1/5, 1: 1/14 goes first, then 1/5, then 4/13.
    order = []
    for k in (1, 2, 3):
        left = pruned([[1, 2, 3], [10, 20]], k / 5, LampAllocation())
        order.append([t.tolist() for t in left])
    assert order == [[[0, 2, 3], [10, 20]], [[0, 2, 3], [0, 20]], [[0, 0, 3], [0, 20]]]


def test_lamp_keeps_the_largest_weight_of_every_layer():
    # Same paper, section 3.1: the largest of a layer has score 1, so no layer collapses while others can give.
    left = pruned([torch.rand(100) * 1e-6, torch.rand(100) * 1e6], 0.98, LampAllocation())
    assert [int((t != 0).sum()) > 0 for t in left] == [True, True]


def test_masks_of_iterative_pruning_are_nested():
    # Frankle and Carbin 2019: each round prunes what the one before has left.
    net = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    pruner = Pruner(net, optimizer, Levels([0.2, 0.36, 0.488, 0.5904]))
    before = {name: torch.ones_like(mask) for name, mask in pruner.masks.items()}
    for round_ in range(4):
        pruner.step()
        assert not any((mask & ~before[name]).any() for name, mask in pruner.masks.items())
        assert pruner.zeros == round((0.2, 0.36, 0.488, 0.5904)[round_] * 750)
        before = {name: mask.clone() for name, mask in pruner.masks.items()}
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
